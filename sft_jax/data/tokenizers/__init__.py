"""Text to token ids and back, for the tokenizer files that models come with.

In: a model folder, or an id of the hub. Out: a `Tokenizer` with its special
tokens, stop ids and chat template, which encodes text with offsets, reads
special tokens in what people say as text, takes new tokens and writes its
files into an export.

Reading order: `tokenizer` (the protocol and `load_tokenizer`), `files` (what a
folder holds beside the vocabulary), `huggingface` and `sentencepiece` (the two
libraries), `literal` (special tokens as text), `child` (a process that tries
untrusted files first).
"""
