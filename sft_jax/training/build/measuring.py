"""The measurements of a run, before and after training."""

from typing import Any

from sft_jax.common import trees
from sft_jax.common.workdir import find_json, write_json, write_jsonl
from sft_jax.evals import row_losses
from sft_jax.evals import suite as evaluation
from sft_jax.models.lora import base_model
from sft_jax.training.build import evals, model
from sft_jax.training.build.build import BuiltRun
from sft_jax.training.session import Session


def before(
  session: Session,
  built: BuiltRun,
  suite: evaluation.Suite,
  params: trees.Tree,
  step: int,
) -> dict[str, Any]:
  """Measures the model before training, unless that was done already."""
  path = session.workdir / "evals" / "before.json"
  inputs, known = evals.measured_inputs(built), find_json(path)
  if known is not None and known.get("inputs", inputs) == inputs:
    measured = known.get("measured", {})
    suite.measured = {name: tuple(pair) for name, pair in measured.items()}
    return known
  session.log("Measuring the model before training ...")
  config = session.config
  if step:  # The state has been trained: the model is read again.
    params = _load_base(session, built)
  is_base = not (step or config.model.from_scratch or config.lora.path)
  with session.clock.on("evaluation"):
    found = suite(params, is_base=is_base and config.eval.kl)
    found |= evals.sample_replies(config, built, params)
    rows = _held_out_rows(built, suite)
    found["rows"] = {str(row["row"]): row["nats_per_token"] for row in rows}
  for line in suite.left_out():
    session.log(
      f"eval.max_seconds: measured here and from now on are {line}, what "
      "fits. Raise it, or set it to 0 for everything."
    )
  found["inputs"] = inputs
  write_json(path, found)
  return found


def _load_base(session: Session, built: BuiltRun) -> trees.Tree:
  """The base's parameters, from the folder that the run began with."""
  config = session.config.copy_and_resolve_references()
  config.model.path = str(built.source.folder)
  return model.load_model(config, built.mesh, session.log)[1]


def after(
  session: Session,
  built: BuiltRun,
  suite: evaluation.Suite,
  params: trees.Tree,
  earlier: dict[str, Any],
) -> tuple[dict[str, Any], trees.Tree]:
  """(the measurement after training, the parameters without the base's)."""
  session.log("Measuring the model after training ...")
  with session.clock.on("evaluation"):
    found = suite(_beside_base(session, built, params))
    params = base_model.own(params)
    found |= evals.sample_replies(session.config, built, params)
    rows = _held_out_rows(built, suite, earlier.get("rows"))
  folder = session.workdir / "evals"
  write_json(folder / "after.json", found)
  write_jsonl(folder / "held_out_rows.jsonl", rows)
  return found, params


def _held_out_rows(
  built: BuiltRun,
  suite: evaluation.Suite,
  before: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
  """Held-out examples as they were measured last; see `row_losses`."""
  if built.held_out is None:
    return []
  args = (built.held_out, built.tokenizer, suite.by_document, before)
  return row_losses.by_change(*args)


def _beside_base(
  session: Session, built: BuiltRun, params: trees.Tree
) -> trees.Tree:
  """The parameters, with what comparing them with the base takes.

  What is missing of the base is read again from the model's folder.
  """
  config = session.config
  if (
    not config.eval.kl
    or config.model.from_scratch
    or not (built.held_out or built.general_text)
    or base_model.base_of(params, built.trained) is not None
  ):
    return params
  copies = base_model.to_copy(_load_base(session, built), built.trained)
  return base_model.with_copies(params, copies)
