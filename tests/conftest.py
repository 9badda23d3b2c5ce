"""Every test sees eight fake CPU devices and full float32 products.

Compilation is most of a test's time, so LLVM optimises little, and XLA writes
its code for fused operations without MLIR, in a quarter of the time. Modules
with array types have them checked at every call; the check costs a
millisecond, too much for code on text.

Every compiled program is a few mappings of memory, of which Linux grants a
process 65,530; where there is none left, XLA ends the process without a word.
So programs of earlier files are let go when there are many.
"""

import gc
import importlib.metadata
import os
import signal
from pathlib import Path

from packaging.version import Version

# Must be set before JAX is imported: the device count is fixed at start-up.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_backend_optimization_level=0"
  + " --xla_llvm_disable_expensive_passes=true"
  # Compiles in a quarter of the time. XLA ends the process at a flag that it
  # does not know, as from jaxlib 0.12 on it does not know this one.
  + (
    " --xla_cpu_use_fusion_emitters=false"
    if Version(importlib.metadata.version("jaxlib")) < Version("0.12")
    else ""
  )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

# How long an example takes says how busy the machine is. The suite draws the
# same examples each time, so that it says what a change broke; others are
# looked for by `pytest --hypothesis-profile=search`.
_PATIENT = hypothesis.settings(
  deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("tests", _PATIENT, derandomize=True)
hypothesis.settings.register_profile("search", _PATIENT)
hypothesis.settings.load_profile("tests")

_ROOT = Path(__file__).parent.parent
_TYPED = [
  ".".join(path.relative_to(_ROOT).with_suffix("").parts)
  for path in (_ROOT / "sft_jax").rglob("*.py")
  if "jaxtyping" in path.read_text(encoding="utf-8")
]
# An int passes for a float, as the type checker has it (the numeric tower).
jaxtyping.install_import_hook(
  _TYPED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

# A traced program is many objects that live. Python's own thresholds look at
# each again and again: an eighth of the time of tests that trace models.
gc.freeze()
gc.set_threshold(50_000, 10, 10)

_MAPPINGS = Path("/proc/self/maps")
_MANY = 20_000


# A file for the names of skipped tests, that .ci/run runs with more installed.
_SKIPPED = os.environ.get("SKIPPED_TESTS")
if "PYTEST_XDIST_WORKER" in os.environ:  # The controller hears of all.
  _SKIPPED = None


def pytest_collectreport(report):
  if _SKIPPED and report.skipped:
    with open(_SKIPPED, "a", encoding="utf-8") as file:
      file.write(f"{report.nodeid}\n")


def pytest_runtest_logreport(report):
  """Names a failure when it happens: a run that is cut short shows none."""
  pytest_collectreport(report)
  if report.failed and hasattr(report, "node"):  # Where workers report.
    print(f"\n{report.when} of {report.nodeid} failed", flush=True)


@pytest.fixture(autouse=True, scope="module")
def no_timer_left():
  """A timer of CPU time that a test leaves ends a later one without a word."""
  yield
  if hasattr(signal, "getitimer"):
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
  """Lets compiled programs go after a file of tests, if there are many."""
  yield
  if _MAPPINGS.exists() and len(_MAPPINGS.read_bytes().splitlines()) > _MANY:
    jax.clear_caches()
    gc.collect()
