"""Causes: what differs between two builds, said in words."""

from sft_jax.data.store.fingerprint import differences


def test_differences_are_named():
  before = {
    "examples": "0" * 64,
    "source 1": {"file 1 (a.jsonl)": "1" * 64, "format": "auto"},
    "options": {"history": "auto", "template_kwargs": {}},
    "seed": 0,
  }
  after = {
    "examples": "f" * 64,
    "source 1": {"file 1 (a.jsonl)": "2" * 64, "format": "auto"},
    "source 2": {"file 1 (b.jsonl)": "3" * 64, "format": "auto"},
    "options": {"history": "split", "template_kwargs": {"thinking": False}},
    "seed": 0,
  }
  assert differences(before, before) == []
  assert differences(before, after) == [
    "source 1, file 1 (a.jsonl): changed",
    "options, history: 'auto' -> 'split'",
    "options, template_kwargs, thinking: new",
    "source 2: new",
  ]
  assert "source 2: gone" in differences(after, before)
  # Nothing else says why: other code has made them.
  other = before | {"examples": "f" * 64}
  assert differences(before, other) == ["examples: changed"]
