"""What the child process of `sandbox` does: compiles and renders templates.

Of a long conversation many cuts are asked for. Where the template allows it,
they come of few renderings (`_by_increments`, `_by_windows`).
"""

import bisect
import datetime
import functools
import itertools
import json
import types
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
from jinja2 import nodes

from sft_jax.data.chat import sandbox
from sft_jax.data.chat.sandbox import TemplateFailed
from sft_jax.data.tokenizers import child

_MAX_SOURCE = 1 << 20  # Characters of a template.


def serve() -> None:
  """The child: renders until its streams end."""
  child.serve(lambda request: _reply(*request), sandbox.MEMORY)


def _reply(source: str, jobs: list[tuple]) -> Any:
  """(kind, text) by job and cut, as many as fit; else what is wrong with it."""
  child.limit_time(sandbox.CPU_SECONDS)
  try:
    template = compile(source)
  except ValueError as error:
    return str(error)
  made, length = [], 0
  for messages, variables, cuts in jobs:
    texts = _by_increments(source, template, messages, variables, cuts)
    texts = texts or _by_windows(template, messages, variables, cuts)
    length += sum(len(text) for _, text in texts)
    for cut in cuts[max(0, len(texts) - 1) :]:
      if length > sandbox.MAX_CHARACTERS:  # The rest travels by itself.
        break
      texts.append(_rendered_cut(template, messages, variables, cut))
      length += len(texts[-1][1])
    made.append(texts)
  return made


class _Unstable(BaseException):  # Which no test of Jinja's catches.
  """A template reads more of the messages than the next one."""


class _Watched(Sequence):
  """Messages that note when a template first asks for each of them.

  `reached[k]` is how many characters were written before the loop over the
  messages asked for message k. Up to there a rendering of messages[:k] runs the
  same code on the same values, so it has written the same text.
  """

  def __init__(self, items: Any, watch: Any, first: int = 0):
    self._items, self._watch, self._first = items, watch, first

  def __iter__(self) -> Any:
    if self._watch.loops:
      raise _Unstable
    self._watch.loops = 1
    for number, item in enumerate(self._items, self._first):
      self._reach(number)
      yield item
    self._reach(self._first + len(self._items))

  def _reach(self, number: int) -> None:
    reached = self._watch.reached
    while len(reached) <= number:
      reached.append(self._watch.length)

  def __getitem__(self, key: Any) -> Any:
    if isinstance(key, slice):
      if key.step is not None or key.stop is not None or (key.start or 0) < 0:
        raise _Unstable
      start = key.start or 0
      return _Watched(self._items[start:], self._watch, self._first + start)
    # Only what the loop has passed, or the first, which every cut has.
    if not isinstance(key, int) or not (
      0 <= key + self._first < max(1, len(self._watch.reached))
    ):
      raise _Unstable
    return self._items[key]

  def _refuse(self, *_: Any) -> Any:
    raise _Unstable

  __len__ = __contains__ = __reversed__ = __eq__ = index = count = _refuse
  __hash__ = None  # type: ignore

  def __bool__(self) -> bool:
    return bool(self._items)


class _WatchedLoop(jinja2.runtime.LoopContext):
  """The `loop` of a template, which must not look ahead."""

  @property
  def _ahead(self) -> Any:
    raise _Unstable

  last = nextitem = length = revindex = revindex0 = _ahead  # type: ignore


@functools.lru_cache(maxsize=16)
def _has_constant_end(source: str) -> bool:
  """Whether what follows the last loop reads nothing that a loop changes."""
  tree = compile(source).environment.parse(source)
  # What a loop sets outside of itself, it sets in a namespace.
  changed = {"messages"}
  for loop in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
    changed |= {node.name for node in loop.find_all(nodes.NSRef)}
  loops = [i for i, x in enumerate(tree.body) if isinstance(x, nodes.For)]
  end = tree.body[loops[-1] + 1 :] if loops else tree.body
  return bool(loops) and not any(
    list(node.find_all((nodes.Call, nodes.For, nodes.Include)))
    or {x.name for x in node.find_all(nodes.Name)} & changed
    for node in end
  )


