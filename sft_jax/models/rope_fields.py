"""The rotary fields of a config.json, in either form, as Ropes.

transformers 5 writes `rope_parameters`, one for all layers or one per kind of
layer; before, it was `rope_theta` and `rope_scaling`.
"""

import math
from collections.abc import Mapping
from typing import Any

from sft_jax.models.family import FULL, SLIDING, Family, Json, refuse
from sft_jax.models.rope import Rope

# Fields of each type: ours, theirs; those with a default may be missing.
_FIELDS: dict[str, dict[str, str]] = {
  "default": {},
  "linear": {"factor": "factor"},
  "dynamic": {"factor": "factor"},
  "llama3": {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
  },
  "yarn": {
    "factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "original_max_positions": "original_max_position_embeddings",
  },
  "longrope": {"original_max_positions": "original_max_position_embeddings"},
}
_OPTIONAL: dict[str, dict[str, float]] = {
  "yarn": {"beta_fast": 32.0, "beta_slow": 1.0},
}
_EXTRA = {
  "default": set(),
  "linear": set(),
  "dynamic": {"original_max_position_embeddings"},
  "llama3": set(),
  "yarn": {
    *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "max_position_embeddings",
  },
  "longrope": {"short_factor", "long_factor", "factor", "attention_factor"},
}


def parse_ropes(
  raw: Json, family: Family, head_dim: int, where: str
) -> dict[str, Rope]:
  """The rotary embedding of full and of sliding layers.

  Raises:
    ValueError: a type or a value that is not implemented, or two forms in one
      file that differ; the message names it.
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
  return {FULL: found[0], SLIDING: Rope(theta=float(local))}


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
  if "partial_rotary_factor" in family.rope_fields and kind in ("su", "yarn"):
    kind = "longrope"  # Older names of it in files of Phi 3.
  if kind not in _FIELDS:
    raise refuse(where, f"{name}.rope_type", kind, f"one of {sorted(_FIELDS)}")
  fields, optional = _FIELDS[kind], _OPTIONAL.get(kind, {})
  known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
  known |= set(fields.values()) | _EXTRA[kind] | family.rope_fields
  for odd in rope.keys() - known:
    if rope[odd] is not None:
      raise refuse(where, f"{name}.{odd}", rope[odd], f"no such field: {kind}")
  # Files of Phi 3 hold these two outside, and there they count.
  outer = {
    key: raw[key]
    for key in ("partial_rotary_factor", "original_max_position_embeddings")
    if key in family.rope_fields and key in raw
  }
  rope = {**rope, **outer}
  ours: dict[str, Any] = {}
  for field, theirs in fields.items():
    value = rope.get(theirs)
    if value is None and field in optional:
      value = optional[field]
    if not isinstance(value, int | float) or value <= 0:
      raise refuse(where, f"{name}.{theirs}", value, "a positive number")
    ours[field] = value
  fraction = rope.get("partial_rotary_factor") or 1.0
  if fraction != 1:
    if "partial_rotary_factor" not in family.rope_fields:
      raise refuse(where, f"{name}.partial_rotary_factor", fraction, 1)
    if not 0 < fraction < 1 or int(head_dim * fraction) % 2:
      expected = f"an even part of head_dim={head_dim}"
      raise refuse(where, f"{name}.partial_rotary_factor", fraction, expected)
    ours["fraction"] = float(fraction)
  if kind == "dynamic":
    ours["original_max_positions"] = raw["max_position_embeddings"]
  if kind == "yarn":
    ours["truncate"] = bool(rope.get("truncate", True))
    ours["scale"] = _yarn_scale(rope)
    ours["query_beta"] = float(rope.get("llama_4_scaling_beta") or 0.0)
  if kind == "longrope":
    pairs = int(head_dim * fraction) // 2
    for field in ("short_factor", "long_factor"):
      value = rope.get(field)
      if not isinstance(value, list) or len(value) != pairs:
        raise refuse(where, f"{name}.{field}", value, f"{pairs} numbers")
      ours[field] = tuple(float(x) for x in value)
    ours["scale"] = _longrope_scale(rope, raw)
  base = rope.get("rope_theta")
  return Rope(theta=float(theta if base is None else base), type=kind, **ours)


def _yarn_scale(rope: Mapping[str, Any]) -> float:
  """0.1 m log(factor) + 1 (arXiv:2309.00071, section 3.4), as DeepSeek reads
  `mscale` and `mscale_all_dim`: the ratio of the two."""
  if rope.get("attention_factor") is not None:
    return float(rope["attention_factor"])

  def scale(m: float) -> float:
    return 0.1 * m * math.log(max(rope["factor"], 1.0)) + 1.0

  m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
  return scale(m) / scale(m_all) if m and m_all else scale(1.0)


def _longrope_scale(rope: Mapping[str, Any], raw: Json) -> float:
  """sqrt(1 + log(factor) / log(original)) (arXiv:2402.13753)."""
  if rope.get("attention_factor") is not None:
    return float(rope["attention_factor"])
  original = rope["original_max_position_embeddings"]
  factor = rope.get("factor") or raw["max_position_embeddings"] / original
  if factor <= 1:
    return 1.0
  return math.sqrt(1 + math.log(factor) / math.log(original))
