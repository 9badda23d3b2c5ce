"""Times sampling against transformers.generate with its cache, on this CPU.

    taskset -c 0 python tools/bench/bench_sampler.py [--prompts=48] [--tiny]

Random weights in the shape of the stories model (--tiny: of the demo's base),
prompts of unequal lengths, greedy, 16 rows at a time, and two kinds of
replies: all of --new tokens, and each ending where it meets one of V / 48 ids
drawn as stop tokens. The two take turns on the same cores, so that what else
the machine does falls on both; the best of each counts, by the clock and by
the processor's time. Needs torch and transformers.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from sft_jax.commands import command
from sft_jax.inference import sampler
from sft_jax.models import transformer
from sft_jax.models.config import parse_config
from sft_jax.models.hf import load_save

SHAPE = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 32000,
  "hidden_size": 288,
  "intermediate_size": 768,
  "num_hidden_layers": 6,
  "num_attention_heads": 6,
  "num_key_value_heads": 6,
  "head_dim": 48,
  "hidden_act": "silu",
  "max_position_embeddings": 1024,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "tie_word_embeddings": True,
  "torch_dtype": "float32",
}
TINY = SHAPE | {
  "vocab_size": 2048,
  "hidden_size": 128,
  "intermediate_size": 384,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 32,
}
Replies = list[list[int]]


def ours(
  model: Any, params: Any, prompts: Replies, stops: list[int], new: int
) -> Replies:
  """Our replies, without their stop tokens."""
  found = sampler.generate(
    model.decode, model.logits, model.init_cache, params, prompts,
    stop_ids=stops, max_new_tokens=new, batch_size=16,
  )  # fmt: skip
  return [reply.tokens for reply in found]


def theirs(model: Any, prompts: Replies, stops: list[int], new: int) -> Replies:
  """The reference's, sixteen prompts at a time."""
  replies = []
  for start in range(0, len(prompts), 16):
    some = prompts[start : start + 16]
    longest = max(map(len, some))
    ids = np.zeros((len(some), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, seen, prompt in zip(ids, mask, some, strict=True):
      row[-len(prompt) :], seen[-len(prompt) :] = prompt, 1
    with torch.inference_mode():
      out = model.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
        max_new_tokens=new, do_sample=False, use_cache=True,
        eos_token_id=stops or None, pad_token_id=0,
      )  # fmt: skip
    for row in out[:, longest:].tolist():
      ends = [i for i, token in enumerate(row) if token in set(stops)]
      replies.append(row[: min(ends, default=new)])
  return replies


def best(
  runs: dict[str, Callable[[], Replies]], repeats: int
) -> dict[str, tuple[float, float]]:
  """The least (seconds, seconds of the processor) of each, in turns."""
  found: dict[str, tuple[float, float]] = {}
  for _ in range(repeats):
    for name, run in runs.items():
      clock, work = time.perf_counter(), time.process_time()
      run()
      took = time.perf_counter() - clock, time.process_time() - work
      before = found.get(name, took)
      found[name] = min(before[0], took[0]), min(before[1], took[1])
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--prompts", type=int, default=48, help="answered, 16 at a time")
  add("--longest", type=int, default=64, help="tokens of the longest prompt")
  add("--new", type=int, default=128, help="most tokens of a reply")
  add("--threads", type=int, help="of torch; its own choice by default")
  add("--repeats", type=int, default=3, help="of each; the best counts")
  add("--tiny", action="store_true", help="the demo's shape, V 2,048")
  args = parser.parse_args()
  if args.threads:
    torch.set_num_threads(args.threads)
  shape = TINY if args.tiny else SHAPE
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model"
    model = transformer.build(parse_config(shape))
    load_save.save_pretrained(
      path, model, jax.jit(model.init)(jax.random.key(0))
    )
    model, params = load_save.load_pretrained(path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32
    ).eval()
  rng, V = np.random.default_rng(0), shape["vocab_size"]
  lengths = rng.integers(args.longest // 8, args.longest + 1, args.prompts)
  prompts = [rng.integers(3, V, n).tolist() for n in lengths]
  for stops in ([], rng.choice(V, V // 48, replace=False).tolist()):
    runs = {
      "ours": lambda s=stops: ours(model, params, prompts, s, args.new),
      "theirs": lambda s=stops: theirs(reference, prompts, s, args.new),
    }
    mine, others = (run() for run in runs.values())  # Compiles, warms up.
    agreed = np.mean([a == b for a, b in zip(mine, others, strict=True)])
    tokens = sum(map(len, mine))
    print(
      f"{'own lengths' if stops else 'equal lengths'}: {tokens} tokens in "
      f"{len(mine)} replies, {agreed:.1%} of them the same"
    )
    took = best(runs, args.repeats)
    for name, (clock, work) in took.items():
      print(
        f"  {name}: {tokens / clock:,.0f} tokens/s, {work:.1f} s of processor"
      )
    clock, work = np.divide(took["theirs"], took["ours"])
    print(f"  ratio: {clock:.2f} by the clock, {work:.2f} by the processor")


if __name__ == "__main__":
  command.run(main)
