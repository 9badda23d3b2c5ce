"""The story of a run: measured, trained, measured again, exported.

`run(config)` is what `main` calls; `setup.py` builds what it works with.
"""

import collections
import json
import os
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.text import Text

from sft_jax import fit, metrics, present, sharding, terminal, trees
from sft_jax.batch import Batch
from sft_jax.checkpoint import Checkpoints
from sft_jax.evals import measure
from sft_jax.models import hf
from sft_jax.setup import Config, Say, Setup, make_suite, setup
from sft_jax.train_step import TrainState, split_micro_batches


class Result(NamedTuple):
  """What a run leaves behind.

  Attributes:
    metrics: the figures of `workdir/result.json`.
    params: the parameters after the last step, trained and frozen.
    workdir: the folder the run wrote.
  """

  metrics: dict[str, Any]
  params: trees.Tree
  workdir: Path


def run(config: Config) -> Result:
  """Trains as the config says, in `config.workdir`; resumes what is there.

  Before and after training the model is measured (behaviours, held-out loss,
  perplexity on general text). A finished workdir is reported, not rerun.

  Raises:
    ValueError: anything a config, a file or a row can get wrong.
    FloatingPointError: the loss stopped being finite; names the step.
  """
  out = terminal.console()
  say = lambda line: out.print(Text(line))
  workdir = Path(config.workdir)
  _check_same_config(config, workdir)

  run_ = setup(config, say)
  checkpoints = Checkpoints(
    workdir / "checkpoints", keep=config.checkpoint.keep
  )
  state = restore(checkpoints, run_, say)
  start_step = int(state.step)
  _write_json(workdir / "config.json", config.to_dict())
  _write_json(workdir / "ledger.json", run_.stream.ledger.to_json())
  present.start_page(config, run_, start_step, out)
  result_path = workdir / "result.json"
  if result_path.exists() and start_step == run_.num_steps:
    say(f"{workdir} is finished. To train again, choose another workdir.")
    result = json.loads(result_path.read_text())
    present.show_result(out, result, config.eval.samples)
    return Result(result, trees.merge(state.params, state.frozen), workdir)

  # -- Before ---------------------------------------------------------------
  suite = make_suite(config, run_)
  before_path = workdir / "evals" / "before.json"
  if before_path.exists():
    before = json.loads(before_path.read_text())
  else:
    say("Measuring the model before training ...")
    before = suite(trees.merge(state.params, state.frozen))
    _write_json(before_path, before)

  # -- Train ----------------------------------------------------------------
  state = _loop(config, run_, state, checkpoints, suite, out)

  # -- After ----------------------------------------------------------------
  params = trees.merge(state.params, state.frozen)
  say("Measuring the model after training ...")
  after = suite(params)
  _write_json(workdir / "evals" / "after.json", after)
  result = measure.compare(before, after)
  present.show_result(out, result, config.eval.samples)
  if config.export:
    say(f"Writing {workdir / 'export'} ...")
    hf.save_pretrained(
      workdir / "export",
      run_.model,
      params,
      run_.tokenizer,
      dtype=config.model.param_dtype,
    )
  present.write_report(config, run_, result, workdir)
  checkpoints.close()
  _write_json(result_path, result)
  return Result(result, params, workdir)


# -- The loop ---------------------------------------------------------------


