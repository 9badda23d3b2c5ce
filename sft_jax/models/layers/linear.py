"""Linear: y = x W + b, with whatever an adapter adds to it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from sft_jax.models.lora import quantize
from sft_jax.models.lora.lora import LoraConfig, product
from sft_jax.models.remat import PROJECTION

Dtype = Any
# An array [in, out], or the (codes, scale) that stand in for it.
Kernel = Any


class Linear(nn.Module):
  """y = x W + b, and the one place where LoRA lives.

  When `lora_a` [in, R] and `lora_b` [R, out] are beside the kernel (Hu et al.
  2021, arXiv 2106.09685),

      y = x W + s (x' A) B + b                        LoRA
      y = m / |W + s A B| (x W + s (x' A) B) + b      DoRA: `lora_m` [out] too

  where s is the LoraConfig's scale, x' is x after dropout in training (an rng
  'dropout' says that it is), and |.| the norm of each column, a constant to the
  gradient (Liu et al. 2024, arXiv 2402.09353, section 4.3). A B is never
  formed, so neither is a gradient of the kernel's size.

  A frozen kernel may be quantized, see `quantize`. It is decoded where it is
  multiplied, once more in the backward pass, and never kept.
  """

  features: int
  use_bias: bool = False
  init_std: float = 0.02
  lora: LoraConfig | None = None
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    x = x.astype(self.dtype)
    if self.has_variable("params", "kernel_codes"):
      kernel = self._leaf("kernel_codes"), self._leaf("kernel_scale")
    else:
      normal = nn.initializers.normal(self.init_std)
      shape = (x.shape[-1], self.features)
      kernel = self.param("kernel", normal, shape, self.param_dtype)
    y = multiply(x, kernel)
    # Flax ignores parameters nobody asks for; an adapter must not be one.
    if self.has_variable("params", "lora_a"):
      y = self._adapted(x, y, kernel)
    if self.use_bias:
      zeros, shape = nn.initializers.zeros, (self.features,)
      bias = self.param("bias", zeros, shape, self.param_dtype)
      y = y + bias.astype(self.dtype)
    return checkpoint_name(y, PROJECTION)

  def _adapted(self, x: Array, y: Array, kernel: Kernel) -> Array:
    a, b = self._leaf("lora_a"), self._leaf("lora_b")
    scale = adapter_scale(self.lora, self.path)
    if self.lora and self.lora.dropout and self.has_rng("dropout"):
      x = dropout(self.make_rng("dropout"), x, self.lora.dropout)
    # The scale meets the R columns of x A, and not all of the output's.
    y = y + (scale * (x @ a.astype(self.dtype))) @ b.astype(self.dtype)
    if self.has_variable("params", "lora_m"):
      whole, a, b = jax.lax.stop_gradient((dense(kernel), a, b))
      norm = column_norm(whole, a, b, scale)
      y = y * (self._leaf("lora_m") / norm).astype(self.dtype)
    return y

  def _leaf(self, name: str) -> Any:
    return self.get_variable("params", name)


def adapter_scale(lora: LoraConfig | None, path: tuple[str, ...]) -> float:
  """The factor of a module's adapter. Raises ValueError: no LoraConfig."""
  module = "/".join(path)
  if lora is None:
    raise ValueError(
      f"{module}: the parameters hold a LoRA adapter but the model was built "
      "without one; expected lora=LoraConfig(...). Pass it to build, or fold "
      "the adapter in with merge.merge."
    )
  return lora.scale(module)


def dense(kernel: Kernel, dtype: Dtype = jnp.float32) -> Array:
  if isinstance(kernel, tuple):
    codes, scale = kernel
    return quantize.decode(codes, scale, dtype)
  return jnp.asarray(kernel, dtype)


def multiply(x: Array, kernel: Kernel) -> Array:
  """x W in x's dtype, of a kernel that may be quantized."""
  if isinstance(kernel, tuple):
    # Without this the decoded kernels of all layers would wait for the
    # backward pass: as much memory as if nothing were quantized.
    decoded = lambda x, kernel: x @ dense(kernel, x.dtype)
    return jax.checkpoint(decoded)(x, kernel)
  return _product(x, dense(kernel, x.dtype))


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
  """x W, whose gradient of W is written x' dy and not (dy' x)'. Of the second,
  which JAX derives, XLA:CPU transposes dy in memory first: 34 % more time for
  an MLP, forward and backward."""
  return x @ kernel


def _product_gradients(saved: tuple[Array, Array], dy: Array):
  x, kernel = saved
  return dy @ kernel.T, jnp.einsum("...i,...o->io", x, dy)


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_gradients)


def column_norm(
  kernel: Float[Array, "... I O"],
  a: Float[Array, "... I R"],
  b: Float[Array, "... R O"],
  scale: float,
) -> Float32[Array, "... O"]:
  """|W + s A B| of every column, without forming A B. |w + s A b|^2 = |w|^2 +
  b' (2 s A' w + s^2 A' A b) for each column."""
  kernel = kernel.astype(jnp.float32)
  turned = jnp.swapaxes(a, -1, -2)
  mixed = 2 * scale * product(turned, kernel)
  mixed += scale**2 * product(product(turned, a), b)
  square = (kernel**2).sum(-2) + (b.astype(jnp.float32) * mixed).sum(-2)
  return jnp.sqrt(square)


def dropout(key: jax.Array, x: Float[Array, "..."], rate: float) -> jax.Array:
  """x with a share `rate` set to 0 and the rest scaled up to the same mean."""
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0)
