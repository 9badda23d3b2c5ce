"""Tokens per second, MFU and memory on one GPU, beside the best PyTorch.

    python tools/bench/bench_gpu.py [--torch_python=PYTHON] [--models 0.5B 8B]
    python tools/bench/bench_gpu.py --tiny      the same on a CPU, in small
    tools/bench/gpu_table.sh OUT.jsonl          what is claimed, in 9 minutes

Random weights in the shapes of Qwen3-0.6B, Llama-3.2-1B, Llama-3.1-8B and more,
full and (8B) with LoRA of rank 16 on every projection; rows of 4,096 tokens
packed with documents of 184 tokens, as GSM8K has, or of 4,096; bfloat16. The
last 60 % of each document are trained, about GSM8K's share. Each case is a
process, ours and the rival's (`bench_gpu_torch.py`: transformers, compiled,
peft) in turn, with the most rows of `--rows` that fit in memory.

MFU is honest: `fit.model_flops_per_token`, causal and within documents, no
recomputation, over the chip's published peak. The ceiling is a bound of the
same card from its measured rates, see CEILING.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from configs import base
from sft_jax.commands import command
from sft_jax.common import flops as fit
from sft_jax.common import sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.data.packing import plan
from sft_jax.models.attention import attention, fastest
from sft_jax.models.config import parse_config
from sft_jax.step.train_step import init_state, split_micro_batches
from sft_jax.training.build import abstract
from sft_jax.training.build import state as setup_state
from sft_jax.training.build.model import build_model

_LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 128_256,
  "hidden_act": "silu",
  "max_position_embeddings": 8192,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500_000.0,
}
# The shapes, as the published config.json of each model has them.
MODELS: dict[str, dict[str, Any]] = {
  "0.5B": {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
  },
  "1B": _LLAMA
  | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
  },
  "8B": _LLAMA
  | {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
  },
}
TINY = {
  "vocab_size": 512,
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
}
MODELS["0.6B"] = MODELS["0.5B"] | {
  "architectures": ["Qwen3ForCausalLM"],
  "model_type": "qwen3",
  "hidden_size": 1024,
  "intermediate_size": 3072,
  "num_hidden_layers": 28,
  "num_attention_heads": 16,
  "num_key_value_heads": 8,
  "head_dim": 128,
}
# Tokens/s that one H200 cannot exceed, documents of 512 and of 4,096: matrix
# products at 790 TFLOP/s, bytes at 4.1 TB/s, nothing overlapping. Derived in
# the project's performance notes, section 6.1, +-10 %.
CEILING = {
  ("0.5B", "full"): (191_000, 156_000),
  ("1B", "full"): (88_900, 76_700),
  ("8B", "full"): (15_900, 14_600),
  ("8B", "lora"): (23_300, 20_700),
}
# What to ship and what to be proud of, tokens/s (issue 5).
TARGETS = {
  ("0.5B", "full"): (143_000, 162_000),
  ("0.6B", "full"): (90_000, 90_000),
  ("1B", "full"): (64_000, 73_000),
  ("8B", "full"): (11_000, 12_400),
  ("8B", "lora"): (15_500, 17_600),
}
TRAINED = 0.6
_SHORTEST = 20  # Seconds in which a case can still be tried.


class Case(NamedTuple):
  """One line of the table."""

  model: str
  method: str
  document: int
  seq_len: int
  rows: int
  steps: int
  tiny: bool

  def hf_config(self) -> dict[str, Any]:
    """What config.json would say."""
    return MODELS[self.model] | (TINY if self.tiny else {})


def batch_of(case: Case) -> tuple[Batch, np.ndarray]:
  """Packed rows of documents of nearly one length; their lengths."""
  vocabulary = case.hf_config()["vocab_size"]
  rng = np.random.default_rng(0)
  B, T = case.rows, case.seq_len
  # Some shorter, some longer: whole rows of equal ones would pack too well.
  low, high = max(2, case.document * 2 // 3), case.document * 4 // 3
  number = 2 * B * T // case.document + B
  lengths = np.minimum(rng.integers(low, high + 1, number), T)
  if case.document == T:
    lengths = np.full(B, T)
  packs = plan(lengths, T, seed=0)
  fill = np.add.reduceat(lengths[packs.rows], packs.starts[:-1])
  fullest = np.argsort(-fill, kind="stable")[:B]  # The last may be half empty.
  zeros = lambda dtype: np.zeros((B, T), dtype)
  batch = Batch(
    tokens=rng.integers(0, vocabulary, (B, T)).astype(np.int32),
    targets=zeros(np.int32),
    loss_weights=zeros(np.float32),
    segment_ids=zeros(np.int32),
    positions=zeros(np.int32),
  )
  used = []
  for row, pack in enumerate(fullest):
    at = 0
    members = packs.rows[packs.starts[pack] : packs.starts[pack + 1]]
    for segment, length in enumerate(lengths[members], 1):
      here = slice(at, at + length)
      batch.segment_ids[row, here] = segment
      batch.positions[row, here] = np.arange(length)
      batch.targets[row, at : at + length - 1] = batch.tokens[row, here][1:]
      first = at + int((1 - TRAINED) * length)
      batch.loss_weights[row, first : at + length - 1] = 1
      at += length
      used.append(length)
  return batch, np.array(used)


def make_config(case: Case) -> Any:
  """The run's config; what a key stands for is in configs/base.py."""
  config = cast(Any, base.get_config())
  config.steps = 1000
  config.batch_size, config.data.seq_len = case.rows, case.seq_len
  config.model.dtype = "bfloat16"
  config.optim.learning_rate = 1e-5
  config.loss.chunk_tokens = 64 if case.tiny else 4096
  if case.method == "lora":
    config.lora.rank = 16
    config.model.param_dtype = "bfloat16"
  if case.model == "8B" and case.method == "full":
    # 8 B parameters, gradients and two moments are 128 GB in float32.
    config.model.param_dtype = "bfloat16"
    config.optim.rounding = "stochastic"
    config.optim.mu_dtype = config.optim.nu_dtype = "bfloat16"
  return config


