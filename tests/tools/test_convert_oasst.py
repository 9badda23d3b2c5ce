"""Trees become threads in which every reply is trained exactly once."""

import collections
import json
import sys
from pathlib import Path

import pytest

import convert_oasst
from sft_jax.data.formats import formats
from sft_jax.data.readers import files

SHARED = Path(__file__).parents[3] / "shared" / "data"


def message(name, *replies, **fields):
  role = "assistant" if name.startswith("a") else "prompter"
  return {
    "message_id": name,
    "role": role,
    "text": f"text of {name}",
    "replies": list(replies),
    **fields,
  }


TREE = {
  "message_tree_id": "t",
  "prompt": message(
    "p",
    message("a1", message("p1", message("a11")), message("p2"), rank=1),
    message("a2", message("p3", message("a31"), message("a32")), rank=0),
    message("a3", message("p4", message("a41")), deleted=True),
    message("a4", review_result=False),
  ),
}


def threads(tree, **kwargs):
  """Names of each thread's messages; those not trained in brackets."""
  return [
    " ".join(
      f"[{name}]" if one.get("weight") == 0 else name
      for one in row["messages"]
      for name in [one["content"].split()[-1]]
    )
    for row in convert_oasst.convert(tree, **kwargs)
  ]


def test_every_thread_and_every_reply_trained_once():
  assert threads(TREE) == [
    "p a1 p1 a11",
    "p a2 p3 a31",
    "p [a2] p3 a32",
  ]


def test_the_best_replies_alone():
  assert threads(TREE, best=True) == ["p a2 p3 a31"]


def test_a_tree_without_replies_has_no_conversations():
  assert threads({"message_tree_id": "t", "prompt": message("p")}) == []


def run(monkeypatch, *args):
  monkeypatch.setattr(sys, "argv", ["convert_oasst.py", *map(str, args)])
  convert_oasst.main()


def test_files(tmp_path, monkeypatch, capsys):
  german = {**TREE, "prompt": {**TREE["prompt"], "lang": "de"}}
  english = {**TREE, "prompt": {**TREE["prompt"], "lang": "en"}}
  lines = [json.dumps(tree) + "\n" for tree in (german, english)]
  (tmp_path / "trees.jsonl").write_text("".join(lines))
  out = tmp_path / "out.jsonl"
  run(monkeypatch, tmp_path / "trees.jsonl", out, "--lang=en")
  assert "1 trees: 3 conversations" in capsys.readouterr().out
  made = [formats.to_conversation(row) for _, row in files.read_rows(out)]
  weights = [[m.loss_weight for m in one.messages] for one in made]
  assert weights == [[0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]


def test_other_rows_are_refused(tmp_path, monkeypatch):
  (tmp_path / "rows.jsonl").write_text('{"text": "x"}')
  with pytest.raises(ValueError, match=r"rows.jsonl:1: got no tree"):
    run(monkeypatch, tmp_path / "rows.jsonl", tmp_path / "out.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
def test_real_trees():
  path = SHARED / "multiturn" / "oasst_en100_tree.jsonl"
  trained = collections.Counter()
  replies = 0
  for where, tree in files.read_rows(path):
    pending = [tree["prompt"]]
    while pending:
      one = pending.pop()
      replies += one["role"] == "assistant"
      pending += one["replies"]
    for row in convert_oasst.convert(tree):
      made = formats.to_conversation(row, source=where)
      roles = [m.role for m in made.messages]
      assert roles == ["user", "assistant"] * (len(roles) // 2)
      trained["turns"] += sum(m.loss_weight > 0 for m in made.messages)
      trained["rows"] += 1
  # Counted apart from the converter: nothing there is deleted or refused.
  assert trained["turns"] == replies == 687
  assert trained["rows"] > 100
