"""Measuring a model: what it does, what it predicts, what it has forgotten.

The same suite runs before and after training; `compare` puts the two side by
side. Measurements are plain dicts, as they are written to `workdir/evals`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from sft_jax.batch import Batch
from sft_jax.data.conversation import Conversation
from sft_jax.data.pipeline import Stream
from sft_jax.evals import behaviours, forgetting
from sft_jax.evals.replies import Reply
from sft_jax.losses import LossSums
from sft_jax.trees import Tree

Measurement = dict[str, Any]


class Suite:
  """Everything that is measured about one model, given its parameters."""

  def __init__(
    self,
    *,
    loss_fn: Callable[[Tree, Batch], LossSums],
    put_rows: Callable[[Batch], Batch],
    held_out: Stream | None,
    general_text: Stream | None,
    items: Sequence[behaviours.Item],
    generate: Callable[[Tree, list[Conversation]], list[Reply]],
  ) -> None:
    """Keeps what a measurement needs.

    Args:
      loss_fn: (params, batch) -> sums over its trained tokens.
      put_rows: places a batch of NumPy rows on the mesh.
      held_out: conversations not trained on; None = not measured.
      general_text: raw text; None = not measured.
      items: prompts with checks; empty = not measured.
      generate: (params, conversations) -> one greedy reply each.
    """
    self._loss = jax.jit(loss_fn)
    self._put_rows = put_rows
    self._streams = {"held_out": held_out, "general_text": general_text}
    self._items = items
    self._generate = generate

  def losses(self, params: Tree) -> Measurement:
    """{'<set>/nats_per_token', '<set>/perplexity'} of each text set.

    Nats are summed over all trained tokens of the set and divided once, so
    the figures do not depend on the batch size.
    """
    values = {}
    for name, stream in self._streams.items():
      if stream is not None:
        found = forgetting.perplexity(lambda s=stream: self._sums(params, s))
        values[f"{name}/nats_per_token"] = found.nats / found.tokens
        values[f"{name}/perplexity"] = found.value
    return values

  def _sums(self, params: Tree, stream: Stream) -> tuple[float, float]:
    """(nats, weight) over every row of a stream, each once."""
    nats = weight = 0.0
    for batch in stream.batches(0, jax.process_index(), jax.process_count()):
      sums = jax.device_get(self._loss(params, self._put_rows(batch)))
      nats, weight = nats + float(sums.nats), weight + float(sums.weight)
    return nats, weight

  def __call__(self, params: Tree) -> Measurement:
    """Losses, and the behaviour scores with every reply."""
    values = self.losses(params)
    if self._items:
      scores = behaviours.run(
        self._items, lambda prompts: self._generate(params, prompts)
      )
      values["behaviours"] = scores.to_json()
    return values


def compare(before: Measurement, after: Measurement) -> dict[str, Any]:
  """The two measurements side by side, as plain values.

  Returns:
    losses: [{name, before, after, change}], change relative;
    behaviours: [{group, n, before, after, stopped, gained, lost, p}], where
    before and after are (rate, low, high) with 95 % intervals, gained and
    lost count items that passed only after or only before, and p is the
    exact McNemar test of the two being equal; samples: one reply per group.
  """
  result: dict[str, Any] = {
    "losses": [
      {
        "name": name,
        "before": value,
        "after": after[name],
        "change": after[name] / value - 1,
      }
      for name, value in before.items()
      if name != "behaviours"
    ],
    "behaviours": [],
    "samples": [],
  }
  if "behaviours" not in before:
    return result
  scores = [
    behaviours.Scores.from_json(m["behaviours"]) for m in (before, after)
  ]
  for row in behaviours.compare(*scores):
    result["behaviours"].append(
      {
        "group": row.group,
        "n": row.after.n,
        "before": (row.before.rate, *row.before.interval),
        "after": (row.after.rate, *row.after.interval),
        "stopped": row.after.stopped / row.after.n,
        "gained": row.gained,
        "lost": row.lost,
        "p": row.p,
      }
    )
  seen = set()
  for old, new in zip(scores[0].replies, scores[1].replies, strict=True):
    if new["group"] not in seen:
      seen.add(new["group"])
      result["samples"].append(
        {
          "group": new["group"],
          "prompt": new["prompt"][-1]["content"],
          "before": _shown(old),
          "after": _shown(new),
        }
      )
  return result


def _shown(reply: dict[str, Any]) -> dict[str, Any]:
  """All that a reply said, for a person to read."""
  parts = []
  if reply["reasoning"]:
    parts.append(f"({reply['reasoning']})")
  parts += [f"{c['name']}({c['arguments']})" for c in reply["tool_calls"]]
  parts.append(reply["reply"])
  return {
    "text": " ".join(part for part in parts if part),
    "passed": reply["passed"],
    "stopped": reply["stopped"],
  }
