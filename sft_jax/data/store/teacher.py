"""What a teacher predicts of a store's trained tokens, kept beside the rows.

    ids.bin     the K most likely ids of each trained token, ceil(log2 V) bits
                each: 18 of 150,000
    logps.bin   their log-probabilities, float16; float32 of a reference
    starts.bin  int64: where each example's tokens start in the store, ascending
    counts.bin  int64: how many of these are trained
    meta.json   digests of the files and of the rows, K, V, the teacher

64 of 150,000 take 64 * (18 / 8 + 2) = 272 bytes a token. A reference of
preferences has two rows of each example in place of its trained tokens' and no
ids (0): log p of its chosen and of its rejected side, 0 of one that is missing.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from sft_jax.data.store.files import digest, map_file, read_meta, write_meta

_FILES = ("ids.bin", "logps.bin", "starts.bin", "counts.bin")


class Kept(NamedTuple):
  """The predictions of a folder; see `of`."""

  # Packed bits, a row for each trained token.
  ids: UInt8[np.ndarray, "tokens bytes"]
  logps: Any  # Float16 or float32, likewise.
  # Of the examples' tokens in the store.
  starts: Int64[np.ndarray, " examples"]
  # First row of each example, and one past the last.
  rows: Int64[np.ndarray, " examples+1"]
  top: int  # K.
  fingerprint: str  # Of all of it.
  base: str  # Digest of the model that a reference is; '' of a teacher.

  def of(
    self, start: int, where: str
  ) -> tuple[Int32[np.ndarray, "n K"], Float32[np.ndarray, "n K"]]:
    """(ids, log-probabilities) of the trained tokens of an example.

    Raises ValueError: the teacher was not asked about this row, `where`.
    """
    at = int(np.searchsorted(self.starts, start))
    if at == len(self.starts) or self.starts[at] != start:
      raise ValueError(
        f"{where}: got no prediction of the teacher, expected those of every "
        "row that is trained on. Run sft-jax teach with this config again."
      )
    own = slice(int(self.rows[at]), int(self.rows[at + 1]))
    return unpack(self.ids[own], self.top), self.logps[own].astype(np.float32)


def pack(ids: Int32[np.ndarray, "n K"], bits: int) -> UInt8[np.ndarray, "n b"]:
  """Ids in so many bits each, a row of bytes for each token."""
  spread = ids[..., None] >> np.arange(bits - 1, -1, -1) & 1
  return np.packbits(spread.astype(np.uint8).reshape(len(ids), -1), axis=1)


def unpack(
  packed: UInt8[np.ndarray, "n b"], top: int
) -> Int32[np.ndarray, "n K"]:
  """Inverse of `pack`, whose rows have less than a byte to spare."""
  bits = packed.shape[1] * 8 // top
  spread = np.unpackbits(packed, axis=1, count=top * bits)
  powers = 1 << np.arange(bits - 1, -1, -1)
  return spread.reshape(len(packed), top, bits).astype(
    np.int32
  ) @ powers.astype(np.int32)


def rows_digest(tokens: np.ndarray, runs: np.ndarray) -> str:
  """Of all tokens of a store with their weights, whatever it selects."""
  made = hashlib.sha256(tokens.tobytes())
  made.update(runs.tobytes())
  return made.hexdigest()


def write(
  folder: Path,
  found: Iterable[tuple[int, np.ndarray, np.ndarray]],
  *,
  vocab_size: int,
  about: dict[str, Any],
) -> None:
  """Writes a folder from (start, ids [n, K], log-probabilities) by example.

  Starts ascend; meta.json comes last, so a folder is whole or refused. `about`
  has the digest of the rows, under 'rows', K, under 'top', the dtype of
  log-probabilities, and whatever else says where these come from.
  """
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "meta.json").unlink(missing_ok=True)
  bits = max(1, (vocab_size - 1).bit_length())
  # A row's bits are told from its bytes: not where a byte could hold more.
  while (about["top"] * bits + 7) // 8 * 8 // about["top"] != bits:
    bits += 1
  starts, counts = [], []
  with (
    (folder / "ids.bin").open("wb") as ids_file,
    (folder / "logps.bin").open("wb") as logps_file,
  ):
    for start, ids, logps in found:
      starts.append(start)
      counts.append(len(ids))
      ids_file.write(pack(ids, bits).tobytes())
      logps_file.write(logps.astype(about["dtype"]).tobytes())
  (folder / "starts.bin").write_bytes(np.array(starts, "<i8").tobytes())
  (folder / "counts.bin").write_bytes(np.array(counts, "<i8").tobytes())
  files = {name: digest(folder / name) for name in _FILES}
  row_bytes = (about["top"] * bits + 7) // 8
  write_meta(folder, {**about, "files": files, "row_bytes": row_bytes})


def open_kept(folder: Path, rows: str) -> Kept:
  """Opens a folder after verifying every byte of it.

  Raises ValueError: none, a damaged one, or one of other rows.
  """
  try:
    meta = read_meta(folder)
    whole = all(digest(folder / f) == x for f, x in meta["files"].items())
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(
      f"got a teacher or reference 'kept' and none in {folder} ({error}); "
      "expected one that was asked. Run sft-jax teach with this config first."
    ) from error
  if not whole or meta["rows"] != rows:
    raise ValueError(
      f"{folder}: got predictions that are damaged, or of other rows; expected "
      "those of the rows that are trained on. Run sft-jax teach again."
    )
  load = lambda name, dtype: map_file(folder / name, np.dtype(dtype))
  counts = load("counts.bin", "<i8")
  return Kept(
    ids=load("ids.bin", "u1").reshape(-1, meta["row_bytes"]),
    logps=load("logps.bin", meta["dtype"]).reshape(-1, meta["top"]),
    starts=load("starts.bin", "<i8"),
    rows=np.concatenate([[0], np.cumsum(counts)]),
    top=meta["top"],
    fingerprint=digest(folder / "meta.json"),
    base=meta.get("base", ""),
  )
