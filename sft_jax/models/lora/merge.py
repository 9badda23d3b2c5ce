"""Adapters folded into their kernels and tables, for export only.

The sum is made in float32. What a narrower dtype then loses is measured: an
update is small beside its kernel.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from sft_jax.common import trees
from sft_jax.common.trees import Tree
from sft_jax.models.lora import quantize
from sft_jax.models.lora.lora import LoraConfig, is_adapter, product


class Merged(NamedTuple):
  """A model without adapters, and what rounding lost of them."""

  params: Tree
  # The largest of the kernels' |stored - exact| / |exact - base|, in Frobenius
  # norms; 0.35 is a third of the training thrown away.
  lost: float
  path: str  # The kernel of `lost`.


def merge(
  params: Tree, lora: LoraConfig | None, *, dtype: Any = None
) -> Merged:
  """Folds every adapter into its kernel and decodes what is quantized.

  A quantized base is decoded, not replaced by what its codes were made of: the
  adapters were trained beside the codes. `dtype` is of the merged kernels; by
  default each one's own, float32 where it was quantized.

  Raises ValueError: adapters without a LoraConfig.
  """
  flat = trees.flatten(params)
  merged, lost, worst = {}, 0.0, ""
  for path, x in flat.items():
    if is_adapter(path) or path.endswith(("kernel_scale", "embedding_scale")):
      continue
    if path.endswith("_codes"):
      path, x = quantize.unpack(flat, path)
    parent = path.rpartition("/")[0]
    if path.endswith("/kernel") and f"{parent}/lora_a" in flat:
      if lora is None:
        raise ValueError(
          "merge: the parameters hold adapters but the model was built "
          "without; expected lora=LoraConfig(...). Pass the model that "
          "trained them."
        )
      leaves = {k: flat.get(f"{parent}/lora_{k}") for k in ADAPTER}
      scale = lora.scale(parent.removeprefix("layers/"))
      x, share = fold(x, leaves, scale, jnp.dtype(dtype or x.dtype))
      if float(share) > lost:
        lost, worst = float(share), path
    if path.endswith("/embedding") and f"{parent}/lora_rows" in flat:
      ids = jnp.array(lora.token_rows if lora else ())
      x = x.astype(dtype or x.dtype)
      x = x.at[ids].set(flat[f"{parent}/lora_rows"].astype(x.dtype))
    merged[path] = x
  return Merged(trees.unflatten(dict(sorted(merged.items()))), lost, worst)


ADAPTER = ("a", "b", "m", "a0", "b0")


def fold(
  kernel: Float[Array, "... I O"],
  leaves: dict[str, Any],
  scale: float,
  dtype: Any,
) -> tuple[Float[Array, "... I O"], Float32[Array, ""]]:
  """(the kernel that the module multiplies by, the share lost to `dtype`)."""
  kernel = kernel.astype(jnp.float32)
  whole = kernel + scale * product(leaves["a"], leaves["b"])
  if leaves["m"] is not None:
    norm = jnp.linalg.norm(whole, axis=-2)
    magnitude = leaves["m"].astype(jnp.float32)
    whole = whole * (magnitude / norm)[..., None, :]
  if leaves["a0"] is not None:
    kernel = kernel + scale * product(leaves["a0"], leaves["b0"])
  stored = whole.astype(dtype)
  error = jnp.linalg.norm((stored.astype(jnp.float32) - whole).ravel())
  change = jnp.linalg.norm((whole - kernel).ravel())
  return stored, jnp.where(change > 0, error / change, 0.0)