def _by_increments(
  source: str, template: Any, messages: Any, variables: Any, cuts: Any
) -> list[tuple[str, Any]]:
  """Cuts of a long conversation from one rendering; [] where that is not sure.

  messages[:k] is rendered as the whole was until its loop asked for message k,
  and then ends as every cut does. The first and last cuts are checked.
  """
  followed = any(len(cut) > 2 for cut in cuts)
  if len(cuts) < 8 or followed or not _has_constant_end(source):
    return []
  made: dict[tuple[int, bool], Any] = {}
  base, whole = "", max(count for count, _ in cuts)
  names = template.root_render_func.__globals__
  for prompt in (True, False):
    watch = types.SimpleNamespace(loops=0, reached=[], length=0)
    watched = _Watched(messages[:whole], watch)
    given = {**variables, "add_generation_prompt": prompt, "messages": watched}
    names["LoopContext"] = _WatchedLoop
    child.limit_time(sandbox.CPU_SECONDS)
    try:
      text = _render(template, given, watch)
    except (TemplateFailed, _Unpinned, _Unstable):
      return []
    finally:
      names["LoopContext"] = jinja2.runtime.LoopContext
    if len(watch.reached) <= whole:
      return []
    body, end = text[: watch.reached[whole]], text[watch.reached[whole] :]
    base = base or body
    if body != base:
      return []
    mine = sorted(count for count, flag in cuts if flag == prompt)
    for count in mine:
      made[count, prompt] = ("cut", (watch.reached[count], end))
    for count in {*mine[:1], *mine[len(mine) // 2 :][:1], *mine[-1:]}:
      cut = ("text", base[: watch.reached[count]] + end)
      if _rendered_cut(template, messages, variables, (count, prompt)) != cut:
        return []
  return [("base", base), *(made[tuple(cut)] for cut in cuts)]


# Before the content of a user's turn; a character that no text may have.
_MARK = "\U0010fffe"
# How many of the user's turns before a cut are rendered with it.
_WINDOW = 4


def _by_windows(
  template: Any, messages: Any, variables: Any, cuts: Any
) -> list[tuple[str, Any]]:
  """Cuts of a long conversation from their last turns; [] where these differ.

      messages  s u a u a u a u a u a u a u a
      base      ---------------------             rendered once, with the rest
      a cut     s u a       u a u a u a u a       and from its second u on, set
                                                  after base up to there

  A template's text for a turn may depend on the turns soon after it, or on
  whether the user speaks again. That it depends on none far away is seen in
  cuts of each kind, first, last and between, which are rendered whole.
  """
  whole = max((cut[0] for cut in cuts), default=0)
  is_text = lambda text: (
    isinstance(text, str) and text.strip() and _MARK not in text
  )
  asked = [
    i
    for i, one in enumerate(messages[:whole])
    if isinstance(one, dict)
    if one.get("role") == "user" and is_text(one["content"])
  ]
  if len(cuts) < 16 or len(asked) < 3 * _WINDOW or asked[1] > 8 * _WINDOW:
    return []
  marked = list(messages[:whole])
  for i in asked[1:]:
    text = messages[i]["content"]
    at = len(text) - len(text.lstrip())
    marked[i] = {**messages[i], "content": text[:at] + _MARK + text[at:]}
  (kind, base), (_, shown) = (
    _rendered_cut(template, some, variables, (whole, False))
    for some in (messages, marked)
  )
  if kind != "text" or shown.replace(_MARK, "") != base:
    return []
  pieces = shown.split(_MARK)
  if len(pieces) != len(asked):
    return []
  ends = itertools.accumulate(map(len, pieces[:-1]))
  starts = dict(zip(asked[1:], ends, strict=True))

  def short(cut: Any) -> tuple[str, Any]:
    first = asked[bisect.bisect_left(asked, cut[0]) - _WINDOW]
    turns = [*messages[: asked[1]], *marked[first : cut[0]]]
    turns[asked[1] + 1 :] = messages[first + 1 : cut[0]]
    cut = (len(turns), *cut[1:])
    kind, text = _rendered_cut(template, turns, variables, cut)
    if kind != "text" or text.count(_MARK) != 1:
      raise _Unstable
    return "cut", (starts[first], text.partition(_MARK)[2])

  far = asked[2 + _WINDOW]  # From here on there is something to leave out.
  kinds: dict[tuple, list[Any]] = {}
  for cut in cuts:
    if cut[0] > far:
      kinds.setdefault((cut[1], len(cut)), []).append(cut)
  sample = []
  for some in kinds.values():
    n = len(some)
    sample += [some[i] for i in {0, n // 4, n // 2, n - 2, n - 1}]
  made: list[tuple[str, Any]] = [("base", base)]
  try:
    for cut in cuts:
      made.append(
        short(cut)
        if cut[0] > far
        else _rendered_cut(template, messages, variables, cut)
      )
      if cut in sample:
        start, end = made[-1][1]
        truth = ("text", base[:start] + end)
        if truth != _rendered_cut(template, messages, variables, cut):
          return []
  except _Unstable:
    return []
  return made


def _rendered_cut(
  template: Any, messages: Any, variables: Any, cut: Any
) -> tuple[str, str]:
  count, prompt, *then = cut
  given = {"add_generation_prompt": prompt}
  given["messages"] = [*messages[:count], *then]
  child.limit_time(sandbox.CPU_SECONDS)
  try:
    return "text", _render(template, variables | given)
  except _Unpinned as error:
    return "date", str(error)
  except TemplateFailed as error:
    return "failed", str(error)


class _Generation(jinja2.ext.Extension):
  """Reads `{% generation %}` blocks as plain text: spans do not need them."""

  tags = {"generation"}  # noqa: RUF012, Jinja's own protocol

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


def tojson(value: Any, ensure_ascii: bool = False, *rest: Any, **how) -> str:
  """JSON as transformers prints it in templates: no HTML escapes."""
  how |= dict(zip(("indent", "separators", "sort_keys"), rest, strict=False))
  return json.dumps(value, ensure_ascii=ensure_ascii, **how)


@functools.lru_cache(maxsize=16)
def compile(source: str) -> jinja2.Template:
  """The compiled template; a fault in it is a ValueError with its line."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = tojson
  del environment.filters["random"], environment.globals["lipsum"]
  environment.globals["raise_exception"] = _raise_exception
  try:
    if len(source) > _MAX_SOURCE:
      raise MemoryError(f"more than {_MAX_SOURCE} characters")
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(
      f"chat template line {error.lineno}: got {error.message}; expected a "
      "Jinja template. Correct chat_template.jinja in the model folder."
    ) from error
  # What Jinja makes of a template, Python may still refuse to compile.
  except (SyntaxError, RecursionError, MemoryError) as error:
    raise ValueError(sandbox.too_nested(str(error))) from error


def _render(
  template: jinja2.Template, variables: dict[str, Any], watch: Any = None
) -> str:
  """The template's text, without limits; `watch` is given its length."""
  date = variables.pop("date", None)
  variables["strftime_now"] = functools.partial(_strftime, date)
  pieces, length = [], 0
  # As template.generate does, which copies the globals through slow layers.
  context = template.new_context({**template.globals} | variables, shared=True)
  try:
    for piece in template.root_render_func(context):
      length += len(piece)
      if watch:
        watch.length = length
      if length > sandbox.MAX_CHARACTERS:
        most = f"{sandbox.MAX_CHARACTERS} characters"
        raise TemplateFailed(f"a text of more than {most}")
      pieces.append(piece)
  except (_Unpinned, TemplateFailed):
    raise
  except MemoryError:
    raise TemplateFailed(
      f"a rendering that exceeds {sandbox.CHILD.limits}"
    ) from None
  # A template is code by others: whatever it raises is its refusal.
  except Exception as error:
    raise TemplateFailed(f"{type(error).__name__}: {error}"[:4000]) from error
  return "".join(pieces)


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
