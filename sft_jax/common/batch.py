"""Batch: what data hands to training."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32, UInt8

AnyArray = jax.Array | np.ndarray


class Batch(NamedTuple):
  """Packed rows of tokens, ready for one optimizer step.

  One row of T = 8 slots holding two documents, `[10 11 12]` whose token 12
  is trained and `[20 21 22]` whose tokens 21 and 22 are trained:

      tokens       = [10, 11, 12, 20, 21, 22, 0, 0]
      targets      = [11, 12,  0, 21, 22,  0, 0, 0]
      loss_weights = [ 0,  1,  0,  1,  1,  0, 0, 0]
      segment_ids  = [ 1,  1,  1,  2,  2,  2, 0, 0]
      positions    = [ 0,  1,  2,  0,  1,  2, 0, 0]
      roles        = [ 2,  4,  0,  4,  7,  0, 0, 0]
      sources      = [ 1,  1,  1,  0,  0,  0, 0, 0]

  A slot's target is the next token *of the same document*; the last slot of
  a document has none (target 0, weight 0). Segment 0 is padding.

  Attributes:
    tokens: what the model reads.
    targets: what it must predict from each slot; always a valid id.
    loss_weights: weight of predicting `targets`; 0 means not trained.
    segment_ids: 1, 2, ... per document of a row; 0 for padding.
    positions: index of a slot within its document, from 0.
    roles: of the targets, indices of `token_roles.TOKEN_ROLES`; 0 where there
      is no target. Here a user says 11, an answer is 12 and 21, 22 ends it.
    sources: the source that a slot's document is from; 0 also for padding.
      Of made-up batches neither need be known: they only tell losses apart.
    teacher_ids, teacher_logps: of the targets, the K tokens that a teacher held
      most likely, and their log-probabilities; None where none was asked.
  """

  tokens: Int32[AnyArray, "B T"]
  targets: Int32[AnyArray, "B T"]
  loss_weights: Float32[AnyArray, "B T"]
  segment_ids: Int32[AnyArray, "B T"]
  positions: Int32[AnyArray, "B T"]
  roles: UInt8[AnyArray, "B T"] | None = None
  sources: Int32[AnyArray, "B T"] | None = None
  teacher_ids: Int32[AnyArray, "B T K"] | None = None
  teacher_logps: Float32[AnyArray, "B T K"] | None = None
