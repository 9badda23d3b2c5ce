"""What a run shows of itself: the start page, the result, the report."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from sft_jax import fit, metrics, report, sharding, terminal, trees
from sft_jax.data.pipeline import Stream
from sft_jax.setup import Config, Setup

# The figures shown of the texts that were not trained on.
_LOSSES = {
  "held_out/nats_per_token": "held-out rows, nats per trained token",
  "general_text/perplexity": "general text, perplexity (forgetting)",
}
# Of a device's matmul rate, what a training step usually reaches.
_USUAL_SHARE = 0.4


def start_page(
  config: Config,
  run_: Setup,
  start_step: int,
  out: Console,
) -> None:
  """Prints what is about to happen."""
  c, state, epoch = run_.model.config, run_.state, run_.stream.ledger.epoch
  assert epoch is not None  # A Stream has planned its first epoch.
  device = jax.devices()[0]
  num_trained, num_frozen = trees.count(state.params), trees.count(state.frozen)
  tokens = run_.num_steps * config.batch_size * config.data.seq_len
  seconds = (
    tokens
    * run_.flops_per_token
    / (_USUAL_SHARE * fit.flops_per_second(device) * run_.mesh.size)
  )
  terminal.facts(
    out,
    "Model",
    {
      "from": config.model.path
      + (" (new parameters)" if config.model.from_scratch else ""),
      "shape": f"{c.family}: {c.num_layers} layers, width {c.d_model}, "
      f"{c.num_heads} heads ({c.num_kv_heads} key/value), "
      f"vocabulary {c.vocab_size}, {config.model.dtype}",
      "parameters": f"{terminal.number(num_trained)} trained, "
      f"{terminal.number(num_frozen)} frozen",
      "devices": f"{run_.mesh.size} x {device.device_kind}, mesh "
      + " x ".join(f"{a}={n}" for a, n in run_.mesh.shape.items()),
    },
  )
  terminal.lines(out, "Data", run_.stream.ledger.lines())
  terminal.facts(
    out,
    "Plan",
    {
      "steps": f"{run_.num_steps} of {config.batch_size} rows x "
      f"{config.data.seq_len} tokens"
      + (f" in {config.accum_steps} parts" if config.accum_steps > 1 else "")
      + (f", from step {start_step}" if start_step else ""),
      "epochs": f"{run_.num_steps * config.batch_size / epoch.packs:.2f} of "
      f"{epoch.packs} packed rows",
      "fill": f"{epoch.fill:.1%} of the slots hold a token",
      "held out": _describe(run_.held_out),
      "general text": _describe(run_.general_text),
      "behaviours": f"{len(run_.items)} prompts",
      "expected time": f"about {terminal.duration(seconds)} of training",
      "workdir": config.workdir,
    },
  )
  for placement in sharding.table(state.params, run_.mesh):
    if placement.note:
      out.print(Text(f"{placement.path}: {placement.note}"))


def _describe(stream: Stream | None) -> str:
  if stream is None:
    return "none"
  return f"{len(stream.store.index):,} examples"


def show_result(out: Console, result: dict[str, Any], samples: int) -> None:
  """Prints the before -> after table, the losses and some replies."""

  def share(value: Sequence[float]) -> str:
    return "{:4.0%}  [{:.0%}, {:.0%}]".format(*value)

  if result["behaviours"]:
    terminal.table(
      out,
      "Behaviour, share passed with 95 % interval",
      ("behaviour", "n", "before", "after", "stops by itself"),
      [
        (
          row["group"],
          row["n"],
          share(row["before"]),
          share(row["after"]),
          f"{row['stopped']:.0%}",
        )
        for row in result["behaviours"]
      ],
    )
  if result["losses"]:
    terminal.table(
      out,
      "Text the model did not train on",
      ("", "before", "after", "change"),
      [
        (
          _LOSSES[row["name"]],
          f"{row['before']:.3f}",
          f"{row['after']:.3f}",
          f"{row['change']:+.1%}",
        )
        for row in result["losses"]
        if row["name"] in _LOSSES
      ],
    )
  for sample in result["samples"][:samples]:
    terminal.facts(
      out,
      sample["group"],
      {
        "prompt": _line(sample["prompt"]),
        "before": _line(sample["before"]["text"]),
        "after": _line(sample["after"]["text"]),
      },
    )


def _line(text: str) -> str:
  """A text on one line, cut where it would fill more than two."""
  line = " / ".join(part for part in text.splitlines() if part)
  return line if len(line) <= 150 else line[:150] + " ..."


def write_report(
  config: Config,
  run_: Setup,
  result: dict[str, Any],
  workdir: Path,
) -> None:
  """Writes workdir/report.html."""
  summary = {
    row["name"]: f"{row['before']:.3f} -> {row['after']:.3f}"
    for row in result["losses"]
  }
  report.write(
    workdir / "report.html",
    {
      "title": str(workdir),
      "summary": {"steps": run_.num_steps, **summary},
      "metrics": metrics.read_jsonl(workdir / "metrics.jsonl"),
      "curves": {
        "Loss, nats per trained token": [
          "loss/nats_per_token",
          "held_out/nats_per_token",
        ],
        "Learning rate": ["optim/learning_rate"],
        "Gradient norm": ["optim/grad_norm"],
      },
      "scores": result["behaviours"],
      "samples": result["samples"],
      "ledger": run_.stream.ledger.to_json(),
      "config": config.to_dict(),
      "versions": _versions(),
    },
  )


def _versions() -> dict[str, str]:
  names = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
  return {name: importlib.metadata.version(name) for name in names}
