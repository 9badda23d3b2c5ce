"""The public API of sft_jax, and nothing else.

Names are imported when they are first used (PEP 562), so that a process that
needs a part of the package, as data workers do, does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from sft_jax.checkpointing.export import save_pretrained
  from sft_jax.data.conversation import Conversation, Message, ToolCall
  from sft_jax.data.encoding.encode import Example, encode
  from sft_jax.data.formats.formats import to_conversation
  from sft_jax.data.tokenizers.tokenizer import load_tokenizer
  from sft_jax.evals.checks.checks import register_check
  from sft_jax.inference.generate import Reply, generate
  from sft_jax.inference.logprobs import logprobs
  from sft_jax.models.hf.load_save import load_pretrained
  from sft_jax.models.transformer import Model
  from sft_jax.reporting.html.compare_page import compare
  from sft_jax.reporting.run_files import read as read_run
  from sft_jax.reporting.trackers import register_writer
  from sft_jax.training.config import default as default_config
  from sft_jax.training.run import Result, train

__all__ = [
  "Conversation",
  "Example",
  "Message",
  "Model",
  "Reply",
  "Result",
  "ToolCall",
  "compare",
  "default_config",
  "encode",
  "generate",
  "load_pretrained",
  "load_tokenizer",
  "logprobs",
  "read_run",
  "register_check",
  "register_writer",
  "save_pretrained",
  "to_conversation",
  "train",
]

# Where each name of the API is made: 'module' or 'module:name there'.
_HOME = {
  "Conversation": "data.conversation",
  "Example": "data.encoding.encode",
  "Message": "data.conversation",
  "Model": "models.transformer",
  "Reply": "inference.generate",
  "Result": "training.run",
  "ToolCall": "data.conversation",
  "compare": "reporting.html.compare_page",
  "default_config": "training.config:default",
  "encode": "data.encoding.encode",
  "generate": "inference.generate",
  "load_pretrained": "models.hf.load_save",
  "load_tokenizer": "data.tokenizers.tokenizer",
  "logprobs": "inference.logprobs",
  "read_run": "reporting.run_files:read",
  "register_check": "evals.checks.checks",
  "register_writer": "reporting.trackers",
  "save_pretrained": "checkpointing.export",
  "to_conversation": "data.formats.formats",
  "train": "training.run",
}


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f"module 'sft_jax' has no attribute {name!r}")
  module, _, other = _HOME[name].partition(":")
  found = getattr(importlib.import_module(f"sft_jax.{module}"), other or name)
  globals()[name] = found
  return found


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
