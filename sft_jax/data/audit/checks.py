"""Audit: findings on encoded rows that would teach a model the wrong thing.

Each check asks one question of a store. A `Finding` with a count above 0 is a
fault that no run should start with: `refuse` raises for it, unless
`data.allow` names its check.

    malformed   rows that cannot be read or encoded, and may not be skipped
    vocabulary  a token id outside the model's embedding
    nothing     nothing is trained, of all rows or of one source
    bos         a conversation begins with two BOS tokens, or with none where
                the tokenizer adds one or other conversations have one
    stop        a trained turn does not end in a stop token
    pad         padding is trained, or a stop token is not trained because it
                is the padding token too
    control     control tokens inside what a message says
    overlap     held-out rows that training rows give away
    think       reasoning that rows hold and their examples do not
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sft_jax.data.audit import overlap as overlaps
from sft_jax.data.audit import token_checks
from sft_jax.data.store.stats import SourceStats
from sft_jax.data.store.store import Store

NAMES = ("malformed", "vocabulary", "nothing", "bos", "stop", "pad",
         "control", "overlap", "think")  # fmt: skip
_SHOWN = 5  # places
# Where the rows of a store are named in the config.
_KEYS = {"train": "data.train", "held out": "data.eval",
         "general text": "eval.general_text"}  # fmt: skip

# Of each check of tokens: the fault of the first row, and its cure.
_FAULTS = {
  "vocabulary": (
    "got token id {token}, expected below {known.vocab_size}, the rows of the "
    "model's embedding",
    "The tokenizer is not this model's, or tokens were added to it and not to "
    "the model.",
  ),
  "bos": (
    "got token {token} at the start, expected BOS (id {known.bos_id}): {why}",
    "The model has seen texts begin with it: let the chat template write "
    "bos_token.",
  ),
  "stop": (
    "a trained turn ends in token {token}, expected one of the stop tokens "
    "{stops}",
    "The model would never learn to stop. Let the chat template end assistant "
    "turns with a stop token, or name the token it uses in the tokenizer's "
    "eos_token.",
  ),
  "pad": (
    "padding (token id {known.pad_id}) is trained, or a stop token with this "
    "id is not, expected neither",
    "Where the rows come with labels, mask padding by position and not by id; "
    "a stop token is trained.",
  ),
  "control": (
    "a message holds the control token of id {token}, expected text",
    "The model reads it as structure: remove it, or let data.control_tokens "
    "escape it.",
  ),
}
_TWO_BOS = (
  "got two BOS tokens (id {known.bos_id}) at the start, expected one",
  "The chat template writes one; let the rows' own text not begin with "
  "another.",
)


class Finding(NamedTuple):
  name: str  # One of `NAMES`.
  count: int = 0  # Rows (of 'nothing': sources) at fault; 0 is a pass.
  message: str = ""  # What is wrong and its cure, in a line; '' for a pass.
  places: tuple[str, ...] = ()  # The first few faults, as 'rows.jsonl:12'.
  # Which rows were looked at: 'train', 'held out' or 'general text'.
  of: str = "train"


def check_store(
  store: Store, known: token_checks.Facts, *, of: str = "train"
) -> list[Finding]:
  """Findings on the examples of a store, as `build.build` returns it."""
  nothing = _nothing(store, of)._replace(of=of)
  if not len(store.index):
    return [nothing]
  noted = _Noted(store)
  begins: list[np.ndarray] = []
  for documents in token_checks.batches(store):
    raw = store.index["text"][documents.rows]
    cut = store.index["may_run_on"][documents.rows]
    ends = token_checks.turn_ends(documents, raw, cut, known)
    masked = token_checks.masked_stop(documents, ends, known)
    for name, at in (
      ("vocabulary", token_checks.outside(documents, known)),
      ("bos", token_checks.two_bos(documents, known)),
      ("stop", ends[~masked]),
      ("pad", ends[masked]),
      ("pad", token_checks.trained_padding(documents, known)),
      ("control", token_checks.control_tokens(documents, known)),
    ):
      noted.add(name, documents, at)
    begins.append(documents.tokens[documents.starts[:-1]])
  without = token_checks.without_bos(store, np.concatenate(begins), known)
  if len(without) and not noted.rows["bos"]:
    noted.rows["bos"] = without.tolist()
  found = [noted.finding(name, known)._replace(of=of) for name in _FAULTS]
  return [nothing, *found]


def overlap(train: Store, held_out: Store, *, own_files: bool) -> Finding:
  """Held-out rows that training rows give away; see `overlap.find_overlap`."""
  rows = map(overlaps.of_store, (train, held_out))
  found = overlaps.find_overlap(*rows)
  return overlap_finding(found, held_out.place, own_files=own_files)


def overlap_finding(
  found: overlaps.Overlap, place: Callable[[int], str], *, own_files: bool
) -> Finding:
  """What was found, in words; `place` says where a held-out row stands.

  Without `own_files` the rows are a share of the training files, and only those
  with the prompt of a training row are at fault: others are as the data are.
  """
  rows = np.flatnonzero(found.found if own_files else found.same_prompt)
  if not len(rows):
    return Finding("overlap", of="held out")
  same = int(found.same_prompt.sum())
  places = tuple(place(int(row)) for row in rows[:_SHOWN])
  return Finding(
    "overlap",
    len(rows),
    f"{places[0]}: training gives away {len(rows):,} of {len(found.found):,} "
    f"held-out rows, {same:,} by their prompt and {len(rows) - same:,} by runs "
    f"of {overlaps.RUN} that make half of the row or more; expected none. What "
    "is measured on them is memory: drop them from one of the two sides.",
    places,
    "held out",
  )


def malformed(store: Store, fault: str | None) -> Finding:
  """Rows that could not be read or encoded: the first error, or None."""
  if fault is None:
    return Finding("malformed")
  sources, count = store.stats.sources, store.stats.dropped("malformed")
  places = (one.places.get("malformed", []) for one in sources.values())
  shown = tuple(itertools.islice(itertools.chain(*places), _SHOWN))
  message = f"{fault} ({count:,} such rows.)"
  return Finding("malformed", max(count, 1), message, shown)


def refuse(
  findings: Sequence[Finding],
  *,
  allow: Collection[str],
  log: Callable[[str], None],
) -> None:
  """Raises a ValueError for findings that fail and are not in `allow`, or for a
  name in it that is no finding's; logs those allowed."""
  if unknown := set(allow) - set(NAMES):
    raise ValueError(
      f"data.allow: got {sorted(unknown)}; expected names of findings: "
      f"{', '.join(NAMES)}. Correct it."
    )
  failed = [finding for finding in findings if finding.count]
  for finding in failed:
    if finding.name in allow:
      log(f"data.allow lets pass: {finding.message}")
  refused = [one for one in failed if one.name not in allow]
  if refused:
    names = tuple(sorted({*allow, *(one.name for one in refused)}))
    messages = "\n".join(one.message for one in refused)
    raise ValueError(
      f"{messages}\nTo train all the same, set data.allow="
      f"{str(names).replace(' ', '')}; sft-jax inspect shows the rows."
    )


