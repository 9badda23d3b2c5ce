"""The self-check of a run, as its config wants it."""

from jax.sharding import Mesh

from sft_jax.common import trees
from sft_jax.training import selfcheck
from sft_jax.training.build.build import Setup
from sft_jax.training.build.data import Config, Say
from sft_jax.training.selfcheck import Finding

MODES = ("auto", "on", "off")
_LONGEST = 128  # Slots of the toy batch: the work of a fraction of a step.


def at_start(config: Config, run_: Setup, params: trees.Tree, say: Say) -> None:
  """The quick form; where config.selfcheck is 'auto', on several devices.

  Raises:
    ValueError: a law does not hold; config.selfcheck is none of MODES.
  """
  if config.selfcheck not in MODES:
    raise ValueError(
      f"selfcheck: got {config.selfcheck!r}, expected one of {MODES}. "
      "Set it to one of these."
    )
  alone = config.selfcheck == "auto" and run_.mesh.size == 1
  if alone or config.selfcheck == "off":
    return
  findings = quick(config, run_, params)
  selfcheck.refuse(findings)
  worst = max(one.difference for one in findings)
  say(
    f"Self-check: {len(findings)} laws hold on {run_.mesh.size} devices, "
    f"largest difference {worst:.1g}."
  )


def quick(config: Config, run_: Setup, params: trees.Tree) -> list[Finding]:
  """What of packing and placement can be measured in seconds."""
  rows, length = toy_shape(config, run_.mesh)
  return selfcheck.quick(
    run_.loss_fn,
    run_.model.hidden,
    params,
    run_.trained,
    put=lambda batch: selfcheck.put(batch, run_.mesh),
    rows=rows,
    length=length,
    vocab_size=run_.model.config.vocab_size,
    dtype=config.model.dtype,
  )


def toy_shape(config: Config, mesh: Mesh) -> tuple[int, int]:
  """(rows, slots): two rows for each part of a batch."""
  # data.seq_len is a multiple of `context`, so half of it need not be.
  length = min(config.data.seq_len, _LONGEST * mesh.shape["context"])
  return 2 * mesh.shape["data"] * mesh.shape["fsdp"], length
