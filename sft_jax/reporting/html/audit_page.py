"""The audit of data as one self-contained HTML page.

What `inspection.inspect` found goes in; like the report of a run, the page
loads nothing, runs nothing, and escapes every text it is given.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sft_jax.reporting.html import charts, ledger, rows
from sft_jax.reporting.html.elements import (
  Element,
  table,
  tag,
  tiles,
  write_page,
)


def write(path: str | os.PathLike, found: Mapping[str, Any]) -> None:
  """Writes the page, whole or not at all."""
  title = "Data audit"
  write_page(path, title, [tag("h1", title), *_body(found)])


def _body(found: Mapping[str, Any]) -> Iterable[Element]:
  failed = [
    v for v in found["findings"] if not v["passed"] and not v["allowed"]
  ]
  counted = found["ledger"]
  facts = {
    "finding": "passed" if found["passed"] else f"{len(failed)} failed",
    "warnings": len(found["warnings"]),
    "rows read": ledger.total(counted, "rows_in"),
    "rows trained": ledger.total(counted, "rows_trained"),
    "tokens trained": ledger.total(counted, "tokens_trained"),
  }
  if epoch := found["epoch"]:
    facts["steps per epoch"] = f"{epoch['steps']:,.1f}"
    facts["of the slots filled"] = f"{epoch['fill']:.1%}"
  yield tiles(facts)
  yield tag("h2", "Findings")
  passed: dict[str, list[str]] = {}
  for finding in found["findings"]:
    if finding["passed"]:
      passed.setdefault(finding["of"], []).append(finding["name"])
  yield tag(
    "ul",
    *(_finding(v) for v in found["findings"] if not v["passed"]),
    *(_passed(of, names) for of, names in passed.items()),
    class_="findings",
  )
  yield tag("h2", "Samples, as the model sees them")
  yield rows.samples(found["samples"])
  if found["warnings"]:
    yield tag("h2", "Warnings")
    yield from map(_warning, found["warnings"])
  if scored := found["scores"]:
    yield tag("h2", "Scores")
    yield from _scores(scored)
  yield tag("h2", "Sources")
  yield ledger.ledger(counted)
  yield tag("h2", "Lengths")
  lengths = [
    _histogram(f"{kind} per example", spread)
    for kind, spread in found["lengths"].items()
    if spread["histogram"]
  ]
  yield tag("div", *lengths, class_="charts")


def _finding(finding: Mapping[str, Any]) -> Element:
  word, kind = ("allowed", "warn") if finding["allowed"] else ("FAILED", "bad")
  parts = [
    tag("b", word, class_=kind),
    tag(
      "span", finding["name"], tag("span", f" {finding['of']}", class_="dim")
    ),
    tag("p", finding["message"]),
  ]
  if len(finding["places"]) > 1:
    places = ", ".join(finding["places"])
    parts.append(tag("p", places, class_="dim"))
  return tag("li", *parts, class_=kind)


def _passed(of: str, names: Sequence[str]) -> Element:
  """All that passed of the same rows, on a line."""
  return tag(
    "li",
    tag("b", "passed", class_="good"),
    tag("span", ", ".join(names), tag("span", f" {of}", class_="dim")),
    class_="good",
  )


def _scores(scored: Mapping[str, Any]) -> Iterable[Element]:
  """How the rows' scores are spread, and the rows at the ends."""
  spread = scored["spread"]
  names = list(next(iter(spread.values()), {}))
  yield table(
    ["score", *names],
    ([name, *(of_name[n] for n in names)] for name, of_name in spread.items()),
  )
  yield tag(
    "p",
    f"{scored['rows']:,} rows have scores, {scored['unscored']:,} have none, "
    f"{scored['changed']:,} have changed since they were scored.",
  )
  for end in scored["ends"]:
    pairs = (
      _pair(row, ", ".join(f"{x} {row[x]:.3g}" for x in spread if x in row))
      for row in end["rows"]
    )
    yield tag("details", tag("summary", end["name"]), *pairs)


def _warning(warning: Mapping[str, Any]) -> Element:
  examples = []
  for example in warning["examples"]:
    examples.append(tag("p", example["note"]))
    examples += map(_pair, example["rows"])
  count = tag("span", warning["count"], class_="n")
  return tag(
    "details",
    tag("summary", warning["name"], count),
    tag("p", warning["message"]),
    *examples,
  )


def _pair(row: Mapping[str, Any], note: str = "") -> Element:
  """A row's place, and what is asked and answered there."""
  return tag(
    "div",
    tag("span", f"{row['place']} {note}".strip(), class_="dim"),
    tag("pre", row["prompt"], class_="prompt"),
    tag("pre", row["answer"]),
    class_="pair",
  )


def _histogram(label: str, spread: Mapping[str, Any]) -> Element:
  """How many examples are how long."""
  bins = [
    (str(one["from"]), f"{one['from']} to {one['to']}", one["examples"])
    for one in spread["histogram"]
  ]
  facts = ", ".join(
    f"{name} {value:,.0f}"
    for name, value in spread.items()
    if name != "histogram"
  )
  return tag(
    "figure",
    tag("h3", label),
    charts.histogram(label, bins),
    tag("figcaption", facts),
  )
