"""The data ledger on a page: rows and tokens, and where they went."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sft_jax.data.store.stats import HELD_OUT
from sft_jax.reporting.html import charts
from sft_jax.reporting.html.elements import Element, join, table, tag

_COUNTS = ("rows_in", "rows_trained", "tokens_prompt", "tokens_trained")


def ledger(found: Mapping[str, Any]) -> Element:
  """What `ledger.DatasetStats.to_json` counted; '' of nothing."""
  return join(_parts(found)) if found else Element("")


def total(found: Mapping[str, Any], name: str) -> int:
  """A count, over all sources."""
  return sum(source[name] for source in found["sources"].values())


def _parts(found: Mapping[str, Any]) -> Iterator[Element]:
  sources = found["sources"]
  rows: list[list[object]] = [
    [name, *(s[key] for key in _COUNTS), sum(s["dropped"].values())]
    for name, s in sources.items()
  ]
  if len(rows) > 1:
    numbers = zip(*(row[1:] for row in rows), strict=True)
    rows.append(["all", *map(sum, numbers)])
  yield table(
    ["source", *(name.replace("_", " ") for name in _COUNTS), "rows dropped"],
    rows,
  )
  yield from _where(sources)
  if epoch := found.get("epoch"):
    yield from _epoch(epoch)
  roles: dict[str, list[int]] = {}
  for source in sources.values():
    for name, counts in source["roles"].items():
      sums = roles.setdefault(name, [0, 0])
      sums[:] = (a + b for a, b in zip(sums, counts, strict=True))
  if roles:
    yield table(
      ["role", "tokens", "trained"],
      ([name, *counts] for name, counts in roles.items()),
    )


def _where(sources: Mapping[str, Any]) -> Iterable[Element]:
  """Why rows were dropped or noted, and the first of them."""
  held_out = 0
  for name, source in sources.items():
    for what, unit in (
      ("dropped", "rows dropped, "),
      ("dropped_turns", "turns dropped, "),
      ("notes", "rows: "),
    ):
      for reason, number in source[what].items():
        if reason == HELD_OUT:  # Said of all sources at once.
          held_out += number
          continue
        places = ", ".join(source["places"].get(reason, ()))
        note = f"{name}: {number:,} {unit}{reason}"
        yield tag("p", f"{note}: {places}" if places else note, class_="dim")
  if held_out:
    yield tag("p", f"{held_out:,} rows dropped, {HELD_OUT}", class_="dim")


def _epoch(epoch: Mapping[str, Any]) -> Iterable[Element]:
  kinds = ("tokens_prompt", "tokens_trained", "tokens_padding")
  slots = epoch["slots"]
  yield tag("h3", f"One epoch: {epoch['packs']:,} packed rows, {slots:,} slots")
  yield charts.bars(
    "What fills the slots",
    {kind.removeprefix("tokens_"): epoch[kind] / slots for kind in kinds},
  )
  if mixture := epoch["mixture"]:
    yield table(
      ["source", "copies", "loss x", "tokens", "of them", "of trained"],
      (
        [name, f"{m['copies']:g}", f"{m['loss_weight']:g}", m["tokens"],
         f"{m['share']:.1%}", f"{m['trained_share']:.1%}"]
        for name, m in mixture.items()
      ),
    )  # fmt: skip
