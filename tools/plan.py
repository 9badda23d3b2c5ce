"""The command `sft-jax plan`: see sft_jax/commands/plan.py."""

from sft_jax.main import main

if __name__ == "__main__":
  main("plan")
