"""The measurements of a run, before and after training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft_jax.common import trees
from sft_jax.common.workdir import find_json, write_json, write_jsonl
from sft_jax.data.audit import summary
from sft_jax.data.pipeline import Stream
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.evals import suite as evaluation
from sft_jax.models.lora import base_model
from sft_jax.training.build import evals, model
from sft_jax.training.build.build import BuiltRun
from sft_jax.training.session import Session

# Rows whose text is kept with their loss: of each source, and in all.
_SHOWN, _MOST = 3, 12


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
    rows = by_change(built.held_out, built.tokenizer, suite.by_document)
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
    known = suite.by_document, earlier.get("rows")
    rows = by_change(built.held_out, built.tokenizer, *known)
  folder = session.workdir / "evals"
  write_json(folder / "after.json", found)
  write_jsonl(folder / "held_out_rows.jsonl", rows)
  return found, params


def by_change(
  stream: Stream | None,
  tokenizer: Tokenizer,
  by_document: Sequence[Sequence[np.ndarray]],
  before: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
  """Examples of a stream, those whose loss rose most over the base's first.

  A long answer is hard for every model, so the loss alone says little of the
  training. Without `before`, the highest loss is first.

  Args:
    stream: each example once (epochs=1); None: there are none.
    tokenizer: of the stream's store.
    by_document: of each batch that was measured, the first ones, nats and
      weights [B, documents] of the rows' documents; see `suite.Suite`.
    before: nats per token of the examples before training, by their number.

  Returns {'row', 'source', 'place', 'nats', 'trained_tokens', 'nats_per_token',
  'change'} of each; the first few of each source are also `summary.sample`s.
  What weighs nothing has no loss and is left out.
  """
  if stream is None:
    return []
  found = [
    (float(nats[i, j]), float(weight[i, j]), row)
    for step, (nats, weight) in enumerate(by_document)
    for i, ids in enumerate(stream.rows_of(step))
    for j, row in enumerate(ids)
    if weight[i, j]
  ]
  if not before or not all(str(row) in before for *_, row in found):
    before = None  # A run that was forced on may have other rows.
  names = stream.store.stats.short_names()
  labels = [names[source.label] for source in stream.store.sources]
  rows = [
    {
      "row": row,
      "source": labels[int(stream.store.source[row])],
      "place": stream.store.place(row),
      "nats": nats,
      "trained_tokens": weight,
      "nats_per_token": nats / weight,
      "change": nats / weight - before[str(row)] if before else None,
    }
    for nats, weight, row in found
  ]
  by = "change" if before else "nats_per_token"
  rows.sort(key=lambda one: -one[by])
  shown: dict[str, int] = {}
  for row in rows:
    seen = shown.get(row["source"], 0)
    if seen < _SHOWN and sum(shown.values()) < _MOST:
      shown[row["source"]] = seen + 1
      row |= summary.sample(stream.store, row["row"], tokenizer)
  return rows


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
