"""Data: from files of rows to the batches of a run.

In: sources (`sources`), a tokenizer and RenderOptions. Out: a Store of encoded
rows, counted (Law 2), and a Stream of packed batches.
Read `conversation`, `sources`, then the folders in the order of a row:
`readers`, `formats`, `chat`, `tokenizers`, `encoding`, `store`; then
`selection`, `packing`, `pipeline`, and `audit`, which checks the result.
"""
