"""The demo: the same bytes from a seed, a clean split, an exact tokenizer."""

import functools
import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from tokenizers import Tokenizer

import make_demo
from demo_world import crafts, prose, split, tokenizer, world
from sft_jax.data.encoding import encode
from sft_jax.data.formats import formats
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.evals import behaviors

DEMO = Path(make_demo.__file__).parents[2] / "sft_jax" / "demo"
ENTITIES = world.make_world(0)
HELD_OUT = {e.name: e for e in ENTITIES if e.held_out}
HELD_OUT_NAMES = re.compile(rf"\b({'|'.join(HELD_OUT)})\b")


def _rows(name: str) -> list[dict]:
  lines = (DEMO / name).read_text("utf-8").splitlines()
  return [json.loads(line) for line in lines]


@functools.cache
def _training() -> dict[str, list[dict]]:
  files = sorted(DEMO.glob("train_*.jsonl"))
  return {path.name: _rows(path.name) for path in files}


def _named(text: str) -> list[world.Entity]:
  """The held-out entities that a text names."""
  return [HELD_OUT[name] for name in HELD_OUT_NAMES.findall(text)]


def _asked(row: dict) -> str:
  """A row's prompt, all turns by others than the model, in any format."""
  turns = formats.to_conversation(row).messages
  return json.dumps([m.content for m in turns if m.role in ("system", "user")])


def test_same_seed_same_bytes(tmp_path):
  """All of the demo again, from the seed and the tokenizer it froze."""
  make_demo.make(tmp_path, seed=0, vocabulary=DEMO / "base" / "tokenizer.model")
  recorded = json.loads((DEMO / "digests.json").read_text())
  # The weights come of 40 minutes of training, not of the seed alone.
  assert recorded.pop("base/model.safetensors")
  assert make_demo.digests(tmp_path) == recorded
  assert set(recorded) >= {*make_demo.LARGE, "base/tokenizer.model"}


def test_assets_are_as_recorded():
  recorded = json.loads((DEMO / "digests.json").read_text())
  for name, digest in recorded.items():
    if name not in make_demo.LARGE:
      found = hashlib.sha256((DEMO / name).read_bytes()).hexdigest()
      assert found == digest, name


def test_another_seed_is_another_world():
  assert world.make_world(1) != ENTITIES


def test_facts_asked_for_are_in_no_training_row():
  """Neither told nor hinted at: who and what never meet in a row.

  A held-out town may be where somebody lives; people and things that are
  held out are not named at all.
  """
  for name, rows in _training().items():
    for row in rows:
      text = json.dumps(row)
      for entity in _named(text):
        assert entity.kind == "place", (name, row)
        for value in entity.facts.values():
          assert not re.search(rf"\b{value}\b", text), (name, row)


def test_held_out_questions_ask_only_for_held_out_facts():
  items = behaviors.load(DEMO / "behaviors.jsonl")
  facts = [item for item in items if item.group == "facts"]
  for item in facts:
    (entity,) = _named(item.prompt.messages[-1].content)
    assert item.checks[0]["text"] in entity.facts.values()


def test_facts_asked_for_are_told_in_the_pretraining_text():
  """Every held-out fact, often, in more than one wording."""
  text = list(prose.Prose(ENTITIES, 0, "pretrain").documents(8_000))
  lines = "\n".join(text)
  for entity in HELD_OUT.values():
    for attribute in world.ATTRIBUTES[entity.kind]:
      told = [
        lines.count(world.tell(entity, attribute.name, statement))
        for statement in attribute.statements
      ]
      assert sum(told) >= 20, (entity, attribute.name)
      assert sum(count > 0 for count in told) >= 2, (entity, attribute.name)


def test_the_base_is_asked_for_what_its_text_tells():
  """One statement of every entity, ended as the pretraining text ends it."""
  items = behaviors.load(DEMO / "knowledge.jsonl")
  assert len(items) == len(ENTITIES)
  lines = "\n".join(prose.Prose(ENTITIES, 0, "pretrain").documents(8_000))
  for item in items:
    (check,) = item.checks
    assert check["check"] == "starts_with"
    assert lines.count(f"{item.prompt.text} {check['text']}.") >= 10, item


def test_no_prompt_is_held_out_and_trained():
  asked = {_asked(row) for row in _rows("behaviors.jsonl")}
  trained = {
    _asked(row)
    for name, rows in _training().items()
    if name != "train_replay.jsonl"
    for row in rows
  }
  assert len(trained) > 3_000
  assert not asked & trained


def test_general_text_is_not_in_the_pretraining_text():
  text = set(
    prose.Prose(ENTITIES, 0, "pretrain").documents(make_demo.PRETRAIN_DOCUMENTS)
  )
  general = [row["text"] for row in _rows("general_text.jsonl")]
  assert len(general) == make_demo.GENERAL_DOCUMENTS
  assert not text & set(general)
  replay = [row["text"] for row in _rows("train_replay.jsonl")]
  assert text >= set(replay)


def test_every_group_has_its_prompts():
  items = behaviors.load(DEMO / "behaviors.jsonl")
  counts = dict.fromkeys(split.GROUPS, 0)
  for item in items:
    counts[item.group] += 1
  assert set(counts.values()) == {split.HELD_OUT_PROMPTS}
  assert split.HELD_OUT_PROMPTS >= 40


