"""A tiny pretrained model folder and rows, made where they are needed."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import tiny_tokenizers
from configs import base
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models import transformer
from sft_jax.models.config import config_from_fields, parse_config
from sft_jax.models.hf import load_save
from sft_jax.step.loss import GroupSums, LossSums

SHAPE = {
  "architectures": ["Qwen3ForCausalLM"],
  "model_type": "qwen3",
  "vocab_size": 400,
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "hidden_act": "silu",
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0,
  "tie_word_embeddings": True,
  "torch_dtype": "float32",
}
# The least that a model can be.
SPECK = config_from_fields(
  "qwen3",
  vocab_size=31,
  num_layers=1,
  d_model=16,
  d_ff=16,
  num_heads=1,
  num_kv_heads=1,
  head_dim=8,
  max_positions=128,
  init_std=0.3,
)
# 16 questions whose answers nothing but training can give.
WORDS = (
  *("cat", "dog", "hat", "mat", "log", "fog", "hen", "pen"),
  *("sun", "bun", "cup", "pup", "jam", "ham", "net", "pet"),
)
ROWS = [
  {"instruction": f"What goes with {word}?", "output": f"The {other} {word}."}
  for word, other in zip(WORDS, reversed(WORDS), strict=True)
]


def model_folder(folder: Path, shape=SHAPE) -> Path:
  """Writes random weights, a tokenizer and a chat template."""
  made = Path(_made(json.dumps(shape)).name) / "model"
  return Path(shutil.copytree(made, folder, dirs_exist_ok=True))


@functools.cache  # To compile and write it is a second, to copy it is none.
def _made(shape: str) -> tempfile.TemporaryDirectory:
  made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
  tokens = tiny_tokenizers.byte_level(Path(made.name) / "tokenizer")
  model = transformer.build(parse_config(json.loads(shape)))
  params = jax.jit(model.init)(jax.random.key(0))
  load_save.save_pretrained(
    Path(made.name) / "model", model, params, load_tokenizer(tokens)
  )
  return made


def rows_file(path: Path, rows=None) -> Path:
  """Writes rows as jsonl."""
  rows = ROWS if rows is None else rows
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def config(folder: Path, model: Path, train: Path, **changes):
  """The base config on the tiny model, with changes as 'data__eval' keys."""
  config = base.get_config()
  small = {
    "workdir": str(folder / "run"),
    "compile_cache": "",  # The user's is no test's business.
    "steps": 6,
    "batch_size": 8,
    "selfcheck": "off",  # It compiles three programs.
    "model__path": str(model),
    "data__train": str(train),
    "data__holdout": 0.0,
    "data__seq_len": 64,
    "optim__warmup_steps": 2,
    "eval__behaviors": "",
    "eval__knowledge": "",
    "eval__general_text": "",
    "eval__samples": 0,
    "checkpoint__every": 2,
    "log__every": 1,
  }
  for key, value in (small | changes).items():
    room, _, name = key.rpartition("__")
    setattr(config[room] if room else config, name, value)
  return config


def loss_sums(nats, weight) -> LossSums:
  """Of a loss that knows no more than these."""
  none, empty = jnp.zeros(()), jnp.zeros(0)
  groups = GroupSums(empty, empty, empty)
  return LossSums(nats, nats, weight, none, none, groups)
