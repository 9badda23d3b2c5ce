"""Scores a model on a behaviour set, against another model if one is given.

    python tools/evaluate.py --model=runs/demo/export \\
        --data=sft_jax/assets/demo/behaviours.jsonl --baseline=BASE_FOLDER
"""

import argparse
import json

import command
from sft_jax import terminal
from sft_jax.data import tokenizers
from sft_jax.evals import behaviours, replies
from sft_jax.models import hf


def scores(
  folder: str, items: list[behaviours.Item], args: argparse.Namespace
) -> behaviours.Scores:
  """Greedy replies of the model in a folder, checked."""
  model, params = hf.load_pretrained(
    folder, dtype=args.dtype, param_dtype=args.dtype
  )
  tokenizer = tokenizers.load_tokenizer(folder)
  return behaviours.run(
    items,
    lambda prompts: replies.generate(
      model,
      params,
      tokenizer,
      prompts,
      max_new_tokens=args.max_new_tokens,
      template_kwargs=args.template_kwargs,
      batch_size=args.batch_size,
    ),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--model", required=True, help="a Hugging Face folder")
  add("--data", required=True, help="a behaviour set, jsonl")
  add("--baseline", help="the folder of the model before")
  add("--max_new_tokens", type=int, default=80, help="per reply")
  add("--batch_size", type=int, default=64, help="prompts at once")
  add("--template_kwargs", type=json.loads, default={}, help="as in training")
  add("--dtype", default="float32", help="float32 or bfloat16")
  add("--out", help="write every reply here, jsonl")
  args = parser.parse_args()
  items = behaviours.load(args.data)
  before = scores(args.baseline, items, args) if args.baseline else None
  after = scores(args.model, items, args)
  if before:
    head, *rows = behaviours.table(behaviours.compare(before, after))
  else:
    head = ("behaviour", "n", "passed", "95 % interval", "stops")
    rows = []
    for group, s in after.groups.items():
      interval = "{:.0%} to {:.0%}".format(*s.interval)
      rows.append((group, s.n, f"{s.rate:.0%}", interval, s.stopped))
  terminal.table(terminal.console(), args.model, head, rows)
  if args.out:
    with open(args.out, "w", encoding="utf-8") as file:
      file.writelines(json.dumps(row) + "\n" for row in after.replies)


if __name__ == "__main__":
  command.run(main)
