"""Scores every row of data.train by the model of a config, beside the rows.

    sft-jax score --config=configs/base.py
    sft-jax score --config=... --config.data.scores=FOLDER

Of each row: nats per trained token, the answer's nats without its prompt, and
their ratio, IFD; see sft_jax/evals/row_scores.py. They are written to
NAME.scores.jsonl beside each file NAME, or into FOLDER, where data.filter and
data.weight_by read them. Percentiles and the rows at the ends are shown, and
again by sft-jax inspect. See docs/selection.md.

    sft-jax select --config=... --keep=10%

scores the rows, and chooses a share that is sound and stands for the rest: with
data.filter = (("rank", "<", 1.0),) a run trains on these. Each row's line of
scores says why it was kept or left; see sft_jax/evals/row_selection.py.

    sft-jax teach --config=... --teacher=FOLDER

keeps what another model predicts of the trained tokens of every row, the
distill.top most likely ones of each, for runs with distill.teacher=kept; see
docs/distillation.md. With preference.loss and no --teacher: the base's log p of
both answers of every pair, for preference.reference=kept; docs/preferences.md.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console

from sft_jax.commands import command
from sft_jax.common import sharding, workdir
from sft_jax.common.batch import Batch
from sft_jax.common.buckets import storage
from sft_jax.data import packing, selection
from sft_jax.data.audit import row_texts, score_summary, warnings
from sft_jax.data.readers import files
from sft_jax.data.selection import RowScore
from sft_jax.data.sources import Source
from sft_jax.data.store import teacher as kept_store
from sft_jax.data.store.store import Store
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.evals import coverage, row_scores, row_selection
from sft_jax.models.transformer import Model
from sft_jax.reporting import terminal
from sft_jax.training.build import data
from sft_jax.training.build import model as setup_model
from sft_jax.training.build import state as setup_state
from sft_jax.training.build import step as setup_step
from sft_jax.training.build.sources import make_sources

CONFIG = command.config_flag()
SHOWN = flags.DEFINE_integer("shown", 3, "Rows to show of each kind.")
_CUT = 110  # Characters of a text shown.
_FAR_SHOWN, _TOKENS = 8, 80  # Held-out rows far from any, and of their text.
_TOGETHER = 1024  # Tokens whose logits a teacher makes at once.

Config = data.Config


def score(
  config: Config, log: data.Log, keep: float = 0.0
) -> dict[str, list[RowScore]]:
  """Scores the rows of data.train, in a file beside each of theirs, by file.

  With `keep`, a share of the rows is chosen, and their ranks are scores, too.

  Raises ValueError: a file that two sources read in two ways, or two files
  whose scores would have one name.
  """
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_rows(mesh, config.batch_size, 1)
  folder = setup_model.find_model(config).folder
  config = data.plain(config)
  config.model.path = str(folder)
  tokenizer = data.load_tokenizer(config, folder)
  sources = files_of(config)
  store = data.build_store(config, sources, tokenizer, log)
  if not len(store.index):
    raise ValueError(
      f"{config.data.train}: got no row to train on, expected some to score. "
      "Read the ledger: sft-jax inspect --config=..."
    )
  model, params = setup_model.load_model(config, mesh, log)
  found = row_scores.score(
    store,
    model,
    params,
    bos_id=tokenizer.bos_id,
    seq_len=config.data.seq_len,
    batch_size=config.batch_size,
    mesh=mesh,
    chunk_tokens=config.loss.chunk_tokens,
    log=log,
  )
  if keep:
    embed = lambda store: row_selection.embed(
      store, model, params, batch_size=config.batch_size
    )
    vectors, seed = embed(store), config.seed
    with (
      tempfile.TemporaryDirectory() as spooled,
      row_texts.collect(
        *(store, None),
        **{"folder": Path(spooled), "format": config.data.format, "seed": seed},
      ) as texts,
    ):
      bad = warnings.reasons_to_leave(texts, [one.place for one in found])
    chosen = row_selection.choose(found, vectors, keep, seed=seed, bad=bad)
    found = [
      x._replace(values=(*x.values, round(one.rank, 9)), reason=one.reason)
      for x, one in zip(found, chosen, strict=True)
    ]
    kept = np.array([one.rank < 1 for one in chosen])
    log(
      f'{kept.sum():,} of {len(kept):,} rows: data.filter=(("rank","<",1.0),)'
    )
    covered = _cover(config, store, tokenizer, log, embed, vectors, kept)
    nats = np.array([one.values[0] for one in found])
    covered["kinds"] = coverage.kinds(
      *(store, tokenizer, config.data.seq_len),
      *(vectors, nats, kept),
    )
    path = _coverage_path(sources[0].path, config.data.scores)
    workdir.write_jsonl(path, [covered])
    log(f"{covered['counts']['far']:,} held-out rows are far: {path}")
  first = np.diff(store.index["row"], prepend=-1) != 0
  of_row = store.source[first].tolist()
  by = {
    "model": config.model.path,
    "seq_len": config.data.seq_len,
    "options": data.make_render_options(config).to_json(),
  }
  result = {}
  for number, source in enumerate(sources):
    mine = [x for x, of in zip(found, of_row, strict=True) if of == number]
    path = selection.scores_path(source.path, config.data.scores)
    selection.write_scores(path, by, mine)
    log(f"{len(mine):,} scores in {path}")
    result[source.path] = mine
  return result


def _coverage_path(first: str | Path, folder: str) -> Path:
  return selection.scores_path(f"{first}.coverage", folder)


def find_coverage(
  config: Config, store: Store, scored: Mapping[str, Any] | None
) -> dict[str, Any] | None:
  """What `select` left of rows of which each has a score; else None.

  Raises ValueError: an earlier version of `select` left it.
  """
  if not scored or scored["changed"] + scored["unscored"]:
    return None
  path = _coverage_path(store.sources[0].files()[0], config.data.scores)
  found = workdir.find_json(path)
  if found and any(isinstance(x, int) for x in found["kinds"].values()):
    raise ValueError(
      f"{path}: got kinds without how many are kept, of an earlier version; "
      "expected both. Run sft-jax select again."
    )
  return found


def _cover(
  config: Config,
  store: Store,
  tokenizer: Tokenizer,
  log: data.Log,
  embed: Callable[[Store], np.ndarray],
  vectors: np.ndarray,
  kept: np.ndarray,
) -> dict[str, Any]:
  """What the audit page draws: held-out rows beside those that remain."""
  first = lambda of: np.flatnonzero(np.diff(of.index["row"], prepend=-1))
  out = dataclasses.replace(store, index=store.index[:0])
  if config.data.eval:
    columns = config.data.columns.to_dict()
    sources = make_sources(config.data.eval, columns)
    out = data.build_store(config, sources, tokenizer, log)
  elif config.data.holdout:
    out = store.split(config.data.holdout, seed=config.seed)[1]
  contents = store.index["content"][first(store)]
  rest = ~np.isin(contents, out.index["content"])
  found = coverage.make(vectors[rest], kept[rest], embed(out))
  far = first(out)[found["far"]].tolist()
  text = lambda i: tokenizer.decode(out.example(i).tokens[:_TOKENS].tolist())
  return found | {
    "far": [{"place": out.place(i), "text": text(i)} for i in far[:_FAR_SHOWN]],
    "counts": {"held_out": len(first(out)), "far": len(far)},
  }


def files_of(config: Config) -> list[Source]:
  """Every file of data.train once, whatever of it is trained on."""
  made: dict[str, Source] = {}
  columns = config.data.columns.to_dict()
  for source in make_sources(config.data.train, columns):
    if storage.is_remote(source.path) and not config.data.scores:
      raise ValueError(
        f"data.scores: got '' with rows in {source.path}, expected a folder "
        "of this machine for their scores. Set data.scores."
      )
    for file in files.find_files(source.path):
      plain = dataclasses.replace(
        Source(str(file)), format=source.format, columns=source.columns
      )
      if made.setdefault(str(file), plain) != plain:
        raise ValueError(
          f"{file}: got two sources that read it in two ways, expected one "
          "score of each row. Copy the file for the second."
        )
  paths: dict[Path, str] = {}
  for file in made:
    path = selection.scores_path(file, config.data.scores)
    if other := paths.get(path):
      raise ValueError(
        f"{path}: got the scores of {other} and of {file}, expected one file "
        "each. Rename one, or set data.scores to ''."
      )
    paths[path] = file
  return list(made.values())


def show(
  out: Console, config: Config, found: dict[str, list[RowScore]], shown: int
) -> None:
  """Prints percentiles and the rows at the ends."""
  every = [(path, row) for path, those in found.items() for row in those]

  def read(wanted: Collection[int]) -> dict[int, dict[str, str]]:
    said = {}
    for source in files_of(config):
      rows_of = {i: every[i][1] for i in wanted if every[i][0] == source.path}
      keys = {i: (row.place, row.content) for i, row in rows_of.items()}
      found = score_summary.read_rows(
        source, set(keys.values()), format=config.data.format
      )
      said |= {i: found[key]._asdict() for i, key in keys.items()}
    return said

  values = np.array([row.values for _, row in every], np.float64)
  show_figures(out, score_summary.make(values, read, most=shown))


def show_figures(out: Console, found: dict[str, Any]) -> None:
  """Prints what `score_figures` made."""
  percentiles = score_summary.PERCENTILES
  head = ("score", "rows", *(f"{p} %" for p in percentiles))
  figures = lambda of: (f"{of[f'p{p}']:.3g}" for p in percentiles)
  lines = [
    (name, f"{of['rows']:,}", *figures(of))
    for name, of in found["spread"].items()
  ]
  terminal.print_table(out, "Scores, by percentile", head, lines)
  for end in found["ends"]:
    out.print(f"\n{end['name']}", style="bold")
    for row in end["rows"]:
      known = [f"{x} {row[x]:.3g}" for x in selection.SCORES if x in row]
      line = f"{row['place']}  {', '.join(known)}"
      out.print(line, style="underline")
      for text in (row["prompt"], row["answer"]):
        cut = " / ".join(text.split("\n"))
        cut = cut if len(cut) <= _CUT else cut[:_CUT] + " ..."
        out.print(f"  {cut}")


KEEP = flags.DEFINE_string("keep", "10%", "Of select: a share of the rows.")


def select() -> None:
  text = KEEP.value
  try:
    keep = float(text.removesuffix("%")) / (100 if "%" in text else 1)
  except ValueError:
    raise ValueError(
      f"select --keep: got {text!r}; expected a share: 10% or 0.1."
    ) from None
  score(CONFIG.value, terminal.console().print, keep or -1)


TEACHER = flags.DEFINE_string("teacher", "", "Of teach: a model's folder.")


def keep_predictions(config: Config, path: str, log: data.Log) -> Path:
  """Keeps a teacher's predictions of the rows of data.train; their folder."""
  config = config.copy_and_resolve_references()
  folder = setup_model.find_model(config).folder
  config.distill.teacher = path
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = data.load_tokenizer(config, folder, log)
  found = setup_model.load_teacher(config, tokenizer, mesh, log)
  if found is None:
    raise ValueError(
      f"teach --teacher: got {path!r}; expected a model's folder. Name one."
    )
  model, params = found
  config.distill.teacher = ""
  store = data.load_stores(config, tokenizer, log).train
  rows, out = data.kept_folder(config, store, "teacher")
  top = min(config.distill.top, model.config.vocab_size)
  kept_store.write(
    out,
    _predictions(store, model, params, top, config.batch_size),
    vocab_size=model.config.vocab_size,
    about={"rows": rows, "top": top, "dtype": "<f2", "teacher": path},
  )
  meta = kept_store.open_kept(out, rows)
  size = meta.ids.shape[1] + 2 * top
  log(f"{len(meta.ids):,} tokens, {size} bytes each, in {out}")
  return out


