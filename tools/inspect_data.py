"""The command `sft-jax inspect`: see sft_jax/commands/inspect.py."""

from sft_jax.main import main

if __name__ == "__main__":
  main("inspect")
