"""Rows that were tokenized elsewhere: ids, and which of them are trained."""

from collections.abc import Mapping
from typing import Any

from sft_jax.data.conversation import Conversation, NothingToTrain, RowError
from sft_jax.data.formats import fields
from sft_jax.data.formats.fields import Names

# What labels hold where nothing is trained.
IGNORED = -100
# TRL's masks: 1 where a token is trained.
MASKS = ("completion_mask", "assistant_masks")


def from_tokens(
  row: Mapping[str, Any], where: str, names: Names
) -> Conversation:
  """input_ids with labels (or a mask of TRL's), unshifted.

      {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}

  trains the predictions of 6 and of 7. Padding, where attention_mask is 0, is
  cut off.

  Raises RowError: ids that are no integers from 0; other lists of another
  length; labels that are neither -100 nor the ids, shifted ones above all;
  padding between tokens; several documents in a row.
  """
  del names  # It has no turns.
  ids = _integers(row, "input_ids", where)
  columns = {
    key: _integers(row, key, where)
    for key in ("labels", *MASKS, "attention_mask", "position_ids")
    if row.get(key) is not None
  }
  for key, column in columns.items():
    if len(column) != len(ids):
      got = f"{len(column)} {key} for {len(ids)} input_ids"
      raise RowError(where, got, "as many", "Correct or drop the row.")
  attended = columns.pop("attention_mask", [1] * len(ids))
  positions = columns.pop("position_ids", None)
  if not columns:
    got = "input_ids alone"
    cure = "Add labels: the ids, or -100 where nothing is trained."
    raise RowError(where, got, "labels, which say what is trained", cure)
  labels = columns.pop("labels", ids)
  trained = [label != IGNORED for label in labels]
  for mask in columns.values():
    trained = [a and b != 0 for a, b in zip(trained, mask, strict=True)]
  start, end = _without_padding(attended, trained, where)
  ids, labels, trained = ids[start:end], labels[start:end], trained[start:end]
  _check_labels(ids, labels, where)
  first = positions[start] if positions else 0
  if positions and positions[start:end] != list(range(first, first + len(ids))):
    got = "position_ids that do not count up"
    cure = "Give each document its own row: packing is done here."
    raise RowError(where, got, "one document in a row", cure)
  if min(ids, default=0) < 0:
    got, cure = f"the id {min(ids)}", "Correct or drop the row."
    raise RowError(where, got, "ids from 0", cure)
  if not any(trained[1:]):
    raise NothingToTrain("nothing trained", where)
  # The first token is predicted from nothing.
  weights = (0.0, *(float(one) for one in trained[1:]))
  return Conversation(ids=tuple(ids), id_weights=weights, source=where)


def _integers(row: Mapping[str, Any], key: str, where: str) -> list[int]:
  value = fields.items(row, key, where)
  for index, one in enumerate(value):
    # Booleans make a mask.
    if not isinstance(one, int) or abs(one) >= 2**31:
      got = f"{key}[{index}] {fields.shown(one)}"
      expected = "integers of 32 bits"
      raise RowError(where, got, expected, "Correct or drop the row.")
  return value


def _without_padding(
  attended: list[int], trained: list[bool], where: str
) -> tuple[int, int]:
  """[start, end) of the tokens that are attended to."""
  if 1 not in attended:
    raise NothingToTrain("nothing trained", where)
  start = attended.index(1)
  end = len(attended) - attended[::-1].index(1)
  inside = all(one == 1 for one in attended[start:end])
  if not inside or any(trained[:start]) or any(trained[end:]):
    got = "trained padding" if inside else "padding between tokens"
    expected = "attention_mask 0 at the ends alone, on labels of -100"
    raise RowError(where, got, expected, "Correct or drop the row.")
  return start, end


def _check_labels(ids: list[int], labels: list[int], where: str) -> None:
  fits = [a in (b, IGNORED) for a, b in zip(labels, ids, strict=True)]
  if all(fits):
    return
  index = fits.index(False)
  pairs = zip(labels[:-1], ids[1:], strict=True)
  shifted = all(label in (IGNORED, one) for label, one in pairs)
  raise RowError(
    f"{where} labels[{index}]",
    f"{labels[index]} where input_ids has {ids[index]}"
    + (": labels shifted by one, each the token after its own" * shifted),
    "the id of the same place, or -100",
    "Give labels unshifted: the shift is made here."
    if shifted
    else "Correct or drop the row.",
  )