def _predictions(
  store: Store, model: Model, params: Any, top: int, size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """(start, ids, log-probabilities) of each example's trained tokens."""

  @jax.jit
  def likely(params: Any, batch: Batch, at: jax.Array) -> tuple[Any, Any]:
    row = (batch.tokens, batch.positions, batch.segment_ids)
    hidden = model.hidden(params, *row).reshape(-1, model.config.d_model)
    z = (hidden[at] @ model.head(params).T).astype(jnp.float32)
    if cap := model.config.logit_softcap:
      z = cap * jnp.tanh(z / cap)
    found, ids = jax.lax.top_k(jax.nn.log_softmax(z), top)
    return ids, found

  order = np.argsort(store.index["start"], kind="stable")
  for first in range(0, len(order), size):
    numbers = order[first : first + size]
    examples = [store.example(int(i)) for i in numbers]
    (batch,) = packing.padded_batches(examples, size)
    at = np.flatnonzero(batch.loss_weights)
    ids, logps = np.zeros((2, len(at), top))
    for chunk in range(0, len(at), _TOGETHER):
      own = at[chunk : chunk + _TOGETHER]
      padded = np.pad(own, (0, _TOGETHER - len(own)))
      made = likely(params, batch, padded)
      here = slice(chunk, chunk + len(own))
      ids[here], logps[here] = (np.asarray(x)[: len(own)] for x in made)
    ends = np.cumsum([np.count_nonzero(x.loss_weights) for x in examples])
    for i, end, before in zip(numbers, ends, [0, *ends], strict=False):
      own = slice(before, end)
      start = int(store.index["start"][i])
      yield start, ids[own].astype(np.int32), logps[own]


def keep_reference(config: Config, log: data.Log) -> None:
  """Keeps the base's log p of both sides of every pair, as the run would."""
  config = config.copy_and_resolve_references()
  config.model.path = str(setup_model.find_model(config).folder)
  config.preference.reference = "base"
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_rows(mesh, config.batch_size, 1)
  tokenizer = data.load_tokenizer(config, config.model.path, log)
  stores = data.load_stores(config, tokenizer, log)
  model, params = setup_model.load_model(config, mesh, log)
  base = setup_state.base_digest(config, params)
  streams = []
  for store in filter(None, (stores.train, stores.held_out)):
    plain = lambda x: dataclasses.replace(x, repeat=1.0, share=None)
    once = dataclasses.replace(store, sources=tuple(map(plain, store.sources)))
    streams.append(data.make_stream(config, once, epochs=1))
  some = max(config.optim.warmup_steps, 0) + 1
  step = setup_step.make_step(config, model, mesh, some, streams)
  logps = jax.jit(step.base_logps)
  kept: dict[Path, tuple[str, dict[int, np.ndarray]]] = {}
  for stream in streams:
    rows, folder = data.kept_folder(config, stream.store, "reference")
    _, found = kept.setdefault(folder, (rows, {}))
    for number, batch in enumerate(stream.batches()):
      sides = np.asarray(logps(params, batch)).reshape(len(batch.tokens), -1, 2)
      for ids, mine in zip(stream.rows_of(number), sides, strict=True):
        starts = stream.store.index["start"][ids].tolist()
        found.update(zip(starts, mine, strict=False))
  for folder, (rows, found) in kept.items():
    none = np.zeros((2, 1), np.int32)
    kept_store.write(
      folder,
      ((start, none, found[start][:, None]) for start in sorted(found)),
      vocab_size=2,
      about={"rows": rows, "top": 1, "dtype": "<f4", "base": base},
    )
    log(f"{len(found):,} pairs, in {folder}")


def teach() -> None:
  config, log = CONFIG.value, terminal.console().print
  if config.preference.loss and not TEACHER.value:
    keep_reference(config, log)
  else:
    keep_predictions(config, TEACHER.value, log)


def main() -> None:
  out = terminal.console()
  show(out, CONFIG.value, score(CONFIG.value, out.print), SHOWN.value)
