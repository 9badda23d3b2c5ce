"""Time to the first step, cold and warm: compiled, and found on disk.

    python tools/bench/bench_startup.py [--config=configs/base.py] [--rounds=2]

Starts one-step runs, each in a process and a workdir of its own, and takes
the time from the start of the process to the first record of metrics.jsonl.
Cold runs have an empty compile cache, warm ones that of the run before; the
rows are encoded anew in both. Nothing is evaluated or exported.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_data
from sft_jax.commands import command

ROOT = Path(__file__).parents[2]


def first_step(config: str, workdir: Path, cache: Path) -> tuple[float, str]:
  """Seconds to the first record, and what the run said of compiling."""
  options = {
    "workdir": workdir,
    "compile_cache": cache,
    "steps": 1,
    "optim.warmup_steps": 0,
    "log.every": 1,
    "data.holdout": 0.0,
    "eval.behaviors": "",
    "eval.general_text": "",
    "export": False,
  }
  flags = [f"--config.{key}={value}" for key, value in options.items()]
  started = time.perf_counter()
  done = subprocess.Popen(
    [sys.executable, "-m", "sft_jax.main", f"--config={config}", *flags],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  record = workdir / "metrics.jsonl"
  while done.poll() is None and not (record.exists() and record.stat().st_size):
    time.sleep(0.02)
  seconds = time.perf_counter() - started
  said, _ = done.communicate()
  if done.returncode:
    raise ValueError(f"the run ended with {done.returncode}:\n{said[-2000:]}")
  compiled = re.search(r"(Found compiled, read|Compiled) in [\d.]+ s", said)
  return seconds, compiled[0] if compiled else "said nothing of compiling"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="configs/base.py")
  parser.add_argument("--rounds", type=int, default=2)
  args = parser.parse_args()
  print(bench_data.machine())
  for number in range(args.rounds):
    with tempfile.TemporaryDirectory() as temporary:
      for name in ("cold", "warm"):
        seconds, said = first_step(
          args.config, Path(temporary) / name, Path(temporary) / "cache"
        )
        print(
          f"round {number} {name}: first step after {seconds:.1f} s; {said}"
        )


if __name__ == "__main__":
  command.run(main)
