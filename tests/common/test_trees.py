"""Trees flatten, match, split and join without losing a leaf."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.common import trees

LEAF_OR_TREE = st.recursive(
  st.integers(),
  lambda children: st.dictionaries(
    st.text("abc_", min_size=1, max_size=3), children, min_size=1, max_size=3
  ),
  max_leaves=12,
)
TREES = LEAF_OR_TREE.filter(lambda x: isinstance(x, dict))


@given(TREES)
def test_flatten_and_back(tree):
  assert trees.unflatten(trees.flatten(tree)) == tree


@given(TREES, st.sampled_from("abc_"))
def test_partition_and_back(tree, letter):
  chosen, others = trees.partition(tree, lambda path: letter in path)
  assert all(letter in path for path in trees.flatten(chosen))
  assert not any(letter in path for path in trees.flatten(others))
  assert trees.merge(chosen, others) == tree


def test_merge_refuses_doubles():
  with pytest.raises(ValueError, match="'a/b'"):
    trees.merge({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}})


def test_first_match_decides_and_none_is_an_error():
  rules = [("q/kernel$", 1), ("kernel$", 2)]
  assert trees.first_match(rules, "attn/q/kernel", "t") == 1
  assert trees.first_match(rules, "mlp/up/kernel", "t") == 2
  with pytest.raises(ValueError, match=r"t: no pattern matches .*'scale'"):
    trees.first_match(rules, "scale", "t")


def test_counts():
  tree = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.zeros(4, np.int8)}}
  assert trees.count(tree) == 10
  assert trees.num_bytes(tree) == 28


def test_examples_of_the_docstrings():
  assert doctest.testmod(trees).failed == 0
