"""What the terminal shows: the start page, progress, and the result.

Everything here takes plain values and prints them; text of the data or the
model is printed as text, never as markup. On processes other than the first
nothing is shown.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def console() -> Console:
  """The terminal, silent on every process but the first."""
  quiet = jax.process_index() != 0
  return Console(quiet=quiet, highlight=False, soft_wrap=True, markup=False)


def facts(out: Console, title: str, rows: Mapping[str, Any]) -> None:
  """Prints a titled list of `name  value` lines."""
  out.print(Text(title, style="bold"))
  width = max(len(name) for name in rows)
  for name, value in rows.items():
    first, *more = str(value).splitlines() or [""]
    out.print(Text(f"  {name:<{width}}  {first}"))
    for line in more:
      out.print(Text(f"  {'':<{width}}  {line}"))


def lines(out: Console, title: str, body: Iterable[str]) -> None:
  """Prints a titled block of lines."""
  out.print(Text(title, style="bold"))
  for line in body:
    out.print(Text(f"  {line}"))


def table(
  out: Console, title: str, header: Sequence[str], rows: Iterable[Sequence]
) -> None:
  """Prints a table; numbers to the right, names to the left."""
  grid = Table(title=title, title_justify="left", title_style="bold")
  for i, name in enumerate(header):
    grid.add_column(name, justify="right" if i else "left", no_wrap=True)
  for row in rows:
    grid.add_row(*[Text(str(cell)) for cell in row])
  # In a log, too, a table keeps its figures: a squeezed one loses them.
  out.print(grid, width=max(out.width, 160), crop=False)


class StepProgress:
  """A progress bar on a terminal; plain lines everywhere else."""

  def __init__(self, out: Console, *, total: int, start: int) -> None:
    self._out = out
    self._total = total
    self._bar = None
    if out.is_terminal and not out.quiet:
      self._bar = Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=out,
      )
      self._bar.start()
      self._task = self._bar.add_task(
        "train", total=total, completed=start, figures="compiling"
      )

  def update(self, step: int, figures: str, seconds_left: float) -> None:
    """Shows the figures of the window that ended at `step`."""
    if self._bar is not None:
      self._bar.update(self._task, completed=step, figures=figures)
    else:
      self._out.print(
        f"step {step}/{self._total}  {figures}  {duration(seconds_left)} left"
      )
      sys.stdout.flush()

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.stop()


def duration(seconds: float) -> str:
  """'2 min 05 s' and the like."""
  whole = round(seconds)
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    return f"{whole // 60} min {whole % 60:02d} s"
  return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float) -> str:
  """'1,234' for counts, '12.3 M' for millions, '4.5 B' for billions."""
  for size, unit in ((1e9, "B"), (1e6, "M")):
    if value >= size:
      return f"{value / size:.2f} {unit}"
  return f"{value:,.0f}"
