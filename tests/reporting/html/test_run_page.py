"""The report: everything given is on the page, as text and nothing else."""

import json
import re

import pytest

import fake_runs
from page_reader import HOSTILE, Page, assert_alone
from sft_jax.reporting import run_files
from sft_jax.reporting.html import run_page


def render(tmp_path, run) -> str:
  path = tmp_path / "report.html"
  run_page.write(path, run)
  assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
  return path.read_text(encoding="utf-8")


def test_hostile_text_stays_text(tmp_path):
  """Whatever the text, the page has the elements of the harmless page."""
  harmless = Page(render(tmp_path, fake_runs.finished("plain")))
  for x in HOSTILE:
    page = Page(render(tmp_path, fake_runs.finished(x)))
    # What differs is marked word by word, of which texts have many or few.
    plain = [tag for tag in page.tags if tag not in ("ins", "del")]
    assert plain == [t for t in harmless.tags if t not in ("ins", "del")], x
    assert {name for name, _ in page.attributes} == {
      name for name, _ in harmless.attributes
    }, x
    assert "".join(page.text).count(x) >= 25, x


def test_nothing_is_loaded(tmp_path):
  text = render(tmp_path, fake_runs.finished("plain"))
  assert_alone(Page(text), text)


def test_everything_is_on_the_page(tmp_path):
  """Each part of a finished run, by a figure that no other part has."""
  page = Page(render(tmp_path, fake_runs.finished("plain")))
  text = " ".join(page.text)
  for said in (
    "10% → 90%",  # of all prompts passed
    "10 % (0 to 30)",
    "90 % (70 to 100)",
    "+80 points",
    "< 0.001",
    "3.250 → 1.125",
    "-65.4%",
    "did not stop",
    "failed: equals",
    "loss/nats_per_token: last 1.5",
    "1,234,567",  # tokens trained, in the ledger
    "2 rows dropped, too long",
    "weight 0.5",
    "7.77 nats per token",
    "1 resumed, 1 skipped",
    "left out",
    "optim.learning_rate",
    "1e-05",
    "python -m sft_jax.main --config=x.py",
    "jaxlib",
    "9.9.9",
    "weights equal, logits within 0.0e+00",
  ):
    titles = [value for name, value in page.attributes if name == "title"]
    assert said in text or any(said in (t or "") for t in titles), said


def test_without_behaviors_held_out_rows_are_answered(tmp_path):
  row = {"where": "a.jsonl:3", "prompt": "How?", "row": "It is so."}
  sides = {
    "before": [{**row, "reply": "no idea", "stopped": False}],
    "after": [{**row, "reply": "It is not so.", "stopped": True}],
  }
  run = {when: {"replies": replies} for when, replies in sides.items()}
  page = render(tmp_path, run)
  text = " ".join(Page(page).text)
  for said in ("a.jsonl:3", "How?", "It is so.", "no idea", "did not stop"):
    assert said in text
  assert "It is <ins>not </ins>so." in page
  run["after"]["replies"].append(
    {**row, "where": "b", "reply": "", "stopped": True}
  )
  Page(render(tmp_path, run))  # Forced on with another number of samples.
  assert "passed" not in text
  assert "failed" not in text


def test_figures_of_a_kind_that_is_not_known_are_shown(tmp_path):
  """Whatever an evaluation adds to result.json is a table of its own."""
  run = fake_runs.finished("plain")
  run["result"]["retained_answers"] = {"kept": 41, "of": 43}
  run["result"]["overlaps"] = [{"row": "a.jsonl:3", "overlap": 0.875}]
  run["result"]["kl"] = {"code": {"nats": 0.0625}, "maths": {"nats": 0.125}}
  run["result"]["canary"] = "no exposure"
  text = " ".join(Page(render(tmp_path, run)).text)
  for said in (
    *("retained answers", "41", "43", "a.jsonl:3", "0.875", "code", "0.0625"),
    *("maths", "0.125", "no exposure"),
  ):
    assert said in text, said


@pytest.mark.parametrize(
  "part",
  [None, *(key for key in fake_runs.finished("plain") if key != "title")],
)
def test_any_part_may_be_missing(tmp_path, part):
  """Of runs under way or halted, and of those that measure nothing."""
  run = fake_runs.finished("plain")
  Page(render(tmp_path, {k: v for k, v in run.items() if k != part}))
  if part:
    Page(render(tmp_path, {part: run[part]}))
  else:
    Page(render(tmp_path, {}))


