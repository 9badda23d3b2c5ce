"""What the terminal shows: the start page, progress, and the result.

Plain values are printed; text of the data or the model is text, never markup.
On processes other than the first nothing is shown.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

# Invisible, or of the direction of writing: spelled out.
_SPELT = (
  *(0x061C, 0xFEFF, *range(0x80, 0xA0), *range(0x200E, 0x2010)),
  *(*range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)),
)
_VISIBLE: dict[int, int | str] = {
  **{i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"},
  **{i: f"<{i:04X}>" for i in _SPELT},
  0x7F: 0x2421,
}


class _EscapingConsole(Console):
  """Shows control characters of names and texts, and obeys none."""

  def print(self, *objects: Any, **choices: Any) -> None:
    shown = []
    for one in objects:
      if isinstance(one, str):
        one = visible(one)
      elif isinstance(one, Text) and visible(one.plain) != one.plain:
        one = Text(visible(one.plain), one.style)
      shown.append(one)
    super().print(*shown, **choices)

  def on_broken_pipe(self) -> None:
    """Leaves the error to the command, which says it; rich would exit."""
    raise


def console() -> Console:
  """The terminal, silent on every process but the first."""
  quiet = jax.process_index() != 0
  return _EscapingConsole(
    quiet=quiet,
    highlight=False,
    soft_wrap=True,
    markup=False,
    emoji=False,
    # A notebook shows what a log shows.
    force_jupyter=False,
    force_terminal=False if "ipykernel" in sys.modules else None,
  )


def visible(text: object) -> str:
  """A text whose control characters are shown and not obeyed.

  An escape becomes '␛'; tabs and new lines stay. What reverses the direction
  of writing, and halves of surrogate pairs, are spelled out: '<202E>'.
  """
  return str(text).translate(_VISIBLE)


def facts(out: Console, title: str, rows: Mapping[str, Any]) -> None:
  """Prints a titled list of `name  value` lines."""
  out.print(Text(title, style="bold"))
  width = max(len(name) for name in rows)
  for name, value in rows.items():
    first, *more = visible(value).split("\n")
    out.print(Text(f"  {name:<{width}}  {first}"))
    for line in more:
      out.print(Text(f"  {'':<{width}}  {line}"))


def lines(out: Console, title: str, body: Iterable[str]) -> None:
  """Prints a titled block of lines."""
  out.print(Text(title, style="bold"))
  for line in body:
    out.print(Text(f"  {visible(line)}"))


def print_table(
  out: Console, title: str, header: Sequence[str], rows: Iterable[Sequence]
) -> None:
  """Prints a table; numbers to the right, names to the left."""
  grid = Table(title=visible(title), title_justify="left", title_style="bold")
  for i, name in enumerate(header):
    side = "right" if i else "left"
    grid.add_column(visible(name), justify=side, no_wrap=True)
  for row in rows:
    grid.add_row(*[Text(visible(cell)) for cell in row])
  # As wide as it is, also on a narrow terminal: a squeezed one loses figures.
  free = out.options.update(width=1000)
  grid.width = Measurement.get(out, free, grid).maximum
  out.print(grid, crop=False)


class StepProgress:
  """A progress bar on a terminal; plain lines everywhere else."""

  def __init__(self, out: Console, *, total: int, start: int) -> None:
    self._out = out
    self._total = total
    self._bar = None
    if out.is_terminal and not out.quiet:
      # The bar has what the figures leave, if that is worth it.
      bar = [BarColumn(bar_width=None)] if out.width >= 100 else []
      self._bar = Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        *bar,
        TextColumn("{task.fields[figures]}"),
        console=out,
        expand=True,
      )
      self._bar.start()
      self._task = self._bar.add_task(
        "train", total=total, completed=start, figures="the first steps"
      )

  def update(self, step: int, values: Mapping[str, float]) -> None:
    seconds = (self._total - step) * values["time/step_s"]
    # Seconds of what takes long are noise.
    left = duration(seconds) if seconds < 600 else f"{seconds / 60:.0f} min"
    text = f"{figures(values)}  {left} left"
    if self._bar is not None:
      self._bar.update(self._task, completed=step, figures=text)
    else:
      self._out.print(f"step {step}/{self._total}  {text}")
      sys.stdout.flush()

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.stop()


class TaskProgress:
  """How far something long is: a line every 20 s, with the time left."""

  def __init__(
    self, out: Console, *, now: Callable[[], float] = time.monotonic
  ) -> None:
    self._out, self._now = out, now
    self._task = ""

  def __call__(self, task: str, done: int, of: int) -> None:
    """Of a task, so much is done of so much."""
    now = self._now()
    if task != self._task:
      # The first part compiles and says little of the time that is left.
      self._task, self._began, self._first = task, now, done
      self._shown = now
    if done >= of:
      self._task = ""
    if done < of and now - self._shown >= 20:
      self._shown = now
      name, left = visible(task).replace("_", " "), ""
      if done > self._first:
        pace = (now - self._began) / (done - self._first)
        left = f"  {duration(pace * (of - done))} left"
      self._out.print(f"{name} {done:,}/{of:,}{left}")
      sys.stdout.flush()


def figures(values: Mapping[str, float]) -> str:
  """Of a record, what matters while one waits.

  >>> figures({'loss/nats_per_token': 1.25, 'speed/trained_tokens_per_s': 2e4,
  ...   'speed/mfu': 0.41, 'memory/device_peak_bytes': 21.5e9})
  'loss 1.250  20,000 trained/s  MFU 41%  21.5 GB'

  A stop token that is predicted in fewer than 9 of 10 places is shown, too.
  """
  share = ""  # Of an accelerator that is not known.
  if "speed/mfu" in values:
    share = f"MFU {values['speed/mfu']:.0%}  "
  elif "speed/peak_share" in values:
    share = f"{values['speed/peak_share']:.0%} of peak  "
  device = "memory/device_peak_bytes" in values
  held = values[f"memory/{'device' if device else 'host'}_peak_bytes"]
  # Until it is learned: without it no reply ends by itself.
  stop = values.get("acc/stop_token", 1.0)
  return (
    f"loss {values['loss/nats_per_token']:.3f}  "
    f"{f'stop {stop:.0%}  ' if stop < 0.9 else ''}"
    f"{values['speed/trained_tokens_per_s']:,.0f} trained/s  {share}"
    f"{held / 1e9:.1f} GB"
  )


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


def size(num_bytes: float) -> str:
  """'21.5 GB', '3.2 MB', '640 B'; 'unknown' of infinity."""
  if num_bytes == math.inf:
    return "unknown"
  units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
  for scale, unit in units:
    if num_bytes >= scale:
      return f"{num_bytes / scale:.3g} {unit}"
  return f"{num_bytes:.0f} B"


def sparkline(values: Sequence[float]) -> str:
  """Values from 0 to the largest as bars of text.

  >>> sparkline([0, 1, 2, 1])
  '▁▄█▄'
  """
  top = max(values) or 1.0
  return "".join("▁▂▃▄▅▆▇█"[round(7 * x / top)] for x in values)
