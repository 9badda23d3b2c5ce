"""Lessons from end to end, and what makes a verdict."""

import functools
import importlib
import json
import math

import jax
import numpy as np
import pytest
from scipy import stats

import run_lessons
import tiny
from examples.lessons import common, quality
from examples.lessons.common import Answers, Arm, Figure, Lesson
from lessons import figures, rows, verdict
from sft_jax.common import sharding
from sft_jax.evals import behaviors
from sft_jax.evals.checks import checks
from sft_jax.inference import generate

TINY = Lesson(
  name="tiny",
  claim="Right replies teach right replies",
  arms={"right": Arm(("words", {})), "wrong": Arm(("others", {}))},
  prompts=("word_prompts", {}),
  figures=(
    Figure("passed", "behavior/all/pass_rate", "right", "wrong"),
    Figure("nats", "held_out/nats_per_token", "wrong", "right"),
    Figure("samples", "agreement", "right", "wrong"),
  ),
  held_out=("words", {}),
  samples=2,
)


@pytest.fixture
def tiny_lesson(tmp_path, monkeypatch):
  """`TINY` on a tiny model and one device, with the config that this takes."""
  one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  monkeypatch.setattr(sharding, "make_mesh", one)
  model = tiny.model_folder(tmp_path / "model")

  def small(lesson, arm):
    config = original(lesson, arm)
    config.model.path = str(model)
    # Four runs that differ in rows and seed alone compile once.
    config.compile_cache = str(tmp_path / "compiled")
    config.steps = 4
    config.batch_size, config.data.seq_len = 8, 64
    config.optim.warmup_steps = 0
    config.eval.general_text = ""
    config.eval.max_new_tokens = 4
    config.data.allow = ("overlap",)
    return config

  original = common.config_of
  monkeypatch.setattr(common, "config_of", small)
  prompts = [
    {
      "messages": [{"role": "user", "content": row["instruction"]}],
      "checks": [{"check": "contains", "text": row["output"]}],
    }
    for row in tiny.ROWS[:3]
  ]
  monkeypatch.setitem(rows.ROWS, "words", lambda seed: tiny.ROWS)
  others = rows.swap(tiny.ROWS)
  monkeypatch.setitem(rows.ROWS, "others", lambda seed: others)
  monkeypatch.setitem(rows.PROMPTS, "word_prompts", lambda: prompts)
  return TINY


def test_a_lesson_from_end_to_end(tiny_lesson, tmp_path, monkeypatch):
  out = tmp_path / "out"
  lessons = {"tiny": tiny_lesson}
  table = run_lessons.run(lessons, ["tiny"], 2, out)
  kept = {
    arm: [
      json.loads((out / "tiny" / arm / str(seed) / "figures.json").read_text())
      for seed in (0, 1)
    ]
    for arm in TINY.arms
  }
  values = {
    arm: [one["figures"]["held_out/nats_per_token"] for one in found]
    for arm, found in kept.items()
  }
  assert values["right"] != values["wrong"]
  assert values["right"][0] != values["right"][1]
  for found in kept.values():
    for one in found:
      assert 0 <= one["figures"]["agreement"] <= 1
  judged = verdict.judge(values["wrong"], values["right"])
  line = table.splitlines()[3]
  assert f"wrong: {judged.more[0]:.2f} ± {judged.more[1]:.2f}" in line
  assert line.endswith(f"| {judged.says} |")
  assert not list(out.glob("**/checkpoints"))

  # What has figures is not run again, wherever it has been moved.
  monkeypatch.setattr(run_lessons.sft_jax, "train", None)
  out.rename(tmp_path / "moved")
  # As one has that was stopped and went on.
  incidents = tmp_path / "moved" / "tiny" / "right" / "0" / "incidents.jsonl"
  incidents.write_text('{"kind": "stopped"}\n')
  again = run_lessons.run(lessons, ["tiny"], 2, tmp_path / "moved")
  assert again == table
  # But what was another arm then is refused.
  monkeypatch.setitem(rows.ROWS, "words", lambda seed: tiny.ROWS[1:])
  with pytest.raises(ValueError, match="figures of another config"):
    run_lessons.run(lessons, ["tiny"], 2, tmp_path / "moved")


@pytest.mark.slow
def test_a_teacher_writes_the_rows_of_an_arm(
  tiny_lesson, tmp_path, monkeypatch
):
  """What is checked is right, what is not is the teacher's first word."""
  small = common.config_of

  def longer(lesson, arm):
    config = small(lesson, arm)
    config.steps = 150 if arm == "teacher" else 2
    config.optim.learning_rate = 3e-3
    config.eval.max_new_tokens = 12
    return config

  monkeypatch.setattr(common, "config_of", longer)
  fresh = [
    {
      "group": "words",
      "messages": [
        {"role": "user", "content": row["instruction"]},
        {"role": "assistant", "content": row["output"]},
      ],
      "checks": [{"check": "exact", "text": row["output"]}],
    }
    for row in tiny.ROWS[3:11]
  ]
  monkeypatch.setitem(rows.ROWS, "fresh", lambda seed: fresh)
  asked = Answers(by="teacher", temperature=1.0, attempts=6, checked=True)

  def lesson(asked):
    arms = {
      "checked": Arm(("fresh", {}), answers=asked),
      "unchecked": Arm(("fresh", {}), answers=asked._replace(checked=False)),
      "teacher": Arm(("words", {}), {"export": True}),
    }
    return tiny_lesson._replace(arms=arms, held_out=None, samples=0)

  out = tmp_path / "out"
  for arm in ("checked", "unchecked"):
    run_lessons.run_arm(lesson(asked), arm, 0, out)
  checked, unchecked = (
    {
      row["messages"][0]["content"]: row
      for row in rows.read(out / "tiny" / arm / "0" / "rows.jsonl")
    }
    for arm in ("checked", "unchecked")
  )
  items = behaviors.load(out / "tiny" / "checked" / "0" / "asked.jsonl")
  right = {item.prompt.messages[0].content: item for item in items}
  passes = {
    arm: [_passes(row, right[prompt]) for prompt, row in made.items()]
    for arm, made in (("checked", checked), ("unchecked", unchecked))
  }
  assert len(checked) >= 5
  assert all(passes["checked"])
  assert not all(passes["unchecked"])
  assert any(passes["unchecked"])
  # One teacher, and the same seeds: a first reply that passes is in both.
  first = [p for p, row in checked.items() if not row["synthetic"]["attempt"]]
  assert first
  for prompt in first:
    assert checked[prompt]["messages"] == unchecked[prompt]["messages"]

  # Of what has figures nothing is asked or trained again.
  monkeypatch.setattr(run_lessons.sft_jax, "train", None)
  monkeypatch.setattr(run_lessons.teacher, "write", None)
  run_lessons.run_arm(lesson(asked), "checked", 0, out)
  hotter = lesson(asked._replace(temperature=2.0))
  with pytest.raises(ValueError, match="figures of another config"):
    run_lessons.run_arm(hotter, "checked", 0, out)


