"""Rotary embeddings (RoPE): the angle of each pair of dimensions by position.

'dynamic' stretches its base by the length of a sequence and 'longrope' picks
its factors by it. Here the length of the *document* counts, so that a pack is
rotated as its documents would be alone.
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
  words,
)

# Cosine and sine of every angle.
Rotation = tuple[Float32[Array, "B T 1 C"], Float32[Array, "B T 1 C"]]


@dataclasses.dataclass(frozen=True)
class Rope:
  """A rotary embedding: its base and how it is stretched to longer contexts."""

  theta: float  # The base of the frequencies.
  # 'default', 'linear', 'dynamic', 'ntk', 'yarn', 'llama3', 'longrope' or
  # 'proportional'.
  type: str = "default"
  factor: float = 1.0  # Of stretching; alpha of ntk.
  low_freq_factor: float = 1.0  # Llama3 only.
  high_freq_factor: float = 1.0  # Llama3 only.
  original_max_positions: int = 0  # The context before stretching.
  beta_fast: float = 32.0  # Yarn: turns above which a frequency is kept.
  beta_slow: float = 1.0  # Yarn: turns below which it is divided.
  truncate: bool = True  # Yarn: these bounds become whole dimensions.
  # Longrope only; divisors of the frequencies, one each, of documents that fit
  # the original context.
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()  # Those of longer documents.
  scale: float = 1.0  # Of cosine and sine; scores grow by its square.
  score_scale: float = 1.0  # Of latent attention, rotated in part.
  # Share of a head's dimensions, the first, that are rotated; of 'proportional'
  # share of its pairs, which reach over the whole head.
  fraction: float = 1.0
  # Queries grow by 1 + query_beta * log(1 + floor(position /
  # original_max_positions)) (Llama 4, Ministral 3).
  query_beta: float = 0.0

  @property
  def by_length(self) -> bool:
    return self.type in ("dynamic", "longrope")


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Radians per position of each pair of dimensions, float32 [C].

  C is half of the rotated dimensions. Those of 'dynamic' and 'longrope' are for
  short documents. 'linear': Chen et al. 2023. 'llama3' divides frequencies
  whose wave is longer than the original context / low_freq_factor, keeps those
  shorter than original / high_freq_factor, and blends between. 'yarn' blends
  between dimensions that turn beta_slow and beta_fast times (Peng et al. 2023,
  arXiv:2309.00071). 'ntk' stretches theta once (Hunyuan). 'proportional' keeps
  the frequencies of a whole head and turns the first pairs alone (Gemma 4).
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
  """Cosine and sine of every angle, times `scale`; float32 always. `positions`
  and `lengths` are of a token in its document, and of that, for types that look
  at it. No rope rotates nothing (cosine 1, sine 0)."""
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
  """Rotates dimension i with i + C, or in `pairs` dimension 2 i with 2 i + 1.
  Dimensions from 2 C on stay. The gradient is the rotation back, with none of
  the angles, which are all it keeps."""
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
  """The same: x cos + (x S) sin, where S turns (a, b) into (-b, a), exactly. A
  TPU moves halves of its lanes slowly: on v5e the queries' projection and
  rotation take 1.0 in place of 2.5 million cycles."""
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
_KNOWN = words("""rope_type type rope_theta partial_rotary_factor truncate
  attention_factor mscale mscale_all_dim short_factor long_factor
  max_position_embeddings mrope_section mrope_interleaved""").union(
  *_NEEDS.values()
)


def parse_ropes(
  raw: Json, family: Family, head_dim: int, where: str
) -> dict[str, Rope]:
  """The rotary embedding of full and of sliding layers. Raises ValueError, by
  name: what is not implemented; two forms in one file that differ."""
  new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
  theta = raw.get("rope_theta")
  fallback = family.defaults.get("rope_theta", 10_000.0)
  base = fallback if theta is None else theta

  one = partial(
    _one_rope, raw=raw, family=family, head_dim=head_dim, where=where
  )

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
  forms = {"rope_parameters": new, "rope_scaling": old}
  given = {name: rope for name, rope in forms.items() if rope is not None}
  given = given or {"rope_parameters": family.rope}
  found = [one(rope, name, base) for name, rope in given.items()]
  if theta is not None and found[0].theta != theta:
    raise refuse(where, "rope_theta", theta, f"{found[0].theta}, as in rope_*")
  if found[0] != found[-1]:
    raise refuse(where, "rope_scaling", old, "the same as rope_parameters")
  sliding = found[0]
  if family.local_rope:
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
    # DeepSeek reads the ratio of the two.
    m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
    ours["scale"] = _mscale(rope["factor"], m if m and m_all else 1.0)
    if m and m_all:
      ours["scale"] /= _mscale(rope["factor"], m_all)
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
    # arXiv:2402.13753.
    original = rope[_ORIGINAL]
    factor = rope.get("factor") or longest / original
    if factor > 1 and original > 1:
      ours["scale"] = math.sqrt(1 + math.log(factor) / math.log(original))
  given = rope.get("attention_factor")
  if kind in ("yarn", "longrope") and given is not None:
    ours["scale"] = float(given)
  base = rope.get("rope_theta")
  theta = number("rope_theta", theta if base is None else base)
  return Rope(theta=theta, type=kind, **ours)


def _mscale(factor: Any, m: float) -> float:
  """arXiv:2309.00071, section 3.4."""
  return 0.1 * m * math.log(max(factor, 1.0)) + 1.0
