"""The command `sft-jax inspect`: see sft_jax/commands/inspect.py."""

from sft_jax.commands.inspect import cli

if __name__ == "__main__":
  cli()
