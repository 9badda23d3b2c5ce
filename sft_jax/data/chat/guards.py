"""Filters and methods of chat templates that could make much out of little.

Each is weighed before it runs: what would be too long is refused, not made.
"""

import re
import string
from collections.abc import Callable
from typing import Any

import jinja2

from sft_jax.data.chat import budget

# Of widths, indents and digits that a template asks for.
_MAX_WIDTH = 1000
# A number in a format: '%1000d', '{:>1000}'; or one that is given apart.
_WIDTH = re.compile(r"%[^a-zA-Z%]*?(\d{4,}|\*)")
_DIGITS = re.compile(r"\d{4,}")


def _width(*values: Any) -> None:
  for value in values:
    if isinstance(value, str):
      value = len(value)
    if isinstance(value, int | float) and abs(value) > _MAX_WIDTH:
      raise jinja2.TemplateError(f"a width of more than {_MAX_WIDTH}")


def _format_spec(text: str) -> None:
  for _, _, spec, _ in string.Formatter().parse(text):
    if spec and (_DIGITS.search(spec) or "{" in spec):
      raise jinja2.TemplateError(f"a width of more than {_MAX_WIDTH}")


def refuse_format(text: str, values: Any) -> None:
  """Raises where `text % values` would be too long."""
  if _WIDTH.search(text):
    raise jinja2.TemplateError(f"a width of more than {_MAX_WIDTH}")
  budget.refuse_longer(len(text) + text.count("%") * budget.weigh(values))


def _replaced(text: Any, old: Any, new: Any) -> None:
  if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
    budget.refuse_longer(len(text) + text.count(old) * len(new))


def _joined(between: Any, values: Any) -> list[Any]:
  values = list(values)
  width = len(between) if isinstance(between, str) else 8
  budget.refuse_longer(budget.weigh(values) + width * len(values))
  return values


def _cut(text: Any, at: Any) -> None:
  if isinstance(text, str):
    count = text.count(at) if isinstance(at, str) and at else len(text) // 2
    budget.refuse_longer(64 * count, "characters in pieces")


def weighed_arguments(method: Any, args: tuple, kwargs: dict) -> tuple:
  """The arguments of a text's own method, refused where they make it long."""
  text, name = method.__self__, method.__name__
  values = [*args, *kwargs.values()]
  if name in ("translate", "encode", "to_bytes"):
    raise jinja2.TemplateError(f"{name} is not allowed in chat templates")
  if not isinstance(text, str):
    return args
  if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
    _width(*values)
  elif name == "replace":
    _replaced(text, *values[:2])
  elif name == "join" and args:
    return (_joined(text, args[0]),)
  elif name == "splitlines":
    _cut(text, "\n")
  elif name in ("split", "rsplit"):
    _cut(text, values[0] if values else None)
  elif name in ("format", "format_map"):
    _format_spec(text)
    budget.refuse_longer(len(text) + text.count("{") * budget.weigh(values))
  return args


def _guard_indent(value: Any, values: list) -> None:
  _width(*values)
  widths = [len(one) if isinstance(one, str) else one for one in values]
  lines = value.count("\n") if isinstance(value, str) else 0
  budget.refuse_longer(lines * int(max(filter(None, widths), default=4)))


def _guard_json(value: Any, values: list) -> None:
  budget.weigh(value)
  for one in values:
    _width(*(one if isinstance(one, list | tuple) else (one,)))


def _guard_sum(value: Any, values: list) -> None:
  if any(isinstance(one, list | tuple | dict) for one in values):
    raise jinja2.TemplateError("a sum of lists is not allowed")


def _guard_text(value: Any, values: list) -> None:
  del values
  budget.weigh(value)


# (value, other arguments) of filters, refused where they make it long.
_GUARDS: dict[str, Callable[[Any, list], None]] = {
  "center": lambda value, values: _width(*values),
  "round": lambda value, values: _width(*values),
  "batch": lambda value, values: _width(*values[:1]),
  "slice": lambda value, values: _width(*values[:1]),
  "indent": _guard_indent,
  "tojson": _guard_json,
  "sum": _guard_sum,
  "replace": lambda value, values: _replaced(str(value), *values[:2]),
  "format": lambda value, values: refuse_format(str(value), values),
  "list": lambda value, values: _cut(value, None),
  **dict.fromkeys(
    ("string", "e", "escape", "forceescape", "urlencode", "title"),
    _guard_text,
  ),
}


def counted(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
  """A filter whose work is counted, and refused where it would be too much."""
  guard = _GUARDS.get(name)
  passes = getattr(filter, "jinja_pass_arg", None) is not None

  def call(*args: Any, **kwargs: Any) -> Any:
    if guard is not None:
      # After the environment or context, where a filter takes one.
      value, *values = args[1:] if passes else args
      guard(value, [*values, *kwargs.values()])
    elif name == "join":
      value, *values = args[1:]
      between = next(iter([*values, *kwargs.values()]), "")
      args = (args[0], _joined(between, value), *values)
    return budget.made(filter(*args, **kwargs))

  if passes:  # Jinja reads from the function what it is to be called with.
    call.jinja_pass_arg = filter.jinja_pass_arg  # type: ignore
  return call


def joined_up(values: list[Any]) -> str:
  """What `a ~ b` makes."""
  budget.refuse_longer(sum(map(budget.weigh, values)))
  return budget.made("".join(map(str, values)))
