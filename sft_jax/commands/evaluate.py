"""Scores a model on behavior sets, against another model if one is given.

    sft-jax evaluate --model=runs/demo/export \\
        --data=sft_jax/demo/behaviors.jsonl --baseline=BASE_FOLDER

A model is a Hugging Face folder, the workdir of a run, or one of its
checkpoints (runs/demo/checkpoints/200). With --baseline also how far the model
is from it: KL(baseline || model) on the model's replies and on the rows of
--text, from the logits of both, which are then both in memory.
"""

import argparse
import functools
from pathlib import Path

import numpy as np

from sft_jax.commands import command
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation
from sft_jax.data.encoding import encode
from sft_jax.data.formats import formats
from sft_jax.data.readers import files
from sft_jax.evals import behaviors, forgetting
from sft_jax.inference import generate as replies
from sft_jax.reporting import terminal
from sft_jax.training.build import load_run


def scores(
  asked: load_run.Asked,
  items: list[behaviors.Item],
  args: argparse.Namespace,
) -> tuple[behaviors.Scores, list[encode.Example]]:
  """Greedy replies of a model, checked; and as rows, the replies trained on."""
  options = command.render_options(args, asked.options)
  replied = list[replies.Reply]()

  def generate(prompts: list[Conversation]) -> list[replies.Reply]:
    replied[:] = replies.generate(
      *asked[:3],
      prompts,
      max_new_tokens=args.max_new_tokens,
      stop_strings=args.stop or (),
      options=options,
      batch_size=args.batch_size,
      int8_cache=args.int8_cache,
    )
    return replied

  found = behaviors.run(items, generate)
  rows = []
  for item, reply in zip(items, replied, strict=True):
    prompt = encode.prompt_ids(item.prompt, asked.tokenizer, options)
    tokens = np.array(prompt + list(reply.tokens), np.int32)
    weights = np.arange(len(tokens)) >= len(prompt)
    roles = np.zeros(len(tokens), np.uint8)
    rows.append(encode.Example(tokens, weights.astype(np.float32), roles))
  return found, rows


def texts(
  path: str, asked: load_run.Asked, options: RenderOptions, max_length: int
) -> list[encode.Example]:
  """The rows of a file, raw text or conversations, as training has them."""
  return [
    example
    for where, row in files.read_rows(path)
    for example in encode.encode_row(
      formats.to_conversation(row, source=where),
      asked.tokenizer,
      options,
      max_length=max_length,
    ).examples
  ]


def show_text(
  what: str,
  examples: list[encode.Example],
  asked: load_run.Asked,
  baseline: load_run.Asked | None,
  args: argparse.Namespace,
) -> None:
  """Prints how a model predicts a text, and how far it is from a baseline."""
  out = terminal.console()
  if baseline and (
    baseline.tokenizer.fingerprint != asked.tokenizer.fingerprint
  ):
    out.print(f"{what}: no KL, as the tokenizers differ.")
    baseline = None
  base = baseline and (baseline.model, baseline.params)
  found = forgetting.compare_models(
    asked.model, asked.params, base, examples, batch_size=args.text_batch
  )
  nats = forgetting.perplexity(found.nats, found.weight)
  line = f"{what}: perplexity {nats.value:.3f} over {nats.tokens:,.0f} tokens"
  if found.base is not None:
    left = forgetting.base_agreement(found.base, found.weight)
    line += (
      f"; KL(baseline || model) {left['kl']:.4f} nats per token; the most "
      f"likely token is the baseline's in {left['top1_agreement']:.1%}"
    )
    if "both_correct" in left:
      line += f"; of what it had right {left['both_correct']:.1%} still is"
  out.print(f"{line}.")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--model", required=True, help="a model's folder, a run, a checkpoint")
  add("--data", required=True, nargs="+", help="behavior sets: path or glob")
  add("--baseline", help="the model before")
  add("--text", nargs="+", help="rows to predict: raw text, conversations")
  add("--text_batch", type=int, default=8, help="of these, rows at once")
  add("--max_length", type=int, default=1024, help="tokens of these rows")
  add("--batch_size", type=int, default=64, help="prompts at once")
  add("--int8_cache", action="store_true", help="keys and values in 8 bits")
  command.add_reply_options(parser, max_new_tokens=80)
  add("--out", help="write every reply here, jsonl; the baseline's beside it")
  args = parser.parse_args()
  items = [item for one in args.data for item in behaviors.load_sets(one)]
  load = functools.partial(load_run.load, dtype=args.dtype)
  baseline = load(args.baseline) if args.baseline else None
  before = scores(baseline, items, args)[0] if baseline else None
  asked = load(args.model)
  after, replied = scores(asked, items, args)
  head, *rows = behaviors.summary_table(after, before)
  terminal.print_table(terminal.console(), args.model, head, rows)
  if figures := behaviors.ifeval_accuracy(after):
    shares = ", ".join(f"{name} {x:.1%}" for name, x in figures.items())
    terminal.console().print(f"IFEval: {shares}")
  if baseline and any(one.loss_weights.any() for one in replied):
    show_text("its replies", replied, asked, baseline, args)
  options = command.render_options(args, asked.options)
  for path in args.text or ():
    rows = texts(path, asked, options, args.max_length)
    show_text(path, rows, asked, baseline, args)
  if args.out:
    out = Path(args.out)
    after.write(out)
    if before:
      before.write(out.with_suffix(f".baseline{out.suffix}"))
