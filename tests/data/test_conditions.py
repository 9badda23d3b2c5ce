"""What data.filter and data.weight_by may say, and what they mean by it."""

import pytest

from sft_jax.data import conditions
from sft_jax.data.sources import Source


def test_declared_forms():
  one = conditions.to_filter(("ifd", "<", 1.0))
  assert one == conditions.to_filter([["ifd", "<", 1.0]])  # As JSON has it.
  assert str(one[0]) == "ifd < 1.0"
  both = conditions.to_filter((("nats", "<", 8), ("row.tag", "==", "en")))
  assert [str(x) for x in both] == ["nats < 8", "row.tag == en"]
  assert conditions.to_filter(()) == ()
  assert conditions.to_weighting(()) is None
  for name in ("row.quality", ("row.quality",)):
    assert conditions.to_weighting(name) == ("row.quality", ())
  points = conditions.to_weighting(("ifd", (0.5, 1), (1.0, 0)))
  assert points == ("ifd", ((0.5, 1.0), (1.0, 0.0)))


@pytest.mark.parametrize(
  ("op", "value", "holds"),
  [
    ("<", 2, True), ("<", 1, False), ("<=", 1, True), (">", 1, False),
    (">=", 1.0, True), ("==", 1, True), ("!=", 1, False),
  ],
)  # fmt: skip
def test_comparisons(op, value, holds):
  assert conditions.Condition("nats", op, value).holds(1.0, "a:1") is holds


def test_a_value_of_another_kind_is_named():
  condition = conditions.Condition("row.tag", "==", "en")
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
