"""The door: `python -m sft_jax.main --config=configs/base.py`."""

import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from sft_jax.train import Stopped, run

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/ with get_config()."
)
DEBUG = flags.DEFINE_bool("debug", False, "Show the trace of an error.")

# What a user or a file can cause; anything else is our mistake and keeps its
# trace.
USER_ERRORS = (ValueError, OSError, FloatingPointError)
# EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
STOPPED_EXIT = 75


def _parse(argv: Sequence[str]) -> list[str]:
  """Reads the flags; an unknown flag or config key is one line, exit 2."""
  try:
    rest = flags.FLAGS(argv)
    if CONFIG.value is not None:
      _ = CONFIG.value.workdir  # A file that was not read says so only here.
    return rest
  except (
    *(flags.Error, AttributeError, KeyError, TypeError, ValueError),
    *(OSError, RuntimeError),
  ) as error:
    got = " ".join(str(error.args[0] if error.args else error).split())
    sys.exit(
      f"error: command line: {got}\nexpected flags like "
      "--config=configs/base.py --config.optim.learning_rate=1e-4; every key "
      "is listed in configs/base.py"
    )


def main(argv: Sequence[str]) -> None:
  """Trains as the config says."""
  if len(argv) > 1:
    sys.exit(f"error: command line: unexpected argument {argv[1]!r}")
  if CONFIG.value is None:
    sys.exit(
      "error: command line: --config is missing, expected a file such "
      "as --config=configs/base.py"
    )
  logging.set_verbosity(logging.WARNING)  # Orbax and JAX narrate at INFO.

  try:
    run(CONFIG.value)
  except Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(STOPPED_EXIT)
  except USER_ERRORS as error:
    if DEBUG.value:
      raise
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
