"""Whole runs at many learning rates, beside the rate that the trials find.

    python tools/bench/bench_learning_rate.py --config=configs/base.py \\
        --rates=3e-4,6e-4,1e-3,1.5e-3,2e-3,3e-3

Every run starts from the same parameters and sees the same batches; printed is
its held-out loss, a line each, then the suggestion and its distance from the
best. docs/learning_rate.md has the figures.
"""

import json
import sys
import time

from absl import flags

from sft_jax.commands import command
from sft_jax.common import sharding
from sft_jax.training.build import data, model
from sft_jax.training.planning import suggest

CONFIG = command.config_flag()
RATES = flags.DEFINE_list("rates", "", "Learning rates, by commas.")


def main() -> None:
  config = CONFIG.value
  config.optim.learning_rate = "auto"
  log = lambda line: print(line, file=sys.stderr)
  mesh = sharding.make_mesh(**config.mesh)
  rows = data.load_data(
    config, data.load_tokenizer(config, config.model.path), log
  )
  built, params = model.load_model(config, mesh, log)
  stream, held_out = rows.stream, rows.held_out
  steps = config.steps or stream.num_steps
  assert steps is not None
  assert held_out is not None
  arguments = (config, built, mesh, params, stream, held_out)
  found = suggest.find_rate(*arguments, steps, log)
  print(json.dumps(found._asdict()), flush=True)
  run = suggest.make_trial(
    *arguments, steps=steps, measured=held_out.num_steps or 1
  )
  losses = {}
  for rate in [*map(float, RATES.value), found.rate]:
    began = time.perf_counter()
    losses[rate] = run(rate)
    seconds = time.perf_counter() - began
    line = {"rate": rate, "loss": losses[rate], "steps": steps, "s": seconds}
    print(json.dumps(line), flush=True)
  best = min(losses, key=losses.__getitem__)
  above = losses[found.rate] / losses[best] - 1
  print(f"best {best:.3g}; the suggested {found.rate:.3g} is {above:.2%} above")


if __name__ == "__main__":
  command.run_with_flags(main)
