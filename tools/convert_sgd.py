"""SGD dialogues to tool traces: jsonl of messages that data.format reads.

    python tools/convert_sgd.py dialogues.jsonl schema.json out.jsonl

A turn of the system that calls a service becomes three: the call, the
service's results as the tool's answer, and what the system says then. The
tools on offer are the intents of the dialogue's services.
"""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from sft_jax.commands import command
from sft_jax.data.conversation import RowError
from sft_jax.data.readers import files


def tools(service: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The intents of a service as schemas of functions.

  A slot with a default is optional; one of few possible values is an enum.

  Raises:
    KeyError: it is no schema.
  """
  slots = {slot["name"]: slot for slot in service["slots"]}
  made = []
  for intent in service["intents"]:
    optional = intent["optional_slots"]
    properties = {}
    for name in [*intent["required_slots"], *optional]:
      slot = slots[name]
      schema: dict[str, Any] = {"type": "string"}
      schema["description"] = slot["description"]
      if slot["is_categorical"]:
        schema["enum"] = list(slot["possible_values"])
      if name in optional:
        schema["default"] = optional[name]
        # Such as 'dontcare', which the slot itself does not list.
        if optional[name] not in schema.get("enum", [optional[name]]):
          schema["enum"].append(optional[name])
      properties[name] = schema
    function = {
      "name": intent["name"],
      "description": intent["description"],
      "parameters": {
        "type": "object",
        "properties": properties,
        "required": intent["required_slots"],
      },
    }
    made.append({"type": "function", "function": function})
  return made


def convert(
  dialogue: Mapping[str, Any], services: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
  """One dialogue as a row of messages and tools.

  Args:
    dialogue: with its turns.
    services: the schema's services by name.

  Raises:
    KeyError: it is no dialogue, or of a service that the schema has not.
    ValueError: two services of one dialogue name an intent alike.
  """
  messages: list[dict[str, Any]] = []
  for turn in dialogue["turns"]:
    if turn["speaker"] == "USER":
      messages.append({"role": "user", "content": turn["utterance"]})
      continue
    called = [one for one in turn["frames"] if "service_call" in one]
    if called:
      calls = [
        {
          "type": "function",
          "function": {
            "name": one["service_call"]["method"],
            "arguments": one["service_call"]["parameters"],
          },
        }
        for one in called
      ]
      messages.append({"role": "assistant", "content": "", "tool_calls": calls})
    for one in called:
      messages.append(
        {
          "role": "tool",
          "name": one["service_call"]["method"],
          "content": json.dumps(one["service_results"], ensure_ascii=False),
        }
      )
    messages.append({"role": "assistant", "content": turn["utterance"]})
  offered = [
    tool for name in dialogue["services"] for tool in tools(services[name])
  ]
  names = [tool["function"]["name"] for tool in offered]
  if len(set(names)) < len(names):
    raise ValueError(
      f"{dialogue['dialogue_id']}: got intents {names}; expected names that "
      "tell them apart. Leave the dialogue out."
    )
  return {
    "id": dialogue["dialogue_id"],
    "messages": messages,
    "tools": offered,
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("dialogues", help="jsonl or json of dialogues; a glob")
  parser.add_argument("schema", help="schema.json of their services")
  parser.add_argument("out", help="jsonl to write")
  args = parser.parse_args()
  services = {
    service["service_name"]: service
    for _, service in files.read_rows(args.schema)
  }
  count = calls = 0
  with open(args.out, "w", encoding="utf-8") as out:
    for where, dialogue in files.read_rows(args.dialogues):
      try:
        row = convert(dialogue, services)
      except (KeyError, TypeError) as error:
        raise RowError(
          where,
          f"no dialogue of these services: {error!r}",
          "dialogue_id, services and turns, of services in the schema",
          "Give the schema of the same split.",
        ) from error
      count += 1
      calls += sum(len(m.get("tool_calls", ())) for m in row["messages"])
      out.write(json.dumps(row, ensure_ascii=False) + "\n")
  print(f"{count:,} dialogues with {calls:,} calls in {args.out}")


if __name__ == "__main__":
  command.run(main)
