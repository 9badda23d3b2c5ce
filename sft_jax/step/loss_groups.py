"""Groups of tokens with a loss of their own: by role, by source, by place.

A token belongs to its role, to its source, and perhaps to 'first_token', the
first trained one after one that is not. The ids of R roles and S sources:

    0 .. R - 1        roles
    R                 first tokens
    R + 1 .. R + S    sources
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from sft_jax.common.batch import Batch
from sft_jax.step.loss import GroupSums


def names(roles: Sequence[str], sources: Sequence[str]) -> tuple[str, ...]:
  """What metrics call the groups, in the order of their ids.

  >>> names(["answer", "stop"], ["mine"])
  ('role/answer', 'stop_token', 'first_token', 'source/mine')
  """
  of_roles = ["stop_token" if r == "stop" else f"role/{r}" for r in roles]
  return (*of_roles, "first_token", *(f"source/{s}" for s in sources))


def of(batch: Batch, num_roles: int) -> Int32[Array, "B T K"]:
  """Ids of the groups of each token that is predicted; -1 is none."""
  with jax.named_scope("token_groups"):
    trained = jnp.asarray(batch.loss_weights) != 0
    before = jnp.pad(trained, ((0, 0), (1, 0)))[:, :-1]
    # A document's last slot predicts nothing: it parts neighbors, too.
    first = jnp.where(trained & ~before, num_roles, -1)
    ids = [first]
    if batch.roles is not None:
      ids.append(jnp.asarray(batch.roles).astype(jnp.int32))
    if batch.sources is not None:
      ids.append(num_roles + 1 + jnp.asarray(batch.sources))
    return jnp.stack(ids, axis=-1)


def documents(
  batch: Batch, per_row: int, first: int = 0
) -> Int32[Array, "B T 1"]:
  """The document of each token, first + row * per_row + its place there; -1 is
  none."""
  number = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)[:, None]
  segments = jnp.asarray(batch.segment_ids)
  number = first + number * per_row
  ids = jnp.where(segments > 0, number + segments - 1, -1)
  return ids[..., None]


def pairs(
  groups: GroupSums, names: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
  """{'loss/<group>' and 'acc/<group>': (sum, weight)}, as metrics are. Groups
  beyond the names are not shown: a step may make room for more."""
  return {
    f"{kind}/{name}": (sums[i], groups.weight[i])
    for i, name in enumerate(names)
    for kind, sums in (("loss", groups.nats), ("acc", groups.correct))
  }
