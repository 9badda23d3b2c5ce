"""What a run leaves behind: checkpoints and their origin, export, adapters."""

import secrets
from pathlib import Path
from typing import Any

import jax
from etils import epath

from sft_jax.checkpointing import export, serving
from sft_jax.checkpointing.local_copies import LocalCopies
from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.checkpointing.resume import Origin
from sft_jax.common import distributed, sharding, trees
from sft_jax.common.buckets import remote_workdir, storage
from sft_jax.common.workdir import find_json, write_json
from sft_jax.models.hf import peft_save
from sft_jax.models.lora import base_model, merge
from sft_jax.step.train_step import TrainState, model_params
from sft_jax.training.build.build import BuiltRun
from sft_jax.training.build.data import (
  NOTHING,
  Config,
  Own,
  make_render_options,
)


def own_params(state: TrainState) -> trees.Tree:
  """The model's parameters, trained and frozen, and no copy of the base's."""
  return base_model.own(model_params(state))


def followed_metric(config: Config) -> str:
  """The metric that says which checkpoint is best; '' if none does."""
  default = "held_out/nats_per_token" if config.eval.patience else ""
  return config.checkpoint.keep_best or default


def find_origin(config: Config, built: BuiltRun, own: Own = NOTHING) -> Origin:
  """What the run is made from."""
  return Origin(
    config=config.to_dict(),
    data=built.stream.fingerprint,
    data_fingerprint_inputs=built.stream.fingerprint_inputs,
    model=built.model.config.raw,
    own=own.names,
  )


def open_checkpoints(
  config: Config, workdir: Path, *, runs: bool = False
) -> Checkpoints:
  """The checkpoints of a run, kept as its config says.

  The copies in memory are of whom `runs` it alone, who removes them.
  """
  keep = config.checkpoint
  copies = runs and keep.get("local_every")  # Not in older workdirs.
  folder = workdir / "checkpoints"
  if str(config.workdir).startswith("gs://"):  # Orbax writes there itself.
    folder: Any = epath.Path(storage.join(config.workdir, "checkpoints"))
  return Checkpoints(
    folder,
    keep=keep.keep,
    keep_every=keep.keep_every,
    keep_best=keep.best_is if followed_metric(config) else "",
    before_save=lambda: remote_workdir.push(workdir),
    local=_local_copies(keep, workdir) if copies else None,
  )


def _local_copies(config: Config, workdir: Path) -> LocalCopies:
  """In a folder of the run that is in the workdir, and of no other."""
  path = workdir / "run.json"
  mine = find_json(path) if jax.process_index() == 0 else None
  if mine is None and jax.process_index() == 0:
    mine = {"id": secrets.token_hex(8)}
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, mine)
  folder = Path(config.local_dir) / distributed.first_says(mine)["id"]
  return LocalCopies(folder)


def save_adapters(
  config: Config, built: BuiltRun, params: trees.Tree, path: Path
) -> str:
  """Writes the adapters alone; says what merging them will lose.

  What PEFT has no form for (experts that were trained whole) is named and not
  written: the merged export, which follows, holds it all.
  """
  assert built.model.lora
  outcome = "the adapters alone"
  try:
    peft_save.save_adapter(path, built.model, params, base=config.model.path)
  except ValueError as refusal:
    outcome = f"not written ({refusal})"
  dtype = config.export_dtype or config.model.param_dtype
  _, lost, worst = merge.merge(params, built.model.lora, dtype=dtype)
  where = f", at worst of {worst}" if worst else ""
  return (
    f"{path}: {outcome}. Rounded to {dtype} the merged model loses "
    f"{lost:.2g} of what they do{where}."
  )


def export_run(
  config: Config, built: BuiltRun, params: trees.Tree, path: Path
) -> export.Evidence:
  """Writes and verifies a run's model as its config says."""
  return export.save_pretrained(
    path,
    built.model,
    params,
    built.tokenizer,
    dtype=config.export_dtype or config.model.param_dtype,
    options=make_render_options(config),
    shardings=lambda shapes: sharding.param_shardings(shapes, built.mesh),
    export_into=config.get("export_into") or None,  # Not in older workdirs.
    share=lambda folder: remote_workdir.share(folder, config.workdir),
  )


def check_served(
  config: Config,
  built: BuiltRun,
  params: trees.Tree,
  path: Path,
  adapter: Path,
  gguf_file: Path | None = None,
) -> list[serving.Verdict]:
  """What tools make of a run's export; see `serving.check`."""
  trained = serving.reference(
    *(built.model, params, built.tokenizer), options=make_render_options(config)
  )
  return serving.check(path, trained, adapter=adapter, gguf_file=gguf_file)
