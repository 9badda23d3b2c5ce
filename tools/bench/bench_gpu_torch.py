"""The rival of `bench_gpu.py`: transformers, compiled, with peft for LoRA.

    PYTHON tools/bench/bench_gpu_torch.py FILE

FILE holds the case, the model's config and the batch as JSON. Documents are
kept apart by FlashAttention where it is installed and the case is on a GPU,
else by what transformers makes of position ids for PyTorch's own attention.
Parameters are float32 under autocast where ours are float32, else bfloat16;
AdamW is the fused one. Imports nothing of ours: its environment may lack JAX.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

_CONFIGS = {
  "qwen2": transformers.Qwen2Config,
  "qwen3": transformers.Qwen3Config,
  "llama": transformers.LlamaConfig,
}


def build(case: dict[str, Any], device: str) -> tuple[Any, str]:
  """The model with random weights, and the name of its attention."""
  flash = device == "cuda" and importlib.util.find_spec("flash_attn")
  attention = "flash_attention_2" if flash else "sdpa"
  fields = dict(case["hf_config"])
  config = _CONFIGS[fields.pop("model_type")](**fields)
  low = case["method"] == "lora" or case["model"] == "8B"
  with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(
      config,
      dtype=torch.bfloat16 if low else torch.float32,
      attn_implementation=attention,
    )
  if case["method"] == "lora":
    chosen = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(model, chosen)
  return model.train(), attention


def main() -> None:
  case = json.loads(Path(sys.argv[1]).read_text())
  device = "cuda" if torch.cuda.is_available() else "cpu"
  arrays = {k: torch.tensor(v, device=device) for k, v in case["batch"].items()}
  model, attention = build(case, device)
  compiled = model if case["tiny"] else torch.compile(model)
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01, fused=True)
  weight = (arrays["labels"] >= 0).sum()

  def step() -> torch.Tensor:
    with torch.autocast(device, torch.bfloat16):
      hidden = compiled(
        input_ids=arrays["tokens"],
        position_ids=arrays["positions"],
        use_cache=False,
      )
      logits = hidden.logits.flatten(0, 1)
      loss = torch.nn.functional.cross_entropy(
        logits.float(), arrays["labels"].flatten(), reduction="sum"
      )
    loss = loss / weight
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  started = time.perf_counter()
  step()
  compile_s = time.perf_counter() - started
  step()
  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  wait()
  started = time.perf_counter()
  for _ in range(case["steps"]):
    loss = step()
  wait()
  seconds = time.perf_counter() - started
  tokens = case["tokens"] * case["steps"] / seconds
  cuda = device == "cuda"
  report = {
    "tokens_per_s": tokens,
    "memory": torch.cuda.max_memory_allocated() if cuda else 0,
    "attention": attention,
    "loss": float(loss),
    "compile_s": compile_s,
    "device": torch.cuda.get_device_name() if cuda else "cpu",
    "versions": f"torch {torch.__version__}, transformers "
    f"{transformers.__version__}, peft {peft.__version__}",
  }
  print("BENCH " + json.dumps(report))


if __name__ == "__main__":
  main()
