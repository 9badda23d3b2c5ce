"""A genuine model, fine-tuned on genuine rows, as transformers sees it.

transformers tokenizes the held-out rows, renders them and computes their
losses, of the base model and of the export: nothing of ours takes part but the
folder. Needs the shared material, torch and transformers.
"""

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import sft_jax
from configs import base
from sft_jax.data.readers.files import read_rows

SHARED = Path(__file__).parents[3] / "shared" / "data"
MODEL = SHARED / "pretrained" / "stories260k_hf"
ALPACA = SHARED / "instruction" / "alpaca_5000.json"
TRAIN, HELD_OUT = 160, 40

pytestmark = [
  pytest.mark.skipif(
    not (MODEL.is_dir() and ALPACA.exists()),
    reason="the shared material is not here",
  ),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def split_tokens(tokenizer, row):
  """What transformers makes of a row: (its prompt, the whole of it), ids."""
  asked, replied = sft_jax.to_conversation(row).messages
  turns = [
    {"role": "user", "content": asked.content},
    {"role": "assistant", "content": replied.content},
  ]
  render = functools.partial(tokenizer.apply_chat_template, return_dict=False)
  return render(turns[:1], add_generation_prompt=True), render(turns)


def select(tokenizer, rows):
  """Short rows with a reply, which no token joins to its prompt: those are
  tokenized in two parts, on which transformers has no opinion."""
  for row in rows:
    if row["output"] and len(str(row)) < 350:
      prompt, whole = split_tokens(tokenizer, row)
      if whole[: len(prompt)] == prompt:
        assert whole[-1] == tokenizer.eos_token_id
        yield row


def row_nats(torch, transformers, folder, rows):
  """Of each row's reply and its stop token: [nats, tokens]."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  found = []
  for row in rows:
    prompt, whole = split_tokens(tokenizer, row)
    tokens, start = torch.tensor(whole), len(prompt)
    with torch.no_grad():
      logits = model(tokens[None]).logits[0, start - 1 : -1].double()
    nats = torch.nn.functional.cross_entropy(
      logits, tokens[start:], reduction="sum"
    )
    found.append((float(nats), len(whole) - start))
  return np.array(found).T


@pytest.mark.slow
def test_the_export_of_a_fine_tuned_model_has_its_losses(tmp_path):
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  transformers = pytest.importorskip("transformers", reason="live oracle")
  tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
  rows = select(tokenizer, (row for _, row in read_rows(ALPACA)))
  rows = list(itertools.islice(rows, TRAIN + HELD_OUT))
  for name, part in (("train", rows[:TRAIN]), ("held_out", rows[TRAIN:])):
    (tmp_path / f"{name}.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in part)
    )
  config = base.get_config()
  config.workdir = str(tmp_path / "run")
  config.model.path = str(MODEL)
  config.data.train = str(tmp_path / "train.jsonl")
  config.data.eval = str(tmp_path / "held_out.jsonl")
  config.data.seq_len, config.data.workers = 256, 1
  config.epochs, config.batch_size = 2, 8
  config.optim.warmup_steps = 2
  config.eval.behaviors = config.eval.general_text = ""
  run = sft_jax.train(config)

  # What the run says of the rows that it held out is what they say.
  (said,) = (
    x for x in run.metrics["losses"] if x["name"] == "held_out/nats_per_token"
  )
  means = {}
  for when, folder in (("before", MODEL), ("after", run.workdir / "export")):
    nats, tokens = row_nats(torch, transformers, folder, rows[TRAIN:])
    np.testing.assert_allclose(said[when], nats.sum() / tokens.sum(), rtol=1e-5)
    means[when] = nats / tokens
  # The fall is no accident of 40 rows: five standard errors of its mean over
  # them (Student's t, p < 1e-5), and nine rows of ten fall.
  fall = means["before"] - means["after"]
  error = fall.std(ddof=1) / np.sqrt(HELD_OUT)
  assert fall.mean() > 5 * error
  assert (fall > 0).mean() > 0.9
