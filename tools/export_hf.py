"""The command `sft-jax export`: see sft_jax/commands/export.py."""

from sft_jax.commands.export import main

if __name__ == "__main__":
  main()
