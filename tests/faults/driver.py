r"""A training run that dies at a chosen moment: a program for fault tests.

    PYTHONPATH=.:tests/support \
    python tests/faults/driver.py FOLDER MODEL ROWS PHASE... [key=value ...]

trains `tiny.config` in a process per PHASE, one after the other in the same
folder. Each kills itself in its phase, but for 'whole'. Prints the exit codes.
What is patched is other people's code and our own seams, here and not in the
product.
"""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import jax
import orbax.checkpoint as ocp

import sft_jax
import tiny
from sft_jax.checkpointing import export, manager
from sft_jax.commands.train import STOPPED_EXIT, USER_ERRORS
from sft_jax.data.store import build
from sft_jax.data.store.store import Store
from sft_jax.evals import suite
from sft_jax.models.hf import load_save
from sft_jax.reporting import final_summary
from sft_jax.training import run as run_module
from sft_jax.training import step_runner
from sft_jax.training.interrupts import Stopped
from sft_jax.training.recorder import Records

if folder := os.environ.get("FAULTS_COMPILE_CACHE"):
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def die(*arguments, **options):
  os.kill(os.getpid(), signal.SIGKILL)


def terminate(*arguments, **options):
  for _ in range(2):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)


def interrupt(*arguments, **options):
  os.kill(os.getpid(), signal.SIGINT)  # As Ctrl-C does.


def hang_up(*arguments, **options):
  os.kill(os.getpid(), signal.SIGHUP)


def interrupt_twice(*arguments, **options):
  interrupt()
  interrupt()


def suspend(*arguments, **options):
  """As Ctrl-Z and fg do."""
  me = str(os.getpid())
  subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {me}"])
  os.kill(os.getpid(), signal.SIGTSTP)


def fail(*arguments, **options):
  raise OSError(5, "Input/output error")


def limit_files() -> None:
  """From the second save on no file may grow beyond 20 KB."""
  limits = (20_000, resource.RLIM_INFINITY)
  before(
    *(manager.Checkpoints, "save"),
    lambda *_, **__: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    call=2,
  )


def fill(*arguments, **options) -> None:
  """Takes the last byte of the disk that FAULTS_DISK is on."""
  size, path = 1 << 20, Path(os.environ["FAULTS_DISK"]) / "fill"
  with path.open("ab", buffering=0) as file:
    while size:
      try:
        file.write(bytes(size))
      except OSError:
        size //= 2


def before(owner, name: str, act=die, *, call: int = 1) -> None:
  """Acts before the `call`-th call of owner.name."""
  inner, count = getattr(owner, name), 0

  @functools.wraps(inner)
  def wrapped(*arguments, **options):
    nonlocal count
    count += 1
    if count == call:
      act(*arguments, **options)
    return inner(*arguments, **options)

  setattr(owner, name, wrapped)


def after(owner, name: str, act=die, *, call: int = 1) -> None:
  """Acts after the `call`-th call of owner.name."""
  inner, count = getattr(owner, name), 0

  @functools.wraps(inner)
  def wrapped(*arguments, **options):
    nonlocal count
    count += 1
    result = inner(*arguments, **options)
    if count == call:
      act()
    return result

  setattr(owner, name, wrapped)


MANAGER = ocp.CheckpointManager
PHASES = {
  "load": lambda: before(load_save, "load_pretrained"),
  "preparing the cache": lambda: before(build, "_seal"),
  "moving the cache": lambda: after(build, "_seal"),
  "evaluation before": lambda: before(suite.Suite, "_sums"),
  "compile": lambda: before(jax.stages.Lowered, "compile"),
  "step": lambda: before(step_runner.StepRunner, "submit", call=4),
  "mid-save": lambda: before(MANAGER, "_wait_for_checkpointers", call=2),
  "commit": lambda: before(MANAGER, "_finalize_checkpoint", call=2),
  "before retention": lambda: after(MANAGER, "_finalize_checkpoint", call=2),
  "evaluation within": lambda: before(suite.Suite, "losses"),
  "export": lambda: before(export, "_verify"),
  "after export": lambda: after(export, "_verify"),
  "whole": lambda: None,
  # Not killed, but asked to stop, twice, while a checkpoint is written.
  "SIGTERM twice": lambda: before(
    *(MANAGER, "_wait_for_checkpointers", terminate), call=2
  ),
  "SIGTERM at the last step": lambda: before(
    *(step_runner.StepRunner, "submit", terminate), call=12
  ),
  "SIGTERM while measuring": lambda: before(suite.Suite, "_sums", terminate),
  "Ctrl-C": lambda: before(step_runner.StepRunner, "submit", interrupt, call=5),
  "Ctrl-C twice": lambda: before(
    step_runner.StepRunner, "submit", interrupt_twice, call=5
  ),
  "hang up": lambda: before(step_runner.StepRunner, "submit", hang_up, call=3),
  "suspended": lambda: before(
    step_runner.StepRunner, "submit", suspend, call=2
  ),
  "a hanging step": lambda: before(
    step_runner.StepRunner, "submit", lambda *_: time.sleep(600), call=3
  ),
  "a stalled reader": lambda: before(
    Store, "example", lambda *_: time.sleep(600), call=40
  ),
  "a dying reader": lambda: before(Store, "example", fail, call=40),
  "a full disk": lambda: limit_files(),
  # The disk is full from a moment on, until the next process begins.
  "full: cache": lambda: before(build, "_seal", fill),
  "full: compiled": lambda: before(jax.stages.Lowered, "compile", fill),
  "full: start page": lambda: before(run_module, "_write_start", fill),
  "full: records": lambda: before(Records, "write", fill, call=3),
  "full: checkpoint": lambda: before(manager.Checkpoints, "save", fill, call=2),
  "full: evaluation": lambda: before(suite.Suite, "losses", fill),
  "full: measured": lambda: after(suite.Suite, "losses", fill, call=2),
  "full: export": lambda: before(run_module, "_export", fill),
  "full: exporting": lambda: before(export, "_verify", fill),
  "full: report": lambda: before(final_summary, "write_report", fill),
  "full: result": lambda: after(final_summary, "write_report", fill),
}


def run(folder: str, model: str, rows: str, changes: dict) -> None:
  """Trains, with the exit codes of the main program."""
  config = tiny.config(Path(folder), Path(model), Path(rows), **changes)
  try:
    sft_jax.train(config)
  except Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(STOPPED_EXIT)
  except KeyboardInterrupt:
    sys.exit(130)
  except USER_ERRORS as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def fork(act) -> int:
  """Runs `act` in a child of this process; its exit code, or -signal.

  Nothing here has asked for a device yet, so JAX has no threads to lose.
  """
  sys.stdout.flush()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # JAX and Python warn of any fork.
    child = os.fork()
  if child == 0:
    code = 1
    try:
      act()
      code = 0
    except SystemExit as end:
      code = int(end.code or 0)
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stdout.flush()
      os._exit(code)
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
  folder, model, rows, *rest = sys.argv[1:]
  changes = dict(item.split("=", 1) for item in rest if "=" in item)
  changes = {key: json.loads(value) for key, value in changes.items()}
  phases = [item for item in rest if "=" not in item]

  def die_in(phase: str) -> None:
    if disk := os.environ.get("FAULTS_DISK"):
      (Path(disk) / "fill").unlink(missing_ok=True)
    PHASES[phase]()
    run(folder, model, rows, changes)

  codes = [fork(functools.partial(die_in, phase)) for phase in phases]
  print(json.dumps(codes))


if __name__ == "__main__":
  main()
