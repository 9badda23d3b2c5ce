"""Forgetting against behavior on the demo: full, LoRA, replay, KL.

    python tools/bench/bench_forgetting.py --workdir=runs/forgetting

Trains the demo once in each way of WAYS, each from the same base on the same
conversations, and prints one row of each: behavior, and what is left of the
base. A way that is finished in its workdir is not trained again; --ways names
some alone, --steps shortens all alike.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sft_jax
from configs import base
from configs.demo import lora_demo
from sft_jax.commands import command
from sft_jax.data.readers.files import find_files

REPLAY = "train_replay.jsonl"


def _without_replay(config: Any) -> None:
  files = find_files(config.data.train)
  config.data.train = tuple(str(f) for f in files if f.name != REPLAY)


def _with_kl(coefficient: float) -> Callable[[Any], None]:
  def change(config: Any) -> None:
    _without_replay(config)
    config.loss.kl = coefficient

  return change


def _faster(config: Any) -> None:
  _without_replay(config)
  config.optim.learning_rate = 5e-3


def _with_embeddings_frozen(config: Any) -> None:
  _without_replay(config)
  config.lora.also_train = ()


def _as_is(config: Any) -> None:
  del config


# What each way is called, the config it starts from, what it changes.
WAYS: dict[str, tuple[Any, Callable[[Any], None]]] = {
  "full": (base, _without_replay),
  "full, replay": (base, _as_is),
  "full, KL 0.1": (base, _with_kl(0.1)),
  "LoRA": (lora_demo, _without_replay),
  "LoRA, 5e-3": (lora_demo, _faster),
  "LoRA, embeddings frozen": (lora_demo, _with_embeddings_frozen),
  "LoRA, replay": (lora_demo, _as_is),
  "LoRA, KL 0.1": (lora_demo, _with_kl(0.1)),
}
HEAD = (
  *("way", "behavior", "held-out", "gap"),
  *(
    "general text, perplexity",
    "KL",
    "top-1 agreement",
    "both correct",
    "known",
  ),
)


def run(name: str, workdir: Path, steps: int) -> Any:
  """Trains in one way; returns result.json's figures."""
  start, change = WAYS[name]
  config = start.get_config()
  change(config)
  if steps:
    config.steps = steps
  config.export = False
  config.workdir = str(workdir / name.replace(", ", "_").replace(" ", "_"))
  return sft_jax.train(config).metrics


def row(name: str, result: dict[str, Any]) -> tuple[str, ...]:
  """What HEAD names, of one result."""
  losses = {one["name"]: one for one in result["losses"]}
  left = {one["name"]: one["after"] for one in result["forgetting"]}
  scores = result["behaviors"]
  passed = sum(one["after"][0] * one["n"] for one in scores)
  perplexity = losses["general_text/perplexity"]
  known = result["knowledge"]
  # Of what the base had right there is no share where it had nothing right.
  share = lambda name: f"{left[name]:.1%}" if name in left else "-"
  return (
    name,
    f"{passed / sum(one['n'] for one in scores):.1%}",
    f"{losses['held_out/nats_per_token']['after']:.3f}",
    f"{result['gap']['gap']:+.3f}",
    f"{perplexity['after']:.3f} ({perplexity['change']:+.1%})",
    f"{left['general_text/kl']:.4f}",
    share("general_text/top1_agreement"),
    share("general_text/both_correct"),
    f"{known['before'][0]:.0%} -> {known['after'][0]:.0%}",
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--workdir", type=Path, default=Path("runs/forgetting"))
  add("--steps", type=int, default=0, help="of each; 0 = the demo's epochs")
  add("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
  args = parser.parse_args()
  results = {name: run(name, args.workdir, args.steps) for name in args.ways}
  print(table(results))


def table(results: dict[str, Any]) -> str:
  """A Markdown table, as in docs/forgetting.md."""
  lines = [HEAD, ("---",) * len(HEAD)]
  lines += [row(name, result) for name, result in results.items()]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
  command.run(main)
