"""Encoding: against the tokenizers library alone, and against TRL.

    python tools/bench/bench_encoding.py --shared=../shared/data --rows=6000

Two comparisons, each side by side in one run, best of several rounds:

- tokens per second of a core: conversations to Examples with masks and parts,
  against the library's own `encode_batch` of the same rendered texts;
- rows per second of all cores: a file to a store on disk, against the dataset
  preparation of TRL's SFTTrainer (left out where trl is not installed).
"""

import importlib.util
import itertools
import json
import os
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_data
from sft_jax.commands import command
from sft_jax.data.chat import loss_spans
from sft_jax.data.chat import template as templates
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.encoding import encode
from sft_jax.data.formats import formats
from sft_jax.data.store import build, workers
from sft_jax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

OPTIONS = RenderOptions()
LENGTH = 2048
CHUNK = 128


def best(
  rounds: int, clock: Callable[[], float], **sides: Callable[[], Any]
) -> dict[str, float]:
  """Least seconds of each side, taken in turns."""
  found = dict.fromkeys(sides, float("inf"))
  for _ in range(rounds):
    for name, side in sides.items():
      begin = clock()
      side()
      found[name] = min(found[name], clock() - begin)
  return found


def encode_all(conversations: list, tokenizer: Tokenizer) -> int:
  """Encodes as a build does, chunk by chunk; returns the tokens."""
  tokens = 0
  for begin in range(0, len(conversations), CHUNK):
    some = conversations[begin : begin + CHUNK]
    for row in encode.encode_rows(some, tokenizer, OPTIONS, max_length=LENGTH):
      assert isinstance(row, encode.EncodedRow), row
      tokens += sum(len(example.tokens) for example in row.examples)
  return tokens


def against_library(
  conversations: list, tokenizer: Tokenizer, rounds: int
) -> None:
  import tokenizers

  template = templates.chat_template(tokenizer)
  texts = [
    loss_spans.render_spans(one, template, OPTIONS)[0].text
    for one in conversations
  ]
  model = tokenizers.Tokenizer.from_file(
    str(tokenizer.folder / "tokenizer.json")
  )
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  library = lambda: model.encode_batch(texts, add_special_tokens=False)
  tokens = sum(len(one.ids) for one in library())
  assert encode_all(conversations, tokenizer) == tokens
  seconds = best(
    rounds,
    time.process_time,
    library=library,
    ours=lambda: encode_all(conversations, tokenizer),
  )
  os.environ.pop("TOKENIZERS_PARALLELISM")
  print("\nEncoding, of one core")
  for name, value in seconds.items():
    print(f"  {name:8} {tokens / value:12,.0f} tokens/s")
  print(f"  ours / library {seconds['library'] / seconds['ours']:.2f}")


def against_trl(
  rows: list[dict[str, Any]], tokenizer: Tokenizer, rounds: int
) -> None:
  print("\nPreparation, of all cores")
  cores = workers.num_cores()

  def ours() -> None:
    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / "rows.jsonl"
      path.write_text("".join(json.dumps(row) + "\n" for row in rows))
      build.build(
        str(path),
        tokenizer,
        OPTIONS,
        directory=folder,
        max_length=LENGTH,
        log=lambda line: None,
      )

  sides: dict[str, Callable[[], Any]] = {"ours": ours}
  if importlib.util.find_spec("trl") is None:
    print("  trl is not installed: pip install trl")
  else:
    sides |= {
      "TRL": lambda: prepare_by_trl(rows, tokenizer, None),
      f"TRL, {cores} processes": lambda: prepare_by_trl(rows, tokenizer, cores),
    }
  seconds = best(rounds, time.perf_counter, **sides)
  for name, value in seconds.items():
    ratio = value / seconds["ours"]
    print(
      f"  {name:20} {len(rows) / value:10,.0f} rows/s"
      + ("" if name == "ours" else f", ours / it {ratio:.1f}")
    )


def prepare_by_trl(
  rows: list[dict[str, Any]], tokenizer: Tokenizer, processes: int | None
) -> None:
  """What SFTTrainer does to a dataset of prompts and completions."""
  import datasets  # pyright: ignore[reportMissingImports]
  import transformers
  import trl  # pyright: ignore[reportMissingImports]

  datasets.disable_progress_bars()
  datasets.disable_caching()
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tokenizer.folder / "tokenizer.json"),
    eos_token="<|im_end|>",
    chat_template=tokenizer.chat_template,
  )
  data = datasets.Dataset.from_list(
    [
      {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
      }
      for row in rows
    ]
  )
  trainer: Any = types.SimpleNamespace(
    _tokenizer=theirs,
    chat_template=tokenizer.chat_template,
    completion_only_loss=True,
  )
  arguments = trl.SFTConfig(
    max_length=LENGTH, dataset_num_proc=processes, use_cpu=True, bf16=False
  )
  made = trl.SFTTrainer._prepare_dataset(
    trainer, data, theirs, arguments, False, None, "train"
  )
  assert len(made) == len(rows)


def main() -> None:
  parser = bench_data.parser(__doc__)
  parser.add_argument("--rows", type=int, default=6000)
  parser.add_argument("--rounds", type=int, default=3)
  flags = parser.parse_args()
  print(bench_data.machine())
  rows = list(itertools.islice(bench_data.rows(flags.shared), flags.rows))
  with tempfile.TemporaryDirectory() as folder:
    tokenizer = load_tokenizer(
      bench_data.tokenizer_folder(flags.shared, Path(folder))
    )
    conversations = [formats.to_conversation(row) for row in rows]
    against_library(conversations, tokenizer, flags.rounds)
    against_trl(rows, tokenizer, flags.rounds)


if __name__ == "__main__":
  command.run(main)
