"""Know before you start: what a run needs, and how fast it can be.

    sft-jax plan --config=configs/models/llama3_8b_tpu_v5p.py \\
        --topology=v5p:2x2x1

Compiles the step that the run would take, for a machine that need not be
here (see sft_jax/common/machines.py; '' is this one), from shapes: no weights
are read. Where it does not fit, other settings are tried and the first that
does is named; with --search, the largest batch that fits. See docs/planning.md.

`sft-jax suggest`, with the same --config, gives a learning rate, a batch and a
number of passes, by published sweeps and short trials: docs/learning_rate.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from sft_jax.commands import command
from sft_jax.common import hub, machines, sharding, trees
from sft_jax.common.buckets import storage
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.models.config import ModelConfig, read_config
from sft_jax.models.lora.quantize import num_scalars
from sft_jax.reporting import terminal
from sft_jax.training.build import abstract, build, data, state
from sft_jax.training.planning import plan
from sft_jax.training.planning import suggest as rates
from sft_jax.training.planning.step_time import Prediction

CONFIG = command.config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "", "v5e:2x4, cpu:8, gpu-80GB, ...")
SEARCH = flags.DEFINE_bool("search", False, "Find the largest batch_size.")
QUICK = flags.DEFINE_bool(
  "quick", False, "Optimise less: memory 10 % off, and no time predicted."
)
JSON = flags.DEFINE_string("json", "", "A file for the plan's figures.")
MEAN_LENGTH = flags.DEFINE_integer(
  "mean_length", 0, "Tokens per document where there is no data; 0: a row."
)

# config.json of public models, by their names on the hub.
SHAPES = Path(__file__).parents[2] / "configs" / "model_shapes"
# How a TPU's program calls one, such as splash attention.
_KERNEL = 'custom_call_target="tpu_custom_call"'


def main() -> None:
  machines.prepare(TOPOLOGY.value)
  out = terminal.console()
  config = CONFIG.value
  machine = machines.find_machine(TOPOLOGY.value)
  shape = find_shape(config.model.path)

  lengths, fill, whence = documents(config, out.print)

  def outline(config):
    mesh = sharding.make_mesh(**config.mesh, devices=machine.devices)
    return abstract.outline(config, shape, mesh)

  def tried(config) -> plan.Plan:
    one = outline(config)
    useful = tokens_of(config, fill) * state.flops_per_token(
      one.step, one.model, one.params, lengths
    )
    tokens = one.batch.tokens.size // one.batch.tokens.shape[0]
    chunks = -(-tokens // sharding.size(one.mesh) // config.loss.chunk_tokens)
    how = {"loss_chunks": chunks, "quick": QUICK.value}
    return plan.plan(one, machine, model_flops=useful, **how)

  first = outline(config)
  trained, frozen = (
    terminal.number(
      sum(num_scalars(*leaf) for leaf in trees.flatten(tree).items())
    )
    for tree in (first.state.params, first.state.frozen)
  )
  facts = {
    "model": f"{trained} trained, {frozen} frozen parameters, "
    f"{config.model.param_dtype}; computes in {config.model.dtype}",
    "machine": f"{first.mesh.size} x {machine.chip.name}, mesh "
    + " x ".join(f"{a}={n}" for a, n in first.mesh.shape.items()),
    "batch": f"{config.batch_size} packs x {config.data.seq_len} slots in "
    f"{config.accum_steps} parts, remat {config.model.remat}",
    "documents": whence,
  }
  if machine.estimate:
    facts["note"] = machine.estimate
  terminal.facts(out, "Plan", facts)
  out.print("Compiling ...")
  found = tried(config)
  show(out, config, first, found, fill)
  if found.predicted:
    figures = predicted(config, first, found, found.predicted, fill)
    show_predicted(out, figures)
    if JSON.value:
      Path(JSON.value).write_text(json.dumps(figures, indent=2), "utf-8")
  if not found.fits:
    recommend(out, config, first, tried)
  if SEARCH.value:
    search(out, config, first, tried, machine.chip.memory)


def tokens_of(config, fill: float) -> float:
  """Tokens of a step, padding left out."""
  return config.batch_size * config.data.seq_len * fill


def find_shape(path: str) -> ModelConfig:
  """The config.json of a folder, of configs/model_shapes, or of the hub."""
  for folder in (Path(path), SHAPES / path):
    if (folder / "config.json").is_file():
      return read_config(folder)
  if storage.is_remote(path) and not path.startswith("hf://"):
    return read_config(storage.fetch(path, ("config.json",)))
  if hub.is_id(path := path.removeprefix("hf://")):
    found = hub.fetch(path, kind="model", patterns=("config.json",))
    return read_config(found.folder)
  return read_config(path)


def documents(config, log) -> tuple[list[int], float, str]:
  """(lengths, share of slots that hold a token, where this is from)."""
  files = ("tokenizer.json", "tokenizer.model")
  if any((Path(config.model.path) / name).is_file() for name in files):
    tokenizer = tokenizers.load_tokenizer(config.model.path)
    stream = data.load_data(config, tokenizer, log).stream
    return list(stream.store.lengths), stream.fill, f"{config.data.train}"
  length = MEAN_LENGTH.value or config.data.seq_len
  return [length], 1.0, f"assumed: documents of {length} tokens, no padding"


def show(out, config, outline, found: plan.Plan, fill: float) -> None:
  """Memory by kind, FLOPs, collectives, time."""
  memory, chip, times = found.memory, found.machine.chip, found.times
  gigabytes = lambda n: f"{n / 1e9:.3f} GB"
  kinds = {f"  {k}": gigabytes(v) for k, v in memory._asdict().items()}
  kinds.pop("  total")
  total = f"{gigabytes(memory.total)} of {gigabytes(chip.memory)}, "
  total += f"{memory.total / chip.memory:.0%}: "
  total += "fits" if found.fits else "DOES NOT FIT"
  terminal.facts(out, "Memory per device", {"total": total, **kinds})
  if times is None:
    return
  tokens = tokens_of(config, fill)
  peak = chip.flops * outline.mesh.size
  facts = {
    "FLOPs": f"{found.flops:.4g} or more, for {tokens:,.0f} tokens; the "
    f"model's own are {found.model_flops:.4g}",
    **{
      kind: f"{one.count} x, {gigabytes(one.bytes)} received per device"
      + ("" if one.exact else ", or more")
      for kind, one in found.traffic.items()
    },
    "kernels": f"{found.text.count(_KERNEL)} of Pallas (splash attention)",
    **{
      name: "not known" if time is None else f"at least {time:.4g} s"
      for name, time in times._asdict().items()
      if time != 0.0
    },
    "step": f"at least {times.step:.4g} s, by {times.bound}",
    "speed": f"at most {tokens / times.step:,.0f} tokens/s, an MFU of "
    f"{found.model_flops / times.step / peak:.0%}",
  }
  terminal.facts(out, "Step", facts)


def predicted(
  config, outline, found: plan.Plan, times: Prediction, fill: float
) -> dict[str, Any]:
  """Figures of the predicted step: seconds, shares, FLOPs, plain values."""
  tokens, chips = tokens_of(config, fill), outline.mesh.size
  seconds = times.seconds
  return {
    "step_seconds": seconds,
    "tokens_per_second_per_chip": tokens / seconds / chips,
    "mfu": found.model_flops / seconds / chips / found.machine.chip.flops,
    "links_busy_seconds": times.links,
    "memory_bytes": found.memory.total,
    "parts": {
      part: {
        phase: time
        for (of, phase), time in times.by("part", "phase").items()
        if of == part
      }
      for (part,) in times.by("part")
    },
    "kinds": {kind: time for (kind,), time in times.by("kind").items()},
    "dearest": [one._asdict() for one in times.operations[:10]],
    "notes": times.notes,
  }


def show_predicted(out, figures: dict[str, Any]) -> None:
  """The compiler's own estimate of the step, and where its time goes."""
  seconds = figures["step_seconds"]
  share = lambda time: f"{time * 1e3:,.1f} ms, {time / seconds:.1%}"
  listed = lambda of: ", ".join(f"{k} {v * 1e3:,.1f}" for k, v in of.items())
  facts = {
    "step": f"{seconds * 1e3:,.0f} ms, "
    f"{figures['tokens_per_second_per_chip']:,.0f} tokens/s per chip, an "
    f"MFU of {figures['mfu']:.1%}",
    **{
      part: f"{share(sum(phases.values()))} ({listed(phases)})"
      for part, phases in figures["parts"].items()
    },
    **{f"  {kind}": share(time) for kind, time in figures["kinds"].items()},
    **{f"note {i}": note for i, note in enumerate(figures["notes"], 1)},
  }
  terminal.facts(out, "Predicted by the compiler's cycles", facts)
  dearest = {
    f"{i:2d}": f"{share(one['seconds'])}, {one['times']} x {one['kind']}, "
    f"{one['part']}, {one['phase']}, {one['source'] or one['name']}"
    for i, one in enumerate(figures["dearest"], 1)
  }
  terminal.facts(out, "The ten dearest operations", dearest)


