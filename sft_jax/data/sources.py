"""Sources: where rows come from, which are kept, and how much of an epoch.

A source is seen `repeat` times per epoch, or as often as makes its tokens the
wanted `share` of the epoch. With sources of 3,000 and 1,000 tokens:

    {path: big}, {path: small, repeat: 3}      3000 + 3000 tokens, 50 % each
    {path: big}, {path: small, share: 0.4}     3000 + 2000: small twice
    {path: big, share: 0.5}, {path: small, share: 0.5}
                          2000 + 2000: all sources' tokens, split by share

Conditions say which rows a source keeps, weightings what each row's loss is
multiplied by. They are declared, not coded: no expression is evaluated. A name
is one of `SCORES`, or 'row.NAME' for what a row itself has under NAME.

    (("ifd", "<", 1.0), ("row.language", "==", "en"))    both must hold
    (("nats", "<", 8.0), ("ifd", "highest", 0.1))        of those, a tenth
    ("ifd", (0.5, 1.0), (1.0, 0.0))                      weight 1, falling to 0
    "row.quality"                                        the weight itself
"""

import ast
import contextlib
import dataclasses
import itertools
import math
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.data.conversation import WEIGHTS, Conversation, is_weight, one_line
from sft_jax.data.formats import fields, formats
from sft_jax.data.readers.files import find_files, read_rows
from sft_jax.data.readers.json import OnBadRow, Rows
from sft_jax.data.readers.memory import MemoryRows

# What `sft_jax.commands.score` gives each row; see `evals.row_scores`.
SCORES = ("nats", "ifd", "alone", "tokens", "rank")
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
  """What a row must satisfy: a comparison, or a rank among the others."""

  name: str  # Of a score, or 'row.NAME'.
  op: str  # A comparison, or one of `SHARES`.
  value: Any  # Compared with, or the share to keep.

  def __str__(self) -> str:
    return f"{self.name} {self.op} {self.value}"

  def holds(self, value: Any, place: str) -> bool:
    """Whether a row's value satisfies a comparison.

    Raises ValueError: a value that cannot be compared, by its place.
    """
    alike = is_number(value) and is_number(self.value)
    of_a_kind = type(value) is type(self.value) and not isinstance(value, float)
    if not alike and not of_a_kind:
      raise ValueError(
        f"{place}: got {value!r} under {self.name}, expected something to "
        f"compare with {self.value!r}. Correct the row, or the condition "
        f"'{self}' of data.filter."
      )
    return _COMPARE[self.op](value, self.value)


class Weighting(NamedTuple):
  """How a row's value becomes the weight of its loss."""

  name: str  # Of a score, or 'row.NAME'.
  # (value, weight), between which weights are interpolated, and beyond which
  # they stay; none: the value is the weight.
  points: tuple[tuple[float, float], ...]


def to_filter(value: Any) -> tuple[Condition, ...]:
  """The conditions that data.filter or a source's filter declares.

  >>> to_filter(("ifd", "<", 1))[0].value
  1

  Raises ValueError: what is none, with what it should be.
  """
  alone = len(value) == 3 and isinstance(value[0], str)
  made = []
  for one in [value] if alone else value:
    fine = not isinstance(one, str) and len(one) == 3
    if fine:
      name, op, bound = one
      _check_name(name, "data.filter")
      fine = op in _COMPARE and isinstance(bound, str | int | float | bool)
      if op in SHARES:
        fine = is_number(bound) and 0 < float(bound) <= 1
    if not fine:
      raise ValueError(
        f"data.filter: got {one!r}; expected (name, op, value), with op one of "
        f"{', '.join(_COMPARE)} and a number or text, or one of "
        f"{', '.join(SHARES)} and a share above 0. Correct it."
      )
    made.append(Condition(*one))
  return tuple(made)


def to_weighting(value: Any) -> Weighting | None:
  """What data.weight_by or a source's weight_by declares; empty is None.

  Raises ValueError: what is none, with what it should be.
  """
  if not value:
    return None
  name, *points = [value] if isinstance(value, str) else value
  _check_name(name, "data.weight_by")
  lists = all(isinstance(x, list | tuple) and len(x) == 2 for x in points)
  numbers = lists and all(map(is_number, itertools.chain(*points)))
  at, weights = zip(*points, strict=True) if numbers and points else ((), ())
  rising = all(a < b for a, b in itertools.pairwise(at))
  ordered = sorted(weights)
  monotone = list(weights) in (ordered, ordered[::-1])
  fine = numbers and rising and monotone and all(map(is_weight, weights))
  if not fine or len(points) == 1:
    raise ValueError(
      f"data.weight_by: got {value!r}; expected a name, or (name, (value, "
      "weight), (value, weight), ...) with rising values, and weights that "
      f"only rise or only fall, each {WEIGHTS}. Correct it."
    )
  return Weighting(name, tuple((float(x), float(w)) for x, w in points))