def _passes(row: dict, item: behaviors.Item) -> bool:
  reply = generate.parse(row["messages"][-1]["content"])
  return all(
    checks.passes(generate.Reply(reply.content, [], True, reply), one)
    for one in item.checks
  )


def test_a_verdict_by_hand():
  """Equal spreads of 1: t(0.975, 4) = 2.776445, error sqrt(1/3 + 1/3)."""
  half = 2.776445 * math.sqrt(2 / 3)
  found = verdict.judge([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
  assert found.more == (4.0, 1.0)
  assert found.less == (2.0, 1.0)
  assert found.difference == 2.0
  np.testing.assert_allclose(found.interval, (2 - half, 2 + half), rtol=1e-6)
  assert half > 2
  assert found.says == "not separated"
  assert verdict.judge([6.0, 7.0, 8.0], [1.0, 2.0, 3.0]).says == "holds"
  opposite = verdict.judge([1.0, 2.0, 3.0], [6.0, 7.0, 8.0])
  assert opposite.says == "does not hold"


def test_a_verdict_against_scipy():
  rng = np.random.default_rng(0)
  for n, m in ((3, 3), (2, 5), (4, 3)):
    more, less = rng.normal(0, 1, n), rng.normal(1, 3, m)
    found = verdict.judge(more.tolist(), less.tolist())
    theirs = stats.ttest_ind(more, less, equal_var=False)
    interval = theirs.confidence_interval(0.95)
    np.testing.assert_allclose(found.interval, interval, rtol=1e-9)
    assert (found.says == "not separated") == (theirs.pvalue > 0.05)


def test_arms_without_spread():
  assert verdict.judge([1.0, 1.0], [0.0, 0.0]).says == "holds"
  assert verdict.judge([1.0, 1.0], [1.0, 1.0]).says == "not separated"
  assert verdict.judge([1.0, 1.0], [0.0, 0.0]).interval == (1.0, 1.0)


def test_a_figure_may_be_another_in_the_arm_with_less():
  lesson = TINY._replace(
    figures=(Figure("f", "behavior/a/x", "right", "wrong", "behavior/b/x"),)
  )
  one = {"behavior/a/x": 0.75, "behavior/b/x": 0.25}
  table = verdict.table(
    [lesson], {"tiny": {"right": [one] * 2, "wrong": [one] * 2}}
  )
  assert "right: 75 ± 0 % | wrong: 25 ± 0 % | 50 [50, 50] | holds" in table


def test_agreement_counts_pairs():
  assert figures.agreement([["a", "a", "b"]]) == 1 / 3
  assert figures.agreement([["a", "a"], ["a", "b"]]) == 1 / 2
  assert figures.agreement([["a"] * 4, ["b"] * 4]) == 1


def test_a_table_goes_between_the_markers_of_a_page(tmp_path):
  page = tmp_path / "page.md"
  first, last = run_lessons.MARKERS
  page.write_text(f"# Top\n{first}\nold\n{last}\nend\n")
  run_lessons.put(page, "new")
  run_lessons.put(page, "newer")
  assert page.read_text() == f"# Top\n{first}\nnewer\n{last}\nend\n"
  page.write_text("# Top\n")
  with pytest.raises(ValueError, match="no single pair"):
    run_lessons.put(page, "new")


def test_what_is_asked_for_must_exist(tmp_path):
  lessons = run_lessons.load()
  with pytest.raises(ValueError, match=r"--only: got \['nothing'\]"):
    run_lessons.run(lessons, ["nothing"], 3, tmp_path)
  with pytest.raises(ValueError, match="--seeds: got 1"):
    run_lessons.run(lessons, ["quality"], 1, tmp_path)
  with pytest.raises(ValueError, match="got arm 'other'"):
    quality.get_config("other")


@pytest.mark.parametrize("name", run_lessons.load())
def test_figures_name_arms_and_every_file_is_a_lesson(name):
  module = importlib.import_module(f"examples.lessons.{name}")
  lesson = module.LESSON
  assert lesson.name == name
  assert f"--only {name}" in module.__doc__
  assert "Expected" in module.__doc__
  assert lesson.figures
  for figure in lesson.figures:
    assert {figure.more, figure.less} <= set(lesson.arms)
    assert figure.more != figure.less
  for arm in lesson.arms:
    config = module.get_config(arm)
    assert config.workdir == f"runs/lessons/{name}/{arm}/0"
    assert config.data.train == f"{config.workdir}/rows.jsonl"
