"""Attention over packs: one function and its backends.

In: queries, keys, values, positions and segment ids; out: what each query
reads of its own document. Reading order: `attention` (the mask, the choice of
a backend, the reference), `blockwise` (any device, O(T) memory), `kernels`
(TPU, GPU), `fastest` (the fastest one on this GPU), `latent` (keys and values
from one vector), `parallel` (activation sharding, the exchange over a mesh),
`ring` (more devices than divide the heads).
"""
