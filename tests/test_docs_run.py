"""The commands of the documents are run, with small models and few steps.

Every command is either run here or stands in `ELSEWHERE` with what runs it; a
new one fails until it does. What is added to a command only shortens it.
"""

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import COMMANDS, ROOT

import fake_runs
import tiny

# Of the main job: few steps, and no prompts to answer.
SHORT = (
  "--config.steps=2 --config.optim.warmup_steps=1 --config.batch_size=2 "
  "--config.data.seq_len=256 --config.data.workers=1 --config.eval.behaviors= "
  "--config.eval.general_text= --config.eval.samples=0 "
  "--config.data.holdout=0.0 --config.selfcheck=off --config.workdir=OUT"
)
# Command -> what is appended; the longest prefix counts.
RUN = {
  "python -m sft_jax.main": SHORT,
  "sft-jax chat": "--max_new_tokens=8",
  "sft-jax compare": "",
  "sft-jax evaluate": "--max_new_tokens=4",
  "sft-jax inspect": "--config.workdir=OUT",
  "sft-jax plan --config=configs/base.py": "--quick",
  "sft-jax report": "",
}
# Why not here: what runs them instead.
_MAIN = "python -m sft_jax.main --config=configs/base.py"
ELSEWHERE = {
  "python -m sft_jax.main --config=... --config.epochs=4 --extend": (
    "needs a run; tests/training/test_extend.py"
  ),
  "python -m sft_jax.main --config=my.py --config.distill.teacher=kept": (
    "needs a teacher's predictions; tests/training/test_distillation.py"
  ),
  "python -m sft_jax.main --config=my.py --config.preference.reference=kept": (
    "needs kept references; tests/training/test_preferences.py"
  ),
  f"{_MAIN} --config.data.filter=": (
    "needs scores; tests/tools/test_score_data.py"
  ),
  f"{_MAIN} --config.workdir=runs/chain": (
    "needs a run; tests/training/test_run.py"
  ),
  f"{_MAIN} --config.workdir=runs/gemma": (
    "hours, and a real model; docs/real_models.md"
  ),
  f"{_MAIN} --config.workdir=runs/tools": (
    "an hour, and a real model; docs/real_models.md"
  ),
  "python tools/bench/": "minutes, rivals; tests/tools runs the parts",
  "python tools/convert_oasst.py": "tests/tools/test_convert_oasst.py",
  "python tools/convert_sgd.py": "tests/tools/test_convert_sgd.py",
  "python tools/dev/ifeval_agreement.py": "needs the reference's code",
  "python tools/dev/make_demo.py": "tests/tools/test_demo_data.py",
  "python tools/dev/make_goldens.py": "needs transformers",
  "python tools/dev/parity.py": "tests/models/test_parity.py, of the oracles",
  "sft-jax plan --config=configs/models/": "needs libtpu; .ci/run",
  "sft-jax export": "needs a run; tests/checkpointing, tests/tools",
  "sft-jax merge": "tests/tools/test_merge.py",
  "sft-jax replay": "needs a run; tests/faults",
  "sft-jax selfcheck": "minutes; tests/tools/test_selfcheck_tool.py",
  "python tools/dev/run_lessons.py": "an hour; tests/tools/test_run_lessons.py",
  "python tools/dev/run_traps.py": "minutes; tests/mutations/test_traps.py",
  "sft-jax score": "tests/tools/test_score_data.py",
  "sft-jax select": "needs scores; tests/evals",
  "sft-jax teach": "needs a teacher; tests/training/test_distillation.py",
  "sft-jax suggest": "minutes; tests/training/planning/test_suggest.py",
  "sft-jax synthesize": "tests/tools/test_synthesise.py",
}
PLACES = {
  "MODEL": "model", "BASE": "model", "FILE.jsonl": "behaviors.jsonl",
  "runs/mine/export": "model", "runs/demo/export": "model",
  "...": "configs/base.py",
  "('tensorboard', 'mlflow')": "('tensorboard',)",  # The others are extras.
}  # fmt: skip


def _rule(rules: dict[str, str], line: str) -> str | None:
  """What the rules say of a line, if no others have a longer prefix of it."""
  plain = " ".join(line.split())
  found = [p for p in RUN.keys() | ELSEWHERE.keys() if plain.startswith(p)]
  return rules.get(max(found, key=len)) if found else None


LINES = list(dict.fromkeys(" ".join(line.split()) for _, line in COMMANDS))
RUNNABLE = [line for line in LINES if _rule(RUN, line) is not None]


@pytest.mark.parametrize("line", LINES)
def test_every_command_is_run_somewhere(line):
  assert (_rule(RUN, line) is None) != (_rule(ELSEWHERE, line) is None), (
    f"{line}: add it to RUN, or to ELSEWHERE with what runs it"
  )


def test_most_kinds_of_commands_are_run():
  assert len(RUNNABLE) >= 12


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
  """A folder that looks like a checkout and holds what commands name."""
  folder = tmp_path_factory.mktemp("checkout")
  for name in ("sft_jax", "configs", "tools"):
    (folder / name).symlink_to(ROOT / name)
  tiny.model_folder(folder / "model")
  (folder / "rows").mkdir()
  (folder / "runs").mkdir()
  tiny.rows_file(folder / "rows" / "rows.jsonl")
  item = {
    "group": "g",
    "messages": [{"role": "user", "content": "What goes with cat?"}],
    "checks": [{"check": "contains", "text": "cat"}],
  }
  (folder / "behaviors.jsonl").write_text(json.dumps(item) + "\n")
  tiny.rows_file(folder / "runs" / "synthetic.jsonl")
  for name in ("demo", "lora_demo"):
    fake_runs.write(folder / "runs" / name, fake_runs.finished("plain"))
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", RUNNABLE)
def test_command_runs(line, checkout, tmp_path):
  command = f"{line} {_rule(RUN, line)}"
  words = [_place(word, tmp_path) for word in shlex.split(command)]
  done = subprocess.run(
    [sys.executable, *_program(words)],
    cwd=checkout,
    env=environment(checkout),
    input="What goes with cat?\n",
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  assert done.stdout.strip()


def _program(words: list[str]) -> list[str]:
  """`sft-jax NAME` as `python -m sft_jax.main NAME`: the same program."""
  if words[0] == "sft-jax":
    return ["-m", "sft_jax.main", *words[1:]]
  return words[1:]


def environment(checkout: Path) -> dict[str, str]:
  """A user's: the package is installed, as in CI, and not on PYTHONPATH."""
  kept = {
    k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")
  }
  try:
    importlib.metadata.distribution("sft_jax")
  except importlib.metadata.PackageNotFoundError:
    kept["PYTHONPATH"] = str(checkout)  # Run from a checkout as it is.
  return kept | {"JAX_PLATFORMS": "cpu"}


def _place(word: str, out: Path) -> str:
  """A word of a command, with what stands for the reader's own replaced."""
  flag, equals, value = word.rpartition("=")
  value = PLACES.get(value, value).replace("OUT", str(out / "run"))
  return f"{flag}{equals}{value}"
