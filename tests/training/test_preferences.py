"""A run on pairs: the same trainer, with another objective."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sft_jax
import tiny
from sft_jax.commands import score
from sft_jax.common import sharding, trees
from sft_jax.data.conversation import NothingToTrain
from sft_jax.data.encoding import encode
from sft_jax.data.formats import formats
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.step import preferences
from sft_jax.training.build import data
from sft_jax.training.build import model as setup_model
from sft_jax.training.build import state as build_state
from sft_jax.training.build import step as build_step
from sft_jax.training.config_check import check

PAIRS = [
  {
    "prompt": f"What goes with {word}?",
    "chosen": f"The {word}.",
    "rejected": f"Well, I think perhaps the {word}.",
  }
  for word in tiny.WORDS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.model_folder(tmp_path_factory.mktemp("pairs") / "model")


def config(tmp_path, folder, **changes):
  rows = tiny.rows_file(tmp_path / "pairs.jsonl", PAIRS)
  settings = {
    "steps": 12, "batch_size": 4, "accum_steps": 2, "preference__loss": "dpo",
    "data__seq_len": 128, "data__holdout": 0.2, "checkpoint__every": 0,
    "optim__learning_rate": 3e-3, "mesh__data": 2, "mesh__tensor": 2,
    "mesh__context": 2,
  }  # fmt: skip
  return tiny.config(tmp_path, folder, rows, **(settings | changes))


def test_pairs_are_learnt_and_measured_before_and_after(tmp_path, folder):
  """With adapters: the reference is the base below them, held once."""
  made = config(tmp_path, folder, lora__rank=4, selfcheck="on")
  records = []
  sft_jax.train(made, on_record=records.append)
  first, last = records[0], records[-1]
  assert first["loss/preference"] == pytest.approx(np.log(2), abs=1e-4)
  assert last["loss/preference"] < 0.6
  assert last["loss/reward_accuracy"] == 1
  margin = last["loss/reward_chosen"] - last["loss/reward_rejected"]
  assert last["loss/reward_margin"] == pytest.approx(margin, abs=1e-5)
  before, after = (
    json.loads((tmp_path / "run" / "evals" / f"{x}.json").read_text())
    for x in ("before", "after")
  )
  assert before["held_out/reward_margin"] == pytest.approx(0, abs=1e-4)
  assert after["held_out/reward_margin"] > 0.1
  assert after["held_out/reward_accuracy"] == 1


def test_a_kept_reference_is_the_base(tmp_path, folder):
  """Full fine-tuning without a copy: the same bits, held-out rows too."""
  made = config(
    *(tmp_path, folder), preference__reference="kept", data__seq_len=512,
    batch_size=8, accum_steps=1, mesh__data=8, mesh__tensor=1, mesh__context=1,
  )  # fmt: skip
  tokenizer = load_tokenizer(folder)
  load = lambda: data.load_stores(made, tokenizer, lambda line: None)
  with pytest.raises(ValueError, match="Run sft-jax teach"):
    load()
  score.keep_reference(made, lambda line: None)
  stores = load()
  mesh = sharding.make_mesh(**made.mesh)
  model, params = setup_model.load_model(made, mesh, lambda line: None)
  streams = [
    data.make_stream(made, store, epochs=1)
    for store in (stores.train, stores.held_out)
  ]
  build_state.check_reference(made, params, *streams)
  online = made.copy_and_resolve_references()
  online.preference.reference = "base"
  moved = {**jax.tree.map(lambda x: 1.2 * x, params), "base": params}
  steps = [
    build_step.make_step(one, model, mesh, 12, streams)
    for one in (made, online)
  ]
  for stream in streams:
    batch = jax.tree.map(jnp.asarray, next(stream.batches()))
    most = made.data.seq_len // min(int(x.store.lengths.min()) for x in streams)
    kept = preferences.of_documents(batch.teacher_logps[..., 0], batch, most)
    asked = jax.jit(steps[1].base_logps)(moved, batch)
    np.testing.assert_array_equal(kept, asked)
    assert (np.asarray(kept) < -1).sum() > 4
  sums = [jax.jit(step.loss_fn)(moved, batch) for step in steps]
  for name in ("reward_chosen", "reward_rejected", "preference"):
    one, other = (float(x.named[name]) for x in sums)
    assert one == pytest.approx(other, rel=1e-6)
  # Sums that wait for each other on such devices.
  divided = sharding.make_mesh(2, 1, 2, 2)
  with pytest.raises(ValueError, match="such a step hangs"):
    build_step.make_step(made, model, divided, 12, streams)
  # Of another model, of another row.
  model_of = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-3), params)
  with pytest.raises(ValueError, match="of another model or precision"):
    build_state.check_reference(made, model_of, *streams)
  tiny.rows_file(
    tmp_path / "pairs.jsonl", [{**PAIRS[0], "chosen": "A"}, *PAIRS[1:]]
  )
  with pytest.raises(ValueError, match="Run sft-jax teach"):
    load()


@pytest.mark.slow
def test_a_run_learns_from_a_kept_reference(tmp_path, folder):
  made = config(
    *(tmp_path, folder), lora__rank=4, preference__reference="kept",
    data__seq_len=512, batch_size=8, accum_steps=1, mesh__data=2,
    mesh__fsdp=4, mesh__tensor=1, mesh__context=1,
  )  # fmt: skip
  score.keep_reference(made, lambda line: None)
  records = []
  sft_jax.train(made, on_record=records.append)
  assert records[0]["loss/preference"] == pytest.approx(np.log(2), abs=1e-4)
  assert records[-1]["loss/preference"] < 0.6
  assert records[-1]["loss/reward_accuracy"] == 1


def test_all_of_a_model_that_trains_is_held_as_its_reference(tmp_path, folder):
  made = config(tmp_path, folder)
  params = {"embed": {"embedding": np.zeros((3, 2))}}
  fake = type("Step", (), {"trained": staticmethod(lambda path: True)})
  held = build_state.hold_base(made, fake, params, lambda x: x)
  assert "base/embed/embedding" in trees.flatten(held)
  made.preference.loss = "simpo"
  assert build_state.hold_base(made, fake, params, lambda x: x) is params


def test_a_row_is_both_its_sides(folder):
  """Each as it would be encoded by itself; the prompt is not trained."""
  tokenizer = load_tokenizer(folder)
  options = data.make_render_options(config(folder.parent, folder))
  row = formats.to_conversation(PAIRS[0])
  (found,) = encode.encode_rows([row], tokenizer, options, max_length=128)
  (one,) = found.examples
  at = 0
  for answer in (PAIRS[0]["chosen"], PAIRS[0]["rejected"]):
    plain = formats.to_conversation(
      {"prompt": PAIRS[0]["prompt"], "completion": answer}
    )
    (want,) = encode.encode(plain, tokenizer, max_length=128)
    end = at + len(want.tokens)
    for name in ("tokens", "loss_weights", "roles"):
      np.testing.assert_array_equal(
        getattr(one, name)[at:end], getattr(want, name)
      )
    at = end
  assert one.rejected == len(want.tokens)
  assert at == len(one.tokens)
  plain = {k: v for k, v in PAIRS[0].items() if k != "rejected"}
  rows = [
    formats.to_conversation(x)
    for x in (plain, {"prompt": "Hi", "completion": "No", "kto_tag": False})
  ]
  refused = list(encode.encode_rows(rows, tokenizer, options, max_length=128))
  assert [x.reason for x in refused] == ["no rejected answer"] * 2
  with pytest.raises(NothingToTrain, match="kto_tag false"):
    encode.encode(rows[1], tokenizer, max_length=128)
  made = config(folder.parent, folder, preference__loss="kto")
  options = data.make_render_options(made)
  good, bad = encode.encode_rows(rows, tokenizer, options, max_length=128)
  assert good.examples[0].rejected == 0
  assert bad.examples[0].rejected == len(bad.examples[0].tokens)
  short = encode.encode_rows([row], tokenizer, options, max_length=at - 1)
  assert next(iter(short)).dropped == {"over long": 1}


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("loss__normalize", "example"),
    ("data__over_long", "truncate"),
    ("data__canaries", 4),
    ("lora__path", "adapter"),
  ],
)
def test_what_pairs_cannot_do_is_refused(tmp_path, folder, key, value):
  with pytest.raises(ValueError, match=key.replace("__", r"\.")):
    check(config(tmp_path, folder, **{key: value}))
