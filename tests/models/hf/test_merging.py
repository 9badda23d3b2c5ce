"""Merged models: float64 brute force, peft's own functions, bounded memory."""

import json
import tracemalloc

import numpy as np
import pytest

import tiny
from sft_jax.common.workdir import digest
from sft_jax.models.hf import merging
from sft_jax.models.hf import safetensors_files as files
from sft_jax.models.hf.merging import Merge, merge_folders


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """So that every tensor takes several blocks."""
  monkeypatch.setattr(merging, "_BLOCK", 24)


def model(path, tensors):
  path.mkdir()
  files.save_tensors(path / "model.safetensors", tensors)
  config = {"model_type": "qwen3", "hidden_act": "silu"}
  (path / "config.json").write_text(json.dumps(config))
  return path


@pytest.fixture
def models(tmp_path):
  """Three models and their base, as folders and as float64 arrays."""
  rng = np.random.default_rng(0)
  shapes = {"a": (37, 5), "b": (11,), "c": (3, 4, 2)}
  base = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  tuned = [
    {k: x + rng.normal(size=x.shape, scale=0.1).astype(np.float32)
     for k, x in base.items()}
    for _ in range(3)
  ]  # fmt: skip
  paths = [model(tmp_path / f"m{i}", x) for i, x in enumerate(tuned)]
  return paths, tuned, model(tmp_path / "base", base), base


def merged(out):
  return {k: x.read() for k, x in files.open_tensors(out).items()}


def trimmed(t, density):
  """The largest elements of a tensor; sizes do not tie here."""
  size = np.sort(np.abs(t.astype(np.float32)).ravel())[::-1]
  return np.where(np.abs(t) >= size[int(density * t.size) - 1], t, 0)


def brute_force(name, tuned, base, merge):
  x = [one[name].astype(np.float64) for one in tuned]
  w = merge.weights
  if merge.method == "average":
    return sum(a * b for a, b in zip(w, x, strict=True)) / sum(w)
  if merge.method == "slerp":
    share = w[1] / sum(w)
    cosine = (x[0] * x[1]).sum() / np.sqrt(
      (x[0] ** 2).sum() * (x[1] ** 2).sum()
    )
    angle = np.arccos(cosine)
    return (
      np.sin((1 - share) * angle) * x[0] + np.sin(share * angle) * x[1]
    ) / np.sin(angle)
  start = base[name].astype(np.float64)
  tasks = [one - start for one in x]
  if merge.method == "arithmetic":
    return start + sum(a * b for a, b in zip(w, tasks, strict=True))
  tasks = [trimmed(one, merge.density) for one in tasks]
  sign = np.sign(sum(tasks))
  agree = [(np.sign(one) == sign) & (one != 0) for one in tasks]
  total = sum(a * b * c for a, b, c in zip(w, tasks, agree, strict=True))
  return start + total / np.maximum(sum(agree), 1)


CASES = [
  (Merge("average", (1.0, 2.0, 0.5)), 3),
  (Merge("arithmetic", (0.7, -0.3)), 2),
  (Merge("arithmetic", (0.4,)), 1),  # Interpolation with the base.
  (Merge("ties", (1.0, 0.5, 2.0), 0.4), 3),
  (Merge("slerp", (3.0, 1.0)), 2),
]


@pytest.mark.parametrize(("merge", "number"), CASES)
def test_equals_brute_force_in_float64(models, tmp_path, merge, number):
  paths, tuned, base_path, base = models
  needs = merge.method in ("arithmetic", "ties")
  out = tmp_path / "out"
  merge_folders(
    merge, paths[:number], out, base=base_path if needs else None,
    max_shard_bytes=400,
  )  # fmt: skip
  files.check_checksums(out)
  found = merged(out)
  for name in base:
    want = brute_force(name, tuned[:number], base, merge)
    np.testing.assert_allclose(found[name], want, atol=2e-7)
    assert found[name].dtype == np.float32
  lineage = json.loads((out / "merge.json").read_text())
  assert lineage["method"] == merge.method
  assert list(lineage["models"]) == [str(path) for path in paths[:number]]
  known = digest(paths[0] / "model.safetensors")
  assert lineage["models"][str(paths[0])] == {"model.safetensors": known}


def test_dare_drops_by_the_seed_and_keeps_the_mean(models, tmp_path):
  paths, tuned, base_path, base = models
  outs = []
  for name, seed in (("a", 1), ("b", 1), ("c", 2)):
    merge = Merge("dare", (), 0.5, seed)
    merge_folders(merge, paths[:1], tmp_path / name, base=base_path)
    outs.append(merged(tmp_path / name)["a"])
  np.testing.assert_array_equal(outs[0], outs[1])
  assert (outs[0] != outs[2]).any()
  task = tuned[0]["a"] - base["a"]
  moved = outs[0] - base["a"]
  kept = np.abs(moved) > np.abs(task)
  np.testing.assert_allclose(moved, np.where(kept, 2 * task, 0), atol=1e-6)
  assert 0.35 < kept.mean() < 0.65


