"""The page of several runs: what differs is told, what does not is not."""

import copy

import pytest

import fake_runs
from page_reader import HOSTILE, Page, assert_alone
from sft_jax.reporting.html import compare_page


def render(tmp_path, found) -> str:
  compare_page.write(tmp_path / "page.html", found)
  assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
  return (tmp_path / "page.html").read_text(encoding="utf-8")


def two(x: str = "plain"):
  """Two runs: another learning rate, one reply lost, one gained, more data."""
  first = fake_runs.finished(x)
  second = copy.deepcopy(first)
  second["config"]["optim"]["learning_rate"] = 2e-05
  second["data"]["fingerprint_inputs"]["seed"] = 7
  (source,) = second["ledger"]["sources"].values()
  source["rows_trained"] = 4
  replies = second["after"]["behaviors"]["replies"]
  replies[0] |= {"passed": False, "failed": ["equals"], "reply": "other words"}
  replies[2] |= {"passed": True, "stopped": True}
  for record in second["metrics"]:
    record["loss/nats_per_token"] /= 2
    record["speed/tokens_per_s"] = 500.0 * record["step"]
  second["start"]["versions"]["jaxlib"] = "8.8.8"
  return {"one": first, "two": second}


def test_what_differs_is_told(tmp_path):
  text = " ".join(Page(render(tmp_path, two())).text)
  for said in (
    *("optim.learning_rate", "1e-05", "2e-05"),
    "seed: 0 -> 7",
    "+1 / -1, p 1",
    "67 % (21 to 94)",  # Two of three, by Wilson.
    "two: last 0.75",
    "one: last 1.5",
    "750",  # Median of 500 and 1,000 tokens/s.
    *("9.9.9", "8.8.8"),
    *("rows trained, by source", "3", "4"),
    "failed: equals",
    "other",
    "python -m sft_jax.main --config=x.py",
  ):
    assert said in text, said
  assert "model.path" not in text  # The same in both.


def test_what_is_the_same_is_said_to_be(tmp_path):
  run = fake_runs.finished("plain")
  text = " ".join(Page(render(tmp_path, {"a": run, "b": run})).text)
  for said in (
    "The same in every key.",
    "The same rows in the same order.",
    "all runs passed the same ones",
    "The versions of everything are the same.",
  ):
    assert said in text, said


def test_other_prompts_are_not_compared(tmp_path):
  """Only prompts that both runs answered are paired."""
  found = two()
  replies = found["two"]["after"]["behaviors"]["replies"]
  replies[0]["prompt"][0]["content"] = "another question"
  text = " ".join(Page(render(tmp_path, found)).text)
  assert "+1 / -0, p 1" in text
  for reply in replies:
    reply["prompt"][0]["content"] = "another question"
  text = " ".join(Page(render(tmp_path, found)).text)
  assert "/ -0, p" not in text


@pytest.mark.parametrize(
  "part", [key for key in fake_runs.finished("plain") if key != "title"]
)
def test_any_part_of_any_run_may_be_missing(tmp_path, part):
  found = two()
  del found["two"][part]
  Page(render(tmp_path, found))
  del found["one"][part]
  Page(render(tmp_path, found))


def test_hostile_text_stays_text(tmp_path):
  harmless = Page(render(tmp_path, two("plain")))
  for x in HOSTILE:
    text = render(tmp_path, two(x))
    page = Page(text)
    assert_alone(page, text.replace("//evil", ""))
    plain = [tag for tag in page.tags if tag not in ("ins", "del")]
    assert plain == [t for t in harmless.tags if t not in ("ins", "del")], x


def test_one_run_is_none_to_compare(tmp_path):
  for number in (1, 7):
    many = {str(i): {} for i in range(number)}
    with pytest.raises(ValueError, match=f"got {number} runs"):
      compare_page.write(tmp_path / "page.html", many)
