"""Weights by ranges: what is asked for, of one object, bit by bit the same."""

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import range_reads
import tiny
from buckets import every, gs
from host_runs import ROOT, free_port
from sft_jax.common.buckets import ranges, storage
from sft_jax.models.hf import load_save, merging
from sft_jax.models.hf.safetensors_files import read_header, save_tensors

GOLDENS = Path(__file__).parents[2] / "models" / "goldens"
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

spans = st.lists(
  st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).map(tuple)
)


def as_set(some):
  return {i for start, stop in some for i in range(start, stop)}


@given(spans, spans)
def test_spans_are_sets_of_bytes(some, others):
  one, other = ranges.merged(some), ranges.merged(others)
  assert as_set(one) == as_set(some)
  assert all(a[1] < b[0] for a, b in itertools.pairwise(one))
  assert as_set(ranges.without(one, other)) == as_set(some) - as_set(others)
  asked = ranges._requests(one)
  assert as_set(asked) >= as_set(one)
  assert len(as_set(asked)) <= len(as_set(one)) * (1 + 1 / ranges._WASTE)


def test_requests_waste_little_in_all():
  wanted = [(0, 1000), *((n, n + 1) for n in range(1015, 1500, 16))]
  size = sum(stop - start for start, stop in ranges._requests(wanted))
  assert size <= (1000 + len(wanted) - 1) * (1 + 1 / ranges._WASTE)
  assert ranges._requests(wanted)[0] == (0, 1016)


@pytest.fixture
def counted(monkeypatch):
  """The lengths of all ranges that came."""
  lengths, ask = [], ranges._File._ask

  def count(self, start, stop):
    data = ask(self, start, stop)
    lengths.append(len(data))
    return data

  monkeypatch.setattr(ranges._File, "_ask", count)
  return lengths


def put(url, folder):
  storage.upload_folder(folder, url, "config.json")


def same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@every
def test_a_model_in_a_bucket_is_the_local_one(url, tmp_path, counted):
  model = tiny.model_folder(tmp_path / "model")
  put(f"{url}/model", model)
  _, found = load_save.load_pretrained(f"{url}/model")
  same(found, load_save.load_pretrained(model)[1])
  assert sum(counted) == (model / "model.safetensors").stat().st_size
  # All of it is here, and is what the store's digest says: a plain copy.
  folder = ranges.fetch(f"{url}/model")
  assert not list(folder.glob("*" + ranges.ENDING))
  load_save.load_pretrained(f"{url}/model")
  assert sum(counted) == (model / "model.safetensors").stat().st_size


@every
def test_what_is_read_is_fetched_once(url, tmp_path, counted):
  tensors = {
    "a": RNG.standard_normal((64, 256)).astype(np.float32),
    "b": RNG.standard_normal((8, 32, 64)).astype(np.float32),
  }
  (tmp_path / "config.json").write_text("{}")
  save_tensors(tmp_path / "model.safetensors", tensors)
  put(f"{url}/model", tmp_path)
  file = ranges.fetch(f"{url}/model") / "model.safetensors"
  a, b = read_header(file).values()
  counted.clear()
  threads = [threading.Thread(target=a.read, args=(8, 24)) for _ in range(6)]
  for one in threads:
    one.start()
  for one in threads:
    one.join()
  np.testing.assert_array_equal(a.read(8, 24), tensors["a"][8:24])
  assert sum(counted) == 16 * 256 * 4
  # A box of it, row by row or in one piece.
  b.fetch(range(2, 4), range(8, 24), range(64))
  assert sum(counted) == 16 * 256 * 4 + 2 * 16 * 64 * 4
  a.fetch(range(32, 34), range(0, 256, 2))
  np.testing.assert_array_equal(
    a.read(32, 34, fetched=True)[:, ::2], tensors["a"][32:34, ::2]
  )
  # Another process finds what is here, but for a line that was cut.
  with file.with_name(file.name + ranges.ENDING).open("a") as journal:
    journal.write("\n12")
  ranges._files.clear()
  count = sum(counted)
  np.testing.assert_array_equal(a.read(8, 24), tensors["a"][8:24])
  assert sum(counted) == count
  np.testing.assert_array_equal(a.read(), tensors["a"])


