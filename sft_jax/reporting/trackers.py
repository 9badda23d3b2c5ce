"""Writers: copies of a run's records for TensorBoard, W&B and MLflow.

metrics.jsonl is the record; each writer remembers in workdir/writers.json how
far it has copied it. A resumed run continues the same run of W&B or MLflow,
steps are not copied twice, and what could not be sent is sent later.
"""

import importlib.util
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from sft_jax.common import trees
from sft_jax.common.workdir import find_json, write_json
from sft_jax.reporting.terminal import visible


class Writer(Protocol):
  """Takes the figures of one step after another; `identity` is of the run it
  has opened, '' if it needs none."""

  identity: str

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Takes finite numbers by name; a step may come twice, with other names."""

  def close(self, done: bool) -> None:
    """Ends; `done` says that the run has taken all its steps."""


class About(NamedTuple):
  workdir: Path  # Of the run; its name is the run's.
  project: str  # W&B's project, MLflow's experiment.
  config: Mapping[str, Any]  # Nested, as in config.json.


class TensorBoard:
  """Event files in workdir/tensorboard, one per start, by tensorboardX."""

  def __init__(self, about: About, identity: str):
    """Opens the next file.

    Its `SummaryWriter` is passed over: it writes from a thread, minutes late,
    and two starts within a second would share a file.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2

    self.identity = identity
    self._event: Any = vars(event_pb2)["Event"]
    self._summary: Any = vars(summary_pb2)["Summary"]
    folder = about.workdir / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len(list(folder.glob("events.out.tfevents.*")))
    self._file = EventsWriter(str(folder / "events"), f".{number}")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    # Down to the operating system.
    make = self._summary.Value
    figures = [make(tag=x, simple_value=value) for x, value in values.items()]
    summary = self._summary(value=figures)
    event = self._event(wall_time=time.time(), step=step, summary=summary)
    self._file.write_event(event)
    self._file.flush()

  def close(self, done: bool) -> None:
    del done
    self._file.close()


