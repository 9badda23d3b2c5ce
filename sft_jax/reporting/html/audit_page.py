"""The audit of data as one self-contained HTML page.

What `summary.inspect` found goes in; like the report of a run, the page loads
nothing, runs nothing, and escapes every text it is given.
"""

import os
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from sft_jax.reporting.html import charts, run_page
from sft_jax.reporting.html.elements import tag, write_page


def write(path: str | os.PathLike, found: Mapping[str, Any]) -> None:
  """Writes the page, whole or not at all."""
  failed = [v for v in found["findings"] if not v["passed"]]
  passed: dict[str, list[str]] = {}
  for finding in found["findings"]:
    if finding["passed"]:
      passed.setdefault(finding["of"], []).append(finding["name"])
  write_page(
    path,
    "audit.html.jinja",
    title="Data audit",
    facts=_facts(found),
    failed=failed,
    passed=passed,
    samples=found["samples"],
    warnings=found["warnings"],
    scores=found["scores"] and _scores(found["scores"]),
    ledger=run_page.ledger(found["ledger"]),
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
    "rows read": run_page.total(counted, "rows_in"),
    "rows trained": run_page.total(counted, "rows_trained"),
    "tokens trained": run_page.total(counted, "tokens_trained"),
  }
  if epoch := found["epoch"]:
    facts["steps per epoch"] = f"{epoch['steps']:,.1f}"
    facts["of the slots filled"] = f"{epoch['fill']:.1%}"
  return facts


def _scores(scored: Mapping[str, Any]) -> dict[str, Any]:
  """How the rows' scores are spread, and the rows at the ends."""
  spread = scored["spread"]
  names = list(next(iter(spread.values()), {}))
  note = lambda row: ", ".join(f"{x} {row[x]:.3g}" for x in spread if x in row)
  return {
    "head": ["score", *names],
    "rows": [[name, *(of[n] for n in names)] for name, of in spread.items()],
    "line": f"{scored['rows']:,} rows have scores, {scored['unscored']:,} have "
    f"none, {scored['changed']:,} have changed since they were scored.",
    "ends": [
      {"name": end["name"], "rows": [(row, note(row)) for row in end["rows"]]}
      for end in scored["ends"]
    ],
  }


def _lengths(label: str, spread: Mapping[str, Any]) -> Markup:
  """How many examples are how long, with the quantiles beneath."""
  bins = [
    (one["from"], one["to"] + 1, one["examples"]) for one in spread["histogram"]
  ]
  facts = ", ".join(
    f"{name} {value:,.0f}"
    for name, value in spread.items()
    if name != "histogram"
  )
  chart = charts.histogram(label, bins, "tokens")
  return tag("div", chart, tag("figcaption", facts))
