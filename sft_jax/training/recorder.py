"""Records: the metrics of windows of steps, written to metrics.jsonl."""

from typing import Any

import jax

from sft_jax.reporting import metrics, throughput, trackers
from sft_jax.training.build.build import BuiltRun
from sft_jax.training.session import Session
from sft_jax.training.step_runner import StepRunner


class Records:
  """metrics.jsonl and its copies; a window is the steps since the last record.

  Attributes:
    throughput: that of the window in progress.
    last: the number of the last step that is in a record.
  """

  def __init__(self, session: Session, built: BuiltRun, *, resume_step: int):
    """Opens the record, forgetting the steps that are about to be repeated."""
    config, workdir = session.config, session.workdir
    self._built, self._clock, self.last = built, session.clock, resume_step
    self._on_record, self._record = session.own.on_record, {}
    self._path, self._incidents = workdir / "metrics.jsonl", session.incidents
    self._log = session.log
    self._file = metrics.JsonlWriter(self._path, resume_step=resume_step)
    self._copies = trackers.Copies(
      config.log.writers,
      trackers.About(workdir, config.log.project, config.to_dict()),
      kept=self._file.kept,
      log=session.out.print,
    )
    self.throughput = throughput.Throughput(
      session.clock,
      throughput.previous_runtime(self._file.kept, self._file.forgotten),
      flops_per_token=built.flops_per_token,
      num_devices=built.mesh.size,
      chip=built.machine.chip if built.machine.peak_known else None,
      published=built.machine.published,
    )

  def note_start(self, *, extended: bool) -> None:
    """Records what it cost, if the run was interrupted before; all is ready
    for the next step. A run that had ended and is extended was not."""
    kept, forgotten = self._file.kept, self._file.forgotten
    if extended:
      self._incidents.add("resumed", self.last, f"at step {self.last}")
    elif self.last or forgotten:
      cost = throughput.interruption(
        kept, forgotten, self._clock.seconds, self._incidents.read()
      )
      message = f"at step {self.last}; {cost}"
      self._incidents.add("resumed", self.last, message, **cost._asdict())

  def check_chain(self, chain: str) -> None:
    """Compares the records with the checkpoint that a run resumes from.

    Raises ValueError: the last record is of other rows: one of the two was
    copied from another run.
    """
    if not self.last or jax.process_index():
      return
    at = [r for r in self._file.kept if r["step"] == self.last]
    there = [r["data/chain"] for r in at if "data/chain" in r]
    if not there:
      message = f"{self._path}: has no record of step {self.last}"
      self._log(f"warning: {message}; the curves have a gap before it.")
      self._incidents.add("records lost", self.last, message)
    elif there[-1] != chain:
      self.close()
      raise ValueError(
        f"{self._path}: its records up to step {self.last} are of other rows "
        f"(chain {there[-1]}) than the checkpoint ({chain}), expected those "
        "of one run. Put the right file back, or delete metrics.jsonl."
      )

  def window(self, runner: StepRunner) -> dict[str, Any]:
    """The metrics of a window that ends here; waits for the device.

    Nothing but the steps' own, if the run halted before the window's first.
    """
    values = runner.collect()
    if runner.number > self.last:
      consumed = self._built.stream.consumed(runner.number)
      values |= {"data/epoch": consumed.epochs, "data/rows_seen": consumed.rows}
      tokens = ("data/tokens", "data/trained_tokens")
      values |= self.throughput.take(*(values[name] for name in tokens))
    return values

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes a record, and copies it; the window ends at this step."""
    self.last = step
    with self._clock.on("log"):
      self._file.write(step, values)
      self._copies.write(step, values)
      if step != self._record.get("step"):
        self.flush()
      self._record |= {"step": step, **values}

  def flush(self) -> None:
    """Hands the caller all that was recorded of a step, once."""
    record, self._record = self._record, {}
    if record and self._on_record and jax.process_index() == 0:
      self._on_record(record)

  def close(self, done: bool = False) -> None:
    """Closes all; `done` says that the run has taken all its steps."""
    try:
      self.flush()
    finally:
      self.throughput.close()
      self._file.close()
      with self._clock.on("log"):
        self._copies.close(done)
