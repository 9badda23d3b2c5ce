"""Coverage: where rows lie, what held-out rows lie far from, kinds that lack.

Rows are the vectors of `row_selection.embed`. A held-out row is far if no row
that is kept is as near to it as 95 % of all rows have another one:

    o   o o         o  kept      .  left
      .   o . o     v  held out, near
    . o v                  X     X  held out, far from all that is kept
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32

from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.store.store import Store
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.evals.checks import refusals

_USUAL = 0.95  # Share of rows that have a neighbor as near as "near" means.
_BLOCK = 1024  # Rows whose distances to all others exist at once.
_DRAWN = 1500  # Points of one kind, drawn at random of more.
_LOOKED_AT = 20_000  # Examples whose kind is looked at, likewise.
_HARD = 0.9  # Share of rows with fewer nats than a hard one.


def make(
  vectors: Float[np.ndarray, "rows P"],
  kept: Bool[np.ndarray, " rows"],
  held_out: Float[np.ndarray, "asked P"],
) -> dict[str, Any]:
  """Points of a picture, and which held-out rows are far, by unit vectors.

  Returns {'points': {'left', 'kept', 'held out', 'far': [[x, y], ...]}, along
  the two directions in which rows differ most; 'near': the distance that is
  still near; 'far': numbers of held-out rows, the farthest first}.
  """
  middle = vectors.mean(axis=0)
  _, directions = np.linalg.eigh((vectors - middle).T @ (vectors - middle))
  near = float(np.quantile(nearest(vectors, vectors, own=True), _USUAL))
  gap = nearest(held_out, vectors[kept])
  far = gap > near
  rng = np.random.default_rng(0)

  def drawn(points: np.ndarray) -> list[list[float]]:
    some = np.sort(rng.permutation(len(points))[:_DRAWN])
    flat = (points[some] - middle) @ directions[:, :-3:-1]
    return np.round(flat, 4).tolist()

  groups = {"left": vectors[~kept], "kept": vectors[kept]}
  groups |= {"held out": held_out[~far], "far": held_out[far]}
  return {
    "points": {name: drawn(points) for name, points in groups.items()},
    "near": near,
    "far": sorted(np.flatnonzero(far).tolist(), key=lambda i: -gap[i]),
  }


def nearest(
  of: Float[np.ndarray, "rows P"],
  among: Float[np.ndarray, "others P"],
  *,
  own: bool = False,
) -> Float32[np.ndarray, " rows"]:
  """Distance of unit vectors to the nearest of others; own: not to itself.

  2, which is the other side of the sphere, where there is no other.
  """
  found = np.empty(len(of), np.float32)
  for at in range(0, len(of), _BLOCK):
    cosine = of[at : at + _BLOCK] @ among.T
    if own:
      rows = np.arange(len(cosine))
      cosine[rows, at + rows] = -1
    gap = np.maximum(2 - 2 * cosine.max(axis=1, initial=-1), 0)
    found[at : at + _BLOCK] = np.sqrt(gap)
  return found


def kinds(
  store: Store,
  tokenizer: Tokenizer,
  seq_len: int,
  vectors: Float[np.ndarray, "rows P"],
  nats: Float[np.ndarray, " rows"],
  kept: Bool[np.ndarray, " rows"],
) -> dict[str, list[int]]:
  """{kind that good data has some of: [rows there are, of these kept]}.

  Refusals are told by how answers open, errors of tools by that word. A
  look-alike is answered although the nearest prompt (by the second half of the
  vectors) is refused, no farther than is usual. Hard are the tenth of the rows
  with the most nats per trained token.
  """
  row = np.cumsum(np.diff(store.index["row"], prepend=-1) != 0) - 1
  order = np.random.default_rng(0).permutation(len(store.index))[:_LOOKED_AT]
  found: dict[str, set[int]] = {}
  for i in order.tolist():
    one = store.example(i)
    of = {name: one.roles == i for i, name in enumerate(TOKEN_ROLES)}
    said = lambda name, one=one, of=of: tokenizer.decode(
      one.tokens[of[name]].tolist()
    )
    for name, is_there in (
      ("system prompt", of["system"].any()),
      ("several turns", (np.diff(of["user"], prepend=False)).sum() > 2),
      ("reasoning", of["reasoning"].any()),
      ("tool call", of["tool_call"].any()),
      ("tool error", "error" in said("tool").lower()),
      ("refusal", refusals.opens(said("answer"))),
      ("long", len(one.tokens) > 0.75 * seq_len),
      ("raw text", of["text"].any()),
    ):
      found.setdefault(name, set())
      if is_there:
        found[name].add(int(row[i]))
  refused = np.array(sorted(found["refusal"]), np.int64)
  others = found["refusal"] | found["raw text"]
  answered = np.setdiff1d(row[order], list(others))
  half, scale = vectors.shape[1] // 2, np.float32(np.sqrt(2))
  asked, declined = (vectors[x, half:] * scale for x in (answered, refused))
  gap, usual = nearest(asked, declined), nearest(asked, asked, own=True)
  # Without a refusal nothing looks like one.
  near = np.quantile(usual, _USUAL) if len(usual) and len(refused) else -1
  found["look-alike"] = set(answered[(gap <= usual) & (gap <= near)])
  hardest = nats >= np.quantile(nats, _HARD)
  found["hard"] = set(row[order][hardest[row[order]]])
  return {name: [len(x), int(kept[list(x)].sum())] for name, x in found.items()}
