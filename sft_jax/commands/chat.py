"""Talks with a model in the terminal; replies appear as they are made.

    sft-jax chat --model=runs/demo/export [--compare=BASE_FOLDER]

A model is a Hugging Face folder, the workdir of a run, or one of its
checkpoints. With --compare both answer every turn side by side, each
after its own replies. `/new` starts over, an empty line or Ctrl-D ends.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sft_jax.commands import command
from sft_jax.data.conversation import Conversation, Message
from sft_jax.inference import generate
from sft_jax.reporting import terminal
from sft_jax.training.build import load_run


class Talk:
  """One model's side of the conversation."""

  def __init__(self, path: str, args: argparse.Namespace) -> None:
    self._asked = load_run.load(path, dtype=args.dtype)
    self._args = args
    self.again()

  def again(self) -> None:
    """Forgets all but the system turn."""
    system = self._args.system
    self._turns = (Message("system", system),) if system else ()

  def answer(self, typed: str, seed: int) -> Iterator[Text]:
    """The reply to one more user turn, as far as it is, again and again.

    The last form tells calls of tools and a cut apart; both turns are then
    remembered.

    Raises ValueError: what was said cannot be asked; nothing is remembered.
    """
    args, asked = self._args, self._asked
    turns = (*self._turns, Message("user", typed))
    pieces = generate.stream(
      *asked[:3], [Conversation(messages=turns)],
      max_new_tokens=args.max_new_tokens, temperature=args.temperature,
      top_p=args.top_p, min_p=args.min_p, seed=seed,
      stop_strings=args.stop or (),
      options=command.render_options(args, asked.options), every=args.every,
    )  # fmt: skip
    for piece in pieces:
      shown = Text(terminal.visible(piece.text))
      if piece.reply is None:
        yield shown
        continue
      for call in piece.reply.message.tool_calls:
        line = f"\n{call.name}({json.dumps(call.arguments)})"
        shown.append(terminal.visible(line), style="cyan")
      if not piece.reply.stopped:
        shown.append("\n(cut off at --max_new_tokens)", style="yellow")
      self._turns = (*turns, piece.reply.message)
      yield shown


def one_by_one(
  out: Console, talks: Mapping[str, Talk], typed: str, seed: int
) -> None:
  """Prints each model's reply as its text comes."""
  for path, talk in talks.items():
    if len(talks) > 1:
      out.print(f"{path}:", style="bold")
    shown = 0
    for text in talk.answer(typed, seed):
      out.print(text[shown:], end="", soft_wrap=True)
      shown = len(text)
    out.print()


def side_by_side(
  out: Console, talks: Mapping[str, Talk], typed: str, seed: int
) -> None:
  """Both replies grow in columns of their own, a piece of each in turn."""
  texts = dict.fromkeys(talks, Text())
  growing = {path: talk.answer(typed, seed) for path, talk in talks.items()}
  with Live(console=out, vertical_overflow="visible") as live:
    while growing:
      for path, pieces in list(growing.items()):
        text = next(pieces, None)
        if text is None:
          del growing[path]
        else:
          texts[path] = text
      table = Table(expand=True, width=out.width)
      for path in texts:
        table.add_column(path, ratio=1, overflow="fold")
      table.add_row(*texts.values())
      live.update(table)


def parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--model", required=True, help="a model's folder, a run, a checkpoint")
  add("--compare", help="another model, which answers too")
  add("--system", help="the system turn")
  add("--temperature", type=float, default=0.0, help="0: likeliest token")
  add("--top_p", type=float, default=1.0, help="1: off")
  add("--min_p", type=float, default=0.0, help="0: off")
  add("--every", type=int, default=4, help="tokens shown at a time")
  command.add_reply_options(parser, max_new_tokens=256)
  return parser


def main() -> None:
  args = parser().parse_args()
  out = terminal.console()
  paths = [args.model, *([args.compare] if args.compare else [])]
  talks = {path: Talk(path, args) for path in paths}
  while True:
    try:
      typed = input("> ").strip()
    except EOFError:
      typed = ""
    if not typed:
      return
    if typed == "/new":
      for talk in talks.values():
        talk.again()
      continue
    seed = time.time_ns() % 2**31
    columns = args.compare and out.is_terminal
    show = side_by_side if columns else one_by_one
    try:
      show(out, talks, typed, seed)
    except ValueError as error:  # A control token typed in, say: ask again.
      out.print(f"error: {error}", style="red")
