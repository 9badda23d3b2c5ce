"""The command `sft-jax replay`: see sft_jax/commands/replay.py."""

from sft_jax.commands.replay import cli

if __name__ == "__main__":
  cli()
