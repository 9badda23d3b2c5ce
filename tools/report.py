"""The command `sft-jax report`: see sft_jax/commands/compare.py."""

from sft_jax.commands.compare import report_cli

if __name__ == "__main__":
  report_cli()
