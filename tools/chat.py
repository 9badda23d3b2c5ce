"""Talks with an exported model in the terminal.

    python tools/chat.py --model=runs/demo/export

`/new` starts over, an empty line or Ctrl-D ends.
"""

import argparse
import json
import time

from rich.text import Text

import command
from sft_jax import terminal
from sft_jax.data import tokenizers
from sft_jax.data.conversation import Conversation, Message
from sft_jax.evals import replies
from sft_jax.models import hf


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--model", required=True, help="a Hugging Face folder")
  add("--system", help="the system turn")
  add("--temperature", type=float, default=0.0, help="0: likeliest token")
  add("--top_p", type=float, default=1.0, help="1: off")
  add("--max_new_tokens", type=int, default=256, help="per reply")
  add("--template_kwargs", type=json.loads, default={}, help="as in training")
  add("--dtype", default="float32", help="float32 or bfloat16")
  args = parser.parse_args()
  out = terminal.console()
  model, params = hf.load_pretrained(
    args.model, dtype=args.dtype, param_dtype=args.dtype
  )
  tokenizer = tokenizers.load_tokenizer(args.model)
  opening = (Message("system", args.system),) if args.system else ()
  turns = opening
  while True:
    try:
      said = input("> ").strip()
    except EOFError:
      said = ""
    if not said:
      return
    if said == "/new":
      turns = opening
      continue
    asked = (*turns, Message("user", said))
    try:
      (reply,) = replies.generate(
        model, params, tokenizer, [Conversation(messages=asked)],
        max_new_tokens=args.max_new_tokens, temperature=args.temperature,
        top_p=args.top_p, seed=time.time_ns() % 2**31,
        template_kwargs=args.template_kwargs,
      )  # fmt: skip
    except ValueError as error:  # A control token typed in, say: ask again.
      out.print(Text(f"error: {error}", style="red"))
      continue
    if reply.message.reasoning:
      out.print(Text(reply.message.reasoning, style="dim"))
    out.print(Text(reply.text))
    for call in reply.message.tool_calls:
      out.print(
        Text(f"{call.name}({json.dumps(call.arguments)})", style="cyan")
      )
    if not reply.stopped:
      out.print(Text("(cut off at --max_new_tokens)", style="yellow"))
    turns = (*asked, reply.message)


if __name__ == "__main__":
  command.run(main)
