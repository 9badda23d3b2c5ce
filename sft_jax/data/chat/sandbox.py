"""Renders chat templates in a child process with limits of time and memory.

Templates come with models of strangers. Jinja's immutable sandbox, configured
as transformers configures its own, stops code that reaches out. It stops
neither a template that never ends nor one that fills the memory: to sort or
compare long texts is one call in C, which nothing in Python interrupts. So a
process renders in a child of its own, which the operating system ends
(`tokenizers.child`), and what it died of is refused. Many renderings travel
together, so that a pipe costs nearly nothing.
"""

import bisect
import datetime
import functools
import itertools
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
from jinja2 import nodes

from sft_jax.data.tokenizers import child

CPU_SECONDS = 1.0  # Of one rendering; a thousand turns take 0.02.
MEMORY = 400 << 20  # Bytes of address space of the child.
MAX_CHARACTERS = 1 << 24  # Of one text, and of all that travel together.
_MAX_SOURCE = 1 << 20
# So often in a row may a template exceed a limit, until it is given up.
_STRIKES = 3


class TemplateFailed(ValueError):
  """A template refused, or failed on, what it was given; in its own words."""


class Job(NamedTuple):
  """Renderings of the first turns of one conversation.

  Attributes:
    messages: template messages (dicts).
    variables: of the template, but for `messages` and `add_generation_prompt`.
    cuts: (count, prompt): render messages[:count], with the generation prompt
      or without it; or (count, prompt, message), which comes after them.
  """

  messages: Sequence[Mapping[str, Any]]
  variables: Mapping[str, Any]
  cuts: Sequence[tuple[Any, ...]]


def render(
  source: str, jobs: Sequence[Job]
) -> list[list[str | Exception | None]]:
  """The text of each cut of each job, or the exception that it raises.

  Exceptions are TemplateFailed (the template's own refusal, or a limit that
  it exceeds), or a ValueError where a template asks for today's date and
  variables have no `date` ('2026-01-31'). None: one of several cuts exceeds a
  limit, and each is to be asked for by itself.

  Raises:
    ValueError: the template does not compile, or has exceeded its limits
      again and again.
  """
  made: list[list[Any]] = [[None] * len(job.cuts) for job in jobs]
  left = [list(range(len(job.cuts))) for job in jobs]
  while some := [(i, cuts) for i, cuts in enumerate(left) if cuts]:
    if _strikes.get(source, 0) >= _STRIKES:
      raise ValueError(
        f"chat template {source[:40]!r}...: got {_STRIKES} renderings that "
        f"exceeded {CHILD.limits}; expected one that ends. Use another "
        "template."
      )
    asked = [
      (*jobs[i][:2], [jobs[i].cuts[number] for number in cuts])
      for i, cuts in some
    ]
    reply: Any = CHILD.ask((source, asked))
    if isinstance(reply, str):
      raise ValueError(reply)
    if reply is None:
      _strikes[source] = _strikes.get(source, 0) + 1
      if len(some) > 1 or len(some[0][1]) > 1:
        return made
      reply = [[("failed", f"a rendering that exceeds {CHILD.limits}")]]
    else:
      _strikes.pop(source, None)
    for (i, cuts), texts in zip(some, reply, strict=True):
      base = ""
      if texts and texts[0][0] == "base":
        base = texts.pop(0)[1]
      for number, (kind, text) in zip(cuts, texts, strict=False):
        if kind == "cut":
          made[i][number] = base[: text[0]] + text[1]
        else:
          made[i][number] = text if kind == "text" else _KINDS[kind](text)
      left[i] = cuts[len(texts) :]
  return made


def check(source: str) -> None:
  """Raises a ValueError, with its line, where a template does not compile."""
  reply = CHILD.ask((source, []))
  if reply is None:
    reply = (
      f"chat template: got a source that exceeds {CHILD.limits}; expected less "
      "nesting. Correct chat_template.jinja in the model folder."
    )
  if isinstance(reply, str):
    raise ValueError(reply)


_KINDS = {"failed": TemplateFailed, "date": ValueError}
_strikes: dict[str, int] = {}
CHILD = child.Child(__name__, CPU_SECONDS, MEMORY)


def serve() -> None:
  """The child: renders until its streams end."""
  child.serve(lambda request: _reply(*request), MEMORY)


