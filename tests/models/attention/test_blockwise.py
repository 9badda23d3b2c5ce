"""Attention in blocks: the laws, over random rows and sizes of blocks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attention_laws as laws
from sft_jax.models.attention import blockwise
from sft_jax.models.attention.attention import first_visible


def of_size(block):
  def attend(q, k, v, segments, sinks, *, window, softcap):
    return blockwise.attend(
      *(q, k, v, first_visible(segments, window), sinks),
      scale=q.shape[-1] ** -0.5,
      softcap=softcap,
      block=block,
    )

  return attend


@st.composite
def cases(draw):
  lengths, T = [], 22
  while sum(lengths) < T and draw(st.booleans()):
    lengths.append(draw(st.integers(1, T - sum(lengths))))
  return laws.Case(
    tuple(lengths),
    T,
    K=draw(st.sampled_from([1, 2, 4])),
    window=draw(st.sampled_from([None, 1, 3, 9])),
    softcap=draw(st.sampled_from([None, 0.7])),
    sinks=draw(st.booleans()),
  )


@given(cases(), st.sampled_from([3, 5, 8, 64]))
@settings(max_examples=12, deadline=None)
def test_values_and_gradients_equal_the_plain_loop(case, block):
  laws.check_values(of_size(block), case)


HARD = [
  laws.Case((9, 1, 7), 22),
  laws.Case((3, 14), 22, window=4, softcap=0.7, sinks=True),
  laws.Case((4, 4, 8, 6), 22, K=1, window=3),
]


@pytest.mark.parametrize("case", HARD)
def test_a_token_moves_only_what_sees_it(case):
  laws.check_isolation(of_size(4), case)


@pytest.mark.parametrize("case", HARD)
def test_packing_changes_nothing(case):
  laws.check_packing(of_size(4), case)
