"""The sandbox that chat templates run in; they come with models of others.

Configured as transformers configures its own, so that the same template gives
the same text.
"""

import datetime
import functools
import json
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes

from sft_jax.data.chat import budget, guards, sandbox


class TemplateFailed(ValueError):
  """A template refused, or failed on, what it was given; in its own words."""


class _Generation(jinja2.ext.Extension):
  """Reads `{% generation %}` blocks as plain text: spans do not need them."""

  tags = {"generation"}  # noqa: RUF012, Jinja's own protocol

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


def tojson(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """JSON as transformers prints it in templates: no HTML escapes."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


@functools.lru_cache(maxsize=64)
def compile(source: str) -> jinja2.Template:
  """The compiled template; a fault in it is a ValueError with its line."""
  budget.reset()
  environment = sandbox.Sandbox(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = guards.counted("tojson", tojson)
  environment.globals["raise_exception"] = _raise_exception
  try:
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(
      f"chat template line {error.lineno}: got {error.message}; expected a "
      "Jinja template. Mend chat_template.jinja in the model folder."
    ) from error
  # What Jinja makes of a template, Python may still refuse to compile.
  except (SyntaxError, RecursionError, MemoryError) as error:
    raise ValueError(
      f"chat template: got {error}; expected less nesting. Mend "
      "chat_template.jinja in the model folder."
    ) from error


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
  """The template's text for `variables`; see `ChatTemplate.render`."""
  variables = dict(variables)
  date = variables.pop("date", None)
  variables["strftime_now"] = functools.partial(_strftime, date)
  pieces, length = [], 0
  # As template.generate does, which copies the globals through slow layers.
  context = template.new_context(_globals(template) | variables, shared=True)
  budget.reset()
  try:
    for piece in template.root_render_func(context):
      length += len(piece)
      budget.refuse_longer(length)
      pieces.append(piece)
  except _Unpinned:
    raise
  # A template is code by others: whatever it raises is its refusal.
  except Exception as error:
    raise TemplateFailed(f"{type(error).__name__}: {error}") from error
  return "".join(pieces)


@functools.lru_cache(maxsize=64)
def _globals(template: jinja2.Template) -> dict[str, Any]:
  return dict(template.globals)


class _Unpinned(ValueError):
  pass


def _strftime(date: str | None, format: str) -> str:
  if date is None:
    raise _Unpinned(
      "chat template: got a call for today's date; expected a pinned one, "
      "since text that changes by the day cannot be cached or repeated. Set "
      "template_kwargs to {'date': 'YYYY-MM-DD'}."
    )
  return datetime.date.fromisoformat(date).strftime(format)


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)
