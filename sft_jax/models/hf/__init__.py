"""Hugging Face folders in and out.

In: a folder of config.json and safetensors, or parameters; out: a model with
its parameters on their devices, or a folder that transformers loads.

Reading order: `load_save` (the entry points), `parameter_map` (which tensor
holds which parameter), `safetensors_files`, `device_loading` (files to
devices), `dequantize` (files in few bits); for the table of families
`family_fields` and `tensor_names`; PEFT's adapters (`peft_load`, `peft_save`,
`peft_moe`), and `merging` (one model of several).
"""
