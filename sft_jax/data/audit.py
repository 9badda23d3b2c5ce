"""Audit: verdicts on encoded rows that would teach a model the wrong thing."""

from collections.abc import Collection

import numpy as np

from sft_jax.data.store import Store

_CHUNK = 1 << 24  # tokens looked at together


def verify(
  store: Store,
  *,
  vocab_size: int,
  stop_ids: Collection[int],
  bos_id: int | None,
) -> None:
  """Refuses encoded rows that would teach the wrong thing.

  Args:
    store: as `cache.build` returns it, before any split.
    vocab_size: rows of the model's embedding.
    stop_ids: tokens that end a reply at inference.
    bos_id: the token that begins a text, if there is one.

  Raises:
    ValueError: nothing is trained; a token lies outside the vocabulary; a
      text begins with two BOS; a reply does not end in a stop token (raw
      text and truncated replies may).
  """
  index, tokens = store.index, store.tokens
  if not len(index):
    raise ValueError(
      "data: got no row with anything to train on, expected at least one. "
      "Read the reasons in the ledger; data.format may be the wrong one."
    )
  for begin in range(0, len(tokens), _CHUNK):
    chunk = tokens[begin : begin + _CHUNK]
    strange = np.flatnonzero((chunk < 0) | (chunk >= vocab_size))
    if len(strange):
      at = begin + int(strange[0])
      row = int(np.searchsorted(index["start"], at, side="right")) - 1
      raise ValueError(
        f"{store.place(row)}: got token id {int(tokens[at])}, expected below "
        f"{vocab_size}, the rows of the model's embedding. The tokenizer is "
        "not this model's, or tokens were added to it and not to the model."
      )
  starts, lengths = index["start"], index["length"]
  if bos_id is not None:
    two = starts[lengths > 1]
    doubled = (tokens[two] == bos_id) & (tokens[two + 1] == bos_id)
    if doubled.any():
      row = int(np.flatnonzero(lengths > 1)[np.argmax(doubled)])
      raise ValueError(
        f"{store.place(row)}: got two BOS tokens (id {bos_id}) at the start, "
        f"expected one ({int(doubled.sum())} such rows). The chat template "
        "writes one; let the rows' own text not begin with another."
      )
  ends = tokens[starts + index["last_trained"]]
  open_ended = ~np.isin(ends, list(stop_ids)) & ~index["may_run_on"]
  if open_ended.any():
    row = int(np.argmax(open_ended))
    raise ValueError(
      f"{store.place(row)}: the last trained token is {int(ends[row])}, "
      f"expected one of the stop tokens {sorted(stop_ids)} "
      f"({int(open_ended.sum())} such rows): the model would never learn to "
      "stop. Let the chat template end assistant turns with a stop token, or "
      "name the token it uses in the tokenizer's eos_token."
    )
