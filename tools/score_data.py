"""The command `sft-jax score`: see sft_jax/commands/score.py."""

from sft_jax.main import main

if __name__ == "__main__":
  main("score")
