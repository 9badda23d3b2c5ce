"""Rows to Examples: token ids, their loss weights and their roles.

In: Conversations, a tokenizer and RenderOptions. Out: `EncodedRow`s, whose
Examples hold the ids that inference sees before each trained turn.
Reading order: `encode` (the entry), `boundaries` (rendered text to ids),
`fast_path` (rows of one form, compared with the first of that form).
"""
