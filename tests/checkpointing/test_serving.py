"""Served as trained: whoever loads the folder says what the model says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from sft_jax.checkpointing import gguf, serving
from sft_jax.common import trees
from sft_jax.data.chat.options import DEFAULT
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models.hf import load_save
from sft_jax.models.hf.safetensors_files import CHECKSUMS

GOLDENS = Path(__file__).parents[1] / "models" / "goldens"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  """A folder of a model whose words matter, and what the model says."""
  folder = tiny.model_folder(tmp_path_factory.mktemp("served") / "tiny")
  model, params = load_save.load_pretrained(folder)
  wide = lambda path, x: x * 8 if path.endswith("kernel") else x
  params = trees.map_paths(wide, params)
  tokenizer = load_tokenizer(folder)
  load_save.save_pretrained(folder, model, params, tokenizer)
  trained = serving.reference(
    *(model, params, tokenizer), options=DEFAULT, max_new_tokens=8
  )
  return folder, trained


def states(verdicts):
  return {(v.tool, v.check): v.state for v in verdicts}


def edit(path, **changes):
  raw = json.loads(path.read_text()) if path.exists() else {}
  raw |= changes
  path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def test_a_folder_is_served_as_it_was_trained(served):
  folder, trained = served
  assert len({tuple(reply.tokens) for reply in trained.replies}) > 4
  found = serving.check(folder, trained)
  assert states(found).pop(("sft_jax", "replies")) == serving.SAME
  assert {*states(found).values()} <= {serving.SAME, serving.SKIPPED}
  rows = serving.verdict_lines([v._asdict() for v in found])
  assert rows == serving.verdict_lines(found)


def noisy(folder):
  path = folder / "model.safetensors"
  tensors = load_file(path)
  name = "model.layers.0.self_attn.v_proj.weight"
  tensors[name] = tensors[name][::-1].copy()
  save_file(tensors, path)


def untied(folder):
  edit(folder / "config.json", tie_word_embeddings=False)


def other_head(folder):
  path = folder / "model.safetensors"
  tensors = load_file(path)
  save_file(
    tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path
  )


def template(folder):
  path = folder / "chat_template.jinja"
  path.write_text(path.read_text().replace("\n", " "))


def adapter(**changes):
  def write(folder):
    (folder / "adapter").mkdir()
    settings = {"target_modules": ["q_proj", "v_proj"], "bias": "none"}
    edit(folder / "adapter/adapter_config.json", **(settings | changes))

  return write


# What is planted, and the check that must see it.
FAULTS = {
  "dropped stop": (
    "stop ids",
    lambda f: edit(f / "generation_config.json", eos_token_id=2),
  ),
  "no stop": (
    "stop ids",
    lambda f: (f / "generation_config.json").unlink(),
  ),
  "edited template": ("replies", template),
  "second template": (
    "templates",
    lambda f: edit(f / "tokenizer_config.json", chat_template="{{ messages }}"),
  ),
  "named templates beside the file": (
    "templates",
    lambda f: edit(
      f / "tokenizer_config.json",
      chat_template=[{"name": "default", "template": "{{ messages }}"}],
    ),
  ),
  "adapter on the head": (
    "adapter on tables",
    adapter(target_modules=["q_proj", "lm_head"]),
  ),
  "adapter on a mixer": (
    "adapter targets",
    adapter(target_modules=["q_proj", "model.layers.0.mamba.in_proj"]),
  ),
  "ranks by pattern": ("adapter", adapter(rank_pattern={"q_proj": 8})),
  "modules to save": ("adapter", adapter(modules_to_save=["embed_tokens"])),
  "biases beside adapters": ("adapter", adapter(bias="all")),
  "untied head": ("head", untied),
  "another head": ("head", other_head),
  "wrong rope": (
    "replies",
    lambda f: edit(f / "config.json", rope_theta=500.0),
  ),
  "wrong dtype": (
    "dtype",
    lambda f: edit(f / "config.json", torch_dtype="bfloat16"),
  ),
  "padded vocabulary": (
    "vocabulary",
    lambda f: edit(f / "config.json", vocab_size=512),
  ),
  "values of other heads": ("replies", noisy),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_be_served_otherwise_is_refused(fault, served, tmp_path):
  folder, trained = served
  shutil.copytree(folder, tmp_path / "tiny")
  (tmp_path / "tiny" / CHECKSUMS).unlink(missing_ok=True)
  check, plant = FAULTS[fault]
  plant(tmp_path / "tiny")
  beside = tmp_path / "tiny/adapter"
  if check == "replies":
    found = serving.check(tmp_path / "tiny", trained, adapter=beside)
  else:  # What the check begins with, and compiles nothing.
    found = [*serving.rules(tmp_path / "tiny", trained.tokenizer, beside)]
  differs = [v for v in found if v.state == serving.DIFFERS]
  assert check in {v.check for v in differs}, [str(v) for v in found]
  assert all(len(v.note) > 20 for v in differs)


def test_plain_adapters_are_served(served, tmp_path):
  folder, trained = served
  adapter()(tmp_path)
  found = serving.rules(folder, trained.tokenizer, tmp_path / "adapter")
  assert {v.state for v in found} == {serving.SAME}


def test_the_first_difference_is_named():
  """Token, stop or prompt; a lead within rounding is a tie."""
  says = [([1], [5, 6], True), ([2], [7, 8], False)]
  replies = [serving.Reply(*reply) for reply in says]
  scores = np.array([0, 0, 0, 0, 0, 9, 9, 9, 10, 9.9999, 9])
  trained = serving.Reference(
    *(None, None, None, [], replies), lambda tokens: scores, 2
  )

  def compared(*second, first=replies[0]):
    got = [first, serving.Reply(*second)]
    return serving._compare("x", trained, got, 1e-4)

  assert compared(*says[1])[2:] == (
    *(serving.SAME, "2 prompts, 4 tokens, 1 stops."),
  )
  other = compared([2], [7, 10], False)
  assert other.state == serving.DIFFERS
  assert other.note.startswith("prompt 1, token 1: 10 where the model says 8")
  assert compared([2], [7, 9], False).state == serving.TIE
  assert "prompt 1: stops at token 1, where the model goes on" in str(
    compared([2], [7], True)
  )
  on = serving.Reply([1], [5, 6], False)
  late = compared(*says[1], first=on)
  assert (
    late.note == "prompt 0: does not stop at token 2, where the model stops."
  )
  assert "prompt 1 is [3]; trained on [2]." in str(compared([3], [7, 8], False))


# -- GGUF ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", gguf.DTYPES)
def test_a_gguf_file_holds_the_tensors_and_the_words(dtype, served, tmp_path):
  library = pytest.importorskip("gguf", reason="needs the extra [gguf]")
  folder, trained = served
  file = tmp_path / f"model-{dtype}.gguf"
  assert gguf.write(folder, file, dtype=dtype) == []
  read = library.GGUFReader(file)
  names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
  stops = {int(read.fields[x].contents()) for x in names if x in read.fields}
  assert stops == {*trained.tokenizer.stop_ids}
  back = {
    one.name: library.quants.dequantize(one.data, one.tensor_type)
    for one in read.tensors
  }
  want = dict(gguf.tensors(folder, trained.model.config))
  assert len(back) == len(want)
  q, up = "blk.1.attn_q.weight", "blk.0.ffn_up.weight"
  for name, theirs in ((q, "self_attn.q_proj"), (up, "mlp.up_proj")):
    x = want[f"model.layers.{name[4]}.{theirs}.weight"]
    slack = {"float32": 0, "bfloat16": 2**-8, "q8_0": 2**-7}[dtype]
    np.testing.assert_allclose(
      back[name], x, rtol=0, atol=slack * np.abs(x).max()
    )


def test_rows_lie_as_llama_cpp_turns_them():
  """Of a Llama: dimension i of a head beside i + H / 2, which it turns with."""
  model, params = load_save.load_pretrained(GOLDENS / "llama")
  q = np.asarray(params["layers"]["attn"]["q"]["kernel"][1]).T
  got = dict(gguf.tensors(GOLDENS / "llama", model.config))
  half = model.config.head_dim // 2
  order = [i + j for i in range(half) for j in (0, half)]
  x = got["model.layers.1.self_attn.q_proj.weight"]
  np.testing.assert_array_equal(x[: 2 * half], q[order])


def test_llama_cpp_says_what_the_model_says(served, tmp_path):
  """Words as well: the test's tokenizer splits as GPT-2's does."""
  pytest.importorskip("gguf", reason="needs the extra [gguf]")
  pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
  folder, trained = served
  file = tmp_path / "model-float32.gguf"
  gguf.write(folder, file, dtype="float32")
  found = states(serving.check(folder, trained, gguf_file=file))
  assert found["llama.cpp", "replies"] == serving.SAME


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "layer 0"),
    (
      {"model_type": "ernie4_5", "architectures": ["Ernie4_5ForCausalLM"]},
      "model_type is 'ernie4_5'",
    ),
    (
      {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
      "layer 1",
    ),
  ],
)
def test_what_llama_cpp_does_not_have_is_refused(
  change, named, served, tmp_path
):
  pytest.importorskip("gguf", reason="needs the extra [gguf]")
  folder, _ = served
  shutil.copytree(folder, tmp_path / "tiny")
  edit(tmp_path / "tiny/config.json", **change)
  with pytest.raises(ValueError, match=named):
    gguf.write(tmp_path / "tiny", tmp_path / "model.gguf")


def test_a_modelfile_writes_what_the_template_writes(served):
  _, trained = served
  made = gguf.modelfile(
    "model.gguf", trained.tokenizer, trained.model.config, DEFAULT
  )
  first = "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
  system = "<|im_start|>system\n{{ .System }}<|im_end|>\n"
  assert made == (
    'FROM ./model.gguf\nTEMPLATE """{{ if .System }}'
    f"{system}<|im_start|>user\n{{{{ else }}}}<|im_start|>user\n{{{{ end }}}}"
    f'{first.partition("user" + chr(10))[2]}{{{{ .Response }}}}"""\n'
    'PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n'
    "PARAMETER num_ctx 128\n"
  )
