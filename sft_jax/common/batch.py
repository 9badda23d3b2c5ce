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
  """

  tokens: Int32[AnyArray, "B T"]  # What the model reads.
  targets: Int32[AnyArray, "B T"]  # What comes next; always a valid id.
  loss_weights: Float32[AnyArray, "B T"]  # Of `targets`; 0 means not trained.
  segment_ids: Int32[AnyArray, "B T"]  # 1, 2, ... per document; 0 for padding.
  positions: Int32[AnyArray, "B T"]  # Of a slot within its document, from 0.
  # Of the targets, indices of `token_roles.TOKEN_ROLES`; 0 where there is no
  # target. Here a user says 11, an answer is 12 and 21, 22 ends it.
  roles: UInt8[AnyArray, "B T"] | None = None
  # The source that a slot's document is from; 0 also for padding. Of made-up
  # batches neither need be known: they only tell losses apart.
  sources: Int32[AnyArray, "B T"] | None = None
  # The K tokens that a teacher held most likely for the target.
  teacher_ids: Int32[AnyArray, "B T K"] | None = None
  # Their log-probabilities; None where none was asked.
  teacher_logps: Float32[AnyArray, "B T K"] | None = None
