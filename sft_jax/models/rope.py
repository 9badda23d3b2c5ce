"""Rotary embeddings: how far each pair of dimensions turns per position.

Two types look at the length of a sequence: 'dynamic' stretches its base and
'longrope' picks its factors by it. The length that counts here is that of the
*document*, so that a packed row turns as its documents would alone.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

# Cosine and sine of every angle, and what turns a query or key by them.
Turn = tuple[Float32[Array, "B T 1 C"], Float32[Array, "B T 1 C"]]


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding: its base and how it is stretched to longer contexts.

  Attributes:
    theta: the base of the frequencies.
    type: 'default', 'linear', 'dynamic', 'yarn', 'llama3' or 'longrope'.
    factor: how much longer than the original context.
    low_freq_factor: llama3 only.
    high_freq_factor: llama3 only.
    original_max_positions: the context before stretching.
    beta_fast: yarn only; turns within the original context above which a
      frequency is kept.
    beta_slow: yarn only; turns below which it is divided by `factor`.
    truncate: yarn only; the two bounds are rounded to whole dimensions.
    short_factor: longrope only; divisors of the frequencies, one each, of
      documents that fit the original context.
    long_factor: longrope only; divisors for longer documents.
    scale: multiplies cosine and sine, so scores grow by its square.
    fraction: share of a head's dimensions, the first, that turn at all.
    query_beta: queries grow by 1 + query_beta * log(1 + floor(position /
      original_max_positions)) (Llama 4, Ministral 3).
  """

  theta: float
  type: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 1.0
  original_max_positions: int = 0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()
  scale: float = 1.0
  fraction: float = 1.0
  query_beta: float = 0.0

  @property
  def by_length(self) -> bool:
    """True if the angles depend on how long the document is."""
    return self.type in ("dynamic", "longrope")


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Radians per position of each pair of dimensions, float32 [C].

  C is half of the turning dimensions. 'linear' divides every frequency by
  `factor` (Chen et al. 2023). 'llama3' divides those whose wave is longer than
  the original context / low_freq_factor, keeps those shorter than original /
  high_freq_factor, and blends between (Llama 3.1). 'yarn' blends likewise
  between dimensions that turn beta_slow and beta_fast times (Peng et al. 2023,
  arXiv:2309.00071). Those of 'dynamic' and 'longrope' are for short documents.
  """
  dims = int(head_dim * rope.fraction)
  exponent = np.arange(0, dims, 2, dtype=np.float64) / dims
  frequency = rope.theta**-exponent
  if rope.type == "linear":
    frequency = frequency / rope.factor
  elif rope.type == "llama3":
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    frequency = frequency * (keep + (1 - keep) / rope.factor)
  elif rope.type == "yarn":
    # The (fractional) dimension that turns so often in the original context.
    low, high = (
      dims
      * math.log(rope.original_max_positions / (turns * 2 * math.pi))
      / (2 * math.log(rope.theta))
      for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    # Where the bounds meet, a step.
    width = high - low or 0.001
    divide = np.clip((np.arange(dims // 2) - low) / width, 0.0, 1.0)
    frequency = frequency * (1 - divide + divide / rope.factor)
  elif rope.type == "longrope":
    frequency = frequency / np.array(rope.short_factor)
  return frequency.astype(np.float32)


def _by_length(
  rope: Rope, head_dim: int, lengths: Int[Array, "B T"]
) -> Float32[Array, "B T C"]:
  """Frequencies of tokens in documents of the given lengths."""
  lengths = lengths[..., None]
  short = frequencies(rope, head_dim)
  if rope.type == "longrope":
    long = short * np.array(rope.short_factor) / np.array(rope.long_factor)
    return jnp.where(
      lengths > rope.original_max_positions, long.astype(np.float32), short
    )
  # Dynamic NTK: theta grows with the length beyond the original context, by
  # (factor * length / original - (factor - 1)) ** (dims / (dims - 2)).
  dims = 2 * short.size
  ratio = lengths / rope.original_max_positions
  growth = rope.factor * jnp.maximum(ratio, 1.0) - (rope.factor - 1)
  exponent = np.arange(0, dims, 2, dtype=np.float32) / (dims - 2)
  return jnp.asarray(short) * growth**-exponent


def turn(
  positions: Int[Array, "B T"],
  lengths: Int[Array, "B T"] | None,
  rope: Rope | None,
  *,
  head_dim: int,
) -> Turn:
  """Cosine and sine of every angle, times `scale`; float32 always.

  Args:
    positions: index of each token in its document.
    lengths: tokens in that document; needed by types that look at it.
    rope: None turns nothing (cosine 1, sine 0).
    head_dim: H.
  """
  if rope is None:
    still = jnp.zeros((*positions.shape, 1, head_dim // 2), jnp.float32)
    return still + 1, still
  if rope.by_length:
    assert lengths is not None
    frequency = _by_length(rope, head_dim, lengths)
  else:
    frequency = frequencies(rope, head_dim)
  angle = (positions[..., None] * frequency).astype(jnp.float32)[:, :, None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  # A model without scaling is multiplied by nothing.
  return (cos, sin) if rope.scale == 1 else (cos * rope.scale, sin * rope.scale)


def query_turn(
  at: Turn, positions: Int[Array, "B T"], rope: Rope | None
) -> Turn:
  """The turn of queries: that of keys, times what grows with position."""
  if rope is None or not rope.query_beta:
    return at
  blocks = positions // rope.original_max_positions
  growth = 1 + rope.query_beta * jnp.log1p(blocks.astype(jnp.float32))
  return at[0] * growth[..., None, None], at[1] * growth[..., None, None]


def apply(x: Float[Array, "B T X H"], at: Turn) -> Float[Array, "B T X H"]:
  """Turns dimension i with i + C (the half-split layout of Hugging Face).

  Dimensions from 2 C on are left as they are.
  """
  cos, sin = at
  C = cos.shape[-1]
  y = x.astype(jnp.float32)
  first, second, rest = y[..., :C], y[..., C : 2 * C], x[..., 2 * C :]
  turned = jnp.concatenate(
    (first * cos - second * sin, second * cos + first * sin), axis=-1
  ).astype(x.dtype)
  if not rest.shape[-1]:
    return turned
  return jnp.concatenate((turned, rest), axis=-1)
