"""LoRA: which kernels are adapted, how strongly, and fresh adapters.

Leaves beside a kernel [..., in, out], float32 whatever the base's dtype
(bfloat16 would round a small update away), frozen but what `trains`:

    lora_a [..., in, R]   lora_b [..., R, out]   the update s A B
    lora_m [..., out]     DoRA's magnitudes
    lora_a0, lora_b0      PiSSA's start: what the kernel lacks of the base's

and beside the frozen table of an embedding or a head [V, D]

    lora_rows [N, D]      stand for the table's rows `token_rows`

The adapted product is in `linear`, folding adapters in is in `merge`.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from sft_jax.common import trees
from sft_jax.common.trees import Tree
from sft_jax.models.lora import quantize

PRESETS = {
  "all-linear": (r"^layers/.*/kernel$",),
  "attention": (r"^layers/\w*attn/.*/kernel$",),
}
INITS = ("zero", "pissa")
TABLES = ("embed/embedding", "head/embedding")
# Those whose rows are tokens.
BY_TOKEN = (*TABLES, "per_layer/embed/embedding")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What to adapt, and how strongly."""

  rank: int  # R.
  alpha: float  # The update is multiplied by alpha / rank.
  # 'all-linear', 'attention', or patterns over kernel paths such as
  # (r'attn/(q|v)/',). Every pattern must match a kernel.
  targets: str | tuple[str, ...] = "all-linear"
  # ((pattern, rank), ...) over modules such as 'attn/q'; the first that matches
  # decides, else `rank`.
  rank_pattern: tuple[tuple[str, int], ...] = ()
  alpha_pattern: tuple[tuple[str, float], ...] = ()  # The same for alpha.
  rslora: bool = False  # By alpha / sqrt(rank) (Kalajdzievski, 2312.03732).
  dora: bool = False  # The lengths of columns train apart from directions.
  # 'zero' starts as the base model with B = 0; 'pissa' also starts as the base
  # model, with A B its first R singular directions and the frozen kernel the
  # rest (Meng et al. 2024, arXiv 2404.02948).
  init: str = "zero"
  dropout: float = 0.0  # Share of an adapter's inputs that are 0; 0 = off.
  # Patterns over other parameters that train whole, such as ('norm', 'embed/').
  also_train: tuple[str, ...] = ()
  # Ids, ascending, whose rows of the embedding and of an untied head train,
  # alone: tokens that the base model never learned.
  token_rows: tuple[int, ...] = ()

  def __post_init__(self):
    for rank in (self.rank, *(rank for _, rank in self.rank_pattern)):
      if rank < 1:
        raise ValueError(
          f"lora: rank is {rank}; expected at least 1. "
          "Set lora.rank, or build the model without LoRA."
        )
    if self.init not in INITS or not 0 <= self.dropout < 1:
      raise ValueError(
        f"lora: init is {self.init!r} and dropout {self.dropout}; expected one "
        f"of {INITS}, and a share below 1. Change lora.init or lora.dropout."
      )
    if list(self.token_rows) != sorted({i for i in self.token_rows if i >= 0}):
      raise ValueError(
        f"lora: token_rows is {self.token_rows}; expected ids in ascending "
        "order, each once. Sort them."
      )

  def rank_of(self, module: str) -> int:
    rules = (*self.rank_pattern, ("", self.rank))
    return trees.first_match(rules, module, "lora.rank_pattern")

  def alpha_of(self, module: str) -> float:
    rules = (*self.alpha_pattern, ("", self.alpha))
    return trees.first_match(rules, module, "lora.alpha_pattern")

  def scale(self, module: str) -> float:
    """The factor of the adapter's product."""
    rank = self.rank_of(module)
    return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

  def trains(self, path: str) -> bool:
    """True for the leaves that train.

    >>> config = LoraConfig(rank=2, alpha=4.0, also_train=('final_norm',))
    >>> config.trains('layers/attn/q/lora_a'), config.trains('embed/embedding')
    (True, False)
    """
    if is_adapter(path):
      return path.endswith(("/lora_a", "/lora_b", "/lora_m", "/lora_rows"))
    return not is_constant(path) and trees.matches_any(self.also_train, path)


