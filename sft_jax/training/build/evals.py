"""What a config says of evaluation: the suite that a run is measured by."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sft_jax.common import sharding, trees
from sft_jax.common.batch import Batch
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.store.files import hash_text
from sft_jax.data.store.store import Store
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.evals import memorization, suite
from sft_jax.inference import generate
from sft_jax.training.build import build, data, sources, step
from sft_jax.training.build import model as setup_model
from sft_jax.training.build.build import BuiltRun
from sft_jax.training.build.data import Config

# Of a device's matmul rate, what a training step usually reaches, and what
# replies do, which are made token by token.
_USUAL_SHARE, _SAMPLING_SHARE = 0.4, 0.1
_LEAST_SECONDS = 120.0


def make_suite(
  config: Config,
  built: BuiltRun,
  progress: suite.Progress = lambda what, done, of: None,
) -> suite.Suite:
  """What is measured before and after training."""
  model, loss = _in_float32(config, built)
  documents, held_out = 0, built.held_out
  if held_out:
    steps = range(held_out.num_steps or 0)
    documents = max(len(x) for i in steps for x in held_out.rows_of(i))
    loss = functools.partial(loss, documents=documents)
  own_loss = functools.partial(loss, compare=False)
  return suite.Suite(
    loss_fn=loss,
    own_loss_fn=own_loss if config.eval.kl else None,
    batches=lambda stream: build.batches_on(built.mesh, stream),
    held_out=held_out,
    documents=documents,
    general_text=built.general_text,
    items=built.items,
    group_names=step.group_names,
    train_rows=built.train_rows,
    knowledge=built.knowledge,
    repeats=make_repeats(config, built),
    canaries=make_canaries(config, built),
    max_seconds=max_seconds(config, built),
    prompts_at_once=config.eval.batch_size,
    progress=progress,
    generate=lambda params, conversations, progress: generate.generate(
      model,
      params,
      built.tokenizer,
      conversations,
      max_new_tokens=config.eval.max_new_tokens,
      progress=progress,
      options=data.make_render_options(config),
      batch_size=config.eval.batch_size,
      mesh=built.mesh,
    ),
  )


def _in_float32(config: Config, built: BuiltRun) -> tuple[Any, Any]:
  """(model, loss with what the base says), as they measure.

  Those of the run; in float32 where it computes in bfloat16 on a CPU, most of
  which emulate that.
  """
  on_cpu = built.mesh.devices.flat[0].platform == "cpu"
  if not on_cpu or config.model.dtype != "bfloat16":
    return built.model, built.measure_fn
  config = config.copy_and_resolve_references()
  config.model.dtype = "float32"
  rows = built.model.lora.token_rows if built.model.lora else ()
  shape, mesh = built.model.config, built.mesh
  model = setup_model.build_model(config, shape, mesh, rows).model
  streams = (built.stream, built.held_out, built.general_text)
  made = step.make_step(config, model, mesh, built.num_steps, streams)
  return model, made.measure_fn


def training_seconds(config: Config, built: BuiltRun, steps: int) -> float:
  """What so many steps will take, at the share of its peak that is usual."""
  tokens = steps * config.batch_size * config.data.seq_len
  return tokens * built.flops_per_token / (_USUAL_SHARE * _peak(built))


def evaluation_seconds(config: Config, built: BuiltRun) -> float:
  """What one measurement will take, were it not bounded."""
  streams = (built.held_out, built.general_text, built.train_rows)
  batches = sum(stream.num_steps or 0 for stream in streams if stream)
  tokens = batches * config.batch_size * config.data.seq_len
  prompts = len(built.items) + len(built.knowledge)
  sampled = prompts * config.eval.max_new_tokens
  work = tokens / _USUAL_SHARE + sampled / _SAMPLING_SHARE
  return work * built.flops_per_token / 3 / _peak(built)


def _peak(built: BuiltRun) -> float:
  return built.machine.chip.flops * built.mesh.size


def measured_inputs(built: BuiltRun) -> dict[str, Any]:
  """What evaluations read: those of other inputs cannot be compared."""
  streams = {"held_out": built.held_out, "general_text": built.general_text}
  sets = {"behaviors": built.items, "knowledge": built.knowledge}
  return {
    **{name: x.fingerprint for name, x in streams.items() if x},
    **{
      name: hash_text(repr([one._replace(where="") for one in items]))
      for name, items in sets.items()
      if items
    },
  }


def max_seconds(config: Config, built: BuiltRun) -> float:
  """The bound of one measurement: `eval.max_seconds`; 0 is none."""
  if config.eval.max_seconds != "auto":
    return float(config.eval.max_seconds)
  quarter = training_seconds(config, built, built.num_steps) / 4
  return max(quarter, _LEAST_SECONDS)


def make_canaries(
  config: Config, built: BuiltRun
) -> Callable[[trees.Tree], dict[str, Any]] | None:
  """What measures the canaries of a run; None if it has none.

  Half of those drawn are written into the data; what the hold-out took of
  them is not trained on and counts as kept back.
  """
  if not config.data.canaries:
    return None
  row_nats = jax.jit(built.row_nats)
  own = sharding.own_rows(built.mesh, config.batch_size)
  rows = sharding.row_sharding(built.mesh)

  def measured(params: trees.Tree) -> dict[str, Any]:
    def nats(batch: Batch) -> np.ndarray:
      mine = jax.tree.map(lambda x: x[own], batch)
      return np.asarray(row_nats(params, sharding.put_rows(mine, rows)))

    return memorization.measure_exposure(
      memorization.draw_canaries(2 * config.data.canaries, config.seed),
      planted(built.stream.store),
      nats,
      built.tokenizer,
      data.make_render_options(config),
      batch_size=config.batch_size,
    )

  return measured


def planted(store: Store) -> set[int]:
  """Numbers of the canaries that are among a store's rows."""
  places = map(store.place, range(len(store.index)))
  mine = (place.rpartition(":") for place in places)
  return {int(line) for file, _, line in mine if file == sources.CANARIES}


