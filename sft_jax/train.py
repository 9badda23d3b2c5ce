"""The story of a run: data and model meet, train, are measured and exported.

`setup(config)` builds everything and touches nothing on disk but the cache;
`run(config)` is what `main` calls. This file is the only reader of `config`.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text

from sft_jax import fit, metrics, optim, report, sharding, terminal, trees
from sft_jax.batch import Batch
from sft_jax.checkpoint import Checkpoints
from sft_jax.data import audit, cache, rows, tokenizers
from sft_jax.data.pipeline import Stream
from sft_jax.data.store import Store, to_sources
from sft_jax.evals import behaviours, measure, replies
from sft_jax.losses import LossSums, linear_cross_entropy
from sft_jax.models import hf, lora, transformer
from sft_jax.models.config import read_config
from sft_jax.models.transformer import Model
from sft_jax.train_step import (
  TrainState,
  init_state,
  make_train_step,
  split_micro_batches,
)

Say = Callable[[str], None]


class Result(NamedTuple):
  """What a run leaves behind.

  Attributes:
    metrics: the figures of `workdir/result.json`.
    params: the parameters after the last step, trained and frozen.
    workdir: the folder the run wrote.
  """

  metrics: dict[str, Any]
  params: trees.Tree
  workdir: Path


class Setup(NamedTuple):
  """All that a run needs, built from a config; see `setup`."""

  mesh: Mesh
  tokenizer: tokenizers.Tokenizer
  model: Model
  state: TrainState
  state_shardings: TrainState
  loss_fn: Callable[[trees.Tree, Batch], LossSums]
  train_step: Callable
  num_steps: int
  flops_per_token: float
  stream: Stream
  held_out: Stream | None
  general_text: Stream | None
  items: list[behaviours.Item]


def run(config: ml_collections.ConfigDict) -> Result:
  """Trains as the config says, in `config.workdir`; resumes what is there.

  Before and after training the model is measured (behaviours, held-out loss,
  perplexity on general text). A finished workdir is reported, not rerun.

  Raises:
    ValueError: anything a config, a file or a row can get wrong.
    FloatingPointError: the loss stopped being finite; names the step.
  """
  out = terminal.console()
  say = lambda line: out.print(Text(line))
  workdir = Path(config.workdir)
  _check_same_config(config, workdir)

  run_ = setup(config, say)
  checkpoints = Checkpoints(
    workdir / "checkpoints", keep=config.checkpoint.keep
  )
  state = restore(checkpoints, run_, say)
  start_step = int(state.step)
  _write_json(workdir / "config.json", config.to_dict())
  _write_json(workdir / "ledger.json", run_.stream.ledger.to_json())
  start_page(config, run_, start_step, out)
  result_path = workdir / "result.json"
  if result_path.exists() and start_step == run_.num_steps:
    say(f"{workdir} is finished. To train again, choose another workdir.")
    result = json.loads(result_path.read_text())
    show_result(out, result, config.eval.samples)
    return Result(result, trees.merge(state.params, state.frozen), workdir)

  # -- Before ---------------------------------------------------------------
  suite = _make_suite(config, run_)
  before_path = workdir / "evals" / "before.json"
  if before_path.exists():
    before = json.loads(before_path.read_text())
  else:
    say("Measuring the model before training ...")
    before = suite(trees.merge(state.params, state.frozen))
    _write_json(before_path, before)

  # -- Train ----------------------------------------------------------------
  state = _loop(config, run_, state, checkpoints, suite, out)

  # -- After ----------------------------------------------------------------
  params = trees.merge(state.params, state.frozen)
  say("Measuring the model after training ...")
  after = suite(params)
  _write_json(workdir / "evals" / "after.json", after)
  result = measure.compare(before, after)
  show_result(out, result, config.eval.samples)
  if config.export:
    say(f"Writing {workdir / 'export'} ...")
    hf.save_pretrained(workdir / "export", run_.model, params, run_.tokenizer)
  report.write(
    workdir / "report.html",
    records=metrics.read_jsonl(workdir / "metrics.jsonl"),
    result=result,
    ledger=run_.stream.ledger.to_json(),
    config=config.to_dict(),
  )
  checkpoints.close()
  _write_json(result_path, result)
  return Result(result, params, workdir)


# -- Setup ------------------------------------------------------------------


def setup(config: ml_collections.ConfigDict, say: Say) -> Setup:
  """Builds mesh, data, model, state and step; announces what takes time."""
  mesh = sharding.make_mesh(**config.mesh)
  if config.batch_size % (
    config.accum_steps * mesh.shape["data"] * mesh.shape["fsdp"]
  ):
    raise ValueError(
      f"batch_size: got {config.batch_size} for accum_steps="
      f"{config.accum_steps}, mesh.data={mesh.shape['data']}, mesh.fsdp="
      f"{mesh.shape['fsdp']}, expected a multiple of their product. Change "
      "batch_size or accum_steps."
    )
  tokenizer = tokenizers.load_tokenizer(config.model.path)
  say(f"Reading {config.data.train} ...")
  data = load_data(config, tokenizer, say)
  num_steps = config.steps or data.stream.num_steps
  model, params = _load_model(config, mesh, say)
  if tokenizer.vocab_size > model.config.vocab_size:
    raise ValueError(
      f"{config.model.path}: the tokenizer has {tokenizer.vocab_size} ids for "
      f"{model.config.vocab_size} rows of the embedding, expected at most as "
      "many. The tokenizer belongs to another model."
    )

  learning_rate = optim.schedule(
    config.optim.schedule,
    peak=config.optim.learning_rate,
    warmup_steps=config.optim.warmup_steps,
    num_steps=num_steps,
    final_fraction=config.optim.final_fraction,
  )
  tx = optim.adamw(
    learning_rate,
    b1=config.optim.b1,
    b2=config.optim.b2,
    eps=config.optim.eps,
    weight_decay=config.optim.weight_decay,
    decay_patterns=config.optim.decay,
    clip_norm=config.optim.clip_norm,
  )
  trained = lora.is_adapter if config.lora.rank else lambda path: True

  def loss_fn(params: trees.Tree, batch: Batch) -> LossSums:
    hidden = model.hidden(
      params, batch.tokens, batch.positions, batch.segment_ids
    )
    return linear_cross_entropy(
      hidden,
      model.head(params).astype(hidden.dtype),
      batch.targets,
      batch.loss_weights,
      chunk_tokens=config.loss.chunk_tokens,
    )

  state_shardings = _state_shardings(params, trained, tx, mesh)
  state = jax.jit(
    lambda params: init_state(params, trained, tx),
    out_shardings=state_shardings,
    donate_argnums=0,
  )(params)
  num_trained, num_frozen = fit.matmul_params(
    trees.merge(state.params, state.frozen), trained
  )
  return Setup(
    mesh=mesh,
    tokenizer=tokenizer,
    model=model,
    state=state,
    state_shardings=state_shardings,
    loss_fn=loss_fn,
    train_step=make_train_step(loss_fn, tx, learning_rate),
    num_steps=num_steps,
    flops_per_token=fit.model_flops_per_token(
      trained_matmul_params=num_trained,
      frozen_matmul_params=num_frozen,
      num_layers=model.config.num_layers,
      num_heads=model.config.num_heads,
      head_dim=model.config.head_dim,
      context=fit.mean_context(data.stream.store.lengths),
    ),
    **data._asdict(),
  )


class Data(NamedTuple):
  """What is trained on, and what is measured before and after."""

  stream: Stream
  held_out: Stream | None
  general_text: Stream | None
  items: list[behaviours.Item]


def load_data(
  config: ml_collections.ConfigDict,
  tokenizer: tokenizers.Tokenizer,
  say: Say,
) -> Data:
  """Encodes (or re-uses) every source, and plans its batches."""
  template_kwargs = config.data.template_kwargs.to_dict()

  def store(source: Any) -> Store:
    # A glob is one source per file, so that the ledger tells them apart.
    sources = [
      (str(file), one.weight)
      for one in to_sources(source)
      for file in rows.find_files(one.path)
    ]
    found = cache.build(
      sources,
      tokenizer,
      directory=config.data.cache_dir or Path(config.workdir) / "cache",
      format=config.data.format,
      max_length=config.data.seq_len,
      history=config.data.history,
      over_long=config.data.over_long,
      on_bad_row=config.data.on_bad_row,
      template_kwargs=template_kwargs,
      announce=say,
    )
    audit.verify(
      found,
      vocab_size=tokenizer.vocab_size,
      stop_ids=tokenizer.stop_ids,
      bos_id=tokenizer.bos_id,
    )
    return found

  def stream(store: Store, *, epochs: int, normalize: Any = "token") -> Stream:
    return Stream(
      store,
      seq_len=config.data.seq_len,
      batch_size=config.batch_size,
      seed=config.seed,
      packing=config.data.packing,
      epochs=epochs,
      normalize=normalize,
    )

  examples, held_out = store(config.data.train), None
  if config.data.eval:
    held_out = store(config.data.eval)
  elif config.data.holdout:
    examples, held_out = examples.split(config.data.holdout, seed=config.seed)
  general_text = _beside(config, "general_text", say)
  items = _beside(config, "behaviours", say)
  return Data(
    stream(
      examples,
      epochs=None if config.steps else config.epochs,
      normalize=config.loss.normalize,
    ),
    stream(held_out, epochs=1) if held_out else None,
    stream(store(general_text), epochs=1) if general_text else None,
    behaviours.load(items) if items else [],
  )


def _beside(
  config: ml_collections.ConfigDict, name: str, say: Say
) -> str | None:
  """The file of `eval.<name>`; 'auto' looks beside the training data."""
  value = config.eval[name]
  if value != "auto":
    return value or None
  source = config.data.train
  first = source if isinstance(source, str) else source[0]
  first = first if isinstance(first, str) else first[0]
  path = Path(first).parent / f"{name}.jsonl"
  if path.is_file():
    return str(path)
  say(f"eval.{name}: none, as there is no {path}")
  return None


def _load_model(
  config: ml_collections.ConfigDict, mesh: Mesh, say: Say
) -> tuple[Model, trees.Tree]:
  """The model and its parameters, on their devices."""
  adapters = None
  if config.lora.rank:
    adapters = lora.LoraConfig(
      rank=config.lora.rank,
      alpha=config.lora.alpha,
      targets=config.lora.targets,
    )
  choices = {
    "dtype": config.model.dtype,
    "param_dtype": config.model.param_dtype,
    "attention": config.model.attention,
    "remat": config.model.remat,
    "scan": config.model.scan,
    "lora": adapters,
  }
  key = jax.random.key(config.seed)
  if config.model.from_scratch:
    say(f"New parameters in the shapes of {config.model.path} ...")
    model = transformer.build(read_config(config.model.path), **choices)
    shapes = jax.eval_shape(model.init, key)
    shardings = sharding.param_shardings(shapes, mesh)
    return model, jax.jit(model.init, out_shardings=shardings)(key)
  say(f"Loading {config.model.path} ...")
  return hf.load_pretrained(
    config.model.path,
    shardings=lambda shapes: sharding.param_shardings(shapes, mesh),
    key=key,
    **choices,
  )


def _state_shardings(
  params: trees.Tree,
  trained: Callable[[str], bool],
  tx: optax.GradientTransformation,
  mesh: Mesh,
) -> TrainState:
  """Moments lie where their parameters lie; counters everywhere."""
  shapes = jax.eval_shape(lambda p: init_state(p, trained, tx), params)
  whole = sharding.replicated(mesh)
  of_params = sharding.param_shardings(shapes.params, mesh)
  return TrainState(
    step=whole,
    params=of_params,
    frozen=sharding.param_shardings(shapes.frozen, mesh),
    opt_state=optax.tree_map_params(
      tx,
      lambda _, s: s,
      shapes.opt_state,
      of_params,
      transform_non_params=lambda _: whole,
    ),
  )


def _make_suite(
  config: ml_collections.ConfigDict, run_: Setup
) -> measure.Suite:
  """What is measured before and after training."""
  return measure.Suite(
    loss_fn=run_.loss_fn,
    put_rows=lambda batch: sharding.put_rows(batch, sharding.rows(run_.mesh)),
    held_out=run_.held_out,
    general_text=run_.general_text,
    items=run_.items,
    generate=lambda params, conversations: replies.generate(
      run_.model,
      params,
      run_.tokenizer,
      conversations,
      max_new_tokens=config.eval.max_new_tokens,
      template_kwargs=config.data.template_kwargs.to_dict(),
      batch_size=config.eval.batch_size,
    ),
  )


# -- The loop ---------------------------------------------------------------


def _loop(
  config: ml_collections.ConfigDict,
  run_: Setup,
  state: TrainState,
  checkpoints: Checkpoints,
  suite: measure.Suite,
  out: Console,
) -> TrainState:
  """Takes the steps that are left; returns the last state."""
  step = start = int(state.step)
  if start == run_.num_steps:
    return state
  workdir = Path(config.workdir)
  rows = sharding.rows(run_.mesh, leading_axes=1)
  batches = run_.stream.batches(
    start,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )

  def next_batch() -> tuple[Batch, int]:
    batch = next(batches)
    tokens = int((batch.segment_ids > 0).sum()) * jax.process_count()
    cut = split_micro_batches(batch, config.accum_steps)
    return sharding.put_rows(cut, rows), tokens

  def save(step: int) -> None:
    meta = {"data": run_.stream.fingerprint, "config": config.to_json()}
    checkpoints.save(step, state, meta)

  batch, tokens = next_batch()
  out.print("Compiling the training step ...")
  started = time.perf_counter()
  train_step = (
    jax.jit(run_.train_step, donate_argnums=0).lower(state, batch).compile()
  )
  out.print(f"Compiled in {time.perf_counter() - started:.1f} s.")

  writer = metrics.JsonlWriter(workdir / "metrics.jsonl", resume_step=start)
  progress = terminal.StepProgress(out, total=run_.num_steps, start=start)
  window, window_tokens, window_steps = metrics.Window(), 0, 0
  clock = time.perf_counter()
  with _StopSignals() as stop:
    while step < run_.num_steps and not stop.requested:
      state, pairs = train_step(state, batch)
      step += 1
      window.add(step, pairs)
      window_tokens, window_steps = window_tokens + tokens, window_steps + 1
      last = step == run_.num_steps
      if not last:  # Read ahead while the device works.
        batch, tokens = next_batch()
      if step % config.log.every == 0 or last or stop.requested:
        values = window.take()
        seconds = time.perf_counter() - clock
        values |= _speed(
          run_,
          values["loss/trained_tokens"],
          window_tokens,
          window_steps,
          seconds,
        )
        writer.write(step, values)
        progress.update(
          step,
          f"loss {values['loss/nats_per_token']:.3f}  "
          f"{values['speed/tokens_per_s']:,.0f} tokens/s  "
          f"{values['speed/trained_tokens_per_s']:,.0f} trained/s"
          + (
            f"  MFU {values['speed/mfu']:.0%}" if "speed/mfu" in values else ""
          ),
          (run_.num_steps - step) * seconds / window_steps,
        )
        window_tokens, window_steps = 0, 0
        clock = time.perf_counter()
      if config.eval.every and step % config.eval.every == 0 and not last:
        values = suite.losses(trees.merge(state.params, state.frozen))
        writer.write(step, values)
        clock = time.perf_counter()
      if (
        last
        or stop.requested
        or (config.checkpoint.every and step % config.checkpoint.every == 0)
      ):
        save(step)
  progress.close()
  writer.close()
  checkpoints.wait()
  if step < run_.num_steps:
    raise Stopped(
      f"stopped by signal after step {step}, which is saved. Run the same "
      "command again to go on from there."
    )
  return state


class Stopped(Exception):
  """The run was asked to stop (SIGTERM, Ctrl-C) and has saved its state."""


class _StopSignals:
  """Turns SIGTERM and Ctrl-C into a flag that the loop reads.

  The second signal is not caught: it ends the process at once.
  """

  def __init__(self) -> None:
    self.requested = False

  def __enter__(self) -> "_StopSignals":
    self._before = {
      number: signal.signal(number, self._request)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def _request(self, number: int, frame: Any) -> None:
    del number, frame
    self.requested = True
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __exit__(self, *exception: Any) -> None:
    self._restore()


def _speed(
  run_: Setup, trained_tokens: float, tokens: int, steps: int, seconds: float
) -> dict[str, float]:
  """The window's speed; MFU where the device's peak is known."""
  values = {
    "time/step_s": seconds / steps,
    "speed/tokens_per_s": tokens / seconds,
    "speed/trained_tokens_per_s": trained_tokens / seconds,
  }
  share = fit.mfu(
    tokens / seconds,
    run_.flops_per_token,
    num_devices=run_.mesh.size,
    chip=fit.chip(jax.devices()[0].device_kind),
  )
  return values if share is None else {**values, "speed/mfu": share}


# -- Start and resume -------------------------------------------------------


def start_page(
  config: ml_collections.ConfigDict,
  run_: Setup,
  start_step: int,
  out: Console,
) -> None:
  """Prints what is about to happen."""
  c, state, epoch = run_.model.config, run_.state, run_.stream.ledger.epoch
  device = jax.devices()[0]
  num_trained, num_frozen = trees.count(state.params), trees.count(state.frozen)
  tokens = run_.num_steps * config.batch_size * config.data.seq_len
  seconds = (
    tokens
    * run_.flops_per_token
    / (_USUAL_SHARE * fit.flops_per_second(device) * run_.mesh.size)
  )
  terminal.facts(
    out,
    "Model",
    {
      "from": config.model.path
      + (" (new parameters)" if config.model.from_scratch else ""),
      "shape": f"{c.family}: {c.num_layers} layers, width {c.d_model}, "
      f"{c.num_heads} heads ({c.num_kv_heads} key/value), "
      f"vocabulary {c.vocab_size}, {config.model.dtype}",
      "parameters": f"{terminal.number(num_trained)} trained, "
      f"{terminal.number(num_frozen)} frozen",
      "devices": f"{run_.mesh.size} x {device.device_kind}, mesh "
      + " x ".join(f"{a}={n}" for a, n in run_.mesh.shape.items()),
    },
  )
  terminal.lines(out, "Data", run_.stream.ledger.lines())
  terminal.facts(
    out,
    "Plan",
    {
      "steps": f"{run_.num_steps} of {config.batch_size} rows x "
      f"{config.data.seq_len} tokens"
      + (f" in {config.accum_steps} parts" if config.accum_steps > 1 else "")
      + (f", from step {start_step}" if start_step else ""),
      "epochs": f"{run_.num_steps * config.batch_size / epoch.packs:.2f} of "
      f"{epoch.packs} packed rows",
      "fill": f"{epoch.fill:.1%} of the slots hold a token",
      "held out": _describe(run_.held_out),
      "general text": _describe(run_.general_text),
      "behaviours": f"{len(run_.items)} prompts",
      "expected time": f"about {terminal.duration(seconds)} of training",
      "workdir": config.workdir,
    },
  )
  for placement in sharding.table(state.params, run_.mesh):
    if placement.note:
      out.print(Text(f"{placement.path}: {placement.note}"))


# Of a device's matmul rate, what a training step usually reaches.
_USUAL_SHARE = 0.4


def _describe(stream: Stream | None) -> str:
  if stream is None:
    return "none"
  return f"{len(stream.store.index):,} examples"


def restore(checkpoints: Checkpoints, run_: Setup, say: Say) -> TrainState:
  """The newest state that verifies; the fresh one if there is none.

  Raises:
    ValueError: the checkpoint was made from other data.
  """
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    run_.state,
  )
  restored = checkpoints.restore(abstract, say)
  if restored is None:
    return run_.state
  found, expected = restored.meta["data"], run_.stream.fingerprint
  if found != expected:
    raise ValueError(
      f"checkpoint {restored.step}: made from data {found}, the config now "
      f"gives {expected}. A file, the tokenizer, the template or a policy has "
      "changed since; restore it, or start in a new workdir."
    )
  say(f"Resuming after step {restored.step}.")
  return restored.state


def _check_same_config(
  config: ml_collections.ConfigDict, workdir: Path
) -> None:
  """Raises ValueError with the difference if the workdir has another config."""
  path = workdir / "config.json"
  if not path.exists():
    return
  old = trees.flatten(json.loads(path.read_text()))
  new = trees.flatten(json.loads(json.dumps(config.to_dict())))
  changed = [
    f"{key.replace('/', '.')}: {old.get(key)!r} -> {new.get(key)!r}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and key != "workdir"
  ]
  if changed:
    raise ValueError(
      f"{workdir}: holds a run with another config:\n  "
      + "\n  ".join(changed)
      + "\nexpected the same. Undo the change, or choose another workdir."
    )


def _write_json(path: Path, value: Any) -> None:
  """Writes a file whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix(".part")
  part.write_text(json.dumps(value, indent=2) + "\n")
  os.replace(part, path)
