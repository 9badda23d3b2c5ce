"""Rows to Examples: token ids, their loss weights and their roles.

In: Conversations, a tokenizer and RenderOptions. Out: `EncodedRow`s, whose
Examples hold the ids that inference sees before each trained turn.

Reading order: `encode` (one entry, `encode_rows`, decides between the fast and
the full path), `boundaries` (rendered text to ids), `fast_path` (rows of one
form, rendered by comparison with the first of that form).
"""
