"""Text to token ids and back, for the tokenizer files that models come with.

In: a model folder, or an id of the hub. Out: a `Tokenizer` with its special
tokens, stop ids and chat template.
Reading order: `tokenizer` (the protocol, `load_tokenizer`), `files` (beside the
vocabulary), `huggingface` and `sentencepiece` (the libraries), `literal`
(special tokens as text), `child` (a process that tries untrusted files first).
"""
