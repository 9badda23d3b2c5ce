"""Records: what a run writes down of its steps, and what a window is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_jax.reporting import metrics, throughput, trackers
from sft_jax.training.build.build import Setup
from sft_jax.training.build.data import Config
from sft_jax.training.step_runner import Steps


class Records:
  """metrics.jsonl and its copies; a window is the steps since a record of it.

  Attributes:
    pace: of the window under way.
    last: the number of the last step that is in a record.
  """

  def __init__(
    self,
    config: Config,
    run_: Setup,
    clock: throughput.Clock,
    *,
    resume_step: int,
    say: Callable[[str], None],
  ):
    """Opens the record, forgetting what is about to be done again."""
    workdir = Path(config.workdir)
    self._run, self._clock, self.last = run_, clock, resume_step
    self._file = metrics.JsonlWriter(
      workdir / "metrics.jsonl", resume_step=resume_step
    )
    self._copies = trackers.Copies(
      config.log.writers,
      trackers.About(workdir, config.log.project, config.to_dict()),
      kept=self._file.kept,
      say=say,
    )
    self.pace = throughput.Pace(
      clock,
      throughput.lived(self._file.kept, self._file.forgotten),
      flops_per_token=run_.flops_per_token,
      num_devices=run_.mesh.size,
      chip=run_.machine.chip,
      published=run_.machine.published,
    )

  def window(self, steps: Steps) -> dict[str, Any]:
    """The figures of a window that ends here; waits for the device.

    Nothing but the steps' own, if the run halted before the window's first.
    """
    values = steps.record()
    if steps.number > self.last:
      consumed = self._run.stream.consumed(steps.number)
      values |= {
        "data/epoch": consumed.epochs,
        "data/rows_seen": consumed.rows,
        **self.pace.take(values["data/tokens"], values["data/trained_tokens"]),
      }
    return values

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes a record, and copies it; the window ends at this step."""
    self.last = step
    with self._clock.on("log"):
      self._file.write(step, values)
      self._copies.write(step, values)

  def close(self, done: bool = False) -> None:
    """Closes all; `done` says that the run has taken all its steps."""
    self.pace.close()
    self._file.close()
    with self._clock.on("log"):
      self._copies.close(done)