@pytest.mark.parametrize(
  ("before", "after", "p", "verdict"),
  [
    ((0.2, 0.1, 0.3), (0.5, 0.4, 0.6), 0.001, "good"),
    ((0.5, 0.4, 0.6), (0.2, 0.1, 0.3), 0.001, "bad"),
    ((0.5, 0.4, 0.6), (0.7, 0.6, 0.8), 0.05, "dim"),
    ((0.5, 0.4, 0.6), (0.5, 0.4, 0.6), 1.0, "dim"),
  ],
)
def test_a_change_within_chance_is_no_improvement(
  tmp_path, before, after, p, verdict
):
  row = fake_runs.behavior("g", before, after, p)
  page = render(tmp_path, {"result": {"behaviors": [row]}})
  points = f"{100 * (after[0] - before[0]):+.0f} points"
  assert f'<span class="{verdict}">{points}' in page


def test_time_spent_is_the_sum_over_steps():
  records = [
    {"step": 10, "time/step_s": 2.0},
    {"step": 10, "held_out/nats_per_token": 1.0},
    {"step": 15, "time/step_s": 4.0},
  ]
  assert run_page.seconds(records) == 40.0


def test_unknown_keys_are_refused(tmp_path):
  with pytest.raises(ValueError, match="'sample'"):
    run_page.write(tmp_path / "report.html", {"sample": []})
  assert not list(tmp_path.iterdir())


def test_a_workdir_is_read_as_far_as_it_goes(tmp_path):
  with pytest.raises(ValueError, match=r"config\.json"):
    run_files.read(tmp_path)
  fake_runs.write(tmp_path / "run", fake_runs.finished("plain"))
  read = run_files.read(tmp_path / "run")
  want = fake_runs.finished("plain") | {"title": str(tmp_path / "run")}
  assert json.loads(json.dumps(read)) == json.loads(json.dumps(want))
  (tmp_path / "run" / "result.json").unlink()
  assert "result" not in run_files.read(tmp_path / "run")


def test_known_figures_are_no_dumps(tmp_path):
  """Gap, knowledge, memorization and time in words and rounded."""
  run = fake_runs.finished("plain")
  run["result"] |= {
    "forgetting": [
      {"name": "general_text/top1_agreement", "before": 1.0, "after": 0.7831234}
    ],
    "gap": {"train_rows": 1.0, "held_out": 1.25, "gap": 0.251234567890123,
            "before": 0.0123456789},
    "knowledge": {"n": 88, "before": (0.5, 0.4, 0.6), "after": (0.25, 0.2, 0.3),
                  "retained": 0.4567890123, "gained": 1, "lost": 23, "p": 1e-9},
    "memorization": {"repeats": None, "canaries": {
      "before": None, "after": {"most": 8.0, "kept_back": [],
        "planted": [{"box": 1, "code": "1", "exposure": 7.123456789}]}}},
    "time": {"run_s": 100.0, "compute_s": 61.23456789, "save_s": 38.7654321},
  }  # fmt: skip
  text = " ".join(Page(render(tmp_path, run)).text)
  for shown in (
    "general text, most likely token is the base's", "78.3%", "0.2512",
    "0.0123", "25 % (20 to 30)", "45.7%", "1 / 23, < 0.001", "7.12",
    "1 min 01 s", "61%",
  ):  # fmt: skip
    assert shown in text, shown
  assert not re.findall(r"\d\.\d{6,}", text)
  assert "{'" not in text


def test_calls_in_prompts_are_seen(tmp_path):
  run = fake_runs.finished("plain")
  call = {"name": "weather", "arguments": {"city": "Oslo"}}
  for when in ("before", "after"):
    for reply in run[when]["behaviors"]["replies"]:
      turn = {"role": "assistant", "content": "", "tool_calls": [call]}
      reply["prompt"].append(turn)
  text = " ".join(Page(render(tmp_path, run)).text)
  assert '(calls) weather {"city": "Oslo"}' in text


def test_held_out_rows_are_shown_by_source(tmp_path):
  run = fake_runs.finished("plain")
  first, other = run["held_out"]
  rows = [first | {"source": "a.jsonl", "change": 0.5}]
  rows += [first | {"source": "b.jsonl", "change": -1.25, "place": "b:2"}]
  run["held_out"] = [*rows, other]
  text = " ".join(Page(render(tmp_path, run)).text)
  a, b = text.index("7.77 nats per token (+0.50)"), text.index("(-1.25)")
  assert text.index("a.jsonl") < a < text.index("b.jsonl") < b
