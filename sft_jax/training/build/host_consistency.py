"""Several processes begin a run only if all of them were given the same.

What they do together must match call for call: how many steps there are, of
which shapes, what is measured and when. All of it follows from the config, the
model's shape and the rows. A process with others of these would leave the rest
waiting for ever; so it is refused before the first step.
"""

import json
from typing import Any

import jax

from sft_jax.common import distributed, trees
from sft_jax.data.store.files import hash_text
from sft_jax.data.store.fingerprint import differences
from sft_jax.training.build import sources
from sft_jax.training.build.build import BuiltRun
from sft_jax.training.build.data import Config

# What each host may have of its own.
_OWN = ("compile_cache", "data/cache_dir", "data/workers")


def check_config(config: Config) -> None:
  """Call it before processes wait for one another.

  Raises ValueError: this process has another config than the first one.
  """
  keys = trees.flatten(config.to_dict()).items()
  mine = {key.replace("/", "."): x for key, x in keys if key not in _OWN}
  for name in ("general_text", "behaviors", "knowledge"):
    # 'auto' is what is beside the rows, here.
    mine[f"eval.{name}"] = sources.beside(config, name, lambda line: None)
  cure = "Give all of them the same flags."
  check_same_on_all_hosts("the config", mine, cure)


def check_data(built: BuiltRun) -> None:
  """Call it before the first batch.

  Raises ValueError: this process has read another model's shape than the first
  one, or other rows or prompts.
  """
  streams = {
    "train": built.stream,
    "held out": built.held_out,
    "general text": built.general_text,
    "of the training rows": built.train_rows,
  }
  prompts = {"behaviors": built.items, "knowledge": built.knowledge}
  digest = lambda one: hash_text(repr(one._replace(where="")))
  mine = {
    "config.json": built.model.config.raw,
    **{name: x and x.fingerprint_inputs for name, x in streams.items()},
    **{name: list(map(digest, items)) for name, items in prompts.items()},
  }
  cure = "Copy the same files to every host."
  check_same_on_all_hosts("what it has read", mine, cure)


def check_same_on_all_hosts(what: str, mine: dict[str, Any], cure: str) -> None:
  """Raises ValueError where a process has other values than the first."""
  first = distributed.first_says(mine)
  lines = differences(first, json.loads(json.dumps(mine)))
  if lines:
    text = "\n  ".join(lines)
    raise ValueError(
      f"process {jax.process_index()} of {jax.process_count()}: {what} is not "
      f"that of the first process (there -> here):\n  {text}\nexpected the "
      f"same. {cure}"
    )
