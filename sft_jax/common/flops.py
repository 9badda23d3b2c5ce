"""Will it fit, and how fast can it be: memory, FLOPs and time of a step.

Memory is what the compiler reserves, exact before the first step. FLOPs are
counted by formula, since XLA's own count takes the body of a loop (scanned
layers, chunks of the loss) once, however often it runs.
"""

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from sft_jax.common import trees


class Chip(NamedTuple):
  """One device as JAX sees it: published peaks, dense bfloat16.

  Attributes:
    flops: multiply and add counted apart, per second.
    memory: bytes of device memory, of which a TPU's compiler keeps a little.
    bandwidth: bytes per second between memory and cores; None: not known.
    links: bytes per second that a device receives from others of its slice
      or host, over all links; None: not known.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float | None = None
  links: float | None = None


# `Device.device_kind` contains the key; the first that does decides, so that a
# kind stands before the shorter one it contains. The vendors' published dense
# figures (half of those "with sparsity"); of the rates only those of TPU v4,
# v5e, v5p and v6e were compared with JAX's own table. Memory of v5e, v5p and
# v6e is what their compiler says is there (15.75, 95.74 and 31.25 GiB). Links
# are published both ways together (for v5e, v5p and v6e 400, 1,200 and 800 GB/s
# in Google Cloud's documentation; v4's was not found there): half is received.
_GiB = 2**30
CHIPS = {
  "TPU v6 lite": Chip("TPU v6e", 918e12, 31.25 * _GiB, 1640e9, 400e9),
  "TPU v6e": Chip("TPU v6e", 918e12, 31.25 * _GiB, 1640e9, 400e9),
  "TPU v5 lite": Chip("TPU v5e", 197e12, 15.75 * _GiB, 819e9, 200e9),
  "TPU v5e": Chip("TPU v5e", 197e12, 15.75 * _GiB, 819e9, 200e9),
  "TPU v5": Chip("TPU v5p", 459e12, 95.74 * _GiB, 2765e9, 600e9),
  "TPU v4 lite": Chip("TPU v4i", 138e12, 8e9),
  "TPU v4": Chip("TPU v4", 275e12, 32e9, 1228e9, 300e9),
  "H200": Chip("H200 SXM", 989.4e12, 141e9, 4800e9, 450e9),
  "H100 PCIe": Chip("H100 PCIe", 756.4e12, 80e9, 2000e9, 64e9),
  "H100 NVL": Chip("H100 NVL", 835.5e12, 94e9, 3900e9, 300e9),
  "H100": Chip("H100 SXM", 989.4e12, 80e9, 3350e9, 450e9),
  "A100-SXM4-40GB": Chip("A100 40 GB", 312e12, 40e9, 1555e9, 300e9),
  "A100-PCIE-40GB": Chip("A100 40 GB", 312e12, 40e9, 1555e9, 32e9),
  "A100": Chip("A100 80 GB", 312e12, 80e9, 2039e9, 300e9),
}


def chip(device_kind: str) -> Chip | None:
  """The chip behind `jax.devices()[0].device_kind`; None if not in the table.

  >>> chip('NVIDIA H100 80GB HBM3').name
  'H100 SXM'
  >>> chip('cpu') is None
  True
  """
  return next((c for kind, c in CHIPS.items() if kind in device_kind), None)


def flops_per_second(device: Any) -> float:
  """The chip's published peak; where none is known, what it does just now.

  That is the best of five float32 products of 1024 x 1024 matrices, a tenth
  of a second on one CPU core.
  """
  known = chip(device.device_kind)
  if known is not None:
    return known.flops
  n = 1024
  x = jax.device_put(np.ones((n, n), np.float32), device)
  product = jax.jit(lambda x: x @ x).lower(x).compile()
  product(x).block_until_ready()
  best = float("inf")
  for _ in range(5):
    started = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - started)
  return 2 * n**3 / best


class Program(NamedTuple):
  """What the compiler says of one program, per device.

  Attributes:
    arguments, outputs, temporaries, aliased: bytes; `aliased` of the outputs
      reuse donated arguments.
    memory: bytes needed at once: arguments + outputs + temporaries - aliased.
    xla_flops, xla_bytes: XLA's counts, a loop's body taken once.
  """

  arguments: int
  outputs: int
  temporaries: int
  aliased: int
  memory: int
  xla_flops: float | None
  xla_bytes: float | None


def program(compiled: jax.stages.Compiled) -> Program:
  """Reads memory and cost of `jax.jit(step).lower(...).compile()`.

  Nothing runs and no array is made: lower with `jax.ShapeDtypeStruct`s.

  Raises ValueError: this backend reports no memory.
  """
  memory = compiled.memory_analysis()
  if memory is None:
    raise ValueError(
      "flops.program: got no memory analysis; expected a backend that reports "
      "it. Compile for CPU, GPU or TPU."
    )
  cost = compiled.cost_analysis() or {}
  sizes = (
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.alias_size_in_bytes,
  )
  needed = sum(sizes[:3]) - sizes[3]
  return Program(*sizes, needed, cost.get("flops"), cost.get("bytes accessed"))


def matmul_params(
  params: trees.Tree,
  is_trained: Callable[[str], bool] = lambda path: True,
  *,
  experts_per_token: int = 0,
) -> tuple[int, int]:
  """Counts the parameters that multiply every token: (trained, frozen).

  These are all kernels, quantised or not, LoRA factors and the head, be it
  tied to the embedding or not; of experts those that a token goes through, and
  the whole router. Looking an embedding up, norms and biases are no matmul.

  `experts_per_token`: how many of the experts [L, E, in, out] multiply a token.
  """
  flat = trees.flatten(params)
  tied = not any(path.startswith("head/") for path in flat)
  head = "embed/embedding" if tied else "head/embedding"
  counts = {True: 0, False: 0}
  for path, leaf in flat.items():
    whole = path.removesuffix("_codes")
    if whole == head or whole.endswith(("/kernel", "/lora_a", "/lora_b")):
      # Of nf4 a byte holds two.
      size = int(np.prod(leaf.shape)) * (2 if leaf.dtype == np.uint8 else 1)
      if re.search("/moe/(gate|up|down)/", path):
        size = size // leaf.shape[1] * experts_per_token
      counts[is_trained(path)] += size
  return counts[True], counts[False]


def mean_context(
  lengths: Iterable[int] | np.ndarray, window: int | None = None
) -> float:
  """Average number of tokens a token attends to, itself included.

  Attention is causal and stays within a document, so a document of n tokens
  holds n (n + 1) / 2 pairs, and not the T^2 of a pack of T. With a
  sliding window of w, a token attends to at most w.

  >>> mean_context([3, 1])  # (1 + 2 + 3) + 1 pairs of 4 tokens
  1.75
  >>> mean_context([3], window=2)  # 1 + 2 + 2
  1.6666666666666667
  """
  n = np.asarray(list(lengths), np.int64)
  near = n if window is None else np.minimum(n, window)
  pairs = near * (near + 1) // 2 + (n - near) * near
  return float(pairs.sum() / n.sum())


def model_flops_per_token(
  *,
  trained_matmul_params: int,
  frozen_matmul_params: int = 0,
  num_layers: int,
  num_heads: int,
  head_dim: int,
  context: float | int,
) -> float | int:
  """FLOPs that training takes per token (not padding), forward and backward.

      6 P_trained + 4 P_frozen + 12 L N H context

  A parameter of a matmul takes 2 FLOPs in the forward pass, 2 for the gradient
  of its input, and, if trained, 2 for its own. Queries against keys and shares
  against values take 2 H each per head and pair; the backward pass is twice
  that. This is PaLM's 6N + 12LHQT (Chowdhery et al. 2022, arXiv:2204.02311,
  appendix B) with T replaced by what is attended to (T there, (T + 1) / 2 in a
  causal row). Recomputation (remat) is not counted, and the head is counted for
  every token, trained on or not, as others count it.

  Args:
    trained_matmul_params, frozen_matmul_params: see `matmul_params`.
    num_heads: query heads. With grouped keys the count is the same.
    context: see `mean_context`.
  """
  matmul = 6 * trained_matmul_params + 4 * frozen_matmul_params
  return matmul + 12 * num_layers * num_heads * head_dim * context


def mfu(
  tokens_per_second: float | int,
  flops_per_token: float | int,
  *,
  num_devices: int,
  chip: Chip | None,
) -> float | None:
  """Model FLOPs utilisation: the share of the chips' peak that is put to use.

  Args:
    tokens_per_second: of all devices together, padding left out.
    flops_per_token: see `model_flops_per_token`.
    chip: None where no peak is known (a CPU); then the result is None too.
  """
  if chip is None:
    return None
  return tokens_per_second * flops_per_token / (num_devices * chip.flops)
