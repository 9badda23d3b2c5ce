"""Will it fit: compiles a config's training step without any weights.

    python tools/plan.py --config=configs/base.py

Prints the memory that the compiler reserves per device and the FLOPs of a
step. The data is read, for the step's time depends on how long documents are.
"""

import jax
from absl import flags
from ml_collections import config_flags
from rich.text import Text

import command
from sft_jax import fit, setup, sharding, terminal
from sft_jax.train_step import split_micro_batches

CONFIG = config_flags.DEFINE_config_file("config", None, "What to train.")
flags.mark_flag_as_required("config")


def main() -> None:
  out = terminal.console()
  config = CONFIG.value
  config.model.from_scratch = True  # Shapes are all that is wanted.
  built = []

  def build():
    built.append(setup.setup(config, lambda line: out.print(Text(line))))
    return built[0].state

  # Traced and not run, so no array of the state ever exists.
  shapes = jax.eval_shape(build)
  (run,) = built
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    run.state_shardings,
  )
  batch = split_micro_batches(
    next(iter(run.stream.batches(0, 0, 1))), config.accum_steps
  )
  batch = sharding.put_rows(batch, sharding.rows(run.mesh, leading_axes=1))
  step = jax.jit(run.train_step, donate_argnums=0)
  program = fit.program(step.lower(state, batch).compile())

  device = jax.devices()[0]
  chip = fit.chip(device.device_kind)
  slots = config.batch_size * config.data.seq_len
  tokens = slots * run.stream.fill
  flops = tokens * run.flops_per_token
  peak = fit.flops_per_second(device) * run.mesh.size
  gigabytes = lambda n: f"{n / 1e9:.3f} GB"
  terminal.facts(
    out,
    "Plan",
    {
      "devices": f"{run.mesh.size} x {device.device_kind}",
      "memory": gigabytes(program.memory) + " per device"
      + (f" of {gigabytes(chip.memory)}" if chip else ""),
      "  arguments": gigabytes(program.arguments),
      "  temporaries": gigabytes(program.temporaries),
      "tokens per step": f"{tokens:,.0f} of {slots:,} slots",
      "FLOPs per token": f"{run.flops_per_token:.4g}",
      "FLOPs per step": f"{flops:.4g}",
      "step takes": f"at least {flops / peak:.3g} s at {peak:.4g} FLOP/s"
      if chip
      else f"some {flops / peak:.3g} s at {peak:.4g} FLOP/s, as just measured",
    },
  )  # fmt: skip


if __name__ == "__main__":
  command.run_with_flags(main)
