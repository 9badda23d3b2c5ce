"""What every phase of a run shares: its config, folder, terminal and clock."""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from sft_jax.common.workdir import Incidents
from sft_jax.reporting import throughput
from sft_jax.training.build.data import Config, Own
from sft_jax.training.interrupts import StopRequest


class Session(NamedTuple):
  """One process's work on a run.

  Attributes:
    messages: the lines logged so far, for the report.
    clock: what the seconds went into.
    incidents: what happened that was not planned.
    stop: whether a signal asked to stop.
    own: what the caller gave in place of config keys.
  """

  config: Config
  workdir: Path
  out: Console
  messages: list[str]
  clock: throughput.Clock
  incidents: Incidents
  stop: StopRequest
  own: Own = Own()

  def log(self, message: str) -> None:
    """Prints a line, and keeps it for the report."""
    self.messages.append(message)
    self.out.print(message)

  def reject(self, message: str) -> None:
    """Logs a checkpoint that was set aside, and records it."""
    self.log(message)
    self.incidents.add("rejected", None, message)
