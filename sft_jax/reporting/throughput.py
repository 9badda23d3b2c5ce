"""Throughput: how fast a run is, where its time goes, memory, and profiles."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sft_jax.common import flops, workdir

# What the seconds of a run go into; the rest is 'other'.
KINDS = (
  *("start", "compile", "data_wait", "compute", "save", "evaluation"),
  *("log", "export"),
)


class Clock:
  """Seconds since a run began, and `timers`: what they went into; monotonic."""

  def __init__(self, now: Callable[[], float] = time.perf_counter):
    self._now, self._began = now, now()
    self.timers = dict.fromkeys(KINDS, 0.0)

  @property
  def seconds(self) -> float:
    return self._now() - self._began

  @contextmanager
  def on(self, kind: str) -> Iterator[None]:
    """Within, time goes into this kind; kinds do not nest."""
    began = self._now()
    try:
      yield
    finally:
      self.timers[kind] += self._now() - began

  def account(self) -> dict[str, float]:
    """{'run_s', '<kind>_s' of every kind, 'other_s'}; the kinds add up."""
    run = self.seconds
    parts = {f"{kind}_s": seconds for kind, seconds in self.timers.items()}
    return {"run_s": run, **parts, "other_s": run - sum(self.timers.values())}


class PreviousRuntime(NamedTuple):
  """What earlier processes of a run did, by its records."""

  run: float  # Seconds they ran, up to the last thing they recorded.
  useful: float  # Of them, those that computed steps which still stand.


def previous_runtime(
  kept: Sequence[Mapping[str, Any]], forgotten: Sequence[Mapping[str, Any]]
) -> PreviousRuntime:
  """Reads it from the records that stand, and those of steps to be redone."""
  none = {"time/run_s": 0.0, "speed/goodput": 0.0}
  last = [none, *(r for r in kept if "time/run_s" in r)][-1]
  every = [last, *(r for r in forgotten if "time/run_s" in r)]
  useful = last["speed/goodput"] * last["time/run_s"]
  return PreviousRuntime(every[-1]["time/run_s"], useful)


class Interruptions(NamedTuple):
  """What a run lost when it was interrupted and started again.

  Attributes:
    times: how often.
    steps: of those that were recorded, how many are taken again.
    again_s: seconds in which they were taken.
    start_s: to be ready for the next step, compiling included.
    away_s: between the last record and the new start, by the clock on the
      wall; steps that no record tells of are in it, and 0 is "not known".
  """

  times: int
  steps: int
  again_s: float
  start_s: float
  away_s: float

  def __str__(self) -> str:
    return (
      f"{self.steps} steps taken again ({self.again_s:.0f} s), starting and "
      f"compiling {self.start_s:.0f} s, away {self.away_s:.0f} s"
    )


def interruption(
  kept: Sequence[Mapping[str, Any]],
  forgotten: Sequence[Mapping[str, Any]],
  start_s: float,
  incidents: Sequence[Mapping[str, Any]] = (),
) -> Interruptions:
  """Reads it from the records that stand, those of steps to be redone, the
  seconds since this process started, and the incidents before; called as it is
  ready. What was away before an earlier start is counted there."""
  timed = lambda records: [r for r in records if "time/run_s" in r]
  stand, again = timed(kept), timed(forgotten)
  first = stand[-1] if stand else {"step": 0, "time/run_s": 0.0}
  last = (stand + again or [first])[-1]
  at = [r["time/at"] for r in (*kept, *forgotten) if "time/at" in r]
  at += [x["time"] for x in incidents if x["kind"] == "resumed"]
  gone = workdir.seconds_between(max(at), workdir.wall_clock()) if at else 0.0
  return Interruptions(
    1,
    last["step"] - first["step"],
    last["time/run_s"] - first["time/run_s"],
    start_s,
    max(0.0, gone - start_s),
  )


def lost_to_interruptions(
  incidents: Sequence[Mapping[str, Any]],
) -> Interruptions | None:
  """The sums of what was noted of each; None where there was none."""
  found = [
    [x[name] for name in Interruptions._fields]
    for x in incidents
    if x["kind"] == "resumed" and "times" in x
  ]
  return Interruptions(*map(sum, zip(*found, strict=True))) if found else None


class Throughput:
  """The figures of the steps since the last record, but for what they learn.

  The host runs ahead, so a thread notes when the device is done with what it
  was last given: from then until the next batch is there, it waits for data.
  """

  def __init__(
    self,
    clock: Clock,
    before: PreviousRuntime,
    *,
    flops_per_token: float,
    num_devices: int,
    chip: flops.Chip | None,
    published: bool,
  ):
    """Begins the first window.

    What is neither waiting for data, saving, evaluating nor writing records is
    entered as 'compute'. Without a `chip`, whose peak is known, no share is
    given; `published`: the peak is the vendor's, not what was measured here.
    """
    self._clock, self._before = clock, before
    work = {"num_devices": num_devices, "chip": chip}
    self._share = lambda rate: flops.mfu(rate, flops_per_token, **work)
    self._published = published
    self._watcher = ThreadPoolExecutor(1, "throughput")
    self._done: Future[float] | None = None
    self.begin()

  def begin(self) -> None:
    self._steps = 0
    self._began, self._was = self._clock.seconds, dict(self._clock.timers)

  def step(self, made: Any) -> None:
    """A step was handed to the device; `made` are arrays that it makes."""
    self._steps += 1
    self._done = self._watcher.submit(self._when_ready, made)

  def _when_ready(self, made: Any) -> float:
    jax.block_until_ready(made)
    return self._clock.seconds

  @contextmanager
  def waiting(self) -> Iterator[None]:
    """Within, the next batch is fetched; see above for what of it counts."""
    began = self._clock.seconds
    yield
    if self._done is None or self._done.done():
      free = began if self._done is None else max(began, self._done.result())
      self._clock.timers["data_wait"] += self._clock.seconds - free

  def close(self) -> None:
    """Lets the thread go."""
    self._watcher.shutdown(wait=False, cancel_futures=True)

  def take(self, tokens: float, trained_tokens: float) -> dict[str, float]:
    """The figures of a window whose steps are done, and its prompt and trained
    tokens; begins the next."""
    clock, window = self._clock, self._clock.seconds - self._began
    spent = {kind: s - self._was[kind] for kind, s in clock.timers.items()}
    computing = window - sum(spent.values())
    stepping = computing + spent["data_wait"]
    clock.timers["compute"] += computing
    run = self._before.run + clock.seconds
    useful = self._before.useful + clock.timers["compute"]
    values = {
      "time/step_s": stepping / self._steps,
      "time/data_wait_s": spent["data_wait"] / self._steps,
      "time/compute_s": computing / self._steps,
      "time/save_s": spent["save"],
      "time/run_s": run,
      "speed/tokens_per_s": tokens / stepping,
      "speed/trained_tokens_per_s": trained_tokens / stepping,
      "speed/goodput": useful / run,
      **memory(),
    }
    share = self._share(tokens / stepping)
    # More than was measured: the machine was busy with other work then.
    if share is not None and (share <= 1 or self._published):
      values["speed/mfu" if self._published else "speed/peak_share"] = share
    self.begin()
    return values


def memory() -> dict[str, int]:
  """The most bytes that this process has held so far, and, where devices have
  memory of their own, the fullest of them."""
  values = {}
  with suppress(ImportError):  # Windows has no such module.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    values["memory/host_peak_bytes"] = held
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [x["peak_bytes_in_use"] for x in stats if "peak_bytes_in_use" in x]
  if peaks:
    values["memory/device_peak_bytes"] = max(peaks)
  return values


class Profile:
  """Traces steps `start` to `start + steps - 1` into a folder, by the scopes of
  the code (`jax.named_scope`), on the first process alone."""

  def __init__(
    self,
    folder: Path,
    *,
    start: int,
    steps: int,
    left: range,
    log: Callable[[str], None],
  ):
    """Starts nothing yet.

    The folder is for TensorBoard's profiler, XProf or Perfetto. Steps count
    from 1; `left` are those that this process is going to take; 0 `steps` are
    none. `log` is given the place of the trace, or why there is none.

    Raises ValueError: there is no such step in any run.
    """
    if steps < 0 or start < 1:
      raise ValueError(
        f"profile: got start {start} and steps {steps}, expected start 1 or "
        "more and steps 0 (none) or more. Set both so."
      )
    self._folder, self._log, self._tracing = folder, log, False
    self._first, self._last = start, min(start + steps, left.stop) - 1
    if jax.process_index() or not steps:
      self._first = self._last = 0
    elif start not in left:
      log(
        f"profile: none, as step {start} is not one of those left, "
        f"{left.start} to {left.stop - 1}."
      )

  @contextmanager
  def step(self, number: int, state: Callable[[], Any]) -> Iterator[None]:
    """Within, the step of this number is handed to the device. A trace begins
    and ends when all that `state` gives is there, so that it holds whole steps.
    """
    if number == self._first:
      jax.block_until_ready(state())
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # Scopes, not lines of Python.
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._tracing = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield
    if self._tracing and number == self._last:
      jax.block_until_ready(state())
      self.close()

  def close(self) -> None:
    """Ends the trace, if there is one."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
      self._log(f"Profile of steps from {self._first} on: {self._folder}")