def module_of(path: str) -> str:
  """The module that rules see: 'layers/attn/q/kernel' -> 'attn/q'."""
  return path.removeprefix("layers/").rpartition("/")[0]


def is_constant(path: str) -> bool:
  """True for leaves of a checkpoint that no training changes: constants of an
  activation or a layer, and a router's correction, which no gradient reaches.
  """
  ends = ("/act/beta", "/act/eps", "/correction", "/layer_scalar")
  return path.endswith(ends)


def trained(lora: LoraConfig | None) -> Callable[[str], bool]:
  return lora.trains if lora else lambda path: not is_constant(path)


def is_adapter(path: str) -> bool:
  """True for leaves that an adapter adds to the base model.

  >>> is_adapter('layers/attn/q/lora_a'), is_adapter('layers/attn/q/kernel')
  (True, False)
  """
  return path.rpartition("/")[2].startswith("lora_")


# -- Which, and fresh ones --------------------------------------------------


def target_paths(params: Tree, targets: str | tuple[str, ...]) -> list[str]:
  """Paths of the kernels that the targets choose. Raises ValueError: a pattern
  that matches no kernel of a layer."""
  if isinstance(targets, str):
    patterns = PRESETS.get(targets, (targets,))
  else:
    patterns = tuple(targets)
  kernels = [
    path
    for path in trees.flatten(params)
    if re.search("^layers/.*/kernel$", path) and "/router/" not in path
  ]
  _check_patterns("targets", patterns, kernels, f"{sorted(PRESETS)} or ")
  if not patterns:
    raise ValueError(
      "lora: targets is empty; expected at least one pattern. Set lora.targets."
    )
  return [path for path in kernels if trees.matches_any(patterns, path)]


def check(params: Tree, lora: LoraConfig) -> list[str]:
  """The paths to adapt, once every pattern is known to choose something. Raises
  ValueError: a pattern that matches nothing; a parameter to train whole in a
  module that is adapted."""
  paths = target_paths(params, lora.targets)
  modules = [module_of(path) for path in paths]
  for name in ("rank_pattern", "alpha_pattern"):
    patterns = [pattern for pattern, _ in getattr(lora, name)]
    _check_patterns(name, patterns, modules)
  flat = trees.flatten(params)
  _check_patterns("also_train", lora.also_train, flat)
  if lora.dora or lora.dropout:
    for path in paths:
      if flat[path].ndim > 3:
        raise ValueError(
          f"lora: {path} holds the kernels of several experts, which have "
          "neither DoRA nor dropout; expected lora.dora False and lora.dropout "
          "0. Set them so, or narrow lora.targets."
        )
  parents = {path.rpartition("/")[0] for path in paths}
  if lora.token_rows:
    parents |= {"embed", "head"}
    if (last := lora.token_rows[-1]) >= flat["embed/embedding"].shape[0]:
      raise ValueError(
        f"lora: token_rows has {last} for {flat['embed/embedding'].shape[0]} "
        "rows of the embedding; expected ids below. Change lora.token_rows."
      )
  for path in filter(lora.trains, flat):
    if path.rpartition("/")[0] in parents:
      raise ValueError(
        f"lora: also_train chooses {path}, whose module is adapted; expected "
        "one or the other. Narrow lora.also_train or lora.targets."
      )
  return paths


def _check_patterns(name, patterns, choices, before: str = "") -> None:
  for pattern in patterns:
    if not any(re.search(pattern, choice) for choice in choices):
      raise ValueError(
        f"lora: {name} {pattern!r} matches nothing; expected {before}patterns "
        f"over {list(choices)}. Change lora.{name}."
      )


