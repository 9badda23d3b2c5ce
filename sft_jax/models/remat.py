"""What the backward pass may keep of a block's forward pass, by name.

With D the width, A = N H that of attention's output, P the sum of the widths of
all projections, per token and layer:

    none        all but      again: the inside of norms and activations, which
                             `block` never keeps
    norms       D + P + A    again: norms, rotations, activations
    attention   D + A        again: projections too; attention itself is not,
                             where its backend keeps its log-sum-exp
    full        D            again: the whole block
    offload     0            as 'attention', kept in the host's memory
"""

from collections.abc import Callable
from typing import Any

import jax

BLOCK_INPUT = "block_input"
PROJECTION = "projection"
# Backends with a backward pass of their own keep a log-sum-exp with the output.
ATTENTION = ("attention_out", "attention_lse")

LEVELS = ("none", "norms", "attention", "full", "offload")


def checkpointed(
  level: str, step: Callable[..., Any], *, scan: bool
) -> Callable[..., Any]:
  """`step` such that its backward pass keeps only what the level says. Raises
  ValueError: see `check_level`."""
  check_level(level)
  policies = jax.checkpoint_policies
  policy = {
    "none": None,
    "norms": policies.save_only_these_names(PROJECTION, *ATTENTION),
    "attention": policies.save_only_these_names(*ATTENTION),
    "full": policies.nothing_saveable,
    "offload": policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[BLOCK_INPUT, *ATTENTION],
      offload_src="device",
      offload_dst="pinned_host",
    ),
  }[level]
  if policy is None:
    return step
  # Inside a scan nothing can merge the second forward pass into the first, so
  # the barrier against it is not needed.
  return jax.checkpoint(step, policy=policy, prevent_cse=not scan)


def check_level(level: str) -> None:
  """Raises ValueError unless the level is known and this backend has it."""
  if level not in LEVELS:
    raise ValueError(
      f"build: remat is {level!r}; expected one of {LEVELS}. "
      "Set model.remat to one of them."
    )
  device = jax.devices()[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if level == "offload" and "pinned_host" not in kinds:
    raise ValueError(
      f"build: remat is 'offload' on {device.device_kind}, whose memories are "
      f"{kinds}; expected 'pinned_host' among them. Set model.remat to "
      "'full', or to another of the levels before it."
    )