def _loop(
  config: Config,
  run_: Setup,
  state: TrainState,
  checkpoints: Checkpoints,
  suite: measure.Suite,
  out: Console,
) -> TrainState:
  """Takes the steps that are left; returns the last state."""
  step = start = int(state.step)
  if start == run_.num_steps:
    return state
  workdir = Path(config.workdir)
  rows = sharding.rows(run_.mesh, leading_axes=1)
  batches = run_.stream.batches(
    start,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )

  def next_batch() -> tuple[Batch, int]:
    batch = next(batches)
    tokens = int((batch.segment_ids > 0).sum()) * jax.process_count()
    cut = split_micro_batches(batch, config.accum_steps)
    return sharding.put_rows(cut, rows), tokens

  def save(step: int) -> None:
    meta = {"data": run_.stream.fingerprint, "config": config.to_json()}
    checkpoints.save(step, state, meta)

  batch, tokens = next_batch()
  out.print("Compiling the training step ...")
  started = time.perf_counter()
  train_step = (
    jax.jit(run_.train_step, donate_argnums=0).lower(state, batch).compile()
  )
  out.print(f"Compiled in {time.perf_counter() - started:.1f} s.")

  record = metrics.JsonlWriter(workdir / "metrics.jsonl", resume_step=start)
  bar = terminal.StepProgress(out, total=run_.num_steps, start=start)
  window, window_tokens, window_steps = metrics.Window(), 0, 0
  in_flight = collections.deque()
  clock = time.perf_counter()
  with closing(record) as writer, closing(bar) as progress, _Stop() as stop:
    while step < run_.num_steps and not stop.requested:
      state, pairs = train_step(state, batch)
      step += 1
      # The host runs ahead of the device, but not far: work in flight holds
      # batches, and on fake CPU devices too much of it deadlocks.
      in_flight.append(pairs["loss/nats_per_token"][0])
      if len(in_flight) > _IN_FLIGHT:
        in_flight.popleft().block_until_ready()
      window.add(step, pairs)
      window_tokens, window_steps = window_tokens + tokens, window_steps + 1
      last = step == run_.num_steps
      if not last:  # Read ahead while the device works.
        batch, tokens = next_batch()
      saves = last or stop.requested or _divides(config.checkpoint.every, step)
      # A record ends where a checkpoint is made: a resumed run then writes
      # the very records that the run would have written.
      if saves or _divides(config.log.every, step):
        values = window.take()
        seconds = time.perf_counter() - clock
        values |= _speed(
          run_,
          values["loss/trained_tokens"],
          window_tokens,
          window_steps,
          seconds,
        )
        writer.write(step, values)
        progress.update(
          step,
          f"loss {values['loss/nats_per_token']:.3f}  "
          f"{values['speed/tokens_per_s']:,.0f} tokens/s  "
          f"{values['speed/trained_tokens_per_s']:,.0f} trained/s"
          + (
            f"  MFU {values['speed/mfu']:.0%}" if "speed/mfu" in values else ""
          ),
          (run_.num_steps - step) * seconds / window_steps,
        )
        window_tokens, window_steps = 0, 0
        clock = time.perf_counter()
      if _divides(config.eval.every, step) and not last:
        values = suite.losses(trees.merge(state.params, state.frozen))
        writer.write(step, values)
        clock = time.perf_counter()
      if saves:
        save(step)
  checkpoints.wait()
  if step < run_.num_steps:
    raise Stopped(
      f"stopped by signal after step {step}, which is saved. Run the same "
      "command again to go on from there."
    )
  return state


# Steps handed to the device and not yet waited for.
_IN_FLIGHT = 2


def _divides(every: int, step: int) -> bool:
  """True at each `every`-th step; never for 0."""
  return every > 0 and step % every == 0


class Stopped(Exception):
  """The run was asked to stop (SIGTERM, Ctrl-C) and has saved its state."""


class _Stop:
  """Turns SIGTERM and Ctrl-C into a flag that the loop reads.

  The second signal is not caught: it ends the process at once.
  """

  def __init__(self) -> None:
    self.requested = False

  def __enter__(self) -> "_Stop":
    self._before = {
      number: signal.signal(number, self._request)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def _request(self, number: int, frame: Any) -> None:
    del number, frame
    self.requested = True
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __exit__(self, *exception: Any) -> None:
    self._restore()


def _speed(
  run_: Setup, trained_tokens: float, tokens: int, steps: int, seconds: float
) -> dict[str, float]:
  """The window's speed; MFU where the device's peak is known."""
  values = {
    "time/step_s": seconds / steps,
    "speed/tokens_per_s": tokens / seconds,
    "speed/trained_tokens_per_s": trained_tokens / seconds,
  }
  share = fit.mfu(
    tokens / seconds,
    run_.flops_per_token,
    num_devices=run_.mesh.size,
    chip=fit.chip(jax.devices()[0].device_kind),
  )
  return values if share is None else {**values, "speed/mfu": share}


# -- Resume ---------------------------------------------------------------


def restore(checkpoints: Checkpoints, run_: Setup, say: Say) -> TrainState:
  """The newest state that verifies; the fresh one if there is none.

  Raises:
    ValueError: the checkpoint was made from other data.
  """
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    run_.state,
  )
  restored = checkpoints.restore(abstract, say)
  if restored is None:
    return run_.state
  found, expected = restored.meta["data"], run_.stream.fingerprint
  if found != expected:
    raise ValueError(
      f"checkpoint {restored.step}: made from data {found}, the config now "
      f"gives {expected}. A file, the tokenizer, the template or a policy has "
      "changed since; restore it, or start in a new workdir."
    )
  say(f"Resuming after step {restored.step}.")
  return restored.state


def _check_same_config(config: Config, workdir: Path) -> None:
  """Raises ValueError with the difference if the workdir has another config."""
  path = workdir / "config.json"
  if not path.exists():
    return
  old = trees.flatten(json.loads(path.read_text()))
  new = trees.flatten(json.loads(json.dumps(config.to_dict())))
  changed = [
    f"{key.replace('/', '.')}: {old.get(key)!r} -> {new.get(key)!r}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and key != "workdir"
  ]
  if changed:
    raise ValueError(
      f"{workdir}: holds a run with another config:\n  "
      + "\n  ".join(changed)
      + "\nexpected the same. Undo the change, or choose another workdir."
    )


def _write_json(path: Path, value: Any) -> None:
  """Writes a file whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix(".part")
  part.write_text(json.dumps(value, indent=2) + "\n")
  os.replace(part, path)
