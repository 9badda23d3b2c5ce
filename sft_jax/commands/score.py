"""Scores every row of data.train by the model of a config, beside the rows.

    sft-jax score --config=configs/base.py
    sft-jax score --config=... --config.data.scores=FOLDER

Of each row: nats per trained token, the answer's nats without its prompt, and
their ratio, IFD; see sft_jax/evals/row_scores.py. They are written to
NAME.scores.jsonl beside each file NAME, or into FOLDER, and data.filter and
data.weight_by read them there. The summary shows percentiles, the hardest and
easiest rows, those whose prompt makes the answer harder (IFD above 1), and
those whose prompt says it (the lowest IFD); sft-jax inspect shows it
again. See docs/selection.md.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console

from sft_jax.commands import command
from sft_jax.common import sharding
from sft_jax.common.buckets import storage
from sft_jax.data import selection
from sft_jax.data.audit import score_summary
from sft_jax.data.readers import files
from sft_jax.data.selection import RowScore
from sft_jax.data.sources import Source
from sft_jax.evals import row_scores
from sft_jax.reporting import terminal
from sft_jax.training.build import data
from sft_jax.training.build import model as setup_model
from sft_jax.training.build.sources import make_sources

CONFIG = command.config_flag()
SHOWN = flags.DEFINE_integer("shown", 3, "Rows to show of each kind.")
_CUT = 110  # Characters of a text shown.

Config = data.Config


def score(config: Config, log: data.Log) -> dict[str, list[RowScore]]:
  """Scores the rows of data.train and writes a file beside each of theirs.

  Returns {file: its scores}, as in data.train.

  Raises ValueError: a file that two sources read in two ways, or two files
  whose scores would have one name.
  """
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_rows(mesh, config.batch_size, 1)
  folder = setup_model.find_model(config).folder
  config = config.copy_and_resolve_references()
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
  lines = [
    (
      name,
      f"{of_name['rows']:,}",
      *(f"{of_name[f'p{p}']:.3g}" for p in percentiles),
    )
    for name, of_name in found["spread"].items()
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


def main() -> None:
  out = terminal.console()
  show(out, CONFIG.value, score(CONFIG.value, out.print), SHOWN.value)
