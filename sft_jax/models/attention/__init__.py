"""Attention over packs: one function and its backends.

In: queries, keys, values, positions and segment ids; out: what each query
reads of its own document. Reading order: `attention` (the mask, the choice of
a backend, the reference), `blockwise` (any device, O(T) memory), `kernels`
(TPU, GPU), `parallel` (activation sharding, the exchange over a mesh).
"""