@every
def test_an_object_that_changes_meanwhile_is_an_error(url, tmp_path):
  model = tiny.model_folder(tmp_path / "model")
  put(f"{url}/model", model)
  file = ranges.fetch(f"{url}/model") / "model.safetensors"
  tensors = read_header(file)
  first, *_ = tensors.values()
  first.read(0, 1)
  save_file(
    {k: x + 1 for k, x in load_file(model / "model.safetensors").items()},
    tmp_path / "other",
  )
  storage.upload(tmp_path / "other", f"{url}/model/model.safetensors")

  def load():
    first.read()
    ranges.check(file.parent)

  with pytest.raises(OSError, match=rf"{url}/.*: has changed while"):
    load()
  assert not file.exists()
  _, found = load_save.load_pretrained(f"{url}/model")
  assert float(np.max(found["embed"]["embedding"])) > 0.9


memory = pytest.mark.parametrize("scheme", ["memory"])


@memory
def test_copies_of_a_folder_have_whole_weights(url, tmp_path, monkeypatch):
  """And no journal, by which what is written there would be overwritten."""
  local = tiny.model_folder(tmp_path / "model")
  put(f"{url}/model", local)
  model, params = load_save.load_pretrained(local)
  names = Path.iterdir
  # The journal comes before its file.
  monkeypatch.setattr(
    Path, "iterdir", lambda x: iter(sorted(names(x), reverse=True))
  )

  def into(folder, source):
    changed = jax.tree.map(lambda x: x + 1, params)
    folder.mkdir()
    load_save.write_into(folder, source, model, changed)
    same(load_save.load_pretrained(folder)[1], changed)

  def merge(folder, source):
    merging.merge_folders(merging.Merge("average"), [source, local], folder)
    made = json.loads((folder / merging.LINEAGE).read_text())["models"]
    assert made[str(source)] == made[str(local)]

  for number, write in enumerate((into, merge)):
    source = ranges.fetch(f"{url}/model")
    first, *_ = read_header(source / "model.safetensors").values()
    first.read(0, 1)
    assert ranges.is_partial(first.path)
    write(tmp_path / f"out {number}", source)
    assert not list((tmp_path / f"out {number}").glob("*" + ranges.ENDING))
    shutil.rmtree(storage.cache_folder())


@memory
def test_a_file_outside_the_cache_is_never_written(url, tmp_path):
  put(f"{url}/model", tiny.model_folder(tmp_path / "model"))
  copy = shutil.copytree(ranges.fetch(f"{url}/model"), tmp_path / "copy")
  held = {file: file.read_bytes() for file in copy.iterdir()}
  with pytest.raises(OSError, match="no file of the cache; expected a whole"):
    load_save.load_pretrained(copy)
  assert held == {file: file.read_bytes() for file in copy.iterdir()}


@memory
def test_a_machine_that_starts_again(url, tmp_path, counted, monkeypatch):
  """What was whole stays; what was not may have lost bytes."""
  put(f"{url}/model", GOLDENS / "qwen2_sharded")
  folder = ranges.fetch(f"{url}/model")
  whole, part, *_ = sorted(folder.glob("*.safetensors"))
  ranges.need_all(whole)
  first, *_ = read_header(part).values()
  want = first.read()
  monkeypatch.setattr(ranges, "_boot", lambda: "the next start")
  ranges._files.clear()
  with part.open("r+b") as file:
    file.seek(first.offset)
    file.write(bytes(first.num_bytes))
  counted.clear()
  assert ranges.fetch(f"{url}/model") == folder
  ranges.need_all(whole)
  assert not counted
  np.testing.assert_array_equal(first.read(), want)
  assert sum(counted) == first.num_bytes
  ranges.need_all(part)
  ranges.check(folder)
  assert not ranges.is_partial(part)
  # One that shares the disk under one name has made it again meanwhile.
  other = next(x for x in folder.glob("*.safetensors") if ranges.is_partial(x))
  read_header(other)
  about = json.loads(ranges._journal(other).read_text().splitlines()[0])
  with monkeypatch.context() as patch:
    patch.setattr(ranges, "_boot", lambda: "another machine's")
    ranges._empty(other, about)
  with pytest.raises(OSError, match="again by another machine"):
    ranges.check(folder)


