"""What the benchmarks of the data wing run on: real rows, a real vocabulary.

They are not part of this project: `--shared` names the folder that holds them
(instruction/, reasoning/, tokenizers/).
"""

import argparse
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

FILES = {
  "T0": "instruction/t0_sample.jsonl",
  "Alpaca": "instruction/alpaca_5000.json",
  "GSM8K": "reasoning/gsm8k_train.jsonl",
}
TEMPLATE = "chat_templates/Qwen-Qwen2.5-7B-Instruct.jinja"
VOCABULARY = "tokenizers/mistral/tokenizer.json"


def parser(description: str | None) -> argparse.ArgumentParser:
  made = argparse.ArgumentParser(description=description)
  made.add_argument("--shared", type=Path, default=Path("../shared/data"))
  return made


def files(shared: Path) -> dict[str, Path]:
  """The files of rows, by name."""
  found = {name: shared / file for name, file in FILES.items()}
  for file in (*found.values(), shared / VOCABULARY, shared / TEMPLATE):
    if not file.is_file():
      raise ValueError(
        f"{file}: got no such file; expected real data for the benchmark. "
        "Name its folder with --shared."
      )
  return found


def rows(shared: Path) -> Iterator[dict[str, Any]]:
  """The rows of all files in turn, as prompt and completion, without end."""

  def plain(row: dict[str, Any]) -> dict[str, Any] | None:
    if "instruction" in row:
      asked = [row["instruction"], row["input"]]
      row = {
        "prompt": "\n\n".join(filter(None, asked)),
        "completion": row["output"],
      }
    elif "question" in row:
      row = {"prompt": row["question"], "completion": row["answer"]}
    keys = ("prompt", "completion")
    # T0's answers end in the stop token of another model.
    made = {key: row[key].removesuffix("<|endoftext|>") for key in keys}
    return made if all(text.strip() for text in made.values()) else None

  def read(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
      return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line]

  each = [filter(None, map(plain, read(f))) for f in files(shared).values()]
  for turn in zip(*map(itertools.cycle, each), strict=True):
    yield from turn


def write_jsonl(path: Path, shared: Path, number: int) -> int:
  """Writes rows; returns the bytes written."""
  with path.open("w") as file:
    for row in itertools.islice(rows(shared), number):
      file.write(json.dumps(row) + "\n")
    return file.tell()


def tokenizer_folder(shared: Path, folder: Path) -> Path:
  """A ChatML model folder on Mistral's vocabulary of 32,000."""
  folder.mkdir(parents=True, exist_ok=True)
  model = tokenizers.Tokenizer.from_file(str(shared / VOCABULARY))
  model.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  model.save(str(folder / "tokenizer.json"))
  stop = model.token_to_id("<|im_end|>")
  for name, value in (
    ("generation_config.json", {"eos_token_id": stop}),
    ("tokenizer_config.json", {"eos_token": "<|im_end|>"}),
  ):
    (folder / name).write_text(json.dumps(value))
  template = (shared / TEMPLATE).read_text()
  (folder / "chat_template.jinja").write_text(template)
  return folder


def machine() -> str:
  """The processor and the cores that may be used, for the record."""
  names = [
    line.split(":")[1].strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines()
    if line.startswith("model name")
  ]
  load = os.getloadavg()[0]
  cores = len(os.sched_getaffinity(0))
  return f"{cores} cores of {names[0]}, load {load:.1f} at the start"
