"""What a run leaves behind, made up, with a text of choice in every place."""

import json
from pathlib import Path
from typing import Any

from sft_jax.reporting import run_files


def behavior(
  group: str, before: tuple, after: tuple, p: float, n: int = 9
) -> dict[str, Any]:
  """A row of result.json's behaviors."""
  return {
    "group": group, "n": n, "before": before, "after": after, "p": p,
    "gained": 7, "lost": 1, "stopped": 0.75, "format": None, "content": 0.5,
  }  # fmt: skip


def reply(x: str, where: str, text: str, passed: bool) -> dict[str, Any]:
  """A record of `behaviors.Scores.replies`."""
  return {
    "where": where,
    "group": x,
    "prompt": [{"role": "user", "content": f"{x} {where}"}],
    "reply": text,
    "reasoning": x,
    "tool_calls": [{"name": x, "arguments": {"x": 1}}],
    "stopped": passed,
    "failed": [] if passed else ["equals"],
    "format": None,
    "content": passed,
    "passed": passed,
  }


def finished(x: str) -> dict[str, Any]:
  """A finished run with the text x in every place that holds text."""
  piece = {"text": x, "special": True, "weight": 0.5, "role": "answer"}
  sample = {
    "place": x, "tokens": [1, 2], "loss_weights": [0, 0.5], "spans": [piece],
  }  # fmt: skip
  source = {
    "rows_in": 5, "rows_trained": 3, "rows_held_out": 0, "rows_text": 0,
    "dropped": {"too long": 2}, "dropped_turns": {}, "notes": {x: 1},
    "places": {"too long": [x]}, "examples": 3, "tokens_prompt": 7,
    "tokens_trained": 1234567, "roles": {"answer": [7, 5]}, "lengths": {},
  }  # fmt: skip
  mixed = {
    "copies": 1.0, "loss_weight": 1.0, "tokens": 12, "share": 1.0,
    "trained_share": 1.0,
  }  # fmt: skip
  epoch = {
    "packs": 2, "slots": 16, "tokens_prompt": 7, "tokens_trained": 5,
    "tokens_padding": 4, "mixture": {x: mixed},
  }  # fmt: skip
  sides = {
    when: [
      reply(x, f"{x}:{i}", f"{x} {when} the same words", passed=i in passed)
      for i in range(3)
    ]
    for when, passed in (("before", ()), ("after", (0, 1)))
  }
  return {
    "title": x,
    "start": {
      "command": f"python -m sft_jax.main --config=x.py {x}",
      "facts": {"Model": {"from": x}, "Plan": {"steps": x}},
      "messages": [x],
      "versions": {"jaxlib": "9.9.9", "commit": x},
    },
    "config": {"optim": {"learning_rate": 1e-05}, "model": {"path": x}},
    "metrics": [
      {"step": 1, "loss/nats_per_token": 2.0, "time/step_s": 1.0, x: 2.0},
      {"step": 2, "loss/nats_per_token": 1.5, "time/step_s": 1.0, x: None},
    ],
    "incidents": [
      {"time": "T", "kind": "resumed", "step": 1, "message": x},
      {"time": "T", "kind": "skipped", "step": None, "message": "left out"},
    ],
    "ledger": {"sources": {x: source}, "epoch": epoch},
    "samples": [sample],
    "held_out": [
      {"place": x, "nats": 15.54, "trained_tokens": 2.0,
       "nats_per_token": 7.77, **sample},
      {"place": x, "nats": 1.0, "trained_tokens": 2.0, "nats_per_token": 0.5},
    ],
    "data": {"fingerprint": "f", "fingerprint_inputs": {"seed": 0, "rows": x}},
    **{
      when: {"behaviors": {"groups": {}, "replies": replies}}
      for when, replies in sides.items()
    },
    "result": {
      "losses": [
        {"name": "held_out/nats_per_token", "before": 3.25, "after": 1.125,
         "change": -0.6538},
      ],
      "behaviors": [
        behavior(x, (0.1, 0.0, 0.3), (0.9, 0.7, 1.0), 1e-05),
        behavior("none", (0.0, 0.0, 0.3), (0.0, 0.0, 0.3), 1.0, n=0),
      ],
      "samples": [],
      "export": {
        "path": x, "dtype": x, "logit_difference": 0.0, "tolerance": 0.1,
        "rounding": 0.0,
        "stop_ids": [2], "prompts": 3,
      },
    },
  }  # fmt: skip


def write(workdir: Path, run: dict[str, Any]) -> Path:
  """Writes a workdir as a run leaves it."""
  (workdir / "evals").mkdir(parents=True)
  for name, file in run_files.FILES.items():
    (workdir / file).write_text(json.dumps(run[name]))
  lines = run_files.LINES | {"incidents": "incidents.jsonl"}
  for name, file in lines.items():
    objects = (json.dumps(line) + "\n" for line in run[name])
    (workdir / file).write_text("".join(objects))
  return workdir
