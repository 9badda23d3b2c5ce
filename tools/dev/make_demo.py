r"""Writes the demo: its raw text, tokenizer, conversations and prompts.

    python tools/dev/make_demo.py --out DIR --seed 0           everything
    python tools/dev/make_demo.py --out DIR --stats            tokens per file
    python tools/dev/make_demo.py --out DIR --weights EXPORT   the base model
    python tools/dev/make_demo.py --out DIR --prompts 120      for a teacher

The same seed gives the same bytes; `digests.json` records them. What is in
the package was made by

    python tools/dev/make_demo.py --out runs/demo_world \
      --tokenizer sft_jax/demo/base/tokenizer.model
    python -m sft_jax.main --config=configs/demo/pretrain_demo.py
    python tools/dev/make_demo.py --out runs/demo_world \
      --weights runs/pretrain_demo/export

and copied from runs/demo_world, pretrain.jsonl left out. Without --tokenizer
a new one is trained, and a base model must then be trained with it; the one
in the package was trained when the rows of `context` still were
`puzzles.lookup`.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece as spm

import sft_jax
from demo_world import prose, split, tokenizer, world

PRETRAIN_DOCUMENTS = 46_000
GENERAL_DOCUMENTS = 150
# How often the tokenizer is shown each name: enough to keep it in few pieces.
NAME_REPEATS = 150
# The first of them, and the conversations. A change to either, or to the
# names, changes the tokenizer, and then the base model must be trained anew.
TOKENIZER_DOCUMENTS = 12_000
# Too large to keep in the repository; written again from the seed.
LARGE = ("pretrain.jsonl",)
WEIGHTS = "model.safetensors"
# The base model: 1.3 M parameters, with what the demo needs of Qwen3.
SHAPE = {
  "architectures": ["Qwen3ForCausalLM"],
  "model_type": "qwen3",
  "vocab_size": tokenizer.VOCAB,
  "hidden_size": 128,
  "intermediate_size": 384,
  "num_hidden_layers": 6,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 32,
  "hidden_act": "silu",
  "max_position_embeddings": 2 * tokenizer.CONTEXT,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0,
  "attention_bias": False,
  "attention_dropout": 0.0,
  "tie_word_embeddings": True,
  "initializer_range": 0.02,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "torch_dtype": "bfloat16",
  "use_cache": True,
}


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


def make(
  out: Path,
  seed: int,
  documents: int = PRETRAIN_DOCUMENTS,
  vocabulary: Path | None = None,
) -> None:
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

  if vocabulary is not None:
    model = vocabulary.read_bytes()
  else:
    model = tokenizer.train(
      pretrain[:TOKENIZER_DOCUMENTS]
      + [text for kind in rows.values() for text in _texts(kind)]
      + [f" {entity.name}" for entity in entities] * NAME_REPEATS
    )
  tokenizer.write(out / "base", model)
  (out / "base" / "config.json").write_text(json.dumps(SHAPE, indent=2) + "\n")
  files = {
    "pretrain.jsonl": [{"text": text} for text in pretrain],
    "general_text.jsonl": [{"text": text} for text in general],
    "behaviors.jsonl": asked,
    "knowledge.jsonl": split.knowledge(entities, seed),
    "train_replay.jsonl": split.replay(entities, pretrain),
    **{f"train_{kind}.jsonl": part for kind, part in rows.items()},
  }
  for name, content in files.items():
    (out / name).write_text(_jsonl(content), encoding="utf-8")
  record_digests(out)


def ask(out: Path, seed: int, count: int) -> None:
  """Writes prompts.jsonl: `count` of each group, none of them held out."""
  out.mkdir(parents=True, exist_ok=True)
  entities = world.make_world(seed)
  rows = split.prompts(entities, seed, count, split.held_out(entities, seed))
  (out / "prompts.jsonl").write_text(_jsonl(rows), encoding="utf-8")


def install(export: Path, out: Path) -> None:
  """Puts the weights of an export into `out`, halved to bfloat16."""
  model, params = sft_jax.load_pretrained(export)
  with tempfile.TemporaryDirectory() as folder:
    halved = Path(folder) / "model"
    sft_jax.save_pretrained(halved, model, params, dtype="bfloat16")
    weights = (halved / WEIGHTS).read_bytes()
  (out / "base" / WEIGHTS).write_bytes(weights)
  record_digests(out)


def digests(folder: Path) -> dict[str, str]:
  """SHA-256 of every file of the demo, by path."""
  files = [*folder.glob("*.jsonl"), *(folder / "base").iterdir()]
  return {
    path.relative_to(folder).as_posix(): hashlib.sha256(
      path.read_bytes()
    ).hexdigest()
    for path in sorted(files)
  }


def record_digests(folder: Path) -> None:
  """Writes digests.json."""
  (folder / "digests.json").write_text(
    json.dumps(digests(folder), indent=2) + "\n", encoding="utf-8"
  )


def stats(folder: Path) -> str:
  """Rows and tokens of text (control tokens not counted) per file."""
  model = spm.SentencePieceProcessor(
    model_file=str(folder / "base" / "tokenizer.model")
  )
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
  parser.add_argument("--tokenizer", type=Path)
  parser.add_argument("--stats", action="store_true")
  parser.add_argument("--weights", type=Path)
  parser.add_argument("--prompts", type=int)
  flags = parser.parse_args()
  if flags.stats:
    print(stats(flags.out))
  elif flags.weights:
    install(flags.weights, flags.out)
  elif flags.prompts:
    ask(flags.out, flags.seed, flags.prompts)
  else:
    make(flags.out, flags.seed, vocabulary=flags.tokenizer)


if __name__ == "__main__":
  main()
