"""Curves: every number of the records is drawn, once."""

import re

from page_reader import Page
from sft_jax.reporting.html import curves

NAMES = (
  *("loss/nats_per_token", "held_out/nats_per_token", "optim/grad_norm"),
  *("loss/part/answer", "loss/part/tool_call", "data/fill", "plain"),
  *("behaviour/all/pass_rate", "behaviour/a/pass_rate", "new/metric"),
  *(f"loss/source/{i}.jsonl" for i in range(9)),
)
RECORDS = [{"step": 1, **dict.fromkeys(NAMES, 1.0), "data/chain": "0f3a"}]


def _curves(page: str) -> list[str]:
  """Names in the legends."""
  return [t.split(":")[0] for t in Page(page).text if ": last " in t]


def test_every_name_is_drawn_once():
  drawn = _curves(curves.of_run(RECORDS))
  assert sorted(drawn) == sorted(NAMES)


def test_what_belongs_together_shares_a_chart():
  page = curves.of_run(RECORDS)
  figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
  together = [set(_curves(figure)) for figure in figures]
  assert {"loss/nats_per_token", "held_out/nats_per_token"} in together
  assert {"loss/part/answer", "loss/part/tool_call"} in together
  assert {"behaviour/a/pass_rate"} in together
  # More than there are colours for are spread over charts.
  sources = [c for c in together if "loss/source/0.jsonl" in c]
  assert len(sources[0]) == 6


def test_a_curve_per_run():
  runs = {"one": RECORDS, "two": [{"step": 5, "loss/nats_per_token": 2.0}]}
  page = curves.of_runs(runs)
  assert _curves(page).count("one") == len(NAMES)
  assert "two: last 2" in page
  assert "two: no points" in page
