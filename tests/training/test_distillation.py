"""Runs that learn from a teacher: another model, itself shown the answer."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import sft_jax
import tiny
from sft_jax.commands import score
from sft_jax.common import trees
from sft_jax.data.chat.token_roles import TOKEN_ROLES
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.inference import on_policy
from sft_jax.models.hf import load_save
from sft_jax.training.build import build, load_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A student and a teacher: the same model with other weights."""
  at = tmp_path_factory.mktemp("two")
  student = tiny.model_folder(at / "student")
  model, params = load_save.load_pretrained(student)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  noisy = jax.tree.map(
    lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params
  )
  load_save.save_pretrained(
    at / "teacher", model, noisy, load_tokenizer(student)
  )
  return student, at / "teacher"


def config(tmp_path, folder, **changes):
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  settings = {"steps": 6, "checkpoint__every": 0, "data__seq_len": 128,
              "data__train_on": "last_turn"}  # fmt: skip
  return tiny.config(tmp_path, folder, rows, **(settings | changes))


def first_loss(made):
  """Sums of the first batch at the start, by the run's own step."""
  run = build.build_run(made, lambda line: None)
  params = trees.merge(run.state.params, run.state.frozen)
  batch = next(build.batches_on(run.mesh, run.stream))
  return run, batch, jax.jit(run.loss_fn)(params, batch)


def test_a_student_comes_near_its_teacher_and_a_kept_one_is_the_same(
  tmp_path, folders
):
  student, teacher = folders
  made = config(tmp_path, student, distill__teacher=str(teacher))
  _, _, online = first_loss(made)
  records = []
  sft_jax.train(made, on_record=records.append)
  assert records[0]["loss/kl"] == pytest.approx(
    float(online.base.kl / online.weight), rel=1e-4
  )
  assert records[-1]["loss/kl"] < 0.6 * records[0]["loss/kl"]
  # Its checkpoint can be asked without the teacher that it trained beside.
  asked = load_run.load(tmp_path / "run", log=lambda line: None)
  exported = load_save.load_pretrained(tmp_path / "run" / "export")[1]
  chex.assert_trees_all_equal(asked.params, exported)
  kept = config(tmp_path, student, distill__teacher="kept", distill__top=400)
  kept.workdir = str(tmp_path / "kept")
  with pytest.raises(ValueError, match="Run sft-jax teach"):
    build.build_run(kept, lambda line: None)
  lines = []
  score.keep_predictions(kept, str(teacher), lines.append)
  assert "bytes each" in lines[-1]
  asked, records = float(online.objective / online.weight), []
  sft_jax.train(kept, on_record=records.append)
  assert records[0]["loss/teacher_kl"] == pytest.approx(asked, rel=5e-3)
  assert records[-1]["loss/teacher_kl"] < 0.6 * asked


