"""The report of a run: plain values in, one self-contained HTML page out.

It works offline, in light and dark, on a phone and on paper.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft_jax.checkpointing import export
from sft_jax.reporting.html import charts, figures, replies
from sft_jax.reporting.html.elements import write_page
from sft_jax.reporting.terminal import duration

Run = Mapping[str, Any]

# Of the losses: what comes first.
_HEADLINES = ("held_out/nats_per_token", "general_text/perplexity")


def write(path: str | os.PathLike, run: Run) -> None:
  """Writes the page, whole or not at all. Every key is optional.

      title      text
      start      what the run said of itself at its start: 'facts' {title:
                 {name: value}}, 'messages' [line], 'command', 'versions'
      config     nested dict
      metrics    [{'step': n, name: number, ...}], rows of metrics.jsonl
      incidents  [{'time', 'kind', 'step', 'message'}], lines of incidents.jsonl
      ledger     as in ledger.json
      samples    [`summary.sample`], training examples
      data       fingerprint and what it is made of, as in data.json
      held_out   held-out examples by loss, as in evals/held_out_rows.jsonl
      before, after   measurements, as in evals/
      result     as in result.json; what is not known is shown as it is

  Raises ValueError: a key that is not in this list.
  """
  known = {
    *("title", "start", "config", "metrics", "incidents", "ledger"),
    *("samples", "held_out", "before", "after", "result", "data"),
  }
  if unknown := sorted(run.keys() - known):
    raise ValueError(
      f"run_page.write: run has {unknown}; expected keys of {sorted(known)}. "
      "Remove or rename them: what the page leaves out would be lost in "
      "silence."
    )
  result, lines = run.get("result", {}), run.get("incidents")
  marks = [(i["step"], i["kind"]) for i in lines or () if i["step"] is not None]
  kinds = [line["kind"] for line in lines or ()]
  evidence = result.get("export")
  write_page(
    path,
    "run.html.jinja",
    title=run.get("title", "Supervised fine-tuning"),
    tiles=headline(run),
    export=evidence and f"{evidence['path']}: {export.Evidence(**evidence)}",
    kinds=[f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)],
    behaviors=figures.behaviors(result.get("behaviors", ())),
    figures=figures.of_result(result),
    curves=charts.of_run(run.get("metrics", ()), marks, run.get("before")),
    replies=replies.before_and_after(run),
    ledger=figures.of_ledger(run.get("ledger", {})),
    samples=run.get("samples", ()),
    held_out=_hardest(run.get("held_out", ())),
    incidents=lines,
    start=run.get("start", {}),
    config=run.get("config", {}),
  )


def headline(run: Run) -> dict[str, object]:
  """The figures that come first, as far as there are any: {name: value}."""
  records, result = run.get("metrics", ()), run.get("result", {})
  found: dict[str, object] = {}
  facts = run.get("start", {}).get("facts", {}).get("Model", {})
  if "from" in facts:
    found["model"] = facts["from"]
  if records:
    found["steps"] = records[-1]["step"]
    found["spent on steps"] = duration(seconds(records))
  if scores := result.get("behaviors"):
    every = sum(row["n"] for row in scores)
    rate = lambda side: sum(row["n"] * row[side][0] for row in scores) / every
    passed = f"{rate('before'):.0%} → {rate('after'):.0%}"
    found["of all prompts passed"] = passed
  for row in result.get("losses", ()):
    if row["name"] in _HEADLINES:
      shown = f"{row['before']:.3f} → {row['after']:.3f}"
      found[figures.label(row["name"])] = shown
  return found


def seconds(records: Sequence[Mapping[str, Any]]) -> float:
  """Time spent on steps, as the records have it."""
  total, last = 0.0, 0
  for record in records:
    if step_s := record.get("time/step_s"):
      total += step_s * (record["step"] - last)
      last = record["step"]
  return total


def _hardest(held_out: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """Held-out rows as in evals/held_out_rows.jsonl, all in a histogram, and by
  source those with their text; None without."""
  if not held_out:
    return None
  losses = sorted(row["nats_per_token"] for row in held_out)
  counts, edges = np.histogram(losses, 24, (0, losses[-1] or 1))
  bins = list(zip(edges[:-1], edges[1:], counts.tolist(), strict=True))
  sources: dict[str, list[Mapping[str, Any]]] = {}
  for row in held_out:
    if "spans" in row:
      sources.setdefault(row.get("source", ""), []).append(row)
  title, unit = "Held-out examples by loss", "nats per token"
  return {
    "losses": losses,
    "histogram": charts.histogram(title, bins, unit),
    "sources": sources,
  }
