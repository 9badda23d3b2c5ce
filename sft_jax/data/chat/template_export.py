"""The chat template of an export: what training chose, written into it.

Whoever loads the folder renders without knowing of `data.template_kwargs` and
`data.generation_prompt`, and must still get the prompts that were trained.
"""

import json
from typing import Any

from sft_jax.data.chat import template_probes
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.template import ChatTemplate


def exported(template: ChatTemplate, options: RenderOptions) -> str | None:
  """The Jinja source for an export; None where the original will do.

  `template_kwargs` become defaults, which a caller can still set; not the date,
  which was pinned for training alone. With generation_prompt='omit' the end
  that training left out is cut from the generation prompt:

      {% set rendered %}... the original ...{% endset %}
      {{ rendered[:-8] if add_generation_prompt and ... else rendered }}
  """
  kwargs = {k: v for k, v in options.template_kwargs.items() if k != "date"}
  omitted = ""
  if options.generation_prompt == "omit":
    omitted = template_probes.omitted(template, options.template_kwargs)
  if not kwargs and not omitted:
    return None
  source = template.source
  if source.startswith("\n"):  # Jinja drops a line break after a tag.
    source = "\n" + source
  head = "".join(
    f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} %}}"
    for name, value in kwargs.items()
  )
  if not omitted:
    return head + source
  source = source.removesuffix("\n")  # And one at the end of a template.
  return (
    f"{head}{{% set sft_rendered %}}{source}{{%+ endset %}}"
    f"{{%- set sft_omitted = {_literal(omitted)} %}}"
    "{{- sft_rendered[:-(sft_omitted | length)] if add_generation_prompt and "
    "sft_rendered.endswith(sft_omitted) else sft_rendered }}"
  )


def described(template: ChatTemplate, options: RenderOptions) -> list[str]:
  """Lines for the start page on the prompts of a run, and of its export."""
  kwargs = dict(options.template_kwargs)
  lines = [f"chat template: {json.dumps(kwargs)}"] if kwargs else []
  if options.generation_prompt == "omit":
    omitted = template_probes.omitted(template, kwargs)
    lines.append(
      f"generation prompt: without its end {omitted!r}, in training, "
      "sampling and the export"
      if omitted
      else "generation prompt: nothing to omit, replies begin after it"
    )
  return lines


def _literal(value: Any) -> str:
  """A JSON value as Jinja writes it."""
  if isinstance(value, list | tuple):
    return f"[{', '.join(map(_literal, value))}]"
  if isinstance(value, dict):
    pairs = (f"{_literal(k)}: {_literal(v)}" for k, v in value.items())
    return f"{{{', '.join(pairs)}}}"
  return "none" if value is None else json.dumps(value)