@memory
def test_another_process_is_faster(url, tmp_path, monkeypatch):
  """It finds a file whole, forgets it or makes it again between two steps."""
  put(f"{url}/model", tiny.model_folder(tmp_path / "model"))
  file = ranges.fetch(f"{url}/model") / "model.safetensors"
  journal = ranges._journal(file)
  line = journal.read_bytes()
  with monkeypatch.context() as patch:
    plain = ranges._File.__init__

    def late(self, path):
      journal.unlink()
      plain(self, path)

    patch.setattr(ranges._File, "__init__", late)
    ranges.need(file, [(0, 8)])  # Whole: nothing to fetch.
  assert file not in ranges._files
  journal.write_bytes(line)
  ranges.need(file, [(0, 8)])
  mine = ranges._files[file]
  ranges._empty(file, json.loads(line))
  mine.forget()
  assert file.exists()
  assert journal.exists()
  ranges.need(file, [(0, 8)])
  mine = ranges._files[file]
  file.unlink()
  for step in (lambda: mine.need([(8, 16)]), mine.check):
    mine._held = [(0, mine.size)] if step == mine.check else mine._held
    with pytest.raises(OSError, match="has changed while it was read"):
      step()


@memory
def test_a_full_disk_is_named(url, tmp_path, monkeypatch):
  put(f"{url}/model", tiny.model_folder(tmp_path / "model"))
  file = ranges.fetch(f"{url}/model") / "model.safetensors"

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(ranges.os, "write", full)
  with pytest.raises(OSError, match=r"No space left.*model\.safetensors"):
    ranges.need(file, [(0, 8)])


@pytest.mark.parametrize("scheme", [gs])
def test_each_range_is_asked_of_one_generation(url, tmp_path, buckets):
  """Whoever writes the same again makes another object of it."""
  model = tiny.model_folder(tmp_path / "model")
  put(f"{url}/model", model)
  file = ranges.fetch(f"{url}/model") / "model.safetensors"
  first, *_ = read_header(file).values()
  put(f"{url}/model", model)
  with pytest.raises(OSError, match=rf"{url}/.*: has changed while"):
    first.read()


@every
def test_a_short_answer_is_asked_for_again(url, tmp_path, monkeypatch):
  model = tiny.model_folder(tmp_path / "model")
  put(f"{url}/model", model)
  fs, _ = storage.client(url)
  plain, cuts = fs.cat_file, [1, 2]

  def cut(path, start=None, end=None, **more):
    data = plain(path, start=start, end=end, **more)
    return data[:-1] if start is not None and cuts and cuts.pop() else data

  monkeypatch.setattr(fs, "cat_file", cut)
  _, found = load_save.load_pretrained(f"{url}/model")
  assert not cuts
  same(found, load_save.load_pretrained(model)[1])
  cuts[:] = [1] * 1000
  storage.shutil.rmtree(storage.cache_folder() / "remote")
  with pytest.raises(OSError, match=r"bytes from byte .* expected .* 3 tries"):
    load_save.load_pretrained(f"{url}/model")


@pytest.mark.parametrize("scheme", [gs])
def test_faults_of_a_store_are_outlived(url, tmp_path, buckets):
  model = tiny.model_folder(tmp_path / "model")
  put(f"{url}/model", model)
  match = r"GET .*model\.safetensors"
  buckets.fail("torn,503,429,drop,slow", match, times=5, every=2)
  _, found = load_save.load_pretrained(f"{url}/model")
  assert buckets.left() < 5
  same(found, load_save.load_pretrained(model)[1])


# -- Two processes -------------------------------------------------------------


def wider(tmp_path, name, change, **config):
  """A model whose matrices are more than a few rows to a process."""
  shape = tiny.SHAPE | {"hidden_size": 256, "intermediate_size": 512}
  shape |= {"head_dim": 64}
  folder = tiny.model_folder(tmp_path / name, shape)
  file = folder / "model.safetensors"
  save_file(change(load_file(file)), file)
  raw = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(raw | config))
  (folder / "SHA256SUMS").unlink(missing_ok=True)
  return folder