def recommend(out, config, outline, tried) -> None:
  """Tries what may help, the cheapest first; names the first that fits."""
  for change in plan.alternatives(config, outline.mesh.shape):
    found = tried(plan.changed(config, change.keys))
    total, bound = found.memory.total / 1e9, found.times
    out.print(
      f"tried {change.name}: {total:.3f} GB, "
      + ("fits" if found.fits else "does not fit")
      + (f", a step of at least {bound.step:.4g} s" if bound else "")
    )
    if found.fits:
      flags_ = " ".join(f"--config.{k}={v}" for k, v in change.keys.items())
      out.print(f"Change first: {flags_}")
      return
  out.print(
    "Nothing tried fits. Take more devices, LoRA (lora.rank), parameters in "
    "bfloat16 (model.param_dtype), or shorter rows (data.seq_len)."
  )


def search(out, config, outline, tried, limit) -> None:
  """Finds the largest batch that fits, all else as it is."""
  unit = config.accum_steps * sharding.size(outline.mesh)

  def total(n: int) -> int:
    found = tried(plan.changed(config, {"batch_size": n * unit}))
    size, fits = found.memory.total, "fits" if found.fits else "does not fit"
    out.print(f"batch_size={n * unit}: {size / 1e9:.3f} GB, {fits}")
    sys.stdout.flush()
    return size

  best = plan.largest_batch(total, limit) * unit
  none = f"Not even batch_size={unit} fits."
  out.print(f"Largest batch_size that fits: {best}" if best else none)


