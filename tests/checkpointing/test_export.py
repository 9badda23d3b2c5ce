"""An export is the model in memory, or it is set aside and named."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sft_jax
import tiny
from sft_jax.checkpointing import export
from sft_jax.common import sharding, trees
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, Message
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models.hf import load_save
from sft_jax.models.lora import lora

GOLDENS = Path(__file__).parents[1] / "models" / "goldens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  return tiny.model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder):
  return *load_save.load_pretrained(folder), load_tokenizer(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_reports_what_it_found(loaded, dtype, tmp_path):
  model, params, tokenizer = loaded
  found = sft_jax.save_pretrained(
    tmp_path / "out", model, params, tokenizer, dtype=dtype
  )
  assert (found.path, found.dtype) == (str(tmp_path / "out"), dtype)
  assert found.stop_ids == [2, 4]
  assert found.prompts == 3
  assert 0 <= found.logit_difference < found.tolerance
  # Rounding shows, and is the only thing that does.
  assert found.logit_difference == 0
  assert (found.rounding == 0) == (dtype == "float32")
  assert "logits within" in str(found)
  assert [p.name for p in tmp_path.iterdir()] == ["out"]
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  assert {x.dtype.name for x in tensors.values()} == {dtype}


def test_without_a_tokenizer_the_weights_are_compared(loaded, tmp_path):
  model, params, _ = loaded
  found = export.save_pretrained(tmp_path / "out", model, params)
  assert (found.stop_ids, found.prompts) == (None, 0)


def test_merged_adapters_are_compared_with_the_adapters(folder, tmp_path):
  """The model in memory computes with adapters, the folder without."""
  adapters = lora.LoraConfig(rank=3, alpha=5.0)
  model, params = load_save.load_pretrained(folder, lora=adapters)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  params = trees.map_paths(
    lambda path, x: (
      jax.random.normal(next(keys), x.shape) * 0.2
      if path.endswith("lora_b")
      else x
    ),
    params,
  )
  found = export.save_pretrained(tmp_path / "out", model, params)
  assert 0 < found.logit_difference < found.tolerance < 1e-2


@pytest.mark.parametrize(
  ("more", "quantized"),
  [({"init": "pissa"}, "int8"), ({"dora": True}, "nf4")],
)
def test_kin_of_lora_are_compared_too(folder, tmp_path, more, quantized):
  """Columns' lengths, PiSSA's start, codes; each after training, as it were."""
  adapters = lora.LoraConfig(rank=3, alpha=5.0, **more)
  model, params = load_save.load_pretrained(
    folder, lora=adapters, quantize=quantized
  )
  trained, frozen = trees.partition(params, adapters.trains)
  flat, rng = trees.flatten(trained), np.random.default_rng(2)
  moved = {k: x + 0.05 * rng.standard_normal(x.shape) for k, x in flat.items()}
  moved = {k: jnp.asarray(x, jnp.float32) for k, x in moved.items()}
  params = trees.merge(trees.unflatten(moved), frozen)
  found = export.save_pretrained(tmp_path / "out", model, params)
  assert found.logit_difference < found.tolerance
  stranger, loaded = load_save.load_pretrained(tmp_path / "out")
  assert stranger.lora is None
  assert not [k for k in trees.flatten(loaded) if "lora" in k or "codes" in k]
  # The adapters do far more than the tolerance would hide.
  _, base = load_save.load_pretrained(folder)
  tokens = np.arange(12, dtype=np.int32)[None]
  compute = jax.jit(lambda p: stranger.logits(p, stranger.hidden(p, tokens)))
  moved_by = float(jnp.max(jnp.abs(compute(loaded) - compute(base))))
  assert moved_by > 10 * found.tolerance


@pytest.mark.parametrize("case", ["tiny", "mixtral"])
def test_sharded_parameters_are_exported_too(case, loaded, tmp_path):
  """Of experts too, which train on a mesh and are compared without."""
  model, params, _ = loaded
  if case != "tiny":
    model, params = load_save.load_pretrained(GOLDENS / case)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  place = lambda shapes: sharding.param_shardings(shapes, mesh)
  spread = jax.device_put(params, place(params))
  export.save_pretrained(tmp_path / "one", model, params)
  export.save_pretrained(tmp_path / "many", model, spread, shardings=place)
  one, many = (
    (tmp_path / name / "model.safetensors").read_bytes()
    for name in ("one", "many")
  )
  assert one == many


# -- What is set aside ---------------------------------------------------------


def test_its_template_needs_none_of_the_runs_settings(folder, tmp_path):
  """As with <think> in the prompt, and thinking switched off by a variable."""
  model, params = load_save.load_pretrained(folder)
  changed = shutil.copytree(folder, tmp_path / "changed")
  path = changed / "chat_template.jinja"
  path.write_text(
    path.read_text()
    + "{% if add_generation_prompt %}{{ mood | default('<hm>') }}{% endif %}"
  )
  tokenizer = load_tokenizer(changed)
  options = RenderOptions({"mood": "<think>"}, generation_prompt="omit")
  asked = Conversation((Message("user", "Hi"),))
  export.save_pretrained(
    tmp_path / "out", model, params, tokenizer, options=options
  )
  stranger = load_tokenizer(tmp_path / "out")
  expected = encode.prompt_ids(asked, tokenizer, options)
  assert encode.prompt_ids(asked, stranger) == expected
  whole = encode.prompt_ids(
    asked, tokenizer, RenderOptions({"mood": "<think>"})
  )
  assert whole[: len(expected)] == expected != whole


def spoil_tensor(folder):
  path = folder / "model.safetensors"
  tensors = load_file(path)
  tensors["model.layers.1.mlp.up_proj.weight"][3, 2] += 1e-6
  save_file(tensors, path)


def spoil_json(name, **changes):
  def spoil(folder):
    value = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(value))

  return spoil


def spoil_template(folder):
  path = folder / "chat_template.jinja"
  path.write_text(path.read_text().replace("assistant", "Assistant"))


@pytest.mark.parametrize(
  ("spoil", "named"),
  [
    (spoil_tensor, "layers/mlp/up/kernel differs by"),
    (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    (spoil_json("config.json", rms_norm_eps=1e-3), r"norm_eps=0\.001"),
    (spoil_json("generation_config.json", eos_token_id=[2]), r"stops at \[2\]"),
    (spoil_template, "is rendered as"),
    (lambda f: (f / "chat_template.jinja").unlink(), "is rendered as"),
  ],
)
def test_what_is_not_the_model_is_set_aside(
  loaded, spoil, named, tmp_path, monkeypatch
):
  model, params, tokenizer = loaded
  out = tmp_path / "out"
  export.save_pretrained(out, model, params, tokenizer)
  before = {p.name: p.read_bytes() for p in out.iterdir()}
  write = load_save.write_folder

  def spoilt(folder, *arguments, **more):
    write(folder, *arguments, **more)
    spoil(folder)

  monkeypatch.setattr(load_save, "write_folder", spoilt)
  for _ in range(2):
    with pytest.raises(ValueError, match=rf"out\.rejected.*{named}"):
      export.save_pretrained(out, model, params, tokenizer)
  assert {p.name for p in tmp_path.iterdir()} == {
    *("out", "out.rejected", "out.rejected-2")
  }
  # The good one is as it was.
  assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_by_default_the_dtype_is_that_of_the_parameters(folder, tmp_path):
  """Whatever config.json of the base says, which is float32 here."""
  model, params = load_save.load_pretrained(folder, param_dtype="bfloat16")
  assert export.save_pretrained(tmp_path / "out", model, params).dtype == (
    "bfloat16"
  )
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  assert raw["torch_dtype"] == "bfloat16"


def test_a_folder_in_another_dtype_is_set_aside(folder, tmp_path, monkeypatch):
  """Even of numbers that it can hold."""
  model, params = load_save.load_pretrained(folder)
  params = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params
  )
  write = load_save.write_folder

  def narrow(folder, *arguments, **more):
    write(folder, *arguments, **more | {"dtype": "bfloat16"})

  monkeypatch.setattr(load_save, "write_folder", narrow)
  with pytest.raises(ValueError, match=r"tensors are \['bfloat16'\]"):
    export.save_pretrained(tmp_path / "out", model, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_is_a_little_off_is_set_aside(
  dtype, folder, tmp_path, monkeypatch
):
  """Two signs of one kernel: what rounding to bfloat16 would hide."""
  adapters = lora.LoraConfig(rank=3, alpha=5.0)
  model, params = load_save.load_pretrained(folder, lora=adapters)
  merged = load_save.merged

  def off(model, params, dtype):
    tree = trees.flatten(merged(model, params, dtype))
    path = "layers/mlp/up/kernel"
    tree[path] = tree[path].at[1, 3, :2].multiply(-1)
    return trees.unflatten(tree)

  monkeypatch.setattr(load_save, "merged", off)
  with pytest.raises(ValueError, match=r"out\.rejected.*logits differ by"):
    export.save_pretrained(tmp_path / "out", model, params, dtype=dtype)


def test_logits_that_differ_are_set_aside(loaded, tmp_path, monkeypatch):
  """A merge that forgets a sign passes the comparison with itself."""
  model, params, _ = loaded
  monkeypatch.setattr(
    load_save,
    "merged",
    lambda _, params, dtype: jax.tree.map(jnp.negative, params),
  )
  with pytest.raises(ValueError, match=r"out\.rejected.*logits differ by"):
    export.save_pretrained(tmp_path / "out", model, params)


def test_a_killed_export_leaves_nothing_in_the_way(loaded, tmp_path):
  model, params, _ = loaded
  left = tmp_path / ".out.writing"
  left.mkdir()
  (left / "model.safetensors").write_text("half of it")
  export.save_pretrained(tmp_path / "out", model, params)
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -- Seen by transformers ------------------------------------------------------


def import_live():
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  return torch, pytest.importorskip("transformers", reason="live oracle")


# Libraries of others, importing others in turn.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rank", [0, 4])
def test_transformers_goes_on_with_the_chat(tmp_path, rank, caplog):
  torch, transformers = import_live()
  model_folder = tiny.model_folder(tmp_path / "model")
  rows = tiny.rows_file(tmp_path / "rows.jsonl")
  config = tiny.config(
    tmp_path,
    model_folder,
    rows,
    steps=20,
    checkpoint__every=0,
    lora__rank=rank,
    optim__learning_rate=5e-3,
    model__new_tokens=("<|extra|>",),  # No row has it: it is only carried.
  )
  result = sft_jax.train(config)
  evidence = export.Evidence(**result.metrics["export"])
  assert evidence.logit_difference < 1e-4
  assert str(evidence) in (tmp_path / "run" / "report.html").read_text()
  folder = tmp_path / "run" / "export"
  model, params = sft_jax.load_pretrained(folder)
  tokenizer = sft_jax.load_tokenizer(folder)
  # With no warning, in logs (its own logger does not propagate) or otherwise.
  logger = transformers.utils.logging.get_logger("transformers")
  logger.addHandler(caplog.handler)
  theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
    folder, output_loading_info=True
  )
  their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  assert not any(loading.values()), loading
  new = tokenizer.special_tokens["<|extra|>"]
  assert their_tokenizer.convert_tokens_to_ids("<|extra|>") == new
  assert their_tokenizer("a<|extra|>b").input_ids.count(new) == 1

  turns = [
    {"role": "user", "content": "What goes with cat?"},
    {"role": "assistant", "content": "The pet cat."},
    {"role": "user", "content": "What goes with hat?"},
  ]
  prompt = sft_jax.Conversation(
    tuple(sft_jax.Message(t["role"], t["content"]) for t in turns)
  )
  ids = sft_jax.inference.generate.encode.prompt_ids(prompt, tokenizer)
  assert (
    their_tokenizer.apply_chat_template(
      turns, add_generation_prompt=True, return_dict=False
    )
    == ids
  )

  tokens = np.asarray([ids], np.int32)
  logits = jax.jit(lambda p, t: model.logits(p, model.hidden(p, t)))(
    params, jnp.asarray(tokens)
  )
  with torch.no_grad():
    want = theirs(torch.asarray(tokens, dtype=torch.long)).logits.numpy()
  np.testing.assert_allclose(logits, want, atol=1e-4)

  (reply,) = sft_jax.generate(
    model, params, tokenizer, [prompt], max_new_tokens=16
  )
  with torch.no_grad():
    output = theirs.generate(
      torch.asarray([ids]), max_new_tokens=16, do_sample=False
    )[0, len(ids) :].tolist()
  logger.removeHandler(caplog.handler)
  assert not [r.message for r in caplog.records if r.levelname != "INFO"]
  stops = set(tokenizer.stop_ids)
  assert set(theirs.generation_config.eos_token_id) == stops
  assert [t for t in output if t not in stops] == reply.tokens
