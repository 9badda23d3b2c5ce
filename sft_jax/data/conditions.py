"""Conditions: which rows a source keeps, and what each of them weighs.

Declared, not coded: no expression is evaluated. A name is one of
`scores.SCORES`, or 'row.NAME' for what a row itself has under NAME.

    (("ifd", "<", 1.0), ("row.language", "==", "en"))    both must hold
    (("nats", "<", 8.0), ("ifd", "highest", 0.1))        of those, a tenth
    ("ifd", (0.5, 1.0), (1.0, 0.0))                      weight 1, falling to 0
    "row.quality"                                        the weight itself
"""

import itertools
import math
import operator
from typing import Any, NamedTuple

from sft_jax.data.scores import SCORES

_COMPARE = {
  "<": operator.lt,
  "<=": operator.le,
  ">": operator.gt,
  ">=": operator.ge,
  "==": operator.eq,
  "!=": operator.ne,
}
# Keeps this share of the rows that the conditions before it have left.
SHARES = ("highest", "lowest")
ROW = "row."


class Condition(NamedTuple):
  """What a row must satisfy: a comparison, or a rank among the others.

  Attributes:
    name: of a score, or 'row.NAME'.
    op: see the head of this file.
    value: compared with, or the share to keep.
  """

  name: str
  op: str
  value: Any

  def __str__(self) -> str:
    return f"{self.name} {self.op} {self.value}"

  def holds(self, value: Any, place: str) -> bool:
    """Whether a row's value satisfies a comparison.

    Raises:
      ValueError: a value that cannot be compared, by its place.
    """
    alike = _is_number(value) and _is_number(self.value)
    if not alike and type(value) is not type(self.value):
      raise ValueError(
        f"{place}: got {value!r} under {self.name}, expected something to "
        f"compare with {self.value!r}. Mend the row, or the condition "
        f"'{self}' of data.filter."
      )
    return _COMPARE[self.op](value, self.value)


class Weighting(NamedTuple):
  """How a row's value becomes the weight of its loss.

  Attributes:
    name: of a score, or 'row.NAME'.
    points: (value, weight), between which weights are interpolated, and
      beyond which they stay; none: the value is the weight.
  """

  name: str
  points: tuple[tuple[float, float], ...]


def to_filter(value: Any) -> tuple[Condition, ...]:
  """The conditions that data.filter or a source's filter declares.

  >>> to_filter(("ifd", "<", 1))[0].value
  1

  Raises:
    ValueError: what is none, with what it should be.
  """
  many = value
  if len(value) == 3 and isinstance(value[0], str):
    many = [value]
  made = []
  for one in many:
    if isinstance(one, str) or len(one) != 3:
      raise _no_condition(one)
    condition = Condition(*one)
    _check_name(condition.name, "data.filter")
    if condition.op in SHARES:
      share = condition.value
      if not _is_number(share) or not 0 < share <= 1:
        raise _no_condition(one)
    elif condition.op not in _COMPARE or not isinstance(
      condition.value, str | int | float | bool
    ):
      raise _no_condition(one)
    made.append(condition)
  return tuple(made)


def to_weighting(value: Any) -> Weighting | None:
  """What data.weight_by or a source's weight_by declares; empty is None.

  Raises:
    ValueError: what is none, with what it should be.
  """
  if not value:
    return None
  name, *points = [value] if isinstance(value, str) else value
  _check_name(name, "data.weight_by")
  pairs = all(
    isinstance(point, list | tuple)
    and len(point) == 2
    and all(map(_is_number, point))
    for point in points
  )
  if not pairs or len(points) == 1:
    raise _no_weighting(value)
  at = [float(x) for x, _ in points]
  weights = [float(w) for _, w in points]
  rising = all(a < b for a, b in itertools.pairwise(at))
  monotone = weights in (sorted(weights), sorted(weights, reverse=True))
  if not rising or not monotone or any(w < 0 for w in weights):
    raise _no_weighting(value)
  return Weighting(name, tuple(zip(at, weights, strict=True)))


def _is_number(value: Any) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def _check_name(name: Any, key: str) -> None:
  own = isinstance(name, str) and name.startswith(ROW) and name != ROW
  if not own and name not in SCORES:
    raise ValueError(
      f"{key}: got the name {name!r}; expected one of {', '.join(SCORES)}, or "
      "'row.NAME' for what a row has under NAME. Correct it."
    )


def _no_condition(got: Any) -> ValueError:
  return ValueError(
    f"data.filter: got {got!r}; expected (name, op, value), with op one of "
    f"{', '.join(_COMPARE)} and a number or text, or one of "
    f"{', '.join(SHARES)} and a share above 0. Correct it."
  )


def _no_weighting(got: Any) -> ValueError:
  return ValueError(
    f"data.weight_by: got {got!r}; expected a name, or (name, (value, weight), "
    "(value, weight), ...) with rising values, and weights of 0 or more that "
    "only rise or only fall. Correct it."
  )
