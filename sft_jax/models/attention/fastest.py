"""Which attention is the fastest on this GPU for a run's shapes: measured.

`auto` on a GPU tries the candidates on the card itself, once: forward and
backward of one layer over a pack of documents. One that lets a document see
another, that is far from `blocks`, or that does not run takes no part. The
result is kept on disk by device, versions and shapes.

    Shape(16, 4096, 32, 8, 128) on an H200 -> Found('triton', {'triton': ..., })
"""

import hashlib
import importlib.metadata
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.common import distributed, workdir
from sft_jax.common.buckets import storage
from sft_jax.models.attention import attention

CANDIDATES = ("triton", "tokamax", "blocks", "xla")
# Of outputs of order 1 in bfloat16, and of their gradients.
_TOLERANCE = 0.05
_RUNS = 5


class Shape(NamedTuple):
  """What one device attends over; axes as in `attention.attention`."""

  B: int
  T: int
  N: int
  K: int
  H: int
  dtype: str = "bfloat16"
  windows: tuple[int | None, ...] = (None,)
  softcap: float | None = None
  sinks: bool = False


class Found(NamedTuple):
  name: str
  seconds: dict[str, float]  # Of those that ran right, forward and backward.
  left_out: dict[str, str]  # Why the others took no part, in a line.

  def __str__(self) -> str:
    times = ", ".join(
      f"{name} {time * 1e3:.2f} ms"
      for name, time in sorted(self.seconds.items(), key=lambda x: x[1])
    )
    out = ", ".join(f"{name} ({why})" for name, why in self.left_out.items())
    out = out and f"; without {out}"
    return f"{self.name}, measured here: {times}{out}"


@lru_cache
def fastest(
  shape: Shape,
  device_kind: str,
  candidates: tuple[str, ...] = CANDIDATES,
  folder: Path | None = None,
) -> Found:
  """The fastest of the candidates that keep the laws on this device, for one
  device's share of a micro-batch; of several processes the first measures.
  `folder`: of results; None: where JAX keeps compiled programs."""
  versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
  key = repr((device_kind, versions, shape, candidates))
  name = f"attention-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
  kept = folder or jax.config.values["jax_compilation_cache_dir"]
  here = kept and not storage.is_remote(str(kept))
  path = Path(kept) / name if here else None

  def found() -> Any:
    known = path and workdir.find_json(path)
    result = known or _measure(shape, candidates)
    if path and not known:
      workdir.write_json(path, result)
    return result

  first = jax.process_index() == 0
  return Found(*distributed.first_says(list(found()) if first else None))


def _measure(shape: Shape, candidates: tuple[str, ...]) -> Found:
  seconds: dict[str, float] = {}
  left_out: dict[str, str] = {}
  wanted = [_results(shape, "blocks", window) for window in shape.windows]
  for name in candidates:
    try:
      total = 0.0
      for window, want in zip(shape.windows, wanted, strict=True):
        got = _results(shape, name, window)
        if why := _fault(got, want):
          raise ValueError(why)
        total += _time(shape, name, window)
      seconds[name] = total
    except Exception as error:  # Whatever a kernel or its compiler refuses.
      left_out[name] = str(error).split("\n")[0][:120] or type(error).__name__
  return Found(min(seconds, key=lambda x: seconds[x]), seconds, left_out)


@lru_cache
def _inputs(shape: Shape) -> Any:
  """(q, k, v, sinks, segment ids): documents of an eighth of a row and odd."""
  random = np.random.default_rng(0)
  draw = lambda *dims: jnp.asarray(random.normal(size=dims), shape.dtype)
  B, T, N, K, H = shape[:5]
  length = max(1, T // 8 - 1)
  segments = np.broadcast_to(np.arange(T) // length + 1, (B, T))
  sinks = draw(N) if shape.sinks else None
  return (
    draw(B, T, N, H),
    draw(B, T, K, H),
    draw(B, T, K, H),
    sinks,
    jnp.asarray(segments, jnp.int32),
  )


@partial(jax.jit, static_argnames=("backend", "window", "softcap"))
def _run(q, k, v, sinks, segments, *, backend, window, softcap):
  """The output, and the gradient of its sines in q, k and v."""
  order = jnp.arange(segments.shape[1], dtype=jnp.int32)
  starts = attention.first_visible(segments)
  positions = order - starts

  def value(q, k, v):
    out = attention.attention(
      *(q, k, v),
      q_positions=positions,
      kv_positions=positions,
      q_segment_ids=segments,
      kv_segment_ids=segments,
      window=window,
      softcap=softcap,
      sinks=sinks,
      backend=backend,
      in_order=True,
    )
    return jnp.sin(out.astype(jnp.float32)).sum(), out

  gradients, out = jax.grad(value, (0, 1, 2), has_aux=True)(q, k, v)
  return out, gradients


def _results(shape: Shape, backend: str, window: int | None) -> Any:
  """Results of a backend, and the output after a change of document 1."""
  q, k, v, sinks, segments = _inputs(shape)
  options = {"backend": backend, "window": window, "softcap": shape.softcap}
  out, gradients = _run(q, k, v, sinks, segments, **options)
  first = (segments == 1)[..., None, None]
  changed = (jnp.where(first, -x, x) for x in (q, k, v))
  after, _ = _run(*changed, sinks, segments, **options)
  return jax.device_get((out, gradients, jnp.where(first, out, after)))


def _fault(got: Any, want: Any) -> str:
  """What is wrong with results, '' if nothing."""
  out, _, after = got
  if not np.array_equal(np.float32(out), np.float32(after)):
    return "a document sees another"
  for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    gap = np.abs(np.float32(x) - np.float32(y)).max()
    if not gap <= _TOLERANCE * max(1.0, np.abs(np.float32(y)).max()):
      return f"differs from blocks by {gap:.3g}"
  return ""


def _time(shape: Shape, backend: str, window: int | None) -> float:
  options = {"backend": backend, "window": window, "softcap": shape.softcap}
  times = []
  for _ in range(_RUNS):
    started = time.perf_counter()
    jax.block_until_ready(_run(*_inputs(shape), **options))
    times.append(time.perf_counter() - started)
  return min(times)
