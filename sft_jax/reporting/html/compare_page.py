"""Several runs side by side, compared with the first: a page, and tables."""

import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_jax.data.store import fingerprint
from sft_jax.evals import behaviors
from sft_jax.reporting import run_files
from sft_jax.reporting.html import charts, figures, replies, run_page
from sft_jax.reporting.html.elements import Table, flat, tag, write_page

Runs = Mapping[str, run_page.Run]
_COUNTS = ("rows_in", "rows_trained", "tokens_prompt", "tokens_trained")


def compare(workdirs: Sequence[str | os.PathLike]) -> dict[str, list[dict]]:
  """Several runs as plain tables, each a list of rows.

  Returns 'behaviors': {'run', 'group', 'n', 'rate', 'low', 'high', 'stopped'},
  after training; 'paired': {'run', 'group', 'gained', 'lost', 'p'} against the
  first run, on the prompts that both answered; 'losses': {'run', 'name',
  'before', 'after', 'change'}; 'config': {'key', and each run's value} of the
  keys that differ; 'metrics': {'run', 'name', 'last', 'median'}.
  """
  return _tables({str(path): run_files.read(Path(path)) for path in workdirs})


def _tables(runs: Runs) -> dict[str, list[dict]]:
  scores = {name: _after(run) for name, run in runs.items()}
  first = next(iter(scores.values()), None)
  configs = {name: run.get("config", {}) for name, run in runs.items()}
  found: dict[str, list[dict]] = {
    **{name: [] for name in ("behaviors", "paired", "losses", "metrics")},
    "config": _differing(configs),
  }

  def add(table: str, run: str, **row: Any) -> None:
    found[table].append({"run": run, **row})

  for run, of in runs.items():
    one, records = scores[run], of.get("metrics", ())
    for group, score in one.groups.items() if one else ():
      low, high = score.interval
      rates = {"rate": score.rate, "low": low, "high": high}
      stopped = score.stopped / score.n
      add("behaviors", run, group=group, n=score.n, **rates, stopped=stopped)
    if first and one and one is not first:
      a, b = map(behaviors.Scores, _common([first.replies, one.replies]))
      for x in behaviors.compare(a, b):
        add("paired", run, group=x.group, gained=x.gained, lost=x.lost, p=x.p)
    for row in of.get("result", {}).get("losses", ()):
      add("losses", run, **row)
    for metric in charts.number_names(records):
      points = charts.points(records, metric)
      if values := [value for _, value in points if value is not None]:
        median = statistics.median(values)
        add("metrics", run, name=metric, last=values[-1], median=median)
  return found


def _after(run: run_page.Run) -> behaviors.Scores | None:
  scores = run.get("after", {}).get("behaviors")
  return behaviors.Scores.from_json(scores) if scores else None


def _common(
  sides: Sequence[Sequence[dict[str, Any]]],
) -> list[list[dict[str, Any]]]:
  """The replies to the prompts that all sides have, in the first's order."""

  def key(reply: dict[str, Any]) -> str:
    turns = [(turn["role"], turn["content"]) for turn in reply["prompt"]]
    return f"{reply['group']} {turns}"

  known = [{key(reply): reply for reply in side} for side in sides]
  shared = [k for k in known[0] if all(k in one for one in known)]
  # Paths may differ between machines; what was asked may not.
  return [
    [one[k] | {"where": known[0][k]["where"]} for k in shared] for one in known
  ]


