"""Replies to rows that were held out, beside what the rows themselves say.

For a run without a behaviour set: nothing is checked, but seen.
"""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from sft_jax.common.trees import Tree
from sft_jax.data.store.store import Store
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.inference import sampler


def answer(
  model: Any,
  params: Tree,
  tokenizer: Tokenizer,
  store: Store,
  *,
  number: int,
  max_new_tokens: int,
  mesh: Mesh | None = None,
) -> list[dict[str, Any]]:
  """Greedy replies to the first prompts of a store.

  A prompt is what stands before the first trained token, which is what
  inference would see there; raw text has none and is passed over, and so is
  what leaves the model no position to answer in.

  Args:
    model, params, tokenizer: as `replies.stream` takes them.
    store: the rows.
    number: how many to answer, at most.
    max_new_tokens: most tokens of a reply.
    mesh: see `sampler.stream`.

  Returns:
    {'where', 'prompt', 'row', 'reply', 'stopped'} of each: the text of the
    prompt, of the row's own reply and of the model's, special tokens shown.
  """
  decode = lambda ids: tokenizer.decode(list(ids), skip_special=False)
  limit = model.config.position_limit
  prompts, found = [], []
  for i in range(len(store.index)):
    if len(found) == number:
      break
    example = store.example(i)
    weights = example.loss_weights
    first = int(np.argmax(weights > 0))
    if first <= 1 or (limit and first + max_new_tokens > limit):
      continue
    after = np.flatnonzero(weights[first:] == 0)
    end = first + int(after[0]) if len(after) else len(weights)
    tokens = example.tokens.tolist()
    prompts.append(tokens[:first])
    found.append(
      {
        "where": store.place(i),
        "prompt": decode(tokens[:first]),
        "row": decode(tokens[first:end]),
      }
    )
  if not prompts:
    return []
  made = sampler.generate(
    model.decode,
    model.logits,
    model.init_cache,
    params,
    prompts,
    stop_ids=tokenizer.stop_ids,
    max_new_tokens=max_new_tokens,
    vocab_size=tokenizer.vocab_size,
    position_limit=limit,
    mesh=mesh,
  )
  return [
    {**row, "reply": decode(reply.tokens), "stopped": reply.stopped}
    for row, reply in zip(found, made, strict=True)
  ]
