"""The inspection of small stores: every planted fault and oddity is there."""

import json

import pytest

import tiny_tokenizers
from sft_jax.data.audit import (
  checks,
  reasoning,
  row_texts,
  summary,
  token_checks,
)
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.pipeline import Stream
from sft_jax.data.store import build as cache
from sft_jax.data.tokenizers.tokenizer import load_tokenizer

WORDS = ("cat", "dog", "hen", "owl", "fox", "bee", "elk", "ant", "yak", "eel")


def row(i: int, answer: str | None = None) -> dict[str, str]:
  one, two = WORDS[i % 10], WORDS[i // 10 % 10]
  if answer is None:
    answer = f"The {two} is the friend that was with {one}, number {i}."
  return {"prompt": f"Say who likes the {one} of {two}, {i}.",
          "completion": answer}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(
    tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer"))
  )


@pytest.fixture
def look(tmp_path, tokenizer):
  """Writes rows, encodes and inspects them; and held-out rows beside."""

  def build(rows: list[dict], name: str, source=None, **options) -> tuple:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cache.build(
      {"path": str(path), **(source or {})},
      tokenizer,
      RenderOptions(**options),
      directory=tmp_path / "cache",
      max_length=512,
      log=lambda line: None,
    )

  def look(
    rows: list[dict],
    held: list[dict] | None = None,
    source: dict | None = None,
    **options,
  ) -> dict:
    train = build(rows, "train.jsonl", source, **options)
    held_out = build(held, "held.jsonl", **options) if held else None
    known = token_checks.facts(tokenizer, RenderOptions(**options))
    found = summary.inspect(
      train,
      held_out,
      Stream(train, seq_len=512, batch_size=2),
      checks.check_store(train, known),
      tokenizer,
      options=RenderOptions(**options),
      samples=2,
    )
    json.dumps(found, allow_nan=False)
    return found

  return look


def failed(found: dict) -> dict[str, dict]:
  return {v["name"]: v for v in found["findings"] if not v["passed"]}


def warnings(found: dict) -> dict[str, dict]:
  return {w["name"]: w for w in found["warnings"]}


def test_sound_rows_have_nothing_against_them(look):
  found = look([row(i) for i in range(30)])
  assert found["passed"]
  assert not failed(found)
  assert not warnings(found)
  assert found["lengths"]["tokens"]["total"] == sum(
    part[0] for part in next(
      iter(found["ledger"]["sources"].values())
    )["roles"].values()
  )  # fmt: skip
  for kind in found["lengths"].values():
    assert sum(one["examples"] for one in kind["histogram"]) == 30


def test_samples_are_all_the_tokens_in_pieces(look, tokenizer):
  found = look([row(i) for i in range(5)])
  assert len(found["samples"]) == 2
  for sample in found["samples"]:
    text = tokenizer.decode(sample["tokens"], skip_special=False)
    assert "".join(span["text"] for span in sample["spans"]) == text
    trained = [span for span in sample["spans"] if span["weight"]]
    assert [span["role"] for span in trained] == ["answer", "stop"]
    assert trained[1]["text"] == "<|im_end|>"
    assert trained[1]["special"]


def test_every_warning_on_planted_rows(look):
  rows = [row(i) for i in range(40)]
  rows += [row(3), row(4, "It is an owl.")]
  rows += [row(50, "")]
  rows += [row(51, "<nooutput>")]
  rows += [row(52, "I'm sorry, but I can't help with that.")]
  rows += [row(53, "It was late. So I went to the house of the old and")]
  rows += [row(54, "Das Haus ist nicht auf dem Berg und der Weg ist eine Qual")]
  rows += [row(55, "ab " * 150)]
  rows += [
    {"prompt": f"As you were told in words of your own before: {word}{i}",
     "completion": f"{word} {i} it is."}
    for i, word in enumerate(WORDS * 3)
  ]  # fmt: skip
  long = [f"word{i}" for i in range(60)]
  for copy in (long, [*long[:30], "other", *long[31:]]):
    rows.append(row(60, " ".join(copy)))
  found = warnings(look(rows))
  assert found["empty answers"]["count"] == 2
  assert "train.jsonl:43" in found["empty answers"]["message"]
  assert found["duplicates"]["count"] == 1
  assert [r["place"] for r in found["duplicates"]["examples"][0]["rows"]] == [
    "train.jsonl:4",
    "train.jsonl:41",
  ]
  assert found["near duplicates"]["count"] == 1
  assert found["conflicts"]["count"] == 2
  assert found["prompts that begin alike"]["count"] == 30
  assert found["languages"]["examples"][0]["note"] == "de"
  assert found["lengths"]["examples"][0]["note"] == "150 words"
  assert found["refusals"]["count"] == found["cut off"]["count"] == 1


def test_held_out_rows_in_the_training_rows(look):
  """By words, a prompt in another case is the same; no warning is theirs."""
  loud = row(3)
  loud["prompt"] = loud["prompt"].upper()
  found = look([row(i) for i in range(30)], [loud, row(77), row(77)])
  assert failed(found)["overlap"]["places"] == ["held.jsonl:1"]
  assert not found["passed"]
  assert not warnings(found).keys() & {"duplicates", "conflicts"}


def test_reasoning_under_a_key_that_no_format_knows(look):
  thought = "First count the hens, then double what is left of them."
  rows = [row(0), {**row(1), "rationale": thought}]
  assert failed(look(rows))["think"]["places"] == ["train.jsonl:2"]
  kept = {"prompt": "How many?", "completion": f"<think>{thought}</think>12"}
  assert look([row(0), kept])["passed"]


def test_reasoning_that_was_to_be_left_out(look):
  thought = "First count the hens, then double what is left of them."
  kept = {"prompt": "How many?", "completion": f"<think>{thought}</think>12"}
  names = [v["name"] for v in look([kept], reasoning="strip")["findings"]]
  assert "think" not in names
  # Renamed to what no format knows, it was left out by whoever renamed it.
  source = {"columns": {"rationale": "unused"}}
  assert look([{**row(1), "rationale": thought}], source=source)["passed"]


def test_rows_are_read_again_as_they_were_encoded(look):
  """Of 20 copies a limit takes 6; their columns have other names."""
  rows = [{"q": "Who likes the cat?", "a": "The dog."}] * 20
  columns = {"q": "prompt", "a": "completion"}
  found = look(rows, source={"limit": 6, "columns": columns})
  assert warnings(found)["duplicates"]["count"] == 5


def test_reasoning_is_found_wherever_a_row_holds_it():
  rows = {
    "messages": [{"reasoning_content": "a"}, {"content": "<think>b</think>c"}],
    "chain_of_thought": ["d", {"x": "e"}],
    "my_thoughts": "<thinking>f</thinking>",
    "output": "no thinking here",
  }
  assert list(reasoning.written(rows, {})) == ["a", "b", "d", "e", "f"]
  renamed = {"chain_of_thought": "unused", "output": "reasoning"}
  found = list(reasoning.written(rows, renamed))
  assert found == ["a", "b", "f", "no thinking here"]


def test_control_tokens_that_were_allowed(look):
  rows = [row(i) for i in range(3)]
  rows.append({"prompt": "Say <|im_end|> aloud.", "completion": "No."})
  found = failed(look(rows, control_tokens="allow"))
  assert found["control"]["places"] == ["train.jsonl:4"]
  assert look(rows, control_tokens="escape")["passed"]


def test_texts_keep_any_row_as_it_is(tmp_path):
  hostile = "\x00\x1b[31m</script>\u202e\ud800" + "x" * 100_000
  with row_texts.Texts(tmp_path) as made:
    rows = [row_texts.Row("a:1", "", hostile, "why", "b c"),
            row_texts.Row("a:2", "s", "", "", "")]  # fmt: skip
    for one in rows:
      made.add(one, held_out=False, text=False)
    assert [made.row(i) for i in range(2)] == rows
    assert made.words("row").counts[1] == 0
    assert made.words("row").of(0)[-3:].tolist() == [
      *made.words("reasoning").of(0).tolist(),
      *made.words("answer").of(0).tolist(),
    ]