def is_number(value: Any) -> bool:
  """Whether a value is a finite number, and no boolean."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and math.isfinite(value)


def _check_name(name: Any, key: str) -> None:
  own = isinstance(name, str) and name.startswith(ROW) and name != ROW
  if not own and name not in SCORES:
    raise ValueError(
      f"{key}: got the name {name!r}; expected one of {', '.join(SCORES)}, or "
      "'row.NAME' for what a row has under NAME. Correct it."
    )


@dataclasses.dataclass(frozen=True)
class Source:
  """Rows of one file, glob, folder or hub id, or rows in memory."""

  # Of the files, see `files.find_files`; '' where `rows` is given.
  path: str = ""
  # Times that each row is seen per epoch; of a fractional part, a random share
  # of the rows, drawn again each epoch.
  repeat: int | float = 1.0
  # Of the epoch's tokens, prompt and trained; decides `repeat`.
  share: float | None = None
  # Rows to take, drawn at random by the run's seed; None takes all.
  limit: int | None = None
  loss_weight: int | float = 1.0  # Scales the loss of its tokens in training.
  # Of its rows; '' is data.format. See `formats.to_conversation`.
  format: str = ""
  # {name in these rows: name that formats know}.
  columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  name: str = ""  # In the ledger; '' is the path, or 'rows'.
  # What rows to train on must satisfy; None is data.filter, () is none. See the
  # head of this file.
  filter: Any = None
  # What a row's loss is weighted by; None is data.weight_by.
  weight_by: Any = None
  # A list or iterator of dicts or Conversations, whose places are 'rows[12]',
  # from 0; it must not change while it is used.
  rows: Any = None

  def __post_init__(self):
    if bool(self.path) == (self.rows is not None):
      got = "both path and" if self.path else "neither path nor"
      raise ValueError(
        f"data source: got {got} rows; expected one of them: a path to files, "
        "or rows in memory. Correct it."
      )
    if self.rows is not None and not isinstance(self.rows, MemoryRows):
      object.__setattr__(self, "rows", MemoryRows(self.rows))
    limit = 1 if self.limit is None else self.limit
    positive = (self.repeat, self.loss_weight, limit)
    finite = all(0 < number < 1e9 for number in positive)
    if not finite or not is_weight(self.loss_weight):
      raise ValueError(
        f"data source {self.label}: got repeat {self.repeat}, loss_weight "
        f"{self.loss_weight} and limit {self.limit}; expected numbers above "
        "0 and below 1e9. To train on none of its rows leave it out."
      )
    if self.share is not None and not (0 < self.share <= 1 == self.repeat):
      raise ValueError(
        f"data source {self.label}: got share {self.share} and repeat "
        f"{self.repeat}; expected a share of at most 1, and no repeat beside "
        "it. Give one of the two."
      )
    to_filter(self.filter or ())  # Raises what is wrong with it.
    to_weighting(self.weight_by)

  @property
  def label(self) -> str:
    """What the ledger calls it."""
    return one_line(self.name or self.path or "rows")

  def read(self, on_bad_row: OnBadRow) -> Rows:
    """(place, row) of its rows; see `files.read_rows`."""
    if self.rows is None:
      return read_rows(self.path, on_bad_row=on_bad_row)
    places = (f"{self.name or 'rows'}[{i}]" for i in itertools.count())
    return zip(places, self.rows.rows, strict=False)

  def to_conversation(self, row: Any, place: str, format: str) -> Conversation:
    """A row of it; `format` is of rows whose source names none."""
    how = {"format": self.format or format, "columns": self.columns}
    return formats.to_conversation(row, **how, source=place)

  def files(self) -> list[Path]:
    return [] if self.rows is not None else find_files(self.path)

  def without_rows(self) -> "Source":
    """The same, to send with some of its rows to another process."""
    return self if self.rows is None else dataclasses.replace(self, rows=())


OneSource = str | Source | tuple[str, int | float] | Mapping[str, Any]
Sources = OneSource | Sequence[OneSource]

_FIELDS = tuple(field.name for field in dataclasses.fields(Source))


def to_sources(sources: Sources) -> tuple[Source, ...]:
  """One source in any form, or a sequence of these, as Sources.

  >>> to_sources(("a.jsonl", ("b/*.jsonl", 0.5)))[1].repeat
  0.5
  >>> to_sources({"path": "a.jsonl", "share": 1.0, "name": "mine"})[0].label
  'mine'
  >>> [one.path for one in to_sources("a.jsonl, b/*.csv")]  # A command line's.
  ['a.jsonl', 'b/*.csv']

  Raises ValueError: no source, two of one name, a key that is not known, or a
  value out of range.
  """
  # Single sources may be sequences too: a type decides.
  many: Any = _split(sources) if isinstance(sources, str) else sources
  alone = isinstance(many, str | Source | Mapping)
  if alone or [type(x) for x in many] in ([str, int], [str, float]):
    many = [many]
  made = tuple(map(_to_source, many))
  labels = [one.name or os.path.normpath(one.label) for one in made]
  if not made or len(set(labels)) < len(labels):
    raise ValueError(
      f"data sources: got {labels}; expected one or more, of different names. "
      "To see a source twice per epoch give it repeat 2; to use a file in two "
      "ways give each a name."
    )
  return made


def _split(text: str) -> Any:
  """A command line's 'a, b', "('a', 'b')" or "{'path': 'a'}", as meant."""
  if Path(text).exists():
    return text
  if text[:1] + text[-1:] in ("()", "[]", "{}"):
    with contextlib.suppress(ValueError, SyntaxError):
      return ast.literal_eval(text)
  parts = [part.strip() for part in text.split(",")]
  return [part for part in parts if part] if len(parts) > 1 else text


