"""Trained tokens per second beside TRL and Tunix, on the same rows.

    python tools/bench/bench_step.py --shared=../shared/data \
      --trl_python=PYTHON --tunix_python=PYTHON [--quick]

A Llama of 15 M parameters (288 wide, 6 layers, vocabulary 32,000, tied) with
random weights in one Hugging Face folder, which every side loads; float32,
512 tokens, 8 rows a step, AdamW with clipping at the same rate. Each side is a
process of its own (`bench_step_sides.py`) and has the machine to itself in
turn: rounds alternate. First all train on the same few padded batches, and
their losses must agree: else the table compares different work.

Rivals run in the environments that `--trl_python` and `--tunix_python` name;
one that is missing is said and left out. `--model` compares on a real model
(of a family that the sides know). `--tuned_malloc` has every side keep
the memory it frees, in huge pages: torch as it comes takes it anew every step.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bench_data
from sft_jax.commands import command
from sft_jax.common import flops as fit
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.store import build
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models import transformer
from sft_jax.models.config import ModelConfig, read_config
from sft_jax.models.hf import load_save

HF_CONFIG = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 32_000,
  "hidden_size": 288,
  "intermediate_size": 768,
  "num_hidden_layers": 6,
  "num_attention_heads": 6,
  "num_key_value_heads": 6,
  "head_dim": 48,
  "max_position_embeddings": 2048,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "hidden_act": "silu",
  "tie_word_embeddings": True,
  "torch_dtype": "float32",
  "bos_token_id": 1,
  "eos_token_id": 2,
}
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
  " {{ m.content }}{{ eos_token }}"
  "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
DATA = ("Alpaca", "GSM8K")
# Package and flag of each rival.
RIVALS = {
  "TRL padded": ("trl", "trl_python"),
  "TRL packed": ("trl", "trl_python"),
  "Tunix": ("tunix", "tunix_python"),
}
# glibc's allocator: freed memory is kept, and lies in huge pages.
TUNED_MALLOC = ":".join(
  f"glibc.malloc.{name}={value}"
  for name, value in (
    ("hugetlb", 1),
    ("mmap_threshold", 1 << 33),
    ("trim_threshold", 1 << 33),
    ("top_pad", 1 << 28),
  )
)
# Losses of the first batches, relative: sums of float32 in another order,
# and what a few steps of training make of it.
AGREEMENT = 2e-3


def write_model(folder: Path, shared: Path, sizes: dict[str, Any]) -> None:
  """Random weights and Mistral's tokenizer of 32,000, with a short template."""
  folder.mkdir()
  config = folder / "config.json"
  config.write_text(json.dumps(HF_CONFIG | sizes))
  model = transformer.build(read_config(folder))
  params = jax.jit(model.init)(jax.random.key(0))
  load_save.save_pretrained(folder, model, params)
  vocabulary = shared / bench_data.VOCABULARY
  (folder / "tokenizer.json").write_bytes(vocabulary.read_bytes())
  (folder / "chat_template.jinja").write_text(TEMPLATE)
  for name, value in (
    ("generation_config.json", {"eos_token_id": 2}),
    (
      "tokenizer_config.json",
      {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
      },
    ),
  ):
    (folder / name).write_text(json.dumps(value))


def write_rows(folder: Path, train: list[str], seq_len: int) -> np.ndarray:
  """Ids and labels of every row, shuffled; returns how long they are."""
  store = build.build(
    train,
    load_tokenizer(folder / "model"),
    RenderOptions(control_tokens="allow"),
    directory=folder / "cache",
    max_length=seq_len,
    log=lambda line: None,
  )
  numbers = list(range(len(store.lengths)))
  random.Random(0).shuffle(numbers)
  with (folder / "rows.jsonl").open("w") as file:
    for number in numbers:
      row = store.example(number)
      labels = np.where(row.loss_weights > 0, row.tokens, -100)
      line = {"input_ids": row.tokens.tolist(), "labels": labels.tolist()}
      file.write(json.dumps(line) + "\n")
  return store.lengths[:]


