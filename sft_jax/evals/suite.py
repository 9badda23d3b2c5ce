"""Measuring a model: what it does, what it predicts, what it has forgotten.

The same suite runs before and after training; `compare` puts the two side by
side. Measurements are plain dicts, as they are written to `workdir/evals`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from sft_jax.common import distributed
from sft_jax.common.batch import Batch
from sft_jax.common.trees import Tree
from sft_jax.data.conversation import Conversation
from sft_jax.data.pipeline import Stream
from sft_jax.evals import behaviors, forgetting
from sft_jax.inference.generate import Reply
from sft_jax.step import loss_groups
from sft_jax.step.loss import BaseSums, LossSums

Measurement = dict[str, Any]
Part = TypeVar("Part")
_OF_PAIRS = ("reward_margin", "reward_accuracy")
# (what is measured, how much is done, how much there is).
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(kw_only=True, eq=False)
class Suite:
  """Everything that is measured about one model, given its parameters."""

  # (params, batch) -> sums over its trained tokens, those of the base among
  # them where the parameters tell what it is; and the same without it, for
  # half the work, of a model that is its own base.
  loss_fn: Callable[[Tree, Batch], LossSums]
  own_loss_fn: Callable[[Tree, Batch], LossSums] | None = None
  # The batches of a stream, on the mesh.
  batches: Callable[[Stream], Iterable[Batch]]
  held_out: Stream | None  # Conversations not trained on; None: not measured.
  # Of a held-out row at most; 0: not told apart. The last B * documents groups
  # of the sums are theirs, and `by_document` keeps nats and weights
  # [B, documents] of the batches measured last.
  documents: int = 0
  by_document: list[list[np.ndarray]] = dataclasses.field(default_factory=list)
  general_text: Stream | None  # Raw text; None: not measured.
  items: Sequence[behaviors.Item]  # Prompts with checks; may be empty.
  # (params, conversations, progress) -> one greedy reply each.
  generate: Callable[
    [Tree, list[Conversation], Callable[[int], None]], list[Reply]
  ]
  # What to call the groups of a stream's tokens.
  group_names: Callable[[Stream], Sequence[str]] = lambda stream: ()
  # Rows that are trained on, about as many as are held out.
  train_rows: Stream | None = None
  # What the base knows, asked in raw text.
  knowledge: Sequence[behaviors.Item] = ()
  # What of the training answers a set's replies repeat.
  repeats: Callable[[list[dict[str, Any]]], Measurement] | None = None
  # params -> how far planted canaries stand out.
  canaries: Callable[[Tree], Measurement] | None = None
  # Of the first measurement, but for compiling; what does not fit is left out
  # of all. 0: no bound.
  max_seconds: float = 0.0
  prompts_at_once: int = 64  # Answered between two looks at the clock.
  # Called after each batch, and as replies grow.
  progress: Progress = lambda what, done, of: None
  # {set: (how much of it is measured, how much there is)}, batches of text and
  # prompts, as the first measurement, or another process, has chosen.
  measured: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.loss_fn = jax.jit(self.loss_fn)
    self.own_loss_fn = self.own_loss_fn and jax.jit(self.own_loss_fn)

  @property
  def _texts(self) -> dict[str, Stream]:
    sets = {"held_out": self.held_out, "general_text": self.general_text}
    return {name: stream for name, stream in sets.items() if stream}

  def losses(self, params: Tree, *, is_base: bool = False) -> Measurement:
    """{'<set>/nats_per_token', '<set>/perplexity'} of each text set.

    With them '<set>/loss/<group>' and '<set>/acc/<group>' of groups that have
    tokens, `forgetting.base_agreement` where the base is known, and of pairs
    the means of `preferences.objective`. 'held_out/gap' is the held-out loss
    above that of rows trained on ('train_rows/nats_per_token'). Sums are over
    the whole set and divided once, whatever the batch size.
    """
    values = {}
    for name, stream in self._texts.items():
      sums = self._sums(params, name, stream, is_base)
      found = forgetting.perplexity(sums.nats, sums.weight)
      values[f"{name}/nats_per_token"] = found.nats / found.tokens
      values[f"{name}/perplexity"] = found.value
      groups = loss_groups.pairs(sums.groups, self.group_names(stream))
      for group, (total, weight) in groups.items():
        if weight:
          values[f"{name}/{group}"] = float(total / weight)
      if sums.named and sums.count:  # Of pairs.
        for key, total in sums.named.items():
          values[f"{name}/{key}"] = float(total / sums.count)
      if sums.base is not None:
        left = forgetting.base_agreement(sums.base, sums.weight)
        values |= {f"{name}/{figure}": x for figure, x in left.items()}
    if self.train_rows is not None and "held_out/nats_per_token" in values:
      sums = self._sums(params, "train_rows", self.train_rows, is_base)
      trained = float(sums.nats / sums.weight)
      values["train_rows/nats_per_token"] = trained
      values["held_out/gap"] = values["held_out/nats_per_token"] - trained
    return values

  def _sums(
    self, params: Tree, name: str, stream: Stream, is_base: bool
  ) -> LossSums:
    """Sums over rows of a stream, each once, in float64."""
    own = self.own_loss_fn if is_base else None
    loss, total = own or self.loss_fn, None
    steps = stream.num_steps or 0
    if name == "held_out":
      self.by_document.clear()
    for batch in self._within(name, self.batches(stream), steps):
      sums = jax.device_get(loss(params, batch))
      sums = jax.tree.map(np.float64, sums)
      if name == "held_out" and self.documents:
        shape = (len(batch.tokens), self.documents)
        both: Any = (sums.groups.nats, sums.groups.weight)
        cut = [x[-math.prod(shape) :].reshape(shape) for x in both]
        self.by_document.append(cut)
      total = sums if total is None else jax.tree.map(np.add, total, sums)
    assert total is not None  # A Stream has at least one batch.
    if own:  # Every prediction is the base's.
      same: Any = (0.0, total.weight, total.correct, total.correct)
      total = total._replace(base=BaseSums(*same))
    return total

  def _within(
    self,
    name: str,
    parts: Iterable[Part],
    of: int,
    size: Callable[[Part], int] = lambda part: 1,
  ) -> Iterator[Part]:
    """Of the parts of a set, those that are measured, with progress.

    The first measurement takes parts while its share of the time lasts (the
    first part, which compiles, is free), as the first process decides for all.
    Later ones measure the same.
    """
    chosen = self.measured.get(name)
    most = chosen[0] if chosen else of
    done, times = 0, list[float]()
    share = self.max_seconds / max(len(self._sets), 1)
    for part in parts:
      began = time.perf_counter()
      yield part
      times.append(time.perf_counter() - began)
      done += size(part)
      if share and not chosen and len(times) > 1 and done < most:
        late = sum(times[1:]) + max(times[1:]) > share
        if distributed.first_says(late):
          most = done
      self.progress(name, done, most)
      if done >= most:
        break
    self.measured[name] = (done, of)

  @property
  def _sets(self) -> list[str]:
    """Names of what takes time, between which it is divided."""
    asked = {"behaviors": self.items, "knowledge": self.knowledge}
    sets = self._texts | {"train_rows": self.train_rows} | asked
    return [name for name, one in sets.items() if one]

  def scores(
    self, params: Tree, name: str, items: Sequence[behaviors.Item]
  ) -> behaviors.Scores | None:
    """Replies to the prompts of a set, checked; None without prompts."""
    if not items:
      return None
    order, size = _round_robin(items), self.prompts_at_once
    if (chosen := self.measured.get(name)) or not self.max_seconds:
      # At once: no group of prompts waits for the one before it.
      order, size = order[: chosen[0] if chosen else None], len(order)
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    replies: dict[int, Reply] = {}
    report = lambda n: self.progress(name, len(replies) + n, len(order))
    for part in self._within(name, parts, len(items), len):
      prompts = [items[i].prompt for i in part]
      made = self.generate(params, prompts, report)
      replies |= zip(part, made, strict=True)
    order, made = sorted(replies), [replies[i] for i in sorted(replies)]
    return behaviors.run([items[i] for i in order], lambda prompts: made)

  def scalars(
    self, params: Tree, *, replies: Path | None = None
  ) -> dict[str, float]:
    """What is measured in the middle of training, as figures to follow: losses,
    and, where there is a jsonl file for replies, these."""
    started = time.perf_counter()
    values = self.losses(params)
    scores = self.scores(params, "behaviors", self.items) if replies else None
    if replies and scores:
      values |= scores.metrics()
      scores.write(replies)
    return values | {"time/evaluation_s": time.perf_counter() - started}

  def __call__(self, params: Tree, *, is_base: bool = False) -> Measurement:
    """Losses, the scores with every reply, and what is memorized, compared with
    the base unless the model is its own still."""
    values: Measurement = self.losses(params, is_base=is_base)
    if scores := self.scores(params, "behaviors", self.items):
      if self.repeats:
        values["repeats"] = self.repeats(scores.replies)
      values["behaviors"] = scores.to_json()
    if knowledge := self.scores(params, "knowledge", self.knowledge):
      values["knowledge"] = knowledge.to_json()
    if self.canaries:
      values["canaries"] = self.canaries(params)
    return values | {"measured": dict(self.measured)}

  def left_out(self) -> list[str]:
    """A line for each set that is not measured whole."""
    return [
      f"{name.replace('_', ' ')}: {done:,} of {of:,} "
      f"{'prompts' if name in ('behaviors', 'knowledge') else 'batches'}"
      for name, (done, of) in self.measured.items()
      if done < of
    ]


def _round_robin(items: Sequence[behaviors.Item]) -> list[int]:
  """Numbers of the items, one of each group, then the next of each."""
  seen: dict[str, int] = {}
  turn = []
  for item in items:
    turn.append(seen.get(item.group, 0))
    seen[item.group] = turn[-1] + 1
  return sorted(range(len(items)), key=turn.__getitem__)


def compare(before: Measurement, after: Measurement) -> dict[str, Any]:
  """The two measurements side by side, as plain values.

  Returns losses: [{name, before, after, change}], change relative; behaviors:
  [{group, n, before, after, stopped, format, content, gained, lost, p}], where
  before and after are (rate, low, high) with 95 % intervals, and format and
  content the rates after (None without such checks); see
  `behaviors.Comparison`; samples: one reply per group; forgetting: [{name,
  before, after}] of `forgetting.FIGURES`, and of pairs the margin and accuracy
  of rewards; gap: {train_rows, held_out, gap, before}, nats per token, or None;
  knowledge: {n, before, after, retained, gained, lost, p}, retained the share
  of what the base answered right that still is, or None; memorization:
  {repeats, canaries}: {before, after} of each, or None. What was not measured
  before is None there.
  """
  both = lambda name: {"before": before.get(name), "after": after[name]}
  gap = None
  if "held_out/gap" in after:
    gap = {
      "train_rows": after["train_rows/nats_per_token"],
      "held_out": after["held_out/nats_per_token"],
      "gap": after["held_out/gap"],
      "before": before.get("held_out/gap"),
    }
  losses = ("/nats_per_token", "/perplexity")
  result: dict[str, Any] = {
    "losses": [
      {"name": name, **both(name), "change": after[name] / value - 1}
      for name, value in before.items()
      if name.endswith(losses)
    ],
    "behaviors": [],
    "samples": [],
    "forgetting": [
      {"name": name, **both(name)}
      for name in after
      if name.rpartition("/")[2] in (*forgetting.FIGURES, *_OF_PAIRS)
    ],
    "gap": gap,
    "knowledge": _knowledge(before, after),
    "memorization": {
      x: both(x) if x in after else None for x in ("repeats", "canaries")
    },
  }
  if "behaviors" not in before:
    return result
  both = (one["behaviors"] for one in (before, after))
  old, new = map(behaviors.Scores.from_json, both)
  for row in behaviors.compare(old, new):
    now = row.after
    rates = {kind: getattr(now, kind) for kind in ("format", "content")}
    result["behaviors"].append(
      {
        **{"group": row.group, "n": now.n},
        "before": (row.before.rate, *row.before.interval),
        "after": (now.rate, *now.interval),
        "stopped": now.stopped / now.n,
        **{kind: share and share.rate for kind, share in rates.items()},
        **{"gained": row.gained, "lost": row.lost, "p": row.p},
      }
    )
  seen = set()
  for a, b in zip(old.replies, new.replies, strict=True):
    if (group := b["group"]) not in seen:
      seen.add(group)
      shown = {"before": _shown(a), "after": _shown(b)}
      prompt = b["prompt"][-1]["content"]
      result["samples"].append({"group": group, "prompt": prompt, **shown})
  return result


def _knowledge(
  before: Measurement, after: Measurement
) -> dict[str, Any] | None:
  """Of all groups together, paired item by item."""
  if "knowledge" not in before or "knowledge" not in after:
    return None
  passed = lambda one: [r["passed"] for r in one["knowledge"]["replies"]]
  old, new = passed(before), passed(after)
  pairs = list(zip(old, new, strict=True))
  gained, lost = pairs.count((False, True)), pairs.count((True, False))
  shares = [behaviors.Share(sum(x), len(x)) for x in (old, new)]
  sides = [(share.rate, *share.interval) for share in shares]
  return {
    **{"n": len(pairs), "before": sides[0], "after": sides[1]},
    "retained": 1 - lost / sum(old) if any(old) else None,
    **{"gained": gained, "lost": lost, "p": behaviors.mcnemar(gained, lost)},
  }


def _shown(reply: dict[str, Any]) -> dict[str, Any]:
  """All of a reply, for a person to read."""
  parts = [f"({reply['reasoning']})"] if reply["reasoning"] else []
  parts += [f"{c['name']}({c['arguments']})" for c in reply["tool_calls"]]
  text = " ".join(part for part in (*parts, reply["reply"]) if part)
  return {"text": text, "passed": reply["passed"], "stopped": reply["stopped"]}
