"""Do the laws hold here: with this model, on these devices, in this mesh.

    sft-jax selfcheck --config=configs/base.py

Builds the run of a config and measures what must not matter: other documents
of a row, packing, the cut into micro-batches, the placement of rows, devices,
rematerialization, the loss's slices; that stop tokens are trained; and that
the export computes the model's logits. No step is taken and the workdir gets
nothing but the encoded data. See docs/reliability.md.

Exit codes: 0 all hold; 1 one does not; 2 the config or the data cannot be
read.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sft_jax.commands import command
from sft_jax.common import sharding, trees
from sft_jax.reporting import terminal
from sft_jax.training import selfcheck
from sft_jax.training.build import build, data
from sft_jax.training.build import step as setup_step
from sft_jax.training.build.data import Config, Log
from sft_jax.training.build.model import build_model
from sft_jax.training.build.outputs import export_run
from sft_jax.training.selfcheck import Finding, quick_of_run, toy_shape

CONFIG = command.config_flag()
_BATCHES = 4  # Of the run's own data, to look for stop tokens.


def check(config: Config, log: Log) -> list[Finding]:
  """Every law, for the run of a config."""
  built = build.build_run(config, log)
  params = _stirred(trees.merge(built.state.params, built.state.frozen))
  built = built._replace(state=None)
  log("The quick form ...")
  findings = quick_of_run(config, built, params)
  log("The cut, rematerialization, slices of the loss, devices ...")
  findings += _invariances(config, built, params)
  findings.append(_stops(built))
  log("The export ...")
  with tempfile.TemporaryDirectory() as folder:
    found = export_run(config, built, params, Path(folder) / "export")
  difference, most = found.logit_difference, found.tolerance
  return [*findings, Finding("export: logits", difference, most)]


def _stirred(params: trees.Tree) -> trees.Tree:
  """Adapters away from B = 0, where what they read does not matter yet."""

  def stir(path: str, x: jax.Array) -> jax.Array:
    if not path.endswith("lora_b"):
      return x
    noise = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    return jax.device_put(x + 0.02 * noise, x.sharding)

  return trees.map_paths(stir, params)


def _invariances(
  config: Config, built: build.BuiltRun, params: trees.Tree
) -> list[Finding]:
  """The toy batch by other programs, and by one device."""
  rows, length = toy_shape(config, built.mesh)
  batch = selfcheck.toy_batch(2 * rows, length, built.model.config.vocab_size)

  def measure(
    mesh: Mesh, params: trees.Tree, remat: str = "", slices: int = 0
  ) -> Callable[..., selfcheck.Measured]:
    other = data.plain(config)
    with other.unlocked():
      other.loss.chunk_tokens = slices or config.loss.chunk_tokens
      other.model.remat = remat or config.model.remat
    rows = built.model.lora.token_rows if built.model.lora else ()
    model = build_model(other, built.model.config, mesh, rows).model
    step = setup_step.make_step(other, model, mesh, built.num_steps)
    put = lambda batch: selfcheck.place_batch(batch, mesh)
    return selfcheck.measurer(step.loss_fn, params, step.trained, put)

  of_run = measure(built.mesh, params)
  base, found = of_run(batch, 1), []

  def compare(law: str, other: selfcheck.Measured) -> None:
    found.extend(selfcheck.compare(law, base, other, config.model.dtype))

  for parts in (2, 4):
    compare(f"cut in {parts}", of_run(batch, parts))
  for remat in ("none", "norms", "attention", "full"):
    if remat != config.model.remat:
      compare(f"remat {remat}", measure(built.mesh, params, remat)(batch, 1))
  compare("loss in slices", measure(built.mesh, params, slices=rows)(batch, 1))
  if built.mesh.size > 1 and jax.process_count() == 1:
    # A model that fits no one device would stop the check.
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None or 4 * trees.num_bytes(params) < limit:
      mesh = Mesh(
        np.array(jax.devices()[:1]).reshape((1,) * len(sharding.AXES)),
        sharding.AXES,
        axis_types=(AxisType.Auto,) * len(sharding.AXES),
      )
      there = jax.device_put(params, sharding.param_shardings(params, mesh))
      compare("one device", measure(mesh, there)(batch, 1))
  return found


def _stops(built: build.BuiltRun) -> Finding:
  """Of the first batches of the run, documents that must end in a stop."""
  stream, tokens, weights, segments = built.stream, [], [], []
  steps = min(_BATCHES, built.num_steps)
  for step, batch in zip(range(steps), stream.batches(), strict=False):
    held = batch.segment_ids.copy()
    for row, ids in enumerate(stream.rows_of(step)):
      # Raw text and cut answers may run on.
      runs_on = 1 + np.flatnonzero(stream.store.index["may_run_on"][ids])
      held[row, np.isin(held[row], runs_on)] = 0
    tokens.append(batch.targets)
    weights.append(batch.loss_weights)
    segments.append(held)
  return selfcheck.stops(
    np.concatenate(tokens),
    np.concatenate(weights),
    np.concatenate(segments),
    tuple(built.tokenizer.stop_ids),
  )


def main() -> None:
  out = terminal.console()
  findings = check(CONFIG.value, out.print)
  header = ("law", "difference", "tolerance", "verdict")
  terminal.print_table(
    out, "Self-check", header, selfcheck.findings_table(findings)
  )
  failed = sum(not one.passed for one in findings)
  devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  out.print(f"{len(findings) - failed} of {len(findings)} hold on {devices}")
  sys.exit(1 if failed else 0)
