"""Runs of processes that share a workdir, started and ended by tests."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny
from sft_jax.common import trees

ROOT = Path(__file__).parents[2]


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start(
  workdir: Path,
  choices: dict,
  *,
  folders: Sequence[Path] = (ROOT, ROOT),
  between: Callable[[subprocess.Popen], Any] = lambda first: None,
  homes: Sequence[Path] = (),
  devices: Sequence[int] = (4, 4),
) -> list[subprocess.Popen]:
  """Processes of the door, one for each of `devices`, which share a workdir.

  Args:
    workdir: of both.
    choices: keys of a config.
    folders: where each of them runs.
    between: called with the first before the second is started.
    homes: where each keeps what it fetches: machines that share no disk.
    devices: how many each of them has; one process alone is told of no others.
  """
  folder = workdir.parent
  arguments = _arguments(workdir, choices)
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  address = f"localhost:{free_port()}"
  processes = []
  for i, count in enumerate(devices):
    flags = re.sub(r"count=\d+", f"count={count}", os.environ["XLA_FLAGS"])
    who = f"--coordinator={address}", f"--processes={len(devices)}"
    who = (*who, f"--process={i}") if len(devices) > 1 else ()
    with (folder / f"{workdir.name}.{i}.out").open("w") as out:
      processes.append(
        subprocess.Popen(
          [
            *(sys.executable, "-m", "sft_jax.main"),
            f"--config={ROOT / 'configs' / 'base.py'}",
            *arguments,
            *who,
          ],
          cwd=folders[i],
          env=environment
          | {"XLA_FLAGS": flags}
          | ({"XDG_CACHE_HOME": str(homes[i])} if homes else {}),
          stdout=out,
          stderr=subprocess.STDOUT,
        )
      )
    if i == 0:
      between(processes[0])
  return processes


def _arguments(workdir: Path, choices: dict) -> list[str]:
  config = tiny.config(workdir.parent, "", "", **choices)
  config.workdir = choices.get("workdir", str(workdir))
  keys = trees.flatten(config.to_dict())
  base = trees.flatten(tiny.base.get_config().to_dict())
  return [
    f"--config.{key.replace('/', '.')}={value}"
    for key, value in keys.items()
    if value != base[key]
  ]


def finish(processes: list[subprocess.Popen], workdir: Path, limit: float):
  """[(exit code, what it said)] of processes that must end in time."""
  deadline = time.monotonic() + limit
  try:
    for process in processes:
      process.wait(timeout=max(1, deadline - time.monotonic()))
  finally:
    for process in processes:
      process.kill()
      process.wait()
  said = [
    (workdir.parent / f"{workdir.name}.{i}.out").read_text()
    for i in range(len(processes))
  ]
  return list(zip([p.returncode for p in processes], said, strict=True))


def wait_for(
  true: Callable[[], bool],
  processes: list[subprocess.Popen],
  limit: float = 300,
):
  """Returns when it is; where the processes end before, or it is not in time,
  they are killed and it fails."""
  deadline = time.monotonic() + limit
  while not true():
    if time.monotonic() > deadline or any(
      p.poll() is not None for p in processes
    ):
      for process in processes:
        process.kill()
        process.wait()
      raise AssertionError(f"{[p.args for p in processes]}: it did not come")
    time.sleep(0.05)


def wait_for_step(
  workdir: Path,
  processes: list[subprocess.Popen],
  step: int,
  limit: float = 300,
):
  """Returns when a record of the step is written."""
  path = workdir / "metrics.jsonl"
  wait_for(
    lambda: path.exists() and len(path.read_text().splitlines()) >= step,
    processes,
    limit,
  )


def records(workdir: Path) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]
