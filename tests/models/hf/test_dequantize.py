"""Weights in few bits: read as their formats say, number by number."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sft_jax.common import trees
from sft_jax.models import transformer
from sft_jax.models.config import parse_config
from sft_jax.models.hf import load_save, safetensors_files
from sft_jax.models.hf.dequantize import dequantized
from sft_jax.models.hf.safetensors_files import read_header, save_tensors

GOLDENS = Path(__file__).parents[1] / "goldens"
OUT, IN, GROUP = 48, 64, 16
RNG = np.random.default_rng(5)
F8 = ml_dtypes.float8_e4m3fn


def word(fields, bits):
  """Fields packed into one 32-bit word, the first in the lowest bits."""
  total = sum(int(x) << (bits * i) for i, x in enumerate(fields))
  return np.array(total, np.uint64).astype(np.uint32).view(np.int32)


def scales(*shape):
  return RNG.uniform(0.01, 0.1, shape).astype(np.float16)


def draw(high, *shape):
  return RNG.integers(0, high, shape)


def gptq(bits=4, order=False, offset=1):
  per, q = 32 // bits, draw(1 << bits, IN, OUT)
  z, s = draw((1 << bits) - 1, IN // GROUP, OUT), scales(IN // GROUP, OUT)
  group = np.arange(IN) // GROUP
  if order:
    group = RNG.permutation(group)
  want = np.zeros((OUT, IN))
  for o in range(OUT):
    for i in range(IN):
      zero = float(z[group[i], o] + offset)
      want[o, i] = (float(q[i, o]) - zero) * float(s[group[i], o])
  columns = q.reshape(IN // per, per, OUT)
  rows = z.reshape(-1, OUT // per, per)
  return {
    "m.qweight": np.stack(
      [[word(c[:, o], bits) for o in range(OUT)] for c in columns]
    ),
    "m.qzeros": np.stack([[word(w, bits) for w in r] for r in rows]),
    "m.scales": s,
    "m.g_idx": group.astype(np.int32),
  }, want


def awq():
  q, z = draw(16, IN, OUT), draw(16, IN // GROUP, OUT)
  s = scales(IN // GROUP, OUT)
  want = np.zeros((OUT, IN))
  for o in range(OUT):
    for i in range(IN):
      g = i // GROUP
      want[o, i] = (float(q[i, o]) - float(z[g, o])) * float(s[g, o])

  def pack(x):
    # AutoAWQ's order: word j has outputs 8j + (0, 2, 4, 6, 1, 3, 5, 7).
    eights = x.reshape(len(x), OUT // 8, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return np.stack([[word(w, 4) for w in row] for row in eights])

  return {"m.qweight": pack(q), "m.qzeros": pack(z), "m.scales": s}, want


def packed(bits=4, zeros=False, order=False, group=GROUP):
  per, half = 32 // bits, 1 << (bits - 1)
  q = draw(1 << bits, OUT, IN) - half
  n = IN // group
  s = RNG.uniform(0.01, 0.1, (OUT, n)).astype(ml_dtypes.bfloat16)
  z = draw(1 << bits, OUT, n) - half if zeros else np.zeros((OUT, n), int)
  by = np.arange(IN) // group
  if order:
    by = RNG.permutation(by)
  want = np.zeros((OUT, IN))
  for o in range(OUT):
    for i in range(IN):
      want[o, i] = float(q[o, i] - z[o, by[i]]) * float(s[o, by[i]])
  words = (q + half).reshape(OUT, IN // per, per)
  tensors = {
    "m.weight_packed": np.stack([[word(w, bits) for w in r] for r in words]),
    "m.weight_scale": s,
    "m.weight_shape": np.array([OUT, IN]),
  }
  if zeros:
    z = (z + half).reshape(OUT // per, per, n)
    z = [[word(c[:, i], bits) for i in range(n)] for c in z]
    tensors["m.weight_zero_point"] = np.stack(z)
  if order:
    tensors["m.weight_g_idx"] = by.astype(np.int32)
  return tensors, want


def fp8(kind):
  w = RNG.standard_normal((OUT, IN)).astype(np.float32).astype(F8)
  name, shape, size = {
    "block": ("m.weight_scale_inv", (3, 3), (20, 28)),
    "one": ("m.weight_scale_inv", (), (OUT, IN)),
    "tensor": ("m.weight_scale", (1,), (OUT, IN)),
    "row": ("m.weight_scale", (OUT, 1), (1, IN)),
  }[kind]
  s = np.asarray(RNG.uniform(0.1, 2, shape), np.float32)
  want = np.zeros((OUT, IN))
  grid = s.reshape(shape if len(shape) == 2 else (1, 1))
  for o in range(OUT):
    for i in range(IN):
      want[o, i] = float(w[o, i]) * float(grid[o // size[0], i // size[1]])
  return {"m.weight": w, name: s, "m.input_scale": np.ones(1, "f4")}, want


def int8(kind):
  w = (draw(255, OUT, IN) - 127).astype(np.int8)
  s = RNG.uniform(0.1, 2, (OUT, 1)).astype(np.float32)
  if kind == "bitsandbytes":
    tensors = {"m.weight": w, "m.SCB": s[:, 0]}
    return tensors, w.astype(float) * s.astype(float) / 127
  return {"m.weight": w, "m.weight_scale": s}, w.astype(float) * s.astype(float)


def nf4(nested):
  table = np.sort(RNG.standard_normal(16)).astype(np.float32)
  q, block = draw(16, OUT * IN), 64
  byte = (q[0::2] << 4 | q[1::2]).astype(np.uint8)
  n = OUT * IN // block
  says = {
    **{"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16"},
    "shape": [OUT, IN],
  }
  if nested:
    codes = draw(256, n).astype(np.uint8)
    outer_table = RNG.standard_normal(256).astype(np.float32)
    outer = RNG.uniform(1, 2, -(-n // 16)).astype(np.float32)
    says |= {"nested_blocksize": 16, "nested_offset": 0.25}
    absmax = [
      float(outer_table[c]) * float(outer[i // 16]) + 0.25
      for i, c in enumerate(codes)
    ]
    more = {
      **{"m.weight.absmax": codes, "m.weight.nested_absmax": outer},
      "m.weight.nested_quant_map": outer_table,
    }
  else:
    absmax = RNG.uniform(0.1, 2, n).astype(np.float32)
    more = {"m.weight.absmax": absmax}
  want = [float(table[c]) * float(absmax[i // block]) for i, c in enumerate(q)]
  state = np.frombuffer(json.dumps(says).encode(), np.uint8)
  return {
    **{"m.weight": byte[:, None], "m.weight.quant_map": table},
    "m.weight.quant_state.bitsandbytes__nf4": state,
    **more,
  }, np.reshape(want, (OUT, IN))


def mxfp4():
  E = 3
  byte = draw(256, E, OUT, IN // 32, 16).astype(np.uint8)
  power = (draw(9, E, OUT, IN // 32) + 123).astype(np.uint8)
  values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
  want = np.zeros((E, IN, OUT))
  for e, o, i in np.ndindex(E, OUT, IN):
    pair = int(byte[e, o, i // 32, i % 32 // 2])
    code = pair & 15 if i % 2 == 0 else pair >> 4
    sign = -1.0 if code & 8 else 1.0
    two = 2.0 ** (int(power[e, o, i // 32]) - 127)
    want[e, i, o] = sign * values[code & 7] * two
  return {"m.experts.up_blocks": byte, "m.experts.up_scales": power}, want


FORMATS = {
  "gptq 4": (gptq, {}, {"quant_method": "gptq", "bits": 4}),
  "gptq 8, order": (
    *(gptq, {"bits": 8, "order": True}),
    {"quant_method": "gptq", "bits": 8},
  ),
  "gptq 2, version 2": (
    *(gptq, {"bits": 2, "offset": 0}),
    {"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"},
  ),
  "awq": (awq, {}, {"quant_method": "awq", "version": "gemm"}),
  "int4 in groups": (packed, {}, {}),
  "int4 with zeros": (packed, {"zeros": True}, {}),
  "int4, order": (packed, {"order": True}, {}),
  "int4, one per row": (packed, {"group": IN}, {}),
  "int8 packed": (packed, {"bits": 8, "zeros": True}, {}),
  "int8 by row": (int8, {"kind": "compressed"}, {}),
  "int8 of bitsandbytes": (int8, {"kind": "bitsandbytes"}, {}),
  "fp8 blocks": (fp8, {"kind": "block"}, {"weight_block_size": [20, 28]}),
  "fp8 one scale": (fp8, {"kind": "one"}, {"weight_block_size": None}),
  "fp8 per tensor": (fp8, {"kind": "tensor"}, {}),
  "fp8 per row": (fp8, {"kind": "row"}, {}),
  "nf4": (nf4, {"nested": False}, {}),
  "nf4 nested": (nf4, {"nested": True}, {}),
  "mxfp4": (mxfp4, {}, {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_is_what_its_format_says_in_float64(name, tmp_path):
  make, arguments, config = FORMATS[name]
  tensors, want = make(**arguments)
  tensors["other.weight"] = np.ones((2, 3), np.float32)
  save_tensors(tmp_path / "x.safetensors", tensors)
  found = dequantized(read_header(tmp_path / "x.safetensors"), config)
  weight = "m.experts.up" if name == "mxfp4" else "m.weight"
  assert found.keys() == {weight, "other.weight"}
  got = found[weight]
  assert got.shape == want.shape
  np.testing.assert_allclose(got.read(), want, rtol=3e-7, atol=1e-7)
  np.testing.assert_array_equal(got.read(3, 5), got.read()[3:5])


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_decoded_from_their_own_bytes(name, tmp_path, monkeypatch):
  """A quarter of a weight takes a quarter of its codes; scales of its units."""
  make, arguments, config = FORMATS[name]
  tensors, _ = make(**arguments)
  save_tensors(tmp_path / "x.safetensors", tensors)
  (x,) = dequantized(read_header(tmp_path / "x.safetensors"), config).values()
  read = x.read_turned if x.turned else x.read
  whole = read()
  assert x.unit
  count, plain = {}, safetensors_files.Tensor.read

  def counted(tensor, *rows, **choices):
    found = plain(tensor, *rows, **choices)
    count[tensor.name] = count.get(tensor.name, 0) + found.nbytes
    return found

  monkeypatch.setattr(safetensors_files.Tensor, "read", counted)
  n = len(whole)
  for start, stop in (
    (0, n),
    (0, n // 4),
    (n // 4, n // 2),
    (n - 1, n),
    (3, 3),
  ):
    count.clear()
    np.testing.assert_array_equal(read(start, stop), whole[start:stop])
    codes, most = max(tensors.items(), key=lambda item: item[1].nbytes)
    # Words and rows of codes are not cut.
    spare = most.nbytes // len(most)
    assert count.get(codes, 0) <= most.nbytes * (stop - start) / n + spare


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_part_is_named(name, tmp_path):
  make, arguments, config = FORMATS[name]
  tensors, _ = make(**arguments)
  optional = ("m.g_idx", "m.input_scale", "m.weight_g_idx", "m.weight")
  optional += ("m.weight_zero_point", "m.experts.up_blocks")
  optional += ("m.weight_packed", "m.qweight")
  for part in tensors.keys() - set(optional):
    if "nested" in part:
      continue
    rest = {k: v for k, v in tensors.items() if k != part}
    save_tensors(tmp_path / "x.safetensors", rest)
    with pytest.raises(ValueError, match="no tensor m"):
      dequantized(read_header(tmp_path / "x.safetensors"), config)


# -- Against others' readings --------------------------------------------


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path):
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  mxfp4_lib = pytest.importorskip("transformers.integrations.mxfp4")
  tensors, _ = mxfp4()
  save_tensors(tmp_path / "x.safetensors", tensors)
  found = dequantized(read_header(tmp_path / "x.safetensors"), {})
  theirs = mxfp4_lib.convert_moe_packed_tensors(
    *(torch.tensor(x) for x in tensors.values()), dtype=torch.float32
  )
  np.testing.assert_array_equal(found["m.experts.up"].read(), theirs)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_is_read_as_bitsandbytes_reads_it(nested, tmp_path):
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  bnb = pytest.importorskip("bitsandbytes", reason="live oracle")
  x = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
  q, state = bnb.functional.quantize_4bit(
    x, quant_type="nf4", compress_statistics=nested, blocksize=64
  )
  tensors = {"m.weight": q.numpy()}
  for name, value in state.as_dict(packed=True).items():
    tensors[f"m.weight.{name}"] = value.numpy()
  save_tensors(tmp_path / "x.safetensors", tensors)
  found = dequantized(read_header(tmp_path / "x.safetensors"), {})
  theirs = bnb.functional.dequantize_4bit(q, state).numpy()
  np.testing.assert_allclose(found["m.weight"].read(), theirs, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_int4_is_read_as_compressed_tensors_reads_it(
  symmetric, tmp_path
):
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  pytest.importorskip("compressed_tensors", reason="live oracle")
  from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

  seed = torch.Generator().manual_seed(0)
  q = torch.randint(-8, 8, (OUT, IN), generator=seed, dtype=torch.int8)
  z = torch.randint(-8, 8, (OUT, 4), generator=seed, dtype=torch.int8)
  s = torch.rand((OUT, 4), generator=seed)
  tensors = {
    "m.weight_packed": pack_to_int32(q, 4).numpy(),
    "m.weight_scale": s.numpy(),
    "m.weight_shape": np.array([OUT, IN]),
  }
  if not symmetric:
    packed_z = pack_to_int32(z, 4, packed_dim=0)
    assert torch.equal(unpack_from_int32(packed_z, 4, z.shape, 0), z)
    tensors["m.weight_zero_point"] = packed_z.contiguous().numpy()
  save_tensors(tmp_path / "x.safetensors", tensors)
  found = dequantized(read_header(tmp_path / "x.safetensors"), {})
  zero = 0 if symmetric else z.repeat_interleave(16, 1).float()
  want = (q.float() - zero) * s.repeat_interleave(16, 1)
  np.testing.assert_allclose(found["m.weight"].read(), want.numpy(), rtol=1e-6)


# -- Whole folders -------------------------------------------------------


def blocks_of_fp8(tensors):
  """Every matrix of the layers in float8, a scale for each 16 x 16."""
  made = {}
  for name, x in tensors.items():
    if "layers" not in name or x.ndim < 2:
      made[name] = x
      continue
    rows, columns = -(-x.shape[0] // 16), -(-x.shape[1] // 16)
    scale = RNG.uniform(0.5, 1.5, (rows, columns)).astype(np.float32)
    made[name] = (x.astype(np.float32) / 4).astype(F8)
    made[f"{name}_scale_inv"] = scale
  return made


def folder_of(tmp_path, case, change, config):
  folder = tmp_path / case
  shutil.copytree(GOLDENS / case, folder)
  tensors = change(load_file(folder / "model.safetensors"))
  save_file(tensors, folder / "model.safetensors")
  raw = json.loads((folder / "config.json").read_text())
  raw["quantization_config"] = config
  (folder / "config.json").write_text(json.dumps(raw))
  return folder, tensors


@pytest.mark.parametrize("case", ["qwen3", "phi3", "mixtral"])
def test_a_folder_of_fp8_loads_and_exports_plain(case, tmp_path):
  """Fused and expert weights too; in the dtype that is asked for."""
  fp8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
  folder, stored = folder_of(tmp_path, case, blocks_of_fp8, fp8)
  model, params = load_save.load_pretrained(folder)
  assert "weights dequantized from fp8 while loading" in model.config.notes
  load_save.save_pretrained(tmp_path / "out", model, params, dtype="float32")
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  assert "quantization_config" not in raw
  plain = load_file(tmp_path / "out" / "model.safetensors")
  assert plain.keys() == {k for k in stored if not k.endswith("_scale_inv")}
  for name, got in plain.items():
    want = stored[name].astype(np.float32)
    if f"{name}_scale_inv" in stored:
      grid = np.kron(stored[f"{name}_scale_inv"], np.ones((16, 16), "f4"))
      want = want * grid[: want.shape[0], : want.shape[1]]
    np.testing.assert_array_equal(got, want, err_msg=name)
  _, narrow = load_save.load_pretrained(folder, param_dtype="bfloat16")
  for path, x in trees.flatten(narrow).items():
    wide = np.asarray(trees.flatten(params)[path])
    np.testing.assert_array_equal(x, wide.astype(ml_dtypes.bfloat16))


def test_experts_in_mxfp4_load_as_the_plain_ones(tmp_path):
  """gpt-oss: columns of gate and up take turns within one tensor."""
  raw = json.loads((GOLDENS / "gpt_oss" / "config.json").read_text())
  raw |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
  raw["layer_types"] = raw["layer_types"][:1]
  model = transformer.build(parse_config(raw))
  params = jax.jit(model.init)(jax.random.key(0))
  folder = tmp_path / "model"
  load_save.save_pretrained(folder, model, params, dtype="float32")
  plain, stored = load_file(folder / "model.safetensors"), {}
  for name, x in list(plain.items()):
    stored[name] = x
    if name.endswith(("gate_up_proj", "down_proj")):
      E, columns, rows = x.shape
      byte = draw(256, E, rows, columns // 32, 16).astype(np.uint8)
      power = draw(4, *byte.shape[:3]).astype(np.uint8) + np.uint8(120)
      stored |= {f"{name}_blocks": byte, f"{name}_scales": power}
      code = np.stack((byte & 15, byte >> 4), -1).reshape(E, rows, -1, 32)
      values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[code & 7]
      values *= np.where(code & 8, -1, 1) * 2.0 ** (power[..., None] - 127.0)
      plain[name] = values.reshape(E, rows, columns).transpose(0, 2, 1)
      del stored[name]
  save_file(stored, folder / "model.safetensors")
  raw = json.loads((folder / "config.json").read_text())
  raw["quantization_config"] = {"quant_method": "mxfp4"}
  (folder / "config.json").write_text(json.dumps(raw))
  model, params = load_save.load_pretrained(folder)
  load_save.save_pretrained(tmp_path / "out", model, params, dtype="float32")
  for name, x in load_file(tmp_path / "out" / "model.safetensors").items():
    np.testing.assert_array_equal(x, plain[name], err_msg=name)


@pytest.mark.parametrize(
  ("config", "named"),
  [
    ({"quant_method": "hqq"}, "quant_method='hqq'"),
    ({}, "quant_method=None"),
    ("int4", "quant_method='int4'"),
    ({"quant_method": "gptq", "bits": 3}, "bits=3"),
    ({"quant_method": "awq", "version": "marlin"}, "version='marlin'"),
  ],
)
def test_what_is_not_read_is_refused_by_name(config, named, tmp_path):
  def as_gptq(tensors):
    made, _ = gptq()
    return tensors | {
      f"model.layers.0.mlp.up_proj.{k.removeprefix('m.')}": x
      for k, x in made.items()
    }

  folder, _ = folder_of(tmp_path, "qwen3", as_gptq, config)
  with pytest.raises(ValueError, match=named):
    load_save.load_pretrained(folder)


def test_numbers_that_are_not_finite_are_named(tmp_path):
  """At load, whatever the dtype, in whatever tensor."""
  for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
    for value in (np.nan, np.inf, -np.inf):

      def spoil(tensors, dtype=dtype, value=value):
        x = tensors["model.layers.1.mlp.down_proj.weight"].astype(dtype)
        x[-1, -1] = value
        return tensors | {"model.layers.1.mlp.down_proj.weight": x}

      folder, _ = folder_of(tmp_path, "qwen3", spoil, None)
      with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj.*NaN"):
        load_save.load_pretrained(folder)
      shutil.rmtree(folder)
