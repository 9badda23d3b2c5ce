"""The command `sft-jax report`: see sft_jax/commands/report.py."""

from sft_jax.commands.report import main

if __name__ == "__main__":
  main()
