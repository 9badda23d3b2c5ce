"""One decoder-only transformer, whose families are data: from a config.json
(`config`) and tensors (`hf`) to `transformer.Model`, pure functions over a
plain tree of parameters. The only package that imports Flax.

Reading order: `config`, `families`, `transformer`, `block`, `rope`, `moe`,
`kv_cache`, `remat`; then `layers`, `attention`, `lora`, `hf`.
"""
