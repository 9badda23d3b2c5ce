"""The command `sft-jax chat`: see sft_jax/commands/chat.py."""

from sft_jax.commands.chat import cli

if __name__ == "__main__":
  cli()
