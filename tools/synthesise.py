"""The command `sft-jax synthesize`: see sft_jax/commands/synthesize.py."""

from sft_jax.commands.synthesize import cli

if __name__ == "__main__":
  cli()
