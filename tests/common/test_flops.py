"""FLOPs against hand counts and XLA's own; memory against known sizes."""

import jax
import jax.numpy as jnp
import pytest

from sft_jax.common import flops as fit


def shape(*dims):
  return jax.ShapeDtypeStruct(dims, jnp.float32)


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v4", "TPU v4"),
    ("TPU v5 lite", "TPU v5e"),
    ("TPU v5", "TPU v5p"),
    ("TPU v5p", "TPU v5p"),
    ("TPU v6 lite", "TPU v6e"),
    ("NVIDIA H100 80GB HBM3", "H100 SXM"),
    ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA H200", "H200 SXM"),
    ("TPU7x", "TPU7x, a half"),
    ("NVIDIA H200 NVL", "H200 NVL"),
    ("NVIDIA GH200 480GB", "GH200"),
    ("NVIDIA B200", "B200"),
    ("NVIDIA GB200", "GB200"),
    ("NVIDIA B300 SXM6 AC", "B300"),
    ("NVIDIA L4", "L4"),
    ("NVIDIA L40S", "L40S"),
    ("NVIDIA A10G", "A10G"),
    ("Tesla T4", "T4"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("NVIDIA GeForce RTX 5090", "RTX 5090"),
    (
      "NVIDIA RTX PRO 6000 Blackwell Server Edition",
      "RTX PRO 6000",
    ),
    ("AMD Instinct MI300X", "MI300X"),
    ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
    ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
  ],
)
def test_chip(kind, name):
  found = fit.chip(kind)
  assert found is not None
  assert found.name == name


def test_other_chips_of_similar_names_are_unknown():
  for kind in (
    *("TPU v3", "NVIDIA A10", "NVIDIA A100X", "NVIDIA T400", "NVIDIA L400"),
    *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"),
    *("AMD Instinct MI300A", "Quadro RTX 6000"),
  ):
    assert fit.chip(kind) is None, kind


def test_every_peak_has_a_source_and_is_a_rate_of_its_chip():
  for chip in fit.CHIPS.values():
    assert chip.source, chip
    assert 50e12 < chip.flops < 3e15
    assert chip.fp8 is None or 1 <= chip.fp8 / chip.flops < 2.05
    # What a byte is multiplied by before memory is the limit.
    assert chip.bandwidth is None or 80 < chip.flops / chip.bandwidth < 600


def test_no_peak_no_mfu():
  assert fit.chip("cpu") is None
  assert fit.mfu(1e6, 1e9, num_devices=1, chip=None) is None


def test_flops_per_second():
  class H200:
    device_kind = "NVIDIA H200"

  assert fit.flops_per_second(H200()) == 989.4e12
  # Any machine of these decades lies between.
  assert 1e8 < fit.flops_per_second(jax.devices()[0]) < 1e14


def test_no_kind_hides_behind_a_shorter_one():
  for kind, chip in fit.CHIPS.items():
    assert fit.chip(kind) == chip


def test_mean_context():
  assert fit.mean_context([8]) == 4.5
  assert fit.mean_context([8], window=8) == 4.5
  assert fit.mean_context([8], window=1) == 1
  for window in (None, 1, 3, 5, 100):
    pairs = sum(
      min(i + 1, window or i + 1) for n in (5, 1, 7) for i in range(n)
    )
    assert fit.mean_context([5, 1, 7], window) == pairs / 13


def params(tied):
  tree = {
    "embed": {"embedding": shape(50, 8)},
    "layers": {
      "attn": {
        "q": {
          "kernel": shape(3, 8, 6),
          "bias": shape(3, 6),
          "lora_a": shape(3, 8, 2),
          "lora_b": shape(3, 2, 6),
        },
        "q_norm": {"scale": shape(3, 4)},
      }
    },
    "final_norm": {"scale": shape(8)},
  }
  return tree if tied else {**tree, "head": {"embedding": shape(50, 8)}}


@pytest.mark.parametrize("tied", [True, False])
def test_matmul_params(tied):
  """The head counts once, tied or not; the lookup never does."""
  kernel, lora, head = 3 * 8 * 6, 3 * (8 * 2 + 2 * 6), 50 * 8
  assert fit.matmul_params(params(tied)) == (kernel + lora + head, 0)
  got = fit.matmul_params(params(tied), lambda path: "lora" in path)
  assert got == (lora, kernel + head)


