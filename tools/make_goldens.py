"""Writes tests/models/goldens: what transformers computes for tiny models.

    python tools/make_goldens.py

Each case is a model folder as transformers saves it (bfloat16, so that it is
small and exact in float32) and `golden.npz`: tokens, logits, the norm of the
gradient of every tensor, and a greedy continuation. Weights are wide: at the
usual 0.02 attention is uniform and half of all mistakes are invisible.
Needs torch and transformers; the tests that read the goldens do not.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

GOLDENS = Path(__file__).parent.parent / "tests" / "models" / "goldens"

SIZES: dict[str, Any] = {
  "vocab_size": 61,
  "num_hidden_layers": 2,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 1000.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
DEFAULT = {"rope_type": "default", "rope_theta": 1000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}

# name: (model_type, fields, largest shard)
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
  "llama": (
    "llama",
    {"head_dim": 10, "rope_parameters": LLAMA3, "tie_word_embeddings": False},
    "1GB",
  ),
  "llama_old_config": (
    "llama",
    {
      "attention_bias": True,
      "rope_parameters": LINEAR,
      "tie_word_embeddings": True,
    },
    "1GB",
  ),
  "qwen2_sharded": (
    "qwen2",
    {"rope_parameters": DEFAULT, "tie_word_embeddings": False},
    "10KB",
  ),
  "qwen3": (
    "qwen3",
    {"head_dim": 10, "rope_parameters": DEFAULT, "tie_word_embeddings": True},
    "1GB",
  ),
}


def make_model(name: str) -> torch.nn.Module:
  """A random float32 model whose weights are exact in bfloat16."""
  family, fields, _ = CASES[name]
  config = transformers.AutoConfig.for_model(family, **(SIZES | fields))
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, attn_implementation="eager"
  )
  rng = np.random.default_rng(sorted(CASES).index(name))
  with torch.no_grad():
    for key, weight in model.named_parameters():
      fresh = rng.standard_normal(weight.shape) * 0.3 + ("norm" in key)
      weight.copy_(torch.tensor(fresh).bfloat16().float())
  return model.eval()


def compute(model: torch.nn.Module) -> dict[str, np.ndarray]:
  """Logits, gradient norms and a greedy continuation."""
  rng = np.random.default_rng(0)
  tokens = torch.tensor(rng.integers(3, SIZES["vocab_size"], (2, 40)))
  logits = model(tokens).logits
  # Summed cross-entropy of every next token.
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
  )
  loss.backward()
  norms = {
    f"gradient/{key}": weight.grad.norm().numpy()
    for key, weight in model.named_parameters()
  }
  sequence = tokens[:1, :5]
  with torch.no_grad():
    for _ in range(24):
      best = model(sequence).logits[:, -1].argmax(-1, keepdim=True)
      sequence = torch.cat((sequence, best), dim=1)
  return {
    "tokens": tokens.numpy().astype(np.int32),
    "logits": logits.detach().numpy(),
    "loss": loss.detach().numpy(),
    "greedy": sequence[0].numpy().astype(np.int32),
    **norms,
  }


def write_case(name: str, folder: Path) -> None:
  """Writes one case's model folder and golden.npz."""
  model = make_model(name)
  golden = compute(model)
  shard = CASES[name][2]
  model.bfloat16().save_pretrained(folder, max_shard_size=shard)
  if name == "llama_old_config":
    _age(folder / "config.json")
  np.savez_compressed(folder / "golden.npz", **golden)


def _age(path: Path) -> None:
  """Rewrites a config in the form of transformers 4."""
  raw = json.loads(path.read_text())
  rope = raw.pop("rope_parameters")
  raw["rope_theta"] = rope["rope_theta"]
  raw["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
  raw["torch_dtype"] = raw.pop("dtype")
  path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def main() -> None:
  """Writes every case anew."""
  for name in CASES:
    shutil.rmtree(GOLDENS / name, ignore_errors=True)
    write_case(name, GOLDENS / name)
    size = sum(p.stat().st_size for p in (GOLDENS / name).iterdir())
    print(f"{name}: {size / 1000:.0f} kB")


if __name__ == "__main__":
  main()
