"""Sampling: prompts in, replies out, as they come; token ids only.

Prompts enter a batch of `batch_size` rows in groups of a quarter of that; then
all rows decode together until a group's worth of them is done, and the next
group takes their place. The cache grows with the longest reply.

Prompts of a group are padded on the right: a token's place is its position in
its own prompt, which is also its slot in the cache, and padding is neither
written nor seen.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sft_jax.inference import decode as decoding
from sft_jax.inference.decode import EMPTY
from sft_jax.inference.sampling import Rule


class Sampled(NamedTuple):
  tokens: list[int]  # What the model emitted, without the stop token.
  # True if it emitted a stop token (or `cut` stopped it), False if it ran out
  # of tokens.
  stopped: bool


class Piece(NamedTuple):
  """What has come of one reply since the last piece of it."""

  index: int  # Of its prompt.
  tokens: list[int]  # Those that are new.
  reply: Sampled | None  # The whole, once it is done; else None.


def stream(
  decode: Callable,
  logits: Callable,
  init_cache: Callable,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  stop_ids: Iterable[int],
  max_new_tokens: int,
  vocab_size: int | None = None,
  position_limit: int | None = None,
  temperature: float | int = 0.0,
  top_k: int = 0,
  top_p: float | int = 1.0,
  min_p: float | int = 0.0,
  seed: int = 0,
  seeds: Sequence[int] | None = None,
  cut: Callable[[int, list[int]], int | None] | None = None,
  batch_size: int | None = None,
  length_bucket: int = 64,
  int8_cache: bool = False,
  mesh: Mesh | None = None,
  every: int = decoding.STEPS,
) -> Iterator[Piece]:
  """Samples one reply per prompt; yields what is new of each as it comes.

  A row draws from `fold_in(fold_in(key(seed), index), step)`, or with `seeds`
  from its own seed alone, never depending on its neighbors (to the rounding of
  the model's own arithmetic).

  Args:
    decode, logits, init_cache: the model's functions, the same objects at each
      call (programs are cached by their identity).
    stop_ids: every id that ends a reply; empty: only `max_new_tokens` does.
    max_new_tokens: most tokens of a reply, its stop token included.
    vocab_size, temperature, top_k, top_p, min_p: see `sampling.Rule`.
    position_limit: most tokens of a prompt and its reply; None: any number.
    cut: asked, with a prompt's index and all tokens of its reply so far, how
      many of them to keep and stop there; None continues. Asked every `every`
      tokens, so it must find the place, not only look at the end.
    batch_size: rows at once, rounded up to what the mesh divides; None: all, at
      most 64.
    length_bucket: prompts are padded to a multiple of it; each such length is a
      program, as is each length of the cache, which doubles as replies grow.
    mesh: rows are divided over its data-parallel axes; None: one device, or
      wherever the parameters lead XLA.
    every: tokens of a row before pieces are yielded; at most 64.

  Raises ValueError: a number out of range; an empty prompt, or one too long.
  """
  stops = np.asarray(sorted(set(stop_ids)), np.int32)
  if batch_size is None:
    batch_size = min(max(len(prompts), 1), 64)
  most, fine = decoding.STEPS, seeds is None or len(seeds) == len(prompts)
  for name, value, fits, expected in (
    ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
    ("temperature", temperature, temperature >= 0, "at least 0 (0: greedy)"),
    ("top_k", top_k, top_k >= 0, "at least 0 (0: off)"),
    ("top_p", top_p, 0 < top_p <= 1, "in (0, 1] (1: off)"),
    ("min_p", min_p, 0 <= min_p <= 1, "in [0, 1] (0: off)"),
    ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    ("length_bucket", length_bucket, length_bucket >= 1, "at least 1"),
    ("every", every, 1 <= every <= most, f"in 1 .. {most}"),
    ("seeds", seeds, fine, f"one for each of {len(prompts)} prompts"),
  ):
    if not fits:
      raise ValueError(
        f"sampler: {name} is {value}; expected {expected}. Change it."
      )
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(
        f"sampler: prompt {i} is empty; expected at least one token "
        "to continue from. Give it the BOS token."
      )
    longest = float("inf") if position_limit is None else position_limit
    if len(prompt) + max_new_tokens > longest:
      raise ValueError(
        f"sampler: prompt {i} has {len(prompt)} tokens and may get "
        f"{max_new_tokens} more; expected at most {position_limit} in all, the "
        "positions that the model has learned. Shorten it, or lower "
        "max_new_tokens."
      )
  rule = Rule(float(temperature), top_k, float(top_p), float(min_p), vocab_size)
  model = decoding.How(decode, logits, init_cache, int8_cache, rule, mesh)
  B = _up(batch_size, model.shards)
  R = min(_up(max(B // 4, 1), model.shards), B)  # Prompts that enter together.

  # Apart, so that what is wrong is raised at the call.
  def run() -> Iterator[Piece]:
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    if not waiting:
      return
    longest = len(prompts[waiting[0]])
    most = _up(_up(longest, length_bucket) + max_new_tokens, length_bucket)

    def slots(S: int) -> int:
      """S, or at once all that may be needed, if it is not twice as much."""
      return S if most > 2 * S else most

    S = slots(_up(longest + every, length_bucket))
    state = decoding.start(model=model, B=B, S=S)
    row_of = [-1] * B  # Which prompt a row answers.
    replies: dict[int, list[int]] = {}
    halt = np.zeros(B, bool)

    def take(b: int, new: np.ndarray, done: bool, stopped: bool) -> Piece:
      """What a row has emitted, the host's own word on it included."""
      index = row_of[b]
      reply, before = replies[index], len(replies[index])
      reply += new[new != EMPTY].tolist()
      keep = cut(index, reply) if cut else None
      if keep is not None:
        del reply[keep:]
        done, stopped, halt[b] = True, True, True
      if not done:
        return Piece(index, reply[before:], None)
      row_of[b] = -1
      return Piece(index, reply[before:], Sampled(reply, stopped))

    while waiting or max(row_of) >= 0:
      free = [b for b in range(B) if row_of[b] < 0]
      while waiting and len(free) >= min(R, len(waiting)):
        group, waiting = waiting[:R], waiting[R:]
        T = _up(len(prompts[group[0]]), length_bucket)
        # Fillers keep the shape: one token each, and nowhere to go.
        tokens, lengths = np.zeros((R, T), np.int32), np.ones(R, np.int32)
        rows, number = np.full(R, B, np.int32), np.zeros(R, np.int32)
        seed_of = np.full(R, seed % 2**32, np.uint32)
        for r, i in enumerate(group):
          tokens[r, : len(prompts[i])] = prompts[i]
          lengths[r], rows[r], number[r] = len(prompts[i]), free.pop(0), i
          if seeds is not None:
            seed_of[r], number[r] = seeds[i] % 2**32, 0
          row_of[rows[r]], replies[i] = i, []
          halt[rows[r]] = False
        state, seen = decoding.admit(
          params, state, tokens, lengths, rows, (seed_of, number), stops,
          np.int32(max_new_tokens), model=model, S=S,
        )  # fmt: skip
        first, stopped = jax.device_get(seen)
        for r, stop in enumerate(stopped[: len(group)].tolist()):
          done = stop or max_new_tokens == 1
          yield take(int(rows[r]), first[r : r + 1], done, stop)
        free = [b for b in range(B) if row_of[b] < 0]
      if max(row_of) < 0:
        continue
      held = max(len(prompts[i]) + len(replies[i]) for i in row_of if i >= 0)
      if min(held + every, most) > S:
        S = slots(2 * S)
        state = decoding.lengthen(state, model=model, S=S)
      state, seen = decoding.advance(
        params, state, halt, np.int32(min(R, len(waiting)) if waiting else B),
        np.int32(every), stops, model=model,
      )  # fmt: skip
      out, done, stopped = jax.device_get(seen)
      for b in range(B):
        if row_of[b] >= 0:
          yield take(b, out[b], bool(done[b]), bool(stopped[b]))

  return run()


def generate(*args: Any, **kwargs: Any) -> list[Sampled]:
  """All replies of `stream`, whose arguments it takes, in order."""
  done = {p.index: p.reply for p in stream(*args, **kwargs) if p.reply}
  return [done[i] for i in sorted(done)]


def _up(n: int, step: int) -> int:
  return -(-n // step) * step
