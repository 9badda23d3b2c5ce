"""A model to ask, from wherever it is: an export, a run or a checkpoint."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from sft_jax.checkpointing import manager
from sft_jax.common import sharding, trees
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.models.transformer import Model
from sft_jax.training.build import data
from sft_jax.training.build import model as setup_model


class Asked(NamedTuple):
  """All that answering takes.

  Attributes:
    model, params, tokenizer: as `evals.replies` wants them.
    options: how the run rendered its prompts; of a Hugging Face folder, whose
      template says it all, the default.
  """

  model: Model
  params: trees.Tree
  tokenizer: tokenizers.Tokenizer
  options: RenderOptions


def load(
  path: str | Path,
  *,
  dtype: str = "float32",
  say: Callable[[str], None] = print,
) -> Asked:
  """Loads a Hugging Face folder, a run's newest checkpoint, or one by name.

  Args:
    path: the folder of a model; the workdir of a run; or one of its
      checkpoints, workdir/checkpoints/STEP, whose parameters must have the
      digests they were saved with, and the model's folder those it had.
    dtype: of a Hugging Face folder's parameters and activations. A run's are
      what its config says.
    say: called with what is loaded.

  Raises:
    ValueError: a folder that is none of these, a run without checkpoints, a
      damaged checkpoint, one trained beside other frozen parameters.
  """
  path = Path(path)
  is_step = path.parent.name == "checkpoints"
  if not is_step and not (path / "checkpoints").is_dir():
    model, params = setup_model.load_pretrained(
      path, dtype=dtype, param_dtype=dtype
    )
    # An id of the hub is a folder by now.
    folder = setup_model.hub.find_model(str(path)).folder
    today = {"date": datetime.date.today().isoformat()}
    options = RenderOptions(today)  # Where its template asks for it.
    return Asked(model, params, tokenizers.load_tokenizer(folder), options)
  workdir = path.parent.parent if is_step else path
  if not is_step:
    steps = [p for p in (path / "checkpoints").iterdir() if p.name.isdigit()]
    if not steps:
      raise ValueError(
        f"{workdir}/checkpoints: got no checkpoint, expected at least one. "
        "Train first, or name another folder."
      )
    path = max(steps, key=lambda p: int(p.name))
  say(f"Loading {path} ...")
  manifest = manager.read_manifest(path)
  config: Any = ml_collections.ConfigDict(
    manifest["meta"]["config"], type_safe=False
  )
  mesh = sharding.make_mesh(**config.mesh)
  config.model.path = str(setup_model.find_model(config).folder)
  tokenizer = data.load_tokenizer(config, config.model.path)
  model, base = setup_model.load_model(config, mesh, say)
  held = trees.flatten(base)
  for name, x in manager.read_parameters(path, manifest, base).items():
    held[name] = jax.device_put(x, held[name].sharding)
  options = data.make_render_options(config)
  return Asked(model, trees.unflatten(held), tokenizer, options)
