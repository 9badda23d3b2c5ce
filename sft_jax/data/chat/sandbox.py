"""Renders chat templates in a child process with limits of time and memory.

Templates come with models of strangers. Jinja's immutable sandbox, configured
as transformers configures its own, stops code that reaches out. It stops
neither a template that never ends nor one that fills the memory: to sort or
compare long texts is one call in C, which nothing in Python interrupts. So a
process renders in a child of its own, which the operating system ends:

    parent                          child
    render(source, jobs)  --pipe->  compile, render   CPU time: SIGPROF
    texts or failures     <-pipe--                    memory: RLIMIT_AS

The parent only waits. A child that dies is replaced, and what it rendered is
refused. Many renderings travel together, so that a pipe costs nearly nothing.
The child is a limit, not a wall: Jinja's sandbox alone keeps code out.
"""

import atexit
import contextlib
import datetime
import functools
import json
import marshal
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
from jinja2 import nodes

CPU_SECONDS = 1.0  # Of one rendering; a thousand turns take 0.02.
MEMORY = 400 << 20  # Bytes of address space of the child.
MAX_CHARACTERS = 1 << 24  # Of one text, and of all that travel together.
_MAX_SOURCE = 1 << 20
# So often in a row may a template exceed a limit, until it is given up.
_STRIKES = 3
_HEADER = struct.Struct("<q")
_WALL_SECONDS = 10.0  # Where a platform cannot limit CPU time.


class TemplateFailed(ValueError):
  """A template refused, or failed on, what it was given; in its own words."""


class Job(NamedTuple):
  """Renderings of the first turns of one conversation.

  Attributes:
    messages: template messages (dicts).
    variables: of the template, but for `messages` and `add_generation_prompt`.
    cuts: (count, prompt): render messages[:count], with the generation prompt
      or without it.
  """

  messages: Sequence[Mapping[str, Any]]
  variables: Mapping[str, Any]
  cuts: Sequence[tuple[int, bool]]


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
        f"exceeded {_limits()}; expected one that ends. Use another template."
      )
    asked = [
      (*jobs[i][:2], [jobs[i].cuts[number] for number in cuts])
      for i, cuts in some
    ]
    reply: Any = _ask((source, asked))
    if isinstance(reply, str):
      raise ValueError(reply)
    if reply is None:
      _strikes[source] = _strikes.get(source, 0) + 1
      if len(some) > 1 or len(some[0][1]) > 1:
        return made
      reply = [[("failed", f"a rendering that exceeds {_limits()}")]]
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
  reply = _ask((source, []))
  if reply is None:
    reply = f"chat template: got a source that exceeds {_limits()}; expected "
    reply += "less nesting. Correct chat_template.jinja in the model folder."
  if isinstance(reply, str):
    raise ValueError(reply)


def _limits() -> str:
  return f"{CPU_SECONDS:g} s or {MEMORY >> 20} MiB"


_KINDS = {"failed": TemplateFailed, "date": ValueError}
_strikes: dict[str, int] = {}
_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None
_owner = 0


def _ask(request: Any) -> Any:
  """The child's reply; None where it has died of the request."""
  global _child, _owner
  data = pickle.dumps(request, protocol=5)
  with _lock:
    if _child is None or _owner != os.getpid() or _child.poll() is not None:
      _child, _owner = _start(), os.getpid()
    child: Any = _child
    timer = None
    if not hasattr(signal, "setitimer"):
      timer = threading.Timer(_WALL_SECONDS, child.kill)
      timer.start()
    try:
      child.stdin.write(_HEADER.pack(len(data)) + data)
      child.stdin.flush()
      header = child.stdout.read(_HEADER.size)
      reply = header and child.stdout.read(*_HEADER.unpack(header))
    except (BrokenPipeError, struct.error):
      reply = b""
    except BaseException:  # An interrupt: the reply must not meet a question.
      child.kill()
      raise
    finally:
      if timer is not None:
        timer.cancel()
    if not reply:
      _stop()
      _child = None
      return None
  return marshal.loads(reply)


def _start() -> subprocess.Popen[bytes]:
  code = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    f"from {__name__} import serve; serve()"
  )
  return subprocess.Popen(
    [sys.executable, "-I", "-c", code, *filter(None, sys.path), os.getcwd()],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )


@atexit.register
def _stop() -> None:
  if _child is not None and _owner == os.getpid():
    _child.kill()
    with contextlib.suppress(BrokenPipeError):  # What was not yet written.
      _child.communicate()


def serve() -> None:
  """The child: answers requests on its standard streams until they end."""
  for name in ("SIGINT", "SIGTERM"):  # The parent decides when it ends.
    signal.signal(getattr(signal, name), signal.SIG_IGN)
  with contextlib.suppress(ImportError, ValueError, OSError):
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
  while header := stdin.read(_HEADER.size):
    source, jobs = pickle.loads(stdin.read(*_HEADER.unpack(header)))
    reply = marshal.dumps(_reply(source, jobs))
    stdout.write(_HEADER.pack(len(reply)) + reply)
    stdout.flush()


def _reply(source: str, jobs: list[tuple]) -> Any:
  """(kind, text) by job and cut, as many as fit; else what is wrong with it."""
  _limit_time()
  try:
    template = compile(source)
  except ValueError as error:
    return str(error)
  made, length = [], 0
  for messages, variables, cuts in jobs:
    made.append(_by_increments(source, template, messages, variables, cuts))
    length += sum(len(text) for _, text in made[-1])
    for count, prompt in cuts[len(made[-1]) :]:
      if length > MAX_CHARACTERS:  # The rest travels by itself.
        break
      _limit_time()
      made[-1].append(_rendered(template, messages[:count], variables, prompt))
      length += len(made[-1][-1][1])
  return made


def _limit_time() -> None:
  if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)


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
  names = tree.find_all(nodes.Name)
  changed = {node.name for node in names if node.ctx == "store"} | {"messages"}
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
  if len(cuts) < 8 or not _has_constant_end(source):
    return []
  made: dict[tuple[int, bool], Any] = {}
  base, whole = "", max(count for count, _ in cuts)
  names = template.root_render_func.__globals__
  for prompt in (True, False):
    watch = types.SimpleNamespace(loops=0, reached=[], length=0)
    watched = _Watched(messages[:whole], watch)
    given = {**variables, "add_generation_prompt": prompt, "messages": watched}
    names["LoopContext"] = _WatchedLoop
    _limit_time()
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
      _limit_time()
      shown = _rendered(template, messages[:count], variables, prompt)
      if shown != ("text", cut):
        return []
  return [("base", base), *(made[tuple(cut)] for cut in cuts)]


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
    raise TemplateFailed(f"a rendering that exceeds {_limits()}") from None
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
