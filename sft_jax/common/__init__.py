"""What every folder may use; nothing here knows training, models or data.

Reading order: `batch` (what data hands to training), `trees` (parameters by
path), `sharding` (where arrays are), `distributed` (several processes, with
`meeting` and `lifeline`), then `machines`, `flops`, `buckets`, `hub`,
`compile_cache` and `workdir`.
"""
