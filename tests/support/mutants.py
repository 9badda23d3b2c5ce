"""Rows of every shape, and what damage makes of them."""

import copy
import json
import random

CALL = {"name": "f", "arguments": {"city": "Ulm", "days": [1, 2.5, None]}}
ROWS = [
  {"instruction": "Add.", "input": "2 2", "output": "4", "system": "Be."},
  {"instruction": "Add.", "output": "4", "history": [["Hi", "Hello."]]},
  {"question": "Who?", "context": "Ann ran.", "answer": "Ann.", "weight": 0.5},
  {"prompt": "2 + 2 =", "completion": "<think>\nTwos.\n</think>\n\n4"},
  {
    "prompt": [{"role": "user", "content": "Grüße \U0001f600"}],
    "completion": [{"role": "assistant", "content": "Hallo."}],
  },
  {
    "messages": [
      {"role": "system", "content": "Be."},
      {"role": "user", "content": [{"type": "text", "text": "Go"}]},
      {"role": "assistant", "content": None, "tool_calls": [CALL]},
      {"role": "tool", "content": "Done", "name": "f", "tool_call_id": "1"},
      {
        "role": "assistant",
        "content": "It is done.",
        "reasoning_content": "Hm.",
        "spans": [[0, 2], [6, 11]],
        "weight": 1,
      },
    ],
    "tools": [{"name": "f", "parameters": {"city": {"type": "string"}}}],
  },
  {
    "conversations": [
      {"from": "human", "value": "Go"},
      {"from": "function_call", "value": json.dumps(CALL)},
      {"from": "observation", "value": "Done"},
      {
        "from": "gpt",
        "value": "It is done.",
        "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}],
      },
    ],
    "tools": json.dumps([CALL]),
    "system": "Be.",
  },
  {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
  {
    "chosen": [
      {"role": "user", "content": "2 + 2?"},
      {"role": "assistant", "content": "4"},
    ],
    "rejected": [
      {"role": "user", "content": "2 + 2?"},
      {"role": "assistant", "content": "5"},
    ],
  },
  {"text": "Two and two are four."},
  {
    "input_ids": [5, 6, 7, 0],
    "labels": [-100, 6, 7, -100],
    "attention_mask": [1, 1, 1, 0],
  },
]
# What JSON can hold in any place of a row.
VALUES = [
  *(None, True, False, 0, -1, 1.5, 10**400, "", " ", "x", [], {}, [[]], [None]),
  *("\0", "\ud83d", "\ufeff", "<|im_end|>", "<think>", "</think>", "\x1b[2J"),
  *("x" * 5000, "{" * 500, [[0] * 50] * 5, {"role": "user"}, CALL, 2**31),
]
# Bytes that JSON readers trip over.
BYTES = [
  *(b"\0", b"\xff", b"\xed\xa0\x80", b"\\ud83d", b"\\u0000", b'"', b"\\"),
  *(b"{", b"}", b"[" * 200, b"]", b",", b":", b"NaN", b"-Infinity", b"1e999"),
  *(b"9" * 5000, b"\xef\xbb\xbf", b'"text": "x", ', b"null", b"\r", b" "),
]
KEYS = sorted({key for row in ROWS for key in row} | {"role", "from", "value"})


def mutated(rng: random.Random) -> bytes:
  """A line of JSON, or what was one, without the newline."""
  row = copy.deepcopy(rng.choice(ROWS))
  for _ in range(rng.choice([0, 1, 1, 2, 3])):
    _change_value(row, rng)
  line = json.dumps(row, ensure_ascii=rng.random() < 0.5)
  data = line.encode(errors="surrogatepass")
  for _ in range(rng.choice([0, 0, 1, 2, 5])):
    data = _change_bytes(data, rng)
  return data.replace(b"\n", b" ")


def _change_value(row: dict, rng: random.Random) -> None:
  """Changes, drops, doubles or renames something somewhere in the row."""
  places = list(_places(row))
  if not places:
    return
  holder, key = rng.choice(places)
  change = rng.randrange(4)
  if change == 0 or isinstance(holder, list):
    holder[key] = copy.deepcopy(rng.choice(VALUES))
  elif change == 1:
    del holder[key]
  elif change == 2:
    holder[rng.choice(KEYS)] = copy.deepcopy(holder[key])
  else:
    other, of_other = rng.choice(places)
    holder[key] = copy.deepcopy(other[of_other])


def _places(value, depth=0):
  keys = value if isinstance(value, dict) else range(len(value))
  for key in list(keys):
    yield value, key
    if isinstance(value[key], dict | list) and value[key] and depth < 8:
      yield from _places(value[key], depth + 1)


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
  at = rng.randrange(len(data) + 1)
  end = min(len(data), at + rng.choice([1, 1, 3, 30]))
  change = rng.randrange(4)
  if change == 0:
    return data[:at] + data[end:]
  if change == 1:
    return data[:at] + rng.choice(BYTES) + data[at:]
  if change == 2:
    return data[:at] + data[at:end] * 2 + data[end:]
  return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
