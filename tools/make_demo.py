"""Writes the demo: its raw text, tokenizer, conversations and prompts.

    python tools/make_demo.py --out DIR --seed 0           everything
    python tools/make_demo.py --out DIR --stats            tokens per file

The same seed gives the same bytes; `digests.json` records them.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sentencepiece as spm

from tools.demo_world import prose, split, tokenizer, world

PRETRAIN_DOCUMENTS = 46_000
GENERAL_DOCUMENTS = 150
# How often the tokenizer is shown each name: enough to keep it in few pieces.
NAME_REPEATS = 150
# The first of them, and the conversations. A change to either, or to the
# names, changes the tokenizer, and then the base model must be trained anew.
TOKENIZER_DOCUMENTS = 12_000
# Too large to keep in the repository; written again from the seed.
LARGE = ("pretrain.jsonl",)


def _jsonl(rows: list[dict[str, Any]]) -> str:
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _texts(row: Any) -> list[str]:
  """Every string within a row, for the tokenizer to learn from."""
  if isinstance(row, str):
    return [row]
  if isinstance(row, dict):
    return [t for key in row if key != "checks" for t in _texts(row[key])]
  return (
    [t for part in row for t in _texts(part)] if isinstance(row, list) else []
  )


def make(out: Path, seed: int, documents: int = PRETRAIN_DOCUMENTS) -> None:
  """Writes all files of the demo but the model into `out`."""
  out.mkdir(parents=True, exist_ok=True)
  entities = world.make_world(seed)
  pretrain = list(prose.Prose(entities, seed, "pretrain").documents(documents))
  known = set(pretrain)
  general = [
    text
    for text in prose.Prose(entities, seed, "general").documents(
      2 * GENERAL_DOCUMENTS
    )
    if text not in known
  ][:GENERAL_DOCUMENTS]
  asked = split.held_out(entities, seed)
  rows = split.training(entities, seed, asked)

  model = tokenizer.train(
    pretrain[:TOKENIZER_DOCUMENTS]
    + [text for kind in rows.values() for text in _texts(kind)]
    + [f" {entity.name}" for entity in entities] * NAME_REPEATS
  )
  tokenizer.write(out, model)
  files = {
    "pretrain.jsonl": [{"text": text} for text in pretrain],
    "general_text.jsonl": [{"text": text} for text in general],
    "behaviours.jsonl": asked,
    "train_replay.jsonl": split.replay(entities, pretrain),
    **{f"train_{kind}.jsonl": part for kind, part in rows.items()},
  }
  for name, content in files.items():
    (out / name).write_text(_jsonl(content), encoding="utf-8")
  (out / "digests.json").write_text(
    json.dumps(digests(out), indent=2) + "\n", encoding="utf-8"
  )


def digests(folder: Path) -> dict[str, str]:
  """SHA-256 of every file this program writes, by name."""
  names = [
    *(p.name for p in folder.glob("*.jsonl")),
    *(p.name for p in folder.glob("tokenizer*")),
    "chat_template.jinja",
    "generation_config.json",
  ]
  return {
    name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for name in sorted(names)
  }


def stats(folder: Path) -> str:
  """Rows and tokens of text (control tokens not counted) per file."""
  model = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
  lines = [f"{'file':<24}{'rows':>8}{'tokens':>10}{'a row':>8}"]
  for path in sorted(folder.glob("*.jsonl")):
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    tokens = sum(
      len(model.encode(text)) for row in rows for text in _texts(row)
    )
    lines.append(
      f"{path.name:<24}{len(rows):>8}{tokens:>10}{tokens / len(rows):>8.1f}"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--stats", action="store_true")
  flags = parser.parse_args()
  if flags.stats:
    print(stats(flags.out))
  else:
    make(flags.out, flags.seed)


if __name__ == "__main__":
  main()
