"""Tables of what result.json and ledger.json hold, for pages and terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.checkpointing import serving
from sft_jax.data.store.stats import SourceStats
from sft_jax.reporting.html import charts
from sft_jax.reporting.html.elements import Table, tag
from sft_jax.reporting.terminal import duration

Result = Mapping[str, Any]
# Two-sided; below it a difference is not put down to chance.
SIGNIFICANT = 0.05
_TEXTS = {
  "held_out": "held-out rows",
  "general_text": "general text",
  "train_rows": "rows trained on",
}
_FIGURES = {
  "nats_per_token": "loss, nats per token",
  "perplexity": "perplexity",
  "kl": "KL(base || tuned), nats per token",
  "top1_agreement": "most likely token is the base's",
  "base_correct": "base predicts the token",
  "both_correct": "of these, the tuned model does, too",
  "reward_margin": "reward of the chosen above the rejected answer",
  "reward_accuracy": "pairs whose chosen answer has the higher reward",
}
_COUNTS = (
  *("rows_in", "rows_trained", "rows_held_out"),
  *("tokens_prompt", "tokens_trained"),
)
_SIDES = ("before", "after")


def label(name: str) -> str:
  """A figure of a text in words: 'held-out rows, perplexity'."""
  of, _, figure = name.partition("/")
  if of in _TEXTS and figure in _FIGURES:
    return f"{_TEXTS[of]}, {_FIGURES[figure]}"
  return name


def of_result(result: Result) -> list[Table]:
  """Losses, forgetting, overfitting, memorization, time, and what is new."""
  known = {
    *("losses", "behaviors", "samples", "export", "forgetting", "gap"),
    *("knowledge", "memorization", "time", "served"),
  }
  losses = [
    (label(x["name"]), f"{x['before']:.3f}", f"{x['after']:.3f}",
     f"{x['change']:+.1%}")
    for x in result.get("losses", ())
  ]  # fmt: skip
  lost, time = _forgetting(result), time_rows(result.get("time", {}))
  made = [
    Table("Losses", ("", *_SIDES, "change"), losses),
    Table("Forgetting, overfitting, memorization", ("", *_SIDES), lost),
    Table(
      "Served as trained",
      ("tool", "check", "verdict", "what was compared, or differs first"),
      serving.verdict_lines(result.get("served", ())),
    ),
    Table("Where the time went", ("", "time", "share"), time),
  ]
  new = {key: value for key, value in result.items() if key not in known}
  made += [
    _anything(key.replace("_", " "), x)
    for key, x in new.items()
    if x not in (None, {}, [])
  ]
  return [one for one in made if one.rows]


def time_rows(account: Mapping[str, float]) -> list[tuple[str, str, str]]:
  """(what, time, share) of `Clock.account`, the largest first."""
  whole = account.get("run_s", 0.0)
  parts = {name: s for name, s in account.items() if name != "run_s"}
  named = lambda name: name.removesuffix("_s").replace("_", " ")
  return [
    (named(name), duration(seconds), f"{seconds / whole:.0%}")
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1])
    if seconds >= 0.005 * whole > 0
  ]


def _forgetting(result: Result) -> list[tuple[str, ...]]:
  """(figure, before, after) of what was lost, overfitted and memorized."""
  rows: list[tuple[str, ...]] = []
  for one in result.get("forgetting", ()):
    number = one["name"].endswith(("/kl", "/reward_margin"))
    shown = _nats if number else _percent
    rows.append((label(one["name"]), *(shown(one[side]) for side in _SIDES)))
  if known := result.get("knowledge"):
    name = f"what the base knows, answered ({known['n']} texts)"
    lost = f"{known['gained']} / {known['lost']}, {p_value(known['p'])}"
    kept = _percent(known["retained"])
    rows += [
      (name, share(known["before"]), share(known["after"])),
      ("of what it answered, still answered", "", kept),
      ("answers gained / lost, p of McNemar's test", "", lost),
    ]
  if gap := result.get("gap"):
    name = "held-out loss above trained rows', nats per token"
    rows.append((name, _nats(gap["before"]), _nats(gap["gap"])))
  found = result.get("memorization") or {}
  if repeats := found.get("repeats"):
    rows += _repeats(repeats)
  if canaries := found.get("canaries"):
    for kind in ("planted", "kept_back"):
      means = []
      for side in _SIDES:
        bits = [c["exposure"] for c in (canaries[side] or {}).get(kind, ())]
        means.append(f"{sum(bits) / len(bits):.2f}" if bits else "-")
      most = canaries["after"]["most"]
      name = f"canaries {kind.replace('_', ' ')}, exposure of {most:g} bits"
      rows.append((name, *means))
  return rows


def _repeats(repeats: Result) -> list[tuple[str, ...]]:
  rows, after = [], repeats["after"]
  held_out = after.get("held_out_answers")
  for key, name in (
    ("whole", "replies found whole in a training answer"),
    ("overlap", "longest run of words shared with one, of the reply"),
    ("novelty", f"runs of {after.get('gram')} words in no answer"),
  ):
    if held_out:
      name += f" (held-out answers: {_percent(held_out[key])})"
    sides = (repeats[side] for side in _SIDES)
    replies = [side and side.get("replies") for side in sides]
    shown = [one and one[key] for one in replies]
    rows.append((name, *map(_percent, shown)))
  return rows


def _percent(value: float | None) -> str:
  return "-" if value is None else f"{value:.1%}"


def _nats(value: float | None) -> str:
  return "-" if value is None else f"{value:.4f}"


def _anything(title: str, value: Any) -> Table:
  """Figures of a shape that is not known: a table of rows, or of pairs."""
  nested = lambda of: of and {isinstance(x, Mapping) for x in of} == {True}
  if isinstance(value, Mapping):
    if not nested(value.values()):
      rows = [[name, _cell(one)] for name, one in value.items()]
      return Table(title, ("name", "value"), rows)
    value = [{"": key, **one} for key, one in value.items()]
  if isinstance(value, list | tuple) and nested(value):
    columns = list(dict.fromkeys(key for one in value for key in one))
    rows = [[_cell(one.get(c)) for c in columns] for one in value]
    return Table(title, columns, rows)
  return Table(title, ("value",), [[_cell(value)]])


def _cell(value: object) -> object:
  """Numbers and text as they are, a list or an object on one line."""
  if isinstance(value, Mapping):
    return ", ".join(f"{key} {_cell(one)}" for key, one in value.items())
  if isinstance(value, list | tuple):
    return ", ".join(str(_cell(one)) for one in value)
  return f"{value:.4g}" if isinstance(value, float) else value


def share(value: Sequence[float] | None) -> str:
  """'90 % (70 to 96)', or '' of nothing."""
  if value is None:
    return ""
  rate, low, high = (100 * x for x in value)
  return f"{rate:.0f} % ({low:.0f} to {high:.0f})"


def p_value(p: float) -> str:
  return "< 0.001" if p < 0.001 else f"{p:.2g}"


def behaviors(groups: Sequence[Mapping[str, Any]]) -> list[Table]:
  """The groups of a run's result.json, before and after; none without any."""
  head = "group,n,before,after,0 to 100 %,change,+ / -,p,stops,form,content"
  rows = []
  for row in groups:
    name, sides, p = row["group"], (row["before"], row["after"]), row["p"]
    change = sides[1][0] - sides[0][0]
    points = f"{100 * change:+.0f} points"
    kind = "good" if change > 0 else "bad"
    if p >= SIGNIFICANT:
      points, kind = f"{points}, may be chance", "dim"
    rates = (row[key] for key in ("stopped", "format", "content"))
    drawn = charts.intervals(sides, f"{name}: before, after", ("old", "s0"))
    rows.append(
      [
        *(name, row["n"], *map(share, sides), drawn),
        tag("span", points, class_=kind),
        *(f"{row['gained']} / {row['lost']}", p_value(p)),
        *("" if rate is None else f"{rate:.0%}" for rate in rates),
      ]
    )
  note = (
    "Share of prompts whose reply passed every check and stopped by itself, "
    "with 95 % Wilson intervals. Before is grey. + / - counts the prompts that "
    "passed only after, only before; p is the exact McNemar test of these."
  )
  return [Table("", head.split(","), rows, note)] if rows else []


