"""The frame of a tool: what a user got wrong is one line and exit 2."""

import sys
from collections.abc import Callable

from absl import app, logging

# As in sft_jax/main.py: anything else is our mistake and keeps its trace.
USER_ERRORS = (ValueError, OSError)


def run(main: Callable[[], None]) -> None:
  """Runs a tool that reads its own arguments."""
  logging.set_verbosity(logging.WARNING)  # Orbax and JAX narrate at INFO.
  try:
    main()
  except USER_ERRORS as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def run_with_flags(main: Callable[[], None]) -> None:
  """Runs a tool whose arguments are absl flags, such as a --config."""

  def parsed(argv: list[str]) -> None:
    if argv[1:]:
      sys.exit(f"error: command line: unexpected argument {argv[1]!r}")
    run(main)

  app.run(parsed)
