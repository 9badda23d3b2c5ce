"""The report of a run: plain values in, one self-contained HTML page out.

The page loads nothing, runs nothing and works offline, in light and dark, on
a phone and on paper. This file gathers what `run.html.jinja` shows.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from sft_jax.checkpointing import export
from sft_jax.reporting.html import charts
from sft_jax.reporting.html.elements import Table, join, mark, tag, write_page
from sft_jax.reporting.terminal import duration

Run = Mapping[str, Any]
Sides = Mapping[str, Sequence[Mapping[str, Any]]]

# Of one group of replies, so that none crowds the others out.
_SHOWN = 3
# Two-sided; below it a difference is not put down to chance.
_SIGNIFICANT = 0.05
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
}
# Of the losses: what comes first.
_HEADLINES = ("held_out/nats_per_token", "general_text/perplexity")


def label(name: str) -> str:
  """A figure of a text in words: 'held-out rows, perplexity'."""
  of, _, figure = name.partition("/")
  if of in _TEXTS and figure in _FIGURES:
    return f"{_TEXTS[of]}, {_FIGURES[figure]}"
  return name


def write(path: str | os.PathLike, run: Run) -> None:
  """Writes the page, whole or not at all. Every key is optional.

      title      text
      start      what the run said of itself at its start: 'facts' {title:
                 {name: value}}, 'said' [line], 'command', 'versions'
      config     nested dict
      metrics    [{'step': n, name: number, ...}], rows of metrics.jsonl
      incidents  [{'time', 'kind', 'step', 'said'}], lines of incidents.jsonl
      ledger     as in ledger.json
      samples    [`summary.sample`], training examples
      data       fingerprint and what it is made of, as in data.json
      held_out   held-out examples by loss, as in evals/held_out_rows.jsonl
      before, after   measurements, as in evals/
      result     as in result.json; what is not known is shown as it is

  Raises:
    ValueError: a key that is not in this list.
  """
  known = {
    *("title", "start", "config", "metrics", "incidents", "ledger"),
    *("samples", "held_out", "before", "after", "result", "data"),
  }
  if unknown := sorted(run.keys() - known):
    raise ValueError(
      f"report.write: run has {unknown}; expected keys of {sorted(known)}. "
      "Remove or rename them: what the page leaves out would be lost in "
      "silence."
    )
  result, lines = run.get("result", {}), run.get("incidents")
  marks = [(i["step"], i["kind"]) for i in lines or () if i["step"] is not None]
  keys = ("time", "kind", "step", "said")
  write_page(
    path,
    "run.html.jinja",
    title=run.get("title", "Supervised fine-tuning"),
    tiles=headline(run),
    notes=list(_notes(run)),
    behaviours=before_after(result.get("behaviours", ())),
    figures=figures(result),
    curves=charts.of_run(run.get("metrics", ()), marks, run.get("before")),
    replies=_replies(run),
    ledger=ledger(run.get("ledger", {})),
    samples=run.get("samples", ()),
    held_out=_hardest(run.get("held_out", ())),
    incidents=lines and [[line[key] for key in keys] for line in lines],
    start=run.get("start", {}),
    config=run.get("config", {}),
  )


def headline(run: Run) -> dict[str, object]:
  """The figures that come first, as far as there are any: {name: value}."""
  records, result = run.get("metrics", ()), run.get("result", {})
  found: dict[str, object] = {}
  facts = run.get("start", {}).get("facts", {}).get("Model", {})
  if "from" in facts:
    found["model"] = facts["from"]
  if records:
    found["steps"] = records[-1]["step"]
    found["spent on steps"] = duration(seconds(records))
  if scores := result.get("behaviours"):
    every = sum(row["n"] for row in scores)
    old, new = (
      sum(row["n"] * row[when][0] for row in scores) / every
      for when in ("before", "after")
    )
    found["of all prompts passed"] = f"{old:.0%} → {new:.0%}"
  for row in result.get("losses", ()):
    if row["name"] in _HEADLINES:
      shown = f"{row['before']:.3f} → {row['after']:.3f}"
      found[label(row["name"])] = shown
  return found


def seconds(records: Sequence[Mapping[str, Any]]) -> float:
  """Time spent on steps, as the records have it."""
  total, last = 0.0, 0
  for record in records:
    if step_s := record.get("time/step_s"):
      total += step_s * (record["step"] - last)
      last = record["step"]
  return total


def _notes(run: Run) -> Iterator[str]:
  if (evidence := run.get("result", {}).get("export")) is not None:
    yield f"{evidence['path']}: {export.Evidence(**evidence)}"
  if kinds := [line["kind"] for line in run.get("incidents", ())]:
    counted = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
    yield f"Incidents: {counted}."


# -- Figures of result.json, which the terminal shows, too -------------------


def figures(result: Mapping[str, Any]) -> list[Table]:
  """Losses, forgetting, overfitting, memorization, time, and what is new."""
  known = {
    *("losses", "behaviours", "samples", "export", "forgetting", "gap"),
    *("knowledge", "memorization", "time"),
  }
  made = [
    Table(
      "Losses",
      ("", "before", "after", "change"),
      [
        (
          label(row["name"]),
          f"{row['before']:.3f}",
          f"{row['after']:.3f}",
          f"{row['change']:+.1%}",
        )
        for row in result.get("losses", ())
      ],
    ),
    Table(
      "Forgetting, overfitting, memorization",
      ("", "before", "after"),
      forgetting(result),
    ),
    Table(
      "Where the time went",
      ("", "time", "share"),
      time_rows(result.get("time", {})),
    ),
  ]
  made += [
    _anything(name.replace("_", " "), value)
    for name, value in result.items()
    if name not in known and value not in (None, {}, [])
  ]
  return [one for one in made if one.rows]


def time_rows(account: Mapping[str, float]) -> list[tuple[str, str, str]]:
  """(what, time, share) of `Clock.account`, the largest first."""
  whole = account.get("run_s", 0.0)
  parts = {name: s for name, s in account.items() if name != "run_s"}
  return [
    (
      name.removesuffix("_s").replace("_", " "),
      duration(seconds),
      f"{seconds / whole:.0%}",
    )
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1])
    if seconds >= 0.005 * whole > 0
  ]


def forgetting(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """(figure, before, after) of what was lost, overfitted and memorized."""
  rows: list[tuple[str, ...]] = [
    (
      label(one["name"]),
      *(
        (_nats if one["name"].endswith("/kl") else _percent)(one[when])
        for when in ("before", "after")
      ),
    )
    for one in result.get("forgetting", ())
  ]
  if known := result.get("knowledge"):
    name = f"what the base knows, answered ({known['n']} texts)"
    rows.append((name, share(known["before"]), share(known["after"])))
    name = "of what it answered, still answered"
    rows.append((name, "", _percent(known["retained"])))
    name = "answers gained / lost, p of McNemar's test"
    lost = f"{known['gained']} / {known['lost']}, {_p(known['p'])}"
    rows.append((name, "", lost))
  if gap := result.get("gap"):
    name = "held-out loss above trained rows', nats per token"
    rows.append((name, _nats(gap["before"]), _nats(gap["gap"])))
  return rows + _memorization(result.get("memorization") or {})


def _memorization(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
  rows: list[tuple[str, ...]] = []
  if repeats := found.get("repeats"):
    sides = [repeats["before"], repeats["after"]]
    held_out = sides[1].get("held_out_answers")
    for key, name in (
      ("whole", "replies found whole in a training answer"),
      ("overlap", "longest run of words shared with one, of the reply"),
      ("novelty", f"runs of {sides[1].get('gram')} words in no answer"),
    ):
      shown = [
        _percent(one and one.get("replies") and one["replies"][key])
        for one in sides
      ]
      if held_out:
        name += f" (held-out answers: {_percent(held_out[key])})"
      rows.append((name, *shown))
  if canaries := found.get("canaries"):
    for kind in ("planted", "kept_back"):
      means = []
      for one in (canaries["before"], canaries["after"]):
        bits = [c["exposure"] for c in (one or {}).get(kind, ())]
        means.append(f"{sum(bits) / len(bits):.2f}" if bits else "-")
      most = canaries["after"]["most"]
      name = f"canaries {kind.replace('_', ' ')}, exposure of {most:g} bits"
      rows.append((name, *means))
  return rows


def _percent(value: float | None) -> str:
  return "-" if value is None else f"{value:.1%}"


def _nats(value: float | None) -> str:
  return "-" if value is None else f"{value:.4f}"


def _anything(title: str, value: Any) -> Table:
  """Figures of a shape that is not known: a table of rows, or of pairs."""
  if isinstance(value, Mapping):
    inner = list(value.values())
    if not inner or not all(isinstance(one, Mapping) for one in inner):
      rows = [[name, _cell(one)] for name, one in value.items()]
      return Table(title, ("name", "value"), rows)
    value = [{"": key, **one} for key, one in value.items()]
  many = isinstance(value, list | tuple) and value
  if many and all(isinstance(one, Mapping) for one in value):
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


# -- Behavior ----------------------------------------------------------------


def before_after(rows: Sequence[Mapping[str, Any]]) -> Table | None:
  """The groups of a run's result.json; None without any."""
  if not rows:
    return None
  head = (
    *("group", "n", "before", "after", "0 to 100 %", "change", "+ / -", "p"),
    *("stops", "form", "content"),
  )

  def line(row: Mapping[str, Any]) -> list[object]:
    before, after = row["before"], row["after"]
    rates = (row[name] for name in ("stopped", "format", "content"))
    return [
      *(row["group"], row["n"], share(before), share(after)),
      charts.intervals(
        (before, after), f"{row['group']}: before, after", ("old", "s0")
      ),
      _change(before, after, row["p"]),
      f"{row['gained']} / {row['lost']}",
      _p(row["p"]),
      *("" if rate is None else f"{rate:.0%}" for rate in rates),
    ]

  note = (
    "Share of prompts whose reply passed every check and stopped by itself, "
    "with 95 % Wilson intervals. Before is grey. + / - counts the prompts that "
    "passed only after, only before; p is the exact McNemar test of these."
  )
  return Table("", head, [line(row) for row in rows], note)


