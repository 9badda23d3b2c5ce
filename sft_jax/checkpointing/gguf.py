"""A model folder as one GGUF file, which llama.cpp and Ollama load.

The file's format is written by the package `gguf` (the extra `[gguf]`); what
llama.cpp makes of it is fixed by the name of an architecture. So what that
architecture cannot say is refused by name: a window, a rope or a pre-tokenizer
that it would leave out is another model.
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft_jax.data.chat import loss_spans
from sft_jax.data.chat import template as templates
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, Message
from sft_jax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from sft_jax.models import rope
from sft_jax.models.config import ModelConfig, read_config
from sft_jax.models.hf import load_save

# Of matrices, and what llama.cpp calls a file of them; both end alike.
DTYPES = {
  **{"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
}


class _Arch(NamedTuple):
  """What llama.cpp calls a family.

  Attributes:
    name: of the architecture.
    turns_pairs: it rotates dimension 2 i with 2 i + 1, so that rows of q and k
      are sorted for it.
    norm_offset: its norms multiply by what stands in the file.
    full_each: every so-many-th layer has no window (gemma3), or no rope
      (smollm3); 0: all layers are alike.
  """

  name: str
  turns_pairs: bool = False
  norm_offset: float = 0.0
  full_each: int = 0


ARCHITECTURES = {
  "llama": _Arch("LLAMA", turns_pairs=True),
  "mistral": _Arch("LLAMA", turns_pairs=True),
  "qwen2": _Arch("QWEN2"),
  "qwen3": _Arch("QWEN3"),
  "smollm3": _Arch("SMOLLM3", turns_pairs=True, full_each=4),
  "gemma3_text": _Arch("GEMMA3", norm_offset=1.0, full_each=6),
}

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pre-tokenizers by the expression that splits words, and whether a word that
# is a token is taken whole.
_SPLITS = {
  (_LETTERS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
  (_LETTERS + r"\p{N}" + _REST, False): "qwen2",
}


def write(
  folder: str | Path, path: str | Path, *, dtype: str = "bfloat16"
) -> list[str]:
  """Writes the model, tokenizer, template and stop ids of a folder.

  Args:
    folder: a Hugging Face folder, such as a run's export.
    path: the file; one that is there is replaced.
    dtype: of matrices. In 'q8_0' 32 weights share a scale; a matrix whose
      rows 32 does not divide stays in float32, as vectors do.

  Returns:
    The tensors that q8_0 could not hold.

  Raises:
    ValueError: a family, a rope, a window or a tokenizer that llama.cpp does
      not have; an unknown dtype; no package `gguf`.
  """
  gguf = _package()
  folder, path = Path(folder), Path(path)
  if dtype not in DTYPES:
    raise _refuse(folder, "dtype", dtype, f"one of {[*DTYPES]}")
  config, tokenizer = read_config(folder), load_tokenizer(folder)
  arch = _check(folder, config)
  kind = gguf.MODEL_ARCH[arch.name]
  writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
  c, first = config, config.layers[0].rope
  assert first is not None
  writer.add_name(folder.resolve().name)
  writer.add_vocab_size(c.vocab_size)
  writer.add_context_length(c.max_positions)
  writer.add_embedding_length(c.d_model)
  writer.add_block_count(c.num_layers)
  writer.add_feed_forward_length(c.d_ff)
  writer.add_head_count(c.num_heads)
  writer.add_head_count_kv(c.num_kv_heads)
  writer.add_key_length(c.head_dim)
  writer.add_value_length(c.head_dim)
  writer.add_layer_norm_rms_eps(c.norm_eps)
  writer.add_rope_dimension_count(c.head_dim)
  ropes = [kind.rope for kind in c.layers if kind.window is None and kind.rope]
  writer.add_rope_freq_base(ropes[0].theta)
  if ropes[0].type == "linear":
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(ropes[0].factor)
  for window in {kind.window for kind in c.layers if kind.window}:
    writer.add_sliding_window(window)
  _add_tokens(gguf, writer, folder, tokenizer, c.vocab_size)
  file_type = DTYPES[dtype]
  quantized = gguf.GGMLQuantizationType[file_type.split("_", 1)[1]]
  writer.add_file_type(gguf.LlamaFileType[file_type])
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  wide = []
  names = gguf.get_tensor_name_map(kind, c.num_layers)
  for name, x in tensors(folder, config):
    theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if theirs is None:
      raise _refuse(folder, "tensor", name, f"one of a {arch.name}")
    own = gguf.GGMLQuantizationType.F32 if x.ndim == 1 else quantized
    if own == gguf.GGMLQuantizationType.Q8_0 and x.shape[-1] % 32:
      own = gguf.GGMLQuantizationType.F32
      wide.append(name)
    writer.add_tensor(theirs, gguf.quants.quantize(x, own), raw_dtype=own)
  if ropes[0].type == "llama3":
    plain = rope.frequencies(rope.Rope(ropes[0].theta), c.head_dim)
    stretch = plain / rope.frequencies(ropes[0], c.head_dim)
    writer.add_tensor("rope_freqs.weight", stretch.astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return wide


def tensors(
  folder: Path, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
  """(official name, float32 array) as llama.cpp's architecture reads it."""
  arch = ARCHITECTURES[config.family]
  for name, tensor in load_save.model_tensors(folder).items():
    x = tensor.read().astype(np.float32)
    for ending, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
      if arch.turns_pairs and f".self_attn.{ending}_proj." in name:
        halves = x.reshape(heads, 2, config.head_dim // 2, -1)
        x = halves.swapaxes(1, 2).reshape(x.shape)
    if arch.norm_offset and "norm" in name:
      x = x + np.float32(arch.norm_offset)
    if name == "lm_head.weight" and config.tie_embeddings:
      continue
    yield name, x


def _check(folder: Path, config: ModelConfig) -> _Arch:
  """What llama.cpp calls the model. Raises ValueError: it has no such one."""
  c = config
  if c.family not in ARCHITECTURES:
    raise _refuse(folder, "model_type", c.family, f"one of {[*ARCHITECTURES]}")
  arch = ARCHITECTURES[c.family]
  period = arch.full_each
  for i, (window, by, *_) in enumerate(c.layers):
    full = not period or (i + 1) % period == 0
    if c.family == "gemma3_text":
      right = (window is None) == full and by is not None
      right &= full or by == rope.Rope(10_000.0)
    else:
      right = window is None and (by is None) == bool(period and full)
    if not right or (by and by.type not in ("default", "linear", "llama3")):
      raise _refuse(folder, f"layer {i}", (window, by), f"that of {arch.name}")
  if len({kind.rope for kind in c.layers if kind.window is None} - {None}) != 1:
    raise _refuse(folder, "rope_parameters", "several", "one")
  if c.attn_scale not in (None, c.head_dim**-0.5) or c.attn_softcap:
    raise _refuse(folder, "query_pre_attn_scalar", c.attn_scale, c.head_dim)
  if c.mlp_bias or c.logit_softcap:
    raise _refuse(folder, "mlp_bias, final_logit_softcapping", "set", "neither")
  return arch


def _add_tokens(
  gguf: Any, writer: Any, folder: Path, tokenizer: Tokenizer, rows: int
) -> None:
  """The vocabulary, its special tokens, stop ids and template."""
  file = folder / "tokenizer.json"
  if not file.is_file():
    raise _refuse(folder, "tokenizer.json", None, "a fast tokenizer's file")
  read = json.loads(file.read_text(encoding="utf-8"))
  model = read["model"]
  merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  texts = {i: text for text, i in model["vocab"].items()}
  kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL)
  spoken = model.get("byte_fallback", False)
  if spoken:
    # Pieces that are joined earlier have the higher score.
    rank = {m.replace(" ", "", 1): n for n, m in reversed([*enumerate(merges)])}
    scores = [-float(rank.get(texts.get(i, ""), 0)) for i in range(rows)]
    for i, text in texts.items():
      if text.startswith("<0x") and len(text) == 6:
        kinds[i] = gguf.TokenType.BYTE
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    prepends = '"Prepend"' in json.dumps(read.get("normalizer"))
    writer.add_bool("tokenizer.ggml.add_space_prefix", prepends)
  else:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(folder, read))
    writer.add_token_merges(merges)
  for token in read["added_tokens"]:
    own = gguf.TokenType.CONTROL if token["special"] else None
    texts[token["id"]] = token["content"]
    kinds[token["id"]] = own or gguf.TokenType.USER_DEFINED
  if model.get("unk_token") in model["vocab"]:
    kinds[model["vocab"][model["unk_token"]]] = gguf.TokenType.UNKNOWN
  unused = gguf.TokenType.UNUSED
  writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(rows)])
  writer.add_token_types([kinds.get(i, unused) for i in range(rows)])
  stops = list(tokenizer.stop_ids)
  if tokenizer.eos_id in stops:  # The first one is what tools call the end.
    stops.sort(key=lambda i: i != tokenizer.eos_id)
  if not 1 <= len(stops) <= 3:
    raise _refuse(folder, "eos_token_id", stops, "one to three stop ids")
  adders = (
    writer.add_eos_token_id,
    writer.add_eot_token_id,
    writer.add_eom_token_id,
  )
  for add, stop in zip(adders, stops, strict=False):
    add(stop)
  if tokenizer.bos_id is not None:
    writer.add_bos_token_id(tokenizer.bos_id)
  # Templates write it themselves.
  writer.add_add_bos_token(False)
  if tokenizer.chat_template:
    writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(folder: Path, read: dict[str, Any]) -> str:
  """llama.cpp's name of what splits the words. Raises ValueError: none."""
  pre = read["pre_tokenizer"] or {}
  parts = pre.get("pretokenizers", [pre])
  whole = bool(read["model"].get("ignore_merges"))
  by = [part["type"] for part in parts]
  if by == ["ByteLevel"] and parts[0].get("use_regex", True):
    if not parts[0]["add_prefix_space"] and not whole:
      return "gpt-2"
  elif by == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
    if parts[1].get("use_regex", True) and not whole:
      return "smollm"
  elif by == ["Split", "ByteLevel"]:
    found = _SPLITS.get((parts[0]["pattern"].get("Regex", ""), whole))
    if found and not parts[1].get("use_regex", True):
      return found
  expected = "that of GPT-2, Llama 3, Qwen or SmolLM"
  raise _refuse(folder / "tokenizer.json", "pre_tokenizer", by, expected)


