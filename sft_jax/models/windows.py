"""Which layers see a window only: SLIDING or FULL for each of n layers.

Each function takes the config.json, its defaults filled in, and n.
"""

from collections.abc import Callable

from sft_jax.models.family import FULL, SLIDING, Json


def everywhere(raw: Json, n: int) -> list[str]:
  """Every layer, where the file gives a window (Mistral)."""
  return [SLIDING] * n


def if_used(raw: Json, n: int) -> list[str]:
  """Every layer, where the file says so (Qwen3 MoE)."""
  return [SLIDING if raw.get("use_sliding_window") else FULL] * n


def full_each(field: str, period: int) -> Callable[[Json, int], list[str]]:
  """Every period-th layer is full; the file's field may say another."""

  def layer_types(raw: Json, n: int) -> list[str]:
    k = raw.get(field) or period
    return [FULL if (i + 1) % k == 0 else SLIDING for i in range(n)]

  return layer_types


def from_layer(raw: Json, n: int) -> list[str]:
  """The layers from `max_window_layers` on (Qwen)."""
  if not raw.get("use_sliding_window"):
    return [FULL] * n
  first = raw.get("max_window_layers", 28)
  return [SLIDING if i >= first else FULL for i in range(n)]


def without_rope(raw: Json, n: int) -> list[str]:
  """The layers that do not turn, if the file says so (SmolLM3)."""
  if not raw.get("use_sliding_window"):
    return [FULL] * n
  return [FULL if turns else SLIDING for turns in rope_layers(raw, n)]


def rope_layers(raw: Json, n: int) -> list[bool]:
  """Which layers turn queries and keys at all (SmolLM3)."""
  if raw.get("no_rope_layers") is not None:
    return [bool(x) for x in raw["no_rope_layers"]]
  period = raw.get("no_rope_layer_interval")
  return [not period or (i + 1) % period != 0 for i in range(n)]
