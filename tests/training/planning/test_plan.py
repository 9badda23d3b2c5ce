"""Plans: what is predicted against what is known, and the search."""

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peak_memory
import tiny
from sft_jax.common import machines, sharding, trees
from sft_jax.models.config import parse_config
from sft_jax.training.build import abstract, build
from sft_jax.training.planning import plan


def outline_of(tmp_path, machine, shape=tiny.SHAPE, **changes):
  changes = {"batch_size": 8, "mesh__data": -1} | changes
  config = tiny.config(tmp_path, tmp_path, tmp_path, **changes)
  mesh = sharding.make_mesh(**config.mesh, devices=machine.devices)
  return config, abstract.outline(config, parse_config(dict(shape)), mesh)


def test_memory_by_kind(tmp_path):
  machine = machines.find_machine("cpu:4")
  _, outline = outline_of(tmp_path, machine, mesh__fsdp=4, mesh__data=1)
  found = plan.plan(outline, machine, model_flops=1.0)
  memory, whole = found.memory, trees.count(outline.params)
  # Four devices share all but the norms, which are small.
  assert 4 * whole / 4 < memory.trained < 1.05 * 4 * whole / 4
  assert memory.frozen == 0
  assert memory.gradients == memory.trained
  assert memory.optimizer == pytest.approx(2 * memory.trained, rel=0.01)
  assert sum(memory[:-1]) >= memory.total > memory.trained + memory.optimizer
  assert found.fits
  assert found.traffic
  assert found.times is not None
  assert found.times.bound == "compute"
  assert found.flops > found.model_flops == 1.0


def test_recomputing_keeps_less_and_executes_more(tmp_path):
  machine = machines.find_machine("cpu")
  plans = [
    plan.plan(outline_of(tmp_path, machine, model__remat=remat)[1], machine)
    for remat in ("none", "full")
  ]
  kept, recomputed = plans
  assert recomputed.memory.activations < 0.2 * kept.memory.activations
  assert recomputed.flops > 1.1 * kept.flops


@pytest.mark.slow
@pytest.mark.skipif(
  not Path("/proc/self/clear_refs").exists(), reason="reads Linux's accounts"
)
@pytest.mark.parametrize("case", peak_memory.CASES)
def test_what_is_predicted_is_what_a_step_takes(case):
  """The compiler's figure, and by how much Linux sees the process grow."""
  root = Path(__file__).parents[3]
  folders = (root, root / "tests" / "support")
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  environment["PYTHONPATH"] = ":".join(map(str, folders))
  done = subprocess.run(
    [sys.executable, "tests/support/peak_memory.py", case],
    cwd=root,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  predicted, taken = map(int, done.stdout.split()[-2:])
  assert predicted / taken == pytest.approx(1, abs=0.1)


def test_what_a_tpu_asks_for_in_vain():
  message = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    "for HLO temporaries (37.50G) exceeds available HBM (15.75G)."
  )
  assert plan.needed(message) == 37.5 * 2**30
  assert plan.needed("INTERNAL: something else") is None


def test_alternatives_are_configs_of_their_own(tmp_path):
  config, outline = outline_of(
    tmp_path, machines.find_machine("cpu:2"), batch_size=16, model__remat="none"
  )
  names = []
  for change in plan.alternatives(config, outline.mesh.shape):
    other = plan.changed(config, change.keys)
    names.append(change.name)
    assert other.to_json() != config.to_json()
    assert other.batch_size == config.batch_size
    build.check_batch_size(
      other, sharding.make_mesh(**other.mesh, devices=jax.devices()[:2])
    )
  assert any("remat" in name for name in names)
  assert any("accum_steps" in name for name in names)
  assert any("fsdp" in name for name in names)


@settings(deadline=None)
@given(
  st.integers(0, 100),
  st.floats(0, 10),
  st.floats(1, 1.5),
  st.integers(1, 10_000),
)
def test_the_largest_batch(fixed, each, power, limit):
  total = lambda n: fixed + each * n**power
  trials = []

  def tried(n):
    trials.append(n)
    return total(n)

  found = plan.largest_batch(tried, limit, most=1000)
  assert found == max(
    (n for n in range(1, 1001) if total(n) <= limit), default=0
  )
  assert len(trials) == len(set(trials)) <= 60


def test_four_trials_find_a_straight_line():
  trials = []
  found = plan.largest_batch(lambda n: trials.append(n) or 10 + 7 * n, 1000)
  assert found == 141
  assert len(trials) <= 6


def test_a_tpu_elsewhere(tmp_path):
  """Compiled by the TPUs' own compiler, with the kernel that is theirs."""
  pytest.importorskip("libtpu", reason="needs the [tpu] extra")
  machine = machines.find_machine("v5e:2x2")
  changes = {"data__seq_len": 128, "model__dtype": "bfloat16"}
  _, outline = outline_of(
    tmp_path, machine, mesh__fsdp=4, mesh__data=1, **changes
  )
  # The tests' own precision, float32 in several passes, is none of the
  # kernel's for bfloat16.
  with jax.default_matmul_precision("default"):
    found = plan.plan(outline, machine, quick=True)
  assert found.fits
  assert "tpu_custom_call" in found.text  # Splash attention.
  assert found.traffic
  assert all(one.exact for one in found.traffic.values())
  assert found.times is not None
  assert all(x is not None and x > 0 for x in found.times[:3])
  assert found.times.slices == 0
  assert not math.isnan(found.times.step)