def _differing(trees: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
  """{'key', run: value, ...} of the keys that are not the same in all runs."""
  found = [flat(tree) for tree in trees.values()]
  rows = []
  for key in dict.fromkeys(key for one in found for key in one):
    values = [one.get(key) for one in found]
    if len({str(value) for value in values}) > 1:
      rows.append({"key": key, **dict(zip(trees, values, strict=True))})
  return rows


def write(path: str | os.PathLike, runs: Runs) -> None:
  """Writes the page of runs by name, each as `run_files.read` gives it.

  Raises ValueError: fewer than two runs, or more than there are colors.
  """
  if not 2 <= len(runs) <= charts.COLORS:
    raise ValueError(
      f"compare: got {len(runs)} runs, expected 2 to {charts.COLORS}. "
      "More could not be told apart: leave some out."
    )
  found = _tables(runs)
  starts = {name: run.get("start", {}) for name, run in runs.items()}
  versions = {name: s.get("versions", {}) for name, s in starts.items()}

  def by_run(head: str, cells: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """A row for each name, a column for each run; no table without rows."""
    names = dict.fromkeys(name for one in cells.values() for name in one)
    rows = [[n, *(cells[run].get(n, "") for run in runs)] for n in names]
    return [Table("", [head, *runs], rows)] if rows else []

  def differing(head: str, rows: list[dict[str, Any]]) -> list[Table]:
    text = lambda value: "absent" if value is None else str(value)
    cells = {run: {x["key"]: text(x[run]) for x in rows} for run in runs}
    return by_run(head, cells)

  medians: dict[str, dict[str, Any]] = {run: {} for run in runs}
  losses: dict[str, dict[str, Any]] = {run: {} for run in runs}
  for row in found["metrics"]:
    if row["name"].startswith(("speed/", "time/", "memory/")):
      medians[row["run"]][row["name"]] = row["median"]
  for row in found["losses"]:
    sides = f"{row['before']:.3f} → {row['after']:.3f} ({row['change']:+.1%})"
    losses[row["run"]][figures.label(row["name"])] = sides
  counts, trained, inputs = {}, {}, []
  for name, run in runs.items():
    ledger = run.get("ledger", {"sources": {}})
    pairs = ((c.replace("_", " "), figures.total(ledger, c)) for c in _COUNTS)
    counts[name] = dict(pairs)
    sources = ledger["sources"].items()
    trained[name] = {label: s["rows_trained"] for label, s in sources}
    inputs.append(run.get("data", {}).get("fingerprint_inputs", {}))
  incidents = {
    n: {"incidents": len(r.get("incidents", ()))} for n, r in runs.items()
  }
  first, *others = runs
  against = [f"{name} against {first}" for name in others]
  changed = (fingerprint.differences(inputs[0], of) for of in inputs[1:])
  write_page(
    path,
    "compare.html.jinja",
    title=f"{len(runs)} runs: {', '.join(runs)}",
    runs=list(runs),
    headline=by_run("", {n: run_page.headline(r) for n, r in runs.items()}),
    behaviors=_behaviors(runs, found),
    losses=by_run("before → after", losses),
    curves=charts.of_runs({n: r.get("metrics", ()) for n, r in runs.items()}),
    config=differing("key", found["config"]),
    data={
      "tables": [
        *by_run("all sources", counts),
        *differing("rows trained, by source", _differing(trained)),
      ],
      "differences": dict(zip(against, changed, strict=True)),
    },
    speed=by_run("median of the records", medians),
    replies=_replies(runs),
    incidents=by_run("", incidents),
    versions=differing("version", _differing(versions)),
    commands={n: s["command"] for n, s in starts.items() if s.get("command")},
  )


def _behaviors(runs: Runs, found: Mapping[str, list[dict]]) -> list[Table]:
  """After training: a row per group; runs are paired with the first."""
  key = lambda row: (row["run"], row["group"])
  rates = lambda row: (row["rate"], row["low"], row["high"])
  shares = {key(row): rates(row) for row in found["behaviors"]}
  paired = {key(row): row for row in found["paired"]}
  first, *others = runs

  def against(run: str, group: str) -> object:
    if (row := paired.get((run, group))) is None:
      return ""
    better = "good" if row["gained"] > row["lost"] else "bad"
    text = f"+{row['gained']} / -{row['lost']}, p {row['p']:.2g}"
    surely = row["p"] < figures.SIGNIFICANT
    return tag("span", text, class_=better if surely else "dim")

  rows = []
  for group in dict.fromkeys(group for _, group in shares):
    of_runs = [shares.get((run, group)) for run in runs]
    drawn = charts.intervals(of_runs, f"{group}: {', '.join(runs)}")
    against_first = (against(run, group) for run in others)
    rows.append([group, *map(figures.share, of_runs), drawn, *against_first])
  note = (
    "Share of prompts passed after training, with 95 % intervals. Against: "
    "prompts that only the one, only the other passed, and the exact McNemar "
    "test of these; nothing where the prompts are not the same."
  )
  versus = [f"{name} against {first}" for name in others]
  head = ["group", *runs, "0 to 100 %", *versus]
  return [Table("", head, rows, note)] if rows else []


def _replies(runs: Runs) -> list[dict[str, Any]] | None:
  """Cards of prompts that only some passed; None without two that answered."""
  scores = {name: _after(run) for name, run in runs.items()}
  answered = {name: one.replies for name, one in scores.items() if one}
  if len(answered) < 2:
    return None
  sides = dict(zip(answered, _common(list(answered.values())), strict=True))
  answers = zip(*sides.values(), strict=True)
  differ = [len({x["passed"] for x in of}) > 1 for of in answers]
  kept = {name: [*itertools.compress(of, differ)] for name, of in sides.items()}
  return replies.cards(kept)
