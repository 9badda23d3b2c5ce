"""One page of several runs: behaviours, curves, config, data, speed.

    python tools/compare.py runs/demo runs/lora_demo [--out=compare.html]

Runs may be under way. The first is the one the others are compared with.
"""

import argparse
from pathlib import Path

from sft_jax.commands import command
from sft_jax.reporting import run_files
from sft_jax.reporting.html import compare_page


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("runs", nargs="+", help="workdirs")
  parser.add_argument("--out", default="compare.html", help="the page")
  args = parser.parse_args()
  found = {}
  for path, name in zip(args.runs, _names(args.runs), strict=True):
    found[name] = run_files.read(path)
  compare_page.write(args.out, found)
  print(args.out)


def _names(paths: list[str]) -> list[str]:
  """The folders' own names, where they tell the runs apart.

  Raises:
    ValueError: a run given twice.
  """
  if len(set(paths)) < len(paths):
    raise ValueError(
      f"compare: got {paths}, expected different runs. Name each once."
    )
  short = [Path(path).resolve().name for path in paths]
  return short if len(set(short)) == len(short) else paths


if __name__ == "__main__":
  command.run(main)
