"""Runs that learn from a teacher: another model, itself shown the answer."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sft_jax
import tiny
from sft_jax.commands import score
from sft_jax.common import trees
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models.hf import load_save
from sft_jax.training.build import build


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
  kept = config(tmp_path, student, distill__teacher="kept", distill__top=400)
  kept.workdir = str(tmp_path / "kept")
  with pytest.raises(ValueError, match="Run sft-jax teach"):
    build.build_run(kept, lambda line: None)
  lines = []
  score.keep_predictions(kept, str(teacher), lines.append)
  assert "bytes each" in lines[-1]
  _, _, sums = first_loss(kept)
  assert float(sums.objective) == pytest.approx(
    float(online.objective), rel=5e-3
  )


def test_a_model_shown_the_answer_teaches_itself_without_it(tmp_path, folders):
  """The teacher's prediction is the base's in the prompt that shows it."""
  made = config(tmp_path, folders[0], distill__teacher="self", lora__rank=2)
  run, batch, sums = first_loss(made)
  params = trees.merge(run.state.params, run.state.frozen)
  hidden = run.model.hidden(
    params, batch.tokens, batch.positions, batch.segment_ids
  )
  log_p = np.float64(
    jax.nn.log_softmax(hidden @ jnp.asarray(run.model.head(params)).T)
  )
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
      q, p = log_p[row, shown], log_p[row, own]
      kl, tokens = kl + (np.exp(q) * (q - p)).sum(), tokens + len(own)
  assert float(sums.weight) == tokens
  assert kl / tokens > 1e-4
  assert float(sums.objective) == pytest.approx(kl, rel=1e-3)


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
