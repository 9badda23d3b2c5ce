"""The loop: batches in, steps taken, records and checkpoints out."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.checkpointing.resume import Resumed, stored
from sft_jax.common import distributed, sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.common.workdir import Incidents
from sft_jax.data.audit.summary import step_rows
from sft_jax.evals import suite as measure
from sft_jax.reporting import profiling, terminal, throughput
from sft_jax.step.train_step import TrainState, split_micro_batches
from sft_jax.training import bad_steps, early_stop
from sft_jax.training.build.build import Setup
from sft_jax.training.build.data import Config
from sft_jax.training.interrupts import Stopped, StopRequest
from sft_jax.training.recorder import Records
from sft_jax.training.step_runner import Steps
from sft_jax.training.watchdog import Watchdog


def train_steps(
  config: Config,
  run_: Setup,
  resumed: Resumed,
  checkpoints: Checkpoints,
  suite: measure.Suite,
  out: Console,
  *,
  clock: throughput.Clock,
  stop: StopRequest,
  incidents: Incidents,
) -> TrainState:
  """Takes the steps that are left, or as many as eval.patience bears.

  Returns:
    The last state.

  Raises:
    FloatingPointError: at a bad step, where the run halts; the state before
      it is saved.
    OSError: a checkpoint could not be saved.
    Stopped: after the step during which the wish came; it is saved.
  """
  start = int(resumed.state.step)
  patience = make_patience(config, resumed.memory)
  if start >= run_.num_steps or patience.out:
    return resumed.state
  workdir = Path(config.workdir)
  rows = sharding.rows(run_.mesh, leading_axes=1)
  own = sharding.own_rows(
    run_.mesh, config.batch_size, parts=config.accum_steps
  )
  batches = run_.stream.batches(start, own)
  memory = {"losses": [], "skipped": 0, "chain": ""} | resumed.memory
  policy = config.faults.on_bad_step
  if policy not in ("halt", "skip"):
    raise ValueError(
      f"faults.on_bad_step: got {policy!r}, expected 'halt' or 'skip'. Set it "
      "to one of these."
    )
  judge = bad_steps.Judge(
    spike_factor=config.faults.spike_factor,
    skip_limit=config.faults.skip_limit if policy == "skip" else 0,
    losses=memory["losses"],
    skipped=memory["skipped"],
  )

  def next_batch() -> Batch:
    cut = split_micro_batches(next(batches), config.accum_steps)
    return sharding.put_rows(cut, rows)

  def tell(kind: str, bad: bad_steps.Bad) -> str:
    """Keeps the rows of a bad step for people; says where they are."""
    said = f"{bad.reason}; its rows are in {_write_rows(run_, bad, workdir)}"
    incidents.add(kind, bad.step, said)
    return said

  profile = profiling.Profile(
    workdir / "profile",
    **config.profile,
    left=range(start + 1, run_.num_steps + 1),
    say=out.print,
  )
  records = Records(config, run_, clock, resume_step=start, say=out.print)
  with Watchdog(config.faults.hang_seconds), clock.on("data_wait"):
    batch = next_batch()
  out.print("Compiling the training step ...")
  with clock.on("compile"):
    steps = Steps(
      run_.train_step,
      resumed.state,
      batch,
      judge=judge,
      chain=memory["chain"],
      on_skip=lambda bad: out.print(
        f"Step {bad.step} is left out: {tell('skipped', bad)}."
      ),
    )
  del resumed  # Its state is donated.
  done = "Found compiled, read" if steps.found else "Compiled"
  whole, passing = steps.program.memory, steps.program.temporaries
  out.print(
    f"{done} in {clock.spent['compile']:.1f} s. A device holds "
    f"{whole / 1e9:.3f} GB while it steps, {passing / 1e9:.3f} of it "
    "activations and what else comes and goes."
  )

  def save(score: float | None) -> None:
    held, beside = stored(steps.state)
    meta = {
      "data": run_.stream.fingerprint,
      "data_fingerprint_inputs": run_.stream.fingerprint_inputs,
      "config": config.to_json(),
      "memory": {
        **judge.to_json(),
        "chain": steps.chain,
        "patience": patience.to_json(),
      },
    }
    with clock.on("save"):
      checkpoints.save(steps.number, held, meta, beside=beside, score=score)

  bar = terminal.StepProgress(out, total=run_.num_steps, start=start)
  saved = start
  values: dict[str, Any] = {}
  last = stopping = False
  wished = distributed.Agreement(run_.mesh, behind=bad_steps.IN_FLIGHT)
  with (
    closing(records),
    closing(bar) as progress,
    closing(profile),
    stop.deferred(),
    Watchdog(config.faults.hang_seconds) as watchdog,
  ):
    records.pace.begin()
    while not (last or stopping or patience.out):
      checkpoints.check()
      with profile.step(steps.number + 1, lambda: steps.state):
        steps.take(batch)
      records.pace.step(steps.under_way)
      watchdog.moved()
      step = steps.number
      # Read once: a signal that comes later is obeyed at the next step.
      last, stopping = step == run_.num_steps, wished(stop.requested)
      if not last:  # Read ahead while the device works.
        with records.pace.waiting():
          batch = next_batch()
      saves = last or stopping or _divides(config.checkpoint.every, step)
      evaluates = _divides(config.eval.every, step)
      if last:
        # It is measured after training; with patience now, too, as one of
        # those that the best is chosen from.
        evaluates = patience.limit > 0
      ends_epoch = run_.train_rows is not None and _ends_epoch(run_, step, last)
      # A record ends where a checkpoint is made: a resumed run then writes
      # the very records that the run would have written.
      if saves or evaluates or ends_epoch or _divides(config.log.every, step):
        values = records.window(steps)
        if steps.halted:
          break
        records.write(step, values)
        progress.update(step, values)
      elif steps.halted:
        values = records.window(steps)
        break
      score = None
      if evaluates or ends_epoch:
        params = trees.merge(steps.state.params, steps.state.frozen)
        with clock.on("evaluation"):
          if evaluates:
            values = suite.scalars(params, replies=replies_of(config, step))
            score = _score(followed(config), values)
          else:
            values = suite.losses(params)
        del params
        records.write(step, values)
        if score is not None:
          patience.look(score)
        watchdog.moved()
        # Measuring takes its time: who asked meanwhile is not kept waiting.
        stopping = wished(stop.requested) or stopping
      if saves or stopping:
        save(score)
        saved = step
        watchdog.moved()
    if steps.halted and steps.number > records.last:
      records.write(steps.number, values)
    if steps.halted and steps.number > saved:
      save(None)
    with clock.on("save"):
      checkpoints.wait()
    records.close(done=(last or patience.out) and not steps.halted)
  if bad := steps.halted:
    raise FloatingPointError(
      f"step {bad.step}: {tell('halted', bad)}, expected a loss to go on with. "
      f"It was not applied; the state after step {steps.number} is saved. Look "
      "at the rows (tools/replay.py), lower optim.learning_rate, or set "
      "faults.on_bad_step=skip and go on with --force."
    )
  if stopping and not last:
    incidents.add("stopped", steps.number, "by a signal; its state is saved")
    raise Stopped(
      f"stopped by signal after step {steps.number}, which is saved. Run the "
      "same command again to go on from there."
    )
  return steps.state


def followed(config: Config) -> str:
  """The figure that says which checkpoint is best; '' if none does."""
  default = "held_out/nats_per_token" if config.eval.patience else ""
  return config.checkpoint.keep_best or default


def make_patience(
  config: Config, memory: dict[str, Any]
) -> early_stop.Patience:
  """Of a run, as far as it had come when this was remembered."""
  return early_stop.Patience(
    config.eval.patience,
    lowest=config.checkpoint.best_is == "lowest",
    **memory.get("patience", {}),
  )


def _ends_epoch(run_: Setup, step: int, last: bool) -> bool:
  """True at the first step that completes a pass over the data."""
  passes = lambda step: int(step / run_.stream.steps_per_epoch)
  return last or passes(step) > passes(step - 1)


def replies_of(config: Config, step: int) -> Path | None:
  """Where replies of an evaluation in training go; None: losses alone."""
  if config.eval.during == "losses":
    return None
  return Path(config.workdir) / "evals" / f"step_{step}.jsonl"


def _divides(every: int, step: int) -> bool:
  """True at each `every`-th step; never for 0."""
  return every > 0 and step % every == 0


def _score(name: str, values: dict[str, Any]) -> float | None:
  """What `checkpoint.keep_best` compares."""
  if not name:
    return None
  if name not in values:
    raise ValueError(
      f"checkpoint.keep_best: got {name!r}, expected one of {sorted(values)}, "
      "what is measured while training. Name one of these. (With eval.patience "
      "it is the held-out loss by default, and needs held-out rows.)"
    )
  return float(values[name])


def _write_rows(run_: Setup, bad: bad_steps.Bad, workdir: Path) -> Path:
  """Appends the rows of a bad step to bad_batch.jsonl."""
  path = workdir / "bad_batch.jsonl"
  if jax.process_index() == 0:
    with path.open("a") as file:
      for row in step_rows(run_.stream, run_.tokenizer, bad.step):
        file.write(json.dumps(row | {"reason": bad.reason}) + "\n")
  return path
