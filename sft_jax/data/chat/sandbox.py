"""Limits on chat templates: no code that reaches out, no work without end.

Jinja's sandbox stops code that reaches out, not code that never ends or fills
the memory. So every loop turn, macro call and call spends from a `budget`, and
whatever could make a long text or a large list out of a short one is weighed
before it does (`guards`).
"""

import types
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes

from sft_jax.data.chat import budget, guards

_MAX_SOURCE = 1 << 20
# Filters without which chat templates do: random by nature, or without bound.
_NO_FILTERS = ("random", "urlize", "pprint", "xmlattr", "wordwrap")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """Stops code, writes to what it is given, and work or text without end."""

  intercepted_binops = frozenset(["*", "**", "%"])

  def __init__(self, **options: Any):
    # Constants are not worked out while compiling, but where steps count.
    super().__init__(optimized=False, finalize=budget.written, **options)
    for name in _NO_FILTERS:
      del self.filters[name]
    self.globals = {
      name: value for name, value in self.globals.items() if name != "lipsum"
    }
    for name, filter in list(self.filters.items()):
      self.filters[name] = guards.counted(name, filter)
    # Filters of our own, which `_with_ticks` puts into every template.
    self.filters |= {
      "_tick": budget.tick,
      "_made": budget.made,
      "_added": lambda one, other: budget.made(one + other),
      "_joined": guards.joined_up,
    }

  def call_binop(self, context, operator, left, right):
    if operator == "**":
      raise jinja2.TemplateError("powers are not allowed in chat templates")
    if operator == "%":
      if isinstance(left, str):
        guards.refuse_format(left, right)
      return budget.made(left % right)
    for text, times in ((left, right), (right, left)):
      if isinstance(text, str | list | tuple) and isinstance(times, int):
        budget.refuse_longer(budget.weigh(text) * times)
    return budget.made(left * right)

  def call(self, context, method, *args, **kwargs):
    if isinstance(method, types.BuiltinMethodType):
      args = guards.weighed_arguments(method, args, kwargs)
    budget.spend(8)
    return budget.made(super().call(context, method, *args, **kwargs))

  def wrap_str_format(self, value):
    wrapped = super().wrap_str_format(value)
    if wrapped is None:
      return None

    def guarded(*args: Any, **kwargs: Any) -> str:
      guards.weighed_arguments(value, args, kwargs)
      return wrapped(*args, **kwargs)

    return guarded

  def _parse(self, source, name, filename):
    if len(source) > _MAX_SOURCE:
      raise jinja2.TemplateSyntaxError(f"more than {_MAX_SOURCE} characters", 1)
    try:
      return _with_ticks(super()._parse(source, name, filename))
    except RecursionError:
      raise jinja2.TemplateSyntaxError("too deep a nesting", 1) from None


def _with_ticks(tree: nodes.Template) -> nodes.Template:
  """The template with a tick in every loop and macro, and with what it makes
  weighed: lists, `~`, blocks of text that are set."""
  bodies = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
  written = [
    sum(len(data.data) for data in body.find_all(nodes.TemplateData))
    + sum(budget.SHORT for _ in body.find_all(nodes.Output))
    + sum(len(str(const.value)) for const in body.find_all(nodes.Const))
    for body in bodies
  ]
  for node in tree.find_all(nodes.AssignBlock):
    node.filter = _filter("string", node.filter, node.lineno)
  _weigh_makings(tree)
  for body, characters in zip(bodies, written, strict=True):
    tick = _filter("_tick", nodes.Const(characters), body.lineno)
    body.body.insert(0, nodes.ExprStmt(tick, lineno=body.lineno))
  return tree


def _weigh_makings(node: nodes.Node) -> None:
  """Puts a filter on each list, dict and `~` in the expressions below."""
  for field in node.fields:
    value = getattr(node, field)
    if isinstance(value, list):
      for child in value:
        if isinstance(child, nodes.Node):
          _weigh_makings(child)
      value[:] = [_weighed(one) for one in value]
    elif isinstance(value, nodes.Node):
      _weigh_makings(value)
      setattr(node, field, _weighed(value))


def _weighed(node: Any) -> Any:
  if isinstance(node, nodes.Concat):
    values = nodes.List(node.nodes, lineno=node.lineno)
    return _filter("_joined", values, node.lineno)
  if isinstance(node, nodes.Add) and not (
    _is_text(node.left) or _is_text(node.right)
  ):
    return _filter("_added", node.left, node.lineno, node.right)
  makes = isinstance(node, nodes.List | nodes.Dict) or (
    isinstance(node, nodes.Tuple) and node.ctx == "load"
  )
  # Literals of a template are no longer than the template.
  if makes and any(True for _ in node.find_all(nodes.Name)):
    return _filter("_made", node, node.lineno)
  return node


def _is_text(node: nodes.Node) -> bool:
  """Whether a node is a text of the template: `budget.tick` counts those."""
  return isinstance(node, nodes.Const) and isinstance(node.value, str)


def _filter(
  name: str, value: Any, line: int, *args: nodes.Expr
) -> nodes.Filter:
  return nodes.Filter(value, name, [*args], [], None, None, lineno=line)
