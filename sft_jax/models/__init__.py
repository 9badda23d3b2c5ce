"""One decoder-only transformer, whose families are data.

In: a config.json (`config`) and tensors (`hf`); out: `transformer.Model`, pure
functions over a plain tree of parameters, layers stacked on a leading axis.

Reading order: `config`, `families`, `transformer`, `block`, `rope`, `moe`,
`kv_cache`, `remat`; then `layers`, `attention`, `lora`, `hf`. The only package
that imports Flax; it never imports `data`.
"""
