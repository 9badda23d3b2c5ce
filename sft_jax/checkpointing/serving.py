"""Served as trained: other programs say what the model in memory says.

An exported folder is given to whoever will serve it. Each tool renders the
prompts by the template it finds, and continues them greedily until it stops by
the stop ids it finds:

    sft_jax        our loader and sampler, on the folder
    transformers   where torch is installed
    llama.cpp      where `llama_cpp` is installed, on a GGUF file

Tokens and stops are compared with those of the model in memory. What vLLM and
SGLang would do is read off the folder, by the rules they load by.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sft_jax.checkpointing import export
from sft_jax.common import trees
from sft_jax.data.chat import loss_spans
from sft_jax.data.chat import template as templates
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.conversation import Conversation, Message
from sft_jax.data.tokenizers.tokenizer import Tokenizer
from sft_jax.inference import sampler
from sft_jax.models.config import read_config
from sft_jax.models.hf import load_save, parameter_map, peft_save
from sft_jax.models.transformer import Model

SAME, TIE, DIFFERS, SKIPPED = "same", "tie", "differs", "skipped"

CONVERSATIONS = tuple(
  Conversation((Message("user", text),))
  for text in (
    "What is 2 + 2?",
    "Name a color.",
    "Write one sentence about the sea.",
    "Translate 'good morning' into French.",
    "  Was bedeutet Grün oder 漢字?\n",
    "List three animals.",
    "Why is the sky blue?",
    "Say nothing but yes.",
  )
)
# Of the largest logit: a smaller lead is rounding's to decide. Matrices of 16
# bits and less are multiplied by activations of as few.
_TIE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3, "q8_0": 2e-2}


class Verdict(NamedTuple):
  """What became of one check.

  Attributes:
    tool: that would serve the model.
    check: what was looked at.
    state: SAME, TIE, DIFFERS or SKIPPED.
    note: what differs first and why; or what was compared.
  """

  tool: str
  check: str
  state: str
  note: str

  def __str__(self) -> str:
    return f"{self.tool}, {self.check}: {self.state}. {self.note}"


class Reply(NamedTuple):
  """A prompt as a tool read it, and its continuation.

  Attributes:
    prompt: ids.
    tokens: without the stop token.
    stopped: by a stop token.
  """

  prompt: list[int]
  tokens: list[int]
  stopped: bool


class Reference(NamedTuple):
  """What the model in memory says; see `reference`.

  Attributes:
    model, tokenizer, options: that were trained.
    prompts: conversations and their ids.
    replies: greedy ones.
    logits: of the token after [1, T] tokens, as a function.
    most: tokens of a reply.
  """

  model: Model
  tokenizer: Tokenizer
  options: RenderOptions
  prompts: list[tuple[Conversation, list[int]]]
  replies: list[Reply]
  logits: Callable[[np.ndarray], jax.Array]
  most: int


def reference(
  model: Model,
  params: trees.Tree,
  tokenizer: Tokenizer,
  *,
  options: RenderOptions,
  conversations: Sequence[Conversation] = CONVERSATIONS,
  max_new_tokens: int = 32,
) -> Reference:
  """The greedy replies that every tool must give.

  Args:
    model: the model that was trained.
    params: its parameters, adapters among them.
    tokenizer: that it was trained with.
    options: that prompts were rendered with.
    conversations: prompts; those that the template refuses are left out.
    max_new_tokens: of each reply.

  Raises:
    ValueError: a template that takes none of the prompts.
  """
  prompts = []
  for conversation in conversations:
    ids = export.render(conversation, tokenizer, options)
    if isinstance(ids, list):
      prompts.append((conversation, ids))
  if not prompts:
    raise ValueError(
      "serving: the chat template takes none of the prompts; expected one user "
      "turn to be enough. Pass conversations that it takes."
    )
  replies = _ours(model, params, prompts, tokenizer.stop_ids, max_new_tokens)
  logits = jax.jit(
    lambda tokens: model.logits(params, model.hidden(params, tokens))[0, -1]
  )
  return Reference(
    model, tokenizer, options, prompts, replies, logits, max_new_tokens
  )


def check(
  folder: str | Path,
  trained: Reference,
  *,
  adapter: str | Path | None = None,
  gguf_file: str | Path | None = None,
) -> list[Verdict]:
  """Compares what tools make of a folder with the model in memory.

  Args:
    folder: the export.
    trained: what the model says.
    adapter: the PEFT folder of the same run.
    gguf_file: of the same model, for llama.cpp; see `gguf.write`.
  """
  folder, file = Path(folder), Path(gguf_file or "")
  held = load_save.model_tensors(folder).values()
  widest = max(_TIE.get(tensor.dtype.name, 0.0) for tensor in held)
  tools: dict[str, tuple[Callable[[], list[Reply]], float]] = {
    "sft_jax": (lambda: _read_again(folder, trained), widest),
    "transformers": (lambda: _transformers(folder, trained), widest),
  }
  verdicts = [*rules(folder, trained.tokenizer, adapter)]
  if gguf_file:
    kind = _TIE.get(file.stem.rpartition("-")[2], widest)
    tools["llama.cpp"] = (lambda: _llama(file, trained), kind)
  for tool, (run, tie) in tools.items():
    try:
      got = run()
    except ImportError as error:
      verdicts.append(Verdict(tool, "replies", SKIPPED, f"{error}."))
    except (ValueError, RuntimeError, OSError) as error:
      verdicts.append(Verdict(tool, "replies", DIFFERS, f"refused: {error}"))
    else:
      verdicts.append(_compare(tool, trained, got, tie))
  return verdicts


def _compare(
  tool: str, trained: Reference, got: list[Reply], tie: float
) -> Verdict:
  """The first difference, or that there is none."""
  tied, want = "", trained.replies
  for n, (ours, theirs) in enumerate(zip(want, got, strict=True)):
    if ours.prompt != theirs.prompt:
      note = f"prompt {n} is {theirs.prompt}; trained on {ours.prompt}."
      return Verdict(tool, "replies", DIFFERS, note)
    if ours == theirs:
      continue
    same = [a == b for a, b in zip(ours.tokens, theirs.tokens, strict=False)]
    at = same.index(False) if False in same else len(same)
    pair = [
      one.tokens[at] if at < len(one.tokens) else None for one in (ours, theirs)
    ]
    note = f"prompt {n}, token {at}: {pair[1]} where the model says {pair[0]}"
    if None in pair:
      ends = "stops" if theirs.stopped else "does not stop"
      note = f"prompt {n}: {ends} at token {at}, where the model "
      note += "stops." if ours.stopped else "goes on."
      return Verdict(tool, "replies", DIFFERS, note)
    tokens = np.array([ours.prompt + ours.tokens[:at]], np.int32)
    logits = np.asarray(trained.logits(tokens), np.float32)
    lead = float(logits[pair[0]] - logits[pair[1]])
    note += f", which leads by {lead:.2g} of {np.abs(logits).max():.2g}"
    if lead > tie * np.abs(logits).max():
      return Verdict(tool, "replies", DIFFERS, f"{note}.")
    tied = f"{note}: rounding's to decide."
  if tied:
    return Verdict(tool, "replies", TIE, tied)
  count = sum(len(reply.tokens) for reply in want)
  stops = sum(reply.stopped for reply in want)
  note = f"{len(want)} prompts, {count} tokens, {stops} stops."
  return Verdict(tool, "replies", SAME, note)


# -- The tools -----------------------------------------------------------


def _ours(model, params, prompts, stops, most) -> list[Reply]:
  """Greedy replies of our sampler."""
  ids = [ids for _, ids in prompts]
  with jax.default_matmul_precision("highest"):
    replies = sampler.generate(
      *(model.decode, model.logits, model.init_cache, params, ids),
      stop_ids=stops,
      max_new_tokens=most,
    )
  pairs = zip(ids, replies, strict=True)
  return [Reply(ids, one.tokens, one.stopped) for ids, one in pairs]


def _read_again(folder: Path, trained: Reference) -> list[Reply]:
  """Greedy replies of ours, the folder read as a stranger would."""
  config = read_config(folder)
  if config != trained.model.config:
    raise ValueError(f"config.json says {config}")
  stops, _ = export.same_words(folder, trained.tokenizer, trained.options)
  model, params = load_save.load_pretrained(folder)
  return _ours(model, params, trained.prompts, stops, trained.most)


def _transformers(folder: Path, trained: Reference) -> list[Reply]:
  """Greedy replies of transformers in float32, by its own template."""
  import torch
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  loaded = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  model: Any = loaded.eval()
  stops = model.generation_config.eos_token_id
  stops = {*(stops if isinstance(stops, list) else [stops])}
  replies = []
  for conversation, ids in trained.prompts:
    if tokenizer.chat_template:
      turns = [
        {"role": m.role, "content": m.content} for m in conversation.messages
      ]
      text = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
      )
      ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = torch.tensor([ids])
    with torch.no_grad():
      out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=trained.most,
        pad_token_id=0,
      )
    replies.append(_until(ids, out[0, len(ids) :].tolist(), stops))
  return replies


def _llama(file: Path, trained: Reference) -> list[Reply]:
  """Greedy replies of llama.cpp, which reads the prompts as text."""
  llama_cpp: Any = importlib.import_module("llama_cpp")
  texts = []
  for conversation, _ in trained.prompts:
    text = conversation.messages[0].content
    if trained.tokenizer.chat_template is not None:
      template = templates.chat_template(trained.tokenizer)
      text = loss_spans.prompt(conversation, template, trained.options).text
    texts.append(text.encode())
  length = max(map(len, texts)) + trained.most
  llm = llama_cpp.Llama(str(file), n_ctx=max(64, length), verbose=False)
  vocab = llm._model.vocab
  ends = lambda token: llama_cpp.llama_vocab_is_eog(vocab, token)
  replies = []
  for text in texts:
    read = llm.tokenize(text, add_bos=False, special=True)
    tokens: list[int] = []
    for token in llm.generate(read, temp=0.0, top_k=1):
      tokens.append(token)
      if ends(token) or len(tokens) == trained.most:
        break
    replies.append(_until(read, tokens, {t for t in tokens if ends(t)}))
  llm.close()
  return replies


def _until(prompt: list[int], tokens: list[int], stops: set[int]) -> Reply:
  """The reply up to its first stop token."""
  at = next((i for i, token in enumerate(tokens) if token in stops), None)
  return Reply(list(prompt), tokens[:at], at is not None)


# -- Rules that vLLM and SGLang load by ------------------------------------

# Of an adapter's settings the first they refuse, patterns they do not read.
_UNSERVED = (
  *("modules_to_save", "use_dora", "trainable_token_indices", "bias"),
  *("target_parameters", "rank_pattern", "alpha_pattern"),
)
_TABLES = {"lm_head", "embed_tokens"}
_TARGETS = {
  *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
  *("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
}


def rules(
  folder: Path, tokenizer: Tokenizer, adapter: str | Path | None = None
) -> Iterator[Verdict]:
  """What a folder, and the adapter beside it, would be loaded as."""

  def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}

  config, raw = read_config(folder), read(folder / "config.json")
  tensors = load_save.model_tensors(folder)
  stops = read(folder / "generation_config.json").get("eos_token_id", [])
  embed, head = (
    tensors.get(parameter_map.table_name(name, config))
    for name in ("embed", "head")
  )
  heads = "own" if head else "missing"
  if config.tie_embeddings:
    alike = head and embed and np.array_equal(head.read(), embed.read())
    tied = not head or alike
    heads = "tied" if tied else "tied, with other values"
  rows = embed.shape[0] if embed else 0
  sizes = {rows, max(rows, tokenizer.vocab_size)}
  template = folder / "chat_template.jinja"
  texts = [read(folder / "tokenizer_config.json").get("chat_template")]
  texts += [template.read_text("utf-8")] if template.is_file() else []
  # Older files hold a list of named ones.
  apart = {json.dumps(text) for text in texts if text is not None}
  wide = parameter_map.FLOAT32
  held = {x.dtype.name for k, x in tensors.items() if not k.endswith(wide)}
  # What is checked; in which file; what is there; what must be.
  table: list[tuple[str, str, Any, Any]] = [
    (
      *("stop ids", "generation_config.json"),
      sorted(stops if isinstance(stops, list) else [stops]),
      list(tokenizer.stop_ids),
    ),
    (
      *("dtype", "config.json"),
      [raw.get("dtype", raw.get("torch_dtype"))],
      sorted(held),
    ),
    (
      *("head", "*.safetensors", heads),
      "tied" if config.tie_embeddings else "own",
    ),
    ("vocabulary", "*.safetensors", sorted(sizes), [config.vocab_size]),
    ("templates", "tokenizer_config.json", max(1, len(apart)), 1),
  ]
  if settings := read(Path(adapter or folder) / peft_save.CONFIG):
    names = {x.rpartition(".")[2] for x in settings["target_modules"] or ()}
    odd = {x: v for x in _UNSERVED if (v := settings.get(x)) and v != "none"}
    table += [
      ("adapter", peft_save.CONFIG, odd, {}),
      ("adapter on tables", peft_save.CONFIG, sorted(names & _TABLES), []),
      (
        *("adapter targets", peft_save.CONFIG, sorted(names - _TABLES)),
        sorted(names & _TARGETS),
      ),
    ]
  for check, file, got, want in table:
    wrong = "" if got == want else f", expected {want}"
    if wrong and file == peft_save.CONFIG:
      wrong += "; serve the merged folder"
    state = DIFFERS if wrong else SAME
    yield Verdict("vLLM, SGLang", check, state, f"{file}: {got}{wrong}.")


def verdict_lines(verdicts: Sequence[Any]) -> list[tuple[str, str, str, str]]:
  """Rows of a page, from verdicts or from what result.json has of them."""
  read = (v if isinstance(v, dict) else v._asdict() for v in verdicts)
  return [(v["tool"], v["check"], v["state"], v["note"]) for v in read]
