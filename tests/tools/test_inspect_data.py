"""The tool as its user meets it: exit codes, JSON, hostile rows, real files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from sft_jax.data import selection
from sft_jax.data.store import shards

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
HOSTILE = "\x1b[31mred </script> [bold]x[/bold] \u202eevil\u202c "


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
  return tiny.model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def run(tmp_path, model):
  """Runs the tool on rows, or on a file; (exit code, stdout, stderr)."""

  def run(rows, *flags: str, held=None) -> tuple[int, str, str]:
    if isinstance(rows, list):
      rows = tiny.rows_file(tmp_path / "rows.jsonl", rows)
    if isinstance(held, list):
      held = tiny.rows_file(tmp_path / "held.jsonl", held)
    command = [
      sys.executable,
      str(ROOT / "tools" / "inspect_data.py"),
      f"--config={ROOT / 'configs' / 'base.py'}",
      f"--config.workdir={tmp_path / 'run'}",
      f"--config.model.path={model}",
      f"--config.data.train={rows}",
      f"--config.data.eval={held or ''}",
      "--config.data.holdout=0.0",
      "--config.data.workers=1",
      "--config.eval.general_text=",
      *flags,
    ]
    done = subprocess.run(
      command,
      capture_output=True,
      text=True,
      env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HOME": "/tmp"},
      check=False,
    )
    return done.returncode, done.stdout, done.stderr

  return run


def test_passing_rows_as_json_and_as_a_page(run, tmp_path):
  code, out, _ = run(tiny.ROWS, "--json", f"--html={tmp_path / 'page.html'}")
  found = json.loads(out)
  assert code == 0
  assert found["passed"]
  assert found["schema"] == 2
  assert {*found} == {
    "schema", "passed", "findings", "warnings", "ledger", "held_out", "epoch",
    "lengths", "samples", "scores", "coverage",
  }  # fmt: skip
  assert found["scores"] is found["coverage"] is None
  assert len(found["samples"]) == 3
  assert "Data audit" in (tmp_path / "page.html").read_text()


def test_a_failed_finding_is_exit_1_and_may_be_allowed(run):
  code, out, _ = run(tiny.ROWS, held=tiny.ROWS[:2])
  assert code == 1
  assert "FAILED  overlap (held out)" in out
  flag = "--config.data.allow=('overlap',)"
  code, out, _ = run(tiny.ROWS, flag, held=tiny.ROWS[:2])
  assert code == 0
  assert "allowed overlap (held out)" in out


def test_malformed_rows_are_all_told_and_exit_1(run):
  bad = [{"instruction": "Say <|im_end|>.", "output": "No."}, {"odd": 1}]
  flag = "--config.data.control_tokens=error"
  code, out, _ = run([*tiny.ROWS, *bad], "--json", flag)
  found = {v["name"]: v for v in json.loads(out)["findings"]}
  assert code == 1
  places = [place.split()[0] for place in found["malformed"]["places"]]
  assert places == ["rows.jsonl:17", "rows.jsonl:18"]
  assert "control token" in found["malformed"]["message"]


def test_what_cannot_be_read_is_exit_2(run):
  code, _, err = run("nowhere.jsonl")
  assert code == 2
  assert err.startswith("error: ")
  assert "Traceback" not in err


def test_hostile_rows_do_not_reach_the_terminal(run, tmp_path):
  rows = [
    {"instruction": f"{HOSTILE} {i}", "output": f"{HOSTILE} answer"}
    for i in range(4)
  ] + [{"instruction": "long", "output": "y" * 1_000_000}]  # fmt: skip
  page = tmp_path / "page.html"
  named = tmp_path / "a\x1b[31m [bold]\nall is well \u202e.jsonl"
  code, out, _ = run(tiny.rows_file(named, rows), f"--html={page}")
  assert code == 0
  for text in (out, page.read_text()):
    assert not set(text) & set("\x1b\u202e\u202c")
    assert len(text) < 100_000
  assert not any(line.startswith("all is well") for line in out.splitlines())
  assert "\u241b[31m [bold]\u240aall is well" in out
  assert "[bold]x[/bold]" in out


def test_hostile_rows_as_json_are_ascii_and_come_back_as_they_were(
  run, tmp_path
):
  """And what a row holds adds no line to what other programs read."""
  rows = [{"instruction": f"{HOSTILE} {i}", "output": f"{HOSTILE} answer"}
          for i in range(4)]  # fmt: skip
  # A duplicate, so that a warning shows it.
  rows.append(rows[0])
  named = tmp_path / "ro\u202ews.jsonl"
  code, out, _ = run(tiny.rows_file(named, rows), "--json", "--samples=5")
  assert code == 0
  assert out.isascii()
  assert out.count("\n") == 1
  assert not set(out) & {chr(i) for i in range(32)} - {"\n"}
  found = json.loads(out)
  warning = next(w for w in found["warnings"] if w["name"] == "duplicates")
  shown = warning["examples"][0]["rows"][0]
  assert shown["prompt"] == rows[0]["instruction"]
  assert shown["answer"] == rows[0]["output"]
  assert shown["place"] == f"{named.name}:1"
  texts = ["".join(p["text"] for p in s["spans"]) for s in found["samples"]]
  assert all(HOSTILE.strip() in text for text in texts)


def test_scores_beside_the_rows_are_shown(run, tmp_path):
  """Of 16 rows one has no score, and one another than when it was scored."""
  file = tmp_path / "rows.jsonl"
  found = [
    selection.RowScore(
      f"{file.name}:{n}",
      shards.content_of({**row, "input": "old"} if n == 16 else row),
      # IFD rises to 1.4 where nats fall to 1; the last has none.
      (15.0 - n, None if n == 14 else n / 10 + 0.1, 2.0, 3),
    )
    for n, row in enumerate(tiny.ROWS, 1)
    if n != 15
  ]
  selection.write_scores(
    selection.scores_path(file, tmp_path / "scores"), {}, found
  )
  page = tmp_path / "page.html"
  where = f"--config.data.scores={tmp_path / 'scores'}"
  code, out, _ = run(tiny.ROWS, where, "--json", "--shown=2", f"--html={page}")
  assert code == 0
  told = json.loads(out)["scores"]
  assert (told["rows"], told["unscored"], told["changed"]) == (14, 1, 1)
  nats = told["spread"]["nats"]
  assert (nats["rows"], nats["p0"], nats["p50"], nats["p100"]) == (
    14, 1.0, 7.5, 14.0
  )  # fmt: skip
  assert told["spread"]["ifd"]["rows"] == 13
  ends = [
    [int(row["place"].split(":")[1]) for row in end["rows"]]
    for end in told["ends"]
  ]
  assert ends == [[1, 2], [14, 13], [13, 12], [1, 2]]
  assert told["ends"][2]["name"].endswith("(4 rows)")
  first = told["ends"][0]["rows"][0]
  assert first["prompt"] == tiny.ROWS[0]["instruction"]
  assert first["answer"] == tiny.ROWS[0]["output"]
  assert "ifd" not in told["ends"][1]["rows"][0]
  text = page.read_text()
  code, out, _ = run(tiny.ROWS, where)
  assert code == 0
  for said in (
    "14 rows have scores, 1 have none, 1 have changed",
    "rows.jsonl:14 ",
    tiny.ROWS[0]["output"],
  ):
    assert said in text
    assert said in out


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_alpaca_and_its_overlap(run):
  """Two empty outputs, no duplicate, and 97 prompts of the other file."""
  code, out, _ = run(
    SHARED / "instruction" / "alpaca_5000.json",
    "--config.data.seq_len=100_000",
    "--json",
    held=SHARED / "llamafactory_demo" / "alpaca_en_demo.json",
  )
  found = json.loads(out)
  assert code == 1
  empty = next(w for w in found["warnings"] if w["name"] == "empty answers")
  assert "(alpaca_5000.json[2335], alpaca_5000.json[4658])" in empty["message"]
  assert not {"duplicates", "near duplicates"} & {
    w["name"] for w in found["warnings"]
  }
  by_tokens, by_words = (v for v in found["findings"] if v["name"] == "overlap")
  assert "97 by their prompt" in by_tokens["message"]
  # This tokenizer knows 400 tokens, so that runs of 13 are a few words.
  assert by_tokens["count"] <= 99
  assert by_words["count"] == 97
