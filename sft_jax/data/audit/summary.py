"""Summary of an audit: all that is known of data before it trains.

`inspect` gathers it as plain values, for the terminal, the page and programs;
its keys are those of `sft-jax inspect --json`, described in docs/audit.md.
"""

import itertools
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from sft_jax.data.audit import (
  checks,
  overlap,
  reasoning,
  row_texts,
  score_summary,
  text_hashing,
)
from sft_jax.data.audit import warnings as warnings_
from sft_jax.data.chat.options import DEFAULT, RenderOptions
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.encoding.encode import Example
from sft_jax.data.pipeline import Stream
from sft_jax.data.store.store import Store
from sft_jax.data.tokenizers.tokenizer import Tokenizer

SCHEMA = 2
_QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95,
              "p99": 0.99}  # fmt: skip
_BINS = 24
_LIKE_SHOWN = 5
_WORDS = 1 << 20  # taken together
_CLIPPED = 400  # characters of a text shown with a warning or a score


def inspect(
  train: Store,
  held_out: Store | None,
  stream: Stream | None,
  findings: Sequence[checks.Finding],
  tokenizer: Tokenizer,
  *,
  own_files: bool = True,
  allow: Collection[str] = (),
  format: str = "auto",
  options: RenderOptions = DEFAULT,
  rows_seed: int = 0,
  samples: int = 3,
  samples_seed: int = 0,
  scores_folder: str = "",
  scores_shown: int = 3,
) -> dict[str, Any]:
  """Looks at everything, and reads the rows again to look at what they say.

  Args:
    stream: the training rows as batches; None where there are none.
    findings: what `checks` said of the stores.
    own_files: the held-out rows come from files of their own.
    options: of the stores. Where it leaves reasoning out, nobody asks for it.
    rows_seed: of the stores: drew the rows of sources with a limit.
    scores_folder: that holds the rows' scores; '' = beside them.
    scores_shown: rows to show of each end of a score.
  """
  with (
    tempfile.TemporaryDirectory() as folder,
    row_texts.collect(
      train, held_out, folder=Path(folder), format=format, seed=rows_seed
    ) as said,
  ):
    findings = list(findings)
    # Templates may strip the reasoning of turns before the last.
    if options.reasoning != "strip" and options.train_on != "last_turn":
      findings.append(reasoning.check(train, tokenizer, seed=rows_seed))
    warnings = warnings_.find_warnings(said)
    if held_out:
      finding, like = _overlap(said, own_files=own_files)
      findings.append(finding)
      warnings += [like] if like.count else []
    rows = lambda of: {"rows": [_shown(said.row(i)) for i in of.rows]}
    shown = lambda examples: [one._asdict() | rows(one) for one in examples]
    warnings = [
      one._asdict() | {"examples": shown(one.examples)} for one in warnings
    ]
  verdicts = []
  for one in findings:
    passed, allowed = not one.count, one.name in allow
    verdict = {"places": [*one.places], "passed": passed, "allowed": allowed}
    verdicts.append(one._asdict() | verdict)
  rng = np.random.default_rng(samples_seed)
  chosen = rng.permutation(len(train.index))[:samples]
  kept = {"folder": scores_folder, "format": format, "seed": rows_seed}
  scores = score_summary.of_store(train, _shown, **kept, most=scores_shown)
  epoch = None
  if stream:
    epoch = {"steps": stream.steps_per_epoch, "fill": stream.fill}
    epoch |= {"seq_len": stream.seq_len, "batch_size": stream.batch_size}
  return {
    "schema": SCHEMA,
    "passed": all(one["passed"] or one["allowed"] for one in verdicts),
    "findings": verdicts,
    "warnings": warnings,
    "ledger": (stream or train).stats.to_json(),
    "held_out": held_out.stats.to_json() if held_out else None,
    "epoch": epoch,
    "lengths": {
      "tokens": length_quantiles(train.lengths),
      "trained": length_quantiles(train.trained),
    },
    "scores": scores,
    "samples": [sample(train, int(i), tokenizer) for i in np.sort(chosen)],
  }


def length_quantiles(lengths: Int32[np.ndarray, " rows"]) -> dict[str, Any]:
  if not len(lengths):
    return {"total": 0, "histogram": []}
  edges = np.linspace(0, int(lengths.max()) + 1, _BINS + 1).astype(np.int64)
  edges = np.unique(edges)
  counts, _ = np.histogram(lengths, edges)
  shares = list(_QUANTILES.values())
  values = np.quantile(lengths, shares, method="inverted_cdf")
  return {
    "total": int(lengths.sum(dtype=np.int64)),
    "mean": float(lengths.mean()),
    "min": int(lengths.min()),
    **{name: int(v) for name, v in zip(_QUANTILES, values, strict=True)},
    "max": int(lengths.max()),
    "histogram": [
      {"from": int(a), "to": int(b) - 1, "examples": int(n)}
      for (a, b), n in zip(itertools.pairwise(edges), counts, strict=True)
    ],
  }


