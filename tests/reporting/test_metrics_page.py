"""docs/metrics.md defines every name that runs write, and no other."""

import json
import re
from pathlib import Path

import pytest

import sft_jax
import tiny
from sft_jax.common import flops
from sft_jax.reporting import throughput
from sft_jax.reporting.metrics import read_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
TEXTS = [{"text": f"The {word} goes with the {word}."} for word in tiny.WORDS]
ITEMS = [
  {
    "messages": [{"role": "user", "content": "What is a cat?"}],
    "group": "animals",
    "checks": [
      {"check": "contains", "text": "cat"},
      {"check": "max_words", "count": 5, "kind": "format"},
    ],
  }
]


def general(name: str) -> str:
  """A name as the page has it, with what a user chose in capitals."""
  name = re.sub(r"^behavior/[^/]+/", "behavior/SET/", name)
  name = re.sub(r"^(held_out|general_text)/(loss|acc)/.*", r"\1/\2/GROUP", name)
  name = re.sub(r"^(loss|acc)/role/.*", r"\1/role/ROLE", name)
  return re.sub(r"^(loss|acc)/source/.*", r"\1/source/NAME", name)


def names_of(section: str) -> set[str]:
  text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
  return set(re.findall(r"^\| `([^`]+)`", text, re.M))


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
  folder = tmp_path_factory.mktemp("page")
  for name, rows in (
    ("rows_a", tiny.ROWS),
    ("rows_b", TEXTS),
    ("items", ITEMS),
    ("text", [{"text": "The cat sat."}]),
  ):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines)
  config = tiny.config(
    *(folder, tiny.model_folder(folder / "model"), folder / "rows_*.jsonl"),
    steps=4,
    export=False,
    data__holdout=0.2,
    eval__every=2,
    eval__behaviors=str(folder / "items.jsonl"),
    eval__general_text=str(folder / "text.jsonl"),
    eval__max_new_tokens=4,
    checkpoint__every=0,
    loss__kl=0.1,
  )
  return read_jsonl(sft_jax.train(config).workdir / "metrics.jsonl")


def of_other_machines(monkeypatch) -> set[str]:
  """Names where a peak is published and devices have memory."""

  class Device:
    def memory_stats(self):
      return {"peak_bytes_in_use": 1}

  monkeypatch.setattr(throughput.jax, "local_devices", lambda: [Device()])
  one = throughput.Throughput(
    throughput.Clock(),
    throughput.PreviousRuntime(0.0, 0.0),
    flops_per_token=1.0,
    num_devices=1,
    chip=flops.CHIPS["H100"],
    published=True,
  )
  one.step(())
  return set(one.take(1.0, 1.0))


def test_training_records_are_on_the_page(records, monkeypatch):
  training = [r for r in records if "loss/nats_per_token" in r]
  assert [r["step"] for r in training] == [1, 2, 3, 4]
  written = {general(name) for r in training for name in r} - {"step"}
  assert written | of_other_machines(monkeypatch) == names_of(
    "Training records"
  )
  names = {name for r in training for name in r}
  for kind in ("loss", "acc"):
    groups = ("role/answer", "role/text", "source/rows_a.jsonl")
    assert names >= {f"{kind}/{group}" for group in groups}


def test_evaluation_records_are_on_the_page(records):
  measured = [r for r in records if "loss/nats_per_token" not in r]
  written = {general(name) for r in measured for name in r}
  written -= {"step", "time/at"}
  # It is of what the base has right, which may be nothing.
  written |= {f"{text}/both_correct" for text in ("held_out", "general_text")}
  assert written == names_of("Evaluation records")


def test_where_each_is_computed_is_a_file_that_is_there():
  files = re.findall(r"\| `([\w/]+\.py)` \|$", PAGE.read_text(), re.M)
  assert len(files) > 40
  for file in files:
    assert (PAGE.parents[1] / "sft_jax" / file).exists(), file


def test_figures_that_follow_from_others_do(records):
  """Of a real run: what divides and multiplies to what."""
  for r in records:
    if "loss/nats_per_token" not in r:
      continue
    assert r["data/trained_fraction"] == pytest.approx(
      r["data/trained_tokens"] / r["data/tokens"]
    )
    assert r["loss/trained_weight"] == r["data/trained_tokens"]
    assert r["time/step_s"] == pytest.approx(
      r["time/data_wait_s"] + r["time/compute_s"]
    )
    # Of one step: log.every is 1.
    assert r["speed/tokens_per_s"] == pytest.approx(
      r["data/tokens"] / r["time/step_s"]
    )
    assert r["speed/trained_tokens_per_s"] == pytest.approx(
      r["data/trained_tokens"] / r["time/step_s"]
    )
    assert 0 < r["speed/goodput"] < 1
    assert r["memory/host_peak_bytes"] > 1e7
