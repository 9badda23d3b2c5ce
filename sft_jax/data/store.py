"""Store: encoded examples on disk, memory-mapped, each with its place.

    tokens.bin   int32    all examples' tokens, back to back
    weights.bin  float32  the weight of predicting each of them
    index.bin    INDEX    where each example lies and what it came from
    places.txt   utf-8    'rows.jsonl:12', for each example
    bad_rows.jsonl        malformed rows that were skipped, and why
    meta.json             size and digest of the above; the ledger

`cache.build` writes one and `open_store` verifies it.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Shaped, UInt8

from sft_jax.data.encode import Example
from sft_jax.data.ledger import Ledger

INDEX = np.dtype(
  [
    ("start", "<i8"),  # first token, in tokens.bin
    ("row", "<i8"),  # which of all rows read; a split row has several
    ("content", "<u8"),  # hash of the row: duplicates have the same
    ("place", "<i8"),  # first byte, in places.txt
    ("place_length", "<i4"),  # bytes
    ("length", "<i4"),  # tokens
    ("trained", "<i4"),  # tokens with a weight above zero
    ("last_trained", "<i4"),  # position of the last of these
    ("source", "<i4"),  # position in the list of sources
    ("text", "?"),  # raw text, not a conversation
    ("may_run_on", "?"),  # raw or truncated: need not end in a stop token
  ]
)
FILES = ("tokens.bin", "weights.bin", "index.bin", "places.txt")


@dataclasses.dataclass(frozen=True)
class Source:
  """A file or glob, and how many times each of its rows is seen per epoch."""

  path: str
  weight: int | float = 1.0


OneSource = str | Source | tuple[str, int | float]
Sources = OneSource | Sequence[OneSource]


def to_sources(sources: Sources) -> tuple[Source, ...]:
  """A path, a (path, weight) pair or a sequence of these, as Sources.

  >>> to_sources(("a.jsonl", ("b/*.jsonl", 0.5)))
  (Source(path='a.jsonl', weight=1.0), Source(path='b/*.jsonl', weight=0.5))

  Raises:
    ValueError: no source, one given twice, or a weight not above zero.
  """
  # Beside sequences, single sources have a length too: told apart by type.
  many: Any = sources
  if isinstance(many, str | Source) or (
    len(many) == 2 and isinstance(many[1], int | float)
  ):
    many = [many]
  given: list[Any] = [(s,) if isinstance(s, str) else s for s in many]
  made = tuple(s if isinstance(s, Source) else Source(*s) for s in given)
  paths = {source.path for source in made}
  if not made or len(paths) < len(made) or min(s.weight for s in made) <= 0:
    raise ValueError(
      f"data sources: got {[(s.path, s.weight) for s in made]}; expected one "
      "or more different paths with weights above 0. To see a source twice "
      "per epoch give it weight 2; to see none of it leave it out."
    )
  return made


@dataclasses.dataclass(frozen=True)
class Store:
  """Encoded examples in the order read; row i of a store is one example.

  Attributes:
    tokens: all tokens on disk; of these `index` may select some.
    loss_weights: beside them, the weight of predicting each.
    places: all places on disk, as bytes.
    index: one INDEX record per example.
    sources: what was read, with mixture weights.
    fingerprint: hash of the examples themselves, however they were made.
    ledger: what became of every row read.
  """

  tokens: Int32[np.ndarray, " tokens"]
  loss_weights: Float32[np.ndarray, " tokens"]
  places: UInt8[np.ndarray, " bytes"]
  index: Shaped[np.ndarray, " rows"]
  sources: tuple[Source, ...]
  fingerprint: str
  ledger: Ledger

  @functools.cached_property
  def lengths(self) -> Int32[np.ndarray, " rows"]:
    """Tokens of each example."""
    return np.ascontiguousarray(self.index["length"])

  @functools.cached_property
  def trained(self) -> Int32[np.ndarray, " rows"]:
    """Trained tokens of each example."""
    return np.ascontiguousarray(self.index["trained"])

  @functools.cached_property
  def source(self) -> Int32[np.ndarray, " rows"]:
    """Position of each example's source in `sources`."""
    return np.ascontiguousarray(self.index["source"])

  @property
  def weights(self) -> tuple[int | float, ...]:
    """Mixture weight of each source: times each row is seen per epoch."""
    return tuple(source.weight for source in self.sources)

  def example(self, i: int) -> Example:
    """Tokens and weights of example i, as views of the disk."""
    start = int(self.index["start"][i])
    here = slice(start, start + int(self.index["length"][i]))
    return Example(self.tokens[here], self.loss_weights[here])

  def place(self, i: int) -> str:
    """Where the row of example i stands, such as 'rows.jsonl:12'."""
    start = int(self.index["place"][i])
    end = start + int(self.index["place_length"][i])
    return bytes(self.places[start:end]).decode()

  def split(self, fraction: float, *, seed: int) -> tuple["Store", "Store"]:
    """Holds out a share of the rows: (to train on, held out).

    Equal rows go to the same side, and so do all examples of one row. In the
    first ledger 'held out' is a reason to drop a row. The held-out store has
    mixture weights 1, for evaluation sees every row once.

    Args:
      fraction: share of the different rows to hold out, at least one row.
      seed: decides which.

    Raises:
      ValueError: a share that leaves no row on one side.
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

    def part(keep: np.ndarray, sources: tuple[Source, ...]) -> Store:
      kept = np.packbits(keep).tobytes()
      return dataclasses.replace(
        self,
        index=self.index[keep],
        sources=sources,
        fingerprint=hashlib.sha256(
          self.fingerprint.encode() + kept
        ).hexdigest(),
        ledger=count(self.index[keep], sources, Ledger()),
      )

    train = part(~held, self.sources)
    held_out = part(held, tuple(Source(s.path) for s in self.sources))
    for name, before in self.ledger.sources.items():
      rest, away = train.ledger.source(name), held_out.ledger.source(name)
      away.rows_in = away.rows_trained
      rest.rows_in = before.rows_in
      rest.dropped = dict(before.dropped)
      rest.dropped_turns, rest.places = before.dropped_turns, before.places
      if away.rows_in:
        rest.dropped["held out"] = away.rows_in
    return train, held_out


def count(
  index: Shaped[np.ndarray, " rows"], sources: Sequence[Source], ledger: Ledger
) -> Ledger:
  """Enters into a ledger what is trained on; rows read and dropped stay."""
  for number, source in enumerate(sources):
    mine = index[index["source"] == number]
    entry = ledger.source(source.path)
    entry.rows_trained = len(np.unique(mine["row"]))
    entry.rows_text = len(np.unique(mine["row"][mine["text"]]))
    entry.examples = len(mine)
    entry.tokens_trained = int(mine["trained"].sum(dtype=np.int64))
    tokens = int(mine["length"].sum(dtype=np.int64))
    entry.tokens_prompt = tokens - entry.tokens_trained
  return ledger


def open_store(folder: Path, sources: Sequence[Source]) -> Store:
  """Maps a store that is on disk, after verifying every byte of it.

  Raises:
    ValueError: a file is missing, or differs from its digest.
  """
  try:
    meta = read_meta(folder)
    found = {name: digest(folder / name) for name in meta["files"]}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"cache {folder}: got {error!r}; expected a whole store. Delete the "
      "folder, and it is made again."
    ) from error
  damaged = [name for name in found if found[name] != meta["files"][name]]
  if damaged:
    raise ValueError(
      f"cache {folder}: got contents of {damaged} that differ from their "
      "digests; expected the bytes that were written. Delete the folder, and "
      "it is made again."
    )
  # A ledger names sources as they were named then; files may have moved.
  written = Ledger.from_json(meta["ledger"]).sources.values()
  names = [source.path for source in sources]
  ledger = Ledger(dict(zip(names, written, strict=True)))
  ledger.check()
  return Store(
    tokens=_map(folder / "tokens.bin", np.dtype("<i4")),
    loss_weights=_map(folder / "weights.bin", np.dtype("<f4")),
    places=_map(folder / "places.txt", np.dtype("u1")),
    index=_map(folder / "index.bin", INDEX),
    sources=tuple(sources),
    fingerprint=meta["fingerprint"],
    ledger=ledger,
  )


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
  """Writes meta.json with a digest of itself, down to the disk."""
  text = json.dumps(meta, sort_keys=True)
  with (folder / "meta.json").open("w") as file:
    json.dump({"meta": meta, "digest": _hash(text)}, file, indent=1)
    file.flush()
    os.fsync(file.fileno())


def read_meta(folder: Path) -> dict[str, Any]:
  """What `write_meta` wrote; a ValueError if it is not that."""
  sealed = json.loads((folder / "meta.json").read_text())
  if _hash(json.dumps(sealed["meta"], sort_keys=True)) != sealed["digest"]:
    raise ValueError("meta.json differs from its digest")
  return sealed["meta"]


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def digest(path: Path) -> str:
  """SHA-256 of a file's bytes."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
  # An empty file cannot be mapped.
  if not path.stat().st_size:
    return np.empty(0, dtype)
  return np.memmap(path, dtype, mode="r")
