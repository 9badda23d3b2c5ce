"""What a config trains on, and what is wrong with it.

    sft-jax inspect --config=configs/base.py
    sft-jax inspect --config=... --html=data.html --json

Shows findings, warnings with examples, the scores beside the rows
(sft-jax score writes them), rows and tokens by source, lengths, and
samples as the model will see them: prompt dim, trained green (of another
weight than 1: yellow), special tokens bold. The data is built as training
builds it, with the same cache. See docs/audit.md.

Exit codes: 0 fine, warnings allowed; 1 a finding failed; 2 the config or the
data cannot be read.
"""

import json
import sys
from typing import Any

from absl import flags
from rich.console import Console
from rich.text import Text

from sft_jax.commands import command, score
from sft_jax.data.audit import checks, summary
from sft_jax.data.conversation import RowError
from sft_jax.data.store.stats import DatasetStats
from sft_jax.reporting import terminal
from sft_jax.reporting.html import audit_page
from sft_jax.training.build import data, model

CONFIG = command.config_flag()
SAMPLES = flags.DEFINE_integer("samples", 3, "Examples to show.")
SEED = flags.DEFINE_integer("seed", 0, "Which examples.")
JSON = flags.DEFINE_bool("json", False, "Print JSON for other programs.")
HTML = flags.DEFINE_string("html", None, "Write a page to this path.")


def inspect(config: data.Config, log: data.Log) -> dict[str, Any]:
  """Everything about the data of a config; see `summary.inspect`."""
  tokenizer = data.load_tokenizer(config, model.find_model(config).folder, log)
  fault = None
  try:
    stores = data.load_stores(config, tokenizer, log)
  except RowError as error:
    # Training stops at the first such row; here all of them are wanted.
    fault = str(error)
    with config.unlocked():
      config.data.on_bad_row = "skip"
    stores = data.load_stores(config, tokenizer, log)
  findings = [*stores.findings, checks.malformed(stores.train, fault)]
  some = len(stores.train.index)
  stream = data.make_stream(config, stores.train) if some else None
  found = summary.inspect(
    stores.train,
    stores.held_out,
    stream,
    findings,
    tokenizer,
    own_files=bool(config.data.eval),
    allow=config.data.allow,
    format=config.data.format,
    options=data.make_render_options(config),
    rows_seed=config.seed,
    samples=SAMPLES.value,
    samples_seed=SEED.value,
    scores_folder=config.data.scores,
    scores_shown=score.SHOWN.value,
  )
  covered = score.find_coverage(config, stores.train, found["scores"])
  return found | {"coverage": covered}


def show(out: Console, found: dict[str, Any]) -> None:
  """Prints what was found, the most important last, above the prompt."""
  for sample in found["samples"]:
    show_sample(out, sample)
  stats = DatasetStats.from_json(found["ledger"])
  terminal.lines(out, "\nData", [*stats.lines(), *stats.details()])
  if epoch := found["epoch"]:
    facts = {
      "steps per epoch": f"{epoch['steps']:g} of {epoch['batch_size']} packs x "
      f"{epoch['seq_len']} tokens, {epoch['fill']:.1%} full",
    }
    for kind, of in found["lengths"].items():
      shown = of.keys() - {"total", "histogram"}
      values = (f"{name} {x:,.0f}" for name, x in of.items() if name in shown)
      facts[f"{kind} per example"] = ", ".join(values)
    terminal.facts(out, "\nEpoch", facts)
  if scored := found["scores"]:
    out.print()
    score.show_figures(out, scored)
    out.print(
      f"\n{scored['rows']:,} rows have scores, {scored['unscored']:,} have "
      f"none, {scored['changed']:,} have changed since they were scored"
    )
  for warning in found["warnings"]:
    title = f"\nwarning: {warning['name']} ({warning['count']:,})"
    terminal.lines(out, title, [warning["message"]])
    for example in warning["examples"]:
      terminal.lines(out, f"  {example['note']}", map(_row, example["rows"]))
  out.print()
  passed = [one for one in found["findings"] if one["passed"]]
  for of in dict.fromkeys(one["of"] for one in passed):
    names = ", ".join(one["name"] for one in passed if one["of"] == of)
    out.print(f"passed  {of}: {names}", style="green")
  for one in found["findings"]:
    if not one["passed"]:
      allowed = one["allowed"]
      title = (
        f"{'allowed' if allowed else 'FAILED '} {one['name']} ({one['of']})"
      )
      out.print(title, style="yellow" if allowed else "bold red")
      out.print(f"        {one['message']}")


def show_sample(
  out: Console, sample: dict[str, Any], where: str = "", *, brackets=False
) -> None:
  """Prints an example; what is trained in [[brackets]] if so asked."""
  trained = sum(weight > 0 for weight in sample["loss_weights"])
  title = f"{where}{sample['place']}: {len(sample['tokens'])} tokens, "
  out.print(f"\n{title}{trained} trained", style="underline")
  text = Text()
  for span in sample["spans"]:
    weight = span["weight"]
    style = "dim" if not weight else "green" if weight == 1 else "yellow"
    bold = " bold" if span["special"] else ""
    shown = terminal.visible(span["text"])
    shown = f"[[{shown}]]" if weight and brackets else shown
    text.append(shown, style=style + bold)
  out.print(text)


def _row(row: dict[str, str]) -> str:
  prompt, answer = (
    " / ".join(filter(None, row[name].splitlines()))[:110]
    for name in ("prompt", "answer")
  )
  return f"{row['place']}: {prompt} -> {answer}"


def main() -> None:
  out = terminal.console()
  log = (lambda line: None) if JSON.value else out.print
  found = inspect(CONFIG.value, log)
  if HTML.value:
    audit_page.write(HTML.value, found)
  if JSON.value:
    print(json.dumps(found))
  else:
    show(out, found)
  sys.exit(0 if found["passed"] else 1)
