"""Dataset stats: every row and every token is counted, from the first row read.

Law 2 is arithmetic: rows in = trained + held out + dropped (by reason), and
tokens = prompt + trained + padding. Both sums are kept per source, checked,
printed at the start of a run and kept with it, in ledger.json.
"""

import collections
import dataclasses
import glob
from pathlib import Path
from typing import Any

import numpy as np

_EXAMPLES_KEPT = 5
QUANTILES = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}


@dataclasses.dataclass
class SourceStats:
  """What became of one source.

  Attributes:
    rows_in: rows read.
    rows_trained: rows with at least one example to train on.
    rows_held_out: rows that measure the others, and are not trained on.
    rows_text: those of `rows_trained` that are raw text, trained on whole.
    dropped: rows not trained on, by reason.
    dropped_turns: turns not trained on, by reason, in rows that are.
    notes: rows trained on to which something happened, by what: see
      `encode.EncodedRow`.
    places: where the first few of each reason or note are, as 'file:line'.
    examples: documents made from the trained rows.
    tokens_prompt: tokens read but not trained.
    tokens_trained: tokens with a weight above zero.
    roles: (tokens, trained ones) by role: see `token_roles.TOKEN_ROLES`.
    lengths: of the examples, in tokens: the quantiles named in `QUANTILES`.
  """

  rows_in: int = 0
  rows_trained: int = 0
  rows_held_out: int = 0
  rows_text: int = 0
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)
  dropped_turns: dict[str, int] = dataclasses.field(default_factory=dict)
  notes: dict[str, int] = dataclasses.field(default_factory=dict)
  places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  examples: int = 0
  tokens_prompt: int = 0
  tokens_trained: int = 0
  roles: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  lengths: dict[str, int] = dataclasses.field(default_factory=dict)

  def add(self, later: "SourceStats") -> None:
    """Enters what became of rows that come after these."""
    self.rows_in += later.rows_in
    for name in ("dropped", "dropped_turns", "notes"):
      mine = getattr(self, name)
      for reason, number in getattr(later, name).items():
        mine[reason] = mine.get(reason, 0) + number
    for reason, places in later.places.items():
      for place in places:
        self.remember(reason, place)

  def drop(self, reason: str, place: str) -> None:
    """Counts a row that is not trained on."""
    self.dropped[reason] = self.dropped.get(reason, 0) + 1
    self.remember(reason, place)

  def drop_turns(self, reason: str, number: int, place: str) -> None:
    """Counts turns lost from a row that is still trained on."""
    self.dropped_turns[reason] = self.dropped_turns.get(reason, 0) + number
    self.remember(f"{reason} (turns)", place)

  def note(self, note: str, place: str) -> None:
    """Counts a row to which something happened."""
    self.notes[note] = self.notes.get(note, 0) + 1
    self.remember(note, place)

  def read_as(self, whole: "SourceStats") -> None:
    """Enters what was read and dropped when all of the rows were here."""
    self.rows_in, self.rows_held_out = whole.rows_in, whole.rows_held_out
    for name in ("dropped", "dropped_turns", "notes"):
      setattr(self, name, dict(getattr(whole, name)))
    self.places = {why: list(where) for why, where in whole.places.items()}

  def remember(self, reason: str, place: str) -> None:
    """Keeps the first few places of a reason, to name them."""
    places = self.places.setdefault(reason, [])
    if len(places) < _EXAMPLES_KEPT:
      places.append(place)

  def lines(self) -> list[str]:
    """What happened to rows, and where; nothing where all are as usual."""
    lines = [f"{self.rows_text:,} rows are raw text"] if self.rows_text else []
    for note, number in self.notes.items():
      lines.append(f"{number:,} rows: {note}{self._where(note, number)}")
    for reason, number in self.dropped.items():
      where = self._where(reason, number)
      lines.append(f"{number:,} rows dropped, {reason}{where}")
    for reason, number in self.dropped_turns.items():
      where = self._where(f"{reason} (turns)", number)
      lines.append(f"{number:,} turns dropped, {reason}{where}")
    return lines

  def details(self) -> list[str]:
    """Lengths, and tokens by role."""
    lines = []
    if self.lengths:
      spread = [f"{what} {number:,}" for what, number in self.lengths.items()]
      lines.append(f"tokens of an example: {', '.join(spread)}")
    if self.roles:
      said = [
        f"{role} {tokens:,}" + (f" ({trained:,} trained)" if trained else "")
        for role, (tokens, trained) in self.roles.items()
      ]
      lines.append(f"tokens by role: {', '.join(said)}")
    return lines

  def _where(self, reason: str, number: int) -> str:
    """': a.jsonl:1, a.jsonl:2'; may be ''."""
    places = self.places.get(reason, [])
    more = ", ..." if number > len(places) == _EXAMPLES_KEPT else ""
    return f": {', '.join(places)}{more}" if places else ""


@dataclasses.dataclass
class Mixed:
  """What one source makes of an epoch.

  Attributes:
    copies: times that its rows are seen.
    loss_weight: what scales its tokens' loss.
    tokens: prompt and trained.
    share: of the epoch's tokens.
    trained_share: of the epoch's trained tokens.
  """

  copies: float
  loss_weight: float
  tokens: int
  share: float
  trained_share: float


@dataclasses.dataclass
class EpochStats:
  """The slots of one epoch's packs: prompt, trained or padding.

  `mixture` says what each source makes of them.
  """

  packs: int
  slots: int
  tokens_prompt: int
  tokens_trained: int
  tokens_padding: int
  mixture: dict[str, Mixed] = dataclasses.field(default_factory=dict)

  @property
  def fill(self) -> float:
    """Share of slots that hold a token."""
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
    """Plain dicts for json.dump; the inverse of `from_json`."""
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
    rows: list[tuple[str, ...]] = [
      ("source", "rows", "trained", "held out", "dropped", "prompt tok",
       "trained tok", "of tokens", "of trained")
    ]  # fmt: skip
    for name, s in self.sources.items():
      counts = (s.rows_in, s.rows_trained, s.rows_held_out,
                sum(s.dropped.values()), s.tokens_prompt,
                s.tokens_trained)  # fmt: skip
      shares = (f"{share:.1%}" for share in self._shares(name))
      rows.append((names[name], *(f"{n:,}" for n in counts), *shares))
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
          lines.append(
            f"{names[name]}: seen {mixed.copies:g} times per epoch, "
            f"loss x {mixed.loss_weight:g}"
          )
      lines.append(
        f"one epoch: {e.packs:,} packs of {e.slots // e.packs:,} slots, "
        f"{e.fill:.2%} full: {e.tokens_prompt:,} prompt + "
        f"{e.tokens_trained:,} trained + {e.tokens_padding:,} padding"
      )
    return lines

  def details(self) -> list[str]:
    """What `lines` leaves out: lengths, and tokens by role."""
    names = self.short_names()
    return [
      f"{names[name]}: {line}"
      for name, s in self.sources.items()
      for line in s.details()
    ]

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
    short = {
      name: Path(name).name
      if Path(name).suffix and not glob.has_magic(name)
      else name
      for name in self.sources
    }
    number = collections.Counter(short.values())
    return {
      name: one if number[one] == 1 else name for name, one in short.items()
    }