def _to_source(one: Any) -> Source:
  if isinstance(one, Source):
    return one
  if isinstance(one, str):
    return Source(one)
  if isinstance(one, Mapping):
    if not set(one) <= set(_FIELDS):
      raise ValueError(
        f"data source: got keys {sorted(one)}; expected path and, if wanted, "
        f"{', '.join(_FIELDS[1:])}. Correct the key."
      )
    return Source(**one)
  return Source(*one)


def settle_weights(source: Source) -> Source:
  """The source, with columns that are called weight and are none renamed.

  Called so are weight, train and training; a weight is in [0, 1] in all rows,
  which are read once to see it. Names that `columns` mentions stay.
  """
  ends: dict[str, list[Any]] = {}
  renamed = fields.to_names(source.columns).columns
  known = {*renamed, *renamed.values(), "loss_weight"}
  names = [name for name in fields.WEIGHTS if name not in known]
  # What is wrong is reported by the real reading.
  with contextlib.suppress(ValueError, OSError):
    for _, row in source.read(lambda error: None):
      for name in names if isinstance(row, Mapping) else ():
        if isinstance(value := row.get(name), bool | int | float | str):
          ends[name] = _ends([*ends.get(name, ()), value])
  found = {name: _ends(values) for name, values in ends.items()}
  columns = {
    name: f"{fields.NO_WEIGHT}{name}, {' to '.join(map(fields.shown, values))}"
    for name, values in found.items()
    if not all(map(fields.in_unit_interval, values))
  }
  return dataclasses.replace(source, columns={**source.columns, **columns})


def _ends(values: list[Any]) -> list[Any]:
  """The smallest and the largest value, or one that is no number."""
  other = [x for x in values if not isinstance(x, bool | int | float)]
  return other[:1] or [min(values), max(values)]


def solve_copies(
  sources: Sequence[Source], tokens: Sequence[int]
) -> tuple[float, ...]:
  """Times that each source is seen per epoch; `tokens` are of each, seen once.

  Where all have shares, an epoch has as many tokens as all together; otherwise
  those without are seen as they say, and the others fill up to their shares.

  Raises ValueError: shares that leave no room for the other sources or, if
  there are none, do not sum to 1; a share of a source without tokens.
  """
  wanted = sum(source.share or 0 for source in sources)
  pairs = list(zip(sources, tokens, strict=True))
  given = sum(s.repeat * n for s, n in pairs if s.share is None)
  complete = all(source.share is not None for source in sources)
  if wanted and (abs(wanted - 1) > 1e-6 if complete else wanted >= 1):
    raise ValueError(
      f"data sources: got shares that sum to {wanted:g}; expected "
      + ("1" if complete else "less than 1, since some sources have none")
      + ". Correct the shares."
    )
  total = sum(tokens) if complete else given / (1 - wanted)
  copies = []
  for source, number in pairs:
    if source.share is None:
      copies.append(float(source.repeat))
    elif number and total:
      copies.append(source.share * total / number)
    else:
      raise ValueError(
        f"data source {source.label}: got share {source.share} of {total:g} "
        f"tokens and {number} tokens to fill it with; expected some of both. "
        "Read the ledger for why rows were dropped, or drop the share."
      )
  return tuple(copies)
