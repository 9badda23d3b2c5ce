"""Model folders: the same numbers as transformers, the same bytes back."""

import functools
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

from sft_jax.common import sharding, trees
from sft_jax.models import transformer
from sft_jax.models.config import parse_config
from sft_jax.models.hf import load_save
from sft_jax.models.lora import lora

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))
SHARED = Path(__file__).parents[4] / "shared" / "data" / "pretrained"


@functools.cache
def load(case):
  return load_save.load_pretrained(GOLDENS / case)


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


def assert_transformers_agrees(folder, case, logits, caplog):
  """It loads a folder without a new warning, and computes these logits."""
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  transformers = pytest.importorskip("transformers", reason="live oracle")
  # Its logger does not propagate; Python's warnings are errors here anyway.
  logger = transformers.utils.logging.get_logger("transformers")
  logger.addHandler(caplog.handler)
  warned = lambda: {
    record.message
    for record in caplog.records
    if record.levelname != "INFO" and "xIELU" not in record.message
  }
  # Of the folder that we read: it has opinions on RoPE fields, which we keep.
  transformers.AutoConfig.from_pretrained(GOLDENS / case)
  before = warned()
  odd = ("deepseek_v2", "gpt_oss", "hunyuan_v1_dense", "ministral3", "phi3")
  assert not before or case in odd
  caplog.clear()
  theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
    folder, output_loading_info=True
  )
  logger.removeHandler(caplog.handler)
  assert not any(loading.values()), loading
  assert warned() <= before
  with torch.no_grad():
    tokens = torch.tensor(read_golden(case)["tokens"]).long()
    np.testing.assert_allclose(logits, theirs(tokens).logits, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_our_export_without_a_new_warning(
  case, tmp_path, caplog
):
  pytest.importorskip("torch", reason="live oracle: needs torch")
  model, params = load(case)
  load_save.save_pretrained(
    tmp_path / "out", model, params, dtype="float32", max_shard_bytes=20_000
  )
  got = next_token_nats(model, params, read_golden(case)["tokens"])[1]
  assert_transformers_agrees(tmp_path / "out", case, got, caplog)


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
  model, params = load_save.load_pretrained(folder)
  # run.c writes 256 tokens after its <s>.
  tokens = greedy(model, params, [1, *start], 257)
  assert tokenizer.decode(tokens) == story


# -- There and back ------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_round_trip_gives_back_every_byte(case, tmp_path):
  """Fused, transposed, stacked: what was read is written, byte for byte."""
  model, params = load(case)
  load_save.save_pretrained(tmp_path / "out", model, params, dtype="bfloat16")
  assert read_tensors(tmp_path / "out") == read_tensors(GOLDENS / case)
  wrote = json.loads((tmp_path / "out" / "config.json").read_text())
  assert wrote == json.loads((GOLDENS / case / "config.json").read_text())
  mesh = sharding.make_mesh(-1, 1, 1)
  assert sharding.placements(params, mesh)  # Each has a rule.


def test_shards_hold_each_tensor_once_and_load_back(tmp_path):
  model, params = load("qwen3")
  load_save.save_pretrained(
    tmp_path, model, params, dtype="bfloat16", max_shard_bytes=9_000
  )
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
  _, again = load_save.load_pretrained(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_export_holds_the_tokenizer_and_every_stop_id(tmp_path):
  source = tmp_path / "tokenizer"
  source.mkdir()
  (source / "tokenizer.json").write_text("{}")
  (source / "generation_config.json").write_text('{"top_k": 5}')

  def copy(folder):
    shutil.copytree(source, folder, dirs_exist_ok=True)

  tokenizer = SimpleNamespace(write_files=copy, stop_ids=(2, 7))
  model, params = load("qwen3")
  load_save.save_pretrained(tmp_path / "out", model, params, tokenizer)

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
  _, params = load_save.load_pretrained(
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
  model, params = load_save.load_pretrained(GOLDENS / "qwen3", lora=adapters)
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
  load_save.save_pretrained(tmp_path, model, params, dtype="float32")
  merged_model, merged = load_save.load_pretrained(tmp_path)
  got = next_token_nats(merged_model, merged, tokens)[1]
  np.testing.assert_allclose(got, want, atol=1e-3)
  assert np.max(np.abs(got - read_golden("qwen3")["logits"])) > 1


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


def edit_config(**changes):
  def edit(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return edit


def link_config_out(folder):
  (folder / "config.json").rename(folder.parent / "away.json")
  (folder / "config.json").symlink_to(folder.parent / "away.json")


def link_to_blobs_of_no_cache(folder):
  """As the hub's cache has it, but the folder is no snapshot."""
  blobs = folder.parent.parent / "blobs"
  blobs.mkdir()
  (folder / "model.safetensors").rename(blobs / "abc")
  (folder / "model.safetensors").symlink_to(blobs / "abc")


def cut_off(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1])


def twice_in_two_shards(folder):
  first, second, _ = sorted(folder.glob("*.safetensors"))
  tensors = load_file(second)
  name, tensor = next(iter(load_file(first).items()))
  save_file({**tensors, name: tensor}, second)


def twice_in_the_index(folder):
  path = folder / "model.safetensors.index.json"
  text = path.read_text()
  line = f'"{NORM}": "model-00001-of-00003.safetensors",'
  path.write_text(text.replace('"weight_map": {', f'"weight_map": {{{line}', 1))


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
      "model.norm.weight is int8",
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
      "not a whole safetensors file",
    ),
    ("qwen3", lambda f: (f / "config.json").unlink(), "no config.json"),
    ("qwen3", lambda f: (f / "config.json").write_text("{"), "not JSON"),
    ("qwen3", edit_config(num_hidden_layers=10**9), "num_hidden_layers=10"),
    ("llama", edit_config(num_hidden_layers=9_999), "num_hidden_layers=9999"),
    ("mixtral", edit_config(num_local_experts=9_999), "of 9999 experts"),
    ("qwen3", edit_config(vocab_size=10**12), "vocab_size=1000000000000"),
    ("qwen3", edit_config(vocab_size=10**9), "embed_tokens.weight has shape"),
    ("qwen3", edit_config(hidden_size=10**7), "config.json"),
    ("qwen3", edit_config(num_attention_heads=60_000), "config.json"),
    ("qwen3", edit_config(rms_norm_eps=-1e-6), "rms_norm_eps=-1e-06"),
    ("qwen3", edit_config(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    (
      "qwen3",
      edit_config(rope_parameters={"rope_theta": -1.0}),
      "rope_theta=-1.0",
    ),
    ("qwen3", link_config_out, "config.json: a link to"),
    ("qwen3", link_to_blobs_of_no_cache, "a link to .*blobs"),
    ("qwen3", cut_off, "not a whole safetensors file"),
    (
      "qwen2_sharded",
      lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
      "model-00002-of-00003.safetensors: no such file",
    ),
    ("qwen2_sharded", twice_in_two_shards, "differs from the index at"),
    ("qwen2_sharded", twice_in_the_index, "a name twice"),
    ("qwen2_sharded", edit_index(lambda m: m.update({NORM: 3})), "names '3'"),
    (
      "qwen2_sharded",
      edit_index(lambda m: m.update({NORM: "model.bin"})),
      "names 'model.bin'",
    ),
    (
      "qwen2_sharded",
      edit_index(lambda m: m.update({NORM: "sub/x.safetensors"})),
      "names 'sub/x.safetensors'",
    ),
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
    load_save.load_pretrained(tampered(tmp_path, change, case))


def test_a_missing_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no such folder"):
    load_save.load_pretrained(tmp_path / "nothing")


def test_known_extras_change_nothing(tmp_path):
  def add(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[key] = np.ones(5, np.float32)

  _, params = load_save.load_pretrained(tampered(tmp_path, edit_tensors(add)))
  jax.tree.map(np.testing.assert_array_equal, params, load("qwen3")[1])


def test_a_model_with_two_tables_by_token_as_published(tmp_path):
  """Keys of layers that share those of others, and rows for new tokens."""

  def add(tensors):
    for name in ("k_proj", "v_proj", "k_norm"):
      key = "model.layers.{}.self_attn." + name + ".weight"
      tensors[key.format(3)] = tensors[key.format(2)].copy()

  folder = tampered(tmp_path, edit_tensors(add), "gemma4_text_shared")
  model, params = load_save.load_pretrained(folder, vocab_size=128)
  assert "3 tensors of layers that share keys not loaded" in model.config.notes
  assert model.config.raw["vocab_size_per_layer_input"] == 128
  want = load("gemma4_text_shared")[1]
  for at, rows in ((("embed",), 61), (("per_layer", "embed"), 96)):
    table, old = params, want
    for name in at:
      table, old = table[name], old[name]
    assert table["embedding"].shape[0] == 128
    np.testing.assert_array_equal(table["embedding"][:rows], old["embedding"])


@pytest.mark.parametrize(
  ("case", "name"),
  [
    ("deepseek_v3", "model.layers.2.eh_proj.weight"),
    ("nemotron_h", "mtp.layers.0.mixer.up_proj.weight"),
  ],
)
def test_layers_that_predict_further_tokens_are_left_out(case, name, tmp_path):
  add = lambda tensors: tensors.update({name: np.ones((2, 2), np.float32)})
  folder = tampered(tmp_path, edit_tensors(add), case)
  model, _ = load_save.load_pretrained(folder)
  assert "1 tensors that predict further tokens" in model.config.notes[-1]


PUBLISHED_GPT2 = {
  "activation_function": "gelu_new",
  "architectures": ["GPT2LMHeadModel"],
  "attn_pdrop": 0.1,
  "bos_token_id": 1,
  "embd_pdrop": 0.1,
  "eos_token_id": 2,
  "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-5,
  "model_type": "gpt2",
  "n_ctx": 128,
  "n_embd": 24,
  "n_head": 4,
  "n_inner": 40,
  "n_layer": 2,
  "n_positions": 128,
  "resid_pdrop": 0.1,
  "summary_activation": None,
  "summary_first_dropout": 0.1,
  "summary_proj_to_labels": True,
  "summary_type": "cls_index",
  "summary_use_proj": True,
  "task_specific_params": {"text-generation": {"do_sample": True}},
  "vocab_size": 61,
}


def as_published(folder):
  """GPT-2's own folder: an old config, bare names, masks among the weights."""
  (folder / "config.json").write_text(json.dumps(PUBLISHED_GPT2))
  tensors = load_file(folder / "model.safetensors")
  bare = {k.removeprefix("transformer."): x for k, x in tensors.items()}
  assert not bare.keys() & tensors.keys()
  for i in range(2):
    bare[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 128, 128), np.uint8))
    bare[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
  save_file(bare, folder / "model.safetensors")


def test_gpt2_loads_as_published(tmp_path):
  model, params = load_save.load_pretrained(
    tampered(tmp_path, as_published, "gpt2")
  )
  jax.tree.map(np.testing.assert_array_equal, params, load("gpt2")[1])
  load_save.save_pretrained(tmp_path / "out", model, params, dtype="bfloat16")
  assert read_tensors(tmp_path / "out") == read_tensors(GOLDENS / "gpt2")


def test_transformers_reads_published_gpt2_exported_again(tmp_path, caplog):
  model, params = load_save.load_pretrained(
    tampered(tmp_path, as_published, "gpt2")
  )
  load_save.save_pretrained(tmp_path / "out", model, params)
  logits = read_golden("gpt2")["logits"]
  assert_transformers_agrees(tmp_path / "out", "gpt2", logits, caplog)


def test_olmo_hybrid_has_the_form_of_its_folder(tmp_path):
  """The published one's is not that of transformers, as which goldens are."""
  at = "model.layers.1.feedforward_layer_norm.weight"

  def published(tensors):
    tensors["model.layers.1.post_attention_layernorm.weight"] = tensors.pop(at)
    for i in (0, 2):
      names = [f"model.layers.{i}.linear_attn.{x}_conv1d.weight" for x in "qkv"]
      whole = np.concatenate([tensors[name] for name in names])
      parts = np.split(whole, [12, 24])
      tensors |= dict(zip(names, map(np.ascontiguousarray, parts), strict=True))

  folder = tampered(tmp_path, edit_tensors(published), "olmo_hybrid")
  assert read_tensors(folder) != read_tensors(GOLDENS / "olmo_hybrid")
  model, params = load_save.load_pretrained(folder)
  jax.tree.map(np.testing.assert_array_equal, params, load("olmo_hybrid")[1])
  load_save.save_pretrained(tmp_path / "out", model, params, dtype="bfloat16")
  assert read_tensors(tmp_path / "out") == read_tensors(folder)


def test_names_are_bare_all_or_none(tmp_path):
  def half(folder):
    as_published(folder)
    edit_tensors(
      lambda t: t.update({"transformer.wte.weight": t["wte.weight"]})
    )(folder)

  with pytest.raises(ValueError, match=r"missing: \['transformer\.h\.0"):
    load_save.load_pretrained(tampered(tmp_path, half, "gpt2"))


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
  _, params = load_save.load_pretrained(snapshot)
  jax.tree.map(np.testing.assert_array_equal, params, load("qwen3")[1])


def test_export_never_replaces_what_is_not_a_model(tmp_path):
  model, params = load("qwen3")
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(ValueError, match="not a model folder"):
    load_save.save_pretrained(tmp_path, model, params)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
  model, params = load("qwen3")
  out = tmp_path / "out"
  load_save.save_pretrained(out, model, params)
  before = read_tensors(out)

  def fail(*_, **__):
    raise OSError("disk full")

  monkeypatch.setattr(load_save.files, "write_tensors", fail)
  with pytest.raises(OSError, match="disk full"):
    load_save.save_pretrained(out, model, params)
  assert read_tensors(out) == before
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_refuses_parameters_of_another_model(tmp_path):
  model, _ = load("qwen3")
  _, other = load("qwen2_sharded")
  with pytest.raises(ValueError, match="Pass the parameters of this model"):
    load_save.save_pretrained(tmp_path / "out", model, other)
  _, adapted = load_adapted()
  with pytest.raises(ValueError, match="built without"):
    load_save.save_pretrained(tmp_path / "out", model, adapted)
  assert not (tmp_path / "out").exists()


def test_a_fresh_model_saves_and_loads(tmp_path):
  raw = json.loads((GOLDENS / "llama" / "config.json").read_text())
  raw["dtype"] = "float32"
  model = transformer.build(parse_config(raw))
  params = jax.jit(model.init)(jax.random.key(0))
  load_save.save_pretrained(tmp_path / "out", model, params)
  _, again = load_save.load_pretrained(tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, params, again)
