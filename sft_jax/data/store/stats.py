"""Dataset stats: every row and every token is counted, from the first row read.

Law 2: rows in = trained + held out + dropped (by reason), and tokens = prompt +
trained + padding. Both sums are kept per source, checked, printed at the start
of a run and kept with it, in ledger.json.
"""

import collections
import copy
import dataclasses
import glob
from pathlib import Path
from typing import Any

import numpy as np

_EXAMPLES_KEPT = 5
# What is counted by reason, and how a line of it begins after the number.
_COUNTED = {
  "notes": "rows: ",
  "dropped": "rows dropped, ",
  "dropped_turns": "turns dropped, ",
}
QUANTILES = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}


@dataclasses.dataclass
class SourceStats:
  rows_in: int = 0  # Rows read.
  rows_trained: int = 0  # Rows with at least one example to train on.
  rows_held_out: int = 0  # Rows that measure the others.
  rows_text: int = 0  # Of `rows_trained`: raw text, trained on whole.
  # Rows not trained on, by reason; turns not trained on, in rows that are; and
  # rows trained on to which something happened, see `encode.EncodedRow`.
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)
  dropped_turns: dict[str, int] = dataclasses.field(default_factory=dict)
  notes: dict[str, int] = dataclasses.field(default_factory=dict)
  # Where the first few of each reason or note are, as 'file:line'.
  places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  examples: int = 0  # Documents made from the trained rows.
  tokens_prompt: int = 0  # Tokens read but not trained.
  tokens_trained: int = 0  # Tokens with a weight above zero.
  # (tokens, trained ones) by role: see `token_roles.TOKEN_ROLES`.
  roles: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  # Of the examples, in tokens: the quantiles named in `QUANTILES`.
  lengths: dict[str, int] = dataclasses.field(default_factory=dict)

  def add(self, later: "SourceStats") -> None:
    """Enters what became of rows that come after these."""
    self.rows_in += later.rows_in
    for name in _COUNTED:
      for reason, number in getattr(later, name).items():
        self._count(name, reason, number)
    for reason, places in later.places.items():
      both = self.places.get(reason, []) + places
      self.places[reason] = both[:_EXAMPLES_KEPT]

  def drop(self, reason: str, place: str) -> None:
    self._count("dropped", reason, 1, place)

  def drop_turns(self, reason: str, number: int, place: str) -> None:
    """Counts turns lost from a row that is still trained on."""
    self._count("dropped_turns", reason, number, place)

  def note(self, note: str, place: str) -> None:
    self._count("notes", note, 1, place)

  def _count(
    self, name: str, reason: str, number: int, place: str | None = None
  ) -> None:
    """Adds to what is counted for a reason; keeps its first few places."""
    counts = getattr(self, name)
    counts[reason] = counts.get(reason, 0) + number
    places = self.places.setdefault(_key(name, reason), []) if place else []
    if place and len(places) < _EXAMPLES_KEPT:
      places.append(place)

  def read_as(self, whole: "SourceStats") -> None:
    """Enters what was read and dropped when all of the rows were here."""
    self.rows_in, self.rows_held_out = whole.rows_in, whole.rows_held_out
    for name in (*_COUNTED, "places"):
      setattr(self, name, copy.deepcopy(getattr(whole, name)))

  def lines(self) -> list[str]:
    """What happened to rows, and where; nothing where all are as usual."""
    lines = [f"{self.rows_text:,} rows are raw text"] if self.rows_text else []
    for name, what in _COUNTED.items():
      for reason, number in getattr(self, name).items():
        places = self.places.get(_key(name, reason), [])
        more = ", ..." if number > len(places) == _EXAMPLES_KEPT else ""
        where = f": {', '.join(places)}{more}" if places else ""
        lines.append(f"{number:,} {what}{reason}{where}")
    return lines

  def details(self) -> list[str]:
    """Lengths, and tokens by role."""
    lines = []
    if self.lengths:
      spread = [f"{what} {number:,}" for what, number in self.lengths.items()]
      lines.append(f"tokens of an example: {', '.join(spread)}")
    if self.roles:
      trained = {role: n for role, (_, n) in self.roles.items() if n}
      said = [
        f"{role} {tokens:,}"
        + (f" ({trained[role]:,} trained)" if role in trained else "")
        for role, (tokens, _) in self.roles.items()
      ]
      lines.append(f"tokens by role: {', '.join(said)}")
    return lines


def _key(name: str, reason: str) -> str:
  """Under what the places of a reason are kept."""
  return f"{reason} (turns)" if name == "dropped_turns" else reason


@dataclasses.dataclass
class Mixed:
  copies: float  # Times that its rows are seen.
  loss_weight: float  # What scales its tokens' loss.
  tokens: int  # Prompt and trained.
  share: float  # Of the epoch's tokens.
  trained_share: float  # Of the epoch's trained tokens.