def test_of_experts_those_count_that_a_token_goes_through():
  tree = params(True)
  tree["layers"]["moe"] = {
    "router": {"kernel": shape(3, 8, 5)},
    "gate": {"kernel": shape(3, 5, 8, 7), "bias": shape(3, 5, 7)},
    "down": {"lora_a": shape(3, 5, 7, 2), "lora_b": shape(3, 5, 2, 8)},
  }
  dense, _ = fit.matmul_params(params(True))
  got, _ = fit.matmul_params(tree, experts_per_token=2)
  assert got - dense == 3 * (8 * 5 + 2 * 8 * 7 + 2 * (7 * 2 + 2 * 8))


def test_flops_by_hand():
  """Llama-3-8B at 4,096: the 6N + 12LHQT/2 of the papers."""
  flops = fit.model_flops_per_token(
    trained_matmul_params=7_504_658_432,
    num_layers=32,
    num_heads=32,
    head_dim=128,
    context=fit.mean_context([4096]),
  )
  # 6 * 7.505e9 = 45.03e9; 12 * 32 * 4096 * 2048.5 = 3.222e9.
  assert flops == 45_027_950_592 + 3_222_011_904
  # KempnerForge's published run: an honest 51.1 % on one H200.
  found = fit.mfu(10_471, flops, num_devices=1, chip=fit.chip("NVIDIA H200"))
  assert found == pytest.approx(0.511, abs=1e-3)


L, D, N, H, F, V, T, B = 1, 64, 2, 32, 128, 80, 64, 4
KERNELS = {"qkv": (D, 3 * N * H), "o": (N * H, D), "up": (D, F), "down": (F, D)}


def loss(kernels, head, x):
  """One unmasked attention layer; unrolled, so that XLA sees every matmul."""
  q, k, v = jnp.split((x @ kernels["qkv"]).reshape(B, T, 3 * N, H), 3, axis=2)
  scores = jnp.einsum("BTNH,BSNH->BNTS", q, k)
  mixed = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v)
  x = x + mixed.reshape(B, T, N * H) @ kernels["o"]
  x = x + jnp.tanh(x @ kernels["up"]) @ kernels["down"]
  return jnp.sum(jax.nn.logsumexp(x @ head, axis=-1))


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_agree_with_xla(frozen):
  """Less by at most 5 %: XLA counts the elementwise work too, a little.

  The scores here are not masked, so the context is T, as in PaLM's formula.
  `x` stands for an embedded input whose own gradient is wanted.
  """
  kernels = {name: shape(*dims) for name, dims in KERNELS.items()}
  argnums = (1, 2) if frozen else (0, 1, 2)  # The head trains either way.
  step = jax.jit(jax.grad(loss, argnums))
  compiled = step.lower(kernels, shape(D, V), shape(B, T, D)).compile()
  body = sum(a * b for a, b in KERNELS.values())
  per_token = fit.model_flops_per_token(
    trained_matmul_params=D * V + (0 if frozen else body),
    frozen_matmul_params=body if frozen else 0,
    num_layers=L,
    num_heads=N,
    head_dim=H,
    context=T,
  )
  xla_flops = compiled.cost_analysis()["flops"]
  assert 1 <= xla_flops / (per_token * B * T) < 1.05


def test_memory_of_a_known_program():
  """A donated megabyte in, a megabyte out: one, not two."""

  def double(x):
    return 2 * x

  x = shape(512, 512)
  size = 512 * 512 * 4
  plain = fit.program(jax.jit(double).lower(x).compile())
  assert (plain.arguments, plain.outputs, plain.aliased) == (size, size, 0)
  assert plain.memory == 2 * size + plain.temporaries
  donated = fit.program(jax.jit(double, donate_argnums=0).lower(x).compile())
  assert donated.aliased == size
  assert donated.memory == size + donated.temporaries


def test_xla_counts_a_loop_once():
  """Why the FLOPs come from a formula; if this fails, read them from XLA."""

  def scan(kernels, x):
    return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

  def flops(layers):
    lowered = jax.jit(scan).lower(shape(layers, 64, 64), shape(64, 64))
    return lowered.compile().cost_analysis()["flops"]

  assert flops(8) < 2 * flops(2)


def test_mfu():
  chip = fit.Chip("toy", flops=100.0, memory=1.0)
  assert fit.mfu(5, 8, num_devices=2, chip=chip) == 0.2
