"""On-policy batches: the prompts of the data, answered by the model as it is.

Every k steps the prompts of the k batches to come are answered by the weights
of that moment (GKD, arXiv 2306.13649):

    step      0  1  2  3 | 4  5  6  7 | 8 ...      k = 4
    replies      of w_0  |   of w_4   |

A batch is that of the data, with replies in the places of answers: of each
document the last trained run, cut where the row would overflow. Raw text stays.
A reply is a function of the seed, the step, the row, its document and the
weights; those of a round are kept in a file, so that a run that stopped within
a round goes on with the same ones.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sft_jax.common.batch import Batch
from sft_jax.common.trees import Tree
from sft_jax.common.workdir import find_json, write_jsonl
from sft_jax.data import packing
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.encoding.encode import Example
from sft_jax.data.pipeline import Stream
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.inference.generate import sample

_ANSWER, _STOP = (TOKEN_ROLES.index(name) for name in ("answer", "stop"))


class OnPolicy:
  """The batches of a stream with the model's own replies in them."""

  def __init__(
    self,
    stream: Stream,
    model: Any,
    tokenizer: Tokenizer,
    *,
    every: int,
    seed: int,
    folder: Path,
    mesh: Mesh | None = None,
  ):
    """Nothing is sampled yet.

    Args:
      stream: the prompts.
      every: steps of a round, k.
      seed: of the sampling, at temperature 1.
      folder: of the rounds' files, replies_STEP.json.
    """
    self._stream, self._model, self._tokenizer = stream, model, tokenizer
    self._every, self._seed, self._mesh = every, seed, mesh
    self._folder = folder
    self._begin = -1
    self._replies: dict[str, tuple[list[int], bool]] = {}

  def batch(self, step: int, params: Tree, rows: Iterable[int]) -> Batch:
    """These rows of the batch of a step, counted from 0. `params`, after the
    steps before, are read where a round begins; `rows` are as `Stream.batches`
    takes them. Raises ValueError: within a round whose replies are lost."""
    begin = step - step % self._every
    if begin != self._begin:
      self._replies = self._round(begin, params if begin == step else None)
      self._begin = begin
    ids = self._stream.rows_of(step)
    made = []
    for row in rows:
      documents = self._documents(step, row, ids[row])
      changed = [
        self._with_reply(one, *self._replies[name], limit) if prompt else one
        for name, one, prompt, limit in documents
      ]
      made.append(self._stream.row(np.array(ids[row], np.int64), changed))
    return packing.stack_rows(made)

  def _documents(
    self, step: int, row: int, ids: Sequence[int]
  ) -> list[tuple[str, Example, list[int], int]]:
    """(name, example, its prompt if it has one, most tokens of a reply)."""
    examples = [self._stream.store.example(i) for i in ids]
    free = self._stream.seq_len - sum(len(one.tokens) for one in examples)
    found = []
    for number, one in enumerate(examples):
      sides = _sides(one)
      spare = free // len(examples) // len(sides)
      length = min(len(side.tokens) - _last_run(side) for side in sides)
      # What is predicted from the first token on is raw text.
      start = _last_run(sides[0])
      prompt = sides[0].tokens[:start].tolist() if start > 1 else []
      found.append((f"{step} {row} {number}", one, prompt, length + spare))
    return found

  def _round(
    self, begin: int, params: Tree | None
  ) -> dict[str, tuple[list[int], bool]]:
    """{name of a document: its reply's tokens, whether a stop token came}."""
    path = self._folder / f"replies_{begin}.json"
    if params is None:
      known = find_json(path)
      if known is None:
        raise ValueError(
          f"{path}: is missing, expected the replies that this run learns from "
          "until its next round. Put it back, or resume an earlier checkpoint."
        )
      return known
    end = min(begin + self._every, self._stream.num_steps or np.inf)
    asked = [
      (name, prompt, limit)
      for step in range(begin, int(end))
      for row, ids in enumerate(self._stream.rows_of(step))
      for name, _, prompt, limit in self._documents(step, row, ids)
      if prompt
    ]
    words = lambda name: [self._seed, *map(int, name.split())]
    drawn = lambda name: np.random.SeedSequence(words(name)).generate_state(1)
    replies = {}
    for piece in sample(
      self._model, params, self._tokenizer, [prompt for _, prompt, _ in asked],
      max_new_tokens=max((limit for _, _, limit in asked), default=1),
      temperature=1.0, seeds=[int(*drawn(name)) for name, _, _ in asked],
      mesh=self._mesh,
    ):  # fmt: skip
      if reply := piece.reply:
        replies[asked[piece.index][0]] = reply.tokens, reply.stopped
    write_jsonl(path, [replies])  # One line: ids would have one each.
    return replies

  def _with_reply(
    self, example: Example, reply: list[int], stopped: bool, limit: int
  ) -> Example:
    made = []
    for side in _sides(example):
      start = _last_run(side)
      stops, last = self._tokenizer.stop_ids, side.tokens[side.loss_weights > 0]
      stop = int(last[-1]) if last[-1] in stops else min(stops, default=0)
      tokens = np.array([*reply, stop] if stopped else reply, np.int32)[:limit]
      roles = np.full(len(tokens), _ANSWER, np.uint8)
      roles[len(reply) :] = _STOP
      weights = np.full(len(tokens), side.loss_weights[start])
      made.append(
        Example(
          np.concatenate((side.tokens[:start], tokens)),
          np.concatenate((0 * side.loss_weights[:start], weights)),
          np.concatenate((side.roles[:start], roles)),
        )
      )
    tokens, weights, roles = (
      np.concatenate([getattr(side, name) for side in made])
      for name in ("tokens", "loss_weights", "roles")
    )
    rejected = len(made[-1].tokens) * (len(made) > 1)
    return Example(tokens, weights, roles, rejected=rejected)


def _sides(example: Example) -> list[Example]:
  """The documents of an example: of a pair two."""
  better = len(example.tokens) - example.rejected
  tokens, weights, roles = example.tokens, example.loss_weights, example.roles
  parts = (slice(better), slice(better, None))
  cut = [Example(tokens[own], weights[own], roles[own]) for own in parts]
  return [side for side in cut if len(side.tokens)]


def _last_run(side: Example) -> int:
  """Where the last trained tokens without a gap begin."""
  untrained = np.flatnonzero(side.loss_weights == 0)
  last = int(np.flatnonzero(side.loss_weights)[-1])
  return int(untrained[untrained < last][-1]) + 1
