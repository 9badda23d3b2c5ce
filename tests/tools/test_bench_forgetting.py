"""The table of ways: each trains as it says, and its figures are the run's."""

from types import SimpleNamespace

import pytest

import bench_forgetting
import tiny


def test_each_way_changes_what_it_says():
  made = {}
  for name, (start, change) in bench_forgetting.WAYS.items():
    config = start.get_config()
    change(config)
    replay = isinstance(config.data.train, str) or any(
      bench_forgetting.REPLAY in path for path in config.data.train
    )
    made[name] = (
      bool(config.lora.rank),
      replay,
      config.loss.kl,
      config.optim.learning_rate,
      config.lora.also_train,
    )
    if not replay:
      assert len(config.data.train) == 8
  assert made == {
    "full": (False, False, 0.0, 2e-3, ()),
    "full, replay": (False, True, 0.0, 2e-3, ()),
    "full, KL 0.1": (False, False, 0.1, 2e-3, ()),
    "LoRA": (True, False, 0.0, 2e-3, ("embed/",)),
    "LoRA, 5e-3": (True, False, 0.0, 5e-3, ("embed/",)),
    "LoRA, embeddings frozen": (True, False, 0.0, 2e-3, ()),
    "LoRA, replay": (True, True, 0.0, 2e-3, ("embed/",)),
    "LoRA, KL 0.1": (True, False, 0.1, 2e-3, ("embed/",)),
  }


def test_a_row_is_of_the_run(tmp_path, monkeypatch, capsys):
  """A run of a tiny model with every measurement; what it prints as well."""
  item = {
    "messages": [{"role": "user", "content": "Hat?"}],
    "checks": [{"check": "min_words", "count": 1}],
  }
  known = {"text": "A cat", "checks": [{"check": "max_words", "count": 50}]}
  files = {
    "eval__behaviors": tiny.rows_file(tmp_path / "b.jsonl", [item]),
    "eval__knowledge": tiny.rows_file(tmp_path / "k.jsonl", [known] * 2),
    "eval__general_text": tiny.rows_file(
      tmp_path / "g.jsonl", [{"text": "The cat sat."}]
    ),
  }
  config = tiny.config(
    tmp_path,
    tiny.model_folder(tmp_path / "model"),
    tiny.rows_file(tmp_path / "rows.jsonl"),
    data__holdout=0.25,
    data__canaries=1,
    data__seq_len=96,
    eval__max_new_tokens=4,
    **{key: str(path) for key, path in files.items()},
  )
  start = SimpleNamespace(
    get_config=lambda: config.copy_and_resolve_references()
  )
  ways = {"a, b": (start, lambda config: None)}
  monkeypatch.setattr(bench_forgetting, "WAYS", ways)
  flags = [f"--workdir={tmp_path}", "--steps=3", "--ways", "a, b"]
  monkeypatch.setattr("sys.argv", ["bench_forgetting.py", *flags])
  bench_forgetting.main()
  shown = capsys.readouterr().out
  lines = shown.strip().splitlines()[-3:]
  head, row = (
    [cell.strip() for cell in lines[i].strip("|").split("|")] for i in (0, 2)
  )
  assert tuple(head) == bench_forgetting.HEAD
  result = bench_forgetting.run("a, b", tmp_path, 3)  # It is finished.
  left = {one["name"]: one["after"] for one in result["forgetting"]}
  assert float(row[head.index("KL")]) == pytest.approx(
    left["general_text/kl"], abs=1e-4
  )
  assert row[head.index("known")] == "100% -> 100%"
  assert float(row[head.index("gap")]) == pytest.approx(
    result["gap"]["gap"], abs=1e-3
  )
  for words in (
    "general text, KL(base || tuned), nats per token │ 0.0000 │",
    "general text, most likely token is the base's │ 100.0% │",
    "what the base knows, answered (2 texts) │ 100 % (34 to 100) │",
    "of what it answered, still answered │",
    "canaries planted, exposure of 8 bits │",
    "canaries kept back, exposure of 8 bits │",
    "replies found whole in a training answer (held-out answers: ",
  ):
    assert words in " ".join(shown.split()), words
  page = (tmp_path / "a_b" / "report.html").read_text()
  assert "general text, KL(base || tuned)" in page
