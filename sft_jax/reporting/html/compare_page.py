"""One page of several runs: what was done differently, and what came of it.

The first run is the one that the others are compared with.
"""

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sft_jax.data.store import fingerprint
from sft_jax.evals import behaviours
from sft_jax.reporting import run_files
from sft_jax.reporting.html import charts, run_page
from sft_jax.reporting.html.elements import Table, flat, tag, write_page

Runs = Mapping[str, run_page.Run]


def write(path: str | os.PathLike, runs: Runs) -> None:
  """Writes the page, whole or not at all.

  Args:
    path: of the page.
    runs: by name, what `report.write` takes, as `record.read` finds it.

  Raises:
    ValueError: fewer than two runs, or more than there are colours.
  """
  if not 2 <= len(runs) <= charts.COLORS:
    raise ValueError(
      f"compare: got {len(runs)} runs, expected 2 to {charts.COLORS}. "
      "More could not be told apart: leave some out."
    )
  starts = {name: run.get("start", {}) for name, run in runs.items()}
  write_page(
    path,
    "compare.html.jinja",
    title=f"{len(runs)} runs: {', '.join(runs)}",
    runs=list(runs),
    headline=_headline(runs),
    behaviours=_behaviours(runs),
    losses=_losses(runs),
    curves=charts.of_runs({n: r.get("metrics", ()) for n, r in runs.items()}),
    config=_differing(
      runs, "key", [run.get("config", {}) for run in runs.values()]
    ),
    data=_data(runs),
    speed=_speed(runs),
    replies=_replies(runs),
    incidents=_by_run(
      runs,
      "",
      [("incidents", [len(r.get("incidents", ())) for r in runs.values()])],
    ),
    versions=_differing(
      runs, "version", [s.get("versions", {}) for s in starts.values()]
    ),
    commands={n: s["command"] for n, s in starts.items() if s.get("command")},
  )


def _by_run(
  runs: Runs, head: str, rows: Iterable[tuple[str, Sequence[object]]]
) -> list[Table]:
  """A row per figure, a column per run; no table without rows."""
  made = [[name, *cells] for name, cells in rows]
  return [Table("", [head, *runs], made)] if made else []


def _headline(runs: Runs) -> list[Table]:
  found = [run_page.headline(run) for run in runs.values()]
  names = dict.fromkeys(name for one in found for name in one)
  return _by_run(
    runs, "", ((name, [one.get(name, "") for one in found]) for name in names)
  )


def _after(run: run_page.Run) -> behaviours.Scores | None:
  scores = run.get("after", {}).get("behaviours")
  return behaviours.Scores.from_json(scores) if scores else None


def _behaviours(runs: Runs) -> list[Table]:
  """After training: a row per group; runs are paired with the first."""
  scores = {name: _after(run) for name, run in runs.items()}
  found = {name: one.groups for name, one in scores.items() if one}
  groups = dict.fromkeys(group for one in found.values() for group in one)
  if not groups:
    return []
  against = {name: _paired(scores, name) for name in list(runs)[1:]}
  rows = []
  for group in groups:
    shares = [
      (one.rate, *one.interval)
      if (one := found.get(name, {}).get(group))
      else None
      for name in runs
    ]
    drawn = charts.intervals(shares, f"{group}: {', '.join(runs)}")
    rows.append(
      [
        group,
        *map(run_page.share, shares),
        drawn,
        *(pairs.get(group, "") for pairs in against.values()),
      ]
    )
  first = next(iter(runs))
  versus = [f"{name} against {first}" for name in against]
  note = (
    "Share of prompts passed after training, with 95 % intervals. Against: "
    "prompts that only the one, only the other passed, and the exact McNemar "
    "test of these; nothing where the prompts are not the same."
  )
  head = ["group", *runs, "0 to 100 %", *versus]
  return [Table("", head, rows, note)]


def _paired(
  scores: Mapping[str, behaviours.Scores | None], name: str
) -> dict[str, Markup]:
  """'+3 / -1, p 0.62' by group, on the prompts that both runs answered."""
  found = {}
  for row in _pairs(next(iter(scores.values())), scores[name]):
    said = f"+{row.gained} / -{row.lost}, p {row.p:.2g}"
    better = "good" if row.gained > row.lost else "bad"
    found[row.group] = tag(
      "span", said, class_=better if row.p < 0.05 else "dim"
    )
  return found


def _pairs(
  first: behaviours.Scores | None, other: behaviours.Scores | None
) -> list[behaviours.Comparison]:
  """The groups of two runs, on the prompts that both answered."""
  if not first or not other:
    return []
  a, b = _common([first.replies, other.replies])
  return behaviours.compare(behaviours.Scores(a), behaviours.Scores(b))


def _common(
  sides: Sequence[Sequence[dict[str, Any]]],
) -> list[list[dict[str, Any]]]:
  """The replies to the prompts that all sides have, in the first's order."""

  def key(reply: dict[str, Any]) -> str:
    turns = [(turn["role"], turn["content"]) for turn in reply["prompt"]]
    return f"{reply['group']} {turns}"

  known = [{key(reply): reply for reply in side} for side in sides]
  shared = [k for k in known[0] if all(k in one for one in known)]
  # Where a file lies may differ between machines; what was asked may not.
  return [
    [one[k] | {"where": known[0][k]["where"]} for k in shared] for one in known
  ]


