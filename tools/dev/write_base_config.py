"""Writes configs/base.py from the fields of sft_jax/training/config.py.

    python tools/dev/write_base_config.py

Run it after a change of a key. A test compares the two.
"""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_jax.training.config import LOOSE, NumberOrWord, RunConfig

PATH = Path(__file__).parents[2] / "configs" / "base.py"
_HEAD = '''"""The main job: the bundled demo on a CPU, and every key there is.

    python -m sft_jax.main --config=configs/base.py

Hardware: 2 CPU cores. Time: 3 to 4 minutes. Expect: every behavior from 0 %
to 90 % or more, perplexity on general text 5 to 7 % above the base model's.
Any key can be set on the command line: --config.optim.learning_rate=1e-5.
Paths are relative to the folder the command runs in. A config of your own
starts from `sft_jax.default_config()`, which gives the same keys, anywhere.

Generated from sft_jax/training/config.py, which checks every value.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()

'''
_WIDTH = 80
_DICT = "dataclasses.field(default_factory=dict)"


def text() -> str:
  """What configs/base.py is."""
  body = "\n".join(_lines(RunConfig, "config"))
  text = f"{_HEAD}{body}\n  return config.lock()\n"
  return re.sub(r"\n{3,}(?!def)", "\n\n", text)


def _lines(kind: Any, name: str) -> Iterator[str]:
  """Assignments with their comments; a block for each section."""
  body = inspect.getsource(kind).split('"""')[-1].strip("\n")
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for line in body.splitlines():
    match = re.match(r"  (\w+): \S+ = (.*)", line)
    if match is None:
      yield line
      continue
    key, rest = match.groups()
    section: Any = fields[key].type
    if dataclasses.is_dataclass(section):
      # An evaluation is not Python's eval; and some keys have several types.
      short = "evaluation" if key == "eval" else key
      loose = "type_safe=False" if key in LOOSE else ""
      yield f"\n  config.{key} = {short} = ml_collections.ConfigDict({loose})"
      yield from _lines(section, short)
      yield ""
      continue
    value, mark, meaning = rest.partition("  # ")
    value = value.replace(_DICT, "ml_collections.ConfigDict()")
    if section == NumberOrWord:
      value = f"config_dict.FieldReference({value}, object)"
    code = f"  {name}.{key} = {value}"
    if mark and len(f"{code}{mark}{meaning}") > _WIDTH:
      yield from (f"  # {part}" for part in textwrap.wrap(meaning, _WIDTH - 4))
      mark = meaning = ""
    yield f"{code}{mark}{meaning}"


if __name__ == "__main__":
  PATH.write_text(text(), encoding="utf-8")