def share(value: Sequence[float] | None) -> str:
  """'90 % (70 to 96)', or '' of nothing."""
  if value is None:
    return ""
  rate, low, high = (100 * x for x in value)
  return f"{rate:.0f} % ({low:.0f} to {high:.0f})"


def _change(
  before: Sequence[float], after: Sequence[float], p: float
) -> Markup:
  points = f"{100 * (after[0] - before[0]):+.0f} points"
  if p >= _SIGNIFICANT:
    return tag("span", f"{points}, may be chance", class_="dim")
  return tag("span", points, class_="good" if after[0] > before[0] else "bad")


def _p(p: float) -> str:
  return "< 0.001" if p < 0.001 else f"{p:.2g}"


# -- Replies -----------------------------------------------------------------


def _replies(run: Run) -> dict[str, Any]:
  """Replies before and after: to prompts with checks, else to held-out rows."""
  sides = {
    when: run[when]["behaviours"]["replies"]
    for when in ("before", "after")
    if "behaviours" in run.get(when, {})
  }
  if sides:
    note = (
      "Of each group the first prompt that was lost, gained, failed and "
      f"passed, {_SHOWN} at most. Words that only one of the replies has are "
      "marked."
    )
    return {"note": note, "cards": cards(sides)}
  replies = {
    when: {row["where"]: row for row in run[when]["replies"]}
    for when in ("before", "after")
    if run.get(when, {}).get("replies")
  }
  if not replies:
    return {"cards": []}
  first, *others = replies.values()
  # A run that was forced on may have asked for other rows.
  wheres = [where for where in first if all(where in one for one in others)]
  rows = [
    {**first[where], "reply": first[where]["row"], "stopped": True}
    for where in wheres
  ]
  answered = {when: [of[w] for w in wheres] for when, of in replies.items()}
  note = (
    "Held-out rows, as there are no behaviours; nothing is checked. Words that "
    "the row does not have are marked."
  )
  unchecked = {
    name: [
      {
        "group": row["where"],
        "prompt": [{"role": "", "content": row["prompt"]}],
        "reply": row["reply"],
        "stopped": row["stopped"],
        "passed": None,
      }
      for row in some
    ]
    for name, some in ({"the row": rows} | answered).items()
  }
  chosen = zip(*unchecked.values(), strict=True)
  return {"note": note, "cards": [_card(list(unchecked), c) for c in chosen]}


