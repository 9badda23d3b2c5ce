"""The export, seen by transformers: same logits, same prompts, same replies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sft_jax
import tiny
from sft_jax.data import encode

torch = pytest.importorskip("torch", reason="live oracle: needs torch")
transformers = pytest.importorskip(
  "transformers", reason="live oracle: needs transformers"
)

# Libraries of others, importing others in turn.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("rank", [0, 4])
def test_transformers_goes_on_with_the_chat(tmp_path, rank):
  model_folder = tiny.model_folder(tmp_path / "model")
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  config = tiny.config(
    tmp_path,
    model_folder,
    rows,
    steps=20,
    checkpoint__every=0,
    lora__rank=rank,
    optim__learning_rate=5e-3,
  )
  sft_jax.train(config)
  folder = tmp_path / "run" / "export"
  model, params = sft_jax.load_pretrained(folder)
  tokenizer = sft_jax.load_tokenizer(folder)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

  turns = [
    {"role": "user", "content": "What goes with cat?"},
    {"role": "assistant", "content": "The pet cat."},
    {"role": "user", "content": "What goes with hat?"},
  ]
  prompt = sft_jax.Conversation(
    tuple(sft_jax.Message(t["role"], t["content"]) for t in turns)
  )
  ids = encode.prompt_ids(prompt, tokenizer)
  assert (
    their_tokenizer.apply_chat_template(
      turns, add_generation_prompt=True, return_dict=False
    )
    == ids
  )

  tokens = np.asarray([ids], np.int32)
  logits = jax.jit(lambda p, t: model.logits(p, model.hidden(p, t)))(
    params, jnp.asarray(tokens)
  )
  with torch.no_grad():
    want = theirs(torch.asarray(tokens, dtype=torch.long)).logits.numpy()
  np.testing.assert_allclose(logits, want, atol=1e-4)

  (reply,) = sft_jax.generate(
    model, params, tokenizer, [prompt], max_new_tokens=16
  )
  with torch.no_grad():
    output = theirs.generate(
      torch.asarray([ids]), max_new_tokens=16, do_sample=False
    )[0, len(ids) :].tolist()
  stops = set(tokenizer.stop_ids)
  assert set(theirs.generation_config.eos_token_id) == stops
  assert [t for t in output if t not in stops] == reply.tokens
