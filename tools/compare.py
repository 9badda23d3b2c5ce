"""The command `sft-jax compare`: see sft_jax/commands/compare.py."""

from sft_jax.commands.compare import cli

if __name__ == "__main__":
  cli()
