"""The command `sft-jax selfcheck`: see sft_jax/commands/selfcheck.py."""

from sft_jax.commands.selfcheck import cli

if __name__ == "__main__":
  cli()
