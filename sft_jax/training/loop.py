"""The training loop: batches in, steps taken, records and checkpoints out."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import jax

from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.checkpointing.resume import Resumed, split_stored
from sft_jax.common import distributed, sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.data.audit.summary import step_rows
from sft_jax.evals.suite import Suite
from sft_jax.inference import on_policy
from sft_jax.models.lora import base_model
from sft_jax.reporting import terminal, throughput
from sft_jax.step.train_step import (
  TrainState,
  model_params,
  split_micro_batches,
)
from sft_jax.training import step_runner
from sft_jax.training.build.build import BuiltRun
from sft_jax.training.build.data import Config
from sft_jax.training.build.outputs import find_origin, followed_metric
from sft_jax.training.interrupts import Stopped, Watchdog
from sft_jax.training.recorder import Records
from sft_jax.training.session import Session
from sft_jax.training.step_runner import BadStep, SpikeDetector, StepRunner


class LoopState(NamedTuple):
  """What the loop remembers besides arrays; a checkpoint's JSON holds it.

  Attributes:
    losses: [step, nats per token] of recent steps, for `SpikeDetector`.
    skipped: bad steps skipped so far.
    chain: the row chain; see `digests.extend_chain`.
    best: the best figure of an evaluation, for `Patience`.
    since_best: evaluations since then.
  """

  losses: Sequence[list[float]] = ()
  skipped: int = 0
  chain: str = ""
  best: float | None = None
  since_best: int = 0


class Patience:
  """Early stopping: counts evaluations in a row without a better figure.

  A function of the scores alone, so a resumed run stops where the
  uninterrupted run would have.
  """

  def __init__(
    self,
    limit: int,
    *,
    lowest: bool,
    best: float | None = None,
    since_best: int = 0,
  ) -> None:
    """Ends training after `limit` evaluations; 0 = never. The rest as it is in
    a `LoopState`; `lowest`: whether lower is better."""
    self.limit, self._lowest = limit, lowest
    self.best, self.since_best = best, since_best

  def add(self, score: float) -> None:
    """Another evaluation; an equal figure is no better one."""
    sign = 1 if self._lowest else -1
    if self.best is None or sign * score < sign * self.best:
      self.best, self.since_best = score, 0
    else:
      self.since_best += 1

  @property
  def exhausted(self) -> bool:
    """True once training ends."""
    return 0 < self.limit <= self.since_best


def train_steps(
  session: Session,
  built: BuiltRun,
  resumed: Resumed,
  checkpoints: Checkpoints,
  suite: Suite,
) -> TrainState:
  """Takes the steps that are left, or as many as eval.patience allows.

  Returns the last state.

  Raises:
    FloatingPointError: at a bad step, where the run halts; the state before
      it is saved.
    OSError: a checkpoint could not be saved.
    Stopped: after the step during which a signal came; it is saved.
  """
  if is_finished(session.config, built, resumed):
    if step := int(resumed.state.step):
      session.incidents.add("resumed", step, f"at step {step}")
    return resumed.state
  loop = _Loop(session, built, resumed, checkpoints, suite)
  with loop.opened():
    while not loop.ended:
      loop.take_step()
      loop.record()
      loop.evaluate()
      loop.save_if_due()
    loop.finish()
  loop.raise_if_cut_short()
  return loop.runner.state


def is_finished(config: Config, built: BuiltRun, resumed: Resumed) -> bool:
  """Whether no step is left to take."""
  patience = make_patience(config, LoopState(**resumed.loop))
  return int(resumed.state.step) >= built.num_steps or patience.exhausted


def make_patience(config: Config, state: LoopState) -> Patience:
  """The patience of a run that has come as far as this state."""
  return Patience(
    config.eval.patience,
    lowest=config.checkpoint.best_is == "lowest",
    best=state.best,
    since_best=state.since_best,
  )


class _Due(NamedTuple):
  """What follows a step."""

  record: bool
  evaluation: bool
  gap: bool
  save: bool
  copy: bool


class _Loop:
  """The phases of a step, and what passes from one to the next."""

  def __init__(
    self,
    session: Session,
    built: BuiltRun,
    resumed: Resumed,
    checkpoints: Checkpoints,
    suite: Suite,
  ):
    """Reads the first batch and compiles the step; donates the state."""
    self._session, self._config = session, session.config
    self._built, self._checkpoints, self._suite = built, checkpoints, suite
    self._start = self._saved = int(resumed.state.step)
    own = sharding.own_rows(
      built.mesh, self._config.batch_size, parts=self._config.accum_steps
    )
    self._own_rows, self._on_policy = own, None
    # Not in older workdirs.
    if every := self._config.get("distill", {}).get("every", 0):
      self._on_policy = on_policy.OnPolicy(
        *(built.stream, built.model, built.tokenizer),
        every=every,
        seed=self._config.seed,
        folder=session.workdir / "on_policy",
        mesh=built.mesh,
      )
    self._batches = built.stream.batches(self._start, own)
    state = LoopState(**resumed.loop)
    self._patience = make_patience(self._config, state)
    faults = self._config.faults
    self._detector = SpikeDetector(
      faults.spike_factor,
      faults.skip_limit if faults.on_bad_step == "skip" else 0,
      losses=list(state.losses),
      skipped=state.skipped,
    )
    self._watchdog = Watchdog(faults.hang_seconds)
    with self._watchdog, session.clock.on("data_wait"):
      self._batch = self._next_batch(resumed.state, self._start)
    self._records = Records(session, built, resume_step=self._start)
    self._records.check_chain(state.chain)
    self.runner = self._compile(resumed.state, state.chain)
    extended = self._config.optim.extended
    self._records.note_start(
      extended=bool(extended) and extended[-1][0] == self._start
    )
    self._agreement = distributed.Agreement(
      built.mesh, behind=step_runner.IN_FLIGHT
    )
    self._last = self._stopping = False
    self._values: dict[str, Any] = {}
    self._score: float | None = None

  def _compile(self, state: TrainState, chain: str) -> StepRunner:
    out, clock = self._session.out, self._session.clock
    out.print("Compiling the training step ...")
    with clock.on("compile"):
      runner = StepRunner(
        self._built.train_step,
        state,
        self._batch,
        detector=self._detector,
        chain=chain,
        on_skip=lambda bad: out.print(
          f"Step {bad.step} is skipped: {self._note_bad_step('skipped', bad)}."
        ),
      )
    done = "Found compiled, read" if runner.found else "Compiled"
    whole, temporary = runner.program.memory, runner.program.temporaries
    out.print(
      f"{done} in {clock.timers['compile']:.1f} s. A device holds "
      f"{whole / 1e9:.3f} GB while it steps, {temporary / 1e9:.3f} of it "
      "activations and other temporary arrays."
    )
    return runner

  @contextmanager
  def opened(self) -> Iterator[None]:
    """Within, steps are recorded, watched and stopped only between two."""
    session = self._session
    self._progress = terminal.StepProgress(
      session.out, total=self._built.num_steps, start=self._start
    )
    self._profile = throughput.Profile(
      session.workdir / "profile",
      **self._config.profile,
      left=range(self._start + 1, self._built.num_steps + 1),
      log=session.out.print,
    )
    with (
      closing(self._records),
      closing(self._progress),
      closing(self._profile),
      session.stop.deferred(),
      self._watchdog,
    ):
      self._records.throughput.begin()
      yield

  @property
  def ended(self) -> bool:
    """Whether no further step is taken."""
    return (
      self._last
      or self._stopping
      or self._patience.exhausted
      or self.runner.halted is not None
    )

  def _next_batch(self, state: TrainState, number: int) -> Batch:
    """The batch after so many steps, which led to this state."""
    if self._on_policy:
      params = trees.merge(state.params, state.frozen)
      batch = self._on_policy.batch(
        number, base_model.own(params), self._own_rows
      )
    else:
      batch = next(self._batches)
    cut = split_micro_batches(batch, self._config.accum_steps)
    rows = sharding.row_sharding(self._built.mesh, leading_axes=1)
    return sharding.put_rows(cut, rows)

  def take_step(self) -> None:
    """Submits a step, and reads the next batch while the device works."""
    self._checkpoints.check()
    with self._profile.step(self.runner.number + 1, lambda: self.runner.state):
      self.runner.submit(self._batch)
    self._records.throughput.step(self.runner.newest)
    self._watchdog.reset()
    # Read once: a signal that comes later is obeyed at the next step.
    self._last = self.runner.number == self._built.num_steps
    self._stopping = self._agreement(self._session.stop.requested)
    if not self._last:
      with self._records.throughput.waiting():
        self._batch = self._next_batch(self.runner.state, self.runner.number)
    self._due = self._find_due(self.runner.number)

  def _find_due(self, step: int) -> _Due:
    config = self._config
    ends_epoch = self._ends_epoch(step)
    evaluation = _divides(config.eval.every, step)
    if config.eval.patience and not config.eval.every:
      evaluation = ends_epoch
    if self._last:
      # The last state is measured after training; with patience now, too, as
      # one of those that the best is chosen from.
      evaluation = config.eval.patience > 0
    gap = self._built.train_rows is not None and ends_epoch
    # What is compared with the best so far is saved, to be found again.
    scored = evaluation and bool(followed_metric(config))
    saves = _divides(config.checkpoint.every, step) or scored
    save = self._last or self._stopping or saves
    # Not in older workdirs.
    copies = _divides(config.checkpoint.get("local_every", 0), step)
    # A record ends where a checkpoint is made: a resumed run then writes the
    # very records that the uninterrupted run would have written.
    often = copies or _divides(config.log.every, step)
    record = save or evaluation or gap or often
    return _Due(record, evaluation, gap, save, copies and not save)

  def _ends_epoch(self, step: int) -> bool:
    """True at the first step that completes a pass over the data."""
    passes = lambda step: int(step / self._built.stream.steps_per_epoch)
    return self._last or passes(step) > passes(step - 1)

  def record(self) -> None:
    """Writes the record of the steps since the last one, where one is due."""
    runner = self.runner
    if self._due.record or runner.halted:
      self._values = self._records.window(runner)
      if not runner.halted:
        self._records.write(runner.number, self._values)
        self._progress.update(runner.number, self._values)

  def evaluate(self) -> None:
    """Measures the model, where that is due."""
    self._score = None
    if self.runner.halted or not (self._due.evaluation or self._due.gap):
      return
    step, state = self.runner.number, self.runner.state
    params = model_params(state)
    with self._session.clock.on("evaluation"):
      if self._due.evaluation:
        replies = self._session.workdir / "evals" / f"step_{step}.jsonl"
        all_ = self._config.eval.during == "all"
        values = self._suite.scalars(params, replies=replies if all_ else None)
        self._score = _find_score(followed_metric(self._config), values)
      else:
        values = self._suite.losses(params)
    self._records.write(step, values)
    if self._score is not None:
      self._patience.add(self._score)
    self._watchdog.reset()
    # Evaluation takes time: a signal that came meanwhile is not kept waiting.
    asked = self._agreement(self._session.stop.requested)
    self._stopping = asked or self._stopping

  def save_if_due(self) -> None:
    """Starts a checkpoint, or a copy, where one is due."""
    save = self._due.save or self._stopping
    if not self.runner.halted and (save or self._due.copy):
      self._save(copy=not save)
      self._watchdog.reset()
    self._records.flush()

  def _save(self, *, copy: bool = False) -> None:
    own, beside = split_stored(self.runner.state)
    state = LoopState(
      losses=list(self._detector.losses),
      skipped=self._detector.skipped,
      chain=self.runner.chain,
      best=self._patience.best,
      since_best=self._patience.since_best,
    )
    origin = find_origin(self._config, self._built, self._session.own)
    meta = {**origin._asdict(), "loop": state._asdict()}
    step = self.runner.number
    with self._session.clock.on("save"):
      if copy:
        self._checkpoints.copy(step, own, meta, beside=beside)
        return
      self._saved = step
      self._checkpoints.save(step, own, meta, beside=beside, score=self._score)

  def finish(self) -> None:
    """Records and saves what a halted run reached; waits for the disk."""
    runner, halted = self.runner, self.runner.halted
    if halted and runner.number > self._records.last:
      self._records.write(runner.number, self._values)
    if halted and runner.number > self._saved:
      self._score = None
      self._save()
    with self._session.clock.on("save"):
      self._checkpoints.wait()
    done = (self._last or self._patience.exhausted) and not halted
    self._records.close(done=done)

  def raise_if_cut_short(self) -> None:
    """Raises FloatingPointError or Stopped unless all steps were taken."""
    step = self.runner.number
    if bad := self.runner.halted:
      raise FloatingPointError(
        f"step {bad.step}: {self._note_bad_step('halted', bad)}, expected a "
        "finite loss without a spike. It was not applied; the state after "
        f"step {step} is saved. Look at the rows (sft-jax replay), lower "
        "optim.learning_rate, or set faults.on_bad_step=skip and continue "
        "with --force."
      )
    if self._stopping and not self._last:
      line = "by a signal; its state is saved"
      self._session.incidents.add("stopped", step, line)
      stopped = Stopped(
        f"stopped by signal after step {step}, which is saved. Run the same "
        "command again to continue from there."
      )
      stopped.agreed = True
      raise stopped
    self._session.stop.obey()  # One that came with the last step.

  def _note_bad_step(self, kind: str, bad: BadStep) -> str:
    """Keeps the rows of a bad step for people; says where they are."""
    path = self._session.workdir / "bad_batch.jsonl"
    if jax.process_index() == 0:
      rows = step_rows(self._built.stream, self._built.tokenizer, bad.step)
      lines = (json.dumps(row | {"reason": bad.reason}) + "\n" for row in rows)
      with path.open("a") as file:
        file.writelines(lines)
    message = f"{bad.reason}; its rows are in {path}"
    self._session.incidents.add(kind, bad.step, message)
    return message


def _divides(every: int, step: int) -> bool:
  """True at each `every`-th step; never for 0."""
  return every > 0 and step % every == 0


def _find_score(name: str, values: dict[str, Any]) -> float | None:
  """The figure that `checkpoint.keep_best` compares."""
  if not name:
    return None
  if name not in values:
    raise ValueError(
      f"checkpoint.keep_best: got {name!r}, expected one of {sorted(values)}, "
      "what is measured while training. Name one of these. (With eval.patience "
      "it is the held-out loss by default, and needs held-out rows.)"
    )
  return float(values[name])
