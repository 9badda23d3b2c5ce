"""The curves of a run or of several: which metrics share a chart.

Whatever is in the records is drawn: a name that no chart of `CHARTS` wants
stands in a chart of its own family, so that a new metric is never lost.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.reporting.html import charts
from sft_jax.reporting.html.elements import Element, details, join, tag

Records = Sequence[Mapping[str, Any]]

# (title, regex of names), the first that fits; what is open at once.
CHARTS = (
  ("Loss, nats per trained token", r"(loss|held_out)/nats_per_token"),
  ("Accuracy of trained tokens", r"acc/(token|stop_token)|held_out/acc/token"),
  ("Learning rate", r"optim/learning_rate"),
  ("Gradient norm", r"optim/grad_norm"),
  ("Behaviour, share passed", r"behaviour/all/(pass_rate|stopped)"),
  ("Tokens per second", r"speed/(trained_)?tokens_per_s"),
  ("Seconds of a step", r"time/(step|data_wait|compute)_s"),
  ("Memory, bytes", r"memory/.+_bytes"),
)
# Of one chart; more cannot be told apart.
_TOGETHER = charts.COLOURS


def of_run(records: Records, marks: Sequence[tuple[int, str]] = ()) -> Element:
  """The main curves of one run, and all others folded away.

  Args:
    records: of metrics.jsonl.
    marks: (step, what happened there).
  """
  names = number_names(records)
  main, rest = [], list(names)
  for title, pattern in CHARTS:
    mine = [name for name in rest if re.fullmatch(pattern, name)]
    rest = [name for name in rest if name not in mine]
    if mine:
      main.append(_of(title, records, mine, marks))
  families: dict[str, list[str]] = {}
  for name in rest:
    families.setdefault(_family(name), []).append(name)
  others = []
  for family, mine in families.items():
    for i in range(0, len(mine), _TOGETHER):
      some = mine[i : i + _TOGETHER]
      others.append(_of(family, records, some, marks))
  return _grids(main, others)


def _family(name: str) -> str:
  """What shares a chart: 'loss/part/answer' is of 'loss/part'.

  Of behaviours, the same figure of all groups; two parts make no family: what
  is in 'data/...' is of different units.
  """
  parts = name.split("/")
  if len(parts) < 3:
    return name
  if parts[0] == "behaviour":
    return f"behaviour/.../{parts[-1]}"
  return name.rpartition("/")[0]


def of_runs(runs: Mapping[str, Records]) -> Element:
  """A chart per metric, a curve per run; those of `CHARTS` are open."""
  names = dict.fromkeys(
    n for records in runs.values() for n in number_names(records)
  )
  main = [
    name
    for _, pattern in CHARTS
    for name in names
    if re.fullmatch(pattern, name)
  ]

  def draw(name: str) -> Element:
    series = {run: points(records, name) for run, records in runs.items()}
    return charts.chart(name, series)

  others = [name for name in names if name not in main]
  return _grids([*map(draw, main)], [*map(draw, others)])


def number_names(records: Records) -> list[str]:
  """Names of the figures in the records, in their order."""
  found: dict[str, None] = {}
  for record in records:
    for name, value in record.items():
      if name != "step" and isinstance(value, int | float | None):
        found[name] = None
  return list(found)


def points(records: Records, name: str) -> list[tuple[int, float | None]]:
  """(step, value) of one figure, wherever it was recorded."""
  return [(r["step"], r[name]) for r in records if name in r]


def _of(
  title: str,
  records: Records,
  names: Sequence[str],
  marks: Sequence[tuple[int, str]],
) -> Element:
  series = {name: points(records, name) for name in names}
  return charts.chart(title, series, marks)


def _grids(main: Sequence[Element], others: Sequence[Element]) -> Element:
  parts = [tag("div", *main, class_="charts")] if main else []
  if others:
    more = f"{len(others)} more chart{'s' * (len(others) > 1)}"
    parts.append(details(more, tag("div", *others, class_="charts")))
  return join(parts)
