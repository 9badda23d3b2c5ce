"""What is wrong with data: a `Store` in, findings and warnings out.

`checks` refuses a run: `token_checks` and `overlap` look at tokens, `reasoning`
at the rows again. `warnings` looks at what rows say (`row_texts`, hashed by
`text_hashing`): `near_duplicates`, `conflicts`, `languages`. `summary` gathers
all for `sft-jax inspect`, with scores (`score_summary`).
"""
