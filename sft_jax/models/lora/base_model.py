"""The base model, among the parameters that train from it.

What does not train is the base's as it stands, and adapters leave their kernels
alone. Whatever else trains is the base's as a copy, under COPIES:

    embed/embedding  layers/...         trained
    base/embed/embedding  base/layers/...    what they were, never trained
"""

from collections.abc import Callable
from typing import Any

from sft_jax.common import trees
from sft_jax.common.trees import Tree
from sft_jax.models.lora.lora import is_adapter

COPIES = "base"
TEACHER = "teacher"  # Parameters of another model, which never train.


def is_copy(path: str) -> bool:
  """True for the leaves that hold what a parameter was, or a teacher's.

  >>> is_copy('base/embed/embedding'), is_copy('embed/embedding')
  (True, False)
  """
  return path.startswith((f"{COPIES}/", f"{TEACHER}/"))


def own(params: Tree) -> Tree:
  """The parameters without copies of the base's, and without a teacher's."""
  others = (COPIES, TEACHER)
  return {name: part for name, part in params.items() if name not in others}


def to_copy(params: Tree, trains: Callable[[str], bool]) -> Tree:
  """The part of `params` of which the base needs copies; may be empty."""
  needed = lambda path: trains(path) and not is_adapter(path)
  return trees.partition(own(params), needed)[0]


def with_copies(params: Tree, copies: Tree) -> Tree:
  """The parameters, and beside them what some of them were."""
  return own(params) | ({COPIES: copies} if copies else {})


def base_of(params: Tree, trains: Callable[[str], bool]) -> Tree | None:
  """The base's parameters, all leaves of `params`; None where a copy is
  missing. With PiSSA the kernels hold what the adapters' start A0 B0 left of
  the base's: A0 and B0 stand as its adapters then."""
  copies = trees.flatten(params.get(COPIES, {}))
  base: dict[str, Any] = {}
  for path, leaf in trees.flatten(own(params)).items():
    if is_adapter(path):
      if path.endswith(("/lora_a0", "/lora_b0")):
        base[path.removesuffix("0")] = leaf
    elif not trains(path):
      base[path] = leaf
    elif path in copies:
      base[path] = copies[path]
    else:
      return None
  return trees.unflatten(base)
