"""One model of several: averages, task vectors, TIES, DARE, SLERP.

Of models x_1 ... x_n of one shape with weights w, and where a base b is given
their task vectors t_i = x_i - b,

    average     sum w x / sum w                   (model soups, 2203.05482)
    arithmetic  b + sum w t                       (task arithmetic, 2212.04089)
    ties        b + mean over i of w t, of the largest `density` of each tensor
                of t, and of these those whose sign is that of their sum
                                                     (2306.01708)
    dare        b + sum w t m / density, m drawn: 1 with chance `density`
                                                     (2311.03099)
    slerp       of two: along the arc between them, at w_2 / (w_1 + w_2)

Tensors are read, merged and written in blocks of rows, so memory is some blocks
whatever the size of the models; what needs a whole tensor (the threshold of
ties, the angle of slerp) is found by reading it once more.
"""

import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft_jax.common.buckets import ranges
from sft_jax.common.workdir import digest, replace_folder
from sft_jax.models.hf import safetensors_files as files
from sft_jax.models.hf.safetensors_files import Pending, Tensor

METHODS = ("average", "arithmetic", "ties", "dare", "slerp")
LINEAGE = "merge.json"
_BLOCK = 1 << 21  # Elements of each model in memory at once.
# Of configs.
_SAME = ("model_type", "rope_theta", "rope_scaling", "hidden_act")


class Merge(NamedTuple):
  """How models become one."""

  method: str  # One of METHODS.
  weights: tuple[float, ...] = ()  # Of each model; () is 1 each.
  density: float = 0.2  # Share of a task vector that ties and dare keep.
  seed: int = 0  # Of what dare drops, with the tensor and the model.

  def check(self, models: int, base: bool) -> "Merge":
    """The same with its weights; ValueError where it cannot be."""
    needs = self.method in ("arithmetic", "ties", "dare")
    if self.method not in METHODS or not 0 < self.density <= 1:
      raise ValueError(
        f"merge: got method {self.method!r} and density {self.density}; "
        f"expected one of {', '.join(METHODS)}, and a share. Correct them."
      )
    if needs != base or (self.method == "slerp" and models != 2):
      raise ValueError(
        f"merge --method={self.method}: got {models} models and "
        f"{'a' if base else 'no'} base; expected "
        + ("two models, " if self.method == "slerp" else "")
        + ("--base, what they were tuned from." if needs else "no --base.")
      )
    weights = self.weights or (1.0,) * models
    mean = self.method in ("average", "slerp")
    if len(weights) != models or (mean and not sum(weights) > 0):
      raise ValueError(
        f"merge --weights: got {weights} for {models} models; expected one of "
        "each, with a sum above 0 for a mean. Correct them."
      )
    return self._replace(weights=weights)


