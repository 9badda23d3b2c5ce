"""What a run shows at its end: the result, the report, the model's card."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from sft_jax.checkpointing import export
from sft_jax.common import hub
from sft_jax.common.buckets import storage
from sft_jax.data.store.stats import DatasetStats
from sft_jax.reporting import run_files, terminal
from sft_jax.reporting.html import figures, run_page
from sft_jax.reporting.html.elements import Table, text

# Of result.json, what the terminal has its own place for.
_ELSEWHERE = ("Where the time went",)


def time_line(account: dict[str, float]) -> str:
  """What the seconds of `throughput.Clock.account` went into, in a line."""
  rows = figures.time_rows(account)
  shares = ", ".join(f"{name} {share}" for name, _, share in rows)
  return f"Took {terminal.duration(account['run_s'])}: {shares}."


def stop_line(records: Sequence[Mapping[str, Any]]) -> str:
  """A warning where the stop token was not learned; '' where it was.

  >>> stop_line([{"acc/stop_token": 0.25}])[:56]
  'The stop token was predicted in 25% of its places in the'
  """
  seen = [r["acc/stop_token"] for r in records if "acc/stop_token" in r]
  if not seen or seen[-1] >= 0.5:
    return ""
  return (
    f"The stop token was predicted in {seen[-1]:.0%} of its places in the last "
    "steps: replies will often not end by themselves. Train longer, or see "
    "lora.new_token_rows."
  )


def show_result(out: Console, result: dict[str, Any], samples: int) -> None:
  """Prints the before -> after table, the losses and some replies."""
  for one in _tables(result):
    terminal.print_table(out, one.title, [*map(str, one.head)], one.rows)
  if "export" in result:
    evidence = export.Evidence(**result["export"])
    out.print(Text(f"{terminal.visible(evidence.path)}: {evidence}"))
  for sample in result["samples"][:samples]:
    sides = {side: _reply(sample[side]) for side in ("before", "after")}
    said = {"prompt": _line(sample["prompt"]), **sides}
    terminal.facts(out, sample["group"], said)


def _tables(result: Mapping[str, Any]) -> list[Table]:
  """Behaviors, and all figures but the times."""
  share = "{:4.0%}  [{:.0%}, {:.0%}]".format
  rows = [
    (row["group"], row["n"], share(*row["before"]), share(*row["after"]),
     f"{row['stopped']:.0%}")
    for row in result.get("behaviors", ())
  ]  # fmt: skip
  head = ("behavior", "n", "before", "after", "stops by itself")
  title = "Behavior, share passed with 95 % interval"
  tables = [Table(title, head, rows)] if rows else []
  others = figures.of_result(result)
  return tables + [one for one in others if one.title not in _ELSEWHERE]


def _reply(reply: Mapping[str, Any]) -> str:
  """A reply on one line, with its verdict, if it was checked."""
  verdicts = {True: "[passed] ", False: "[FAILED] ", None: ""}
  passed = verdicts[reply.get("passed")]
  stopped = "" if reply["stopped"] else "[did not stop] "
  return passed + stopped + _line(reply["text"])


def _line(text: str) -> str:
  """A text on one line, cut where it would fill more than two."""
  line = " / ".join(part for part in text.splitlines() if part)
  return line if len(line) <= 150 else line[:150] + " ..."


def show_places(out: Console, workdir: Path, config: Any) -> None:
  """Prints where a finished run's things are, and what to type next."""
  place = str(config.workdir)  # Perhaps a bucket's.
  files = {"report": "report.html", "model": "export", "adapter": "adapter"}
  files["records"] = "metrics.jsonl"
  found = {
    name: storage.join(place, file)
    for name, file in files.items()
    if (workdir / file).exists()
  }
  model = found.get("model", place)
  command = lambda *words: shlex.join(["sft-jax", *map(str, words)])
  sides = (f"--model={model}", f"--compare={config.model.path}")
  found["chat"] = command("chat", *sides)
  found["compare"] = command("compare", place, "ANOTHER_RUN")
  terminal.facts(out, "Where things are", found)


def write_report(workdir: Path, result: dict[str, Any] | None = None) -> None:
  """Writes workdir/report.html, once for all processes; `result` is what
  result.json will hold, of a run that is about to finish."""
  if jax.process_index() == 0:
    run = run_files.read(workdir) | ({"result": result} if result else {})
    run_page.write(workdir / "report.html", run)


CARD_TAG = "sft_jax"  # Every card written here has it.
_CARD = """\
---
{header}
---
# {name}

{base}, tuned by supervised fine-tuning. Everything below was written by sft_jax
from the files of the run.

## License

To fill in, here and in the header: what those of the base and the data allow.

{tables}

## How it was trained

```
{command}
```

{versions}
"""


def model_card(run: Mapping[str, Any], name: str) -> str:
  """README.md of a folder of the hub, from what `run_files.read` gives.

  The header names the base and data sets that the hub has; of local ones only
  the names of files are told. What no run knows is left to fill in.
  """
  start, ledger = run.get("start", {}), run.get("ledger")
  facts = start.get("facts", {})
  origin = facts.get("Model", {}).get("from", "")
  base, _, commit = origin.partition("@")
  base = base if hub.is_id(origin) and commit else ""
  data, tables = [], []
  if ledger:
    sources = DatasetStats.from_json(ledger).short_names()
    for source in sources:  # Without revision, split and slice.
      named = re.split(r"[@#\[]", source.removeprefix("hf://"))[0]
      if hub.is_id(named) and not (Path(named).suffix or Path(named).exists()):
        data.append(named)
    counted = figures.of_ledger(ledger)["tables"][0]
    rows = [[sources.get(of, of), *rest] for of, *rest in counted.rows]
    tables.append(Table("Data", counted.head, rows))
  tables += _tables(run.get("result", {}))
  plan = {**facts.get("Model", {}), **facts.get("Plan", {})}
  shown = ("shape", "parameters", "steps", "epochs", "fill", "learning rate")
  rows = [[key, plan[key]] for key in shown if key in plan]
  tables.append(Table("Training", ("", ""), rows))
  header = {
    **({"base_model": base} if base else {}),
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "license": "unknown",
    **({"datasets": data} if data else {}),
    "tags": ["sft", CARD_TAG],
  }
  versions = start.get("versions", {})
  return _CARD.format(
    header="\n".join(f"{key}: {json.dumps(x)}" for key, x in header.items()),
    name=name,
    base=f"`{origin if base else Path(origin).name}`",
    tables="\n\n".join(map(_markdown, tables)),
    command=start.get("command", "").replace(str(Path.home()), "~"),
    versions=", ".join(f"{key} {x}" for key, x in versions.items()),
  )


def _markdown(table: Table) -> str:
  """A table; what data and models say cannot end a cell or make a tag."""

  def line(cells: Sequence[object]) -> str:
    said = (re.sub(r"([\\|<`*\[])", r"\\\1", text(cell)) for cell in cells)
    return f"| {' | '.join(' '.join(one.split()) for one in said)} |"

  rule = "|---" * len(table.head) + "|"
  lines = [line(table.head), rule, *map(line, table.rows)]
  return f"## {table.title}\n\n" + "\n".join(lines)