class _Noted:
  """Which rows are at fault, and the token of each finding's first fault."""

  def __init__(self, store: Store):
    self._store = store
    self.rows: dict[str, list[int]] = {name: [] for name in NAMES}
    self._token: dict[str, int] = {}

  def add(
    self,
    name: str,
    documents: token_checks.Documents,
    at: Int64[np.ndarray, " faults"],
  ) -> None:
    if len(at):
      rows = np.searchsorted(documents.starts, at, side="right") - 1
      self.rows[name] += (np.unique(rows) + documents.rows.start).tolist()
      self._token.setdefault(name, int(documents.tokens[at[0]]))

  def finding(self, name: str, known: token_checks.Facts) -> Finding:
    rows = sorted(set(self.rows[name]))
    if not rows:
      return Finding(name)
    token = self._token.get(name, -1)
    if name == "bos":
      token = int(self._store.example(rows[0]).tokens[0])
    twice = name == "bos" and token == known.bos_id
    fault, cure = _TWO_BOS if twice else _FAULTS[name]
    why = "the tokenizer adds one" if known.adds_bos else "other rows have one"
    facts = {"known": known, "why": why, "stops": sorted(known.stop_ids)}
    fault = fault.format(token=token, **facts)
    places = [self._store.place(row) for row in rows[: 4 * _SHOWN]]
    message = f"{places[0]}: {fault} ({len(rows):,} such rows). {cure}"
    shown = tuple(dict.fromkeys(places))[:_SHOWN]
    return Finding(name, len(rows), message, shown)


def _nothing(store: Store, of: str) -> Finding:
  sources = store.stats.sources.items()
  empty = {name: one for name, one in sources if not one.rows_trained}
  if not empty and len(store.index):
    return Finding("nothing")
  name, source = next(iter(empty.items()), ("", SourceStats()))
  why = ", ".join(f"{n:,} {reason}" for reason, n in source.dropped.items())
  why = f" (dropped: {why})" if why else ""
  train = of == "train"
  to, cure = ("train on", "data.format") if train else ("measure", "the key")
  message = (
    f"{_KEYS[of]}: got {source.rows_in:,} rows in {name or 'no file'} and "
    f"nothing to {to} in them{why}, expected at least one. Correct the file, "
    f"or {cure}."
  )
  return Finding("nothing", max(1, len(empty)), message, tuple(empty)[:_SHOWN])