def sample(store: Store, i: int, tokenizer: Tokenizer) -> dict[str, Any]:
  """One example, token by token, and as pieces of text of one kind each."""
  example = store.example(i)
  return {
    "place": store.place(i),
    "tokens": example.tokens.tolist(),
    "loss_weights": example.loss_weights.tolist(),
    "spans": spans(example, tokenizer),
  }


def step_rows(
  stream: Stream, tokenizer: Tokenizer, step: int
) -> list[dict[str, Any]]:
  """Every example that step number `step`, from 1, trained on.

  Returns [{'step', 'pack' of the batch, 'place', 'tokens', 'loss_weights',
  'spans'}], see `sample`.

  Raises ValueError: a step that the stream does not have.
  """
  last = stream.num_steps
  if step < 1 or (last is not None and step > last):
    raise ValueError(
      f"step: got {step}, expected 1 to {last or 'any number'}. Name a step "
      "of this run."
    )
  return [
    {"step": step, "pack": pack, **sample(stream.store, i, tokenizer)}
    for pack, ids in enumerate(stream.rows_of(step - 1))
    for i in ids
  ]


def spans(example: Example, tokenizer: Tokenizer) -> list[dict[str, Any]]:
  """The text of an example, cut where the kind of its tokens changes.

  Each piece is {'text', 'special': bool, 'weight': float, 'role': one of
  `token_roles.TOKEN_ROLES`}; together they are the text of all tokens.
  """
  ids = example.tokens.tolist()
  special = set(tokenizer.special_tokens.values())
  weights, roles = example.loss_weights.tolist(), example.roles.tolist()
  kinds = list(zip((x in special for x in ids), weights, roles, strict=True))
  made, shown = [], ""
  for end, (is_special, weight, role) in enumerate(kinds, 1):
    if end == len(kinds) or kinds[end] != kinds[end - 1]:
      # A token may be part of a character, or lose its space when it stands
      # alone, so what a run adds to all before it is shown.
      whole = tokenizer.decode(ids[:end], skip_special=False)
      piece = {"text": whole[len(shown) :], "special": is_special}
      made.append(piece | {"weight": weight, "role": TOKEN_ROLES[role]})
      shown = whole
  return made


def _overlap(
  said: row_texts.Texts, *, own_files: bool
) -> tuple[checks.Finding, warnings_.DataWarning]:
  """Overlap by words, which sees prompts that differ in case or spacing."""
  held = np.flatnonzero(said.held_out)
  trained = np.flatnonzero(~said.held_out)
  found = overlap.find_overlap(_rows(said, trained), _rows(said, held))
  place = lambda i: said.place(int(held[i]))
  finding = checks.overlap_finding(found, place, own_files=own_files)
  like = np.flatnonzero(found.share >= overlap.SHARE)
  return finding._replace(of="held out, by words"), warnings_.DataWarning(
    "held-out look-alikes",
    len(like),
    f"{len(like):,} of {len(held):,} held-out rows stand by half or more in "
    f"training rows, in runs of {overlap.RUN} words: what is measured on them "
    "is partly memory.",
    tuple(
      warnings_.Example(f"{found.share[i]:.0%} of it", (int(held[i]),))
      for i in like[:_LIKE_SHOWN]
    ),
  )


def _rows(
  said: row_texts.Texts, chosen: Int64[np.ndarray, " some"]
) -> Iterator[overlap.Rows]:
  """Some of the rows by their words, batch by batch."""
  whole = said.words("row")
  asked = [said.words("system"), said.words("prompt")]
  for some in text_hashing.batches(whole.counts[chosen], _WORDS):
    rows = chosen[some]
    # Of raw text, the system and the prompt are empty.
    parts = [text_hashing.take(column, rows) for column in asked]
    prompts = text_hashing.join(parts)
    yield overlap.Rows(prompts, text_hashing.take(whole, rows))


def _shown(row: row_texts.Row) -> dict[str, str]:
  """What is shown of a row: of a long text, its two ends."""

  def clipped(text: str) -> str:
    half, more = _CLIPPED // 2, len(text) - _CLIPPED
    if more <= 0:
      return text
    return f"{text[:half]} [... {more:,} more ...] {text[-half:]}"

  return {
    "place": row.place,
    "prompt": clipped(row.prompt),
    "answer": clipped(row.answer),
  }
