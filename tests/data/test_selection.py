"""Rows filtered and weighted by scores and columns: counted, and weighed."""

import json

import numpy as np
import pytest

import tiny
import tiny_tokenizers
from sft_jax.data import selection
from sft_jax.data.audit import row_texts
from sft_jax.data.readers import files
from sft_jax.data.selection import RowScore
from sft_jax.data.store import shards
from sft_jax.data.tokenizers import tokenizer as tokenizers
from sft_jax.training.build import data as setup_data

N = len(tiny.ROWS)
ROWS = [
  {**row, "quality": i % 4 / 2, "tag": "en" if i % 3 else "de"}
  for i, row in enumerate(tiny.ROWS)
]
IFD = [i / 10 for i in range(N)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tiny_tokenizers.byte_level(tmp_path_factory.mktemp("t") / "tokens")
  return folder, tokenizers.load_tokenizer(folder)


@pytest.fixture
def load(tmp_path, tokenizer):
  """(train store, stream, lines told) of rows under a config's changes."""
  folder, loaded = tokenizer
  file = tiny.rows_file(tmp_path / "rows.jsonl", ROWS)

  def load(train=None, **changes):
    config = tiny.config(
      tmp_path, folder, train or file, data__workers=1, **changes
    )
    if train:
      config.data.train = train
    told = []
    data = setup_data.load_data(config, loaded, told.append)
    return data.stream.store, data.stream, told

  load.file = file
  return load


def score(file, rows=ROWS, ifd=IFD):
  selection.write_scores(
    selection.scores_path(file),
    {"model": "m"},
    (
      RowScore(f"{file.name}:{i}", shards.content_of(row), (1.0 + x, x, 1.0, 5))
      for i, (row, x) in enumerate(zip(rows, ifd, strict=True), 1)
    ),
  )


def places(store):
  return [int(store.place(i).split(":")[1]) for i in range(len(store.index))]


def test_rows_that_fail_are_drops_with_their_reason(load):
  score(load.file)
  store, stream, _ = load(
    data__filter=(("ifd", "<", 0.85), ("row.tag", "==", "en"))
  )
  want = [i for i in range(N) if IFD[i] < 0.85 and i % 3]
  assert places(store) == [i + 1 for i in want]
  entry = store.stats.sources[str(load.file)]
  dropped = {"fails ifd < 0.85": 7, "fails row.tag == en": 3}
  assert entry.dropped == dropped
  assert entry.rows_in == N
  assert entry.places["fails row.tag == en"] == [
    "rows.jsonl:1", "rows.jsonl:4", "rows.jsonl:7"
  ]  # fmt: skip
  stream.stats.check()
  assert stream.stats.epoch.tokens_trained == store.trained.sum()
  cause = stream.fingerprint_inputs["source 1"]
  assert cause["filter"] == [["ifd", "<", 0.85], ["row.tag", "==", "en"]]
  assert len(cause["scores 1 (rows.jsonl.scores.jsonl)"]) == 64


@pytest.mark.parametrize("op", ["highest", "lowest"])
def test_a_share_is_of_the_rows_that_are_left(load, op):
  score(load.file)
  store, _, _ = load(data__filter=(("nats", ">", 1.55), ("ifd", op, 0.3)))
  left = [i for i in range(N) if 1 + IFD[i] > 1.55]
  want = left[-3:] if op == "highest" else left[:3]
  assert places(store) == [i + 1 for i in want]


@pytest.mark.parametrize("normalize", ["token", "example"])
def test_weights_reach_the_loss_with_a_mean_of_one(load, normalize):
  score(load.file)
  points = ("ifd", (0.2, 1.0), (1.2, 0.0))
  store, stream, told = load(data__weight_by=points, loss__normalize=normalize)
  raw = np.interp(IFD, [0.2, 1.2], [1, 0])
  # What weighs nothing trains nothing: it is dropped and counted.
  kept = np.flatnonzero(raw)
  assert places(store) == (kept + 1).tolist()
  assert store.stats.dropped("weight 0 by ifd") == N - len(kept)
  want = raw[kept] / np.average(raw[kept], weights=store.trained)
  np.testing.assert_allclose(store.weights, want, rtol=1e-6)
  found = {}
  batches = stream.batches()
  for step in range(round(stream.steps_per_epoch + 0.5)):
    batch = next(batches)
    for row, ids in enumerate(stream.rows_of(step)):
      for segment, i in enumerate(ids, 1):
        mine = batch.segment_ids[row] == segment
        found[i] = batch.loss_weights[row][mine].sum()
  per_row = store.trained if normalize == "token" else np.ones(len(kept))
  for i, total in found.items():
    assert total == pytest.approx(per_row[i] * want[i], rel=1e-5)
  assert len(found) == len(kept)
  assert any("by ifd" in line for line in told)


def test_a_column_is_the_weight(load):
  store, _, _ = load(data__weight_by="row.quality")
  raw = np.array([i % 4 / 2 for i in range(N)])
  kept = np.flatnonzero(raw)
  assert places(store) == (kept + 1).tolist()
  want = raw[kept] / np.average(raw[kept], weights=store.trained)
  np.testing.assert_allclose(store.weights, want, rtol=1e-6)


@pytest.mark.parametrize("value", [1e39, 1e-46, -1.0, float("nan")])
def test_weights_that_float32_does_not_hold_are_refused(load, value):
  qualities = [value if i == 2 else 1.0 for i in range(N)]
  rows = [{**row, "quality": x} for row, x in zip(ROWS, qualities, strict=True)]
  tiny.rows_file(load.file, rows)
  with pytest.raises(ValueError, match=r"^rows\.jsonl:3"):
    load(data__weight_by="row.quality")


def test_each_source_has_its_own(load, tmp_path):
  score(load.file)
  other = tiny.rows_file(tmp_path / "other.jsonl", ROWS[:6])
  text = tiny.rows_file(tmp_path / "text.jsonl", [{"text": "A cat."}] * 2)
  store, _, _ = load(
    train=(
      str(load.file),
      {"path": str(other), "filter": (("row.tag", "!=", "en"),)},
      {"path": str(text), "filter": ()},
    ),
    data__filter=("ifd", "<", 0.25),
  )
  by_source = [int((store.source == n).sum()) for n in range(3)]
  assert by_source == [3, 2, 2]
  assert store.weights.tolist() == [1.0] * 7


def test_held_out_rows_are_not_filtered(load):
  score(load.file)
  plain, _, _ = load(data__holdout=0.25)
  store, _, _ = load(data__holdout=0.25, data__filter=("ifd", "<", 0.85))
  assert set(places(store)) == {i for i in places(plain) if IFD[i - 1] < 0.85}
  assert store.stats.total("rows_held_out") == N - len(plain.index)


def test_scores_conditions_and_weights_are_in_the_fingerprint(load):
  score(load.file)
  prints = set()
  for changes in (
    {}, {"data__filter": ("ifd", "<", 0.85)},
    {"data__filter": ("ifd", "<", 0.75)},
    {"data__weight_by": ("ifd", (0.0, 1.0), (9.0, 0.1))},
    {"data__weight_by": ("ifd", (0.0, 1.0), (9.0, 0.2))},
  ):  # fmt: skip
    prints.add(load(**changes)[1].fingerprint)
    again = load(**changes)[1].fingerprint
    assert again in prints
  assert len(prints) == 5
  # The same choice by other scores is another cause, and is refused.
  score(load.file, ifd=[x + 1e-3 for x in IFD])
  changed = load(data__filter=("ifd", "<", 0.85))[1]
  assert changed.fingerprint not in prints


def test_rows_without_scores_or_with_old_ones_are_errors(load):
  choice = {"data__filter": ("ifd", "<", 1.0)}
  with pytest.raises(ValueError, match=r"no such file.*sft-jax score"):
    load(**choice)
  score(load.file, ROWS[:3], IFD[:3])
  with pytest.raises(
    ValueError, match=r"rows\.jsonl:4: got no score.*sft-jax score"
  ):
    load(**choice)
  score(load.file)
  changed = [*ROWS]
  changed[5] = changed[5] | {"output": "Another answer."}
  tiny.rows_file(load.file, changed)
  with pytest.raises(ValueError, match=r"rows\.jsonl:6: got scores of what it"):
    load(**choice)


def test_values_that_are_not_there_or_cannot_be_compared(load):
  rows = [dict(row) for row in ROWS]
  del rows[2]["tag"]
  rows[4]["quality"] = "good"
  rows[7]["quality"] = -1.0
  tiny.rows_file(load.file, rows)
  for changes, said in (
    ({"data__filter": ("row.tag", "==", "en")}, "jsonl:3: got nothing under"),
    ({"data__filter": ("row.quality", "<", 9)}, "jsonl:5: got 'good' under"),
    ({"data__filter": ("row.quality", "lowest", 0.5)}, "jsonl:5: got 'good'"),
    ({"data__weight_by": "row.quality"}, "jsonl:5: got 'good' under"),
  ):
    with pytest.raises(ValueError, match=said):
      load(**changes)
  rows[4]["quality"] = 1.0
  tiny.rows_file(load.file, rows)
  with pytest.raises(ValueError, match=r"jsonl:8: got a weight of -1"):
    load(data__weight_by="row.quality")
  with pytest.raises(ValueError, match=r"got no row that data\.filter"):
    load(data__filter=("row.quality", ">", 99))


def test_raw_text_has_no_ifd_and_says_so(load, tmp_path):
  file = tiny.rows_file(tmp_path / "t.jsonl", [{"text": "A cat."}])
  line = RowScore(
    "t.jsonl:1", shards.content_of({"text": "A cat."}), (2.0, None, None, 3)
  )
  selection.write_scores(selection.scores_path(file), {}, [line])
  with pytest.raises(ValueError, match=r"t\.jsonl:1: got no ifd.*'filter': "):
    load(train=str(file), data__filter=("ifd", "<", 1.0))
  assert len(load(train=str(file), data__filter=("nats", "<", 3))[0].index)


def test_all_examples_of_a_split_row_share_its_fate(tmp_path, tokenizer):
  # 24 tokens a turn: with history=split each turn is an example of its own.
  folder, loaded = tokenizer
  talk = lambda i: {
    "messages": [
      {"role": role, "content": f"The cat {i}{k}."}
      for k in range(2)
      for role in ("user", "assistant")
    ]
  }
  rows = [talk(i) for i in range(4)]
  file = tiny.rows_file(tmp_path / "rows.jsonl", rows)
  score(file, rows, [0.1, 0.2, 0.3, 0.4])
  config = tiny.config(
    tmp_path, folder, file, data__workers=1, data__history="split",
    data__filter=("ifd", "highest", 0.5),
    data__weight_by=("ifd", (0.0, 0.0), (1.0, 1.0)),
  )  # fmt: skip
  store = setup_data.load_stores(config, loaded, lambda line: None).train
  assert places(store) == [3, 3, 4, 4]
  np.testing.assert_allclose(
    store.weights[[0, 2]] / store.weights[0], [1, 4 / 3], rtol=1e-6
  )
  assert store.weights[0] == store.weights[1]
  entry = store.stats.sources[str(file)]
  assert (entry.rows_trained, entry.examples) == (2, 4)
  assert json.loads(json.dumps(entry.dropped)) == {"fails ifd highest 0.5": 2}


def test_the_audit_looks_at_the_rows_that_are_left(load, tmp_path):
  score(load.file)
  store, _, _ = load(data__filter=("ifd", "<", 0.25))
  with row_texts.collect(store, None, folder=tmp_path) as said:
    assert [said.place(i) for i in range(len(said))] == [
      "rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"
    ]  # fmt: skip
    assert said.num_dropped["not selected"] == N - 3


SCORED = [
  RowScore("a.jsonl:1", 7, (1.5, 0.5, 3.0, 4)),
  RowScore("a.jsonl:2", 2**64 - 1, (2.5, None, None, 9)),
]


def test_what_is_written_is_read(tmp_path):
  path = selection.scores_path(tmp_path / "a.jsonl")
  assert path.name == "a.jsonl.scores.jsonl"
  selection.write_scores(path, {"model": "m"}, SCORED)
  before = path.read_bytes()
  found = selection.read_scores(path)
  assert found.by == {"scores": 1, "model": "m"}
  for row in SCORED:
    at = found.find(row.place)
    assert int(found.contents[at]) == row.content
    want = [np.nan if x is None else x for x in row.values]
    np.testing.assert_array_equal(found.values[at, :4], want)
  assert found.find("a.jsonl:3") is None
  selection.write_scores(path, {"model": "m"}, SCORED)
  assert path.read_bytes() == before
  other = selection.scores_path("rows/a.jsonl", tmp_path / "s")
  assert other == tmp_path / "s" / "a.jsonl.scores.jsonl"


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
  path = tmp_path / "a.jsonl.scores.jsonl"
  selection.write_scores(path, {}, SCORED)
  before = path.read_bytes()

  def breaks():
    yield SCORED[0]
    raise OSError("full")

  with pytest.raises(OSError, match="full"):
    selection.write_scores(path, {}, breaks())
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
  "text",
  [
    "", '{"scores": 2}\n', '{"scores": 1}\n{"place": "a"',
    '{"scores": 1}\n{"place": "a", "content": "z"}\n', "[]\n", '"x"\n',
  ],
)  # fmt: skip
def test_what_is_no_file_of_scores_is_refused_with_the_cure(tmp_path, text):
  path = tmp_path / "a.jsonl.scores.jsonl"
  path.write_text(text)
  with pytest.raises(ValueError, match=r"scores\.jsonl:\d.*sft-jax score"):
    selection.read_scores(path)


def test_no_file_and_a_place_twice(tmp_path):
  path = tmp_path / "a.jsonl.scores.jsonl"
  with pytest.raises(ValueError, match="no such file"):
    selection.read_scores(path)
  selection.write_scores(path, {}, [SCORED[0], SCORED[0]])
  with pytest.raises(ValueError, match="a place twice"):
    selection.read_scores(path)


def test_a_glob_takes_rows_and_not_their_scores(tmp_path):
  file = tiny.rows_file(tmp_path / "a.jsonl")
  # Named like scores, but of no file here: these are somebody's rows.
  orphan = tiny.rows_file(tmp_path / "b.jsonl.scores.jsonl")
  selection.write_scores(selection.scores_path(file), {}, SCORED)
  assert files.find_files(tmp_path / "*.jsonl") == [file, orphan]
