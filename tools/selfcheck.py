"""The command `sft-jax selfcheck`: see sft_jax/commands/selfcheck.py."""

from sft_jax.main import main

if __name__ == "__main__":
  main("selfcheck")
