"""Writes the newest checkpoint of a run as a Hugging Face folder.

python tools/export_hf.py --workdir=runs/demo --out=my_model
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ml_collections
from rich.text import Text

import command
from sft_jax import setup, terminal, trees
from sft_jax.checkpoint import Checkpoints
from sft_jax.models import hf
from sft_jax.train import restore


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", required=True, help="the folder of a run")
  parser.add_argument("--out", required=True, help="the folder to write")
  parser.add_argument("--dtype", help="of the weights; as trained by default")
  args = parser.parse_args()
  out = terminal.console()
  say = lambda line: out.print(Text(line))
  workdir = Path(args.workdir)
  read = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
  config: Any = ml_collections.ConfigDict(read, type_safe=False)
  run = setup.setup(config, say)
  checkpoints = Checkpoints(
    workdir / "checkpoints", keep=config.checkpoint.keep
  )
  if not checkpoints.steps():
    raise ValueError(
      f"{workdir}/checkpoints: got no checkpoint; expected at least one. "
      "Train first, or name another workdir."
    )
  state = restore(checkpoints, run, say)
  checkpoints.close()
  params = trees.merge(state.params, state.frozen)
  hf.save_pretrained(
    args.out, run.model, params, run.tokenizer, dtype=args.dtype
  )
  say(f"Wrote step {int(state.step)} to {args.out}.")


if __name__ == "__main__":
  command.run(main)
