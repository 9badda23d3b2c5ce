"""A model to ask, from wherever it is: an export, a run or a checkpoint."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
from etils import epath
from orbax.checkpoint import v1 as ocp

from sft_jax.checkpointing import digests, manager
from sft_jax.common import sharding, trees
from sft_jax.common.buckets import remote_workdir, storage
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.models.hf import load_save
from sft_jax.models.lora import base_model
from sft_jax.models.transformer import Model
from sft_jax.step import optimizer
from sft_jax.step.train_step import TrainState, model_params
from sft_jax.training.build import data
from sft_jax.training.build import model as setup_model


class Asked(NamedTuple):
  """All that answering takes; `options` are how the run rendered its prompts,
  or of a Hugging Face folder, whose template says it all, the default."""

  model: Model
  params: trees.Tree
  tokenizer: tokenizers.Tokenizer
  options: RenderOptions


def load(
  path: str | Path,
  *,
  dtype: str = "float32",
  log: Callable[[str], None] = print,
) -> Asked:
  """Loads a Hugging Face folder, a run's newest checkpoint, or one by name.

  Args:
    path: the folder of a model; the workdir of a run; or one of its
      checkpoints, workdir/checkpoints/STEP, whose parameters must have the
      digests they were saved with, and the model's folder those it had.
    dtype: of a Hugging Face folder's parameters and activations. A run's are
      what its config says.

  Raises ValueError: a folder that is none of these, a run without checkpoints,
  a damaged checkpoint, one trained beside other frozen parameters.
  """
  if storage.is_remote(path):
    storage.check_scheme(path, "model", ("gs", "s3", "hf"))
    run, step = str(path).rstrip("/"), ""
    if run.startswith("s3://") and not remote_workdir.is_run(run):
      run, _, step = run.rpartition("/checkpoints/")
    if run.startswith("s3://") and (not step or remote_workdir.is_run(run)):
      with remote_workdir.copied(run, checkpoints=True) as copy:
        there = copy / "checkpoints" / step if step else copy
        address: Any = lambda text: str(text).replace(str(copy), run)
        try:
          return load(there, dtype=dtype, log=lambda x: log(address(x)))
        except ValueError as error:
          raise ValueError(address(error)) from error
  # Of gs:// Orbax reads the checkpoints where they are.
  where: Any = (epath.Path if storage.is_remote(path) else Path)(path)
  is_step = where.parent.name == "checkpoints"
  if not is_step and not (where / "checkpoints").is_dir():
    model, params = load_save.load_pretrained(
      where, dtype=dtype, param_dtype=dtype
    )
    # An id of the hub is a folder by now.
    folder = setup_model.hub.find_model(str(where)).folder
    today = {"date": datetime.date.today().isoformat()}
    options = RenderOptions(today)  # Where its template asks for it.
    return Asked(model, params, tokenizers.load_tokenizer(folder), options)
  workdir = where.parent.parent if is_step else where
  if not is_step:
    steps = [p for p in (where / "checkpoints").iterdir() if p.name.isdigit()]
    if not steps:
      raise ValueError(
        f"{workdir}/checkpoints: got no checkpoint, expected at least one. "
        "Train first, or name another folder."
      )
    where = max(steps, key=lambda p: int(p.name))
  log(f"Loading {where} ...")
  manifest = _read_manifest(where)
  config: Any = ml_collections.ConfigDict(
    manifest["meta"]["config"], type_safe=False
  )
  mesh = sharding.make_mesh(**config.mesh)
  config.model.path = str(setup_model.find_model(config).folder)
  tokenizer = data.load_tokenizer(config, config.model.path)
  model, base = setup_model.load_model(config, mesh, log)
  held = trees.flatten(base)
  for name, x in _read_parameters(where, manifest, base).items():
    held[name] = jax.device_put(x, held[name].sharding)
  options = data.make_render_options(config)
  return Asked(model, trees.unflatten(held), tokenizer, options)


def _read_manifest(path: Path) -> dict[str, Any]:
  """What a checkpoint's folder says of itself; a ValueError if damaged."""
  metadata = ocp.checkpointables_metadata(manager.address(path))
  try:
    return digests.unseal(metadata.custom_metadata)
  except ValueError as error:
    raise ValueError(
      f"{path}: {error}; expected one that is whole. Name another checkpoint."
    ) from error


def _read_parameters(
  path: Path, manifest: dict[str, Any], base: trees.Tree
) -> dict[str, jax.Array]:
  """{path: parameter} of a checkpoint's folder, on the first device, verified.

  Raises ValueError: the base is another one, or a digest is wrong.
  """
  # Copies of the base's parameters, and a teacher's, are no part of the model.
  others = tuple(f"['{x}']" for x in (base_model.COPIES, base_model.TEACHER))
  beside = {
    name: x
    for name, x in manifest["beside"].items()
    if not name.startswith(others)
  }
  if changed := digests.damaged(beside, base):
    raise ValueError(manager.other_base(str(path), changed))
  metadata = ocp.checkpointables_metadata(manager.address(path))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
    metadata.metadata["state"],
  )
  asked = {"state": abstract}
  state = ocp.load_checkpointables(manager.address(path), asked)["state"]
  meta, used, parts = manifest["meta"], [".params", ".frozen"], []
  # The config's own optimizer keeps it last; see `optimizer.make`.
  if meta["config"]["optim"].get("ema") and "optimizer" not in meta["own"]:
    *before, last = state["opt_state"]
    parts = [*[None] * len(before), optimizer.Average(last["weights"])]
    used.append(f".opt_state[{len(before)}]")
  # As they were named when saved; other arrays of the optimizer are not needed.
  named = TrainState(None, state["params"], state["frozen"], parts)
  saved = {
    name: x
    for name, x in manifest["arrays"].items()
    if name.startswith(tuple(used))
  }
  if wrong := digests.damaged(saved, named):
    raise ValueError(
      f"{path}: the digests of {wrong[:3]} ({len(wrong)} arrays) are not "
      "those they were saved with, expected the same: the files are damaged. "
      "Name another checkpoint."
    )
  found = model_params(named._replace(frozen=state["frozen"] or {}))
  return trees.flatten(found)
