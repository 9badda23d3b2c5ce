"""The table of ways: each trains as it says, and its figures are the run's."""

import json
from pathlib import Path

import pytest

import bench_forgetting
import tiny
from sft_jax.training.config_check import check


def test_each_way_changes_what_it_says(tmp_path):
  made = {}
  for name, changes in bench_forgetting.WAYS.items():
    config = bench_forgetting.configured(changes, tmp_path / "r", 3, False)
    check(config)
    rows = [Path(x).name for x in config.data.train]
    made[name] = (config.seed, len(rows), bench_forgetting.REPLAY in rows)
    for key, value in changes.items():
      if "." in key:
        section, name = key.split(".")
        assert config[section][name] == value
  assert made.pop("without raw text") == (3, 8, False)
  assert set(made.values()) == {(3, 9, True)}
  small = bench_forgetting.configured({}, tmp_path / "r", 0, True)
  assert len(small.data.train) == len(bench_forgetting.SMALL)
  prompts = Path(small.eval.behaviors).read_text().splitlines()
  assert {json.loads(x)["group"] for x in prompts} == {
    *("context", "json", "refusal", "style")
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
  monkeypatch.setattr(
    bench_forgetting.base,
    "get_config",
    lambda: config.copy_and_resolve_references(),
  )
  monkeypatch.setattr(
    bench_forgetting, "WAYS", {"plain": {}, "the base": {"mixed": 0.0}}
  )
  monkeypatch.setattr(bench_forgetting, "TEXT", files["eval__general_text"])
  flags = [f"--workdir={tmp_path}", "--steps=3"]
  monkeypatch.setattr("sys.argv", ["bench_forgetting.py", *flags])
  bench_forgetting.main()
  shown = capsys.readouterr().out
  lines = shown.strip().splitlines()[-4:]
  head, _, row, of_base = (
    [cell.strip() for cell in line.strip("|").split("|")] for line in lines
  )
  assert tuple(head) == bench_forgetting.HEAD
  result = json.loads((tmp_path / "0" / "plain" / "result.json").read_text())
  left = {one["name"]: one["after"] for one in result["forgetting"]}
  assert float(row[head.index("KL")]) == pytest.approx(
    left["general_text/kl"], abs=1e-4
  )
  assert float(of_base[head.index("KL")]) == pytest.approx(0, abs=1e-4)
  assert "(+0.0%)" in of_base[head.index("general text, perplexity")]
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
  page = (tmp_path / "0" / "plain" / "report.html").read_text()
  assert "general text, KL(base || tuned)" in page
