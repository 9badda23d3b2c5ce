"""Conversation and chat template in, text with loss spans out.

Reading order: `options` (what a config can choose), `template` (a model's
Jinja template), `sandbox` and `sandbox_child` (render it in another process),
`template_messages` (the dicts it reads, and sentinels that find each text
again), `template_probes` (what it does), `renderer` (prompts and turns of one
conversation), `trained_turn` (where a reply starts and stops), `token_roles`
(whose text each span is), `loss_spans` (all of it: `render_spans`),
`template_export`.
"""