class Wandb:
  """A run of Weights & Biases, by its own client; WANDB_MODE=offline works."""

  def __init__(self, about: About, identity: str):
    """Opens the run of this id, or begins it."""
    import wandb  # pyright: ignore[reportMissingImports]

    self.identity = identity or uuid.uuid4().hex[:12]
    self._run = wandb.init(
      id=self.identity,
      resume="allow",
      project=about.project,
      name=visible(about.workdir.name),
      dir=about.workdir,
      config=dict(about.config),
      # The terminal is ours.
      settings=wandb.Settings(console="off"),
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def close(self, done: bool) -> None:
    self._run.finish(exit_code=0 if done else 1)


class Mlflow:
  """A run of MLflow, where MLFLOW_TRACKING_URI says."""

  def __init__(self, about: About, identity: str):
    """Opens the run of this id, or begins it."""
    import mlflow  # pyright: ignore[reportMissingImports]
    from mlflow import entities  # pyright: ignore[reportMissingImports]

    self._client = mlflow.MlflowClient()
    self._metric = entities.Metric
    self.identity = identity
    if identity:
      self._client.update_run(identity, status="RUNNING")
      return
    client, name = self._client, visible(about.workdir.name)
    found = client.get_experiment_by_name(about.project)
    made = found.experiment_id if found else None
    made = made or client.create_experiment(about.project)
    self.identity = client.create_run(made, run_name=name).info.run_id
    flat = trees.flatten(dict(about.config))
    params = [
      entities.Param(key.replace("/", "."), str(value)[:_MLFLOW_VALUE])
      for key, value in flat.items()
    ]
    for i in range(0, len(params), _MLFLOW_PARAMS):
      client.log_batch(self.identity, params=params[i : i + _MLFLOW_PARAMS])

  def write(self, step: int, values: Mapping[str, float]) -> None:
    now, named = round(time.time() * 1000), _MLFLOW_NAME.sub
    pairs = ((named("_", name), value) for name, value in values.items())
    metrics = [self._metric(*pair, now, step) for pair in pairs]
    self._client.log_batch(self.identity, metrics=metrics)

  def close(self, done: bool) -> None:
    status = "FINISHED" if done else "KILLED"
    self._client.set_terminated(self.identity, status)


# What MLflow does not take in a metric's name, which must be a path in its
# plainest form; and what it takes of a parameter's value, and of them at once.
_MLFLOW_NAME = re.compile(r"[^\w\-. /:]|\.\.|(?<=/)/|(?<=/)\.(?=/)")
_MLFLOW_VALUE = 500
_MLFLOW_PARAMS = 100

WRITERS: dict[str, Callable[[About, str], Writer]] = {
  "tensorboard": TensorBoard,
  "wandb": Wandb,
  "mlflow": Mlflow,
}


def register_writer(name: str, writer: Callable[[About, str], Writer]) -> None:
  """Adds a writer, for `log.writers` and writers.json to name.

  It is made of what there is to know of the run, and the identity of an earlier
  start or ''. Raises ValueError: the name is taken.
  """
  if name in WRITERS:
    raise ValueError(
      f"register_writer: got {name!r}, expected a name that is free; taken are "
      f"{', '.join(WRITERS)}. Choose another."
    )
  WRITERS[name] = writer


# What must be installed; the extra has the same name.
_PACKAGES = ("wandb", "mlflow")


def check(names: Sequence[str]) -> None:
  """Raises ValueError unless each is a writer that can be had here."""
  if isinstance(names, str) or any(name not in WRITERS for name in names):
    raise ValueError(
      f"log.writers: got {names!r}, expected a tuple of some of "
      f"{tuple(WRITERS)}. Set it to ('tensorboard',), say, or to ()."
    )
  for name in names:
    if name in _PACKAGES and importlib.util.find_spec(name) is None:
      raise ValueError(
        f"log.writers: got {name!r}, and there is no package {name}, expected "
        f"it to be installed: pip install 'sft_jax[{name}]'; or leave it out."
      )


# (step, how many records of it): how far a writer has copied.
_Place = tuple[int, int]


class Copies:
  """All writers of a run, behind its record."""

  def __init__(
    self,
    names: Sequence[str],
    about: About,
    *,
    kept: Iterable[Mapping[str, Any]],
    log: Callable[[str], None],
  ):
    """Opens the writers and has them catch up on the kept records.

    The first process only; `log` is given a line when a writer fails, and when
    it works again.
    """
    self._log, self._path = log, about.workdir / "writers.json"
    self._at: _Place = (-1, 0)
    self._state: dict[str, dict[str, Any]] = {}
    self._writers: dict[str, Writer] = {}
    self._waiting: dict[str, list[tuple[_Place, dict[str, float]]]] = {}
    if jax.process_index():
      return
    check(names)
    self._state = find_json(self._path) or {}
    for name in names:
      state = self._state.setdefault(name, {"run": "", "copied": [-1, 0]})
      try:
        self._writers[name] = WRITERS[name](about, state["run"])
      # Of somebody else's client: no account, no server, a run deleted.
      except Exception as error:
        raise ValueError(
          f"log.writers: {name} could not begin ({type(error).__name__}: "
          f"{error}), expected it to take this run. Set it up, or leave it out."
        ) from error
      self._waiting[name] = []
      state["run"] = self._writers[name].identity
    write_json(self._path, self._state)
    for record in kept:
      values = {name: x for name, x in record.items() if name != "step"}
      self.write(record["step"], values)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Copies a record's finite numbers; texts are the record's alone.

    A writer that fails does not end the run: a line says so, and its records
    wait for the next time.
    """
    self._at = (step, self._at[1] + 1 if step == self._at[0] else 1)
    numbers = {
      visible(name): float(x)
      for name, x in values.items()
      if isinstance(x, int | float) and math.isfinite(x)
    }
    for name, waiting in self._waiting.items():
      if self._at > tuple(self._state[name]["copied"]):
        waiting.append((self._at, numbers))
        self._send(name, waiting)

  def _send(self, name: str, waiting: list) -> None:
    late = len(waiting) > 1
    try:
      while waiting:
        place, numbers = waiting[0]
        self._writers[name].write(place[0], numbers)
        waiting.pop(0)
        self._state[name]["copied"] = list(place)
    # Of somebody else's client and network; whatever it is, training goes on.
    except Exception as error:
      if not late:
        self._log(
          f"log.writers: {name} failed at step {waiting[0][0][0]} "
          f"({type(error).__name__}: {error}). Its records wait; "
          "metrics.jsonl has them all."
        )
    else:
      if late:
        self._log(f"log.writers: {name} has all records again.")
    write_json(self._path, self._state)

  def close(self, done: bool = False) -> None:
    """Ends all writers; `done` says that the run has taken all its steps."""
    for name, writer in self._writers.items():
      if self._waiting[name]:
        self._send(name, self._waiting[name])
      try:
        writer.close(done)
      except Exception as error:
        why = f"({type(error).__name__}: {error})"
        self._log(f"log.writers: {name} did not end well {why}.")
      if unsent := len(self._waiting[name]):
        lacks = f"{name} lacks {unsent} records; metrics.jsonl has them."
        self._log(f"log.writers: {lacks}")
    self._writers, self._waiting = {}, {}
