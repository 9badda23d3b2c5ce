"""What a family is: the form of one entry of the table in `families`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Json = dict[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"


class Read(NamedTuple):
  """What becomes of a field of config.json.

  Attributes:
    into: fields of ModelConfig.
    default: what transformers takes where the file has no such field.
    via: the value's meaning, as a function or a table of accepted values.
  """

  into: tuple[str, ...]
  default: Any = None
  via: Callable[[Any], Any] | Mapping[Any, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type`.

  Attributes:
    architecture: the class that `architectures` must name.
    names: module of ours: module of theirs, `{}` standing for the layer. Ours
      that share one of theirs lie in it side by side, in this order.
    traits: fields of ModelConfig that every model of the family has.
    reads: fields of config.json beyond the common ones.
    defaults: common fields that transformers fills in, or a function of the
      file that does.
    requires: fields without which a file is refused.
    aliases: common fields that the family spells in its own way.
    only: fields accepted at these values alone.
    harmless: fields that change nothing here.
    layer_types: SLIDING or FULL for each of n layers, from (file, n).
    layer_fields: fields that `layer_types` looks at.
    rope_fields: rotary fields beyond those of the rope's type.
    rope: the rotary fields of a file that has none.
    local_rope: sliding layers have a rotary embedding of their own, whose
      theta is this field in older files.
    conv1d: kernels lie as [in, out] in the file.
    experts: layers have a router and experts in place of an MLP.
    stacked_experts: all experts of a layer lie in one tensor [E, in, out],
      and columns of gate and up take turns.
    buffers: endings of tensors that old files hold and that follow from the
      config; they are not read.
  """

  architecture: str
  names: Mapping[str, str]
  traits: Json = dataclasses.field(default_factory=dict)
  reads: Mapping[str, Read] = dataclasses.field(default_factory=dict)
  defaults: Json = dataclasses.field(default_factory=dict)
  requires: frozenset[str] = frozenset()
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  harmless: frozenset[str] = frozenset()
  layer_types: Callable[[Json, int], list[str]] | None = None
  layer_fields: frozenset[str] = frozenset()
  rope_fields: frozenset[str] = frozenset()
  rope: Json = dataclasses.field(default_factory=dict)
  local_rope: str | None = None
  conv1d: bool = False
  experts: bool = False
  stacked_experts: bool = False
  buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)


def refuse(where: Any, name: str, got: Any, expected: Any) -> ValueError:
  """The error for a field that is not understood."""
  return ValueError(
    f"{where}: {name}={got!r} is not supported; expected {expected}. "
    "Use a model of a supported kind, or add it in sft_jax/models/."
  )
