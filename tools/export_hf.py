"""The command `sft-jax export`: see sft_jax/commands/export.py."""

from sft_jax.main import main

if __name__ == "__main__":
  main("export")
