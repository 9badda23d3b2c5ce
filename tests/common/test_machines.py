"""Machines by name: who they are, and what is refused."""

import importlib.util

import jax
import pytest

from sft_jax.common import flops, machines


def test_this_machine():
  found = machines.find_machine("")
  assert found.peak_known
  assert list(found.devices) == jax.devices()
  assert found.chip.memory > 1e8
  assert not found.estimate


def test_an_unknown_accelerator_has_no_figures_of_the_host(monkeypatch):
  class Unknown:
    platform, device_kind = "gpu", "Made Up 9000"
    stats = {"bytes_limit": 24e9}  # noqa: RUF012

    def memory_stats(self):
      return self.stats

  monkeypatch.setattr(jax, "devices", lambda *_: [Unknown()])
  monkeypatch.setattr(jax, "local_devices", lambda *_: [Unknown()])
  monkeypatch.setattr(flops, "flops_per_second", lambda _: 1e12)
  found = machines.find_machine("")
  assert found.chip.name == "unknown accelerator 'Made Up 9000'"
  assert (found.chip.memory, found.published) == (24e9, False)
  assert not found.peak_known
  Unknown.stats = None
  assert machines.find_machine("").chip.memory == float("inf")


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
    ("v5p:2x2x1*0", "expected a TPU slice"),
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
  two = machines.find_machine("v5p:2x2x1*2")
  assert [d.slice_index for d in two.devices] == [0] * 4 + [1] * 4
  # JAX shows both halves of a chip.
  assert len(machines.find_machine("tpu7x:2x2x1").devices) == 8


def test_a_tpu_without_its_compiler():
  if importlib.util.find_spec("libtpu"):
    pytest.skip("libtpu is here")
  with pytest.raises(ValueError, match=r"Install sft_jax\[tpu\]"):
    machines.find_machine("v5e:2x4")
