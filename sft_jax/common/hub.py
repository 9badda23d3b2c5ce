"""Folders of the Hugging Face hub, fetched once and known by their commit.

    'org/name' or 'org/name@revision' -> Snapshot(folder, 'org/name', commit)
    push: folders -> the repository 'org/name' of a model

Only files that a caller's patterns name are downloaded, and never pickles nor
code; the rest is the business of `huggingface_hub`, which the [hub] extra
installs.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sft_jax.common.buckets import ranges, storage

# What a model folder needs here; everything else in a repository stays there.
TOKENIZER_FILES = (
  *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"),
  *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
  *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
MODEL_FILES = (
  *("*.safetensors", "*.safetensors.index.json", "config.json"),
  *("adapter_config.json", *TOKENIZER_FILES),
)
# Formats whose reading runs code, and code.
_CODE = (
  "bin pt pth ckpt pkl pickle joblib npy npz msgpack h5 keras py ipynb sh so"
)
_NEVER = [f"*.{ending}" for ending in _CODE.split()]
# A model's own files lie at the top; folders hold copies in other formats,
# as does `consolidated.safetensors`.
_NEVER_OF_MODELS = ("*/*", "consolidated*")

_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w][\w./-]*))?")


class Snapshot(NamedTuple):
  """A folder and where it came from."""

  folder: Path
  repo_id: str = ""  # 'org/name', or '' for a folder that was here already.
  commit: str = ""  # The 40 digits that the revision stood for, or ''.

  def __str__(self) -> str:
    """What to print and to record: 'org/name@commit', or the folder."""
    return f"{self.repo_id}@{self.commit}" if self.repo_id else str(self.folder)


def is_id(text: str) -> bool:
  """Whether a text has the form of a hub id.

  >>> [is_id(x) for x in ('org/name', 'org/name@v1', './name', 'a/b/c')]
  [True, True, False, False]
  """
  return _ID.fullmatch(text) is not None


def find_model(path: str | Path) -> Snapshot:
  """A model folder: the local one of this path, else the hub's of this id.

  Of gs:// and s3:// it is a copy whose weights come when they are read, see
  `ranges`.

  Raises ValueError: neither; see `fetch`.
  """
  name = str(path).removeprefix("hf://")
  if storage.is_remote(name):
    try:
      # All that an export has digests of.
      without = ("consolidated*", "*/*", *_NEVER)
      return Snapshot(ranges.fetch(name, without))
    except FileNotFoundError as error:
      raise ValueError(
        f"{name}: got no file of a model there, expected a folder with "
        "config.json and *.safetensors. Check the path."
      ) from error
  if Path(path).exists() or not is_id(name):
    return Snapshot(Path(path))
  return fetch(name, kind="model", patterns=MODEL_FILES)


def fetch(
  repo_id: str, *, kind: Literal["model", "dataset"], patterns: Sequence[str]
) -> Snapshot:
  """Downloads the files of a repository that match, or finds them in the cache.

  Args:
    repo_id: 'org/name' for the newest commit of its main branch, or
      'org/name@revision' with a commit, tag or branch.
    patterns: of file paths as `fnmatch` reads them, such as '*.jsonl'.

  Raises ValueError: not an id; the [hub] extra is not installed; no such
  repository or revision, no access or no network; none of its files match.
  """
  match = _ID.fullmatch(repo_id)
  if match is None:
    raise ValueError(
      f"hub: got the id {repo_id!r}; expected 'org/name' or "
      "'org/name@revision'. Correct it, or give a local path."
    )
  name, revision = match.groups()
  library = _library(repo_id)
  models_only = _NEVER_OF_MODELS if kind == "model" else ()
  try:
    folder = library.snapshot_download(
      name,
      repo_type=kind,
      revision=revision,
      allow_patterns=list(patterns),
      ignore_patterns=[*_NEVER, *models_only],
    )
  # Of the hub, of HTTP and of the disk: its errors share no class of its own.
  except Exception as error:
    first = (str(error).strip().splitlines() or [""])[0]
    raise ValueError(
      f"{repo_id}: no such local path, and the hub's {kind} did not come "
      f"({type(error).__name__}: {first}); expected a repository that this "
      "machine can reach or has in its cache. Correct the name, check network "
      "and token, or give the path of a local copy."
    ) from error
  folder = Path(folder)
  if not folder.is_dir() or not any(p.is_file() for p in folder.rglob("*")):
    raise ValueError(
      f"{repo_id}: got no file of it that matches {list(patterns)}; expected "
      "at least one. Choose a repository that holds such files."
    )
  # The cache names a snapshot's folder after its commit.
  return Snapshot(folder, name, folder.name)


_PUSH_CURES = {
  401: "a token that may write: hf auth login, or HF_TOKEN",
  403: "a token that may write there: ask its owner, or push to your own name",
  None: "a hub that answers: check network, proxy and HF_ENDPOINT",
}


def push_target(repo_id: str) -> str:
  """What would be pushed to, and as whom, in words; raises as `push` does."""
  with _pushing(repo_id) as api:
    user = api.whoami()["name"]
    kind = "exists" if api.repo_exists(repo_id) else "is new, so private"
  return f"{repo_id}, which {kind}, as {user}"


def push(repo_id: str, files: Sequence[Path], message: str) -> str:
  """Uploads files to the top of a model's repository; a new one is private.

  Weights there that are not among the files are removed, since some tools load
  every *.safetensors that they find. Returns the repository's address.

  Raises ValueError: not an id, no huggingface_hub, no token, no right to write
  or no network.
  """
  with _pushing(repo_id) as api:
    url = api.create_repo(repo_id, private=True, exist_ok=True)
    stale: list[str] | None = ["*.safetensors", "*.safetensors.index.json"]
    for folder in dict.fromkeys(file.parent for file in files):
      api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[file.name for file in files if file.parent == folder],
        delete_patterns=stale,
        commit_message=message,
      )
      stale = None  # What the first folder wrote stays.
    return str(url)


@contextlib.contextmanager
def _pushing(repo_id: str) -> Iterator[Any]:
  """huggingface_hub's HfApi; what it raises becomes a line with its cure."""
  match = _ID.fullmatch(repo_id)
  if match is None or match[2]:
    raise ValueError(
      f"hub: got {repo_id!r} to push to; expected 'org/name'. Correct it."
    )
  library = _library(repo_id)
  try:
    yield library.HfApi()
  except Exception as error:
    # Of a large file the library says at first only that it did not go.
    why = (isinstance(error, RuntimeError) and error.__cause__) or error
    status = getattr(getattr(why, "response", None), "status_code", None)
    if type(why).__name__ == "LocalTokenNotFoundError":
      status = 401
    cure = "what the hub takes; correct it"
    if status in _PUSH_CURES and not isinstance(why, ValueError):
      cure = _PUSH_CURES[status]
    said = re.sub("For more information check: .*", "", str(why))
    said = " ".join(f"{type(why).__name__}: {said}".split())[:300]
    raise ValueError(
      f"{repo_id}: was not pushed ({said}); expected {cure}."
    ) from error


def _library(repo_id: str) -> Any:
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
      f"{repo_id}: no such local path, and for ids of the hub huggingface_hub "
      "is expected. Correct the path, or pip install 'sft_jax[hub]'."
    ) from error
  return huggingface_hub