@dataclasses.dataclass
class EpochStats:
  """The slots of one epoch's packs, and what each source makes of them."""

  packs: int
  slots: int
  tokens_prompt: int
  tokens_trained: int
  tokens_padding: int
  mixture: dict[str, Mixed] = dataclasses.field(default_factory=dict)

  @property
  def fill(self) -> float:
    return 1 - self.tokens_padding / self.slots


@dataclasses.dataclass
class DatasetStats:
  """Rows and tokens by source, and the slots of the first epoch once packed."""

  sources: dict[str, SourceStats] = dataclasses.field(default_factory=dict)
  epoch: EpochStats | None = None

  def source(self, name: str) -> SourceStats:
    """The account of one source, opened when first asked for."""
    return self.sources.setdefault(name, SourceStats())

  def total(self, field: str) -> int:
    return sum(getattr(source, field) for source in self.sources.values())

  def dropped(self, reason: str) -> int:
    return sum(s.dropped.get(reason, 0) for s in self.sources.values())

  def check(self) -> None:
    """Raises a ValueError, with both sides, where a sum of Law 2 is wrong."""
    sums = []
    for name, s in self.sources.items():
      rows = s.rows_trained + s.rows_held_out + sum(s.dropped.values())
      tokens, trained = np.sum([(0, 0), *s.roles.values()], axis=0).tolist()
      sums += [
        (f"{name}: rows", s.rows_in, rows),
        (f"{name}: tokens by role", s.tokens_prompt + s.tokens_trained, tokens),
        (f"{name}: trained tokens by role", s.tokens_trained, trained),
      ]
    if e := self.epoch:
      tokens = e.tokens_prompt + e.tokens_trained
      sums.append(("epoch: slots", e.slots, tokens + e.tokens_padding))
      if e.mixture:
        mixed = sum(mixed.tokens for mixed in e.mixture.values())
        sums.append(("epoch: tokens by source", tokens, mixed))
    for where, total, parts in sums:
      if total != parts:
        raise ValueError(
          f"stats of {where}: got {parts} accounted for, expected {total}. "
          "This is a fault of the data pipeline, not of the data; report it."
        )

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, data: dict[str, Any]) -> "DatasetStats":
    sources = {name: SourceStats(**s) for name, s in data["sources"].items()}
    for source in sources.values():  # JSON has lists.
      source.roles = {role: (a, b) for role, (a, b) in source.roles.items()}
    if not (epoch := data["epoch"]):
      return cls(sources)
    mixture = {name: Mixed(**m) for name, m in epoch["mixture"].items()}
    return cls(sources, EpochStats(**(epoch | {"mixture": mixture})))

  def lines(self) -> list[str]:
    """A plain table for the start of a run, and why rows are dropped."""
    names = self.short_names()
    head = "source,rows,trained,held out,dropped,prompt tok,trained tok"
    rows = [[*head.split(","), "of tokens", "of trained"]]
    for name, s in self.sources.items():
      read = (s.rows_in, s.rows_trained, s.rows_held_out)
      counts = (*read, sum(s.dropped.values()), s.tokens_prompt)
      numbers = (f"{n:,}" for n in (*counts, s.tokens_trained))
      shares = (f"{share:.1%}" for share in self._shares(name))
      rows.append([names[name], *numbers, *shares])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
      "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
      for name, *cells in rows
    ]
    for name, s in self.sources.items():
      lines += [f"{names[name]}: {line}" for line in s.lines()]
    if e := self.epoch:
      for name, mixed in e.mixture.items():
        if mixed.copies != 1 or mixed.loss_weight != 1:
          seen = f"seen {mixed.copies:g} times per epoch"
          lines.append(f"{names[name]}: {seen}, loss x {mixed.loss_weight:g}")
      lines.append(
        f"one epoch: {e.packs:,} packs of {e.slots // e.packs:,} slots, "
        f"{e.fill:.2%} full: {e.tokens_prompt:,} prompt + "
        f"{e.tokens_trained:,} trained + {e.tokens_padding:,} padding"
      )
    return lines

  def details(self) -> list[str]:
    """What `lines` leaves out: lengths, and tokens by role."""
    named = [(self.short_names()[x], s) for x, s in self.sources.items()]
    return [f"{name}: {line}" for name, s in named for line in s.details()]

  def _shares(self, name: str) -> tuple[float, float]:
    """Of tokens and of trained ones: an epoch's, or the rows' seen once."""
    if self.epoch and (mixed := self.epoch.mixture.get(name)):
      return mixed.share, mixed.trained_share
    s = self.sources[name]
    trained = self.total("tokens_trained")
    both = trained + self.total("tokens_prompt")
    tokens = s.tokens_prompt + s.tokens_trained
    return tokens / max(both, 1), s.tokens_trained / max(trained, 1)

  def short_names(self) -> dict[str, str]:
    """Of a path the file's name, where no other source has it."""
    short = {}
    for name in self.sources:
      is_file = Path(name).suffix and not glob.has_magic(name)
      short[name] = Path(name).name if is_file else name
    number = collections.Counter(short.values())
    return {x: one if number[one] == 1 else x for x, one in short.items()}
