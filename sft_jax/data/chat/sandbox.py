"""Renders chat templates in a child process with limits of time and memory.

Templates come with models of strangers. Jinja's immutable sandbox, configured
as transformers configures it, stops code that reaches out, but neither a
template that never ends nor one that fills the memory: to sort long texts is
one call in C, which nothing in Python interrupts. So a child (`sandbox_child`)
renders, which the operating system ends (`tokenizers.child`), and what it died
of is refused. Many renderings travel together, so a pipe costs nearly nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sft_jax.data.tokenizers import child

CPU_SECONDS = 1.0  # Of one rendering; a thousand turns take 0.02.
MEMORY = 400 << 20  # Bytes of address space of the child.
MAX_CHARACTERS = 1 << 24  # Of one text, and of all that travel together.
# So often in a row may a template exceed a limit, until it is given up.
_STRIKES = 3


class TemplateFailed(ValueError):
  """A template refused, or failed on, what it was given; in its own words."""


class Job(NamedTuple):
  """Renderings of the first turns of one conversation."""

  messages: Sequence[Mapping[str, Any]]  # Template messages (dicts).
  # Of the template, but for `messages` and `add_generation_prompt`.
  variables: Mapping[str, Any]
  # (count, prompt): render messages[:count], with the generation prompt or
  # without it; or (count, prompt, message), which comes after them.
  cuts: Sequence[tuple[Any, ...]]


def render(
  source: str, jobs: Sequence[Job]
) -> list[list[str | Exception | None]]:
  """The text of each cut of each job, or the exception that it raises.

  Exceptions are TemplateFailed (the template's own refusal, or an exceeded
  limit), or a ValueError where a template asks for today's date and variables
  have no `date` ('2026-01-31'). None: one of several cuts exceeds a limit, and
  each is to be asked for by itself.

  Raises ValueError: the template does not compile, or exceeds its limits often.
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
      (*jobs[i][:2], [jobs[i].cuts[k] for k in cuts]) for i, cuts in some
    ]
    reply: Any = CHILD.ask((source, asked))
    if isinstance(reply, str):
      raise ValueError(reply)
    if reply is not None:
      _strikes.pop(source, None)
    else:
      _strikes[source] = _strikes.get(source, 0) + 1
      if len(some) > 1 or len(some[0][1]) > 1:
        return made
      reply = [[("failed", f"a rendering that exceeds {CHILD.limits}")]]
    for (i, cuts), texts in zip(some, reply, strict=True):
      base = texts.pop(0)[1] if texts and texts[0][0] == "base" else ""
      for number, (kind, text) in zip(cuts, texts, strict=False):
        if kind == "cut":
          text = base[: text[0]] + text[1]
        made[i][number] = _KINDS[kind](text)
      left[i] = cuts[len(texts) :]
  return made


def check(source: str) -> None:
  """Raises a ValueError, with its line, where a template does not compile."""
  reply = CHILD.ask((source, []))
  if not isinstance(reply, list):
    raise ValueError(reply or too_nested(f"a source beyond {CHILD.limits}"))


def too_nested(got: str) -> str:
  """Why a template does not compile."""
  return (
    f"chat template: got {got}; expected less nesting. Correct "
    "chat_template.jinja in the model folder."
  )


_KINDS = {"text": str, "cut": str, "failed": TemplateFailed, "date": ValueError}
_strikes: dict[str, int] = {}
CHILD = child.Child(f"{__name__}_child", CPU_SECONDS, MEMORY)
