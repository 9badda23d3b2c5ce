"""The report of a run: plain values in, one self-contained HTML page out.

The page loads nothing, runs nothing and works offline, in light and dark, on
a phone and on paper. Its parts are in pages/.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sft_jax.checkpointing import export
from sft_jax.reporting.html import behaviour, curves, ledger, rows
from sft_jax.reporting.html.elements import (
  Element,
  details,
  join,
  pairs,
  sections,
  table,
  tag,
  tiles,
  write_page,
)
from sft_jax.reporting.terminal import duration

Run = Mapping[str, Any]

# Of the losses: what is said first.
_HEADLINES = ("held_out/nats_per_token", "general_text/perplexity")
# Of its result.json: what has a part of its own.
_OF_RESULT = ("losses", "behaviours", "samples", "export")


def write(path: str | os.PathLike, run: Run) -> None:
  """Writes the page, whole or not at all. Every key is optional.

      title      text
      start      what the run said of itself at its start: 'facts' {title:
                 {name: value}}, 'said' [line], 'command', 'versions'
      config     nested dict
      metrics    [{'step': n, name: number, ...}], rows of metrics.jsonl
      incidents  [{'time', 'kind', 'step', 'said'}], lines of incidents.jsonl
      ledger     as in ledger.json
      samples    [`inspection.sample`], training examples
      data       fingerprint and causes of the data, as in data.json
      held_out   held-out examples by loss, as in evals/held_out_rows.jsonl
      before, after   measurements, as in evals/
      result     as in result.json; what is not known is shown as it is

  Raises:
    ValueError: a key that is not in this list.
  """
  known = {
    *("title", "start", "config", "metrics", "incidents", "ledger"),
    *("samples", "held_out", "before", "after", "result", "data"),
  }
  if unknown := sorted(run.keys() - known):
    raise ValueError(
      f"report.write: run has {unknown}; expected keys of {sorted(known)}. "
      "Remove or rename them: what the page leaves out would be lost in "
      "silence."
    )
  title = run.get("title", "Supervised fine-tuning")
  parts = {name: part(run) for name, part in _PARTS.items()}
  body = [tag("h1", title), _headline(run), sections(parts)]
  write_page(path, title, body)


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
  if scores := result.get("behaviours"):
    every = sum(row["n"] for row in scores)
    old, new = (
      sum(row["n"] * row[when][0] for row in scores) / every
      for when in ("before", "after")
    )
    found["of all prompts passed"] = f"{old:.0%} → {new:.0%}"
  for row in result.get("losses", ()):
    if row["name"] not in _HEADLINES:
      continue
    found[row["name"]] = f"{row['before']:.3f} → {row['after']:.3f}"
  return found


def seconds(records: Sequence[Mapping[str, Any]]) -> float:
  """Time spent on steps, as the records have it."""
  total, last = 0.0, 0
  for record in records:
    if step_s := record.get("time/step_s"):
      total += step_s * (record["step"] - last)
      last = record["step"]
  return total


def _headline(run: Run) -> Element:
  parts = [tiles(headline(run))]
  if (evidence := run.get("result", {}).get("export")) is not None:
    said = str(export.Evidence(**evidence))
    parts.append(tag("p", f"{evidence['path']}: {said}", class_="note"))
  if kinds := [line["kind"] for line in run.get("incidents", ())]:
    counted = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
    parts.append(tag("p", f"Incidents: {counted}.", class_="note"))
  return join(parts)


def _line(value: object) -> str:
  if isinstance(value, Mapping):
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in value.items())
  return str(value)


def _behaviours(run: Run) -> Element:
  return behaviour.before_after(run.get("result", {}).get("behaviours", ()))


def _forgetting(run: Run) -> Element:
  """Losses before and after, and every other figure of the result."""
  result = run.get("result", {})
  parts = []
  if losses := result.get("losses"):
    parts.append(
      table(
        ["", "before", "after", "change"],
        (
          [r["name"], r["before"], r["after"], f"{r['change']:+.1%}"]
          for r in losses
        ),
      )
    )
  for name, value in result.items():
    if name not in _OF_RESULT and value not in (None, {}, []):
      parts += [tag("h3", name.replace("_", " ")), _anything(value)]
  return join(parts)


def _anything(value: Any) -> Element:
  """Figures of whatever shape: a table of rows, of pairs, or a line."""
  if isinstance(value, Mapping):
    inner = list(value.values())
    if inner and all(isinstance(one, Mapping) for one in inner):
      return _anything([{"": key, **one} for key, one in value.items()])
    return pairs(value)
  many = isinstance(value, list | tuple) and value
  if many and all(isinstance(one, Mapping) for one in value):
    columns = dict.fromkeys(key for one in value for key in one)
    return table(
      list(columns), ([_cell(one.get(c)) for c in columns] for one in value)
    )
  return tag("p", _line(value))


def _cell(value: object) -> object:
  """Numbers and text as they are, an interval on one line."""
  if isinstance(value, list | tuple):
    return ", ".join(
      f"{one:.3g}" if isinstance(one, float) else str(one) for one in value
    )
  return _line(value) if isinstance(value, Mapping) else value


def _replies(run: Run) -> Element:
  sides = {
    when: run[when]["behaviours"]["replies"]
    for when in ("before", "after")
    if "behaviours" in run.get(when, {})
  }
  if not sides:
    return _rows_answered(run)
  note = (
    "Of each group the first prompt that was lost, gained, failed and passed, "
    "three at most. Words that only one of the replies has are marked."
  )
  return join([tag("p", note, class_="dim"), behaviour.replies(sides)])


def _rows_answered(run: Run) -> Element:
  """Of a run without behaviours: what it says to rows that were held out."""
  replies = {
    when: {row["where"]: row for row in run[when]["replies"]}
    for when in ("before", "after")
    if run.get(when, {}).get("replies")
  }
  if not replies:
    return Element("")
  first, *others = replies.values()
  # A run that was forced on may have asked for other rows.
  wheres = [where for where in first if all(where in one for one in others)]
  sides = {
    "the row": [
      {**first[where], "reply": first[where]["row"], "stopped": True}
      for where in wheres
    ],
    **{
      when: [those[where] for where in wheres]
      for when, those in replies.items()
    },
  }
  note = (
    "Held-out rows, as there are no behaviours; nothing is checked. Words that "
    "the row does not have are marked."
  )
  return join([tag("p", note, class_="dim"), behaviour.rows_answered(sides)])


def _curves(run: Run) -> Element:
  lines = run.get("incidents", ())
  marks = [(i["step"], i["kind"]) for i in lines if i["step"] is not None]
  return curves.of_run(run.get("metrics", ()), marks)


def _ledger(run: Run) -> Element:
  return ledger.ledger(run.get("ledger", {}))


def _samples(run: Run) -> Element:
  return rows.samples(run.get("samples", ()))


def _worst(run: Run) -> Element:
  return rows.worst(run.get("held_out", ()))


def _incidents(run: Run) -> Element:
  if "incidents" not in run:
    return Element("")
  if not run["incidents"]:
    return tag("p", "None: no restart, no step left out, no checkpoint lost.")
  keys = ("time", "kind", "step", "said")
  return table(keys, ([line[key] for key in keys] for line in run["incidents"]))


def _config(run: Run) -> Element:
  """What was planned, and every key."""
  parts = []
  for title, facts in run.get("start", {}).get("facts", {}).items():
    parts += [tag("h3", title), pairs(facts)]
  if said := run.get("start", {}).get("said"):
    lines = [tag("p", line) for line in said]
    parts.append(details("What else was said at the start", *lines))
  if config := run.get("config"):
    parts.append(details("Every key of the config", pairs(config)))
  return join(parts)


def _reproduce(run: Run) -> Element:
  start = run.get("start", {})
  parts = []
  if command := start.get("command"):
    note = "In a checkout of the same version, with the same files in place:"
    parts += [tag("p", note), tag("pre", command, class_="command")]
  if versions := start.get("versions"):
    parts.append(pairs(versions))
  return join(parts)


_PARTS: dict[str, Callable[[Run], Element]] = {
  "Behaviour, before and after": _behaviours,
  "Losses and forgetting": _forgetting,
  "Curves": _curves,
  "Replies, side by side": _replies,
  "Data ledger": _ledger,
  "Training samples, as the model sees them": _samples,
  "Held-out rows, the worst first": _worst,
  "Incidents": _incidents,
  "Plan and config": _config,
  "Versions, and how to reproduce this": _reproduce,
}
