"""Writes models/hf/config_fields.json: what transformers reads of config.json.

    python tools/dev/make_config_fields.py

Of each family the fields of its configuration class, with their defaults. The
live suite (`tests/models/test_config.py`) compares it with the installed
transformers. Needs transformers.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import transformers

from sft_jax.models.families import FAMILIES

PATH = Path(__file__).parents[2] / "sft_jax/models/hf/config_fields.json"


def fields_of(model_type: str) -> dict[str, Any]:
  """{field: default} of a family, its other names for fields at null."""
  kind = transformers.CONFIG_MAPPING[model_type]
  base = transformers.PreTrainedConfig
  ours = {f.name: f.default for f in dataclasses.fields(kind)}
  same = {
    f.name for f in dataclasses.fields(base) if ours.get(f.name) == f.default
  }
  named = dict.fromkeys(kind.attribute_map) | ours
  return {
    name: None if default is dataclasses.MISSING else default
    for name, default in sorted(named.items())
    if name not in same
  }


def all_fields() -> dict[str, dict[str, Any]]:
  """As JSON holds them: a tuple is a list."""
  found = {name: fields_of(name) for name in sorted(FAMILIES)}
  return json.loads(json.dumps(found))


if __name__ == "__main__":
  PATH.write_text(json.dumps(all_fields(), indent=1) + "\n")
