"""What a person types: one module for each `sft-jax NAME`.

In: the arguments of a command line. Out: what is printed and written, and an
exit code. Reading order: `command` (flags and errors), `train`, the others.
Each has `main()`, which takes parsed flags, and `cli()`, the whole program.
"""
