"""What a config says of data: sources, render options, stores, streams."""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft_jax.common import distributed
from sft_jax.common.buckets import remote_workdir
from sft_jax.data import selection
from sft_jax.data.audit import checks, token_checks
from sft_jax.data.chat import template as templates
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.pipeline import Stream
from sft_jax.data.sources import MemoryRows, Source
from sft_jax.data.store import build, teacher
from sft_jax.data.store.store import Store
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.evals import behaviors
from sft_jax.training.build.sources import (
  Config,
  Log,
  beside,
  by_file,
  make_sources,
  train_sources,
)


class Own(NamedTuple):
  """What a caller of `train` gives in place of config keys.

  Attributes:
    rows: trained on, in place of data.train.
    eval_rows: held out, in place of data.eval.
    loss: minimized in place of config.loss; see `step.loss.Loss`.
    optimizer: an optax transformation in place of config.optim.
    on_record: called with each step's record, a plain dict.
  """

  rows: MemoryRows | None = None
  eval_rows: MemoryRows | None = None
  loss: Any = None
  optimizer: Any = None
  on_record: Callable[[dict[str, Any]], Any] | None = None

  @property
  def names(self) -> dict[str, str]:
    """What of the config is replaced, for the record of a run."""
    parts = {"loss": self.loss, "optimizer": self.optimizer}
    return {
      name: getattr(part, "__qualname__", type(part).__qualname__)
      for name, part in parts.items()
      if part is not None
    }


NOTHING = Own()


class Stores(NamedTuple):
  """The encoded rows of a run, and what the audit says of them."""

  train: Store
  held_out: Store | None
  general_text: Store | None
  findings: list[checks.Finding]


class Data(NamedTuple):
  """What is trained on, and what is measured before and after."""

  stream: Stream
  held_out: Stream | None
  general_text: Stream | None
  train_rows: Stream | None
  items: list[behaviors.Item]
  knowledge: list[behaviors.Item]


def load_stores(
  config: Config,
  tokenizer: tokenizers.Tokenizer,
  log: Log,
  own: Own = NOTHING,
) -> Stores:
  """Encodes (or reuses) every source, and checks what came out."""
  known = token_checks.facts(tokenizer, make_render_options(config))
  findings = list[checks.Finding]()
  columns = config.data.columns.to_dict()
  own_files = bool(config.data.eval or own.eval_rows)

  def store(sources: tuple[Source, ...], of: str) -> Store:
    parts = [part for one in sources for part in by_file(one)]
    found = build_store(config, parts, tokenizer, log)
    findings.extend(checks.check_store(found, known, of=of))
    return found

  train = train_sources(config, own.rows)
  examples = store(train, "train")
  texts = examples.index["text"]
  paired = pair_kind(config) in ("both", "any")
  if paired and texts.any():
    raise ValueError(
      f"{examples.place(int(texts.argmax()))}: got raw text with preference."
      f"loss={config.preference.loss!r}, expected rows of answers. Leave such "
      "rows out of data.train."
    )
  held_out = None
  if own_files:
    sources = make_sources(own.eval_rows or config.data.eval, columns)
    held_out = store(sources, "held out")
  elif config.data.holdout and len(examples.index):
    examples, held_out = examples.split(config.data.holdout, seed=config.seed)
  # Rows held out measure all there is: they are neither dropped nor weighted.
  examples = selection.select(
    examples, folder=config.data.scores, seed=config.seed, log=log
  )
  if kind := kept_kind(config):
    examples = _with_kept(config, examples, kind)
    if held_out and kind == "reference":
      held_out = _with_kept(config, held_out, kind)
  if held_out:
    findings.append(checks.overlap(examples, held_out, own_files=own_files))
  general = None
  if path := beside(config, "general_text", log):
    general = store(make_sources(path), "general text")
  return Stores(examples, held_out, general, findings)


def kept_kind(config: Config) -> str:
  """Whose predictions are read beside the rows: teacher, reference or ''."""
  # Neither is in older workdirs.
  if config.get("distill", {}).get("teacher") == "kept":
    return "teacher"
  kept = config.get("preference", {}).get("reference") == "kept"
  return "reference" if kept and config.preference.loss else ""


def kept_folder(config: Config, store: Store, kind: str) -> tuple[str, Path]:
  """(digest of a store's rows, where what is kept of them is)."""
  rows = teacher.rows_digest(store.tokens, store.runs)
  cache = Path(config.data.cache_dir or Path(config.workdir) / "cache")
  return rows, cache / f"{kind}-{rows[:24]}"


def _with_kept(config: Config, store: Store, kind: str) -> Store:
  rows, folder = kept_folder(config, store, kind)
  return dataclasses.replace(store, teacher=teacher.open_kept(folder, rows))


