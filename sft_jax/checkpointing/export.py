"""The export that proves itself: written, read back, compared, then in place.

A folder takes its name only after it was loaded from the disk as a stranger
would load it, and found to hold the parameters, to compute the logits, to stop
where the model stops and to render the prompts that it was trained on.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.common import distributed, trees
from sft_jax.common.workdir import replace_folder
from sft_jax.data.chat import template as templates
from sft_jax.data.chat import template_export
from sft_jax.data.chat.options import DEFAULT, RenderOptions
from sft_jax.data.conversation import Conversation, Message, RowError
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from sft_jax.models import transformer
from sft_jax.models.hf import load_save, parameter_map
from sft_jax.models.hf.safetensors_files import write_checksums
from sft_jax.models.transformer import Model

# What both tokenizers render. Not every template takes every one.
_CONVERSATIONS = tuple(
  Conversation(tuple(Message(role, text) for role, text in turns))
  for turns in (
    [("user", "What is 2 + 2?")],
    [
      ("user", "Name a colour."),
      ("assistant", "Red."),
      ("user", "  Another, in Grün or 漢字?\n"),
    ],
    [("system", "Answer in one word."), ("user", "Is water wet?")],
  )
)
_ROWS, _TOKENS = 4, 32  # Of the prompts that both models compute.


class Evidence(NamedTuple):
  """What an export was found to be.

  Attributes:
    logit_difference: the largest |difference| between the logits of the merged
      weights and of the model in memory, both computed in float32.
    tolerance: what the difference may be, whatever the dtype: the folder's
      weights are exactly the merged ones, rounded.
    rounding: the largest |difference| that this rounding makes to the logits.
    stop_ids: at which the folder's model stops; None without a tokenizer.
    prompts: conversations that both tokenizers rendered to the same ids.
  """

  path: str
  dtype: str
  logit_difference: float
  tolerance: float
  rounding: float
  stop_ids: list[int] | None
  prompts: int

  def __str__(self) -> str:
    """One line for people."""
    line = (
      f"read back: {self.dtype} weights equal, logits within "
      f"{self.logit_difference:.1e} (tolerance {self.tolerance:.1e})"
    )
    if self.rounding > self.tolerance:
      line += f", rounding moves logits by {self.rounding:.2g}"
    if self.stop_ids is not None:
      line += f", stops at {self.stop_ids}, {self.prompts} prompts the same"
    return line


def save_pretrained(
  path: str | Path,
  model: Model,
  params: trees.Tree,
  tokenizer: Tokenizer | None = None,
  *,
  dtype: Any = None,
  max_shard_bytes: int = 5_000_000_000,
  options: RenderOptions = DEFAULT,
  shardings: load_save.Shardings | None = None,
  export_into: str | Path | None = None,
  share: Callable[[Path], None] = lambda folder: None,
) -> Evidence:
  """Writes a Hugging Face folder, adapters merged, and verifies it.

  Digests of what was verified are in its SHA256SUMS, which loading checks.

  Args:
    path: the folder to write; a model folder that is there is replaced.
    options: that prompts were trained with.
    shardings: where the folder's parameters are while they are compared,
      see `models.hf.load_pretrained`.
    export_into: the folder that the model came from, perhaps a multimodal one:
      what is written is a copy in which this model's weights alone are others,
      of the dtype that they have there; `tokenizer` and `dtype` have no say.
    share: gives every process the folder that the first has written, where
      they have none in common.

  Raises ValueError: parameters that are not this model's, a path that holds
  something else than a model; or what was written is not what was meant: it is
  then kept beside `path` as `<name>.rejected`.
  """
  path = Path(path)
  written = load_save.export_dtype(params, dtype)
  if export_into is not None:
    tokenizer, written = None, None

  def fill(folder: Path) -> None:
    if export_into is None:
      sizes = {"dtype": written, "max_shard_bytes": max_shard_bytes}
      load_save.write_folder(folder, model, params, tokenizer, **sizes)
    else:
      load_save.write_into(folder, Path(export_into), model, params)
    if tokenizer:
      _write_template(folder, tokenizer, options)
    distributed.barrier("sft_jax.export")
    share(folder)
    try:
      found.append(
        _verify(folder, model, params, tokenizer, written, options, shardings)
      )
    except ValueError as error:
      rejected = _keep_aside(folder, path)
      raise ValueError(
        f"{rejected}: the export is not the model in memory ({error}); "
        f"expected the same. Do not use it; {path} was not written."
      ) from error
    if jax.process_index() == 0:
      write_checksums(folder)

  found: list[Evidence] = []
  replace_folder(path, "config.json", fill)
  return found[0]._replace(path=str(path))


def _write_template(
  folder: Path, tokenizer: Tokenizer, options: RenderOptions
) -> None:
  """Replaces the chat template where it alone would give other prompts."""
  if tokenizer.chat_template is None or jax.process_index():
    return
  template = templates.chat_template(tokenizer)
  if source := template_export.exported(template, options):
    path = folder / "chat_template.jinja"
    path.write_text(source, encoding="utf-8")


def _verify(
  folder: Path,
  model: Model,
  params: trees.Tree,
  tokenizer: Tokenizer | None,
  written: np.dtype | None,
  options: RenderOptions,
  shardings: load_save.Shardings | None,
) -> Evidence:
  """Raises ValueError where the folder is not the model."""
  held = {
    tensor.dtype
    for name, tensor in load_save.model_tensors(folder).items()
    if not name.endswith(parameter_map.FLOAT32)
  }
  if held != {written or min(held, key=lambda dtype: dtype.itemsize)}:
    raise ValueError(f"its tensors are {sorted(map(str, held))}, not {written}")
  written = held.pop()
  stops, prompts = None, []
  if tokenizer:
    stops, prompts = same_words(folder, tokenizer, options)
  # Both dtypes that parameters can have hold every float16.
  keep = jnp.bfloat16 if written == jnp.bfloat16 else jnp.float32
  stranger, loaded = load_save.load_pretrained(
    folder, param_dtype=keep, shardings=shardings
  )
  if stranger.config != model.config:
    raise ValueError(f"config.json says {stranger.config}, not {model.config}")
  exact = load_save.merged(model, params, jnp.float32)
  _same_weights(exact, loaded, written)
  # In float32, and without adapters the same program for both.
  plain = transformer.build(model.config, lora=model.lora)
  compute = jax.jit(lambda p, t: plain.logits(p, plain.hidden(p, t)))
  tokens = _tokens(model, prompts)
  with jax.default_matmul_precision("highest"):
    expected, got = compute(params, tokens), compute(exact, tokens)
    rounding = float(_largest(compute(loaded, tokens), expected))
  difference = float(_largest(got, expected))
  tolerance = 1e-4 * max(1.0, float(jnp.max(jnp.abs(expected))))
  if not difference <= tolerance:
    raise ValueError(
      f"logits differ by {difference:.3g}, more than {tolerance:.3g}"
    )
  return Evidence(
    path=str(folder),
    dtype=written.name,
    logit_difference=difference,
    tolerance=tolerance,
    rounding=rounding,
    stop_ids=stops,
    prompts=len(prompts),
  )


def _tokens(model: Model, prompts: list[list[int]]) -> np.ndarray:
  """[rows, tokens]: the first prompt, then ids from the whole vocabulary."""
  c = model.config
  shape = (_ROWS, min(_TOKENS, c.max_positions))
  tokens = np.random.default_rng(0).integers(c.vocab_size, size=shape)
  for row, ids in zip(tokens, prompts[:1], strict=False):
    row[:] = np.resize(ids, row.shape)
  return tokens.astype(np.int32)


@jax.jit
def _largest(one: jax.Array, other: jax.Array) -> jax.Array:
  """The largest difference; NaN if there is any."""
  difference = one.astype(jnp.float32) - other.astype(jnp.float32)
  return jnp.max(jnp.abs(difference))


def _same_weights(
  ours: trees.Tree, loaded: trees.Tree, written: np.dtype
) -> None:
  """Every parameter, rounded as it was written, is the one read back."""
  there = trees.flatten(loaded)
  for path, x in trees.flatten(ours).items():
    stored = x if path.endswith("/correction") else x.astype(written)
    difference = _largest(stored, there.pop(path))
    # Devices may flush what is below the smallest normal number to zero.
    if not float(difference) <= float(jnp.finfo(written).tiny):
      raise ValueError(f"{path} differs by {float(difference):.3g}")


def same_words(
  folder: Path, tokenizer: Tokenizer, options: RenderOptions
) -> tuple[list[int], list[list[int]]]:
  """The stop ids and the prompts of the folder, which are the tokenizer's."""
  stranger = load_tokenizer(folder)
  stops = list(tokenizer.stop_ids)
  generation = json.loads((folder / "generation_config.json").read_text())
  listed = generation.get("eos_token_id", [])
  listed = listed if isinstance(listed, list) else [listed]
  for where, got in (
    ("the folder's tokenizer", list(stranger.stop_ids)),
    ("generation_config.json", sorted(listed)),
  ):
    if got != stops:
      raise ValueError(f"{where} stops at {got}, not at {stops}")
  prompts = []
  # A stranger knows nothing of what the run chose, but for the day.
  date = {k: v for k, v in options.template_kwargs.items() if k == "date"}
  unaware = dataclasses.replace(
    options, template_kwargs=date, generation_prompt="error"
  )
  for conversation in _CONVERSATIONS:
    ours = render(conversation, tokenizer, options)
    theirs = render(conversation, stranger, unaware)
    if ours != theirs:
      raise ValueError(
        f"{conversation.messages[0].content!r} is rendered as {theirs}, not "
        f"as {ours}"
      )
    if isinstance(ours, list):
      prompts.append(ours)
  return stops, prompts


def render(
  conversation: Conversation, tokenizer: Tokenizer, options: RenderOptions
) -> list[int] | str:
  """Ids of a prompt; the text itself where there is no template for it; what
  the template says where it takes no such turns."""
  if tokenizer.chat_template is None:
    return tokenizer.encode(conversation.messages[0].content)
  try:
    return encode.prompt_ids(conversation, tokenizer, options)
  except RowError as error:
    return str(error)


def _keep_aside(folder: Path, path: Path) -> Path:
  """Moves a folder beside `path`, under the first name that is free."""
  rejected, i = path.with_name(f"{path.name}.rejected"), 1
  while rejected.exists():
    i += 1
    rejected = path.with_name(f"{path.name}.rejected-{i}")
  if jax.process_index() == 0:
    folder.rename(rejected)
  return rejected
