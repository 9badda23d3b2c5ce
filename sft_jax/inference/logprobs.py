"""Per-token log-probabilities of conversations, as plain data."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.common.batch import Batch
from sft_jax.data import packing
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.conversation import Conversation
from sft_jax.data.encoding.encode import encode
from sft_jax.data.formats.formats import to_conversation
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.step.loss import linear_cross_entropy


def logprobs(
  model: Any,
  params: Any,
  tokenizer: Tokenizer,
  conversations: Iterable[Conversation | Mapping[str, Any]],
  *,
  batch_size: int = 8,
  max_length: int = 1 << 20,
  **options: Any,
) -> list[dict[str, list[Any]]]:
  """The log-probability of every token, given those before it, with its role.

      table = sft_jax.logprobs(model, params, tokenizer, rows)[0]
      for text, role, x in zip(table["text"], table["role"], table["logprob"]):
        ...

  Args:
    model, params: as `load_pretrained` gives them.
    tokenizer: with its chat template.
    conversations: Conversations, or rows of any format.
    batch_size: token sequences at once, padded to the longest of their batch.
    max_length: tokens that a sequence may have; see `data.over_long`.
    **options: fields of `options.RenderOptions`, such as history='split'.

  Returns a table for each token sequence, in order: of each conversation one,
  or under a split history of each trained turn. Its columns, of one length:

      row       index of the conversation
      id, text  of the token
      role      of `token_roles.TOKEN_ROLES`
      weight    in the loss, as training has it
      logprob   in nats, of the id given those before it; None for the first

  Raises RowError, NothingToTrain: see `encode.encode_row`.
  """
  rows, examples = [], []
  for row, one in enumerate(conversations):
    if not isinstance(one, Conversation):
      one = to_conversation(one, source=f"conversations[{row}]")
    found = encode(one, tokenizer, max_length=max_length, **options)
    examples += found
    rows += [row] * len(found)

  @jax.jit
  def nats(params: Any, batch: Batch) -> jax.Array:
    shape = batch.tokens.shape
    own = jnp.arange(batch.tokens.size, dtype=jnp.int32).reshape(*shape, 1)
    row = (batch.tokens, batch.positions, batch.segment_ids)
    hidden = model.hidden(params, *row)
    # Each token is a group of its own.
    sums = linear_cross_entropy(
      hidden,
      model.head(params).astype(hidden.dtype),
      batch.targets,
      (batch.segment_ids > 0).astype(jnp.float32),
      own,
      num_groups=batch.tokens.size,
      softcap=model.config.logit_softcap,
    )
    return sums.groups.nats.reshape(shape)

  batches = packing.padded_batches(examples, batch_size)
  losses = [row for batch in batches for row in np.asarray(nats(params, batch))]
  tables = []
  for row, example, loss in zip(rows, examples, losses, strict=False):
    ids = example.tokens.tolist()
    tables.append(
      {
        "row": [row] * len(ids),
        "id": ids,
        "text": [tokenizer.decode([i], skip_special=False) for i in ids],
        "role": [TOKEN_ROLES[role] for role in example.roles],
        "weight": example.loss_weights.tolist(),
        "logprob": [None, *(-loss[: len(ids) - 1]).tolist()],
      }
    )
  return tables