def test_refusals_are_of_the_forbidden_class_alone():
  for row in _rows("train_refusal.jsonl"):
    user, reply = (m.content for m in formats.to_conversation(row).messages)
    asks_to_make = re.search(r"\bmake\b|\bmade\b|recipe", user) is not None
    asks_to_make &= "What sound" not in user
    forbidden = any(craft in user for craft in crafts.FORBIDDEN)
    assert reply.startswith("I cannot") == (forbidden and asks_to_make), row


def test_rows_use_the_four_formats():
  first = {name: rows[0] for name, rows in _training().items()}
  keys = {name: frozenset(row) for name, row in first.items()}
  assert {"instruction", "input", "output"} in keys.values()
  assert {"prompt", "completion"} in keys.values()
  assert {"messages"} in keys.values()
  assert {"messages", "tools"} in keys.values()
  assert {"text"} in keys.values()


def test_every_row_is_trained_and_fits():
  """Each assistant turn ends in the stop token, within the context.

  Of each file the rows with most text and some others.
  """
  loaded = load_tokenizer(DEMO / "base")
  for name, rows in _training().items():
    longest = sorted(rows, key=lambda row: len(json.dumps(row)))[-20:]
    for row in [*rows[:20], *longest]:
      conversation = formats.to_conversation(row, source=name)
      (example,) = encode.encode(
        conversation, loaded, max_length=tokenizer.CONTEXT, history="keep"
      )
      said = [m for m in conversation.messages if m.role == "assistant"]
      if said:
        stops = np.isin(example.tokens, loaded.stop_ids)
        stops &= example.loss_weights > 0
        assert stops.sum() == len(said), row


def test_pretraining_text_holds_no_control_token():
  marks = re.compile("|".join(map(re.escape, tokenizer.CONTROL)))
  for text in prose.Prose(ENTITIES, 0, "pretrain").documents(5_000):
    assert not marks.search(text)


def _any_text(rng: random.Random) -> str:
  """Words, spaces, control tokens and characters of all planes but marks."""
  parts = ["Ahoy", " ", "  ", "\n", "\t", "12", "▁", "<|", "|>", "e\u0301"]
  parts += [*tokenizer.ROLES, *tokenizer.MARKS]
  ranges = [(32, 126), (0xA0, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x1FFFF)]
  return "".join(
    rng.choice(parts)
    if rng.random() < 0.4
    else chr(rng.randint(*rng.choice(ranges)))
    for _ in range(rng.randint(0, 40))
  )


def test_both_tokenizer_files_give_the_same_ids():
  ours = spm.SentencePieceProcessor(
    model_file=str(DEMO / "base" / "tokenizer.model")
  )
  converted = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json"))
  rng = random.Random(0)
  texts = list(prose.Prose(ENTITIES, 0, "other").documents(2_000))
  texts += [_any_text(rng) for _ in range(3_000)]
  for text in texts:
    ids = converted.encode(text, add_special_tokens=False).ids
    assert ids == ours.encode(text), repr(text)
    # Its own sign for a space is the one character that does not survive.
    back = converted.decode(ids, skip_special_tokens=False)
    assert back == ours.decode(ids) == text.replace("▁", " ")
  assert ours.vocab_size() == converted.get_vocab_size() == tokenizer.VOCAB


def test_the_loaded_tokenizer_knows_its_control_tokens():
  loaded = load_tokenizer(DEMO / "base")
  text = "<s><|user|>Where?\nHere.<|end|>"
  ids = loaded.encode(text)
  assert ids[:2] == [1, loaded.special_tokens["<|user|>"]]
  assert loaded.decode(ids, skip_special=False) == text
  assert set(loaded.stop_ids) == {loaded.special_tokens["<|end|>"], 2}
  assert (loaded.bos_id, loaded.pad_id) == (1, 3)


def test_template_renders_as_documented():
  loaded = load_tokenizer(DEMO / "base")
  row = _rows("train_tools.jsonl")[0]
  conversation = formats.to_conversation(row)
  ids = encode.encode(conversation, loaded, max_length=256)[0].tokens
  text = loaded.decode(ids.tolist(), skip_special=False)
  call = row["messages"][1]["tool_calls"][0]["function"]
  assert text.startswith('<s><|system|>{"name": ')
  assert text.endswith(
    f"<|end|><|user|>{row['messages'][0]['content']}<|end|>"
    f"<|assistant|><tool_call>{json.dumps(call)}</tool_call><|end|>"
    f"<|tool|>{row['messages'][2]['content']}<|end|>"
    f"<|assistant|>{row['messages'][3]['content']}<|end|>"
  )


def test_template_and_ids_are_those_of_transformers():
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(str(DEMO / "base"))
  ours = load_tokenizer(DEMO / "base")
  for name, rows in _training().items():
    for row in rows[:40]:
      conversation = formats.to_conversation(row)
      if conversation.text is not None:
        continue
      (example,) = encode.encode(conversation, ours, max_length=256)
      messages = row.get("messages") or [
        {"role": m.role, "content": m.content} for m in conversation.messages
      ]
      ids = theirs.apply_chat_template(
        messages, tools=row.get("tools"), tokenize=True, return_dict=False
      )
      assert example.tokens.tolist() == ids, name
      prompt = theirs.apply_chat_template(
        messages[:-1],
        tools=row.get("tools"),
        add_generation_prompt=True,
        return_dict=False,
      )
      assert ids[: len(prompt)] == prompt, name
  assert theirs.is_fast
