"""The start page: what a run is about to do, before it does it."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from sft_jax.common import sharding, trees
from sft_jax.common.workdir import write_json
from sft_jax.data.audit import summary
from sft_jax.models.lora import quantize
from sft_jax.reporting import terminal
from sft_jax.training.build import abstract, evals
from sft_jax.training.build import step as setup_step
from sft_jax.training.build.build import BuiltRun
from sft_jax.training.build.data import Config
from sft_jax.training.build.model import measure_attention
from sft_jax.training.planning import plan

# Training examples that a report shows, unless there are more sources.
_SAMPLES = 6
_SKETCH = 40  # Characters of the sketch of the learning rate.
_WHOLE = "each has it all"


def facts(
  config: Config, built: BuiltRun, start_step: int
) -> dict[str, dict[str, str]]:
  """What is about to happen, in words: {title: {name: value}}."""
  return {
    "Model": _model(config, built),
    "Plan": _plan(config, built, start_step),
    "Memory per device, estimated": _memory(config, built),
  }


def show(
  built: BuiltRun, words: Mapping[str, Mapping[str, str]], out: Console
) -> None:
  """Prints `facts`, the data and, on several devices, the sharding."""
  model, *others = words
  terminal.facts(out, model, words[model])
  terminal.lines(out, "Data", built.stream.stats.lines())
  for title in others:
    terminal.facts(out, title, words[title])
  if built.mesh.size > 1:
    lines = list(_sharding(built))
    header = ("parameter", "shape", "divided over", "per device", "note")
    if all(line[2] == _WHOLE for line in lines):
      out.print("Sharding: every device holds all parameters.")
    else:
      terminal.print_table(out, "Sharding", header, lines)


def write(
  workdir: Path,
  built: BuiltRun,
  words: Mapping[str, Mapping[str, str]],
  *,
  messages: Sequence[str],
  command: str,
) -> None:
  """Writes start.json and samples.json, for the report."""
  start = {"command": command, "facts": words, "messages": list(messages)}
  start["versions"] = installed_versions()
  write_json(workdir / "start.json", start)
  store = built.stream.store
  # The first examples of each source, so that each is seen.
  sources = np.unique(store.source)
  each = max(_SAMPLES // max(len(sources), 1), 1)
  rows = [
    summary.sample(store, int(i), built.tokenizer)
    for source in sources
    for i in np.flatnonzero(store.source == source)[:each]
  ]
  write_json(workdir / "samples.json", rows)


def _model(config: Config, built: BuiltRun) -> dict[str, str]:
  c, state, mesh = built.model.config, built.state, built.mesh
  num_trained, num_frozen = (
    sum(quantize.num_scalars(*leaf) for leaf in trees.flatten(tree).items())
    for tree in (state.params, state.frozen)
  )
  measured = measure_attention(config, c, mesh)
  experts = f"{c.experts_per_token} of {c.num_experts} experts, "
  experts = experts if c.num_experts else ""
  return {
    "from": str(built.source)
    + (" (new parameters)" if config.model.from_scratch else ""),
    "shape": f"{c.family}: {c.num_layers} layers, width {c.d_model}, "
    f"{c.num_heads} heads ({c.num_kv_heads} key/value), {experts}"
    f"vocabulary {c.vocab_size}, {config.model.dtype}",
    "parameters": f"{terminal.number(num_trained)} trained, "
    f"{terminal.number(num_frozen)} frozen",
    "devices": f"{mesh.size} x {jax.devices()[0].device_kind}, mesh "
    + " x ".join(f"{a}={n}" for a, n in mesh.shape.items()),
    **({"attention": str(measured)} if measured else {}),
    **({"notes": "; ".join(c.notes)} if c.notes else {}),
  }


def _plan(config: Config, built: BuiltRun, start_step: int) -> dict[str, str]:
  epoch = built.stream.stats.epoch
  assert epoch is not None  # A Stream has planned its first epoch.
  steps = max(built.num_steps - start_step, 0)
  seconds = evals.training_seconds(config, built, steps)
  return {
    "steps": f"{built.num_steps} of {config.batch_size} packs x "
    f"{config.data.seq_len} tokens"
    + (f" in {config.accum_steps} parts" if config.accum_steps > 1 else "")
    + (f", from step {start_step}" if start_step else ""),
    "epochs": f"{built.stream.consumed(built.num_steps).epochs:.2f} of "
    f"{epoch.packs} packs",
    "fill": f"{epoch.fill:.1%} of the slots hold a token",
    "learning rate": _schedule(config, built.num_steps)
    + (", found by trials" if built.suggestion else ""),
    **{
      name: f"{len(stream.store.index):,} examples" if stream else "none"
      for name, stream in (
        ("held out", built.held_out),
        ("general text", built.general_text),
      )
    },
    "behaviors": f"{len(built.items)} prompts",
    "expected time": f"about {terminal.duration(seconds)} of training",
    "evaluation": _evaluation(config, built),
    "workdir": config.workdir,
  }


def _evaluation(config: Config, built: BuiltRun) -> str:
  """What measuring costs, how often, and what bounds it."""
  seconds = evals.evaluation_seconds(config, built)
  bound = evals.max_seconds(config, built)
  between = built.num_steps // config.eval.every if config.eval.every else 0
  text = f"about {terminal.duration(min(seconds, bound or seconds))} each time"
  text += ", before and after"
  text += f" and {between} times between" if between else ""
  if bound:
    text += f"; at most {terminal.duration(bound)} (eval.max_seconds)"
  return text


def _schedule(config: Config, num_steps: int) -> str:
  """The learning rate as a sketch, with the figures at its corners."""
  schedule: Any = setup_step.schedule(config, num_steps)
  rate = lambda step: float(schedule(step))
  at = np.linspace(0, num_steps - 1, min(_SKETCH, num_steps))
  values = [rate(step) for step in at.astype(int).tolist()]
  warm = setup_step.warmup_steps(config, num_steps)
  return (
    f"{terminal.sparkline(values)}  {rate(0):.2g} at step 1, "
    f"{rate(warm):.2g} at {warm + 1}, "
    f"{rate(num_steps - 1):.2g} at {num_steps} ({config.optim.schedule})"
  )


def _memory(config: Config, built: BuiltRun) -> dict[str, str]:
  """By kind, before anything is compiled; what passes by is not in it."""
  # Of a run that is resumed the arrays are gone, but not what they were.
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    built.state,
  )
  batch = abstract.batch_shapes(config, built.mesh)
  known = plan.known_bytes(built.loss_fn, state, batch)
  limit = built.machine.chip.memory
  total = sum(known)
  kinds = ("trained parameters", "frozen", "optimizer", "gradients")
  sizes = zip((*kinds, "activations"), known, strict=True)
  return {
    "in all": f"{terminal.size(total)} or more, of {terminal.size(limit)}"
    + ("" if total <= limit else ": DOES NOT FIT, see sft-jax plan"),
    "of it": ", ".join(
      f"{k} {terminal.size(size)}" for k, size in sizes if size
    ),
  }


def _sharding(built: BuiltRun) -> Iterator[tuple[str, ...]]:
  """A line per parameter; a layer's stand for those of all layers."""
  params = trees.merge(built.state.params, built.state.frozen)
  leaves = trees.flatten(params)
  for path, shape, spec, note in sharding.placements(params, built.mesh):
    leaf = leaves[path]
    part = leaf.sharding.shard_shape(leaf.shape)
    size = int(np.prod(part)) * leaf.dtype.itemsize
    over = [
      f"{axis if isinstance(axis, str) else ' x '.join(axis)} "
      f"({n} = {parts} x {n // parts})"
      for n, axis in zip(shape, spec, strict=False)
      if axis is not None and (parts := sharding.size(built.mesh, axis)) > 1
    ]
    over, shape = ", ".join(over) or _WHOLE, " x ".join(map(str, shape))
    yield path, shape, over, terminal.size(size), note


def installed_versions() -> dict[str, str]:
  """By name; with the commit of the checkout that runs, and the platform."""
  names = (
    *("sft_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
    *("grain", "numpy", "tokenizers"),
  )
  found = {}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"  # We may run from a checkout as it is.
  kind = (
    f"{platform.system()} {platform.machine()}, {jax.devices()[0].platform}"
  )
  python = platform.python_version()
  return found | {"python": python, "commit": _commit(), "platform": kind}


def _commit() -> str:
  """Of the checkout that runs, with '-dirty' where files differ from it."""
  checkout = Path(__file__).parents[2]
  if not (checkout / ".git").exists():  # Another's may lie around us.
    return "unknown: not run from a checkout"
  command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError) as error:
    return f"unknown: {error}"
  return done.stdout.strip()
