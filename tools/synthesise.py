"""The command `sft-jax synthesize`: see sft_jax/commands/synthesize.py."""

from sft_jax.main import main

if __name__ == "__main__":
  main("synthesize")