def ours(case: Case, overrides: dict[str, Any]) -> dict[str, Any]:
  """Times the step that a run takes, on the first device."""
  config = make_config(case)
  config.update_from_flattened_dict(overrides)
  shape = parse_config(case.hf_config())
  mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[:1])
  batch, lengths = batch_of(case)
  outline = abstract.outline(config, shape, mesh)
  rows = sharding.put_rows(
    split_micro_batches(batch, 1), sharding.row_sharding(mesh, leading_axes=1)
  )
  step = jax.jit(outline.step.train_step, donate_argnums=0)
  started = time.perf_counter()
  compiled = step.lower(outline.state, rows).compile()
  compile_s = time.perf_counter() - started
  model = build_model(config, shape, mesh)

  def start(key: jax.Array) -> Any:
    params = model.init(key)
    return init_state(params, outline.step.trained, outline.step.tx)

  lies = jax.tree.map(lambda x: x.sharding, outline.state)
  state = jax.jit(start, out_shardings=lies)(jax.random.key(0))
  for _ in range(2):
    state, metrics = compiled(state, rows)
  jax.block_until_ready(state)
  started = time.perf_counter()
  for _ in range(case.steps):
    state, metrics = compiled(state, rows)
  jax.block_until_ready(state)
  seconds = time.perf_counter() - started
  device = jax.devices()[0]
  params = trees.merge(state.params, state.frozen)
  flops = setup_state.flops_per_token(
    outline.step, outline.model, params, lengths.tolist()
  )
  tokens = int(lengths.sum()) * case.steps / seconds
  nats, weight = metrics["loss/nats_per_token"]
  stats, planned = device.memory_stats() or {}, fit.program(compiled).memory
  return {
    "tokens_per_s": tokens,
    "flops_per_token": flops,
    "mfu": fit.mfu(
      tokens, flops, num_devices=1, chip=fit.chip(device.device_kind)
    ),
    "memory": stats.get("peak_bytes_in_use", planned),
    "planned": planned,
    "attention": attention.choose(
      model.choices["attention"], case.seq_len, in_order=True, mesh=mesh
    ),
    "loss": float(nats / weight),
    "compile_s": compile_s,
    "device": device.device_kind,
    "versions": f"jax {jax.__version__}",
  }


def given(case: Case) -> dict[str, Any]:
  """What a side needs to know: the case and, for the rival, its batch."""
  batch, lengths = batch_of(case)
  labels = np.where(batch.loss_weights > 0, batch.targets, -100)
  return case._asdict() | {
    "hf_config": case.hf_config(),
    "tokens": int(lengths.sum()),
    "batch": {
      "tokens": batch.tokens.tolist(),
      "positions": batch.positions.tolist(),
      "labels": labels.tolist(),
    },
  }


def laws(case: Case) -> dict[str, Any]:
  """What each attention takes on this device, or why it is out."""
  c = parse_config(case.hf_config())
  heads = (c.num_heads, c.num_kv_heads, c.head_dim)
  shape = fastest.Shape(1, case.seq_len, *heads)
  device = jax.devices()[0].device_kind
  return fastest.fastest(shape, device)._asdict() | {"device": device}


