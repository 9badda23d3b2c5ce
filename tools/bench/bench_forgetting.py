"""Ways to forget less, beside plain fine-tuning: behavior and what is left.

    python tools/bench/bench_forgetting.py --workdir=runs/forgetting
    python tools/bench/bench_forgetting.py --small --seeds 0 1 2

Trains the demo in each way of WAYS, from the same base on the same rows, and
prints the table of docs/forgetting.md. A way that is finished in its workdir is
not trained again; --ways names some alone. --small: four kinds of short rows,
and fewer steps, a minute of one CPU core a way.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sft_jax
from configs import base
from sft_jax.commands import command, evaluate
from sft_jax.data.readers.files import find_files
from sft_jax.evals import behaviors, forgetting
from sft_jax.training.build import load_run

REPLAY = "train_replay.jsonl"
TEXT = "sft_jax/demo/general_text.jsonl"
SMALL = ("context", "json", "refusal", "style", "replay")
Changes = dict[str, Any]

# What each way is called, and the keys it changes. `without`: train lacks this
# file. `mixed`: a point between the base and the way `of`, or plain.
WAYS: dict[str, Changes] = {
  "plain": {},
  "without raw text": {"without": REPLAY},
  "rate / 4": {"optim.learning_rate": 5e-4},
  "LoRA": {
    "lora.rank": 16,
    "lora.alpha": 32.0,
    "lora.also_train": ("embed/",),
  },
  "KL of all 0.1": {"loss.kl": 0.1},
  "raw text by the base": {"loss.kl": 2.0, "loss.kl_on": "text"},
  "L2-SP 2": {"optim.anchor": 2.0},
  "average of weights": {"optim.ema": 0.95},
  "likely tokens": {"loss.dft": True},
  "shown the answer": {
    "distill.teacher": "self",
    "distill.ce": 1.0,
    "distill.weight": 0.1,
    "data.train_on": "last_turn",
  },
  "3/4 model, 1/4 base": {"mixed": 0.75},
  "1/2 model, 1/2 base": {"mixed": 0.5},
  "3/4 raw text by the base": {"mixed": 0.75, "of": "raw text by the base"},
}
HEAD = ("way", "runs", "behavior", "general text, perplexity", "KL")
# Share of prompts passed, perplexity, its change, KL(base || tuned).
Figures = tuple[float, float, float, float]


def configured(changes: Changes, folder: Path, seed: int, small: bool) -> Any:
  """The demo's config with these changes."""
  config: Any = base.get_config()
  config.seed, config.export, config.workdir = seed, False, str(folder)
  config.log.writers = ()
  files = find_files(config.data.train)
  if small:
    files = [x for x in files if x.stem.removeprefix("train_") in SMALL]
    config.eval.behaviors = _small_behaviors(folder.parent)
    config.eval.general_text = TEXT
    config.eval.knowledge, config.eval.gap = "", False
    config.eval.answer_words = config.eval.samples = 0
    config.steps, config.data.seq_len = 80, 128
    config.data.holdout = 0.0
  config.data.train = tuple(
    str(x) for x in files if x.name != changes.get("without")
  )
  for key, value in changes.items():
    section, _, name = key.partition(".")
    if name:
      config[section][name] = value
  if small and config.distill.teacher == "self":
    # Its rows hold the answer twice; as many tokens a step as the others.
    config.data.seq_len, config.batch_size = 256, config.batch_size // 2
  return config


def _small_behaviors(folder: Path) -> str:
  """Every second prompt of the rows' kinds."""
  lines = Path("sft_jax/demo/behaviors.jsonl").read_text().splitlines()
  kept = [x for x in lines if json.loads(x)["group"] in SMALL][::2]
  path = folder / "behaviors.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(kept) + "\n")
  return str(path)