def total(ledger: Mapping[str, Any], name: str) -> int:
  return sum(source[name] for source in ledger["sources"].values())


def of_ledger(ledger: Mapping[str, Any]) -> dict[str, Any]:
  """What `DatasetStats.to_json` counted, for macros.ledger; {} of nothing."""
  if not ledger:
    return {}
  sources, roles = ledger["sources"], {}
  rows: list[list[object]] = [
    [name, *(s[key] for key in _COUNTS), sum(s["dropped"].values())]
    for name, s in sources.items()
  ]
  if len(rows) > 1:
    numbers = zip(*(row[1:] for row in rows), strict=True)
    rows.append(["all", *map(sum, numbers)])
  head = ["source", *(name.replace("_", " ") for name in _COUNTS)]
  tables = [Table("", [*head, "rows dropped"], rows)]
  for source in sources.values():
    for name, counts in source["roles"].items():
      before = roles.get(name, (0, 0))
      roles[name] = [a + b for a, b in zip(before, counts, strict=True)]
  if roles:
    rows = [[name, *counts] for name, counts in roles.items()]
    tables.append(Table("", ["token role", "tokens", "trained"], rows))
  lines = [
    f"{name}: {line}"
    for name, source in sources.items()
    for line in SourceStats(**source).lines()
  ]
  epoch = ledger.get("epoch") and _epoch(ledger["epoch"])
  return {"tables": tables, "lines": lines, "epoch": epoch}


def _epoch(epoch: Mapping[str, Any]) -> dict[str, Any]:
  kinds, slots = ("prompt", "trained", "padding"), epoch["slots"]
  shares = {kind: epoch[f"tokens_{kind}"] / slots for kind in kinds}
  head = ["source", "copies", "loss x", "tokens", "of them", "of trained"]
  rows = [
    [name, f"{m['copies']:g}", f"{m['loss_weight']:g}", m["tokens"],
     f"{m['share']:.1%}", f"{m['trained_share']:.1%}"]
    for name, m in epoch["mixture"].items()
  ]  # fmt: skip
  return {
    "title": f"One epoch: {epoch['packs']:,} packs, {slots:,} slots",
    "bars": charts.bars("What fills the slots", shares),
    "tables": [Table("", head, rows)] if rows else [],
  }
