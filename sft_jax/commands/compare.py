"""Pages of runs: one run's report, or several runs side by side.

    sft-jax compare runs/demo runs/lora_demo [--out=compare.html]
    sft-jax report runs/demo [--out=report.html]

Runs may be in progress. `compare` holds the others against the first: behavior,
curves, config, data, speed. A finished run has its `report.html` already;
`report` writes it from whatever the workdir holds now.
"""

import argparse
import tempfile
from pathlib import Path

from sft_jax.common.buckets import storage
from sft_jax.reporting import run_files
from sft_jax.reporting.html import compare_page, run_page


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("runs", nargs="+", help="workdirs")
  parser.add_argument("--out", default="compare.html", help="the page")
  args = parser.parse_args()
  storage.check_scheme(args.out, "--out")
  found = {}
  for path, name in zip(args.runs, _names(args.runs), strict=True):
    found[name] = run_files.read(path)
  compare_page.write(args.out, found)
  print(args.out)


def report() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("run", help="the workdir of a run")
  parser.add_argument("--out", help="default: report.html in the workdir")
  args = parser.parse_args()
  inside, remote = storage.join(args.run, "report.html"), False
  if not args.out and (remote := storage.is_remote(inside)):
    args.out = Path(tempfile.mkdtemp()) / "report.html"
  run_page.write(Path(args.out or inside), run_files.read(args.run))
  if remote:
    storage.upload(args.out, inside)
  print(inside if remote else args.out or inside)


def _names(paths: list[str]) -> list[str]:
  """The folders' own names, where they tell the runs apart.

  Raises ValueError: a run given twice.
  """
  if len(set(paths)) < len(paths):
    raise ValueError(
      f"compare: got {paths}, expected different runs. Name each once."
    )
  short = [Path(path).resolve().name for path in paths]
  return short if len(set(short)) == len(short) else paths
