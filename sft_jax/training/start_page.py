"""The start page: what a run is about to do, before it does it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from sft_jax.common import sharding, trees
from sft_jax.common.workdir import write_json
from sft_jax.data.audit import summary
from sft_jax.data.pipeline import Stream
from sft_jax.models.lora import quantize
from sft_jax.reporting import terminal
from sft_jax.training import versions
from sft_jax.training.build import abstract, evals
from sft_jax.training.build import step as setup_step
from sft_jax.training.build.build import Setup
from sft_jax.training.build.data import Config
from sft_jax.training.planning import plan

# Training examples that a report shows.
_SAMPLES = 6
_SKETCH = 40  # Characters of the sketch of the learning rate.
_WHOLE = "each has it all"


def facts(
  config: Config, run_: Setup, start_step: int
) -> dict[str, dict[str, str]]:
  """What is about to happen, in words: {title: {name: value}}."""
  return {
    "Model": _model(config, run_),
    "Plan": _plan(config, run_, start_step),
    "Memory per device, estimated": _memory(config, run_),
  }


def show(
  run_: Setup, words: Mapping[str, Mapping[str, str]], out: Console
) -> None:
  """Prints `facts`, the data and, on several devices, the sharding."""
  model, *others = words
  terminal.facts(out, model, words[model])
  terminal.lines(out, "Data", run_.stream.stats.lines())
  for title in others:
    terminal.facts(out, title, words[title])
  if run_.mesh.size > 1:
    lines = list(_sharding(run_))
    header = ("parameter", "shape", "divided over", "per device", "note")
    if all(line[2] == _WHOLE for line in lines):
      out.print("Sharding: every device holds all parameters.")
    else:
      terminal.table(out, "Sharding", header, lines)


def write(
  workdir: Path,
  run_: Setup,
  words: Mapping[str, Mapping[str, str]],
  *,
  said: Sequence[str],
  command: str,
) -> None:
  """Writes start.json and samples.json, for the report.

  Args:
    workdir: of the run.
    run_: the run.
    words: its `facts`.
    said: the lines it has said so far.
    command: as it was typed; '' of a run that Python called.
  """
  start = {
    "command": command,
    "facts": words,
    "said": list(said),
    "versions": versions.installed(),
  }
  write_json(workdir / "start.json", start)
  store = run_.stream.store
  # The first example of each source, so that each is seen.
  _, firsts = np.unique(store.source, return_index=True)
  rows = [
    summary.sample(store, int(i), run_.tokenizer) for i in firsts[:_SAMPLES]
  ]
  write_json(workdir / "samples.json", rows)


def _model(config: Config, run_: Setup) -> dict[str, str]:
  c, state, mesh = run_.model.config, run_.state, run_.mesh
  num_trained, num_frozen = (
    sum(quantize.num_scalars(*leaf) for leaf in trees.flatten(tree).items())
    for tree in (state.params, state.frozen)
  )
  experts = (
    f"{c.experts_per_token} of {c.num_experts} experts, "
    if c.num_experts
    else ""
  )
  return {
    "from": str(run_.source)
    + (" (new parameters)" if config.model.from_scratch else ""),
    "shape": f"{c.family}: {c.num_layers} layers, width {c.d_model}, "
    f"{c.num_heads} heads ({c.num_kv_heads} key/value), {experts}"
    f"vocabulary {c.vocab_size}, {config.model.dtype}",
    "parameters": f"{terminal.number(num_trained)} trained, "
    f"{terminal.number(num_frozen)} frozen",
    "devices": f"{mesh.size} x {jax.devices()[0].device_kind}, mesh "
    + " x ".join(f"{a}={n}" for a, n in mesh.shape.items()),
  }


def _plan(config: Config, run_: Setup, start_step: int) -> dict[str, str]:
  epoch = run_.stream.stats.epoch
  assert epoch is not None  # A Stream has planned its first epoch.
  seconds = evals.training_seconds(
    config, run_, max(run_.num_steps - start_step, 0)
  )
  return {
    "steps": f"{run_.num_steps} of {config.batch_size} rows x "
    f"{config.data.seq_len} tokens"
    + (f" in {config.accum_steps} parts" if config.accum_steps > 1 else "")
    + (f", from step {start_step}" if start_step else ""),
    "epochs": f"{run_.stream.consumed(run_.num_steps).epochs:.2f} of "
    f"{epoch.packs} packed rows",
    "fill": f"{epoch.fill:.1%} of the slots hold a token",
    "learning rate": _schedule(config, run_.num_steps),
    "held out": _describe(run_.held_out),
    "general text": _describe(run_.general_text),
    "behaviours": f"{len(run_.items)} prompts",
    "expected time": f"about {terminal.duration(seconds)} of training",
    "evaluation": _evaluation(config, run_),
    "workdir": config.workdir,
  }


def _evaluation(config: Config, run_: Setup) -> str:
  """What measuring costs, how often, and what bounds it."""
  seconds = evals.evaluation_seconds(config, run_)
  bound = evals.max_seconds(config, run_)
  between = run_.num_steps // config.eval.every if config.eval.every else 0
  text = f"about {terminal.duration(min(seconds, bound or seconds))} each time"
  text += (
    f", before and after and {between} times between"
    if between
    else (", before and after")
  )
  if bound:
    text += f"; at most {terminal.duration(bound)} (eval.max_seconds)"
  return text


def _describe(stream: Stream | None) -> str:
  if stream is None:
    return "none"
  return f"{len(stream.store.index):,} examples"


def _schedule(config: Config, num_steps: int) -> str:
  """The learning rate as a sketch, with the figures at its corners."""
  schedule: Any = setup_step.schedule(config, num_steps)
  rate = lambda step: float(schedule(step))
  at = np.linspace(0, num_steps - 1, min(_SKETCH, num_steps))
  values = [rate(step) for step in at.astype(int).tolist()]
  warm = config.optim.warmup_steps
  return (
    f"{terminal.sparkline(values)}  {rate(0):.2g} at step 1, "
    f"{rate(warm):.2g} at {warm + 1}, "
    f"{rate(num_steps - 1):.2g} at {num_steps} ({config.optim.schedule})"
  )


def _memory(config: Config, run_: Setup) -> dict[str, str]:
  """By kind, before anything is compiled; what passes by is not in it."""
  # Of a run that is resumed the arrays are gone, but not what they were.
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    run_.state,
  )
  batch = abstract.batch_shapes(config, run_.mesh)
  known = plan.known_bytes(run_.loss_fn, state, batch)
  limit = run_.machine.chip.memory
  total = sum(known)
  names = ("trained parameters", "frozen", "optimizer", "gradients")
  return {
    "in all": f"{terminal.size(total)} or more, of {terminal.size(limit)}"
    + ("" if total <= limit else ": DOES NOT FIT, see tools/plan.py"),
    "of it": ", ".join(
      f"{name} {terminal.size(size)}"
      for name, size in zip((*names, "activations"), known, strict=True)
      if size
    ),
  }


def _sharding(run_: Setup) -> Iterator[tuple[str, ...]]:
  """A line per parameter; a layer's stand for those of all layers."""
  params = trees.merge(run_.state.params, run_.state.frozen)
  leaves = trees.flatten(params)
  for path, shape, spec, note in sharding.table(params, run_.mesh):
    leaf = leaves[path]
    part = leaf.sharding.shard_shape(leaf.shape)
    size = int(np.prod(part)) * leaf.dtype.itemsize
    over = [
      f"{axis} ({n} = {run_.mesh.shape[axis]} x {n // run_.mesh.shape[axis]})"
      for n, axis in zip(shape, spec, strict=False)
      if axis is not None and run_.mesh.shape[axis] > 1
    ]
    yield (
      path,
      " x ".join(map(str, shape)),
      ", ".join(over) or _WHOLE,
      terminal.size(size),
      note,
    )
