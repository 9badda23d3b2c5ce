"""The command `sft-jax export`: see sft_jax/commands/export.py."""

from sft_jax.commands.export import cli

if __name__ == "__main__":
  cli()
