"""The hub is asked for safetensors and words, never for pickles or code."""

import fnmatch
import json
import sys
from types import ModuleType

import pytest

import fake_hub
from configs import base
from sft_jax.common import hub
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.models.hf import load_save
from sft_jax.training.build import model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = (
  "config.json",
  "model-00001-of-00002.safetensors",
  "model.safetensors.index.json",
  "tokenizer.json",
  "chat_template.jinja",
  "pytorch_model.bin",
  "consolidated.safetensors",
  "original/consolidated.00.pth",
  "onnx/model.safetensors",
  "modeling_evil.py",
  "README.md",
  "data/train.jsonl",
  "data/train.pkl",
)


@pytest.fixture
def asked(monkeypatch, tmp_path):
  """A huggingface_hub that downloads from a list; returns what was asked."""
  calls = []

  def snapshot_download(repo_id, *, allow_patterns, ignore_patterns, **more):
    calls.append({"repo_id": repo_id, **more})
    if repo_id == "org/gone":
      raise ConnectionError("no route to huggingface.co\nlong explanation")
    folder = tmp_path / "hub" / "snapshots" / COMMIT
    folder.mkdir(parents=True, exist_ok=True)

    def matches(path, patterns):
      return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)

    for path in REPOSITORY:
      if matches(path, allow_patterns) and not matches(path, ignore_patterns):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("")
    return str(folder)

  fake = ModuleType("huggingface_hub")
  fake.snapshot_download = snapshot_download
  monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
  return calls


def files(snapshot):
  folder = snapshot.folder
  return {
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_a_model_is_its_safetensors_config_and_tokenizer(asked):
  found = hub.find_model("org/name@v1.0")
  assert asked == [
    {"repo_id": "org/name", "repo_type": "model", "revision": "v1.0"}
  ]
  assert (found.repo_id, found.commit) == ("org/name", COMMIT)
  assert str(found) == f"org/name@{COMMIT}"
  assert files(found) == set(REPOSITORY[:5])


def test_even_a_pattern_for_everything_brings_no_pickle(asked):
  found = hub.fetch("org/rows", kind="dataset", patterns=["*"])
  assert asked[0]["repo_type"] == "dataset"
  assert asked[0]["revision"] is None
  assert "data/train.jsonl" in files(found)
  assert not {
    path for path in files(found) if path.endswith(("pkl", "bin", "pth", "py"))
  }


def test_a_local_folder_comes_first(asked, tmp_path, monkeypatch):
  (tmp_path / "org" / "name").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  found = hub.find_model("org/name")
  assert str(found) == "org/name"
  assert found.commit == ""
  # What has not the form of an id is never asked for.
  for path in ("./org/name", "/org/name", "a/b/c", "name", "..", "a/..", "~/x"):
    assert hub.find_model(path).repo_id == ""
  assert asked == []


def test_no_network_and_no_match_say_so(asked):
  with pytest.raises(
    ValueError, match=r"org/gone: .*ConnectionError: no route"
  ):
    hub.find_model("org/gone")
  with pytest.raises(ValueError, match=r"no file of it that matches"):
    hub.fetch("org/name", kind="dataset", patterns=["*.parquet"])
  with pytest.raises(ValueError, match="expected 'org/name'"):
    hub.fetch("name", kind="model", patterns=["*"])


def test_without_the_extra_the_cure_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match=r"org/name.*sft_jax\[hub\]"):
    hub.find_model("org/name")


def test_the_real_library_takes_our_arguments(monkeypatch, tmp_path):
  huggingface_hub = pytest.importorskip("huggingface_hub")
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
  assert huggingface_hub.__version__
  with pytest.raises(ValueError, match="did not come"):
    hub.find_model("org/name@v1.0")


def test_a_pinned_snapshot_is_found_in_the_real_cache(monkeypatch, tmp_path):
  pytest.importorskip("huggingface_hub")
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  cache = tmp_path / "cache"
  monkeypatch.setenv("HF_HUB_CACHE", str(cache))
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
  folder = cache / "models--org--name" / "snapshots" / COMMIT
  folder.mkdir(parents=True)
  (folder / "config.json").write_text("{}")
  found = hub.find_model(f"org/name@{COMMIT}")
  assert found.folder.resolve() == folder.resolve()
  assert found.commit == COMMIT


def test_a_resumed_run_goes_on_with_the_commit_it_began_with(asked, tmp_path):
  """Whatever main points to by now."""
  config = base.get_config()
  config.workdir, config.model.path = str(tmp_path / "run"), "org/name"
  assert model.find_model(config).commit == COMMIT
  (tmp_path / "run").mkdir()
  record = {"repo_id": "org/name", "commit": "f" * 40, "folder": "away"}
  (tmp_path / "run" / "model.json").write_text(json.dumps(record))
  model.find_model(config)
  assert [call["revision"] for call in asked] == [None, "f" * 40]


def test_every_door_takes_an_id(asked):
  """The fake repository's files are empty: the folder is found, and refused."""
  for door in (load_save.load_pretrained, load_tokenizer):
    with pytest.raises(ValueError, match=COMMIT):
      door("org/name")
  assert len(asked) == 2


@pytest.mark.filterwarnings("ignore:Use 'content=")  # The library's own.
def test_a_push_leaves_no_weights_of_before(monkeypatch, tmp_path):
  """All files of the last push are there, and of others what is no weights."""
  names = ("config.json", "model.safetensors", "more/model.gguf")
  (tmp_path / "more").mkdir()
  for name in names:
    (tmp_path / name).write_text(name)
  files = [tmp_path / name for name in names]
  with fake_hub.opened(monkeypatch) as there:
    assert (
      hub.push_target("me/model") == "me/model, which is new, so private, as me"
    )
    assert hub.push("me/model", files, "first") == f"{there.url}/me/model"
    assert there.private
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    there.files |= dict.fromkeys((*old, "notes.md"), b"old")
    files[0].write_text("{}")
    assert "exists" in hub.push_target("me/model")
    hub.push("me/model", files, "second")
  want = {file.name: file.read_bytes() for file in files}
  assert there.files == want | {"notes.md": b"old"}


def test_who_may_not_push_is_told_why(monkeypatch, tmp_path):
  (tmp_path / "config.json").write_text("{}")
  monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
  files = [tmp_path / "config.json"]
  with fake_hub.opened(monkeypatch):
    for target, token, said in (
      ("other/model", fake_hub.TOKEN, "403.*may write there"),
      ("me/model", "hf_wrong", "401.*a token that may write: hf auth login"),
      ("me/model@v1", fake_hub.TOKEN, "expected 'org/name'"),
    ):
      monkeypatch.setenv("HF_TOKEN", token)
      with pytest.raises(ValueError, match=said) as found:
        hub.push(target, files, "")
      assert "\n" not in str(found.value)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ValueError, match=r"no token found.*hf auth login"):
      hub.push_target("me/model")
  monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
  with pytest.raises(ValueError, match=r"ConnectError.*check network"):
    hub.push_target("me/model")
