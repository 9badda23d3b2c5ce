"""Building a run from its config: data, model, state and step.

Together with `train.py` this is the only reader of `config`: everything
below takes plain arguments.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from sft_jax import fit, optim, sharding, trees
from sft_jax.batch import Batch
from sft_jax.data import audit, cache, rows, tokenizers
from sft_jax.data.pipeline import Stream
from sft_jax.data.store import Store, to_sources
from sft_jax.evals import behaviours, measure, replies
from sft_jax.losses import LossSums, linear_cross_entropy
from sft_jax.models import hf, lora, transformer
from sft_jax.models.config import read_config
from sft_jax.models.transformer import Model
from sft_jax.train_step import TrainState, init_state, make_train_step

# An Config of the keys in configs/base.py; its attributes
# have no static types.
Config = Any
Say = Callable[[str], None]


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


def setup(config: Config, say: Say) -> Setup:
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
  assert num_steps is not None  # Only a stream without epochs has no end.
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
  config: Config,
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

  def stream(
    store: Store, *, epochs: int | None, normalize: Any = "token"
  ) -> Stream:
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


def _beside(config: Config, name: str, say: Say) -> str | None:
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
  config: Config, mesh: Mesh, say: Say
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
  return load_pretrained(config.model.path, mesh=mesh, key=key, **choices)


def load_pretrained(
  path: str | Path,
  *,
  dtype: str = "float32",
  mesh: Mesh | None = None,
  **choices: Any,
) -> tuple[Model, trees.Tree]:
  """A Hugging Face folder as (model, parameters), ready to run.

  Args:
    path: the folder: config.json and safetensors.
    dtype: of activations; parameters are float32 unless `param_dtype` says
      otherwise.
    mesh: where the parameters shall lie, see `sharding.make_mesh`; None is
      the first device.
    choices: further arguments of `models.hf.load_pretrained`.

  Raises:
    ValueError: a folder that is not there, not whole or not supported.
  """
  shardings = None
  if mesh is not None:
    shardings = lambda shapes: sharding.param_shardings(shapes, mesh)
  return hf.load_pretrained(path, dtype=dtype, shardings=shardings, **choices)


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


def make_suite(config: Config, run_: Setup) -> measure.Suite:
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
