"""Evaluating a run as it trained, its checkpoints, and its export."""

import json
import re

import pytest
from orbax.checkpoint import v1 as ocp

import sft_jax
import tiny
from sft_jax.checkpointing import digests
from sft_jax.commands import evaluate
from sft_jax.reporting import metrics
from sft_jax.training.build import load_run

ITEMS = [
  {
    "group": group,
    "messages": [{"role": "user", "content": row["instruction"]}],
    "checks": [
      {"check": "exact", "text": row["output"]},
      {"check": "max_words", "count": 3},
    ],
  }
  for row, group in zip(tiny.ROWS[:6], "aaabbb", strict=True)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A short run that was evaluated on the way, on eight devices."""
  folder = tmp_path_factory.mktemp("evaluate")
  model = tiny.model_folder(folder / "model")
  items = tiny.rows_file(folder / "items.jsonl", ITEMS)
  config = tiny.config(
    folder, model, tiny.rows_file(folder / "train.jsonl"),
    steps=4, eval__every=2, eval__behaviors={"mine": str(items)},
    eval__max_new_tokens=6, checkpoint__keep_best="behavior/mine/b/content",
  )  # fmt: skip
  return sft_jax.train(config), model, items


def test_behaviors_are_figures_of_the_run(run):
  result, _, _ = run
  (record,) = [
    record
    for record in metrics.read_jsonl(result.workdir / "metrics.jsonl")
    if "behavior/all/pass_rate" in record
  ]
  assert record["step"] == 2
  for group in ("all", "mine/a", "mine/b"):
    for name in ("pass_rate", "stopped", "format", "content"):
      assert 0 <= record[f"behavior/{group}/{name}"] <= 1
  assert record["time/evaluation_s"] > 0
  kept = metrics.read_jsonl(result.workdir / "evals" / "step_2.jsonl")
  assert [reply["group"] for reply in kept] == ["mine/a"] * 3 + ["mine/b"] * 3
  # It is what `keep_best` goes by.
  saved = ocp.checkpointables_metadata(str(result.workdir / "checkpoints/2"))
  score = digests.unseal(saved.custom_metadata)["score"]
  assert score == record["behavior/mine/b/content"]
  rate = sum(reply["content"] for reply in kept) / len(kept)
  assert record["behavior/all/content"] == rate


def test_a_run_its_checkpoint_and_its_export_reply_alike(
  run, tmp_path, monkeypatch, capsys
):
  result, base, items = run
  said = {}
  for name in ("", "checkpoints/2", "export"):
    out = tmp_path / "replies.jsonl"
    flags = [f"--model={result.workdir / name}", f"--data={items}"]
    flags += ["--max_new_tokens=6", f"--out={out}"]
    flags += [f"--baseline={base}"] if name == "export" else []
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    evaluate.main()
    said[name] = [
      json.loads(line)["reply"] for line in out.read_text().splitlines()
    ]
  kept = metrics.read_jsonl(tmp_path / "replies.baseline.jsonl")
  assert [reply["group"] for reply in kept] == list("aaabbb")
  assert said[""] == said["export"]
  # Those that the run itself measured, at the end and on the way.
  after = json.loads((result.workdir / "evals" / "after.json").read_text())
  assert said[""] == [x["reply"] for x in after["behaviors"]["replies"]]
  way = metrics.read_jsonl(result.workdir / "evals" / "step_2.jsonl")
  assert said["checkpoints/2"] == [x["reply"] for x in way]
  shown = capsys.readouterr().out
  for word in ("passed", "format", "content", "before", "after", "+ / -"):
    assert word in shown


@pytest.mark.parametrize(
  ("part", "path", "match"),
  [
    ("arrays", ".params['final_norm']['scale']", "the files are damaged"),
    ("beside", "['final_norm']['scale']", "the model's folder has changed"),
  ],
)
def test_what_is_not_as_it_was_saved_is_refused(
  run, monkeypatch, part, path, match
):
  result, _, _ = run
  unseal = digests.unseal

  def of_another(sealed):
    told = unseal(sealed)
    entry = told["arrays"][".params['final_norm']['scale']"]
    told[part] = told[part] | {path: entry | {"digest": "0" * 16}}
    return told

  monkeypatch.setattr(digests, "unseal", of_another)
  with pytest.raises(ValueError, match=match) as error:
    load_run.load(result.workdir / "checkpoints" / "2")
  assert path in str(error.value)


def test_a_checkpoint_without_its_manifest_is_refused(run, monkeypatch):
  result, _, _ = run
  monkeypatch.setattr(digests, "_hash", lambda text: "another")
  with pytest.raises(ValueError, match="differs from its digest"):
    load_run.load(result.workdir)


def test_the_policy_of_a_run_is_remembered(run):
  result, base, _ = run
  assert load_run.load(result.workdir).options.over_long == "drop"
  assert load_run.load(base).tokenizer.vocab_size > 0


def test_against_a_baseline_it_says_how_far_the_model_is(
  run, tmp_path, monkeypatch, capsys
):
  """Of its replies and of a text; of a model against itself, nothing."""
  result, base, items = run
  text = tiny.rows_file(tmp_path / "text.jsonl", [{"text": "A cat in a hat."}])

  def told(model):
    flags = [f"--model={model}", f"--data={items}", "--max_new_tokens=6"]
    flags += [f"--baseline={base}", f"--text={text}"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    evaluate.main()
    shown = " ".join(capsys.readouterr().out.split())
    return [
      float(x)
      for x in re.findall(r"KL\(baseline \|\| model\) ([\d.-]+)", shown)
    ], re.findall(r"the baseline's in ([\d.]+)%", shown)

  kls, kept = told(result.workdir / "export")
  assert len(kls) == 2
  assert min(kls) > 0
  kls, kept = told(base)
  assert kls == [0, 0]
  assert kept == ["100.0", "100.0"]
