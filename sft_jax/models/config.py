"""ModelConfig: a model's sizes and switches, read from its `config.json`.

A field that the family's configuration class in transformers gives meaning to
is implemented or refused by name: ignored, the model would be another one. Any
other unknown field is listed in `ModelConfig.notes`.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft_jax.models.families import FAMILIES, MULTIMODAL, Family
from sft_jax.models.hf.family_fields import (
  FULL,
  LINEAR,
  READS,
  SLIDING,
  Json,
  Read,
  positive,
  refuse,
  whole_number,
  words,
)
from sft_jax.models.rope import Rope, parse_ropes

# {family: {field: default}} of transformers' configuration classes, written by
# tools/dev/make_config_fields.py.
FIELDS: dict[str, Json] = json.loads(
  resources.files("sft_jax.models.hf")
  .joinpath("config_fields.json")
  .read_text()
)

# Mixers that are attention: of all layers, or in some with heads of their own.
ATTENTION = ("attn", "global_attn")

# Sizes beyond these are mistakes, slow before the tensors could contradict.
_MOST = {
  **{"num_hidden_layers": 10_000, "num_local_experts": 10_000},
  **{"num_attention_heads": 1 << 16, "head_dim": 1 << 16},
  **{"hidden_size": 1 << 24, "intermediate_size": 1 << 24},
}


class LayerKind(NamedTuple):
  """What may differ between the layers of one model."""

  window: int | None  # A token sees so many, its own included; None: all.
  rope: Rope | None  # None: queries and keys are not rotated.
  dense: bool = False  # An MLP of `d_ff_dense` in a model of experts.
  # What mixes tokens: one of ATTENTION, or a layer of `layers`: 'conv',
  # 'delta', 'mamba'. Its parameters are under this name. Of layers of one part
  # it may be 'mlp' or 'moe'.
  mixer: str = "attn"
  # It reads the keys and values of the last layer before that has some, of the
  # same mixer. Its parameters are under 'reuse_' and that name.
  shares: bool = False

  @property
  def of_attention(self) -> "LayerKind":
    """What attention looks at."""
    return self._replace(dense=False, shares=False)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder-only transformer."""

  family: str  # `model_type` of the config.
  vocab_size: int  # V, rows of the embedding.
  num_layers: int  # L.
  d_model: int  # D, width of the residual stream.
  d_ff: int  # F, width of the MLP, or of each expert.
  num_heads: int  # N query heads.
  num_kv_heads: int  # K key/value heads; N is a multiple of K.
  head_dim: int  # H; N * H need not be D.
  max_positions: int  # The context the model was made for, in tokens.
  norm_eps: float  # Added to the mean square in the norms.
  tie_embeddings: bool  # The unembedding is the embedding.
  layers: tuple[LayerKind, ...]  # The kind of each layer.
  init_std: float  # Standard deviation of fresh weights.
  # The config.json it came from, for a faithful export; of a multimodal
  # checkpoint that of its text part.
  raw: Json = dataclasses.field(compare=False, repr=False)
  # `model_type` of the multimodal checkpoint that it is in; '': none.
  part_of: str = dataclasses.field(default="", compare=False)
  # What a person should know of how it was read, one line each.
  notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)
  # {name: rows} of the tensors of its folder, where those of the family have
  # several names; an export has the same.
  stored: Mapping[str, int] = dataclasses.field(
    default_factory=dict, compare=False, repr=False
  )
  activation: str = "silu"  # 'silu', 'gelu_tanh', 'xielu' or 'relu2'.
  glu_alpha: float | None = None  # Of `moe.clipped_swiglu` in its place.
  glu_limit: float = math.inf  # Likewise.
  gated_mlp: bool = True  # Times act(gate(x)); of experts too.
  qkv_bias: bool = False  # Projections of q, k and v have a bias.
  o_bias: bool = False  # The attention's output projection has a bias.
  mlp_bias: bool = False  # The projections of the MLP have one, a router too.
  num_experts: int = 0  # E; 0: an MLP and no router.
  experts_per_token: int = 0  # k.
  d_ff_dense: int = 0  # Width of the MLP of layers without experts.
  d_ff_shared: int = 0  # Of an MLP beside the experts; 0: none.
  shared_gate: bool = False  # What it adds is times a sigmoid gate.
  norm_topk: bool = True  # The shares of the k add up to one.
  router_sigmoid: bool = False  # These five: see `moe.Routing`.
  router_groups: int = 1
  router_top_groups: int = 1
  router_best: int = 2
  router_scale: float = 1.0
  router_correction: int = 0  # Axes of the choice's correction in files.
  kv_rank: int = 0  # C of `attention.latent`; 0: no latent attention.
  q_rank: int = 0  # Its queries come from so few numbers; 0: from all.
  rope_dim: int = 0  # P, how many of the H are rotated there.
  v_dim: int = 0  # V, width of its values.
  norm: str = "rms"  # 'rms', or 'layer' with its mean.
  norm_bias: bool = True  # A 'layer' norm has a bias.
  norm_offset: float = 0.0  # Norms multiply by this much more than scale.
  pre_norm: bool = True  # A norm before attention and MLP.
  post_norm: bool = False  # One after each, before the residual is added.
  pre_norm_mixer: str = ""  # Layers of this mixer have the first alone.
  one_part: bool = False  # A layer is its mixer, an MLP or experts alone.
  parallel: bool = False  # The MLP reads what attention reads, its norm too.
  # RMSNorm of q and k before RoPE: 'none', over the H of each 'head', or over
  # 'all' heads at once; 'rotated': of each head, after RoPE.
  qk_norm: str = "none"
  rope_pairs: bool = False  # RoPE turns dimension 2 i with 2 i + 1.
  learned_positions: bool = False  # A vector per position is added.
  scale_embeddings: bool = False  # Times sqrt(D), rounded to the compute dtype.
  embed_scale: float = 1.0  # Embeddings are multiplied by this.
  residual_scale: float = 1.0  # So is what a layer adds to the residual.
  attn_scale: float | None = None  # And scores; None: by H ** -0.5.
  attn_sinks: bool = False  # Each head has a score without a value.
  attn_softcap: float | None = None  # Scores are cap * tanh(x / cap).
  logit_softcap: float | None = None  # Logits likewise.
  logit_divisor: float = 1.0  # Logits are divided by this.
  conv_width: int = 0  # W, inputs that a short convolution sums.
  conv_bias: bool = False  # It has a bias.
  mixer_bias: bool = False  # So have the projections around a recurrence.
  mixer_groups: int = 0  # Heads of q and k of a recurrence.
  mixer_heads: int = 0  # Heads of v, a multiple of them; each has a state.
  mixer_state: int = 0  # Width of q and k.
  mixer_width: int = 0  # Width of v.
  mixer_by_head: bool = False  # Those of q, k, v, z are stored by head.
  mixer_apart: bool = False  # Those of q, k and v are three.
  # Times what the delta rule overwrites; at 2 what a key held may change its
  # sign.
  mixer_beta: float = 1.0
  mixer_norm_eps: float = 0.0  # Of the norm after it; 0: `norm_eps`.
  mixer_least_step: float = 0.0  # Steps of Mamba-2 are at least so long.
  # Attention's output is times sigmoid of a gate, which is stored after each
  # head's query.
  attn_gate: bool = False
  global_kv_heads: int = 0  # K of 'global_attn'.
  global_head_dim: int = 0  # H of it.
  global_k_is_v: bool = False  # Its values are its unnormed, unrotated keys.
  v_norm: bool = False  # RMSNorm of v, of each head, without a scale.
  # Layers have an MLP of `d_ff_dense` beside their experts, each with norms of
  # its own; the router reads the residual through one more, and multiplies what
  # an expert says by a factor of the expert's.
  mlp_beside: bool = False
  wide_mlp: bool = False  # Twice as wide where keys and values are shared.
  per_layer_dim: int = 0  # P, see `block.PerLayer`; 0: none.
  per_layer_vocab: int = 0  # Rows of their table.
  layer_scalar: bool = False  # Each layer's result is times a constant.

  @property
  def conv_channels(self) -> int:
    keys = 2 * self.mixer_groups * self.mixer_state
    return keys + self.mixer_heads * self.mixer_width or self.d_model

  @property
  def out_std(self) -> float:
    """Of fresh weights that add to the residual, as two of each layer do."""
    return self.init_std / (2 * self.num_layers) ** 0.5

  @property
  def kinds(self) -> tuple[LayerKind, ...]:
    """The kinds of attention there are; most models have one."""
    kinds = sum(map(self.kinds_of, ATTENTION), ())
    return kinds or (LayerKind(None, None),)

  def kinds_of(self, mixer: str) -> tuple[LayerKind, ...]:
    found = (kind for kind in self.layers if kind.mixer == mixer)
    return tuple(dict.fromkeys(kind.of_attention for kind in found))

  def kv_shape(self, mixer: str) -> tuple[int, int]:
    """K and H of a mixer that is attention."""
    if mixer == "global_attn":
      return self.global_kv_heads, self.global_head_dim
    return self.num_kv_heads, self.head_dim

  @property
  def sorts(self) -> tuple[tuple[str, ...], ...]:
    """The modules of each layer, which name its parameters: its mixer, and its
    'mlp' or 'moe' or both."""
    wide = ("moe",) if self.num_experts else ("mlp",)
    wide = ("mlp", "moe") if self.mlp_beside else wide

    def modules(kind: LayerKind) -> tuple[str, ...]:
      if self.one_part:
        return (kind.mixer,)
      rest = ("mlp",) if kind.dense else wide
      if not kind.shares:
        return (kind.mixer, *rest)
      wider = "wide_" * self.wide_mlp
      rest = (wider + name if name == "mlp" else name for name in rest)
      return (f"reuse_{kind.mixer}", *rest)

    return tuple(map(modules, self.layers))

  def norms(self, sort: tuple[str, ...]) -> tuple[str, ...]:
    early = sort[0] == self.pre_norm_mixer
    places = [""] * (self.pre_norm or early)
    places += ["post_"] * (self.post_norm and not early)
    parts = ("attn", "mlp")[: len(sort)]
    return tuple(f"{part}_{at}norm" for part in parts for at in places)

  @property
  def period(self) -> int:
    """After how many layers the sorts repeat; `num_layers` if never."""
    sorts, n = self.sorts, self.num_layers
    repeats = (p for p in range(1, n) if n % p == 0)
    return next((p for p in repeats if sorts == sorts[:p] * (n // p)), n)

  def with_vocab(self, size: int) -> "ModelConfig":
    """The same with so many rows for tokens, as its file would say too."""
    rows = self.per_layer_dim and max(size, self.per_layer_vocab)
    raw = self.raw | {"vocab_size": size}
    raw |= {"vocab_size_per_layer_input": rows} if rows else {}
    new = {"vocab_size": size, "per_layer_vocab": rows, "raw": raw}
    return dataclasses.replace(self, **new)

  @property
  def position_limit(self) -> int | None:
    """Most tokens of one document; None where positions have no table."""
    return self.max_positions if self.learned_positions else None


def layers_of(config: ModelConfig) -> dict[str, np.ndarray]:
  """{module that some layers lack: the layers that have it, in its stack's
  order}."""
  found: dict[str, list[int]] = {}
  for i, sort in enumerate(config.sorts):
    for module in (*sort, *config.norms(sort)):
      found.setdefault(module, []).append(i)
  n = config.num_layers
  return {name: np.array(at) for name, at in found.items() if len(at) < n}


def read_config(folder: str | Path) -> ModelConfig:
  """Reads `config.json` of a model folder. Raises ValueError; see parse."""
  path = Path(folder) / "config.json"
  if not path.is_file():
    raise ValueError(
      f"{folder}: no config.json; expected a Hugging Face model folder. "
      "Check the path."
    )
  try:
    raw = json.loads(path.read_text(encoding="utf-8"))
  # Not UTF-8, a number of too many digits, or nested too deep, too.
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{path}: not JSON ({error}); expected a model's config. "
      "Download the file again."
    ) from error
  if not isinstance(raw, dict):
    raise refuse(path, "top level", type(raw).__name__, "a JSON object")
  return parse_config(raw, where=str(path))


def parse_config(raw: Json, *, where: str = "config.json") -> ModelConfig:
  """Turns the dict of a `config.json` into a ModelConfig.

  Reads the form of transformers 5 (`rope_parameters`, `dtype`) and the older
  one (`rope_theta`, `rope_scaling`, `torch_dtype`). Raises ValueError, by name:
  what is not implemented or makes no sense.
  """
  whole, raw = raw.get("model_type"), _text_part(raw, where)
  name = raw.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise refuse(where, "model_type", name, _families_like(name))
  family = FAMILIES[name]
  notes: tuple[str, ...] = ()
  if whole != name:
    notes += (f"the text model of a {whole}; its other parts are left out",)
  if ignored := _check_fields(raw, name, family, where):
    notes += (f"config.json: not read: {', '.join(map(ascii, ignored))}",)
  theirs = FIELDS[name] | raw
  names = family.aliases

  def get(field: str) -> Any:
    own = names.get(field, field)
    value, usual = theirs.get(own), family.defaults.get(field)
    # Some classes read a field by both names, and write either.
    if raw.get(field) is not None and FIELDS[name].get(field) is None:
      value = raw[field]
      if raw.get(own) not in (None, value):
        raise refuse(where, field, value, f"the value of {own}")
    return usual(theirs) if value is None and callable(usual) else value

  def need(field: str) -> int:
    value, most = get(field), _MOST.get(field, 1 << 30)
    if type(value) is not int or not 1 <= value <= most:
      expected = f"a whole number from 1 to {most}"
      raise refuse(where, names.get(field, field), value, expected)
    return value

  d_model, num_heads = need("hidden_size"), need("num_attention_heads")
  derived = family.derived(theirs, where) if family.derived else {}
  if family.latent:
    head_dim = derived["head_dim"]
  elif get("head_dim") is not None or FIELDS[name].get("head_dim") is not None:
    head_dim = need("head_dim")
  elif d_model % num_heads:
    raise refuse(where, "head_dim", None, "a positive integer")
  else:
    head_dim = d_model // num_heads
  turned = derived.get("rope_dim", head_dim)
  if turned % 2:
    name_ = "qk_rope_head_dim" if family.latent else "head_dim"
    raise refuse(where, name_, turned, "an even number, for RoPE")
  num_kv_heads = need("num_key_value_heads")
  if num_heads % num_kv_heads:
    expected = f"a divisor of num_attention_heads={num_heads}"
    raise refuse(where, "num_key_value_heads", num_kv_heads, expected)
  if family.latent and num_kv_heads != num_heads:
    raise refuse(where, "num_key_value_heads", num_kv_heads, num_heads)
  fields = dict(family.traits)
  for field, read in _reads(name).items():
    if derived.keys() >= set(read.into):
      continue
    value = _read(field, read, theirs.get(field), FIELDS[name], where)
    fields |= dict.fromkeys(read.into, value)
  if family.experts:
    fields["num_experts"] = E = need("num_local_experts")
    fields["experts_per_token"] = k = need("num_experts_per_tok")
    if k > E:
      raise refuse(where, "num_experts_per_tok", k, f"at most num_experts={E}")
  num_layers = need("num_hidden_layers")
  if family.dense:
    fields["d_ff_dense"] = theirs["intermediate_size"]
  recurrent = fields | derived
  groups, heads = (recurrent.get(f"mixer_{x}") for x in ("groups", "heads"))
  if groups and heads % groups:
    expected = f"a multiple of the {groups} of queries and keys"
    raise refuse(where, "heads of values", heads, expected)
  tied = derived.pop("tie_embeddings", get("tie_word_embeddings"))
  if not isinstance(tied, bool):
    raise refuse(where, "tie_word_embeddings", tied, "true or false")
  eps = names.get("rms_norm_eps", "rms_norm_eps")
  init_std = "initializer_range"
  return ModelConfig(
    family=name,
    vocab_size=need("vocab_size"),
    num_layers=num_layers,
    d_model=d_model,
    d_ff=derived.pop("d_ff", need("intermediate_size")),
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=derived.pop("head_dim", head_dim),
    max_positions=need("max_position_embeddings"),
    norm_eps=positive(where, eps, theirs.get(eps)),
    tie_embeddings=tied,
    layers=_layer_kinds(raw, name, family, num_layers, turned, where),
    init_std=positive(where, init_std, theirs.get(init_std)),
    raw=dict(raw),
    part_of="" if whole == name else str(whole),
    notes=notes,
    **(fields | derived),
  )


def _families_like(name: Any) -> str:
  """Names of families, the likest to a wrong one."""
  known = FAMILIES.keys() | MULTIMODAL.keys()
  likest = difflib.get_close_matches(str(name)[:40], sorted(known), 6, 0.0)
  return f"one of the {len(known)} in docs/models.md, such as {likest}"


def _text_part(raw: Json, where: str) -> Json:
  """The config of the text model in a multimodal one.

      {"model_type": "gemma3", "text_config": {"hidden_size": 2560, ..}, ..}
        -> {"model_type": "gemma3_text", "hidden_size": 2560, ..}

  The first files of Qwen-VL hold the text model's fields at the top.
  """
  whole = raw.get("model_type")
  if not isinstance(whole, str) or whole not in MULTIMODAL:
    return raw
  types, text = MULTIMODAL[whole], raw.get("text_config", raw)
  if not isinstance(text, Mapping):
    raise refuse(where, "text_config", text, "an object")
  inner = text.get("model_type", whole) if text is not raw else whole
  inner = next(iter(types)) if inner == whole else inner
  if not isinstance(inner, str) or inner not in types:
    expected = f"one of {sorted(types)}"
    raise refuse(where, "text_config.model_type", inner, expected)
  other = ("vision", "image", "video", "audio", "text_config", "mm_tokens")
  # What the whole says of the text model as well.
  shared = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype")
  shared += ("dtype", "tie_word_embeddings", "quantization_config")
  top = {key: raw[key] for key in shared if raw.get(key) is not None}
  text = {k: v for k, v in text.items() if not str(k).startswith(other)}
  architecture = FAMILIES[types[inner]].architecture
  made = {"model_type": types[inner], "architectures": [architecture]}
  return top | text | made


def _reads(name: str) -> dict[str, Read]:
  found = {k: read for k, read in READS.items() if k in FIELDS[name]}
  found = found | dict(FAMILIES[name].reads)
  return {field: read for field, read in found.items() if read}


def _read(field: str, read: Read, value: Any, usual: Json, where: str) -> Any:
  """A field of the file as the value of a field of ModelConfig."""
  if isinstance(read.via, Mapping):
    value = usual.get(field) if value is None else value
    if not isinstance(value, str) or value not in read.via:
      raise refuse(where, field, value, f"one of {list(read.via)}")
    return read.via[value]
  if isinstance(usual.get(field), bool):
    if not isinstance(value, bool | None):
      raise refuse(where, field, value, "true or false")
    return read.via(value) if read.via else bool(value)
  if read.via is int:
    return whole_number(where, field, value)
  if value is None:
    return None
  value = positive(where, field, value)
  return read.via(value) if read.via else value


def _layer_kinds(
  raw: Json, name: str, family: Family, n: int, head_dim: int, where: str
) -> tuple[LayerKind, ...]:
  if family.traits.get("learned_positions"):
    for field in ("rope_parameters", "rope_theta", "rope_scaling"):
      if raw.get(field) is not None:
        raise refuse(where, field, raw[field], "none: positions are learned")
    return (LayerKind(None, None),) * n
  ropes = parse_ropes(raw, family, head_dim, where)
  raw = FIELDS[name] | raw
  for field in ("sliding_window", "sliding_window_pattern", _LAST):
    value = raw.get(field)
    # No layer has a window where the first is 0 or the last beyond the end.
    least = 0 if field == _LAST else 1
    named = "layer_types" in FIELDS[name] and raw.get("layer_types")
    if field == "sliding_window_pattern" and named:
      continue  # They say it themselves.
    if value is not None and (type(value) is not int or value < least):
      raise refuse(where, field, value, f"a whole number from {least} on")
  types: Any = raw.get("layer_types")
  given = types
  if given is None or "layer_types" not in FIELDS[name]:
    types = family.layer_types(raw, n) if family.layer_types else [FULL] * n
    if given not in (None, types):
      raise refuse(where, "layer_types", given, types[:4])
  right = isinstance(types, list) and len(types) == n
  if right := right and all(isinstance(kind, str) for kind in types):
    types = [_OLD_TYPES.get(kind, kind) for kind in types]
  mixers = {FULL: "attn", **(family.mixers or {SLIDING: "attn"})}
  if not right or any(kind not in mixers for kind in types):
    raise refuse(where, "layer_types", types, f"{n} of {', '.join(mixers)}")
  window = raw.get("sliding_window")
  if "use_sliding_window" in FIELDS[name]:
    window = window if raw.get("use_sliding_window") else None
    if window is None and SLIDING in types:
      raise refuse(where, "layer_types", SLIDING, "a sliding_window in use")
  rotated = family.rotated(raw, types, where) if family.rotated else [True] * n
  dense = family.dense(raw, n, where) if family.dense else [False] * n
  if all(dense):
    raise refuse(where, "layers with experts", 0, "one or more")
  late = family.traits.get("qk_norm") == "rotated"
  # A cache of such a rope holds keys as they were before it.
  if (late or family.latent) and ropes[FULL].by_length:
    raise refuse(where, "rope_parameters", ropes[FULL].type, "a fixed one")
  known = "num_kv_shared_layers" in FIELDS[name]  # And `derived` checked it.
  own = n - raw["num_kv_shared_layers"] if known else n
  shares = [False] * own + [True] * (n - own)
  windows = [window if kind == SLIDING else None for kind in types]
  by = [
    ropes.get(kind) if use else None
    for kind, use in zip(types, rotated, strict=True)
  ]
  columns = (windows, by, dense, [mixers[kind] for kind in types], shares)
  return tuple(map(LayerKind, *columns))


_LAST = "max_window_layers"
# As files of transformers 4 name them.
_OLD_TYPES = {"attention": FULL, "mamba": LINEAR}


# Fields that are read where a family has them.
_USED = words("""
  model_type architectures vocab_size num_hidden_layers hidden_size
  intermediate_size num_attention_heads head_dim num_key_value_heads
  max_position_embeddings rms_norm_eps rope_parameters rope_theta rope_scaling
  tie_word_embeddings initializer_range layer_types quantization_config""")

# Fields that are read in families whose class has them.
_LAYERS = words("""
  num_local_experts num_experts_per_tok sliding_window use_sliding_window
  no_rope_layers no_rope_layer_interval mlp_only_layers decoder_sparse_step""")

# Bookkeeping of transformers: nothing here changes what the network computes.
# The balance loss is a matter of pretraining; see `moe`.
_HARMLESS = words("""
  bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
  dtype torch_dtype use_cache transformers_version _name_or_path name_or_path
  id2label label2id num_labels problem_type finetuning_task
  task_specific_params tokenizer_class prefix return_dict output_attentions
  output_hidden_states chunk_size_feed_forward _attn_implementation
  _attn_implementation_autoset torchscript pretraining_tp max_window_layers
  cache_implementation tf_legacy_loss use_bfloat16 _commit_hash license
  cross_attention_hidden_size tie_encoder_decoder is_decoder
  output_router_logits router_aux_loss_coef""")

# Fields that transformers gives meaning to in any family, accepted like this.
_ANYWHERE: Json = {
  **{"partial_rotary_factor": 1, "is_encoder_decoder": False},
  **{"add_cross_attention": False, "pruned_heads": {}},
  "per_layer_config": {},
}


def _check_fields(
  raw: Json, name: str, family: Family, where: str
) -> list[str]:
  """Refuses what would change the computation and is not implemented. Returns
  the unknown fields, which transformers does not read either; `auto_map`, code
  beside the weights that is never run, is one of them."""
  wanted = family.architecture
  if raw.get("architectures") not in (None, [], [wanted]):
    raise refuse(where, "architectures", raw["architectures"], [wanted])
  usual = FIELDS[name]
  known = _HARMLESS | family.harmless | family.rope_fields | {*_reads(name)}
  known = {*known, *family.aliases.values(), family.local_rope}
  known |= _USED | (_LAYERS & usual.keys())
  known |= {"num_local_experts"} if family.experts else set()
  for field, value in (_ANYWHERE | usual).items():
    got = raw.get(field)
    if got is not None and field not in known and (got or 0) != (value or 0):
      raise refuse(where, field, got, f"{value!r}, as it is by default")
  known |= _ANYWHERE.keys() | usual.keys()
  return [k for k, v in raw.items() if k not in known and v is not None]


def config_from_fields(
  family: str,
  *,
  vocab_size: int,
  num_layers: int,
  d_model: int,
  d_ff: int,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  max_positions: int,
  rope_theta: float = 10_000.0,
  tie_embeddings: bool = True,
  init_std: float | None = None,
  bos_token_id: int | None = None,
  eos_token_id: int | list[int] | None = None,
) -> ModelConfig:
  """A config for a model that starts from random weights.

  `init_std` defaults to sqrt(2 / 5D), the "small init" of Nguyen and Salazar
  (2019, "Transformers without Tears"): 0.02 at D = 1024, more when narrower.
  The rest is as transformers has it for the family.
  """
  if family not in FAMILIES:
    raise refuse("config", "family", family, _families_like(family))
  traits = FAMILIES[family]
  rope = {"rope_theta": rope_theta, "rope_type": "default"}
  raw: Json = {
    "architectures": [traits.architecture],
    "model_type": family,
    "vocab_size": vocab_size,
    "num_hidden_layers": num_layers,
    "hidden_size": d_model,
    "intermediate_size": d_ff,
    "num_attention_heads": num_heads,
    "num_key_value_heads": num_kv_heads,
    "head_dim": head_dim,
    "max_position_embeddings": max_positions,
    "rms_norm_eps": 1e-6,
    "rope_parameters": rope,
    "tie_word_embeddings": tie_embeddings,
    "initializer_range": init_std or math.sqrt(2 / (5 * d_model)),
    "bos_token_id": bos_token_id,
    "eos_token_id": eos_token_id,
    "dtype": "float32",
  }
  if traits.traits.get("learned_positions"):
    del raw["rope_parameters"]
  elif traits.local_rope:
    raw["rope_parameters"] = dict.fromkeys((FULL, SLIDING), rope)
  raw = {traits.aliases.get(name, name): x for name, x in raw.items()}
  raw |= {name: FIELDS[family].get(name) for name in _reads(family)}
  return parse_config(raw)
