"""The command `sft-jax evaluate`: see sft_jax/commands/evaluate.py."""

from sft_jax.commands.evaluate import cli

if __name__ == "__main__":
  cli()
