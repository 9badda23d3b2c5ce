"""The public API of sft_jax, and nothing else."""

from sft_jax.checkpointing.export import save_pretrained
from sft_jax.data.conversation import Conversation, Message, ToolCall
from sft_jax.data.encoding.encode import Example, encode
from sft_jax.data.formats.formats import to_conversation
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.inference.generate import Reply, generate
from sft_jax.models.transformer import Model
from sft_jax.training.build.model import load_pretrained
from sft_jax.training.run import Result
from sft_jax.training.run import run as train

__all__ = [
  "Conversation",
  "Example",
  "Message",
  "Model",
  "Reply",
  "Result",
  "ToolCall",
  "encode",
  "generate",
  "load_pretrained",
  "load_tokenizer",
  "save_pretrained",
  "to_conversation",
  "train",
]
