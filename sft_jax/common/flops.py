"""Will it fit, and how fast can it be: memory, FLOPs and time of a step.

Memory is what the compiler reserves, exact before the first step. FLOPs are
counted by formula: XLA's own count takes the body of a loop (scanned layers,
chunks of the loss) once.
"""

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from sft_jax.common import trees


class Chip(NamedTuple):
  """One device as JAX sees it: published peaks, dense bfloat16."""

  name: str
  flops: float  # Multiply and add counted apart, per second.
  memory: float  # Bytes, of which a TPU's compiler keeps a little.
  bandwidth: float | None = None  # Bytes per second of memory; None: unknown.
  # Bytes per second that a device receives from others of its slice or host,
  # over all links; None: not known.
  links: float | None = None
  fp8: float | None = None  # The peak of float8 products; None: it has none.
  network: float | None = None  # Likewise from other slices.
  source: str = ""  # Where the figures were published; '' = they were not.


_GiB = 2**30
_TPU = "cloud.google.com/tpu/docs"
_NVIDIA = "NVIDIA's data sheet of "
_ADA = "NVIDIA Ada GPU architecture, appendix A"
_RTX = "NVIDIA RTX Blackwell GPU architecture, appendix A"


def _chip(
  name: str,
  tflops: float,
  memory: float,
  bandwidth: float | None = None,
  links: float | None = None,
  fp8: float | None = None,
  *,
  network: float | None = None,
  source: str = "",
) -> Chip:
  """Rates in 1e12 FLOPs and 1e9 bytes per second."""
  giga = lambda x: None if x is None else x * 1e9
  return Chip(
    *(name, tflops * 1e12, memory, giga(bandwidth), giga(links)),
    fp8=None if fp8 is None else fp8 * 1e12,
    network=giga(network),
    source=source or _NVIDIA + name,
  )


_V6E = _chip(
  *("TPU v6e", 918, 31.25 * _GiB, 1640, 400, 918),
  network=12.5,
  source=f"{_TPU}/v6e",
)
_V5E = _chip("TPU v5e", 197, 15.75 * _GiB, 819, 200, source=f"{_TPU}/v5e")
_V5P = _chip(
  *("TPU v5p", 459, 95.74 * _GiB, 2765, 600, 459),
  network=6.25,
  source=f"{_TPU}/v5p",
)
# `Device.device_kind` contains the key; the first that does decides, so that a
# kind stands before the shorter one it contains. The vendors' published dense
# figures: half of those "with sparsity", and of cards for screens the rates
# that sum in float32. Memory of v5e, v5p and v6e is what their compiler says is
# there. JAX shows the two halves of a TPU7x as devices. Links and NVLink are
# published both ways together: half is received.
CHIPS = {
  "TPU7x": _chip(
    *("TPU7x, a half", 2307 / 2, 96 * _GiB, 7380 / 2, 300, 4614 / 2),
    network=6.25,
    source=f"{_TPU}/tpu7x",
  ),
  "TPU v6 lite": _V6E,
  "TPU v6e": _V6E,
  "TPU v5 lite": _V5E,
  "TPU v5e": _V5E,
  "TPU v5p": _V5P,
  "TPU v5": _V5P,
  "TPU v4 lite": _chip("TPU v4i", 138, 8e9, source="arXiv:2104.13835"),
  "TPU v4": _chip("TPU v4", 275, 32e9, 1228, 300, source=f"{_TPU}/v4"),
  "GB300": _chip("GB300", 2500, 288e9, 8000, 900, 5000),
  "B300": _chip("B300", 2250, 288e9, 8000, 900, 4500),
  "GB200": _chip("GB200", 2500, 186e9, 8000, 900, 5000),
  "B200": _chip("B200", 2250, 180e9, 8000, 900, 4500),
  "GH200": _chip("GH200", 989.4, 96e9, 4000, 450, 1978.9),
  "H200 NVL": _chip("H200 NVL", 835.5, 141e9, 4800, 450, 1671),
  "H200": _chip("H200 SXM", 989.4, 141e9, 4800, 450, 1978.9),
  "H100 PCIe": _chip("H100 PCIe", 756.4, 80e9, 2000, 64, 1513),
  "H100 NVL": _chip("H100 NVL", 835.5, 94e9, 3900, 300, 1671),
  "H100": _chip("H100 SXM", 989.4, 80e9, 3350, 450, 1978.9),
  "A100-SXM4-40GB": _chip("A100 40 GB", 312, 40e9, 1555, 300),
  "A100-PCIE-40GB": _chip("A100 40 GB", 312, 40e9, 1555, 32),
  "A100": _chip("A100 80 GB", 312, 80e9, 2039, 300),
  "L40S": _chip("L40S", 362.05, 48e9, 864, 32, 733),
  "L40": _chip("L40", 181.05, 48e9, 864, 32, 362),
  "L4": _chip("L4", 121, 24e9, 300, 32, 242.5),
  "A10G": _chip("A10G", 70, 24e9, 600, 32),
  # It has no bfloat16; the rate is float16's.
  "Tesla T4": _chip("T4", 65, 16e9, 320, 16),
  "RTX 4090": _chip("RTX 4090", 165.2, 24e9, 1008, 32, 330.3, source=_ADA),
  "RTX 5090": _chip("RTX 5090", 209.5, 32e9, 1792, 64, 419, source=_RTX),
  "RTX PRO 6000 Blackwell": _chip(
    *("RTX PRO 6000", 503.8, 96e9, 1597, 64, 1007.6), source=_RTX
  ),
  "MI300X": _chip(
    *("MI300X", 1307.4, 192e9, 5300, 448, 2614.9),
    source="AMD's data sheet of Instinct MI300X",
  ),
}


