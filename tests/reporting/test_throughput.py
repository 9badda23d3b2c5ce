"""Throughput: each figure of speed, time and memory, by fake clocks."""

import resource

import jax.numpy as jnp
import pytest

from sft_jax.common import flops, workdir
from sft_jax.reporting import terminal, throughput

CHIP = flops.Chip("any", flops=100.0, memory=1.0)


class Time:
  """A clock that moves when it is told to."""

  def __init__(self):
    self.now = 5.0

  def __call__(self) -> float:
    return self.now


@pytest.fixture
def time() -> Time:
  return Time()


FIRST = throughput.PreviousRuntime(0.0, 0.0)


def make(time: Time, before=FIRST, published=True, chip=CHIP):
  clock = throughput.Clock(time)
  return clock, throughput.Throughput(
    clock,
    before,
    flops_per_token=3.0,
    num_devices=2,
    chip=chip,
    published=published,
  )


def done_at(one: throughput.Throughput, seconds: float) -> None:
  """The device was done with its last step so many seconds into the run."""
  one._done = throughput.Future()
  one._done.set_result(seconds)


def test_an_account_adds_up(time):
  clock = throughput.Clock(time)
  time.now += 1
  for kind, seconds in (("save", 2), ("evaluation", 4), ("save", 8)):
    with clock.on(kind):
      time.now += seconds

  def fail():
    with clock.on("export"):
      time.now += 16
      raise OSError

  with pytest.raises(OSError):
    fail()
  account = clock.account()
  assert (account["save_s"], account["evaluation_s"]) == (10, 4)
  assert (account["export_s"], account["other_s"]) == (16, 1)
  run = account.pop("run_s")
  assert run == sum(account.values()) == 31


def test_what_interruptions_cost(monkeypatch):
  """Killed after step 5 of which 3 is saved; back an hour later."""
  clock = "2026-01-01T0{}:00:{:02}+00:00".format
  made = lambda step, run: {
    "step": step,
    "time/run_s": run,
    "time/at": clock(1, int(run)),
  }
  kept = [made(2, 20.0), made(3, 30.0), {"step": 3, "time/at": clock(1, 35)}]
  again = [made(4, 40.0), made(5, 55.0)]
  monkeypatch.setattr(workdir, "wall_clock", lambda: clock(2, 55))
  lost = throughput.interruption(kept, again, start_s=100.0)
  assert lost == (1, 2, 25.0, 100.0, 3500.0)
  # Killed again before a record: what was away before is counted already.
  back = [{"kind": "resumed", "time": clock(2, 40)}]
  assert throughput.interruption(kept, [], 5.0, back).away_s == 10.0
  # Saved at the last step, by a clock that has since been put back.
  monkeypatch.setattr(workdir, "wall_clock", lambda: clock(0, 0))
  other = throughput.interruption(kept, [], start_s=9.0)
  assert other == (1, 0, 0.0, 9.0, 0.0)
  # Before any step was recorded; and by an older version.
  assert throughput.interruption([], [], 9.0) == (1, 0, 0.0, 9.0, 0.0)
  assert throughput.interruption([{"step": 1}], [], 9.0)[1:3] == (0, 0.0)
  incidents = [
    {"kind": "resumed", **one._asdict()} for one in (lost, other)
  ] + [{"kind": "resumed"}, {"kind": "halted"}]
  total = throughput.lost_to_interruptions(incidents)
  assert total == (2, 2, 25.0, 109.0, 3500.0)
  assert throughput.lost_to_interruptions(incidents[2:]) is None


