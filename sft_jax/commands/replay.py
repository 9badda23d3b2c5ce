"""Shows the exact rows that one step of a run trained on.

    sft-jax replay --workdir=runs/demo --step=17

Every example of the step's batch: its place in the data, its pack,
and its text: prompt dim, trained green (of another weight than 1: yellow),
special tokens bold. Without colors (a pipe, NO_COLOR) what is trained stands
in [[double brackets]]. The data are rebuilt, or taken from the run's cache, and
must have the fingerprint that the run's data.json says.
"""

import argparse
from typing import Any

import ml_collections

from sft_jax.commands.inspect import show_sample
from sft_jax.common.buckets import remote_workdir
from sft_jax.common.workdir import read_json
from sft_jax.data.audit.summary import step_rows
from sft_jax.data.store import fingerprint
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.reporting import terminal
from sft_jax.training.build import data, model


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, help="the folder of a run")
  parser.add_argument("--step", required=True, type=int, help="1 is the first")
  args = parser.parse_args()
  out = terminal.console()
  workdir = args.workdir
  with remote_workdir.copied(workdir) as copy:
    read = read_json(copy / "config.json")
    made_from = read_json(copy / "data.json")
  config: Any = ml_collections.ConfigDict(read, type_safe=False)
  with config.unlocked():
    config.workdir = workdir
  folder = model.find_model(config).folder
  tokenizer = tokenizers.load_tokenizer(folder)
  log = out.print
  store = data.load_stores(config, tokenizer, log).train
  stream = data.make_train_stream(config, store)
  if made_from["fingerprint"] != stream.fingerprint:
    changed = fingerprint.differences(
      made_from["fingerprint_inputs"], stream.fingerprint_inputs
    )
    raise ValueError(
      f"{workdir}: was trained on other data than there now are:\n  "
      + "\n  ".join(changed)
      + "\nexpected the same. Undo the change to see the rows."
    )
  plain = not out.color_system
  for row in step_rows(stream, tokenizer, args.step):
    show_sample(out, row, f"pack {row['pack']}  ", brackets=plain)
