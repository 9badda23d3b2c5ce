"""The command `sft-jax report`: see sft_jax/commands/compare.py."""

from sft_jax.main import main

if __name__ == "__main__":
  main("report")
