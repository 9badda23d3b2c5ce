"""Attention over packs: what each query reads of its own document.

Reading order: `attention` (mask, choice of a backend, reference), `blockwise`
(any device, O(T) memory), `kernels` (TPU, GPU), `fastest` (measured), `latent`
(DeepSeek's), `parallel` (over a mesh), `ring` (devices that do not divide the
heads).
"""