def merge_folders(
  merge: Merge,
  models: Sequence[Path],
  out: Path,
  *,
  base: Path | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes the merged folder: whole, or not at all.

  Config, tokenizer and template are the first model's; what was merged, and the
  digests of its weights, are in merge.json. Adapters (PEFT folders) are merged
  by average and arithmetic alone, exactly: side by side in one of the sum of
  their ranks, without a base.

  Raises ValueError: models of other tensors, configs or tokenizers; see
  `Merge.check`.
  """
  if (models[0] / "adapter_config.json").exists():
    return _merge_adapters(merge, models, out, base)
  merge = merge.check(len(models), base is not None)
  folders = [*models, *([base] if base else [])]
  found = [files.open_tensors(folder) for folder in folders]
  for folder, tensors in zip(folders, found, strict=True):
    _check_same(models[0], found[0], folder, tensors)
  known = found[-1] if base else {}

  def pending(name: str) -> Pending:
    parts = [tensors[name] for tensors in found[: len(models)]]
    first = parts[0]
    make: Any = lambda: blocks(merge, parts, known.get(name))
    return Pending(name, first.dtype, first.shape, make)

  def write(folder: Path) -> None:
    weights = (".safetensors", ".safetensors.index.json", ranges.ENDING)
    for file in models[0].iterdir():
      copied = not file.name.endswith(weights) and file.name != files.CHECKSUMS
      if file.is_file() and copied:
        shutil.copyfile(files.inside(models[0], file.name), folder / file.name)
    files.write_tensors(
      folder, map(pending, found[0]), max_shard_bytes=max_shard_bytes
    )
    _write_lineage(folder, merge, models, base)

  replace_folder(out, "config.json", write)


def _write_lineage(
  folder: Path, merge: Merge, models: Sequence[Path], base: Path | None
) -> None:
  def digests(path: Path) -> dict[str, str]:
    found = sorted(path.glob("*.safetensors"))
    for file in found:
      ranges.need_all(file)
    return {file.name: digest(file) for file in found}

  lineage = {
    **merge._asdict(),
    "models": {str(path): digests(path) for path in models},
    "base": {str(base): digests(base)} if base else None,
  }
  files.write_json(folder / LINEAGE, lineage)
  files.write_checksums(folder)


def _check_same(
  first: Path, ours: dict[str, Tensor], folder: Path, theirs: dict[str, Tensor]
) -> None:
  shapes = lambda tensors: {(name, x.shape) for name, x in tensors.items()}
  odd = sorted(name for name, _ in shapes(ours) ^ shapes(theirs))
  kind, vocabulary = [], []
  for path in (first, folder):
    config = json.loads((path / "config.json").read_text())
    kind.append([config.get(key) for key in _SAME])
    file = path / "tokenizer.json"
    model = json.loads(file.read_text())["model"] if file.exists() else {}
    vocabulary.append(model.get("vocab"))
  odd += ["config.json"] * (kind[0] != kind[1])
  odd += ["tokenizer.json"] * (vocabulary[0] != vocabulary[1])
  if odd:
    raise ValueError(
      f"merge: {folder} and {first} differ in {sorted(set(odd))[:3]}; expected "
      "the same tensors, kind and vocabulary. Merge models of one base."
    )


def blocks(
  merge: Merge, parts: Sequence[Tensor], base: Tensor | None
) -> Iterator[np.ndarray]:
  """A merged tensor in blocks of its rows, in its own dtype, from that of each
  model and of the base, where the method takes it. Raises ValueError: whole
  numbers that differ."""
  first = parts[0]
  weights = np.array(merge.weights)
  if first.dtype.kind in "iub":
    arrays = [part.read() for part in parts]
    if any((array != arrays[0]).any() for array in arrays):
      raise ValueError(
        f"merge: {first.name!r} holds other whole numbers in each model; "
        "expected the same. Merge models of one base."
      )
    yield arrays[0]
    return
  tasks = lambda at: _tasks(parts, base, at)
  # (first row, past the last) of each block.
  cuts: list[tuple[int, int | None]] = [(0, None)]
  if first.shape:
    rows = max(1, _BLOCK // max(1, int(np.prod(first.shape[1:]))))
    end = first.shape[0]
    cuts = [(start, min(start + rows, end)) for start in range(0, end, rows)]
  least = [0.0] * len(parts)
  mix = weights / weights.sum() if merge.method == "average" else weights
  if merge.method == "ties":
    sizes = lambda model: _threshold(tasks, cuts, model, merge.density)
    least = list(map(sizes, range(len(parts))))
  elif merge.method == "slerp":
    mix = _arc(tasks, cuts, weights[1] / weights.sum())
  for number, at in enumerate(cuts):
    found = tasks(at)
    if merge.method == "ties":
      size = np.abs(found).astype(np.float32)
      kept = np.where(size >= np.reshape(least, _column(found)), found, 0)
      agree = (np.sign(kept) == np.sign(kept.sum(axis=0))) & (kept != 0)
      merged = (kept * agree * np.reshape(mix, _column(found))).sum(axis=0)
      merged /= np.maximum(agree.sum(axis=0), 1)
    else:
      if merge.method == "dare":
        found = found * [
          _kept(merge, first.name, i, number, found.shape[1:])
          for i in range(len(parts))
        ]
      merged = np.tensordot(mix, found, axes=1)
    if base is not None:
      merged = merged + base.read(*at)
    yield merged.astype(first.dtype)


def _tasks(
  parts: Sequence[Tensor], base: Tensor | None, at: tuple[int, int | None]
) -> np.ndarray:
  """Rows of every model, less the base's: [models, rows, ...], float64."""
  found = np.stack([part.read(*at).astype(np.float64) for part in parts])
  return found if base is None else found - base.read(*at).astype(np.float64)


def _column(found: np.ndarray) -> tuple[int, ...]:
  """The shape of one number for each model beside `_tasks`."""
  return (-1, *[1] * (found.ndim - 1))


def _threshold(tasks: Any, cuts: Any, model: int, density: float) -> float:
  """The size of the smallest element that ties keeps of a model's tensor,
  exactly. A float32's bits sort as its size does: the upper half of the bits is
  counted first, then the lower among those."""
  upper = np.zeros(1 << 16, np.int64)
  bits = lambda at: (
    np.abs(tasks(at)[model]).astype(np.float32).view(np.uint32).ravel()
  )
  for at in cuts:
    upper += np.bincount(bits(at) >> 16, minlength=1 << 16)
  left = max(1, int(density * upper.sum()))
  above = np.cumsum(upper[::-1])
  place = int(np.searchsorted(above, left))
  high = (1 << 16) - 1 - place
  left -= int(above[place - 1]) if place else 0
  lower = np.zeros(1 << 16, np.int64)
  for at in cuts:
    found = bits(at)
    lower += np.bincount(found[found >> 16 == high] & 0xFFFF, minlength=1 << 16)
  low = (1 << 16) - 1 - int(np.searchsorted(np.cumsum(lower[::-1]), left))
  return float(np.array([high << 16 | low], np.uint32).view(np.float32)[0])


def _arc(tasks: Any, cuts: Any, share: float) -> np.ndarray:
  """Factors of two tensors, `share` of the way from the first to the second."""
  dots = np.zeros((2, 2))
  for at in cuts:
    flat = tasks(at).reshape(2, -1)
    dots += flat @ flat.T
  lengths = np.sqrt(np.diag(dots))
  cosine = dots[0, 1] / max(float(lengths.prod()), 1e-300)
  angle = np.arccos(np.clip(cosine, -1, 1))
  if np.sin(angle) < 1e-6:  # Alike, or opposite: there is no one arc.
    return np.array([1 - share, share])
  return np.sin([(1 - share) * angle, share * angle]) / np.sin(angle)


def _kept(
  merge: Merge, name: str, model: int, block: int, shape: tuple[int, ...]
) -> np.ndarray:
  """What dare keeps, scaled up: 0 or 1 / density."""
  seed = (merge.seed, zlib.crc32(name.encode()), model, block)
  draw = np.random.default_rng(seed).random(shape) < merge.density
  return draw / merge.density


def _merge_adapters(
  merge: Merge, models: Sequence[Path], out: Path, base: Path | None
) -> None:
  """A of all above each other, B side by side, each B with its scale."""
  if merge.method not in ("average", "arithmetic"):
    raise ValueError(
      f"merge --method={merge.method}: got adapters; expected average or "
      "arithmetic, which are exact. Merge each into its base first (sft-jax "
      "export), then the models."
    )
  # What arithmetic adds to is the base that they have.
  merge = merge.check(len(models), bool(base) or merge.method == "arithmetic")
  configs, tensors = [], []
  for path in models:
    configs.append(json.loads((path / "adapter_config.json").read_text()))
    tensors.append(files.read_header(path / "adapter_model.safetensors"))
  names = tensors[0].keys()
  plain = all(".lora_A." in name or ".lora_B." in name for name in names)
  patterned = any(
    one.get("rank_pattern") or one.get("alpha_pattern") or one.get("use_dora")
    for one in configs
  )
  if not plain or patterned or any(x.keys() != names for x in tensors):
    raise ValueError(
      f"merge: {[str(path) for path in models]}: got adapters of other "
      "modules, with rank or alpha patterns, or that train more than A and B; "
      "expected plain ones of one form. Merge each into its base first."
    )
  weights = np.array(merge.weights)
  if merge.method == "average":
    weights = weights / weights.sum()
  scales = [
    one["lora_alpha"] / (one["r"] ** (0.5 if one.get("use_rslora") else 1))
    for one in configs
  ]
  merged = {}
  for name in tensors[0]:
    parts = [one[name].read() for one in tensors]
    dtype = parts[0].dtype
    if ".lora_B." in name:
      parts = [
        x.astype(np.float64) * w * s
        for x, w, s in zip(parts, weights, scales, strict=True)
      ]
    whole = np.concatenate(parts, axis=int(".lora_B." in name))
    merged[name] = whole.astype(dtype)
  rank = sum(one["r"] for one in configs)
  config = configs[0] | {"r": rank, "lora_alpha": rank, "use_rslora": False}

  def write(folder: Path) -> None:
    files.save_tensors(folder / "adapter_model.safetensors", merged)
    files.write_json(folder / "adapter_config.json", config)
    _write_lineage(folder, merge, models, None)

  replace_folder(out, "adapter_config.json", write)