def cards(sides: Sides) -> list[dict[str, Any]]:
  """Replies of several models to the same prompts, differences marked.

  Args:
    sides: by name, the records of `behaviours.Scores.replies`, in one order.

  Returns:
    Of each group, the first prompt of each pattern of passed and failed: those
    that only some passed come first.
  """
  groups: dict[str, dict[tuple[bool, ...], tuple]] = {}
  for answers in zip(*sides.values(), strict=True):
    patterns = groups.setdefault(answers[0]["group"], {})
    patterns.setdefault(tuple(a["passed"] for a in answers), answers)
  made = []
  for patterns in groups.values():
    # What was lost, what was gained, what all fail, what all pass.
    order = sorted(patterns, key=lambda p: (len(set(p)) == 1, p[-1], p))
    made += [_card(list(sides), patterns[p]) for p in order[:_SHOWN]]
  return made


def _card(
  names: Sequence[str], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  texts = [reply_text(answer, answer["reply"]) for answer in answers]
  bodies, notes = [join([texts[0]])], [""]
  for other in texts[1:]:
    marked = mark(texts[0], other)
    if len(texts) == 2:
      bodies[0] = marked.old
    bodies.append(marked.new)
    notes.append(marked.note)
  return {
    "group": answers[0]["group"],
    "prompt": [
      {"role": turn["role"], "text": reply_text(turn, turn["content"])}
      for turn in answers[0]["prompt"]
    ],
    "replies": [
      {"name": name, "body": body, "notes": list(_verdicts(answer, note))}
      for name, answer, body, note in zip(
        names, answers, bodies, notes, strict=True
      )
    ],
  }


def _verdicts(
  answer: Mapping[str, Any], note: str
) -> Iterator[tuple[str, str]]:
  """(class, text) of what is to be known of a reply."""
  failed = answer.get("failed") or []
  if answer["passed"]:
    yield "good", "passed"
  elif answer["passed"] is not None:
    why = f": {', '.join(map(str, failed))}" if failed else ""
    yield "bad", f"failed{why}"
  if not answer["stopped"]:
    yield "bad", "did not stop"
  if note:
    yield "dim", note


def reply_text(turn: Mapping[str, Any], content: str) -> str:
  """All that a turn says: reasoning, tool calls, and the text."""
  parts = []
  if turn.get("reasoning"):
    parts.append(f"(thinks) {turn['reasoning']}")
  parts += [
    f"(calls) {call['name']} {json.dumps(call['arguments'])}"
    for call in turn.get("tool_calls", ())
  ]
  return "\n".join([*parts, content] if content else parts)


# -- Data --------------------------------------------------------------------

_COUNTS = ("rows_in", "rows_trained", "rows_held_out", "tokens_prompt",
           "tokens_trained")  # fmt: skip


def total(found: Mapping[str, Any], name: str) -> int:
  """A count of a ledger, over all sources."""
  return sum(source[name] for source in found["sources"].values())


def ledger(found: Mapping[str, Any]) -> dict[str, Any]:
  """What `ledger.Ledger.to_json` counted, for macros.ledger; {} of nothing."""
  if not found:
    return {}
  sources = found["sources"]
  rows: list[list[object]] = [
    [name, *(s[key] for key in _COUNTS), sum(s["dropped"].values())]
    for name, s in sources.items()
  ]
  if len(rows) > 1:
    numbers = zip(*(row[1:] for row in rows), strict=True)
    rows.append(["all", *map(sum, numbers)])
  head = ["source", *(name.replace("_", " ") for name in _COUNTS)]
  tables = [Table("", [*head, "rows dropped"], rows)]
  roles: dict[str, list[int]] = {}
  for source in sources.values():
    for name, counts in source["roles"].items():
      sums = roles.setdefault(name, [0, 0])
      sums[:] = (a + b for a, b in zip(sums, counts, strict=True))
  if roles:
    rows = [[name, *counts] for name, counts in roles.items()]
    tables.append(Table("", ["token role", "tokens", "trained"], rows))
  return {
    "tables": tables,
    "lines": list(_dropped(sources)),
    "epoch": found.get("epoch") and _epoch(found["epoch"]),
  }


def _dropped(sources: Mapping[str, Any]) -> Iterator[str]:
  """Why rows were dropped or noted, and the first of them."""
  for name, source in sources.items():
    for what, unit in (
      ("dropped", "rows dropped, "),
      ("dropped_turns", "turns dropped, "),
      ("notes", "rows: "),
    ):
      for reason, number in source[what].items():
        places = ", ".join(source["places"].get(reason, ()))
        note = f"{name}: {number:,} {unit}{reason}"
        yield f"{note}: {places}" if places else note


def _epoch(epoch: Mapping[str, Any]) -> dict[str, Any]:
  kinds = ("tokens_prompt", "tokens_trained", "tokens_padding")
  slots = epoch["slots"]
  shares = {kind.removeprefix("tokens_"): epoch[kind] / slots for kind in kinds}
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


def _hardest(held_out: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """Held-out rows as in evals/held_out_rows.jsonl; None without.

  All are counted in a histogram; those that come with their text are shown, by
  source, the one whose loss rose most or fell least first.
  """
  if not held_out:
    return None
  losses = sorted(row["nats_per_token"] for row in held_out)
  counts, edges = np.histogram(losses, 24, (0, losses[-1] or 1))
  bins = list(zip(edges[:-1], edges[1:], counts.tolist(), strict=True))
  sources: dict[str, list[Mapping[str, Any]]] = {}
  for row in held_out:
    if "spans" in row:
      change = row.get("change")
      before = f"{row['nats_per_token']:.2f} nats per token"
      before += "" if change is None else f" ({change:+.2f})"
      shown = {**row, "before": f"{before}, "}
      sources.setdefault(row.get("source", ""), []).append(shown)
  return {
    "note": f"{len(losses):,} examples that were not trained on, by their loss "
    f"after training: median {losses[len(losses) // 2]:.3g}, highest "
    f"{losses[-1]:.3g} nats per token. Shown are, of each source, those whose "
    "loss rose most over the base's, or fell least.",
    "histogram": charts.histogram(
      "Held-out examples by loss", bins, "nats per token"
    ),
    "sources": sources,
  }