def _reply(source: str, jobs: list[tuple]) -> Any:
  """(kind, text) by job and cut, as many as fit; else what is wrong with it."""
  child.limit_time(CPU_SECONDS)
  try:
    template = compile(source)
  except ValueError as error:
    return str(error)
  made, length = [], 0
  for messages, variables, cuts in jobs:
    made.append(
      _by_increments(source, template, messages, variables, cuts)
      or _by_windows(template, messages, variables, cuts)
    )
    length += sum(len(text) for _, text in made[-1])
    for cut in cuts[max(0, len(made[-1]) - 1) :]:
      if length > MAX_CHARACTERS:  # The rest travels by itself.
        break
      made[-1].append(_rendered_cut(template, messages, variables, cut))
      length += len(made[-1][-1][1])
  return made


class _Unstable(BaseException):  # Which no test of Jinja's catches.
  """A template reads more of the messages than the next one."""


class _Watched(Sequence):
  """Messages that note when a template first asks for each of them.

  `reached[k]` is the number of characters written before anything was asked
  that k messages alone would answer in another way: before the loop over the
  messages asks for message k. Up to there a rendering of messages[:k] runs
  the same code on the same values, so it has written the same text.
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
  and then ends as every cut does. The first and last cuts are compared with
  renderings of their own.
  """
  if (
    len(cuts) < 8
    or any(len(cut) > 2 for cut in cuts)
    or not _has_constant_end(source)
  ):
    return []
  made: dict[tuple[int, bool], Any] = {}
  base, whole = "", max(count for count, _ in cuts)
  names = template.root_render_func.__globals__
  for prompt in (True, False):
    watch = types.SimpleNamespace(loops=0, reached=[], length=0)
    watched = _Watched(messages[:whole], watch)
    given = {**variables, "add_generation_prompt": prompt, "messages": watched}
    names["LoopContext"] = _WatchedLoop
    child.limit_time(CPU_SECONDS)
    try:
      text = render_here(template, given, watch)
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
      cut = base[: watch.reached[count]] + end
      child.limit_time(CPU_SECONDS)
      shown = _rendered(template, messages[:count], variables, prompt)
      if shown != ("text", cut):
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

  What a template makes of a turn may depend on the turns that follow it soon,
  or on whether the user speaks again. That it depends on no turns far away is
  seen in cuts of each kind, first, last and between, which are rendered whole.
  """
  whole = max((cut[0] for cut in cuts), default=0)
  asked = [
    i
    for i, one in enumerate(messages[:whole])
    if isinstance(one, dict)
    and one.get("role") == "user"
    and isinstance(one["content"], str)
    and one["content"].strip()
    and _MARK not in one["content"]
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
    kind, text = _rendered_cut(
      template, turns, variables, (len(turns), *cut[1:])
    )
    if kind != "text" or text.count(_MARK) != 1:
      raise _Unstable
    return "cut", (starts[first], text.partition(_MARK)[2])

  far = asked[2 + _WINDOW]  # From here on there is something to leave out.
  kinds: dict[tuple, list[Any]] = {}
  for cut in cuts:
    if cut[0] > far:
      kinds.setdefault((cut[1], len(cut)), []).append(cut)
  sample = [
    some[i]
    for some in kinds.values()
    for i in {0, len(some) // 4, len(some) // 2, len(some) - 2, len(some) - 1}
  ]
  made: list[tuple[str, Any]] = [("base", base)]
  try:
    for cut in cuts:
      if cut[0] > far:
        made.append(short(cut))
        if cut not in sample:
          continue
        start, end = made[-1][1]
        truth = ("text", base[:start] + end)
        if truth != _rendered_cut(template, messages, variables, cut):
          return []
      else:
        made.append(_rendered_cut(template, messages, variables, cut))
  except _Unstable:
    return []
  return made


def _rendered_cut(
  template: Any, messages: Any, variables: Any, cut: Any
) -> tuple[str, str]:
  count, prompt, *then = cut
  child.limit_time(CPU_SECONDS)
  return _rendered(template, [*messages[:count], *then], variables, prompt)


def _rendered(
  template: jinja2.Template, messages: Any, variables: Any, prompt: bool
) -> tuple[str, str]:
  variables = {**variables, "add_generation_prompt": prompt}
  try:
    return "text", render_here(template, {**variables, "messages": messages})
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
    raise ValueError(
      f"chat template: got {error}; expected less nesting. Correct "
      "chat_template.jinja in the model folder."
    ) from error


def render_here(
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
      if length > MAX_CHARACTERS:
        raise TemplateFailed(f"a text of more than {MAX_CHARACTERS} characters")
      pieces.append(piece)
  except (_Unpinned, TemplateFailed):
    raise
  except MemoryError:
    raise TemplateFailed(f"a rendering that exceeds {CHILD.limits}") from None
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
