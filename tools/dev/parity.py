"""Measures how far every family is from transformers, on fresh random models.

    python tools/dev/parity.py [case ...] [--seed 1]

Prints the table of docs/models.md. Each case of make_goldens is varied: other
sizes, ratios of heads, windows and weights. Needs torch and transformers.
"""

import argparse
import dataclasses
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import make_goldens
from make_goldens import CASES, Case
from sft_jax.common import trees
from sft_jax.inference import sampler
from sft_jax.models.hf import load_save, parameter_map
from sft_jax.models.lora.lora import is_constant
from sft_jax.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class Gap:
  """Distances from the reference.

  Attributes:
    logits: largest absolute difference.
    loss: relative difference.
    gradient: |ours - theirs| / |theirs| of the tensor where it is largest.
    agreed: greedy tokens equal before the first that differs.
    wanted: greedy tokens compared.
    bfloat16: root mean square error of our bfloat16 logits, over that of the
      reference's; both against the reference in float32, at the median token:
      where rounding sends a token to another expert, one token is far off.
  """

  logits: float
  loss: float
  gradient: float
  agreed: int
  wanted: int
  bfloat16: float


def vary(case: Case, rng: np.random.Generator) -> Case:
  """The case with other sizes."""
  heads = int(rng.choice([2, 4, 6]))
  fields = dict(make_goldens.SIZES) | case.fields
  changes: dict[str, Any] = {
    "num_attention_heads": heads,
    "hidden_size": 8 * heads,
    "vocab_size": int(rng.integers(40, 90)),
    "tie_word_embeddings": bool(rng.integers(2)),
  }
  if "kv_lora_rank" in fields:
    changes["num_key_value_heads"] = heads
  elif fields["num_key_value_heads"]:
    ratios = [k for k in range(1, heads + 1) if heads % k == 0]
    changes["num_key_value_heads"] = int(rng.choice(ratios))
  if fields["intermediate_size"]:
    # Torch's product of groups of rows wants a multiple of 16 bytes.
    step = 8 if "num_experts_per_tok" in fields else 1
    changes["intermediate_size"] = int(rng.integers(12, 50)) // step * step
  if "head_dim" in fields:
    part = fields.get("rope_parameters", {}).get("partial_rotary_factor", 1)
    changes["head_dim"] = int(
      rng.choice([4, 8, 12] if part < 1 else [4, 6, 10])
    )
  if fields.get("sliding_window"):
    changes["sliding_window"] = int(rng.integers(2, 16))
  return case._replace(fields=case.fields | changes)


def tensors(tree: trees.Tree, model: Model) -> dict[str, np.ndarray]:
  """A tree of gradients by the names of the reference."""
  found: dict[str, np.ndarray] = {}
  for path, leaf in trees.flatten(tree).items():
    if is_constant(path):
      continue
    for place in parameter_map.tensor_slices(path, leaf.shape, model.config):
      part = np.asarray(leaf[place.index])
      whole = found.setdefault(place.name, np.zeros(place.shape, part.dtype))
      whole[place.cut] = part.T if place.transpose else part
  return found


def nats_and_logits(model: Model, params: trees.Tree, tokens) -> Any:
  """Summed cross-entropy of every next token, and the logits."""
  logits = model.logits(params, model.hidden(params, tokens))
  log_p = jax.nn.log_softmax(logits[:, :-1])
  picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)
  return -jnp.sum(picked), logits


def _relative(got: np.ndarray, want: np.ndarray, rounding: float) -> float:
  """|got - want| / |want|; 0 of an expert that no token chose, or of a bias of
  keys, which softmax does not see, where both are rounding."""
  far = np.linalg.norm(got - want)
  return 0.0 if far <= rounding else float(far / np.linalg.norm(want))


def measure(case: Case, seed: int) -> Gap:
  """Compares a random model of the case with the reference."""
  case = vary(case, np.random.default_rng(seed))
  reference = make_goldens.make_model(case, seed)
  want = make_goldens.compute(reference, case)
  tokens = want["tokens"]
  with tempfile.TemporaryDirectory() as folder:
    make_goldens.write_model(reference, case, Path(folder))
    model, params = load_save.load_pretrained(folder)
    narrow, _ = load_save.load_pretrained(folder, dtype=jnp.bfloat16)
    coarse = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.bfloat16, **make_goldens.PLAIN
    )

  def loss(params):
    return nats_and_logits(model, params, tokens)

  (nats, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params
  )
  ours = tensors(gradients, model)
  theirs = {
    key.removeprefix("gradient/"): x
    for key, x in want.items()
    if key.startswith("gradient/")
  }
  if ours.keys() != theirs.keys():
    raise ValueError(f"tensors differ: {sorted(ours.keys() ^ theirs.keys())}")
  rounding = 1e-7 * np.sqrt(sum(np.sum(x**2) for x in theirs.values()))
  gap = [_relative(ours[key], x, rounding) for key, x in theirs.items()]
  n, greedy = int(want["prompt"]), want["greedy"].tolist()
  (reply,) = sampler.generate(
    model.decode,
    model.logits,
    model.init_cache,
    params,
    [greedy[:n]],
    stop_ids=(),
    max_new_tokens=len(greedy) - n,
    length_bucket=1,
  )
  same = np.equal(reply.tokens, greedy[n:])
  rough = jax.jit(lambda p: nats_and_logits(narrow, p, tokens)[1])(params)
  with torch.no_grad():
    coarse_logits = coarse(torch.tensor(tokens).long()).logits.float()

  def error(x: Any) -> float:
    square = np.mean((np.asarray(x) - want["logits"]) ** 2, axis=-1)
    return float(np.median(np.sqrt(square)))

  return Gap(
    logits=float(np.max(np.abs(logits - want["logits"]))),
    loss=float(abs(nats - want["loss"]) / want["loss"]),
    gradient=float(max(gap)),
    agreed=int(np.argmin(same)) if not same.all() else len(same),
    wanted=len(same),
    bfloat16=error(rough) / error(coarse_logits),
  )


def main() -> None:
  """Prints one line per case."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("case", nargs="*", choices=[*CASES, []])
  parser.add_argument("--seed", type=int, default=1)
  arguments = parser.parse_args()
  warnings.simplefilter("ignore")
  jax.config.update("jax_default_matmul_precision", "highest")
  print("| case | logits | loss | gradients | greedy tokens | bfloat16 |")
  print("|---|---|---|---|---|---|")
  for name in arguments.case or CASES:
    gap = measure(CASES[name], arguments.seed)
    print(
      f"| {name} | {gap.logits:.1e} | {gap.loss:.1e} | {gap.gradient:.1e} "
      f"| {gap.agreed} of {gap.wanted} | {gap.bfloat16:.2f} |",
      flush=True,
    )


if __name__ == "__main__":
  main()
