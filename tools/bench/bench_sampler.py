"""Times sampling against transformers.generate with its cache, on this CPU.

    taskset -c 0 python tools/bench/bench_sampler.py [--prompts=48] [--tiny]
    taskset -c 0 python tools/bench/bench_sampler.py --families [NAME ...]

Random weights in the shape of the stories model (--tiny: of the demo's base),
prompts of unequal lengths, greedy, 16 rows at a time, and two kinds of
replies: all of --new tokens, and each ending where it meets one of V / 48 ids
drawn as stop tokens. The two take turns on the same cores, so that what else
the machine does falls on both; the best of each counts, by the clock and by
the processor's time. With --families a line of each family instead: a case of
make_goldens at width 128 and V 2,048, prompts of one length, as transformers
pads those of recurrent layers otherwise. Needs torch and transformers.
"""

import argparse
import sys
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


def load(path: Path) -> tuple[Any, Any, Any]:
  """(our model, its parameters, the reference) of a folder."""
  model, params = load_save.load_pretrained(path)
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32
  )
  return model, params, reference.eval()


def compare(
  loaded: tuple[Any, Any, Any], prompts: Replies, stops: list[int], args: Any
) -> tuple[Replies, float, dict[str, tuple[float, float]]]:
  """(our replies, the share that the reference gives too, see `best`)."""
  model, params, reference = loaded
  runs = {
    "ours": lambda: ours(model, params, prompts, stops, args.new),
    "theirs": lambda: theirs(reference, prompts, stops, args.new),
  }
  mine, others = (run() for run in runs.values())  # Compiles, warms up.
  agreed = np.mean([a == b for a, b in zip(mine, others, strict=True)])
  return mine, float(agreed), best(runs, args.repeats)


def families(args: Any) -> None:
  """Prints a line for each family, or for those that are named."""
  sys.path.append(str(Path(__file__).parents[1] / "dev"))
  import make_goldens

  first = {
    case.family: name for name, case in [*make_goldens.CASES.items()][::-1]
  }
  rng = np.random.default_rng(0)
  print("| family | tokens/s | of transformers | by the clock / CPU | same |")
  print("|---|---|---|---|---|")
  for name in args.families or sorted(first.values()):
    case = make_goldens.CASES[name]
    fields = make_goldens.SIZES | case.fields
    sizes = {"vocab_size": 2048, "hidden_size": 128, "num_attention_heads": 16}
    if fields["num_key_value_heads"]:
      latent = "kv_lora_rank" in fields
      sizes["num_key_value_heads"] = 16 if latent else 4
    if fields["intermediate_size"]:
      sizes["intermediate_size"] = 384
    case = case._replace(fields=case.fields | sizes)
    with tempfile.TemporaryDirectory() as folder:
      made = make_goldens.make_model(case, 0)
      make_goldens.write_model(made, case, Path(folder))
      loaded = load(Path(folder))
    prompts = rng.integers(3, 2048, (args.prompts, 32)).tolist()
    mine, agreed, took = compare(loaded, prompts, [], args)
    tokens = sum(map(len, mine))
    speeds = [tokens / took[side][0] for side in ("ours", "theirs")]
    clock, work = np.divide(took["theirs"], took["ours"])
    line = f"| {name} | {speeds[0]:,.0f} | {speeds[1]:,.0f} "
    print(f"{line}| {clock:.1f} / {work:.1f} | {agreed:.0%} |", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--prompts", type=int, default=48, help="answered, 16 at a time")
  add("--longest", type=int, default=64, help="tokens of the longest prompt")
  add("--new", type=int, default=128, help="most tokens of a reply")
  add("--threads", type=int, help="of torch; its own choice by default")
  add("--repeats", type=int, default=3, help="of each; the best counts")
  add("--tiny", action="store_true", help="the demo's shape, V 2,048")
  add("--families", nargs="*", help="all, or those named", metavar="NAME")
  args = parser.parse_args()
  if args.threads:
    torch.set_num_threads(args.threads)
  if args.families is not None:
    return families(args)
  shape = TINY if args.tiny else SHAPE
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model"
    model = transformer.build(parse_config(shape))
    load_save.save_pretrained(
      path, model, jax.jit(model.init)(jax.random.key(0))
    )
    loaded = load(path)
  rng, V = np.random.default_rng(0), shape["vocab_size"]
  lengths = rng.integers(args.longest // 8, args.longest + 1, args.prompts)
  prompts = [rng.integers(3, V, n).tolist() for n in lengths]
  for stops in ([], rng.choice(V, V // 48, replace=False).tolist()):
    mine, agreed, took = compare(loaded, prompts, stops, args)
    tokens = sum(map(len, mine))
    print(
      f"{'own lengths' if stops else 'equal lengths'}: {tokens} tokens in "
      f"{len(mine)} replies, {agreed:.1%} of them the same"
    )
    for name, (clock, work) in took.items():
      print(
        f"  {name}: {tokens / clock:,.0f} tokens/s, {work:.1f} s of processor"
      )
    clock, work = np.divide(took["theirs"], took["ours"])
    print(f"  ratio: {clock:.2f} by the clock, {work:.2f} by the processor")


if __name__ == "__main__":
  command.run(main)
