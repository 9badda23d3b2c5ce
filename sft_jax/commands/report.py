"""Writes the report of a run anew, also of one under way or halted.

    python tools/report.py runs/demo

A finished run has its `report.html` already; this makes it of whatever the
workdir holds by now. For several runs on one page: `tools/compare.py`.
"""

import argparse
from pathlib import Path

from sft_jax.commands import command
from sft_jax.reporting import run_files
from sft_jax.reporting.html import run_page


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("run", help="the workdir of a run")
  parser.add_argument("--out", help="default: report.html in the workdir")
  args = parser.parse_args()
  path = Path(args.out) if args.out else Path(args.run) / "report.html"
  run_page.write(path, run_files.read(args.run))
  print(path)


if __name__ == "__main__":
  command.run(main)
