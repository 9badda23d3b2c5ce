"""Conversation and chat template in, text with loss spans out.

Reading order: `options` (what a config can choose), `template` (a model's Jinja
template), `sandbox` and `sandbox_child` (another process renders it),
`template_messages` (dicts for it, and sentinels that find each text again),
`template_probes` (what it does), `renderer` (prompts and turns as text),
`trained_turn` (where a reply starts and stops), `token_roles` (whose text each
span is), `loss_spans` (all of it: `render_spans`), `template_export`.
"""
