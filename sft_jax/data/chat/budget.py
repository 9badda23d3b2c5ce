"""What one rendering of a chat template may use: steps, characters, things.

There are no clocks: the same template and row are refused on every machine
alike.
"""

import threading
from typing import Any

import jinja2

# Characters that a rendering, or one text inside it, may have.
MAX_CHARACTERS = 1 << 25
# Turns of loops in one rendering; a call counts as eight, and 64 characters or
# one item of what is made as one. A few seconds.
MAX_STEPS = 1_000_000
# Things in one list or dict, those inside of them counted.
MAX_THINGS = 1 << 20
# Characters written in all: macros and blocks write what is written again.
_MAX_WRITTEN = 8 * MAX_CHARACTERS
# Text that is shorter is not worth counting by itself.
SHORT = 256

_Namespace = jinja2.utils.Namespace
_ATTRIBUTES = "_Namespace__attrs"
_spent = threading.local()


def reset() -> None:
  """A new budget for this thread's next rendering."""
  _spent.steps, _spent.characters = 0, 0


def refuse_longer(length: int, what: str = "characters") -> None:
  """Raises where so many characters are too many for a rendering."""
  if length > MAX_CHARACTERS:
    raise jinja2.TemplateError(f"more than {MAX_CHARACTERS} {what}")


def spend(steps: int) -> None:
  """Takes steps from the budget; raises when none are left."""
  _spent.steps += steps
  if _spent.steps > MAX_STEPS:
    raise jinja2.TemplateError(
      f"more than {MAX_STEPS} steps: the template loops without end"
    )


def tick(characters: int) -> None:
  """A turn of a loop, or a call of a macro, that writes at least so much."""
  _spent.steps += 1
  _spent.characters += characters
  if _spent.steps > MAX_STEPS or _spent.characters > _MAX_WRITTEN:
    spend(0)
    raise jinja2.TemplateError(f"more than {_MAX_WRITTEN} characters written")


def written(value: Any) -> Any:
  """Called by Jinja with all that `{{ }}` writes."""
  if type(value) is str and len(value) <= SHORT:
    return value
  tick(weigh(value))
  return value


def made(value: Any) -> Any:
  """What an expression has made, weighed; the value itself."""
  kind = type(value)
  if kind is str:
    if len(value) > SHORT:
      spend(1 + weigh(value) // 64)
  elif kind is int:
    if value.bit_length() > 4096:
      raise jinja2.TemplateError("a number of more than 4096 bits")
  elif kind is not bool and value is not None and kind is not float:
    spend(1 + weigh(value) // 64)
  return value


def weigh(value: Any) -> int:
  """Characters that a value would have as text, roughly; refuses too many.

  What a list holds twice counts twice, since it would be written twice.
  """
  if isinstance(value, str):
    refuse_longer(len(value))
    return len(value)
  if isinstance(value, bytes | bytearray):
    raise jinja2.TemplateError("bytes are not allowed in chat templates")
  if not isinstance(value, list | tuple | dict | set | _Namespace):
    return 8
  things, characters, rest = 0, 0, [value]
  while rest:
    one = rest.pop()
    things += 1
    if isinstance(one, str):
      characters += len(one)
    elif isinstance(one, dict):
      rest += one.keys()
      rest += one.values()
    elif isinstance(one, list | tuple | set):
      rest += one
    elif isinstance(one, _Namespace):
      rest.append(object.__getattribute__(one, _ATTRIBUTES))
    if things + len(rest) > MAX_THINGS:
      raise jinja2.TemplateError(f"a list of more than {MAX_THINGS} things")
  refuse_longer(characters)
  return characters + 64 * things
