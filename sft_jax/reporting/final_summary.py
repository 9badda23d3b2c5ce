"""What a run shows of itself at its end: the result, and the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from sft_jax.checkpointing import export
from sft_jax.reporting import run_files, terminal
from sft_jax.reporting.html import run_page

# The figures shown of the texts that were not trained on.
_LOSSES = {
  "held_out/nats_per_token": "held-out rows, nats per trained token",
  "general_text/perplexity": "general text, perplexity (forgetting)",
}


def time_line(account: dict[str, float]) -> str:
  """What the seconds of `pace.Clock.account` went into, the largest first."""
  run = account["run_s"]
  parts = {name: s for name, s in account.items() if name != "run_s"}
  shares = [
    f"{name.removesuffix('_s').replace('_', ' ')} {seconds / run:.0%}"
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1])
    if seconds >= 0.005 * run
  ]
  return f"Took {terminal.duration(run)}: {', '.join(shares)}."


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
  if rows := forgetting_rows(result):
    terminal.table(
      out,
      "What is left of the base, what is known by heart",
      ("", "before", "after"),
      rows,
    )
  if "export" in result:
    evidence = export.Evidence(**result["export"])
    out.print(Text(f"{evidence.path}: {evidence}"))
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


_LEFT = {
  "kl": "KL(base || tuned), nats/token",
  "kept": "likeliest token still the base's",
  "still_right": "right where the base was",
}
_TEXTS = {"general_text": "general text", "held_out": "held-out rows"}


def forgetting_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
  """(figure, before, after) of what was lost and what was learnt by heart."""
  percent = lambda x: "-" if x is None else f"{x:.1%}"
  nats = lambda x: "-" if x is None else f"{x:.4f}"
  rows = []
  for one in result.get("forgetting", ()):
    text, _, figure = one["name"].partition("/")
    if figure in _LEFT:
      shown = nats if figure == "kl" else percent
      name = f"{_TEXTS[text]}, {_LEFT[figure]}"
      rows.append((name, shown(one["before"]), shown(one["after"])))
  if known := result.get("knowledge"):
    name = f"what the base knows, answered ({known['n']} texts)"
    rows.append((name, percent(known["before"][0]), percent(known["after"][0])))
    rows.append(
      ("of what it answered, still answered", "", percent(known["retained"]))
    )
  if gap := result.get("gap"):
    name = "held-out loss above trained rows', nats/token"
    rows.append((name, nats(gap["before"]), nats(gap["gap"])))
  return rows + _by_heart(result.get("memorisation", {}))


def _by_heart(found: dict[str, Any]) -> list[tuple[str, str, str]]:
  """(figure, before, after) of replies and of canaries."""
  percent = lambda x: "-" if x is None else f"{x:.1%}"
  rows = []
  if repeats := found.get("repeats"):
    sides = [repeats["before"], repeats["after"]]
    held_out = sides[1]["held_out_answers"]
    gram = sides[1]["gram"]
    for key, name in (
      ("whole", "replies that stand in an answer"),
      ("overlap", "longest run shared with one"),
      ("novelty", f"runs of {gram} words in none"),
    ):
      shown = [
        percent(one and one["replies"] and one["replies"][key]) for one in sides
      ]
      if held_out:
        name += f" (of held-out rows: {percent(held_out[key])})"
      rows.append((name, *shown))
  if canaries := found.get("canaries"):
    for kind in ("planted", "kept_back"):
      means = []
      for one in (canaries["before"], canaries["after"]):
        bits = [c["exposure"] for c in (one or {}).get(kind, ())]
        means.append(f"{sum(bits) / len(bits):.2f}" if bits else "-")
      most = canaries["after"]["most"]
      name = f"canaries {kind.replace('_', ' ')}, exposure of {most:g} bits"
      rows.append((name, *means))
  return rows


def _line(text: str) -> str:
  """A text on one line, cut where it would fill more than two."""
  line = " / ".join(part for part in text.splitlines() if part)
  return line if len(line) <= 150 else line[:150] + " ..."


def write_report(workdir: Path, result: dict[str, Any] | None = None) -> None:
  """Writes workdir/report.html; the first process does it for all.

  Args:
    workdir: of the run.
    result: what result.json will hold, of a run that is about to finish.
  """
  if jax.process_index() == 0:
    run = run_files.read(workdir) | ({"result": result} if result else {})
    run_page.write(workdir / "report.html", run)
