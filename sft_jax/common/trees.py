"""Parameter trees as flat {path: leaf}: matching, splitting and counting.

A path is the keys of a nested dict joined by '/', such as
'layers/attn/q/kernel'. Whatever speaks of parameters by name (weight decay,
freezing, sharding, LoRA, Hugging Face keys) is a list of `(pattern, value)`
rules over these paths: the first pattern that matches *anywhere* in the path
(`re.search`) decides.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

Tree = dict[str, Any]
V = TypeVar("V")


def flatten(tree: Tree) -> dict[str, Any]:
  """Returns {path: leaf} in sorted order of paths.

  >>> flatten({'a': {'c': 2, 'b': 1}})
  {'a/b': 1, 'a/c': 2}
  """

  def walk(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
      yield prefix[:-1], node
      return
    for key in node:
      if "/" in key:
        raise ValueError(f"parameter name {key!r} contains '/'")
      yield from walk(f"{prefix}{key}/", node[key])

  return dict(sorted(walk("", tree)))


def unflatten(flat: dict[str, Any]) -> Tree:
  """Inverse of `flatten`.

  >>> unflatten({'a/b': 1, 'a/c': 2})
  {'a': {'b': 1, 'c': 2}}
  """
  tree: Tree = {}
  for path, leaf in flat.items():
    node = tree
    *parents, last = path.split("/")
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def map_paths(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
  return unflatten({path: fn(path, x) for path, x in flatten(tree).items()})


def first_match(rules: Sequence[tuple[str, V]], path: str, what: str) -> V:
  """The value of the first rule whose pattern occurs in `path`. Raises
  ValueError: no rule matches; `what` names the table in the message."""
  for pattern, value in rules:
    if re.search(pattern, path):
      return value
  raise ValueError(
    f"{what}: no pattern matches parameter {path!r}; expected one of "
    f"{[pattern for pattern, _ in rules]}. Add a rule for it."
  )


def matches_any(patterns: Iterable[str], path: str) -> bool:
  return any(re.search(pattern, path) for pattern in patterns)


def partition(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
  """Splits a tree in two by path: (chosen leaves, the others).

  >>> partition({'a': 1, 'b': {'c': 2}}, lambda path: path == 'a')
  ({'a': 1}, {'b': {'c': 2}})
  """
  parts: tuple[dict, dict] = ({}, {})
  for path, x in flatten(tree).items():
    parts[0 if chosen(path) else 1][path] = x
  return unflatten(parts[0]), unflatten(parts[1])


def merge(*trees: Tree) -> Tree:
  """Joins trees with disjoint leaves; the inverse of `partition`."""
  flat: dict[str, Any] = {}
  for tree in trees:
    part = flatten(tree)
    if both := flat.keys() & part.keys():
      raise ValueError(f"merge: leaves given twice: {sorted(both)}")
    flat |= part
  return unflatten(dict(sorted(flat.items())))


def count(tree: Any) -> int:
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
  """Size of all leaves in bytes, sharding ignored."""
  leaves = jax.tree.leaves(tree)
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves)
