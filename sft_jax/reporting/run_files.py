"""What a run has left in its workdir, read for reports and comparisons."""

from pathlib import Path
from typing import Any

from sft_jax.common.buckets import remote_workdir
from sft_jax.common.workdir import Incidents, read_json
from sft_jax.reporting import metrics

# What is in which file: an object, and an object a line.
FILES = {
  "start": "start.json",
  "config": "config.json",
  "data": "data.json",
  "ledger": "ledger.json",
  "samples": "samples.json",
  "before": "evals/before.json",
  "after": "evals/after.json",
  "result": "result.json",
}
LINES = {"metrics": "metrics.jsonl", "held_out": "evals/held_out_rows.jsonl"}


def read(workdir: str | Path) -> dict[str, Any]:
  """What `run_page.write` takes; a run under way or halted has left less.

  Raises ValueError: a folder without config.json, which every run writes first.
  """
  found: dict[str, Any] = {"title": str(workdir)}
  with remote_workdir.copied(workdir) as folder:
    if not (folder / "config.json").exists():
      raise ValueError(
        f"{workdir}: got no config.json, expected the workdir of a run. Name "
        "the folder that config.workdir named."
      )
    for name, file in (FILES | LINES).items():
      if (folder / file).exists():
        load = metrics.read_jsonl if name in LINES else read_json
        found[name] = load(folder / file)
    found["incidents"] = Incidents(folder).read()
  return found
