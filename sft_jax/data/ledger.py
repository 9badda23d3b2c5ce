"""Ledger: every row and every token is counted, from the first row read.

Law 2 is arithmetic: rows in = trained + dropped (by reason), and tokens =
prompt + trained + padding. Both sums are kept per source, checked, printed at
the start of a run and kept with it.
"""

import dataclasses
from typing import Any

_EXAMPLES_KEPT = 5


@dataclasses.dataclass
class SourceLedger:
  """What became of one source.

  Attributes:
    rows_in: rows read.
    rows_trained: rows with at least one example to train on.
    rows_text: those of `rows_trained` that are raw text, trained on whole.
    dropped: rows not trained on, by reason.
    dropped_turns: turns not trained on, by reason, in rows that are.
    places: where the first few of each reason are, as 'file:line'.
    examples: documents made from the trained rows.
    tokens_prompt: tokens read but not trained.
    tokens_trained: tokens with a weight above zero.
  """

  rows_in: int = 0
  rows_trained: int = 0
  rows_text: int = 0
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)
  dropped_turns: dict[str, int] = dataclasses.field(default_factory=dict)
  places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  examples: int = 0
  tokens_prompt: int = 0
  tokens_trained: int = 0

  def drop(self, reason: str, place: str) -> None:
    """Counts a row that is not trained on."""
    self.dropped[reason] = self.dropped.get(reason, 0) + 1
    self.remember(reason, place)

  def drop_turns(self, reason: str, number: int, place: str) -> None:
    """Counts turns lost from a row that is still trained on."""
    self.dropped_turns[reason] = self.dropped_turns.get(reason, 0) + number
    self.remember(f"{reason} (turns)", place)

  def remember(self, reason: str, place: str) -> None:
    """Keeps the first few places of a reason, to name them."""
    places = self.places.setdefault(reason, [])
    if len(places) < _EXAMPLES_KEPT:
      places.append(place)

  def places_of(self, reason: str, number: int) -> str:
    """': a.jsonl:1, a.jsonl:2', for a line of the table; may be ''."""
    places = self.places.get(reason, [])
    more = ", ..." if number > len(places) == _EXAMPLES_KEPT else ""
    return f": {', '.join(places)}{more}" if places else ""


@dataclasses.dataclass
class EpochLedger:
  """The slots of one epoch's packs: prompt, trained or padding."""

  packs: int
  slots: int
  tokens_prompt: int
  tokens_trained: int
  tokens_padding: int

  @property
  def fill(self) -> float:
    """Share of slots that hold a token."""
    return 1 - self.tokens_padding / self.slots


@dataclasses.dataclass
class Ledger:
  """Rows and tokens by source, and the slots of the first epoch once packed."""

  sources: dict[str, SourceLedger] = dataclasses.field(default_factory=dict)
  epoch: EpochLedger | None = None

  def source(self, name: str) -> SourceLedger:
    """The account of one source, opened when first asked for."""
    return self.sources.setdefault(name, SourceLedger())

  def total(self, field: str) -> int:
    """Sum of a count over all sources."""
    return sum(getattr(source, field) for source in self.sources.values())

  def dropped(self, reason: str) -> int:
    """Rows of all sources dropped for one reason."""
    return sum(s.dropped.get(reason, 0) for s in self.sources.values())

  def check(self) -> None:
    """Asserts Law 2.

    Raises:
      ValueError: a sum does not add up, with its source and both sides.
    """
    sums = [
      (f"{name}: rows", s.rows_in, s.rows_trained + sum(s.dropped.values()))
      for name, s in self.sources.items()
    ]
    if e := self.epoch:
      kinds = e.tokens_prompt + e.tokens_trained + e.tokens_padding
      sums.append(("epoch: slots", e.slots, kinds))
    for where, total, parts in sums:
      if total != parts:
        raise ValueError(
          f"ledger of {where}: got {parts} accounted for, expected {total}. "
          "This is a fault of the data pipeline, not of the data; report it."
        )

  def to_json(self) -> dict[str, Any]:
    """Plain dicts for json.dump; the inverse of `from_json`."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, data: dict[str, Any]) -> "Ledger":
    epoch = data["epoch"]
    return cls(
      {name: SourceLedger(**s) for name, s in data["sources"].items()},
      EpochLedger(**epoch) if epoch else None,
    )

  def lines(self) -> list[str]:
    """A plain table for the start of a run.

    Rows that are dropped are named: silence about them is the fault this
    table exists to prevent.
    """
    rows = [("source", "rows", "trained", "dropped", "prompt", "trained")]
    rows += [
      (
        name,
        f"{s.rows_in:,}",
        f"{s.rows_trained:,}",
        f"{sum(s.dropped.values()):,}",
        f"{s.tokens_prompt:,} tok",
        f"{s.tokens_trained:,} tok",
      )
      for name, s in self.sources.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
      "  ".join(
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
      )
      for row in rows
    ]
    for name, s in self.sources.items():
      if s.rows_text:
        lines.append(f"{name}: {s.rows_text:,} rows are raw text")
      for reason, number in s.dropped.items():
        places = s.places_of(reason, number)
        lines.append(f"{name}: {number:,} rows dropped, {reason}{places}")
      for reason, number in s.dropped_turns.items():
        places = s.places_of(f"{reason} (turns)", number)
        lines.append(f"{name}: {number:,} turns dropped, {reason}{places}")
    if e := self.epoch:
      lines.append(
        f"one epoch: {e.packs:,} packs of {e.slots // e.packs:,} slots, "
        f"{e.fill:.2%} full: {e.tokens_prompt:,} prompt + "
        f"{e.tokens_trained:,} trained + {e.tokens_padding:,} padding"
      )
    return lines