def fp8(tensors):
  made = {}
  for name, x in tensors.items():
    made[name] = x
    if "layers" in name and x.ndim == 2:
      made[name] = (x * 8).astype(ml_dtypes.float8_e4m3fn)
      size = [-(-n // 16) for n in x.shape]
      made[f"{name}_scale_inv"] = RNG.uniform(0.1, 0.2, size).astype(np.float32)
  return made


def gptq(tensors):
  made = {}
  for name, x in tensors.items():
    if "layers" not in name or x.ndim < 2:
      made[name] = x
      continue
    base, (rows, columns) = name.removesuffix(".weight"), x.shape
    word = lambda *shape: RNG.integers(-(2**31), 2**31, shape, np.int32)
    made[f"{base}.qweight"] = word(columns // 8, rows)
    made[f"{base}.qzeros"] = word(columns // 32, rows // 8)
    scale = RNG.uniform(0.001, 0.002, (columns // 32, rows))
    made[f"{base}.scales"] = scale.astype(np.float16)
    made[f"{base}.g_idx"] = np.arange(columns, dtype=np.int32) // 32
  return made


def with_long_row(tensors):
  """A row of the embedding that no training made."""
  table = tensors["model.embed_tokens.weight"].copy()
  table[5] *= 10
  return tensors | {"model.embed_tokens.weight": table}


def with_head(tensors):
  """Tied tensors that are in the file twice."""
  return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


@pytest.mark.parametrize("scheme", [gs])
def test_each_of_two_processes_fetches_its_share(url, tmp_path, buckets):
  """Four devices each, parameters over all eight: 1.05 of a half at most."""
  block = {"quant_method": "fp8", "weight_block_size": [16, 16]}
  words = {"quant_method": "gptq", "bits": 4, "group_size": 32}
  folders = {
    "plain": wider(tmp_path, "plain", with_long_row),
    "tied": wider(tmp_path, "tied", with_head),
    "fp8": wider(tmp_path, "fp8", fp8, quantization_config=block),
    "gptq": wider(tmp_path, "gptq", gptq, quantization_config=words),
  }
  # Fused, sharded over files, stacked experts, experts in turns.
  for name in ("phi3", "qwen2_sharded", "mixtral", "gpt_oss", "qwen3_next"):
    folders[name] = shutil.copytree(GOLDENS / name, tmp_path / name)
  for name, folder in folders.items():
    put(f"{url}/{name}", folder)
  asked = json.dumps([[f"{url}/{n}", str(f)] for n, f in folders.items()])
  address, running = f"localhost:{free_port()}", []
  for i in range(2):
    flags = re.sub(r"count=\d+", "count=4", os.environ["XLA_FLAGS"])
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    home = {"XDG_CACHE_HOME": str(tmp_path / f"machine_{i}")}
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths, **home}
    script = ROOT / "tests" / "support" / "range_reads.py"
    running.append(
      subprocess.Popen(
        [sys.executable, str(script), str(i), address, asked],
        env=env | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  try:
    said = [process.communicate(timeout=400)[0] for process in running]
  finally:
    for process in running:
      process.kill()
  for process, text in zip(running, said, strict=True):
    assert process.returncode == 0, text
    lines = re.findall(r"READ (.*)", text)
    assert len(lines) == len(folders)
    for line in map(json.loads, lines):
      print(line)
      name = line["url"].rpartition("/")[2]
      alone = range_reads.odd_rows(folders[name])
      assert line["odd"] == {str(i): why for i, why in alone.items()}
      assert ("5" in line["odd"]) == (name == "plain")
      share = line["share"]
      if name == "tied":  # Compared, each process a half.
        share += 400 * 256 * 4 / 2
      # Of a router of four rows some devices of eight read none.
      most = 1.1 if name in ("mixtral", "gpt_oss", "qwen3_next") else 1.05
      assert line["fetched"] <= most * share + line["headers"], line
