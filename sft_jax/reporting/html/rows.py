"""Rows as the model sees them: prompt, trained, special, coloured."""

from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.reporting.html import charts
from sft_jax.reporting.html.elements import Element, join, tag


def samples(rows: Sequence[Mapping[str, Any]]) -> Element:
  """Examples of `inspection.sample`, each token's kind by its colour."""
  return join([_key(), *map(_sample, rows)]) if rows else Element("")


def _key() -> Element:
  return tag(
    "p",
    tag("span", "prompt", class_="prompt"),
    tag("span", "trained", class_="trained"),
    tag("span", "trained, of another weight than 1", class_="other"),
    tag("span", "special", class_="special"),
    class_="key",
  )


def _sample(sample: Mapping[str, Any], said: str = "") -> Element:
  trained = sum(weight > 0 for weight in sample["loss_weights"])
  spans = []
  for span in sample["spans"]:
    weight = span["weight"]
    kind = "prompt" if not weight else "trained" if weight == 1 else "other"
    kinds = f"{kind} special" if span["special"] else kind
    note = f"{span['role']}, weight {weight:g}"
    spans.append(tag("span", span["text"], class_=kinds, title=note))
  title = (
    f"{said}{sample['place']}: {len(sample['tokens']):,} tokens, "
    f"{trained:,} trained"
  )
  return tag("article", tag("h3", title), tag("pre", *spans))


def worst(held_out: Sequence[Mapping[str, Any]]) -> Element:
  """Held-out rows as in evals/held_out_rows.jsonl, the worst one first.

  All are counted in a histogram; those that come with their pieces are shown.
  """
  if not held_out:
    return Element("")
  losses = [row["nats_per_token"] for row in held_out]
  note = (
    f"{len(losses):,} examples that were not trained on, by their loss after "
    f"training: median {sorted(losses)[len(losses) // 2]:.3g}, highest "
    f"{max(losses):.3g} nats per trained token."
  )
  shown = [row for row in held_out if "spans" in row]
  label = "Held-out examples by nats per trained token"
  drawn = charts.histogram(label, _bins(losses))
  return join(
    [
      tag("p", note, class_="dim"),
      tag("div", tag("figure", tag("h3", label), drawn), class_="charts"),
      *(_sample(r, f"{r['nats_per_token']:.2f} nats/token, ") for r in shown),
    ]
  )


def _bins(losses: Sequence[float], number: int = 24) -> list:
  top = max(losses) or 1.0
  width = top / number
  counts = [0] * number
  for loss in losses:
    counts[min(int(loss / width), number - 1)] += 1
  return [
    (f"{i * width:.2g}", f"{i * width:.2g} to {(i + 1) * width:.2g}", n)
    for i, n in enumerate(counts)
  ]