def _losses(runs: Runs) -> list[Table]:
  """Before and after of every loss; before is the same of the same base."""
  found = [
    {row["name"]: row for row in run.get("result", {}).get("losses", ())}
    for run in runs.values()
  ]
  names = dict.fromkeys(name for one in found for name in one)

  def cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
      return ""
    return f"{row['before']:.3f} → {row['after']:.3f} ({row['change']:+.1%})"

  rows = (
    (run_page.label(name), [cell(one.get(name)) for one in found])
    for name in names
  )
  return _by_run(runs, "before → after", rows)


def _differing(
  runs: Runs, head: str, trees: Sequence[Mapping[str, Any]]
) -> list[Table]:
  """The keys whose values are not the same in all runs."""
  found = [
    {name: str(value) for name, value in flat(tree).items()} for tree in trees
  ]
  names = dict.fromkeys(name for one in found for name in one)
  return _by_run(
    runs,
    head,
    (
      (name, [one.get(name, "absent") for one in found])
      for name in names
      if len({one.get(name) for one in found}) > 1
    ),
  )


def _data(runs: Runs) -> dict[str, Any]:
  """Rows and tokens, and what of the data or its treatment differs."""
  counts = ("rows_in", "rows_trained", "tokens_prompt", "tokens_trained")
  ledgers = [run.get("ledger", {"sources": {}}) for run in runs.values()]
  total = run_page.total
  trained = [
    {name: source["rows_trained"] for name, source in one["sources"].items()}
    for one in ledgers
  ]
  first, *others = [
    run.get("data", {}).get("fingerprint_inputs", {}) for run in runs.values()
  ]
  return {
    "tables": [
      *_by_run(
        runs,
        "all sources",
        (
          (name.replace("_", " "), [total(one, name) for one in ledgers])
          for name in counts
        ),
      ),
      *_differing(runs, "rows trained, by source", trained),
    ],
    "differences": {
      f"{name} against {next(iter(runs))}": fingerprint.differences(
        first, other
      )
      for name, other in zip(list(runs)[1:], others, strict=True)
    },
  }


def _speed(runs: Runs) -> list[Table]:
  """Medians over the records of a run: one slow record does not move them."""
  found = [
    {
      name: statistics.median(values)
      for name in charts.number_names(run.get("metrics", ()))
      if name.startswith(("speed/", "time/", "memory/"))
      if (values := [y for _, y in charts.points(run["metrics"], name) if y])
    }
    for run in runs.values()
  ]
  names = dict.fromkeys(name for one in found for name in one)
  return _by_run(
    runs,
    "median of the records",
    ((name, [one.get(name) for one in found]) for name in names),
  )


def _replies(runs: Runs) -> list[dict[str, Any]] | None:
  """Cards of prompts that only some passed; None without two that answered."""
  scores = {name: _after(run) for name, run in runs.items()}
  answered = {name: one.replies for name, one in scores.items() if one}
  if len(answered) < 2:
    return None
  sides = dict(zip(answered, _common(list(answered.values())), strict=True))
  rows = [
    i
    for i, answers in enumerate(zip(*sides.values(), strict=True))
    if len({a["passed"] for a in answers}) > 1
  ]
  return run_page.cards(
    {name: [side[i] for i in rows] for name, side in sides.items()}
  )


def compare(workdirs: Sequence[str | os.PathLike]) -> dict[str, list[dict]]:
  """Several runs as plain tables, each a list of rows.

  Args:
    workdirs: of the runs, finished or not; the first is the one that the
      others are compared with.

  Returns:
    'behaviours': {'run', 'group', 'n', 'rate', 'low', 'high', 'stopped'},
    after training; 'paired': {'run', 'group', 'gained', 'lost', 'p'} against
    the first run, on the prompts that both answered; 'losses': {'run', 'name',
    'before', 'after', 'change'}; 'config': {'key', and each run's value} of the
    keys that differ; 'metrics': {'run', 'name', 'last', 'median'}.
  """
  runs = {os.fspath(path): run_files.read(path) for path in workdirs}
  scores = {name: _after(run) for name, run in runs.items()}
  first = next(iter(scores.values()), None)
  configs = [flat(run["config"]) for run in runs.values()]
  found: dict[str, list[dict]] = {
    name: [] for name in ("behaviours", "paired", "losses", "config", "metrics")
  }
  for name, run in runs.items():
    one, records = scores[name], run.get("metrics", ())
    for group, score in one.groups.items() if one else ():
      low, high = score.interval
      rates = {"rate": score.rate, "low": low, "high": high}
      stopped = score.stopped / score.n
      row = {"run": name, "group": group, "n": score.n, **rates}
      found["behaviours"].append(row | {"stopped": stopped})
    for pair in _pairs(first, one) if one is not first else ():
      row = {"run": name, "group": pair.group, "gained": pair.gained}
      found["paired"].append(row | {"lost": pair.lost, "p": pair.p})
    losses = run.get("result", {}).get("losses", ())
    found["losses"] += [{"run": name, **row} for row in losses]
    for metric in charts.number_names(records):
      points = charts.points(records, metric)
      if values := [value for _, value in points if value is not None]:
        row = {"run": name, "name": metric, "last": values[-1]}
        found["metrics"].append(row | {"median": statistics.median(values)})
  for key in dict.fromkeys(key for one in configs for key in one):
    values = [one.get(key) for one in configs]
    if len({str(value) for value in values}) > 1:
      row = dict(zip(runs, values, strict=True))
      found["config"].append({"key": key, **row})
  return found
