"""One side of `bench_step.py`, in a process of its own.

    python tools/bench/bench_step_sides.py SIDE FOLDER

FOLDER holds `model/` (a Hugging Face folder), `rows.jsonl` (ids and labels of
every row, in the order of training) and `settings.json`. The side trains on
the first batches of rows, one after the other and unpacked, and says what
their losses were; then, each time a line with a number of seconds comes, it
trains for as long on what it makes of the rows and says how far it came.
Rivals are imported where they are used: their environments lack ours.
"""

import collections
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np


class Pace:
  """Reads seconds from stdin, lets steps pass for as long, writes a report.

  `step` is called before every step, `count` with what each trains on.
  """

  def __init__(self, settings: dict[str, Any], synchronise: Callable[[], Any]):
    self.gate, self.warm_up = settings["gate"], settings["warm_up"]
    self.synchronise = synchronise
    self.steps, self.losses, self.until = 0, [], None
    self.rate: Callable[[], float] = lambda: 0.0
    self._reset()

  def _reset(self) -> None:
    self.trained, self.tokens, self.slots, self.taken = 0, 0, 0, 0
    self.started, self.cpu = time.perf_counter(), time.process_time()

  def count(self, trained: int, tokens: int, slots: int) -> None:
    self.trained += trained
    self.tokens += tokens
    self.slots += slots
    self.taken += 1
    self.steps += 1

  def step(self) -> bool:
    """Waits until there is a step to take; False if there is none."""
    if self.until is None:
      if self.steps < self.gate + self.warm_up:
        return True
      self.synchronise()
      say({"losses": [float(x) for x in self.losses[: self.gate]]})
      return self._wait()
    if time.perf_counter() < self.until:
      return True
    self.synchronise()
    say(
      {
        "seconds": time.perf_counter() - self.started,
        "cpu": time.process_time() - self.cpu,
        "steps": self.taken,
        "trained": self.trained,
        "tokens": self.tokens,
        "slots": self.slots,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": float(self.losses[-1]),
        "matmul": self.rate(),
      }
    )
    return self._wait()

  def _wait(self) -> bool:
    line = sys.stdin.readline().strip()
    if not line:
      return False
    self._reset()
    self.until = self.started + float(line)
    return True


def say(value: dict[str, Any]) -> None:
  print("BENCH " + json.dumps(value), flush=True)


def matmul_rate(product: Callable[[], Any], size: int) -> float:
  """FLOP/s of a float32 product of two matrices of size x size, best of 5."""
  product()
  best = float("inf")
  for _ in range(5):
    started = time.perf_counter()
    product()
    best = min(best, time.perf_counter() - started)
  return 2 * size**3 / best


def read_rows(folder: Path) -> list[dict[str, list[int]]]:
  return [json.loads(x) for x in (folder / "rows.jsonl").open()]