def suggest() -> None:
  """Prints a learning rate, batch and passes for a model and rows."""
  out = terminal.console()
  config = CONFIG.value
  config.optim.learning_rate = "auto"
  run = build.build_run(config, out.print)
  found = run.suggestion
  assert found is not None  # The rate is 'auto'.
  packs, epochs = rates.batch_and_epochs(config, run.stream)
  facts = {
    "learning rate": f"{found.rate:.2g}, for {run.num_steps} steps of "
    f"{config.batch_size} packs",
    "published": f"{found.prior:.2g} for width {run.model.config.d_model}"
    + (" under LoRA" if config.lora.rank else "")
    + " (LoRA Without Regret, 2025)",
    "trials": f"{found.steps} steps each" if found.trials else "none",
    **{f"  {rate:.2g}": f"{loss:.4f} nats" for rate, loss in found.trials},
    "batch": f"{packs} packs of {config.data.seq_len} tokens (32 rows of "
    "LIMA's 1,000 to 128 of Tulu 3's 939,000; under LoRA half)",
    "epochs": f"{epochs} (LIMA 15, Tulu 3 2; watch the held-out loss)",
  }
  terminal.facts(out, "Suggestion", facts)
  out.print(
    f"--config.optim.learning_rate={found.rate} --config.batch_size={packs} "
    f"--config.epochs={epochs}"
  )
  if (packs, epochs) != (config.batch_size, config.epochs):
    out.print("With that batch and these epochs, ask again: the rate follows.")