def modelfile(
  file: str, tokenizer: Tokenizer, config: ModelConfig, options: RenderOptions
) -> str:
  """An Ollama Modelfile: the template in Ollama's language, and every stop.

  Ollama reads no Jinja: its template is what ours makes of a first turn, with
  and without a system message.

  Raises:
    ValueError: a template that takes no system message, or goes on otherwise
      after the user's text with one.
  """
  system, user = "7system7", "7user7"

  def render(*turns: tuple[str, str]) -> str:
    messages = tuple(Message(role, text) for role, text in turns)
    template = templates.chat_template(tokenizer)
    return loss_spans.prompt(Conversation(messages), template, options).text

  before, _, after = render(("user", user)).partition(user)
  whole = render(("system", system), ("user", user))
  start, _, rest = whole.partition(system)
  middle, _, end = rest.partition(user)
  if end != after or not rest:
    raise ValueError(
      f"Modelfile: the chat template writes {whole!r} with a system message "
      f"and {before + user + after!r} without; expected the same after the "
      "user's text. Write its TEMPLATE by hand."
    )
  texts = {i: text for text, i in tokenizer.special_tokens.items()}
  stops = [texts[i] for i in tokenizer.stop_ids]
  lines = [
    f"FROM ./{file}",
    'TEMPLATE """{{ if .System }}'
    + f"{start}{{{{ .System }}}}{middle}{{{{ else }}}}{before}{{{{ end }}}}"
    + f'{{{{ .Prompt }}}}{after}{{{{ .Response }}}}"""',
    *(f'PARAMETER stop "{stop}"' for stop in stops),
    f"PARAMETER num_ctx {config.max_positions}",
  ]
  return "\n".join(lines) + "\n"


def _package() -> Any:
  try:
    return importlib.import_module("gguf")
  except ImportError as error:
    raise ValueError(
      "gguf: the package gguf is not installed; expected it. Install "
      "sft_jax[gguf]."
    ) from error


def _refuse(where: Any, name: str, got: Any, expected: Any) -> ValueError:
  return ValueError(
    f"{where}: {name} is {got!r} for GGUF; expected {expected}. Serve the "
    "folder itself with vLLM, SGLang or transformers."
  )
