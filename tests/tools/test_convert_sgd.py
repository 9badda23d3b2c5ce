"""Dialogues become tool traces: call, result, answer."""

import json
import sys
from pathlib import Path

import pytest

import convert_sgd
from sft_jax.data.conversation import ToolCall
from sft_jax.data.formats import formats
from sft_jax.data.readers import files

SHARED = Path(__file__).parents[3] / "shared" / "data"
SERVICE = {
  "service_name": "Trains_9",
  "slots": [
    {
      "name": name,
      "description": f"the {name}",
      "is_categorical": bool(values),
      "possible_values": values,
    }
    for name, values in [("to", []), ("class", ["1", "2"]), ("seat", ["a"])]
  ],
  "intents": [
    {
      "name": "Find",
      "description": "Find a train",
      "required_slots": ["to"],
      "optional_slots": {"class": "dontcare", "seat": "a"},
    }
  ],
}
FRAME = {
  "service": "Trains_9",
  "service_call": {"method": "Find", "parameters": {"to": "Ulm"}},
  "service_results": [{"at": "9"}],
}
DIALOGUE = {
  "dialogue_id": "1",
  "services": ["Trains_9"],
  "turns": [
    {"speaker": "USER", "utterance": "A train to Ulm?", "frames": [{}]},
    {"speaker": "SYSTEM", "utterance": "At nine.", "frames": [FRAME]},
    {"speaker": "USER", "utterance": "Thanks.", "frames": [{}]},
    {"speaker": "SYSTEM", "utterance": "Bye.", "frames": [{}]},
  ],
}


def test_schemas():
  (tool,) = convert_sgd.tools(SERVICE)
  assert tool["function"]["parameters"] == {
    "type": "object",
    "properties": {
      "to": {"type": "string", "description": "the to"},
      "class": {
        "type": "string",
        "description": "the class",
        "enum": ["1", "2", "dontcare"],
        "default": "dontcare",
      },
      "seat": {
        "type": "string",
        "description": "the seat",
        "enum": ["a"],
        "default": "a",
      },
    },
    "required": ["to"],
  }


def test_a_trace():
  row = convert_sgd.convert(DIALOGUE, {"Trains_9": SERVICE})
  made = formats.to_conversation(row)
  assert [(m.role, m.content) for m in made.messages] == [
    ("user", "A train to Ulm?"),
    ("assistant", ""),
    ("tool", '[{"at": "9"}]'),
    ("assistant", "At nine."),
    ("user", "Thanks."),
    ("assistant", "Bye."),
  ]
  assert made.messages[1].tool_calls == (ToolCall("Find", {"to": "Ulm"}),)
  assert made.messages[2].name == "Find"
  assert made.tools == tuple(convert_sgd.tools(SERVICE))


def test_two_services_with_one_intent():
  twice = {**DIALOGUE, "services": ["Trains_9", "Trains_8"]}
  with pytest.raises(ValueError, match="names that tell them apart"):
    convert_sgd.convert(twice, {"Trains_9": SERVICE, "Trains_8": SERVICE})


def run(monkeypatch, *args):
  monkeypatch.setattr(sys, "argv", ["convert_sgd.py", *map(str, args)])
  convert_sgd.main()


def test_files(tmp_path, monkeypatch, capsys):
  (tmp_path / "d.jsonl").write_text(json.dumps(DIALOGUE))
  (tmp_path / "schema.json").write_text(json.dumps([SERVICE]))
  out = tmp_path / "out.jsonl"
  run(monkeypatch, tmp_path / "d.jsonl", tmp_path / "schema.json", out)
  assert "1 dialogues with 1 calls" in capsys.readouterr().out
  (row,) = [row for _, row in files.read_rows(out)]
  assert row == convert_sgd.convert(DIALOGUE, {"Trains_9": SERVICE})
  (tmp_path / "schema.json").write_text("[]")
  with pytest.raises(ValueError, match=r"d.jsonl:1: got no dialogue of these"):
    run(monkeypatch, tmp_path / "d.jsonl", tmp_path / "schema.json", out)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
def test_real_dialogues():
  tools = SHARED / "tools"
  schema = files.read_rows(tools / "sgd_train_schema.json")
  services = {one["service_name"]: one for _, one in schema}
  count = calls = turns = 0
  path = tools / "sgd_train_200.jsonl"
  for where, dialogue in files.read_rows(path):
    row = convert_sgd.convert(dialogue, services)
    made = formats.to_conversation(row, source=where)
    called = [call for m in made.messages for call in m.tool_calls]
    offered = {tool["function"]["name"]: tool for tool in made.tools}
    for call in called:
      schema = offered[call.name]["function"]["parameters"]
      assert set(schema["required"]) <= set(call.arguments)
      assert set(call.arguments) <= set(schema["properties"])
    count += 1
    calls += len(called)
    turns += len(made.messages) - 2 * len(called)
  # The file has 1,560 turns of each side, and 404 calls.
  assert (count, calls, turns) == (200, 404, 3120)
