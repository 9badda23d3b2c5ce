"""What a run was made with: packages, Python, commit and platform."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import jax


def installed() -> dict[str, str]:
  """By name; with the commit of the checkout that runs, and the platform."""
  names = (
    *("sft_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
    *("grain", "numpy", "tokenizers"),
  )
  device = jax.devices()[0]
  return {
    **{name: _version(name) for name in names},
    "python": platform.python_version(),
    "commit": _commit(),
    "platform": f"{platform.system()} {platform.machine()}, {device.platform}",
  }


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"  # We may run from a checkout as it is.


def _commit() -> str:
  """Of the checkout that runs, with '-dirty' where files differ from it."""
  checkout = Path(__file__).parents[2]
  if not (checkout / ".git").exists():  # Another's may lie around us.
    return "unknown: not run from a checkout"
  command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError) as error:
    return f"unknown: {error}"
  return done.stdout.strip()
