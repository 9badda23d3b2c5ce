"""Writes the newest checkpoint of a run as a verified Hugging Face folder.

sft-jax export --workdir=runs/demo --out=my_model
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ml_collections

from sft_jax.checkpointing.resume import restore
from sft_jax.common.buckets import remote_workdir, storage
from sft_jax.common.workdir import read_json
from sft_jax.reporting import terminal
from sft_jax.training.build import build, outputs


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", required=True, help="the folder of a run")
  parser.add_argument("--out", required=True, help="the folder to write")
  parser.add_argument("--dtype", help="of the weights; as trained by default")
  args = parser.parse_args()
  out = terminal.console()
  log = out.print
  workdir = Path(args.workdir)
  with remote_workdir.copied(args.workdir) as copy:
    read = read_json(copy / "config.json")
  config: Any = ml_collections.ConfigDict(read, type_safe=False)
  run = build.build_run(config, log)
  checkpoints = outputs.open_checkpoints(config, workdir)
  if not checkpoints.steps():
    raise ValueError(
      f"{workdir}/checkpoints: got no checkpoint; expected at least one. "
      "Train first, or name another workdir."
    )
  state = restore(
    checkpoints, run.state, outputs.find_origin(config, run), log
  ).state
  checkpoints.close()
  params = outputs.own_params(state)
  if args.dtype:
    config.export_dtype = args.dtype
  log(f"Writing step {int(state.step)} to {args.out} ...")
  del state  # The moments make room for the folder's parameters.
  if not storage.is_remote(args.out):
    path = Path(args.out)
    log(f"{args.out}: {outputs.export_run(config, run, params, path)}")
    return
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "export"
    evidence = outputs.export_run(config, run, params, path)
    storage.upload_folder(path, args.out, "config.json")
  log(f"{args.out}: {evidence}")
