"""What the seeds of two arms say of a claim, and the table of all claims."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from examples.lessons.common import Figure, Lesson

HOLDS = "holds"
FAILS = "does not hold"
OPEN = "not separated"


class Verdict(NamedTuple):
  """Two arms compared.

  Attributes:
    more, less: mean and standard deviation over seeds of the arm where the
      claim expects more, and of the other.
    difference: of the means, more - less.
    interval: 95 %, of that difference over seeds (Welch's t).
    says: HOLDS where the interval lies above 0, FAILS where it lies below,
      else OPEN.
  """

  more: tuple[float, float]
  less: tuple[float, float]
  difference: float
  interval: tuple[float, float]
  says: str


def judge(more: Sequence[float], less: Sequence[float]) -> Verdict:
  """Compares the figures of two arms, a value per seed, two or more each.

  judge([3, 4, 5], [1, 2, 3]): difference 2, interval 2 -+ 2.776 * sqrt(2 / 3).
  Where neither arm varies the interval is the difference alone.
  """
  means = [statistics.fmean(arm) for arm in (more, less)]
  spreads = [statistics.stdev(arm) for arm in (more, less)]
  difference = means[0] - means[1]
  parts = [
    s * s / len(arm) for s, arm in zip(spreads, (more, less), strict=True)
  ]
  half = 0.0
  if sum(parts):
    freedom = sum(parts) ** 2 / sum(
      part**2 / (len(arm) - 1)
      for part, arm in zip(parts, (more, less), strict=True)
    )
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(sum(parts))
  low, high = difference - half, difference + half
  says = HOLDS if low > 0 else FAILS if high < 0 else OPEN
  of_more, of_less = zip(means, spreads, strict=True)
  return Verdict(of_more, of_less, difference, (low, high), says)


def table(
  lessons: Sequence[Lesson],
  found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
) -> str:
  """Markdown of the lessons that have figures, a line per figure.

  Args:
    lessons: in the order to show them in.
    found: figures of each seed, by lesson and arm.
  """
  lines = [
    "| claim | figure | more expected in | less expected in | difference "
    "[95 %] | the claim |",
    "|---|---|---|---|---|---|",
  ]
  for lesson in lessons:
    for figure in lesson.figures:
      arms = found[lesson.name]
      verdict = judge(
        [one[figure.key] for one in arms[figure.more]],
        [one[figure.less_key or figure.key] for one in arms[figure.less]],
      )
      lines.append(_line(lesson, figure, verdict))
  return "\n".join(lines)


def _line(lesson: Lesson, figure: Figure, verdict: Verdict) -> str:
  share = figure.key.startswith(("behavior/", "agreement"))
  scale, form = (100, "{:.0f}") if share else (1, "{:.2f}")
  show = lambda x: form.format(scale * x)
  unit = " %" if share else ""
  arm = lambda name, v: f"{name}: {show(v[0])} ± {show(v[1])}{unit}"
  low, high = map(show, verdict.interval)
  cells = (
    f"[{lesson.claim}](#{lesson.name})",
    figure.what,
    arm(figure.more, verdict.more),
    arm(figure.less, verdict.less),
    f"{show(verdict.difference)} [{low}, {high}]",
    verdict.says,
  )
  return "| " + " | ".join(cells) + " |"
