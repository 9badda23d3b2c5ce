"""OASST trees to conversations: jsonl of messages that data.format reads.

    python tools/convert_oasst.py trees.jsonl.gz out.jsonl --lang=en

A tree branches where several people answered. Each of its threads becomes a
conversation, and each reply is trained once: in the first thread that holds
it; in later ones it has the weight 0. With --replies=best only the best ranked
reply to each message is followed. Messages that were deleted or refused by
reviewers are left out with all that follows them.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from sft_jax.commands import command
from sft_jax.data.conversation import RowError
from sft_jax.data.readers import files

ROLES = {"prompter": "user", "assistant": "assistant"}


def convert(tree: dict[str, Any], *, best: bool = False) -> list[dict]:
  """The conversations of one tree, as rows of messages.

  >>> tree = {"message_tree_id": "t", "prompt": {
  ...   "message_id": "a", "role": "prompter", "text": "Hi", "replies": [
  ...     {"message_id": "b", "role": "assistant", "text": "Ho", "replies": []}
  ... ]}}
  >>> convert(tree)[0]["messages"][1]
  {'role': 'assistant', 'content': 'Ho'}

  Raises:
    KeyError: it is no tree.
  """
  made, trained = [], set()
  for thread in _threads(tree["prompt"], [], best):
    messages: list[dict[str, Any]] = []
    for one in thread:
      message = {"role": ROLES[one["role"]], "content": one["text"]}
      if one["role"] == "assistant" and one["message_id"] in trained:
        message["weight"] = 0
      messages.append(message)
    trained |= {one["message_id"] for one in thread}
    made.append({"id": tree["message_tree_id"], "messages": messages})
  return made


def _threads(
  message: dict[str, Any], before: list[dict[str, Any]], best: bool
) -> Iterator[list[dict[str, Any]]]:
  """Messages from the root to each reply that has no further one below it."""
  thread = [*before, message]
  replies = [one for one in message["replies"] if _is_kept(one)]
  if best and message["role"] == "prompter":
    # Ranks count from 0, the best; a lone reply may have none.
    replies = sorted(
      replies, key=lambda one: (one.get("rank") is None, one.get("rank") or 0)
    )[:1]
  found = [below for one in replies for below in _threads(one, thread, best)]
  if found:
    yield from found
  elif message["role"] == "assistant":
    yield thread


def _is_kept(message: dict[str, Any]) -> bool:
  return (
    not message.get("deleted") and message.get("review_result") is not False
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("trees", help="jsonl of trees, also .gz; a glob")
  add("out", help="jsonl to write")
  add("--replies", choices=("all", "best"), default="all")
  add("--lang", help="keep trees in this language, such as en")
  args = parser.parse_args()
  trees = conversations = other = 0
  with open(args.out, "w", encoding="utf-8") as out:
    for where, tree in files.read_rows(args.trees):
      try:
        if args.lang and tree["prompt"]["lang"] != args.lang:
          other += 1
          continue
        made = convert(tree, best=args.replies == "best")
      except (KeyError, TypeError) as error:
        raise RowError(
          where,
          f"no tree: {error!r}",
          "message_tree_id and prompt, whose replies nest",
          "Give the file of trees, not that of messages.",
        ) from error
      trees += 1
      conversations += len(made)
      for row in made:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
  print(
    f"{trees:,} trees: {conversations:,} conversations in {args.out}; "
    f"{other:,} trees in other languages left out"
  )


if __name__ == "__main__":
  command.run(main)