@pytest.mark.parametrize("teacher", ["self", "self_average"])
def test_a_model_shown_the_answer_teaches_itself_without_it(
  tmp_path, folders, teacher
):
  """The teacher's prediction is the base's, or an average's, that is shown."""
  averages = teacher == "self_average"
  ways = {"optim__ema": 0.9} if averages else {"lora__rank": 2}
  made = config(tmp_path, folders[0], distill__teacher=teacher, **ways)
  run = build.build_run(made, lambda line: None)
  params = trees.merge(run.state.params, run.state.frozen)
  batch = next(build.batches_on(run.mesh, run.stream))
  theirs = params
  if averages:
    theirs = jax.tree.map(lambda x: 1.1 * x, params)
    params = {**params, "teacher": theirs}
  sums = jax.jit(run.loss_fn)(params, batch)

  def log_probabilities(params):
    row = (batch.tokens, batch.positions, batch.segment_ids)
    hidden = run.model.hidden(params, *row)
    logits = hidden @ jnp.asarray(run.model.head(params)).T
    return np.float64(jax.nn.log_softmax(logits))

  log_p, log_q = log_probabilities(params), log_probabilities(theirs)
  segments, weights = (
    np.asarray(x) for x in (batch.segment_ids, batch.loss_weights)
  )
  kl = tokens = 0
  for row in range(len(segments)):
    for k in range(1, segments[row].max() // 2 + 1):
      own, shown = (
        np.flatnonzero((segments[row] == s) & (weights[row] != 0))
        for s in (2 * k - 1, 2 * k)
      )
      assert len(own) == len(shown) > 0
      q, p = log_q[row, shown], log_p[row, own]
      kl, tokens = kl + (np.exp(q) * (q - p)).sum(), tokens + len(own)
  assert float(sums.weight) == tokens
  assert kl / tokens > 1e-4
  assert float(sums.objective) == pytest.approx(kl, rel=1e-3)


class Broken(Exception):
  pass


def test_own_replies_are_learnt_from_and_resumed_within_a_round(
  tmp_path, folders
):
  """As GKD has it: the data's prompts, the student's replies."""
  student, teacher = folders
  made = config(
    *(tmp_path, student),
    distill__teacher=str(teacher),
    distill__every=4,
    checkpoint__every=2,
  )
  made.workdir = str(tmp_path / "whole")
  records = []
  sft_jax.train(made, on_record=records.append)
  made.workdir = str(tmp_path / "broken")

  def fails(record):
    if record["step"] == 3:
      raise Broken

  with pytest.raises(Broken):
    sft_jax.train(made, on_record=fails)
  rounds = tmp_path / "broken" / "on_policy"
  resumed = []
  sft_jax.train(made, on_record=resumed.append)
  for name in ("data/chain", "loss/kl"):
    assert resumed[-1][name] == records[-1][name]
  # Replies of step 4 are of other weights, and of one's own.
  assert sorted(x.name for x in rounds.iterdir()) == [
    *("replies_0.json", "replies_4.json")
  ]
  run = build.build_run(made, lambda line: None)
  own = on_policy.OnPolicy(
    *(run.stream, run.model, run.tokenizer),
    **{"every": 4, "seed": made.seed, "folder": rounds},
  )
  params = trees.merge(run.state.params, run.state.frozen)
  batch = own.batch(0, params, [0, 3])
  found = json.loads((rounds / "replies_0.json").read_text())
  for row, number in enumerate([0, 3]):
    for document, i in enumerate(run.stream.rows_of(0)[number]):
      there = batch.segment_ids[row] == document + 1
      tokens = batch.tokens[row][there]
      example = run.stream.store.example(i)
      start = np.flatnonzero(example.loss_weights)[0]
      assert (tokens[:start] == example.tokens[:start]).all()
      reply, stopped = found[f"0 {number} {document}"]
      stop = example.tokens[example.loss_weights > 0][-1:]
      whole = [*reply, *stop[: int(stopped)]]
      assert tokens[start:].tolist() == whole[: len(tokens) - start]
      assert len(tokens) > start
      weights = batch.loss_weights[row][there]
      assert np.flatnonzero(weights).tolist() == list(
        range(start - 1, len(tokens) - 1)
      )
  replies = [tuple(reply) for reply, _ in found.values()]
  assert len(set(replies)) == len(replies) > 16


def test_an_average_of_the_weights_teaches_and_is_exported(tmp_path, folders):
  """At first it is the student, so its divergence begins at 0 and grows.

  Also by a run that is resumed, whose average is that of all its steps.
  """
  made = config(
    *(tmp_path, folders[0]),
    steps=4,
    distill__teacher="average",
    distill__ce=1.0,
    optim__ema=0.9,
    checkpoint__every=1,
    checkpoint__keep=9,
    export_dtype="float32",
  )
  records = []

  def fails(record):
    records.append(record)
    if record["step"] == 2:
      raise Broken

  with pytest.raises(Broken):
    sft_jax.train(made, on_record=fails)
  sft_jax.train(made, on_record=records.append)
  kl = [one["loss/kl"] for one in records]
  assert kl[0] == pytest.approx(0, abs=1e-6)
  assert kl[-1] > 1e-4
  _, average = load_save.load_pretrained(folders[0])
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for step in range(1, 5):
    path = tmp_path / "run" / "checkpoints" / str(step)
    asked = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      ocp.checkpointables_metadata(path).metadata["state"],
    )
    found = ocp.load_checkpointables(path, {"state": asked})
    weights = found["state"]["params"]
    average = jax.tree.map(
      lambda a, w: 0.9 * a + 0.1 * np.asarray(w), average, weights
    )
  exported = load_save.load_pretrained(tmp_path / "run" / "export")[1]
  chex.assert_trees_all_close(exported, average, atol=1e-6)
  asked = load_run.load(tmp_path / "run", log=lambda line: None)
  chex.assert_trees_all_equal(asked.params, exported)


def test_raw_text_keeps_what_the_base_says_of_it(tmp_path, folders):
  """Beside rows that are shown their answer, and where loss.kl is on text."""
  rows = [*tiny.ROWS[:4], *({"text": f"{x} and {x}"} for x in tiny.WORDS)]
  path = tiny.rows_file(tmp_path / "mixed.jsonl", rows)
  made = config(tmp_path, folders[0], distill__teacher="self", lora__rank=2)
  made.data.train = str(path)
  run, batch, sums = first_loss(made)
  texts = np.asarray(batch.roles) == TOKEN_ROLES.index("text")
  assert texts.any()
  alone = batch._replace(loss_weights=batch.loss_weights * texts)
  params = trees.merge(run.state.params, run.state.frozen)
  assert float(jax.jit(run.loss_fn)(params, alone).objective) == pytest.approx(
    0, abs=1e-4
  )
  assert float(sums.objective) > 1e-2
  made = config(tmp_path, folders[0], loss__kl=2.0)
  made.data.train = str(path)
  found = {}
  for on in ("trained", "text"):
    made.loss.kl_on = on
    run = build.build_run(made, lambda line: None)
    params = trees.merge(run.state.params, run.state.frozen)
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    moved["base"] = params["base"]
    one = jax.jit(run.loss_fn)
    for name, weights in (("text", texts), ("rest", ~texts)):
      part = batch._replace(loss_weights=batch.loss_weights * weights)
      sums = one(moved, part)
      found[on, name] = float(sums.objective), float(sums.nats)
  objective, nats = found["trained", "text"]
  assert found["text", "text"] == pytest.approx(
    (objective - nats, nats), rel=1e-3
  )
  objective, nats = found["trained", "rest"]
  assert found["text", "rest"] == pytest.approx((nats, nats), rel=1e-4)
  assert objective > nats + 0.01


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path, folders):
  student, teacher = folders
  other = shutil.copytree(teacher, tmp_path / "other")
  text = (other / "tokenizer.json").read_text()
  # Two ids change places.
  for a, b in (('"a": ', '"\\u0000a": '), ('"b": ', '"a": ')):
    assert a in text
    text = text.replace(a, b, 1)
  (other / "tokenizer.json").write_text(
    text.replace('"\\u0000a": ', '"b": ', 1)
  )
  (other / "SHA256SUMS").unlink(missing_ok=True)
  made = config(tmp_path, student, distill__teacher=str(other))
  with pytest.raises(ValueError, match=r"distill.teacher: .* id \d+ is"):
    build.build_run(made, lambda line: None)
