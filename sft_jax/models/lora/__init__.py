"""LoRA: adapters beside frozen kernels, and the base model below them.

Reading order: `lora` (which kernels are adapted, fresh adapters), `quantize`
(the frozen base in int8 or nf4), `merge` (adapters folded into kernels),
`base_model` (the base's own parameters, for KL and forgetting), `token_rows`
(rows of the embedding that train alone).
"""