def make_repeats(
  config: Config, built: BuiltRun
) -> Callable[[list[dict[str, Any]]], dict[str, Any]] | None:
  """What of the training answers replies repeat; None where it is off.

  The function takes the records of `behaviors.Scores` and enters each reply's
  own overlap and novelty into it.
  """
  words = config.eval.answer_words
  if not words or not built.items:
    return None
  known, rows_read = answer_texts(
    built.stream.store, built.tokenizer, words, config.seed
  )
  if not known:
    return None  # Raw text alone: there are no answers.
  index, held_out = memorization.Answers([x.split() for x in known]), None
  if built.held_out:
    store = built.held_out.store
    texts, _ = answer_texts(store, built.tokenizer, words, config.seed)
    held_out = memorization.repeats(texts, index)

  def measured(replies: list[dict[str, Any]]) -> dict[str, Any]:
    for reply in replies:
      words = reply["reply"].split()
      reply["overlap"] = index.overlap(words)
      reply["novelty"] = index.novelty(words, memorization.GRAM)
    found = memorization.repeats((r["reply"] for r in replies), index)
    return {
      "answers": len(known),
      "rows": rows_read,
      "rows_of": len(built.stream.store.index),
      "gram": memorization.GRAM,
      "replies": found and found._asdict(),
      "held_out_answers": held_out and held_out._asdict(),
    }

  return measured


def answer_texts(
  store: Store, tokenizer: tokenizers.Tokenizer, words: int, seed: int
) -> tuple[list[str], int]:
  """(texts of trained answers, how many examples were read for them).

  Args:
    store: its rows; of raw text, which is no answer, nothing is taken.
    words: nothing more is read once the answers have so many.
  """
  texts, taken = list[str](), 0
  of_text = TOKEN_ROLES.index("text")
  order = np.random.default_rng(seed).permutation(len(store.index))
  for read, i in enumerate(order):
    if taken >= words:
      return texts, read
    example = store.example(int(i))
    trained = (example.loss_weights > 0) & (example.roles != of_text)
    edges = np.flatnonzero(np.diff(np.pad(trained, 1).astype(np.int8)))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
      texts.append(tokenizer.decode(example.tokens[start:end].tolist()))
      taken += len(texts[-1].split())
  return texts, len(order)


def sample_replies(
  config: Config, built: BuiltRun, params: trees.Tree
) -> dict[str, list[dict[str, Any]]]:
  """{'replies': `eval.samples` of them} of a run without behaviors."""
  if built.items or built.held_out is None or not config.eval.samples:
    return {}
  replies = generate.answer_rows(
    *(built.model, params, built.tokenizer, built.held_out.store),
    number=config.eval.samples,
    max_new_tokens=config.eval.max_new_tokens,
    mesh=built.mesh,
  )
  return {"replies": replies}


def paired_samples(
  before: dict[str, Any], after: dict[str, Any]
) -> list[dict[str, Any]]:
  """The replies of two measurements as `measure.compare` gives samples.

  Of the rows that both have: a forced run may have other held-out rows.
  """
  asked = {old["where"]: old for old in before.get("replies", ())}
  return [
    {
      "group": f"held-out row {new['where']}",
      "prompt": new["prompt"],
      "before": {"text": old["reply"], "stopped": old["stopped"]},
      "after": {"text": new["reply"], "stopped": new["stopped"]},
    }
    for new in after.get("replies", ())
    if (old := asked.get(new["where"]))
  ]
