"""The command line: `sft-jax NAME ...`, or `python -m sft_jax.main NAME ...`.

Without a name it trains: `python -m sft_jax.main --config=configs/base.py`.
Each name is a module of `sft_jax.commands`, imported only when it is asked for.
"""

import importlib
import os
import sys

COMMANDS = {
  "train": "train as a config says; resume what was begun",
  "inspect": "what the rows are, and what is wrong with them, before training",
  "suggest": "a learning rate, a batch and passes for a model and rows",
  "plan": "whether a run fits a machine, here or elsewhere, and how fast it is",
  "selfcheck": "the laws of training, on this machine and these rows",
  "evaluate": "behaviors and perplexity of a model, beside another",
  "chat": "talk with a model, or with two side by side",
  "score": "how hard each row is, written beside the rows",
  "select": "a share of the rows that is sound and stands for the rest",
  "teach": "what a teacher predicts of the rows, kept for distillation",
  "synthesize": "rows by a teacher, kept where checks pass",
  "merge": "one model of several: averages, task vectors, TIES, DARE, SLERP",
  "compare": "one page of several runs",
  "report": "the page of a run, written again",
  "export": "a Hugging Face folder of a run's checkpoint",
  "replay": "the rows of one step of a run",
}
# Where a command is not `main` of the module of its name.
MODULES = {
  "report": "compare:report",
  "suggest": "plan:suggest",
  "train": "train:cli",
  "merge": "export:merge",
  "teach": "score:teach",
  "select": "score:select",
}


def main(name: str = "") -> None:
  """Runs a command: by its name, or the first argument; else `train`.

  Exit codes: 0 done; 2 what a user can correct, in one line; 75 stopped by a
  signal: the same command resumes.
  """
  for stream in ("stdout", "stderr"):
    if getattr(sys, stream) is None:  # Closed by whoever started us.
      setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
  try:
    try:
      _run(name)
    finally:
      sys.stdout.flush()
  except BrokenPipeError:  # As of "| head"; nobody reads what follows.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit("error: stdout: got no reader; expected one until the end.")
  except KeyboardInterrupt:
    print(
      "stopped by Ctrl-C at once; a run resumes by the same command.",
      file=sys.stderr,
    )
    sys.exit(130)


def _run(name: str) -> None:
  if not name and sys.argv[1:] and not sys.argv[1].startswith("-"):
    name = sys.argv.pop(1)
  elif not name and sys.argv[1:] in (["-h"], ["--help"]):
    print(_usage())
    return
  name = name or "train"
  if name not in COMMANDS:
    sys.exit(f"error: command line: got {name!r}\n{_usage()}")
  module, _, function = MODULES.get(name, f"{name}:main").partition(":")
  module = importlib.import_module(f"sft_jax.commands.{module}")
  command = importlib.import_module("sft_jax.commands.command")
  run = getattr(module, function)
  if name == "train":
    run()
  elif hasattr(module, "CONFIG"):
    command.run_with_flags(run)
  else:
    command.run(run)


def _usage() -> str:
  width = max(map(len, COMMANDS))
  lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
  return "\n".join(
    ["usage: sft-jax NAME [arguments]; sft-jax NAME --help", *lines]
  )


if __name__ == "__main__":
  main()
