"""The frame of a tool: what a user got wrong is one line and exit 2."""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from sft_jax.common import distributed
from sft_jax.data.chat.options import CHOICES, DEFAULT, RenderOptions
from sft_jax.reporting import terminal
from sft_jax.training import config_check

# As in train.py: anything else is our mistake and keeps its trace.
USER_ERRORS = (ValueError, OSError)

# Read where a command is given no --config: the demo.
DEFAULT_CONFIG = str(Path(__file__).parents[1] / "training" / "config.py")


def run(main: Callable[[], None]) -> None:
  """Runs a tool that reads its own arguments; --debug shows traces."""
  debug = _debug()
  logging.set_verbosity(logging.WARNING)  # Orbax and JAX narrate at INFO.
  try:
    distributed.start_pathways()
    main()
  except USER_ERRORS as error:
    if debug or isinstance(error, BrokenPipeError):  # `main` says it.
      raise
    print(f"error: {terminal.visible(error)}", file=sys.stderr)
    sys.exit(2)


def _debug() -> bool:
  """Takes "--debug" off the command line; whether it was there."""
  found = "--debug" in sys.argv
  sys.argv[:] = [word for word in sys.argv if word != "--debug"]
  return found


@functools.cache
def config_flag() -> flags.FlagHolder:
  """The --config of a tool; once, also where a process has two, or main."""
  what = "A file with get_config(); the demo by default."
  return config_flags.DEFINE_config_file(
    "config", DEFAULT_CONFIG, what, allow_override=True
  )


def run_with_flags(main: Callable[[], None]) -> None:
  """Runs a tool whose arguments are absl flags, such as a --config."""

  debug = _debug()

  def parsed(argv: list[str]) -> None:
    if argv[1:]:
      sys.exit(f"error: command line: unexpected argument {argv[1]!r}")
    sys.argv += ["--debug"] * debug  # For `run`.
    run(checked)

  def checked() -> None:
    if "config" in flags.FLAGS:
      config_check.check(flags.FLAGS.config)
    main()

  app.run(parsed)


# Render options that concern a prompt.
_OF_PROMPTS = ("generation_prompt", "reasoning", "control_tokens", "merge")


def add_reply_options(
  parser: argparse.ArgumentParser, max_new_tokens: int
) -> None:
  """Adds how a model is loaded and replies are made, and what training may have
  chosen for prompts; exports need none of this, but for the date and
  reasoning=strip, and runs remember it."""
  add = parser.add_argument
  add("--dtype", default="float32", help="float32 or bfloat16")
  add("--max_new_tokens", type=int, default=max_new_tokens, help="per reply")
  add("--stop", action="append", help="ends a reply where this text begins")
  add("--template_kwargs", type=json.loads, help="as in training")
  for name in _OF_PROMPTS:
    add(f"--{name}", choices=CHOICES[name], help="as in training")


def render_options(
  args: argparse.Namespace, ours: RenderOptions = DEFAULT
) -> RenderOptions:
  """A model's own options, with what `add_reply_options`'s arguments tell."""
  names = ("template_kwargs", *_OF_PROMPTS)
  given = {name: getattr(args, name) for name in names}
  given = {name: x for name, x in given.items() if x is not None}
  return dataclasses.replace(ours, **given)
