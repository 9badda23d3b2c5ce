"""States on disk: saved whole, verified when read, exported as models.

In comes a tree of arrays with a JSON-like dict; out comes the same, proved by
digests. Reading order: `manager` (save, restore), `digests` (of arrays and of
the rows trained on), `local_copies` (in the memory of hosts), `resume` (where a
run continues), `export` (a Hugging Face folder, read back and compared), `gguf`
(a file for llama.cpp), `serving` (what other tools make of both).
"""
