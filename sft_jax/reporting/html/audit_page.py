"""The audit of data (`summary.inspect`) as one self-contained HTML page."""

import os
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from sft_jax.reporting.html import charts, figures
from sft_jax.reporting.html.elements import tag, write_page


def write(path: str | os.PathLike, found: Mapping[str, Any]) -> None:
  """Writes the page, whole or not at all."""
  covered = found["coverage"]
  write_page(
    path,
    "audit.html.jinja",
    title="Data audit",
    facts=_facts(found),
    findings=found["findings"],
    samples=found["samples"],
    warnings=found["warnings"],
    scores=found["scores"],
    coverage=covered,
    map=charts.scatter("Where the rows lie", covered["points"])
    if covered
    else "",
    ledger=figures.of_ledger(found["ledger"]),
    lengths=[
      _lengths(f"{kind} per example", spread)
      for kind, spread in found["lengths"].items()
      if spread["histogram"]
    ],
  )


def _facts(found: Mapping[str, Any]) -> dict[str, object]:
  failed = sum(not (v["passed"] or v["allowed"]) for v in found["findings"])
  counted = found["ledger"]
  facts = {
    "audit": "passed" if found["passed"] else f"{failed} failed",
    "warnings": len(found["warnings"]),
    "rows read": figures.total(counted, "rows_in"),
    "rows trained": figures.total(counted, "rows_trained"),
    "tokens trained": figures.total(counted, "tokens_trained"),
  }
  if epoch := found["epoch"]:
    facts["steps per epoch"] = f"{epoch['steps']:,.1f}"
    facts["of the slots filled"] = f"{epoch['fill']:.1%}"
  return facts


def _lengths(label: str, spread: Mapping[str, Any]) -> Markup:
  """How many examples are how long, with the quantiles beneath."""
  bars, edges = spread["histogram"], lambda x: (x["from"], x["to"] + 1)
  bins = [(*edges(one), one["examples"]) for one in bars]
  facts = [f"{x} {n:,.0f}" for x, n in spread.items() if x != "histogram"]
  chart = charts.histogram(label, bins, "tokens")
  return tag("div", chart, tag("figcaption", ", ".join(facts)))
