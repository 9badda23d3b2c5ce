"""Machines by name: who they are, and what is refused."""

import importlib.util

import jax
import pytest

from sft_jax.common import flops, machines


def test_this_machine():
  found = machines.find_machine("")
  assert list(found.devices) == jax.devices()
  assert found.chip.memory > 1e8
  assert not found.estimate


def test_processors_share_the_memory_of_the_machine():
  one, four = machines.find_machine("cpu"), machines.find_machine("cpu:4")
  assert len(four.devices) == 4
  assert one.chip.memory == 4 * four.chip.memory


def test_a_gpu_is_an_estimate():
  found = machines.find_machine("gpu-80GB:8")
  assert len(found.devices) == 8
  assert found.chip == flops.CHIPS["H100"]
  assert "an estimate" in found.estimate


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("tpu", "expected a TPU slice"),
    ("cpu:0", "expected a TPU slice"),
    ("gpu", "expected a TPU slice"),
    ("gpu-81GB", "gpu-80GB"),
    ("cpu:4096", "at most 8"),
  ],
)
def test_refused(name, message):
  with pytest.raises(ValueError, match=message):
    machines.find_machine(name)


def test_a_slice_of_tpus():
  pytest.importorskip("libtpu", reason="needs the [tpu] extra")
  found = machines.find_machine("v5e:2x4")
  assert len(found.devices) == 8
  assert found.chip.name == "TPU v5e"
  with pytest.raises(ValueError, match=r"sft_jax\[tpu\]"):
    machines.find_machine("v5e:3x5")


def test_a_tpu_without_its_compiler():
  if importlib.util.find_spec("libtpu"):
    pytest.skip("libtpu is here")
  with pytest.raises(ValueError, match=r"Install sft_jax\[tpu\]"):
    machines.find_machine("v5e:2x4")
