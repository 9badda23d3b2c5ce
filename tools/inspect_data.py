"""Shows what a config trains on: the ledger, and examples token by token.

    python tools/inspect_data.py --config=configs/base.py --samples=3

Prompt tokens are dim, trained ones green, special ones bold. The data is built
as training builds it, with the same cache, checks and errors.
"""

import json
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.text import Text

import command
from sft_jax import setup, terminal
from sft_jax.data import tokenizers

CONFIG = config_flags.DEFINE_config_file("config", None, "What to train.")
SAMPLES = flags.DEFINE_integer("samples", 3, "Examples to show.")
SEED = flags.DEFINE_integer("seed", 0, "Which examples.")
JSON = flags.DEFINE_bool("json", False, "Print JSON for other programs.")
flags.mark_flag_as_required("config")


def coloured(example: Any, tokenizer: tokenizers.Tokenizer) -> Text:
  """The text of an example, styled by what becomes of each token."""
  ids = example.tokens.tolist()
  special = set(tokenizer.special_tokens.values())
  styles = [
    ("green" if weight > 0 else "dim") + (" bold" if token in special else "")
    for token, weight in zip(ids, example.loss_weights, strict=True)
  ]
  text, shown = Text(), ""
  for end, style in enumerate(styles, 1):
    if end == len(styles) or styles[end] != style:
      # A token may be part of a character, or lose its space when it stands
      # alone, so what a run adds to all before it is shown.
      whole = tokenizer.decode(ids[:end], skip_special=False)
      text.append(whole[len(shown) :], style=style)
      shown = whole
  return text


def main() -> None:
  out, quiet, config = terminal.console(), JSON.value, CONFIG.value
  tokenizer = tokenizers.load_tokenizer(config.model.path)
  say = lambda line: None if quiet else out.print(Text(line))
  stream = setup.load_data(config, tokenizer, say).stream
  store = stream.store
  number = min(SAMPLES.value, len(store.lengths))
  rng = np.random.default_rng(SEED.value)
  chosen = sorted(rng.permutation(len(store.lengths))[:number].tolist())
  if quiet:
    samples = [
      {
        "place": store.place(i),
        "tokens": store.example(i).tokens.tolist(),
        "loss_weights": store.example(i).loss_weights.tolist(),
      }
      for i in chosen
    ]
    print(json.dumps({"ledger": stream.ledger.to_json(), "samples": samples}))
    return
  terminal.lines(out, "Data", stream.ledger.lines())
  for i in chosen:
    example = store.example(i)
    trained = int((example.loss_weights > 0).sum())
    title = (
      f"\n{store.place(i)}: {len(example.tokens)} tokens, {trained} trained"
    )
    out.print(Text(title, style="underline"))
    out.print(coloured(example, tokenizer))


if __name__ == "__main__":
  command.run_with_flags(main)