class Side:
  """A process that trains when it is told to."""

  def __init__(
    self, name: str, python: str, folder: Path, log: Path, tuned: bool
  ):
    script = Path(__file__).parent / "bench_step_sides.py"
    self.name, self.log, self.results = name, log, []
    self.process = subprocess.Popen(
      [python, str(script), name, str(folder)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=log.open("w"),
      text=True,
      cwd=script.parent.parent,
      env=environment(name, tuned),
    )
    self.losses = self._read()["losses"]

  def _read(self) -> dict[str, Any]:
    assert self.process.stdout
    for line in self.process.stdout:
      if line.startswith("BENCH "):
        return json.loads(line.removeprefix("BENCH "))
    raise ValueError(
      f"{self.name}: its process ended with {self.process.wait()}, expected a "
      f"report. The end of its log:\n{self.log.read_text()[-2000:]}"
    )

  def run(self, seconds: float) -> None:
    assert self.process.stdin
    self.process.stdin.write(f"{seconds}\n")
    self.process.stdin.flush()
    self.results.append(self._read())

  def close(self) -> None:
    assert self.process.stdin
    self.process.stdin.close()
    self.process.wait(60)

  def best(self, key: str) -> float:
    """Of all rounds, the most per second."""
    return max(one[key] / one["seconds"] for one in self.results)


def environment(side: str, tuned: bool) -> dict[str, str]:
  """Ours finds this checkout; rivals must not find our packages' choices."""
  root = str(Path(__file__).parents[2])
  kept = {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
  if side == "sft_jax":
    kept["PYTHONPATH"] = root
  if tuned:
    kept["GLIBC_TUNABLES"] = TUNED_MALLOC
  return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | kept


def compare(
  name: str, pythons: dict[str, str], args: argparse.Namespace
) -> None:
  """Runs the sides in turn on one file of rows; prints a table."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    file = str(bench_data.files(args.shared)[name])
    if args.model:
      (folder / "model").symlink_to(args.model.absolute())
    else:
      write_model(folder / "model", args.shared, args.sizes)
    lengths = write_rows(folder, [file], args.seq_len)
    settings = {
      "train": [file],
      "seq_len": args.seq_len,
      "batch_size": args.batch_size,
      "learning_rate": args.learning_rate,
      "gate": args.gate,
      "warm_up": 2,
      "matmul_size": args.matmul_size,
      "config": args.config,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    sides: list[Side] = []
    try:
      for side, python in pythons.items():
        log = folder / f"{side}.log"
        sides.append(Side(side, python, folder, log, args.tuned_malloc))
      check_losses(sides)
      for _ in range(args.rounds):
        for side in sides:
          side.run(args.seconds)
    finally:
      for side in sides:
        side.close()
    report(name, sides, lengths, read_config(folder / "model"))


def check_losses(sides: list[Side]) -> None:
  """Refuses to compare sides that do not compute the same."""
  ours = np.array(sides[0].losses)
  for side in sides:
    if side.name == "TRL packed":  # Other batches, and it leaks.
      continue
    apart = np.max(np.abs(np.array(side.losses) / ours - 1))
    losses = " ".join(f"{x:.4f}" for x in side.losses)
    print(f"  {side.name:11} first losses {losses}; {apart:.1e} apart")
    if apart > AGREEMENT:
      raise ValueError(
        f"{side.name}: its losses on the same batches are {side.losses}, "
        f"expected those of {sides[0].name}, {sides[0].losses}, to "
        f"{AGREEMENT:.1%}. The sides do not do the same work."
      )


def report(
  name: str, sides: list[Side], lengths: np.ndarray, config: ModelConfig
) -> None:
  context = fit.mean_context(lengths)
  head = config.vocab_size * config.d_model
  model = transformer.build(config)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  matmuls, _ = fit.matmul_params(shapes)
  flops = lambda params, context: fit.model_flops_per_token(
    trained_matmul_params=params,
    num_layers=config.num_layers,
    num_heads=config.num_heads,
    head_dim=config.head_dim,
    context=context,
  )
  machine = max(one["matmul"] for side in sides for one in side.results)
  print(
    f"{name}: {len(lengths):,} rows, {lengths.mean():.0f} tokens each; "
    f"matrix products run at {machine / 1e9:.0f} GFLOP/s"
  )
  print(
    f"  {'':11} trained/s  tokens/s   ours is    by CPU  filled  step, ms  "
    "peak, MB  FLOPs: as others count / needed"
  )
  ours = sides[0]
  for side in sides:
    trained, tokens = side.best("trained"), side.best("tokens")
    # Rounds side by side share what else the machine was doing; CPU time does
    # not count what others took of it.
    by_clock, by_cpu = (
      statistics.median(
        a["trained"] / a[clock] * b[clock] / b["trained"]
        for a, b in zip(ours.results, side.results, strict=True)
      )
      for clock in ("seconds", "cpu")
    )
    last = side.results[-1]
    usual = tokens * flops(matmuls, context)
    needed = tokens * flops(matmuls - head, context) + 6 * head * trained
    print(
      f"  {side.name:11} {trained:9,.0f} {tokens:9,.0f}  {by_clock:6.2f} x "
      f"{by_cpu:6.2f} x {last['tokens'] / last['slots']:7.0%} "
      f"{1e3 / side.best('steps'):9,.0f} "
      f"{last['peak'] / 1e6:9,.0f}  {usual / machine:.0%} / "
      f"{needed / machine:.0%}"
    )


def main() -> None:
  parser = bench_data.parser(__doc__)
  add = parser.add_argument
  add("--trl_python", default=sys.executable, help="has trl, datasets, torch")
  add("--tunix_python", default=sys.executable, help="has google-tunix")
  add("--data", nargs="+", choices=bench_data.FILES, default=list(DATA))
  add("--sides", nargs="*", choices=RIVALS, default=list(RIVALS))
  add("--quick", action="store_true", help="one short round, Tunix left out")
  add("--tuned_malloc", action="store_true", help="of every side")
  add("--rounds", type=int, default=3)
  add("--seconds", type=float, default=15.0, help="of a round of one side")
  add("--seq_len", type=int, default=512)
  add("--batch_size", type=int, default=8)
  add("--learning_rate", type=float, default=1e-3)
  add("--gate", type=int, default=3, help="steps whose losses must agree")
  add("--matmul_size", type=int, default=2048)
  add("--model", type=Path, help="a folder in place of the random Llama")
  add("--sizes", type=json.loads, default={}, help="JSON over config.json")
  add("--config", type=json.loads, default={}, help="JSON over our config")
  args = parser.parse_args()
  if args.quick:
    args.rounds, args.seconds = 1, 8.0
    args.sides = [x for x in args.sides if x != "Tunix"]
  pythons = {"sft_jax": sys.executable}
  for side in args.sides:
    package, flag = RIVALS[side]
    python = getattr(args, flag)
    found = f"import importlib.util as u; assert u.find_spec({package!r})"
    if subprocess.run([python, "-c", found], capture_output=True).returncode:
      print(f"{side} is left out: {python} has no {package} (--{flag})")
    else:
      pythons[side] = python
  print(bench_data.machine())
  for name in args.data:
    compare(name, pythons, args)


if __name__ == "__main__":
  command.run(main)
