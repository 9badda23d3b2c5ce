"""Rows encoded once and kept on disk: sources in, a `Store` of examples out.

Read `build` (the store of sources, a tokenizer and options, from disk where it
is there), `shards` (some rows to arrays, in `workers`), `store` (what is read
back), `files` (its format and digests), `fingerprint` (what decides it),
`stats` (what became of each row) and `teacher` (what another model predicts).
"""