def build_store(
  config: Config,
  sources: Sequence[Source],
  tokenizer: tokenizers.Tokenizer,
  log: Log,
) -> Store:
  """Encodes sources as the config says, or re-uses what was encoded."""
  with distributed.first_alone():
    return build.build(
      sources,
      tokenizer,
      make_render_options(config),
      directory=config.data.cache_dir or remote_workdir.cache(config.workdir),
      format=config.data.format,
      max_length=config.data.seq_len,
      on_bad_row=config.data.on_bad_row,
      seed=config.seed,
      num_workers=config.data.workers,
      log=log,
    )


def load_data(
  config: Config,
  tokenizer: tokenizers.Tokenizer,
  log: Log,
  own: Own = NOTHING,
) -> Data:
  """The batches of every source, or a refusal of what the audit found."""
  stores = load_stores(config, tokenizer, log, own)
  allow = set(config.data.allow)
  if config.data.control_tokens == "allow":
    allow.add("control")
  checks.refuse(stores.findings, allow=allow, log=log)

  def items(name: str) -> list[behaviors.Item]:
    named = beside(config, name, log)
    return behaviors.load_sets(named) if named else []

  def stream(store: Store | None) -> Stream | None:
    return make_stream(config, store, epochs=1) if store else None

  return Data(
    make_train_stream(config, stores.train),
    stream(stores.held_out),
    stream(stores.general_text),
    stream(_train_rows(config, stores)),
    items("behaviors"),
    items("knowledge"),
  )


def _train_rows(config: Config, stores: Stores) -> Store | None:
  """About as many of the rows that are trained on as are held out."""
  train, held_out = stores.train, stores.held_out
  if not config.eval.gap or not held_out:
    return None
  if len(np.unique(train.index["content"])) < 2:
    return None  # A single row cannot be parted from the others.
  share = min(0.5, len(held_out.index) / len(train.index))
  return train.split(share, seed=config.seed)[1]


def make_train_stream(config: Config, store: Store) -> Stream:
  """The batches that a run trains on."""
  return make_stream(
    config,
    store,
    epochs=None if config.steps else config.epochs,
    normalize=config.loss.normalize,
  )


def make_stream(config: Config, store: Store, **choices: Any) -> Stream:
  """Batches of a store; `choices` are further arguments of `Stream`."""
  return Stream(
    store,
    seq_len=config.data.seq_len,
    batch_size=config.batch_size,
    seed=config.seed,
    packing=config.data.packing,
    pairs=bool(pair_kind(config)),
    **choices,
  )


def load_tokenizer(
  config: Config, folder: str | Path, log: Log | None = None
) -> tokenizers.Tokenizer:
  """The tokenizer of a model's folder, with the chat template of the config.

  Where the template asks for today's date and data.template_kwargs pins none,
  today's is pinned there: config.json keeps it, and a resumed run reads it.
  """
  tokenizer = templates.choose(
    tokenizers.load_tokenizer(folder),
    config.model.get("chat_template", ""),  # Not in older workdirs.
    config.model.get("chat_template_name", "default"),
  )
  new, stop = (config.model.get(k, ()) for k in ("new_tokens", "stop_tokens"))
  if new or stop:
    tokenizer, _ = tokenizer.with_new_tokens(tuple(new), stop=tuple(stop))
  kwargs = config.data.template_kwargs
  source = tokenizer.chat_template
  if source and "strftime_now" in source and "date" not in kwargs:
    with config.unlocked():
      kwargs.date = datetime.date.today().isoformat()
    if log:
      log(
        f"chat template: asks for today's date, pinned as {kwargs.date} for "
        "this run. To choose it, set data.template_kwargs.date."
      )
  return tokenizer


def pin(config: Config, old: Mapping[str, Any]) -> None:
  """Takes what a run found when it began (the date, a learning rate), and
  where it was extended."""
  if config.optim.learning_rate == "auto":
    config.optim.learning_rate = old["optim"]["learning_rate"]
  if not config.optim.extended:
    config.optim.extended = tuple(map(tuple, old["optim"].get("extended", ())))
  date = old["data"]["template_kwargs"].get("date")
  if date and "date" not in config.data.template_kwargs:
    with config.unlocked():
      config.data.template_kwargs.date = date


def make_render_options(config: Config) -> RenderOptions:
  """What `config.data` says of rendering and of what is trained."""
  fields = {x.name for x in dataclasses.fields(RenderOptions)}
  given = {k: x for k, x in config.data.to_dict().items() if k in fields}
  return RenderOptions(**given, pairs=pair_kind(config))


def pair_kind(config: Config) -> str:
  """Which pairs a run's rows are; see `RenderOptions.pairs`."""
  # Neither is in older workdirs.
  if config.get("distill", {}).get("teacher", "").startswith("self"):
    return "shown"
  loss = config.get("preference", {}).get("loss", "")
  return loss and ("any" if loss == "kto" else "both")


def plain(config: Config) -> Config:
  """The config with cross-entropy on rows alone: no pairs, no teacher."""
  config = config.copy_and_resolve_references()
  if "preference" in config:  # Not in older workdirs.
    config.preference.loss = config.distill.teacher = ""
  return config
