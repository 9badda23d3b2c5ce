"""Rotary embeddings (RoPE): the angle of each pair of dimensions by position.

Two types look at the length of a sequence: 'dynamic' stretches its base and
'longrope' picks its factors by it. The length that counts here is that of the
*document*, so that a pack is rotated as its documents would be alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from sft_jax.models.families import Family
from sft_jax.models.hf.family_fields import (
  FULL,
  SLIDING,
  Json,
  positive,
  refuse,
)

# Cosine and sine of every angle.
Rotation = tuple[Float32[Array, "B T 1 C"], Float32[Array, "B T 1 C"]]


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary embedding: its base and how it is stretched to longer contexts.

  Attributes:
    theta: the base of the frequencies.
    type: 'default', 'linear', 'dynamic', 'ntk', 'yarn', 'llama3', 'longrope'
      or 'proportional'.
    factor: how much longer than the original context; alpha of ntk.
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
    score_scale: multiplies the scores of latent attention, of which a part
      alone is rotated.
    fraction: share of a head's dimensions, the first, that are rotated; of
      'proportional' share of its pairs, which reach over the whole head.
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
  score_scale: float = 1.0
  fraction: float = 1.0
  query_beta: float = 0.0

  @property
  def by_length(self) -> bool:
    """True if the angles depend on how long the document is."""
    return self.type in ("dynamic", "longrope")


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Radians per position of each pair of dimensions, float32 [C].

  C is half of the rotated dimensions. 'linear' divides every frequency by
  `factor` (Chen et al. 2023). 'llama3' divides those whose wave is longer than
  the original context / low_freq_factor, keeps those shorter than original /
  high_freq_factor, and blends between (Llama 3.1). 'yarn' blends likewise
  between dimensions that turn beta_slow and beta_fast times (Peng et al. 2023,
  arXiv:2309.00071). 'ntk' stretches theta once by factor^(dims / (dims - 2))
  (Hunyuan). 'proportional' keeps the frequencies of a whole head and turns the
  first pairs alone (Gemma 4). Those of 'dynamic' and 'longrope' are for short
  documents.
  """
  proportional = rope.type == "proportional"
  dims = head_dim if proportional else int(head_dim * rope.fraction)
  exponent = np.arange(0, dims, 2, dtype=np.float64) / dims
  theta = rope.theta
  if rope.type == "ntk":
    theta *= rope.factor ** (dims / (dims - 2))
  frequency = theta**-exponent
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
  elif proportional:
    turns = np.arange(dims // 2) < rope.fraction * head_dim // 2
    frequency = frequency * turns / rope.factor
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


def rotation(
  positions: Int[Array, "B T"],
  lengths: Int[Array, "B T"] | None,
  rope: Rope | None,
  *,
  head_dim: int,
) -> Rotation:
  """Cosine and sine of every angle, times `scale`; float32 always.

  Args:
    positions: index of each token in its document.
    lengths: tokens in that document; needed by types that look at it.
    rope: None rotates nothing (cosine 1, sine 0).
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


def query_rotation(
  at: Rotation, positions: Int[Array, "B T"], rope: Rope | None
) -> Rotation:
  """The rotation of queries: that of keys, times what grows with position."""
  if rope is None or not rope.query_beta:
    return at
  blocks = positions // rope.original_max_positions
  growth = 1 + rope.query_beta * jnp.log1p(blocks.astype(jnp.float32))
  return at[0] * growth[..., None, None], at[1] * growth[..., None, None]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def apply(
  x: Float[Array, "B T X H"], at: Rotation, pairs: bool = False
) -> Float[Array, "B T X H"]:
  """Rotates dimension i with i + C (the half-split layout of Hugging Face),
  or in `pairs` dimension 2 i with 2 i + 1.

  Dimensions from 2 C on are left as they are. Its gradient is the rotation
  back, with no gradient of the angles, and keeps only them.
  """
  C = at[0].shape[-1]
  rotated = jax.lax.platform_dependent(
    *(x[..., : 2 * C], *at),
    tpu=partial(_rotate_by_product, pairs=pairs),
    default=partial(_rotate_by_parts, pairs=pairs),
  )
  if x.shape[-1] == 2 * C:
    return rotated
  return jnp.concatenate((rotated, x[..., 2 * C :]), axis=-1)


def _rotate_by_parts(x: Array, cos: Array, sin: Array, *, pairs: bool) -> Array:
  y, C = x.astype(jnp.float32), cos.shape[-1]
  first, second = (
    (y[..., ::2], y[..., 1::2]) if pairs else (y[..., :C], y[..., C:])
  )
  both = first * cos - second * sin, second * cos + first * sin
  if pairs:
    return jnp.stack(both, axis=-1).reshape(x.shape).astype(x.dtype)
  return jnp.concatenate(both, axis=-1).astype(x.dtype)


def _rotate_by_product(
  x: Array, cos: Array, sin: Array, *, pairs: bool
) -> Array:
  """The same: x cos + (x S) sin, where S turns (a, b) into (-b, a).

  A TPU moves halves of its lanes slowly and multiplies fast: on v5e the
  queries' projection and rotation take 1.0 in place of 2.5 million cycles.
  Each column of S holds one +-1, so that the product is exact.
  """
  C = cos.shape[-1]
  places = np.arange(2 * C)
  first, second = places.reshape(C, 2).T if pairs else places.reshape(2, C)
  S = np.zeros((2 * C, 2 * C), np.float32)
  S[second, first], S[first, second] = -1, 1
  crossed = jnp.matmul(
    x,
    jnp.asarray(S, x.dtype),
    preferred_element_type=jnp.float32,
    precision="highest" if x.dtype == jnp.float32 else None,
  )
  if pairs:
    cos, sin = (jnp.repeat(angle, 2, axis=-1) for angle in (cos, sin))
  else:
    cos, sin = (jnp.concatenate((a, a), axis=-1) for a in (cos, sin))
  return (x.astype(jnp.float32) * cos + crossed * sin).astype(x.dtype)


def _rotate_back(pairs: bool, at: Rotation, dy: Array) -> tuple[Array, None]:
  cos, sin = at
  return apply(dy, (cos, -sin), pairs), None


apply.defvjp(lambda x, at, pairs: (apply(x, at, pairs), at), _rotate_back)


# -- From config.json ----------------------------------------------------

_ORIGINAL = "original_max_position_embeddings"
# Numbers that each type needs; YaRN's bounds have a usual value.
_NEEDS: dict[str, tuple[str, ...]] = {
  "default": (),
  "linear": ("factor",),
  "dynamic": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
  "yarn": ("factor", "beta_fast", "beta_slow", _ORIGINAL),
  "longrope": (_ORIGINAL,),
  "proportional": (),
}
_USUAL = {"beta_fast": 32.0, "beta_slow": 1.0}
# The others that some type reads; that it is multimodal changes no text.
_KNOWN = {name for needs in _NEEDS.values() for name in needs} | {
  *("rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate"),
  *("attention_factor", "mscale", "mscale_all_dim", "short_factor"),
  *("long_factor", "max_position_embeddings", "mrope_section"),
  "mrope_interleaved",
}


def parse_ropes(
  raw: Json, family: Family, head_dim: int, where: str
) -> dict[str, Rope]:
  """The rotary embedding of full and of sliding layers.

  Raises ValueError: a type or a value that is not implemented, or two forms in
  one file that differ; the message names it.
  """
  new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
  theta = raw.get("rope_theta")
  fallback = family.defaults.get("rope_theta", 10_000.0)
  base = fallback if theta is None else theta

  def one(rope: Any, name: str, base: Any) -> Rope:
    return _one_rope(rope, name, base, raw, family, head_dim, where)

  if family.local_rope and new is not None:
    # One for all layers is a form that the reference would not look at.
    kinds = new.keys() if isinstance(new, Mapping) else set()
    if kinds != {FULL, SLIDING} or old is not None or theta is not None:
      raise refuse(where, "rope_parameters", new, f"{FULL} and {SLIDING} alone")
    local = family.defaults[family.local_rope]
    return {
      FULL: one(new[FULL], f"rope_parameters.{FULL}", fallback),
      SLIDING: one(new[SLIDING], f"rope_parameters.{SLIDING}", local),
    }
  found = []
  if new is not None:
    found.append(one(new, "rope_parameters", base))
  if old is not None:
    found.append(one(old, "rope_scaling", base))
  if not found:
    found.append(one(family.rope, "rope_parameters", base))
  if theta is not None and found[0].theta != theta:
    raise refuse(where, "rope_theta", theta, f"{found[0].theta}, as in rope_*")
  if found[0] != found[-1]:
    raise refuse(where, "rope_scaling", old, "the same as rope_parameters")
  if family.local_rope is None:
    return {FULL: found[0], SLIDING: found[0]}
  local = raw.get(family.local_rope, family.defaults[family.local_rope])
  sliding = one({"rope_theta": local}, family.local_rope, local)
  return {FULL: found[0], SLIDING: sliding}


def _one_rope(
  rope: Any,
  name: str,
  theta: Any,
  raw: Json,
  family: Family,
  head_dim: int,
  where: str,
) -> Rope:
  if not isinstance(rope, Mapping):
    raise refuse(where, name, rope, "an object")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "mrope":
    kind = "default"  # Its axes agree where there is only text.
  if _ORIGINAL in family.rope_fields and kind in ("su", "yarn"):
    kind = "longrope"  # Older names of it in files of Phi 3.
  if not isinstance(kind, str) or kind not in _NEEDS:
    raise refuse(where, f"{name}.rope_type", kind, f"one of {sorted(_NEEDS)}")
  for odd in rope.keys() - _KNOWN - family.rope_fields:
    if rope[odd] is not None:
      raise refuse(where, f"{name}.{odd}", rope[odd], f"no such field: {kind}")
  # Some files hold these outside; of Phi 3 the context counts there.
  outside = {key: raw[key] for key in family.rope_fields & raw.keys()}
  inside = {k: v for k, v in rope.items() if k != _ORIGINAL or k not in outside}
  rope = outside | inside

  def number(field: str, value: Any) -> float:
    return positive(where, f"{name}.{field}", value)

  for field in ("attention_factor", "mscale", "mscale_all_dim", "factor"):
    if rope.get(field):
      number(field, rope[field])
  ours: dict[str, Any] = {}
  for field in _NEEDS[kind]:
    value = rope.get(field)
    value = _USUAL.get(field) if value is None else value
    ours[field] = number(field, value)
  if _ORIGINAL in ours:
    ours["original_max_positions"] = int(ours.pop(_ORIGINAL))
  fraction = rope.get("partial_rotary_factor")
  if fraction is None:
    fraction = family.defaults.get("partial_rotary_factor", 1.0)
  if kind == "proportional":
    factor = rope.get("factor")
    ours["factor"] = number("factor", 1.0 if factor is None else factor)
    ours["fraction"] = number("partial_rotary_factor", fraction)
    if fraction > 1:
      raise refuse(where, f"{name}.partial_rotary_factor", fraction, "a share")
  elif fraction != 1:
    if "partial_rotary_factor" not in family.rope_fields:
      raise refuse(where, f"{name}.partial_rotary_factor", fraction, 1)
    part = int(head_dim * min(number("partial_rotary_factor", fraction), 2.0))
    if not 0 < part < head_dim or part % 2:
      expected = f"an even part of head_dim={head_dim}"
      raise refuse(where, f"{name}.partial_rotary_factor", fraction, expected)
    ours["fraction"] = float(fraction)
  if kind == "dynamic" and rope.get("alpha"):
    # The reference has a type of its own for it.
    kind, ours = "ntk", {"factor": number("alpha", rope["alpha"])}
  longest = 0.0
  if kind in ("dynamic", "longrope"):
    longest = raw.get("max_position_embeddings")
    longest = number("max_position_embeddings", longest)
  if kind == "dynamic":
    ours["original_max_positions"] = int(longest)
  if kind == "yarn":
    ours["truncate"] = bool(rope.get("truncate", True))
    ours["scale"] = _yarn_scale(rope)
    if beta := rope.get("llama_4_scaling_beta"):
      ours["query_beta"] = number("llama_4_scaling_beta", beta)
  everywhere = rope.get("mscale_all_dim")
  if kind != "default" and everywhere and family.latent:
    factor = number("factor", rope.get("factor"))
    ours["score_scale"] = _mscale(factor, everywhere) ** 2
  if kind == "longrope":
    pairs = int(head_dim * fraction) // 2
    for field in ("short_factor", "long_factor"):
      value = rope.get(field)
      if not isinstance(value, list) or len(value) != pairs:
        raise refuse(where, f"{name}.{field}", value, f"{pairs} numbers")
      ours[field] = tuple(number(field, x) for x in value)
    ours["scale"] = _longrope_scale(rope, longest)
  base = rope.get("rope_theta")
  theta = number("rope_theta", theta if base is None else base)
  return Rope(theta=theta, type=kind, **ours)


def _yarn_scale(rope: Mapping[str, Any]) -> float:
  """0.1 m log(factor) + 1 (arXiv:2309.00071, section 3.4), as DeepSeek reads
  `mscale` and `mscale_all_dim`: the ratio of the two."""
  if rope.get("attention_factor") is not None:
    return float(rope["attention_factor"])
  factor, m, m_all = (
    rope.get(name) for name in ("factor", "mscale", "mscale_all_dim")
  )
  if m and m_all:
    return _mscale(factor, m) / _mscale(factor, m_all)
  return _mscale(factor, 1.0)


def _mscale(factor: Any, m: float) -> float:
  return 0.1 * m * math.log(max(factor, 1.0)) + 1.0


def _longrope_scale(rope: Mapping[str, Any], longest: float) -> float:
  """sqrt(1 + log(factor) / log(original)) (arXiv:2402.13753)."""
  if rope.get("attention_factor") is not None:
    return float(rope["attention_factor"])
  original = rope["original_max_position_embeddings"]
  factor = rope.get("factor") or longest / original
  if factor <= 1 or original <= 1:
    return 1.0
  return math.sqrt(1 + math.log(factor) / math.log(original))
