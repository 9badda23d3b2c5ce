"""The rows of one step, for people: where they stand, what they say."""

from typing import Any

from sft_jax.data.audit import summary
from sft_jax.data.pipeline import Stream
from sft_jax.data.tokenizers.tokenizer import Tokenizer


def step_rows(
  stream: Stream, tokenizer: Tokenizer, step: int
) -> list[dict[str, Any]]:
  """Every example that step number `step` trained on.

  Args:
    stream: of the run.
    tokenizer: of the run.
    step: 1 for the first.

  Returns:
    [{'step', 'row' of the batch, 'place', 'tokens', 'loss_weights', 'pieces'}],
    see `inspection.sample`.

  Raises:
    ValueError: a step that the stream does not have.
  """
  last = stream.num_steps
  if step < 1 or (last is not None and step > last):
    raise ValueError(
      f"step: got {step}, expected 1 to {last or 'any number'}. Name a step "
      "of this run."
    )
  return [
    {"step": step, "row": row, **summary.sample(stream.store, i, tokenizer)}
    for row, ids in enumerate(stream.rows_of(step - 1))
    for i in ids
  ]
