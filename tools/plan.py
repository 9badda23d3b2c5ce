"""The command `sft-jax plan`: see sft_jax/commands/plan.py."""

from sft_jax.commands.plan import cli

if __name__ == "__main__":
  cli()