def fresh(
  key: jax.Array, path: str, kernel: Float[Array, "... I O"], lora: LoraConfig
) -> dict[str, jax.Array]:
  """The leaves of one adapted module: its kernel and fresh adapters.

  A is uniform within +-1/sqrt(in) (kaiming_uniform with a = sqrt(5), as PEFT)
  and B zero, or both are PiSSA's, whose residual is then the kernel. Either way
  the adapted model starts as the base model. Each path draws its own from the
  key.
  """
  *stack, fan_in, fan_out = kernel.shape
  module = module_of(path)
  rank, parent = lora.rank_of(module), path.removesuffix("/kernel")
  leaves = {}
  if lora.dora:
    whole = kernel.astype(jnp.float32)
    leaves["lora_m"] = jnp.linalg.norm(whole, axis=-2)
  if lora.init == "pissa":
    split = lambda w: principal(w, rank, lora.scale(module))
    stacked = kernel.reshape(-1, fan_in, fan_out)
    halves = jax.lax.map(split, stacked)
    a, b, rest = (x.reshape(*stack, *x.shape[1:]) for x in halves)
    leaves |= {"lora_a": a, "lora_b": b, "lora_a0": a, "lora_b0": b}
    kernel = rest.astype(kernel.dtype)
  else:
    bound = 1 / math.sqrt(fan_in)
    own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    leaves["lora_a"] = jax.random.uniform(
      own_key, (*stack, fan_in, rank), minval=-bound, maxval=bound
    )
    leaves["lora_b"] = jnp.zeros((*stack, rank, fan_out))
  return {path: kernel} | {f"{parent}/{k}": x for k, x in leaves.items()}


def principal(
  kernel: Float[Array, "I O"], rank: int, scale: float
) -> tuple[Float32[Array, "I R"], Float32[Array, "R O"], Float32[Array, "I O"]]:
  """(A, B, rest): W = rest + scale * A B, A B of W's first singular values.
  With W = U diag(S) V', A = U_R diag(S_R / scale)^1/2 and B likewise."""
  kernel = kernel.astype(jnp.float32)
  u, s, vh = jnp.linalg.svd(kernel, full_matrices=False)
  root = jnp.sqrt(s[:rank] / scale)
  a, b = u[:, :rank] * root, root[:, None] * vh[:rank]
  return a, b, kernel - scale * product(a, b)


def init(key: jax.Array, params: Tree, lora: LoraConfig) -> Tree:
  """`params` with fresh adapters beside the chosen kernels; see `check`."""
  one, flat = prepare(key, params, lora), {}
  for path, x in trees.flatten(params).items():
    flat |= one(path, x)
  return trees.unflatten(dict(sorted(flat.items())))


def prepare(
  key: jax.Array, base: Tree, lora: LoraConfig | None, codec: str = ""
) -> Callable[[str, jax.Array], dict[str, jax.Array]]:
  """What each leaf of the base model becomes on its way to training: the
  function takes (path, array) and gives {path: array}.

  That is the kernel and its adapters, codes and scale, all of these, or the
  leaf itself, in float32 where it trains. Leaf by leaf, so that a model larger
  than memory is quantized while it is read. `codec`: of what does not train.

  Raises ValueError: see `check`; an unknown codec.
  """
  targets = check(base, lora) if lora else []

  def one(path: str, x: jax.Array) -> dict[str, jax.Array]:
    if lora and lora.trains(path):
      x = x.astype(jnp.float32)
    leaves = {path: x}
    if lora and path in targets:
      leaves = fresh(key, path, x, lora)
    if lora and lora.token_rows and path in TABLES:
      rows = x[jnp.array(lora.token_rows)].astype(jnp.float32)
      leaves[path.replace("embedding", "lora_rows")] = rows
    if codec and not (lora and lora.trains(path)):
      leaves |= quantize.pack(path, leaves.pop(path), codec)
    return leaves

  return one


def product(a: jax.Array, b: jax.Array) -> jax.Array:
  """A B in float32, whatever the precision of the device's products."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.matmul(a, b, precision="highest")
