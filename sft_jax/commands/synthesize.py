"""Lets a teacher write answers, and keeps those that pass their checks.

    sft-jax synthesize --teacher=runs/demo/export \\
        --prompts=prompts.jsonl --out=synthetic.jsonl --samples=8 \\
        --against=sft_jax/demo/behaviors.jsonl

A teacher is a Hugging Face folder, the workdir of a run, or one of its
checkpoints. Prompts are behavior sets (messages, checks, group): a reply is
kept when it stopped by itself and all checks of its row pass. Prompts that the
sets of --against ask too are refused. Rows are of the format `messages`, with
their provenance under `synthetic`; what was kept and refused, by group and
check, is printed and written to OUT.ledger.json. See docs/selection.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sft_jax.commands import command
from sft_jax.common import workdir
from sft_jax.data.conversation import Conversation, NothingToTrain
from sft_jax.data.encoding import encode
from sft_jax.evals import behaviors, synthesis
from sft_jax.inference import generate
from sft_jax.reporting import terminal
from sft_jax.training.build import load_run


def make(args: argparse.Namespace) -> synthesis.Synthesis:
  out = terminal.console()
  log = out.print
  items, against = (
    [one for path in paths for one in behaviors.load_sets(path)]
    for paths in (args.prompts, args.against)
  )
  if not against:
    log("--against: no evaluation set is named, so none was compared with.")
  asked = load_run.load(args.teacher, dtype=args.dtype, log=log)
  options = command.render_options(args, asked.options)

  def sample(
    prompts: list[Conversation], seeds: list[int]
  ) -> list[generate.Reply]:
    return generate.generate(
      *asked[:3],
      prompts,
      max_new_tokens=args.max_new_tokens,
      temperature=args.temperature,
      top_p=args.top_p,
      seeds=seeds,
      stop_strings=args.stop or (),
      options=options,
      batch_size=args.batch_size,
    )

  def usable(conversation: Conversation) -> None:
    try:
      encode.encode_row(
        conversation, asked.tokenizer, options, max_length=1 << 30
      )
    except NothingToTrain as nothing:  # Never of a turn that says something.
      raise AssertionError(nothing) from nothing

  return synthesis.synthesize(
    items,
    sample,
    teacher=args.teacher,
    attempts=args.samples,
    keep=args.keep,
    seed=args.seed,
    against=against,
    usable=usable,
    log=log,
  )


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--teacher", required=True, help="a model's folder, a run, a checkpoint")
  add("--prompts", required=True, nargs="+", help="behavior sets: path, glob")
  add("--against", nargs="*", default=[], help="evaluation sets: path, glob")
  add("--out", required=True, type=Path, help="rows, jsonl")
  add("--samples", type=int, default=4, help="most replies to a prompt")
  add("--keep", choices=synthesis.KEEP, default="first", help="which of them")
  add("--temperature", type=float, default=0.7, help="0: likeliest token")
  add("--top_p", type=float, default=1.0, help="1: off")
  add("--seed", type=int, default=0, help="with prompt and attempt")
  add("--batch_size", type=int, default=64, help="prompts at once")
  command.add_reply_options(parser, max_new_tokens=80)
  args = parser.parse_args(argv)
  made = make(args)
  synthesis.check_sums(made)
  rows = "".join(
    json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows
  )
  workdir.write_text(args.out, rows)
  ledger = args.out.with_name(args.out.name + ".ledger.json")
  workdir.write_text(ledger, json.dumps(made.to_json(), indent=2) + "\n")
  head, *body = synthesis.lines(made)
  out = terminal.console()
  terminal.print_table(
    out, f"{len(made.rows):,} rows in {args.out}", head, body
  )
