"""Sources in every form, and the copies that give them their shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_store import fake_store
from sft_jax.data import sources
from sft_jax.data.conversation import Conversation
from sft_jax.data.pipeline import Stream
from sft_jax.data.sources import Source, solve_copies, to_sources


def test_sources_in_every_form():
  one = Source("a.jsonl")
  assert to_sources("a.jsonl") == to_sources(one) == (one,)
  assert to_sources(["a.jsonl", ("b/*.json", 2)]) == (
    one,
    Source("b/*.json", 2),
  )
  assert to_sources(("a.jsonl", 0.5)) == (Source("a.jsonl", 0.5),)
  assert to_sources(("a.jsonl", "b.jsonl"))[1].path == "b.jsonl"
  everything = {
    "path": "a.jsonl",
    "share": 0.5,
    "limit": 10,
    "loss_weight": 0.1,
    "format": "text",
    "columns": {"body": "text"},
    "name": "replay",
  }
  (made,) = to_sources(everything)
  assert made == Source(**everything)
  assert made.label == "replay"


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ((), "data sources: got"),
    (("a.jsonl", "a.jsonl"), "of different names"),
    ((("a.jsonl", 0.0),), "repeat 0.0"),
    ({"path": "a.jsonl", "limit": 0}, "limit 0"),
    ({"path": "a.jsonl", "loss_weight": -1}, "loss_weight -1"),
    ({"path": "a.jsonl", "loss_weight": 1e39}, "loss_weight 1e\\+39"),
    ({"path": "a.jsonl", "loss_weight": 1e-46}, "loss_weight 1e-46"),
    ({"path": "a.jsonl", "share": 0.5, "repeat": 2}, "share 0.5 and repeat 2"),
    ({"path": "a.jsonl", "share": 1.5}, "share 1.5"),
    ({"path": "a.jsonl", "weight": 2}, "got keys"),
    ({"repeat": 2}, "neither path nor rows"),
  ],
)
def test_sources_that_make_no_sense(bad, message):
  with pytest.raises(ValueError, match=message):
    to_sources(bad)


def test_rows_in_memory_instead_of_a_path():
  rows = [{"text": "a", "array": np.arange(2000)}, Conversation(text="b")]
  one = Source(rows=iter(rows))
  assert (one.label, one.files()) == ("rows", [])
  assert list(one.read(print)) == [("rows[0]", rows[0]), ("rows[1]", rows[1])]
  assert one.rows.digest == Source(rows=rows).rows.digest
  # numpy prints only the ends of a long array.
  other = np.arange(2000)
  other[1000] = 7
  changed = [{"text": "a", "array": other}, rows[1]]
  assert one.rows.digest != Source(rows=changed).rows.digest
  assert one.rows.digest != Source(rows=rows[::-1]).rows.digest
  with pytest.raises(ValueError, match="got both path and rows"):
    Source("a.jsonl", rows=rows)
  for bad in (object(), float("nan"), {"a": [float("inf")]}):
    with pytest.raises(ValueError, match=r"rows\[1\]: got a value that JSON"):
      Source(rows=[{"text": "a"}, {"text": "b", "bad": bad}])


def test_the_pictured_mixtures():
  big, small = Source("big"), Source("small")
  thrice = Source("small", repeat=3)
  assert solve_copies([big, thrice], [3000, 1000]) == (1, 3)
  filled = Source("small", share=0.4)
  assert solve_copies([big, filled], [3000, 1000]) == (1, pytest.approx(2))
  half = [Source(name, share=0.5) for name in ("big", "small")]
  assert solve_copies(half, [3000, 1000]) == (2 / 3, 2)
  assert solve_copies([big, small], [3000, 0]) == (1, 1)


@given(
  tokens=st.lists(st.integers(1, 10**6), min_size=2, max_size=6),
  shares=st.lists(st.integers(0, 9), min_size=6, max_size=6),
  rest=st.integers(1, 9),
)
def test_solved_copies_give_the_shares(tokens, shares, rest):
  """The first source has no share, and any of the others may have one."""
  whole = sum(shares[: len(tokens) - 1]) + rest
  sources = [Source("0")]
  for i, part in enumerate(shares[: len(tokens) - 1], 1):
    sources.append(Source(str(i), share=part / whole if part else None))
  copies = solve_copies(sources, tokens)
  seen = [c * n for c, n in zip(copies, tokens, strict=True)]
  for source, number in zip(sources, seen, strict=True):
    if source.share is not None:
      assert number / sum(seen) == pytest.approx(source.share)


@pytest.mark.parametrize(
  ("sources", "tokens", "message"),
  [
    ([Source("a"), Source("b", share=1.0)], [1, 1], "sum to 1; expected less"),
    ([Source("a", share=0.5), Source("b", share=0.4)], [1, 1], "sum to 0.9"),
    ([Source("a"), Source("b", share=0.5)], [1, 0], "source b: got share"),
    ([Source("a"), Source("b", share=0.5)], [0, 1], "source b: got share"),
  ],
)
def test_shares_that_cannot_be(sources, tokens, message):
  with pytest.raises(ValueError, match=message):
    solve_copies(sources, tokens)


def test_the_ledger_has_what_came_of_it():
  """100 rows of 10 tokens, 50 of 8; half of each is trained, or a quarter."""
  rows = [([1] * 10, [0] * 5 + [1] * 5)] * 100
  rows += [([1] * 8, [0] * 6 + [1] * 2)] * 50
  sources = (Source("a"), Source("b", share=0.25, name="mine", loss_weight=0.5))
  store = fake_store(rows, source=[0] * 100 + [1] * 50, sources=sources)
  stream = Stream(store, seq_len=32, batch_size=4, epochs=1)
  mixture = stream.stats.epoch.mixture
  # 1000 tokens are three quarters, so the other 333 are 42 of the 50 rows.
  assert mixture["mine"].tokens == 42 * 8
  assert mixture["mine"].copies == pytest.approx(333.33 / 400, rel=1e-3)
  assert mixture["mine"].share == 336 / 1336
  assert mixture["mine"].trained_share == 84 / 584
  stream.stats.check()
  lines = stream.stats.lines()
  assert lines[2].split()[-2:] == ["25.1%", "14.4%"]
  assert lines[-2] == "mine: seen 0.833333 times per epoch, loss x 0.5"
  weights = [b.loss_weights for b in stream.batches()]
  assert sum(w.sum() for w in weights) == 500 + 84 * 0.5


def test_declared_forms():
  one = sources.to_filter(("ifd", "<", 1.0))
  assert one == sources.to_filter([["ifd", "<", 1.0]])  # As JSON has it.
  assert str(one[0]) == "ifd < 1.0"
  both = sources.to_filter((("nats", "<", 8), ("row.tag", "==", "en")))
  assert [str(x) for x in both] == ["nats < 8", "row.tag == en"]
  assert sources.to_filter(()) == ()
  assert sources.to_weighting(()) is None
  for name in ("row.quality", ("row.quality",)):
    assert sources.to_weighting(name) == ("row.quality", ())
  points = sources.to_weighting(("ifd", (0.5, 1), (1.0, 0)))
  assert points == ("ifd", ((0.5, 1.0), (1.0, 0.0)))


@pytest.mark.parametrize(
  ("op", "value", "holds"),
  [
    ("<", 2, True), ("<", 1, False), ("<=", 1, True), (">", 1, False),
    (">=", 1.0, True), ("==", 1, True), ("!=", 1, False),
  ],
)  # fmt: skip
def test_comparisons(op, value, holds):
  assert sources.Condition("nats", op, value).holds(1.0, "a:1") is holds


def test_a_value_of_another_kind_is_named():
  condition = sources.Condition("row.tag", "==", "en")
  with pytest.raises(ValueError, match=r"a\.jsonl:3: got 7 under row\.tag"):
    condition.holds(7, "a.jsonl:3")


@pytest.mark.parametrize(
  "bad",
  [
    ("ifd", "<"), (("ifd", "<", None),), (("ifd", "~", 1.0),),
    (("ifd", "highest", 0),), (("ifd", "highest", 1.5),),
    (("perplexity", "<", 1.0),), (("row.", "<", 1.0),), "ifd < 1",
  ],
)  # fmt: skip
def test_a_filter_that_is_none_is_refused_where_it_stands(bad):
  with pytest.raises(ValueError, match=r"data\.filter: got"):
    Source("a.jsonl", filter=bad)


@pytest.mark.parametrize(
  "bad",
  [
    ("ifd", (0.5, 1.0)), ("ifd", (0.5, 1.0), (0.5, 0.0)),
    ("ifd", (0.5, 1.0), (1.0, -0.1)), ("ifd", 0.5, 1.0), "quality",
    ("ifd", (0.1, 1.0), (0.2, 0.0), (0.3, 1.0)),
    ("ifd", (0.1, float("nan")), (0.2, 0.0)),
  ],
)  # fmt: skip
def test_a_weighting_that_is_none_is_refused_where_it_stands(bad):
  with pytest.raises(ValueError, match=r"data\.weight_by: got"):
    Source("a.jsonl", weight_by=bad)
