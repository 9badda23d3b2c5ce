"""Trains: `python -m sft_jax.main --config=configs/base.py`."""

import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
from absl import app, flags, logging

from sft_jax.commands import command
from sft_jax.common import distributed
from sft_jax.reporting.terminal import visible
from sft_jax.training.config_check import EXTENSIONS
from sft_jax.training.interrupts import Stopped
from sft_jax.training.run import train

CONFIG = command.config_flag()
FORCE = flags.DEFINE_bool(
  "force",
  False,
  "Continue with another config or other data; incidents say so.",
)
EXTEND = flags.DEFINE_enum(
  *("extend", "", ["", *EXTENSIONS]),
  "Train for more epochs or steps, and how the learning rate continues.",
)
DRY_RUN = flags.DEFINE_bool(
  "dry-run", False, "Show the start page, and stop before the first step."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "host:port of the first process; pods and SLURM need none."
)
PROCESSES = flags.DEFINE_integer("processes", 0, "How many there are.")
PROCESS = flags.DEFINE_integer("process", -1, "Which of them this is, from 0.")
DEBUG = flags.DEFINE_bool("debug", False, "Show the trace of an error.")

# What a user or a file can cause; else it is our mistake and keeps its trace.
USER_ERRORS = (ValueError, OSError, FloatingPointError)
# EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
STOPPED_EXIT = 75
USER_EXIT = 2


def _parse(argv: Sequence[str]) -> list[str]:
  """Reads the flags; an unknown flag or config key is one line, exit 2."""
  try:
    rest = flags.FLAGS(argv)
    _ = CONFIG.value.workdir  # A file that was not read says so only here.
    return rest
  except (
    *(flags.Error, AttributeError, KeyError, TypeError, ValueError),
    *(OSError, RuntimeError),
  ) as error:
    got = " ".join(str(error.args[0] if error.args else error).split())
    _refuse(
      f"command line: {got}; expected flags like --config=configs/base.py "
      "--config.optim.learning_rate=1e-4; every key is in configs/base.py"
    )


def _refuse(what: object) -> NoReturn:
  print(visible(f"error: {what}"), file=sys.stderr)
  sys.exit(USER_EXIT)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    _refuse(f"command line: unexpected argument {argv[1]!r}")
  logging.set_verbosity(logging.WARNING)  # Orbax and JAX narrate at INFO.
  if not DEBUG.value:  # A save that fails is told once: by the last line.
    logging.get_absl_logger().addFilter(lambda record: not record.exc_info)
  try:
    with distributed.joined(
      *(COORDINATOR.value, PROCESSES.value, PROCESS.value),
      together=(0, STOPPED_EXIT),
    ):
      _run()
      sys.exit(0)
  except ValueError as error:
    if DEBUG.value:
      raise
    _refuse(error)


def _command(arguments: Sequence[str]) -> str:
  """What was typed, to be typed again; one argument per line."""
  words = ["python -m sft_jax.main", *map(shlex.quote, arguments)]
  return " \\\n  ".join(words)


def _run() -> None:
  """The run; ends the process where it does not come to its end."""
  try:
    train(
      CONFIG.value,
      force=FORCE.value,
      extend=EXTEND.value,
      dry_run=DRY_RUN.value,
      command=_command(sys.argv[1:]),
    )
  except Stopped as stopped:
    print(stopped, file=sys.stderr)
    if stopped.agreed:
      sys.exit(STOPPED_EXIT)
    raise distributed.EndsAlone(STOPPED_EXIT) from None
  except BrokenPipeError:  # As of "| head"; nobody reads what follows.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _refuse(
      "stdout was closed while the run printed to it, expected a reader. Run "
      "the same command again to continue."
    )
  except USER_ERRORS as error:
    if DEBUG.value:
      raise
    _refuse(error)
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    ours = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    if DEBUG.value or not ours:
      raise
    what = str(error).partition("\n")[0]
    _refuse(
      f"out of memory: {what}\nThe start page and "
      "sft-jax plan say what takes it; docs/troubleshooting.md what to change, "
      "in order. Then the same command continues from the last step saved."
    )


def cli() -> None:
  app.run(main, flags_parser=_parse)