def in_process(
  command_: list[str], case: Case, until: float
) -> dict[str, Any] | str:
  """A child's report, or the last line it had to say."""
  if (left := until - time.time()) < _SHORTEST:
    return "out of time"
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "case.json"
    file.write_text(json.dumps(given(case)))
    try:
      child = subprocess.run(
        [*command_, str(file)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        # Memory is asked for as it is needed, so that the peak is the need.
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        timeout=left if math.isfinite(left) else None,
      )
    except subprocess.TimeoutExpired:
      return "out of time"
  for line in child.stdout.splitlines():
    if line.startswith("BENCH "):
      return json.loads(line.removeprefix("BENCH "))
  lines = child.stderr.strip().splitlines() or ["no report"]
  told = [x for x in lines if "Error" in x or "RESOURCE_EXHAUSTED" in x]
  return (told or lines)[-1][:200]


def with_most_rows(
  command_: list[str], case: Case, rows: list[int], until: float
) -> tuple[Case, dict[str, Any] | str]:
  """The report with the first number of rows that fits in memory."""
  found: dict[str, Any] | str = "no number of rows"
  for number in rows:
    case = case._replace(rows=number)
    found = in_process(command_, case, until)
    memory = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")
    if not (isinstance(found, str) and any(x in found for x in memory)):
      break
  return case, found


def line(name: str, case: Case, found: dict[str, Any] | str) -> str:
  what = f"{name:8} {case.model:5} {case.method:5} {case.document:6,}"
  if isinstance(found, str):
    return f"{what}  failed: {found}"
  tokens, mfu = found["tokens_per_s"], found.get("mfu")
  parts = [
    f"{what} {case.rows:3} rows {tokens:10,.0f} tokens/s",
    *([f"MFU {mfu:.1%}"] if mfu is not None else []),
    f"{found['memory'] / 1e9:.2f} GB",
    found["attention"],
    f"loss {found['loss']:.3f}",
  ]
  key = (case.model, case.method)
  if not case.tiny:
    ship, proud = TARGETS[key]
    if key in CEILING:
      ceiling = CEILING[key][case.document > 1024]
      parts.append(f"{tokens / ceiling:.0%} of the ceiling")
    parts.append(f"{tokens / ship:.2f} / {tokens / proud:.2f} of the targets")
  return "  ".join(parts)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--models", nargs="+", choices=MODELS, default=list(MODELS))
  add(
    "--methods", nargs="+", choices=("full", "lora"), default=["full", "lora"]
  )
  add("--documents", nargs="+", type=int, default=[184, 4096])
  add("--seq_len", type=int, default=4096)
  add("--rows", nargs="+", type=int, default=[16, 8, 4, 2, 1])
  add("--steps", type=int, default=10)
  add("--torch_python", default="", help="has torch and transformers; or none")
  add("--config", type=json.loads, default={}, help="JSON over our config")
  add("--tiny", action="store_true", help="small, to prove it on a CPU")
  add("--json", type=Path, help="a line for each result is added to this file")
  add("--until", type=float, default=math.inf, help="seconds since the epoch")
  add("--laws", action="store_true", help="of attention, in place of steps")
  add("--run", type=Path, help=argparse.SUPPRESS)  # The child's.
  args = parser.parse_args()
  if args.run:
    case = json.loads(args.run.read_text())
    case = Case(*(case[name] for name in Case._fields))
    report = laws(case) if args.laws else ours(case, args.config)
    print("BENCH " + json.dumps(report))
    return

  def keep(name: str, case: Case, found: dict[str, Any] | str) -> None:
    """A line that is on the disk before the next case begins."""
    if args.json:
      report = {"failed": found} if isinstance(found, str) else found
      with args.json.open("a", encoding="utf-8") as file:
        json.dump({"side": name} | case._asdict() | report, file)
        file.write("\n")

  if args.tiny:
    args.documents, args.seq_len, args.rows = [16, 64], 64, [2]
    args.steps = 2
  own = [sys.executable, __file__, f"--config={json.dumps(args.config)}"]
  sides = {"sft_jax": [*own, "--run"]}
  if args.torch_python:
    rival = Path(__file__).parent / "bench_gpu_torch.py"
    sides["PyTorch"] = [args.torch_python, str(rival)]
  versions: set[str] = set()
  for model in args.models:
    for method in args.methods:
      if (model, method) not in TARGETS:
        continue
      if args.laws:
        T = args.seq_len
        case = Case(model, method, T, T, 1, 0, args.tiny)
        found = in_process([*own, "--laws", "--run"], case, args.until)
        keep("laws", case, found)
        print(f"laws     {model:5} {found}", flush=True)
        continue
      for document in args.documents:
        case = Case(
          *(model, method, document, args.seq_len, 0, args.steps, args.tiny)
        )
        rates = []
        for name, command_ in sides.items():
          measured, found = with_most_rows(
            *(command_, case, args.rows, args.until)
          )
          keep(name, measured, found)
          print(line(name, measured, found), flush=True)
          if not isinstance(found, str):
            versions.add(f"{found['versions']} on {found['device']}")
            rates.append(found["tokens_per_s"])
        if len(rates) == 2:
          print(f"         ours is {rates[0] / rates[1]:.2f} times as fast")
  print("\n".join(sorted(versions)))


if __name__ == "__main__":
  command.run(main)
