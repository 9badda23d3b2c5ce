"""How the layers of one model differ: in their window and in how they turn."""

from typing import NamedTuple

from sft_jax.models import windows
from sft_jax.models.family import FULL, SLIDING, Family, Json, refuse
from sft_jax.models.rope import Rope
from sft_jax.models.rope_fields import parse_ropes


class LayerKind(NamedTuple):
  """What may differ between the layers of one model.

  Attributes:
    window: a token sees this many, itself and those before; None: all.
    rope: its rotary embedding; None: queries and keys do not turn.
  """

  window: int | None
  rope: Rope | None


def layer_kinds(
  raw: Json, family: Family, n: int, *, head_dim: int, where: str
) -> tuple[LayerKind, ...]:
  """The kind of each of n layers, from a config.json.

  Raises:
    ValueError: windows or rotary fields that are not implemented, by name.
  """
  if family.traits.get("learned_positions"):
    for field in ("rope_parameters", "rope_theta", "rope_scaling"):
      if raw.get(field) is not None:
        raise refuse(where, field, raw[field], "none: positions are learned")
    return (LayerKind(None, None),) * n
  ropes = parse_ropes(raw, family, head_dim, where)
  raw = dict(family.defaults) | raw
  types = family.layer_types(raw, n) if family.layer_types else [FULL] * n
  given = raw.get("layer_types")
  if given is not None and "layer_types" in family.layer_fields:
    types = given
  elif given is not None and given != types:
    raise refuse(where, "layer_types", given, types)
  if len(types) != n or set(types) - {FULL, SLIDING}:
    raise refuse(where, "layer_types", types, f"{n} of {FULL}, {SLIDING}")
  window = raw.get("sliding_window")
  if "use_sliding_window" in family.layer_fields:
    window = window if raw.get("use_sliding_window") else None
    if window is None and SLIDING in types:
      raise refuse(where, "layer_types", SLIDING, "a sliding_window in use")
  turning = [True] * n
  if "no_rope_layers" in family.layer_fields:
    turning = windows.rope_layers(raw, n)
    if len(turning) != n:
      raise refuse(where, "no_rope_layers", turning, f"{n} values")
  return tuple(
    LayerKind(
      window if kind == SLIDING else None, ropes[kind] if turn else None
    )
    for kind, turn in zip(types, turning, strict=True)
  )
