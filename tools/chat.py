"""The command `sft-jax chat`: see sft_jax/commands/chat.py."""

from sft_jax.main import main

if __name__ == "__main__":
  main("chat")
