"""The command `sft-jax replay`: see sft_jax/commands/replay.py."""

from sft_jax.main import main

if __name__ == "__main__":
  main("replay")
