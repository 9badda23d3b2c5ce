"""Rows encoded once and kept on disk: sources in, a `Store` of examples out.

`build` gives the store of sources, a tokenizer and options, from disk where
it is there. Read `build`, then `shards` (some rows to arrays, in `workers`),
`store` (what is read back), `files` (its format and digests), `fingerprint`
(what decides it) and `stats` (what became of each row). `teacher` keeps what
another model predicts of the store's trained tokens.
"""
