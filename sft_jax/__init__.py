"""The public API of sft_jax, and nothing else."""

from sft_jax.data.conversation import Conversation, Message, ToolCall
from sft_jax.data.encode import Example, encode
from sft_jax.data.formats import to_conversation
from sft_jax.data.tokenizers import load_tokenizer
from sft_jax.evals.replies import Reply, generate
from sft_jax.export import save_pretrained
from sft_jax.models.transformer import Model
from sft_jax.setup_model import load_pretrained
from sft_jax.train import Result
from sft_jax.train import run as train

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
