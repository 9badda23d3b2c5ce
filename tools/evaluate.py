"""The command `sft-jax evaluate`: see sft_jax/commands/evaluate.py."""

from sft_jax.main import main

if __name__ == "__main__":
  main("evaluate")