@pytest.mark.filterwarnings("ignore:The density")
def test_ties_and_dare_are_pefts(models, tmp_path):
  torch = pytest.importorskip("torch")
  utils = pytest.importorskip("peft.utils.merge_utils")
  paths, tuned, base_path, base = models
  weights = torch.tensor([1.0, 0.5, 2.0])
  for method, density, theirs in (
    ("ties", 0.4, utils.ties),
    ("dare", 1.0, utils.dare_linear),
  ):
    merge = Merge(method, tuple(weights.tolist()), density)
    merge_folders(merge, paths, tmp_path / method, base=base_path)
    found = merged(tmp_path / method)
    for name, start in base.items():
      tasks = [torch.tensor(one[name] - start) for one in tuned]
      want = theirs(tasks, weights, density).numpy()
      np.testing.assert_allclose(found[name] - start, want, atol=1e-6)


def test_adapters_add_up_exactly(tmp_path):
  rng = np.random.default_rng(0)
  paths, products = [], []
  for i, (rank, rslora) in enumerate([(2, False), (3, True)]):
    a, b = (
      rng.normal(size=s).astype(np.float32) for s in ((rank, 5), (4, rank))
    )
    path = tmp_path / f"a{i}"
    path.mkdir()
    files.save_tensors(
      path / "adapter_model.safetensors",
      {"x.lora_A.weight": a, "x.lora_B.weight": b},
    )
    config = {"r": rank, "lora_alpha": 8, "use_rslora": rslora}
    (path / "adapter_config.json").write_text(json.dumps(config))
    paths.append(path)
    products.append(b @ a * 8 / (rank**0.5 if rslora else rank))
  for method, mix in (("average", (0.25, 0.75)), ("arithmetic", (1.0, 3.0))):
    merge_folders(Merge(method, (1.0, 3.0)), paths, tmp_path / method)
    config = json.loads((tmp_path / method / "adapter_config.json").read_text())
    found = files.read_header(tmp_path / method / "adapter_model.safetensors")
    product = found["x.lora_B.weight"].read() @ found["x.lora_A.weight"].read()
    product *= config["lora_alpha"] / config["r"]
    want = mix[0] * products[0] + mix[1] * products[1]
    np.testing.assert_allclose(product, want, rtol=1e-5)
  with pytest.raises(ValueError, match="expected average or arithmetic"):
    merge_folders(Merge("ties"), paths, tmp_path / "no")


def test_what_cannot_be_merged_is_refused(models, tmp_path):
  paths, tuned, base_path, _ = models
  other = {**tuned[0], "b": np.zeros(12, np.float32)}
  odd = model(tmp_path / "odd", other)
  for merge, those, base, said in (
    (Merge("average"), [paths[0], odd], None, r"differ in \['b'\]"),
    (Merge("ties"), paths, None, "expected --base"),
    (Merge("average"), paths, base_path, "expected no --base"),
    (Merge("slerp"), paths, None, "expected two models"),
    (Merge("average", (1.0,)), paths, None, "expected one of each"),
  ):
    with pytest.raises(ValueError, match=said):
      merge_folders(merge, those, tmp_path / "out", base=base)
  assert not (tmp_path / "out").exists()


def test_memory_is_that_of_blocks(tmp_path, monkeypatch):
  """Of models of 16 MB in one tensor, less than 6 MB at once."""
  monkeypatch.setattr(merging, "_BLOCK", 1 << 14)
  rng = np.random.default_rng(0)
  paths = [
    model(tmp_path / name, {"a": rng.random((2048, 2048), np.float32)})
    for name in ("x", "y", "z")
  ]
  merge = Merge("ties", (), 0.3)
  tracemalloc.start()
  merge_folders(merge, paths[:2], tmp_path / "out", base=paths[2])
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 6 << 20


def test_a_merged_folder_is_a_model(tmp_path):
  """A real folder averaged with itself is itself, tokenizer and all."""
  folder = tiny.model_folder(tmp_path / "model")
  merge_folders(Merge("average"), [folder, folder], tmp_path / "out")
  ours, theirs = merged(tmp_path / "out"), merged(folder)
  assert all((ours[name] == x).all() for name, x in theirs.items())
  names = {path.name for path in folder.iterdir()} | {"merge.json"}
  assert {path.name for path in (tmp_path / "out").iterdir()} >= names