def chip(device_kind: str) -> Chip | None:
  """The chip behind `jax.devices()[0].device_kind`; None if not in the table.

  >>> chip('NVIDIA H100 80GB HBM3').name
  'H100 SXM'
  >>> chip('cpu') is None
  True
  """
  # An A100X is another chip, as are RTX cards for laptops and the 4090 D.
  if re.search(r"Laptop| D\b", device_kind):
    return None
  found = (
    one
    for kind, one in CHIPS.items()
    if re.search(rf"(?<!\w){re.escape(kind)}(?![^\W_])", device_kind)
  )
  return next(found, None)


def flops_per_second(device: Any) -> float:
  """The chip's published peak; where none is known, what it does just now: the
  best of five float32 products of 1024 x 1024 matrices."""
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
  """What the compiler says of one program, per device, in bytes."""

  arguments: int
  outputs: int
  temporaries: int
  aliased: int  # Of the outputs, in donated arguments.
  memory: int  # At once: arguments + outputs + temporaries - aliased.


def program(compiled: jax.stages.Compiled) -> Program:
  """Memory of `jax.jit(step).lower(...).compile()`; nothing runs.
  Raises ValueError: this backend reports no memory."""
  memory = compiled.memory_analysis()
  if memory is None:
    raise ValueError(
      "flops.program: got no memory analysis; expected a backend that reports "
      "it. Compile for CPU, GPU or TPU."
    )
  arguments, outputs, temporaries, aliased = (
    getattr(memory, f"{kind}_size_in_bytes")
    for kind in ("argument", "output", "temp", "alias")
  )
  needed = arguments + outputs + temporaries - aliased
  return Program(arguments, outputs, temporaries, aliased, needed)


def matmul_params(
  params: trees.Tree,
  is_trained: Callable[[str], bool] = lambda path: True,
  *,
  experts_per_token: int = 0,
) -> tuple[int, int]:
  """Counts the parameters that multiply every token: (trained, frozen).

  All kernels, quantized or not, LoRA factors, the router and the head, be it
  tied to the embedding or not; of the experts [L, E, in, out] the
  `experts_per_token`. Looking an embedding up, norms and biases are no matmul.
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

  Attention stays within a document: of n tokens it has n (n + 1) / 2 pairs.
  With a sliding window of w, a token attends to at most w.

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
  state_params: int = 0,
) -> float | int:
  """FLOPs that training takes per token (not padding), forward and backward.

      6 P_trained + 4 P_frozen + 12 L N H context + 6 P_state

  A parameter of a matmul takes 2 FLOPs in the forward pass, 2 for the gradient
  of its input, and, if trained, 2 for its own. Queries against keys and shares
  against values take 2 H each per head and pair; the backward pass is twice
  that. This is PaLM's 6N + 12LHQT (Chowdhery et al. 2022, arXiv:2204.02311,
  appendix B) with T replaced by what is attended to (T there, (T + 1) / 2 in a
  causal row). Recomputation is not counted, and the head is counted for every
  token, as others count it.

  `num_layers` are those of attention; `context`: see `mean_context`;
  `state_params`: numbers of the states of recurrent layers, once for each
  product with a token's vectors.
  """
  matmul = 6 * trained_matmul_params + 4 * frozen_matmul_params
  attention = 12 * num_layers * num_heads * head_dim * context
  return matmul + attention + 6 * state_params


def mfu(
  tokens_per_second: float | int,
  flops_per_token: float | int,
  *,
  num_devices: int,
  chip: Chip | None,
) -> float | None:
  """Model FLOPs utilisation: the share of the chips' peak that is put to use,
  by the tokens of all devices, padding left out; None where no peak is known (a
  CPU)."""
  if chip is None:
    return None
  return tokens_per_second * flops_per_token / (num_devices * chip.flops)
