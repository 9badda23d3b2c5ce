"""The command `sft-jax score`: see sft_jax/commands/score.py."""

from sft_jax.commands.score import cli

if __name__ == "__main__":
  cli()
