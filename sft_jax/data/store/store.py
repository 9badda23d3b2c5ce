"""Store: encoded examples, memory-mapped, each with its place in a file."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer, Shaped, UInt8

from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.encoding.encode import Example
from sft_jax.data.sources import Source, solve_copies
from sft_jax.data.store.files import INDEX, RUN, digest, map_file, read_meta
from sft_jax.data.store.stats import QUANTILES, DatasetStats
from sft_jax.data.store.teacher import Kept

_MANY = 1 << 18  # examples counted together


def _column(name: str) -> functools.cached_property[Int32[np.ndarray, " rows"]]:
  return functools.cached_property(
    lambda store: np.ascontiguousarray(store.index[name])
  )


@dataclasses.dataclass(frozen=True)
class Store:
  """Encoded examples in the order read; row i of a store is one example."""

  # All tokens on disk, of which `index` may select some, and their weights and
  # roles.
  tokens: Integer[np.ndarray, " tokens"]
  runs: Shaped[np.ndarray, " runs"]
  places: UInt8[np.ndarray, " bytes"]  # All places on disk, as bytes.
  index: Shaped[np.ndarray, " rows"]  # One INDEX record per example.
  sources: tuple[Source, ...]  # What was read, and how much an epoch sees.
  fingerprint: str  # Hash of the examples and of what they were made from.
  # Digests of files and options, by name; see `fingerprint.differences`.
  fingerprint_inputs: dict[str, Any]
  stats: DatasetStats  # What became of every row read.
  # What scales each example's loss; None is 1. See `selection`.
  weights: Float32[np.ndarray, " rows"] | None = None
  teacher: Kept | None = None  # What one predicts of the trained tokens.

  lengths = _column("length")  # Tokens of each example.
  trained = _column("trained")  # Trained tokens of each example.
  source = _column("source")  # Position of each example's source in `sources`.

  @functools.cached_property
  def copies(self) -> tuple[float, ...]:
    sums = np.bincount(self.source, self.lengths, minlength=len(self.sources))
    return solve_copies(self.sources, sums.astype(np.int64).tolist())

  def example(self, i: int) -> Example:
    record = self.index[i]
    start, run = int(record["start"]), int(record["run"])
    tokens = self.tokens[start : start + int(record["length"])]
    runs = self.runs[run : run + int(record["runs"])]
    lengths = runs["length"]
    return Example(
      tokens.astype(np.int32),
      np.repeat(runs["weight"], lengths),
      np.repeat(runs["role"], lengths),
      int(record["rejected"]),
    )

  def taught(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """What the teacher predicts of example i; see `teacher.Kept.of`."""
    assert self.teacher is not None
    return self.teacher.of(int(self.index[i]["start"]), self.place(i))

  def place(self, i: int) -> str:
    """Where the row of example i stands, such as 'rows.jsonl:12'."""
    record = self.index[i]
    start = int(record["place"])
    return bytes(self.places[start : start + record["place_length"]]).decode()

  def split(self, fraction: float, *, seed: int) -> tuple["Store", "Store"]:
    """Holds out a share of the different rows: (to train on, held out).

    Equal rows go to the same side, and so do all examples of one row. The
    first counts the others as held out, not as dropped. Evaluation sees every
    held-out row once and at full weight, whatever the mixture.

    Raises ValueError: a share that leaves no row on one side.
    """
    contents = np.unique(self.index["content"])
    number = max(1, round(fraction * len(contents)))
    if not 0 < fraction < 1 or number >= len(contents):
      raise ValueError(
        f"held-out share: got {fraction} of {len(contents)} different rows; "
        "expected a share that leaves rows on both sides. Change the share, "
        "or name a file in data.eval instead."
      )
    rng = np.random.default_rng(seed)
    chosen = rng.choice(contents, number, replace=False)
    held = np.isin(self.index["content"], chosen)
    plain = {"repeat": 1.0, "share": None, "loss_weight": 1.0}
    once = tuple(dataclasses.replace(x, **plain) for x in self.sources)
    train, held_out = self._part(~held, self.sources), self._part(held, once)
    for name, rest in train.stats.sources.items():
      away = held_out.stats.source(name)
      away.rows_in = away.rows_trained
      rest.read_as(self.stats.source(name))
      rest.rows_held_out = away.rows_in
    return train, held_out

  def select(
    self,
    reasons: Mapping[str, Bool[np.ndarray, " rows"]],
    weights: Float32[np.ndarray, " rows"],
    inputs: Mapping[str, Mapping[str, Any]],
  ) -> "Store":
    """Without the rows that there is a reason to drop; the others weigh.

    `reasons` says of each whether examples are dropped for it, all of a row for
    the same one; `inputs`, {'source 1': {name: value}}, what chose them.
    """
    keep = ~np.any([np.zeros(len(weights), bool), *reasons.values()], axis=0)
    kept = self._part(keep, self.sources)
    for number, source in enumerate(self.sources):
      entry = kept.stats.source(source.label)
      entry.read_as(self.stats.source(source.label))
      mine = np.flatnonzero(self.source == number)
      first = np.diff(self.index["row"][mine], prepend=-1) > 0
      for reason, mask in reasons.items():
        for i in mine[first & mask[mine]].tolist():
          entry.drop(reason, self.place(i))
    kept.stats.check()
    made = hashlib.sha256(kept.fingerprint.encode() + weights[keep].tobytes())
    from_ = self.fingerprint_inputs
    more = {x: {**from_[x], **mine} for x, mine in inputs.items() if x in from_}
    return dataclasses.replace(
      kept,
      fingerprint=made.hexdigest(),
      weights=weights[keep],
      fingerprint_inputs=from_ | more,
    )

  def _part(self, keep: np.ndarray, sources: tuple[Source, ...]) -> "Store":
    """Some of the examples; of the stats only what is counted of these."""
    kept = np.packbits(keep).tobytes()
    return dataclasses.replace(
      self,
      index=self.index[keep],
      sources=sources,
      fingerprint=hashlib.sha256(self.fingerprint.encode() + kept).hexdigest(),
      stats=count(self.index[keep], self.runs, sources, DatasetStats()),
      weights=None if self.weights is None else self.weights[keep],
    )


def count(
  index: Shaped[np.ndarray, " rows"],
  runs: Shaped[np.ndarray, " runs"],
  sources: Sequence[Source],
  stats: DatasetStats,
) -> DatasetStats:
  """Enters what is trained on; the counts of rows read and dropped stay."""
  by_role = _count_roles(index, runs, len(sources))
  for number, source in enumerate(sources):
    mine = index["source"] == number
    # A row's examples follow each other.
    first = np.diff(index["row"][mine], prepend=-1) > 0
    entry = stats.source(source.label)
    entry.rows_trained = int(first.sum())
    entry.rows_text = int((first & index["text"][mine]).sum())
    entry.examples = int(mine.sum())
    if lengths := np.sort(index["length"][mine]).tolist():
      at = {x: int(q * (len(lengths) - 1)) for x, q in QUANTILES.items()}
      entry.lengths = {name: lengths[i] for name, i in at.items()}
    entry.tokens_trained = int(index["trained"][mine].sum(dtype=np.int64))
    entry.tokens_prompt = sum(lengths) - entry.tokens_trained
    pairs = zip(TOKEN_ROLES, by_role[:, number].T.tolist(), strict=True)
    entry.roles = {role: (some, t) for role, (some, t) in pairs if some}
  return stats


def _count_roles(
  index: Shaped[np.ndarray, " rows"],
  runs: Shaped[np.ndarray, " runs"],
  num_sources: int,
) -> Int64[np.ndarray, "2 sources roles"]:
  """Tokens, and trained tokens, by source and role."""
  shape = (num_sources, len(TOKEN_ROLES))
  sums = np.zeros((2, *shape), np.int64)
  for begin in range(0, len(index), _MANY):
    some = index[begin : begin + _MANY]
    number = some["runs"]
    starts = np.cumsum(number) - number
    at = np.arange(number.sum()) + np.repeat(some["run"] - starts, number)
    mine = runs[at]
    key = np.repeat(some["source"], number) * len(TOKEN_ROLES) + mine["role"]
    lengths = mine["length"]
    for kind, tokens in enumerate((lengths, lengths * (mine["weight"] > 0))):
      # Sums in float64 are exact up to 2**53 tokens.
      found = np.bincount(key, tokens, num_sources * len(TOKEN_ROLES))
      sums[kind] += found.astype(np.int64).reshape(shape)
  return sums


def open_store(folder: Path, sources: Sequence[Source]) -> Store:
  """Maps a store that is on disk, after verifying every byte of it.

  Raises ValueError: a file is missing, or differs from its digest;
  PermissionError: it may not be read.
  """
  try:
    meta = read_meta(folder)
    found = {name: digest(folder / name) for name in meta["files"]}
    damaged = [name for name in found if found[name] != meta["files"][name]]
    if damaged:
      raise ValueError(f"contents of {damaged} that differ from their digests")
  except PermissionError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"cache {folder}: got {error!r}; expected a whole store. Delete the "
      "folder, and it is made again."
    ) from error
  # Sources are named as they were then; files may have moved.
  written = DatasetStats.from_json(meta["stats"]).sources.values()
  names = [source.label for source in sources]
  stats = DatasetStats(dict(zip(names, written, strict=True)))
  stats.check()
  return Store(
    tokens=map_file(folder / "tokens.bin", np.dtype(meta["tokens"])),
    runs=map_file(folder / "runs.bin", RUN),
    places=map_file(folder / "places.txt", np.dtype("u1")),
    index=map_file(folder / "index.bin", INDEX),
    sources=tuple(sources),
    fingerprint=meta["fingerprint"],
    fingerprint_inputs=meta["fingerprint_inputs"],
    stats=stats,
  )
