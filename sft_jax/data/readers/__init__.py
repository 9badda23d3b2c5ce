"""Readers: from a path to rows, strictly and with the place of each row.

In: a file, glob, folder or hub id, see `files.find_files`.
Out: (place, row) pairs such as ('rows.jsonl:12', {...}), or a RowError.
Read `files` (which files, which reader), then `json` and `arrow`; `memory`
holds rows that a program hands over.
"""