def test_the_figures_of_a_window(time):
  """10 s before the window; 2 steps, 3 s of data, 5 s saving, 12 s all in all:
  of them 4 s computing, 7 s stepping."""
  clock, one = make(time)
  with clock.on("start"):
    time.now += 10
  one.begin()
  with clock.on("save"):
    time.now += 5
  for _ in range(2):
    one.step(())
  time.now += 3
  done_at(one, clock.seconds)
  with one.waiting():
    time.now += 3
  time.now += 1
  values = one.take(tokens=140, trained_tokens=35)
  held = values.pop("memory/host_peak_bytes")
  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert 0 < held <= used * 1024
  assert values == {
    "time/step_s": 3.5,
    "time/data_wait_s": 1.5,
    "time/compute_s": 2.0,
    "time/save_s": 5.0,
    "time/run_s": 22.0,
    "speed/tokens_per_s": 20.0,
    "speed/trained_tokens_per_s": 5.0,
    "speed/mfu": pytest.approx(20.0 * 3 / (2 * 100)),
    "speed/goodput": pytest.approx(4 / 22),
  }
  # The next window has nothing of this one.
  one.step(())
  time.now += 6
  values = one.take(tokens=6, trained_tokens=6)
  assert values["time/step_s"] == values["time/compute_s"] == 6.0
  assert values["time/save_s"] == values["time/data_wait_s"] == 0.0
  assert values["speed/goodput"] == pytest.approx(10 / 28)
  one.close()


def test_only_an_idle_device_waits_for_data(time):
  """Of 4 s of fetching: all, a part, nothing where it is still at work."""
  clock, one = make(time)
  for done, waited in ((-1.0, 4.0), (3.0, 1.0), (None, 0.0)):
    before = clock.timers["data_wait"]
    if done is None:
      one._done = throughput.Future()
    else:
      done_at(one, clock.seconds + done)
    with one.waiting():
      time.now += 4
    assert clock.timers["data_wait"] - before == waited
  one.close()


def test_a_step_is_done_when_its_arrays_are(time):
  clock, one = make(time)
  time.now += 2
  one.step({"loss": jnp.ones(3) * 2})
  assert one._done is not None
  assert one._done.result(timeout=60) == clock.seconds
  one.close()


def test_a_measured_peak_has_another_name(time):
  _, one = make(time, published=False)
  one.step(())
  time.now += 1
  values = one.take(tokens=10, trained_tokens=1)
  assert values["speed/peak_share"] == pytest.approx(10 * 3 / 200)
  assert "speed/mfu" not in values
  # The machine was busy when it was measured.
  one.step(())
  time.now += 1
  assert "speed/peak_share" not in one.take(tokens=67, trained_tokens=1)
  one.close()


def test_an_unknown_peak_gives_no_share(time):
  _, one = make(time, chip=None)
  one.step(())
  time.now += 1
  values = one.take(tokens=10, trained_tokens=1)
  assert not values.keys() & {"speed/peak_share", "speed/mfu"}
  assert "peak" not in terminal.figures(values | {"loss/nats_per_token": 1.0})
  one.close()


def test_goodput_goes_on_over_restarts(time):
  """100 s of runtime, 40 s of them computing steps that stand; 20 s of others
  are lost with the steps that are taken again."""
  record = lambda step, run, goodput: {
    "step": step,
    "time/run_s": run,
    "speed/goodput": goodput,
  }
  kept = [record(1, 30.0, 0.5), record(2, 80.0, 0.5), {"step": 2, "x": 1.0}]
  forgotten = [record(3, 100.0, 0.6)]
  before = throughput.previous_runtime(kept, forgotten)
  assert before == (100.0, 40.0)
  assert throughput.previous_runtime(kept, []) == (80.0, 40.0)
  assert throughput.previous_runtime([], []) == (0.0, 0.0)
  clock, one = make(time, before)
  with clock.on("compile"):
    time.now += 50
  one.begin()
  one.step(())
  time.now += 20
  values = one.take(tokens=1, trained_tokens=1)
  assert values["time/run_s"] == 170.0
  assert values["speed/goodput"] == pytest.approx(60 / 170)
  one.close()


def test_memory_of_the_fullest_device(monkeypatch):
  class Device:
    def __init__(self, peak):
      self.peak = peak

    def memory_stats(self):
      return self.peak and {"peak_bytes_in_use": self.peak}

  devices = [Device(7), Device(9), Device(None)]
  monkeypatch.setattr(throughput.jax, "local_devices", lambda: devices)
  assert throughput.memory()["memory/device_peak_bytes"] == 9
  monkeypatch.setattr(throughput.jax, "local_devices", lambda: devices[2:])
  assert "memory/device_peak_bytes" not in throughput.memory()
