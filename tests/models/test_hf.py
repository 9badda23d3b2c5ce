"""Model folders: the same numbers as transformers, the same bytes back."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sft_jax import trees
from sft_jax.models import hf, lora, transformer
from sft_jax.models.config import parse_config

GOLDENS = Path(__file__).parent / "goldens"
CASES = ("llama", "llama_old_config", "qwen2_sharded", "qwen3")
SHARED = Path(__file__).parents[3] / "shared" / "data" / "pretrained"


@functools.cache
def load(case):
  return hf.load_pretrained(GOLDENS / case)


def read_golden(case):
  with np.load(GOLDENS / case / "golden.npz", allow_pickle=False) as file:
    return dict(file)


def read_tensors(folder):
  """Every tensor of a folder, as (dtype, shape, bytes)."""
  found = {}
  for path in sorted(folder.glob("*.safetensors")):
    with safe_open(path, framework="numpy") as file:
      for name in file.keys():  # noqa: SIM118 (not a dict)
        x = file.get_tensor(name)
        found[name] = (x.dtype.name, x.shape, x.tobytes())
  return found


def next_token_nats(model, params, tokens):
  logits = model.logits(params, model.hidden(params, tokens))
  log_p = jax.nn.log_softmax(logits[:, :-1])
  picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)
  return -jnp.sum(picked), logits


def greedy(model, params, prompt, total):
  """Continues one prompt with a cache, one token at a time."""
  decode = jax.jit(model.decode)
  pick = jax.jit(lambda p, x: jnp.argmax(model.logits(p, x)[0, -1]))
  tokens = list(prompt)
  cache = model.init_cache(1, total)
  new, start = np.array([tokens], np.int32), 0
  while len(tokens) < total:
    positions = np.arange(start, len(tokens), dtype=np.int32)[None]
    hidden, cache = decode(params, new, positions, cache)
    start = len(tokens)
    tokens.append(int(pick(params, hidden)))
    new = np.array([tokens[-1:]], np.int32)
  return tokens


# -- Against transformers -----------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_stored_goldens(case):
  model, params = load(case)
  golden = read_golden(case)
  function = functools.partial(next_token_nats, model)
  step = jax.jit(jax.value_and_grad(function, has_aux=True))
  (nats, logits), gradient = step(params, golden["tokens"])
  np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
  np.testing.assert_allclose(nats, golden["loss"], rtol=1e-5)
  seen = set()
  for path, leaf in trees.flatten(gradient).items():
    names = hf.hf_names(path, model.config.num_layers)
    parts = leaf if path.startswith("layers/") else leaf[None]
    for name, part in zip(names, parts, strict=True):
      want = golden[f"gradient/{name}"]
      norm = np.linalg.norm(part)
      np.testing.assert_allclose(norm, want, rtol=1e-3, err_msg=name)
      seen.add(f"gradient/{name}")
  assert seen == {key for key in golden if key.startswith("gradient/")}


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuation_equals_the_stored_goldens(case):
  model, params = load(case)
  want = read_golden(case)["greedy"].tolist()
  assert greedy(model, params, want[:5], len(want)) == want


@pytest.mark.parametrize("case", CASES)
def test_goldens_are_what_transformers_computes(case):
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  pytest.importorskip("transformers", reason="live oracle")
  torch.manual_seed(0)
  path = Path(__file__).parents[2] / "tools" / "make_goldens.py"
  spec = importlib.util.spec_from_file_location("make_goldens", path)
  tool = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(tool)
  fresh = tool.compute(tool.make_model(case))
  stored = read_golden(case)
  assert fresh.keys() == stored.keys()
  for key in stored:
    np.testing.assert_allclose(
      fresh[key], stored[key], rtol=1e-4, atol=1e-4, err_msg=key
    )


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_our_export(case, tmp_path):
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  transformers = pytest.importorskip("transformers", reason="live oracle")
  model, params = load(case)
  hf.save_pretrained(tmp_path / "out", model, params, dtype="float32")
  theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not report["missing_keys"]
  assert not report["unexpected_keys"]
  tokens = read_golden(case)["tokens"]
  with torch.no_grad():
    want = theirs(torch.tensor(tokens).long()).logits.numpy()
  got = next_token_nats(model, params, tokens)[1]
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.skipif(
  not (SHARED / "stories260k_hf").is_dir(),
  reason="the shared material is not here",
)
def test_a_real_model_tells_its_story():
  tokenizers = pytest.importorskip("tokenizers")
  folder = SHARED / "stories260k_hf"
  page = (SHARED / "stories260k" / "stories260K.md").read_text()
  story = page.split("-t 0.0\n")[1].split("\n```")[0]
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  start = tokenizer.encode("Once upon a time", add_special_tokens=False).ids
  model, params = hf.load_pretrained(folder)
  # run.c writes 256 tokens after its <s>.
  tokens = greedy(model, params, [1, *start], 257)
  assert tokenizer.decode(tokens) == story


# -- There and back ------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_round_trip_gives_back_every_byte(case, tmp_path):
  model, params = load(case)
  hf.save_pretrained(tmp_path / "out", model, params)
  assert read_tensors(tmp_path / "out") == read_tensors(GOLDENS / case)
  wrote = json.loads((tmp_path / "out" / "config.json").read_text())
  assert wrote == json.loads((GOLDENS / case / "config.json").read_text())


def test_shards_hold_each_tensor_once_and_load_back(tmp_path):
  model, params = load("qwen3")
  hf.save_pretrained(tmp_path, model, params, max_shard_bytes=9_000)
  shards = sorted(tmp_path.glob("*.safetensors"))
  assert len(shards) > 2
  assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  for shard in shards:
    names = set(load_file(shard))
    assert names == {
      k for k, v in index["weight_map"].items() if v == shard.name
    }
  assert index["metadata"]["total_size"] == 2 * trees.count(params)
  _, again = hf.load_pretrained(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_export_holds_the_tokenizer_and_every_stop_id(tmp_path):
  source = tmp_path / "tokenizer"
  source.mkdir()
  (source / "tokenizer.json").write_text("{}")
  (source / "generation_config.json").write_text('{"top_k": 5}')
  tokenizer = SimpleNamespace(files=sorted(source.iterdir()), stop_ids=(2, 7))
  model, params = load("qwen3")
  hf.save_pretrained(tmp_path / "out", model, params, tokenizer)

  def read(name):
    return json.loads((tmp_path / "out" / name).read_text())

  assert read("tokenizer.json") == {}
  assert read("generation_config.json") == {"top_k": 5, "eos_token_id": [2, 7]}
  assert read("config.json")["eos_token_id"] == [2, 7]


def test_parameters_land_where_the_shardings_say():
  mesh = jax.make_mesh(
    (2, 2),
    ("a", "b"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:4],
  )

  def shardings(shapes):
    return trees.map_paths(
      lambda path, _: NamedSharding(
        mesh, PartitionSpec(None, "a") if "kernel" in path else PartitionSpec()
      ),
      shapes,
    )

  adapters = lora.LoraConfig(rank=2, alpha=4.0)
  _, params = hf.load_pretrained(
    GOLDENS / "qwen3", shardings=shardings, lora=adapters
  )
  _, want = load("qwen3")
  flat = trees.flatten(params)
  assert flat["layers/attn/q/kernel"].sharding.spec == PartitionSpec(None, "a")
  assert flat["layers/attn/q/lora_a"].sharding.mesh == mesh
  for path, x in trees.flatten(want).items():
    np.testing.assert_array_equal(flat[path], x)


# -- Adapters ------------------------------------------------------------------


@functools.cache
def load_adapted():
  """qwen3 with wide adapters, so that they matter."""
  adapters = lora.LoraConfig(rank=3, alpha=5.0)
  model, params = hf.load_pretrained(GOLDENS / "qwen3", lora=adapters)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  params = trees.map_paths(
    lambda path, x: (
      jax.random.normal(next(keys), x.shape) * 0.2
      if lora.is_adapter(path)
      else x
    ),
    params,
  )
  return model, params


def test_export_folds_adapters_in(tmp_path):
  model, params = load_adapted()
  tokens = read_golden("qwen3")["tokens"]
  want = next_token_nats(model, params, tokens)[1]
  hf.save_pretrained(tmp_path, model, params, dtype="float32")
  merged_model, merged = hf.load_pretrained(tmp_path)
  got = next_token_nats(merged_model, merged, tokens)[1]
  np.testing.assert_allclose(got, want, atol=1e-3)
  assert np.max(np.abs(got - read_golden("qwen3")["logits"])) > 1


# PEFT still reads a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
@pytest.mark.filterwarnings("ignore::FutureWarning:peft.*")
def test_peft_computes_the_same_from_our_adapter(tmp_path):
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  peft = pytest.importorskip("peft", reason="live oracle: needs peft")
  transformers = pytest.importorskip("transformers", reason="live oracle")
  model, params = load_adapted()
  tokens = read_golden("qwen3")["tokens"]
  hf.save_adapter(tmp_path, model, params, base="base")
  base = transformers.AutoModelForCausalLM.from_pretrained(
    GOLDENS / "qwen3", dtype=torch.float32
  )
  theirs = peft.PeftModel.from_pretrained(base, tmp_path)
  with torch.no_grad():
    want = theirs(torch.tensor(tokens).long()).logits.numpy()
  got = next_token_nats(model, params, tokens)[1]
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_an_adapter_folder_has_the_names_of_peft(tmp_path):
  model, params = load_adapted()
  hf.save_adapter(tmp_path, model, params, base="some/base")
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert (config["r"], config["lora_alpha"]) == (3, 5)
  assert config["base_model_name_or_path"] == "some/base"
  assert config["target_modules"] == sorted(
    f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")
  )
  tensors = load_file(tmp_path / "adapter_model.safetensors")
  name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
  want = params["layers"]["mlp"]["down"]["lora_a"][1].T
  np.testing.assert_array_equal(tensors[name], want)
  assert len(tensors) == 2 * 7 * 2


# -- What is refused -----------------------------------------------------------


def tampered(tmp_path, change, case="qwen3"):
  """A copy of a folder, changed."""
  folder = tmp_path / "model"
  shutil.copytree(GOLDENS / case, folder)
  change(folder)
  return folder


def edit_tensors(change):
  def edit(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)

  return edit


def edit_index(change):
  def edit(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))

  return edit


NORM = "model.norm.weight"


def only_pickle(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def link_out(folder):
  (folder / "model.safetensors").rename(folder.parent / "away.safetensors")
  (folder / "model.safetensors").symlink_to(folder.parent / "away.safetensors")


@pytest.mark.parametrize(
  ("case", "change", "named"),
  [
    ("qwen3", edit_tensors(lambda t: t.pop(NORM)), "missing.*model.norm"),
    (
      "qwen3",
      edit_tensors(lambda t: t.update(x_new=np.zeros(3, np.float32))),
      "unknown.*x_new",
    ),
    (
      "qwen3",
      edit_tensors(lambda t: t.update({NORM: t[NORM][:-1].copy()})),
      r"model.norm.weight has shape \(23,\); expected \(24,\)",
    ),
    (
      "qwen3",
      edit_tensors(lambda t: t.update({NORM: np.ones(24, np.int8)})),
      "model.norm.weight is I8",
    ),
    (
      "qwen3",
      edit_tensors(
        lambda t: t.update({"lm_head.weight": np.ones((61, 24), np.float32)})
      ),
      "lm_head.weight differs",
    ),
    ("qwen3", only_pickle, "pytorch_model.bin.*Convert"),
    ("qwen3", link_out, "away.safetensors"),
    ("qwen3", lambda f: (f / "model.safetensors").unlink(), "no weights"),
    (
      "qwen3",
      lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
      "not a safetensors file",
    ),
    ("qwen3", lambda f: (f / "config.json").unlink(), "no config.json"),
    ("qwen3", lambda f: (f / "config.json").write_text("{"), "not JSON"),
    (
      "qwen2_sharded",
      edit_index(lambda m: m.update({NORM: "../other.safetensors"})),
      r"\.\./other",
    ),
    (
      "qwen2_sharded",
      edit_index(lambda m: m.update({NORM: "/etc/x.safetensors"})),
      "/etc/x",
    ),
    (
      "qwen2_sharded",
      edit_index(lambda m: m.update({NORM: "gone.safetensors"})),
      "gone.safetensors",
    ),
    ("qwen2_sharded", edit_index(lambda m: m.pop(NORM)), "model.norm.weight"),
    (
      "qwen2_sharded",
      lambda f: (f / "model.safetensors.index.json").write_text("[]"),
      "no weight_map",
    ),
  ],
)
def test_a_tampered_folder_is_refused(case, change, named, tmp_path):
  with pytest.raises(ValueError, match=named):
    hf.load_pretrained(tampered(tmp_path, change, case))


def test_a_missing_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no such folder"):
    hf.load_pretrained(tmp_path / "nothing")


def test_known_extras_change_nothing(tmp_path):
  def add(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[key] = np.ones(5, np.float32)

  _, params = hf.load_pretrained(tampered(tmp_path, edit_tensors(add)))
  jax.tree.map(np.testing.assert_array_equal, params, load("qwen3")[1])


def test_the_hubs_own_links_are_followed(tmp_path):
  """snapshots/<commit>/file -> ../../blobs/<digest>."""

  def link(folder):
    (folder.parent / "blobs").mkdir()
    (folder / "model.safetensors").rename(folder.parent / "blobs" / "abc")

  folder = tampered(tmp_path, link)
  snapshot = tmp_path / "snapshots" / "commit"
  snapshot.parent.mkdir()
  folder.rename(snapshot)
  (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
  _, params = hf.load_pretrained(snapshot)
  jax.tree.map(np.testing.assert_array_equal, params, load("qwen3")[1])


def test_export_never_replaces_what_is_not_a_model(tmp_path):
  model, params = load("qwen3")
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(ValueError, match="not a model folder"):
    hf.save_pretrained(tmp_path, model, params)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
  model, params = load("qwen3")
  out = tmp_path / "out"
  hf.save_pretrained(out, model, params)
  before = read_tensors(out)

  def fail(*_, **__):
    raise OSError("disk full")

  monkeypatch.setattr(hf, "write_tensors", fail)
  with pytest.raises(OSError, match="disk full"):
    hf.save_pretrained(out, model, params)
  assert read_tensors(out) == before
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_refuses_parameters_of_another_model(tmp_path):
  model, params = load("qwen3")
  _, other = load("qwen2_sharded")
  with pytest.raises(ValueError, match="Pass the parameters of this model"):
    hf.save_pretrained(tmp_path / "out", model, other)
  _, adapted = load_adapted()
  with pytest.raises(ValueError, match="built without"):
    hf.save_pretrained(tmp_path / "out", model, adapted)
  with pytest.raises(ValueError, match="no adapters"):
    hf.save_adapter(tmp_path / "out", model, params, base="base")
  assert not (tmp_path / "out").exists()


def test_a_fresh_model_saves_and_loads(tmp_path):
  raw = json.loads((GOLDENS / "llama" / "config.json").read_text())
  raw["dtype"] = "float32"
  model = transformer.build(parse_config(raw))
  params = jax.jit(model.init)(jax.random.key(0))
  hf.save_pretrained(tmp_path / "out", model, params)
  _, again = hf.load_pretrained(tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, params, again)