def trained(config: Any) -> Figures:
  """Trains in one way, or reads what came of it."""
  result = sft_jax.train(config).metrics
  scores = result["behaviors"]
  passed = sum(one["after"][0] * one["n"] for one in scores)
  (text,) = (
    one for one in result["losses"] if one["name"] == "general_text/perplexity"
  )
  (kl,) = (
    one["after"]
    for one in result["forgetting"]
    if one["name"] == "general_text/kl"
  )
  number = sum(one["n"] for one in scores)
  return passed / number, text["after"], text["change"], kl


def arguments(config: Any) -> argparse.Namespace:
  """Those of `sft-jax evaluate` that measure as a run of this config does."""
  parser = argparse.ArgumentParser()
  command.add_reply_options(parser, config.eval.max_new_tokens)
  args = parser.parse_args([])
  args.batch_size, args.int8_cache = 64, False
  return args


def mixed(config: Any, share: float, length: int) -> Figures:
  """A point between the base and the run of a config.

  Args:
    config: of the run.
    share: of the run; the rest is the base's.
    length: most tokens of a text, as in the runs that it is compared with.
  """
  path = config.model.path
  tuned, start = load_run.load(config.workdir), load_run.load(path)
  between = lambda a, b: share * a + (1 - share) * b
  asked = tuned._replace(params=jax.tree.map(between, *(tuned[1], start[1])))
  args = arguments(config)
  sets = config.eval.behaviors
  sets = "sft_jax/demo/behaviors.jsonl" if sets == "auto" else sets
  replies, _ = evaluate.scores(asked, behaviors.load_sets(sets), args)
  rows = evaluate.texts(str(TEXT), asked, asked.options, length)
  pair = (start.model, start.params)
  found = forgetting.compare_models(*asked[:2], pair, rows, batch_size=16)
  was = forgetting.compare_models(*pair, None, rows, batch_size=16)
  after, before = (
    forgetting.perplexity(x.nats, x.weight).value for x in (found, was)
  )
  assert found.base is not None
  left = forgetting.base_agreement(found.base, found.weight)
  passed = np.mean([one["passed"] for one in replies.replies])
  return float(passed), after, after / before - 1, left["kl"]


def line(name: str, found: list[Figures]) -> tuple[str, ...]:
  """What HEAD names: means over seeds, and the spread of the behaviors."""
  passed, after, change, kl = np.mean(found, axis=0)
  spread = ""
  if len(found) > 1:
    spread = f" ± {np.std([x[0] for x in found], ddof=1):.1%}"
  return (
    name,
    f"{len(found)}",
    f"{passed:.1%}{spread}",
    f"{after:.3f} ({change:+.1%})",
    f"{kl:.4f}",
  )


def table(results: dict[str, list[Figures]]) -> str:
  """A Markdown table, as in docs/forgetting.md."""
  lines = [HEAD, ("---",) * len(HEAD)]
  lines += [line(name, found) for name, found in results.items()]
  return "\n".join("| " + " | ".join(one) + " |" for one in lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--workdir", type=Path, default=Path("runs/forgetting"))
  add("--small", action="store_true")
  add("--seeds", type=int, nargs="+", default=[0])
  add("--steps", type=int, default=0, help="of each; 0 = the demo's epochs")
  add("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
  args = parser.parse_args()
  results: dict[str, list[Figures]] = {}
  for name in args.ways:
    for seed in args.seeds:
      share = WAYS[name].get("mixed")
      way = name if share is None else WAYS[name].get("of", "plain")
      folder = args.workdir / str(seed) / way.replace(" ", "_")
      config = configured(WAYS[way], folder, seed, args.small)
      config.steps = args.steps or config.steps
      found = trained(config)
      length = 128 if args.small else 256
      if share is not None or config.data.seq_len > length:
        found = mixed(config, 1.0 if share is None else share, length)
      results.setdefault(name, []).append(found)
      print(table({name: results[name]}).splitlines()[-1], flush=True)
  print(table(results))


if __name__ == "__main__":
  command.run(main)