def padded(
  rows: list[dict[str, list[int]]], settings: dict[str, Any], steps: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Batches of rows in order, filled up with 0 and -100 to the full length."""
  T, B = settings["seq_len"], settings["batch_size"]
  last = steps * B or len(rows) // B * B
  for start in range(0, last, B):
    ids, labels = np.zeros((B, T), np.int32), np.full((B, T), -100, np.int32)
    for i, row in enumerate(rows[start : start + B]):
      n = len(row["input_ids"])
      ids[i, :n], labels[i, :n] = row["input_ids"], row["labels"]
    yield ids, labels


def jax_rate(size: int) -> Callable[[], float]:
  import jax
  import jax.numpy as jnp

  x = jnp.ones((size, size))
  product = jax.jit(lambda x: x @ x)
  return lambda: matmul_rate(lambda: product(x).block_until_ready(), size)


def ours(folder: Path, settings: dict[str, Any]) -> None:
  """sft_jax, packed: the setup, step and order of work of `loop.py`."""
  import jax

  from configs import base
  from sft_jax.common import compile_cache, sharding
  from sft_jax.common.batch import Batch
  from sft_jax.step.train_step import split_micro_batches
  from sft_jax.training.build.build import build_run

  config = cast(Any, base.get_config())
  config.workdir = str(folder / "run")
  config.model.path = str(folder / "model")
  config.data.train = tuple(settings["train"])
  config.data.holdout = 0.0
  config.data.seq_len = settings["seq_len"]
  config.batch_size = settings["batch_size"]
  config.steps = 1_000_000
  config.loss.chunk_tokens = 256  # As fast here as 512, and less memory.
  config.compile_cache = ""
  config.eval.behaviors = config.eval.general_text = ""
  config.optim.schedule, config.optim.warmup_steps = "constant", 0
  config.optim.learning_rate = settings["learning_rate"]
  config.optim.b2, config.optim.weight_decay = 0.999, 0.0
  config.update_from_flattened_dict(settings["config"])
  run = build_run(config, lambda line: print(line, file=sys.stderr))
  devices = sharding.row_sharding(run.mesh, leading_axes=1)

  def gate() -> Iterator[Batch]:
    B, rows = settings["batch_size"], read_rows(folder)
    batches = padded(rows, settings, settings["gate"])
    for i, (ids, labels) in enumerate(batches):
      lengths = [len(row["input_ids"]) for row in rows[i * B : (i + 1) * B]]
      T = ids.shape[1]
      real = np.arange(T) < np.array(lengths)[:, None]
      after = np.pad(labels[:, 1:], [(0, 0), (0, 1)], constant_values=-100)
      yield Batch(
        tokens=ids,
        targets=np.maximum(after, 0),
        loss_weights=(after >= 0).astype(np.float32),
        segment_ids=real.astype(np.int32),
        positions=np.where(real, np.arange(T), 0).astype(np.int32),
        roles=np.zeros(ids.shape, np.uint8),  # They only tell losses apart.
        sources=np.zeros(ids.shape, np.int32),
      )

  def batches() -> Iterator[Batch]:
    yield from gate()
    yield from run.stream.batches()

  state, step, in_flight = run.state, None, collections.deque()
  pace = Pace(settings, lambda: jax.block_until_ready(state))
  pace.rate = jax_rate(settings["matmul_size"])
  source = batches()
  while pace.step():
    batch = next(source)
    pace.count(
      int((batch.loss_weights > 0).sum()),
      int((batch.segment_ids > 0).sum()),
      batch.tokens.size,
    )
    placed = sharding.put_rows(split_micro_batches(batch, 1), devices)
    if step is None:
      step = jax.jit(run.train_step, donate_argnums=0)
      step, _ = compile_cache.compiled(step.lower(state, placed))
    state, pairs = step(state, placed)
    nats, weight = pairs["loss/nats_per_token"]
    pace.losses.append(nats / weight)
    in_flight.append(nats)
    if len(in_flight) > 2:
      in_flight.popleft().block_until_ready()


def trl(folder: Path, settings: dict[str, Any], packing: bool = False) -> None:
  """TRL's SFTTrainer; without gradient checkpointing, which costs time."""
  import datasets  # pyright: ignore[reportMissingImports]
  import torch
  import transformers
  import trl  # pyright: ignore[reportMissingImports]

  size = settings["matmul_size"]
  square = torch.ones((size, size))
  pace = Pace(settings, lambda: None)
  pace.rate = lambda: matmul_rate(lambda: square @ square, size)

  class Paced(trl.SFTTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
      labels = inputs["labels"]
      if "attention_mask" in inputs:
        tokens = int(inputs["attention_mask"].sum())
      else:
        tokens = labels.numel()
      pace.count(int((labels[:, 1:] >= 0).sum()), tokens, labels.numel())
      loss = super().training_step(model, inputs, *args, **kwargs)
      pace.losses.append(loss.detach())
      return loss

  class Stop(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
      if not pace.step():
        os._exit(0)  # The trainer has no way out in the middle of an epoch.

  arguments = trl.SFTConfig(
    output_dir=str(folder / "trl"),
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    per_device_train_batch_size=settings["batch_size"],
    max_length=settings["seq_len"],
    packing=packing,
    num_train_epochs=1000,
    train_sampling_strategy="sequential",  # The rows were shuffled before.
    learning_rate=settings["learning_rate"],
    lr_scheduler_type="constant",
    warmup_steps=0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    logging_steps=10,
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder / "model", dtype=torch.float32
  )
  Paced(
    model=model,
    args=arguments,
    train_dataset=datasets.Dataset.from_list(read_rows(folder)),
    processing_class=transformers.AutoTokenizer.from_pretrained(
      folder / "model"
    ),
    callbacks=[Stop()],
  ).train()


def tunix(folder: Path, settings: dict[str, Any]) -> None:
  """Tunix's PeftTrainer on its own Llama, padded: it cannot pack."""
  import jax
  import jax.numpy as jnp
  import optax
  from tunix.models.llama3 import (  # pyright: ignore[reportMissingImports]
    model,
    params,
  )
  from tunix.sft import (  # pyright: ignore[reportMissingImports]
    peft_trainer,
    utils,
  )

  fields = json.loads((folder / "model" / "config.json").read_text())
  sizes = model.ModelConfig(
    num_layers=fields["num_hidden_layers"],
    vocab_size=fields["vocab_size"],
    embed_dim=fields["hidden_size"],
    hidden_dim=fields["intermediate_size"],
    num_heads=fields["num_attention_heads"],
    head_dim=fields["head_dim"],
    num_kv_heads=fields["num_key_value_heads"],
    rope_theta=int(fields["rope_theta"]),
    norm_eps=fields["rms_norm_eps"],
    weight_tying=fields["tie_word_embeddings"],
  )
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto)
  llama = params.create_model_from_safe_tensors(
    str(folder / "model"), sizes, mesh, jnp.float32
  )

  class Paced(peft_trainer.PeftTrainer):
    def _buffer_metrics(self, buffer, loss, step, additional_metrics=None):
      pace.losses.append(loss)
      return super()._buffer_metrics(buffer, loss, step, additional_metrics)

  pace = Pace(settings, lambda: jax.block_until_ready(pace.losses[-1]))
  pace.rate = jax_rate(settings["matmul_size"])
  rows = read_rows(folder)

  def examples() -> Iterator[Any]:
    while True:
      for ids, labels in padded(rows, settings):
        if not pace.step():
          os._exit(0)
        used = (labels >= 0) | (ids > 0)
        pace.count(int((labels[:, 1:] >= 0).sum()), int(used.sum()), ids.size)
        yield peft_trainer.TrainingInput(input_tokens=ids, input_mask=labels)

  def inputs(example: Any) -> dict[str, Any]:
    real = example.input_tokens != 0
    return {
      "input_tokens": example.input_tokens,
      "input_mask": example.input_mask >= 0,
      "positions": utils.build_positions_from_mask(real),
      "attention_mask": utils.make_causal_attn_mask(real),
    }

  adamw = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(settings["learning_rate"], b2=0.999, weight_decay=0.0),
  )
  trainer = Paced(
    llama, adamw, peft_trainer.TrainingConfig(eval_every_n_steps=1_000_000)
  )
  with jax.set_mesh(mesh):
    trainer.with_gen_model_input_fn(inputs).train(examples())


SIDES: dict[str, Callable[[Path, dict[str, Any]], None]] = {
  "sft_jax": ours,
  "TRL padded": trl,
  "TRL packed": lambda *args: trl(*args, packing=True),
  "Tunix": tunix,
}

if __name__ == "__main__":
  side, where = sys.argv[1], Path(sys.argv[2])
  SIDES[side](where, json.loads((where / "settings.json").read_text()))
