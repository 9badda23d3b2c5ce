"""A model's own chat template: its text for messages, and its tokens."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft_jax.data.chat import sandbox
from sft_jax.data.tokenizers.tokenizer import Tokenizer

# Names under which templates read the thinking of a turn. `reasoning_content`
# and `thinking` are filled in both, as transformers does.
_READS_REASONING = re.compile(
  r"reasoning_content|[.'\"](?:thinking|reasoning)\b"
)


class ChatTemplate:
  """A model's Jinja chat template and the special tokens it writes.

  Args:
    source: the Jinja text.
    special_tokens: variables that the template may read, such as
      {'bos_token': '<s>', 'eos_token': '</s>'}.
    stop_tokens: texts at which generation stops.
    control_tokens: texts that no message may contain, since the tokenizer
      would read them as structure; stop tokens are always among them.
    name: for errors.

  Raises:
    ValueError: the source is no template; its line.
  """

  def __init__(
    self,
    source: str,
    special_tokens: Mapping[str, str] | None = None,
    *,
    stop_tokens: Sequence[str] = (),
    control_tokens: Sequence[str] = (),
    name: str = "the chat template",
  ):
    self.source = source
    self.special_tokens = dict(special_tokens or {})
    self.stop_tokens = tuple(stop_tokens)
    self.control_tokens = tuple(control_tokens)
    self.reads_reasoning = bool(_READS_REASONING.search(source))
    self.reads_tools = bool(re.search(r"\btools\b", source))
    self.name = name
    sandbox.check(source)

  @functools.cached_property
  def stop(self) -> re.Pattern[str]:
    """Matches a stop token."""
    return _any_of(self.stop_tokens)

  @functools.cached_property
  def control(self) -> re.Pattern[str]:
    """Matches a control token, stop tokens among them."""
    return _any_of({*self.stop_tokens, *self.control_tokens})

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
    **kwargs: Any,
  ) -> str:
    """The text of `messages`, as transformers'.

    Args:
      messages: plain dicts; see `template_messages.to_template_messages`.
      tools: JSON schemas; none is passed to the template as None.
      add_generation_prompt: end with what opens an assistant turn.
      **kwargs: more variables, such as enable_thinking. `date`
        ('2026-01-31') is what strftime_now reads.

    Raises:
      sandbox.TemplateFailed: the template's refusal, in its own words.
      ValueError: the template asks for today's date and none is pinned.
    """
    job = self.job(
      messages, [(len(messages), add_generation_prompt)], tools, kwargs
    )
    text = sandbox.render(self.source, [job])[0][0]
    if not isinstance(text, str):
      assert text is not None  # One cut by itself.
      raise text
    return text

  def job(
    self,
    messages: Sequence[Mapping[str, Any]],
    cuts: Sequence[tuple[int, bool]],
    tools: Sequence[Mapping[str, Any]],
    kwargs: Mapping[str, Any],
  ) -> sandbox.Job:
    """Renderings of first turns, for `sandbox.render`."""
    variables = {
      **self.special_tokens,
      "tools": list(tools) or None,
      "documents": None,
      **kwargs,
    }
    return sandbox.Job(messages, variables, cuts)


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
  """The tokenizer's chat template, ready to render.

  Raises:
    ValueError: the tokenizer has none.
  """
  if tokenizer.chat_template is None:
    named = list(tokenizer.chat_templates)
    got = f"the chat templates {named}" if named else "no chat template"
    raise ValueError(
      f"{tokenizer.folder}: got {got}; expected one named default, to render "
      "conversations. Add chat_template.jinja to the folder, or train on raw "
      "text."
    )
  return with_tokens(tokenizer, tokenizer.chat_template)


@functools.lru_cache(maxsize=8)
def with_tokens(tokenizer: Tokenizer, source: str) -> ChatTemplate:
  """A template with the tokens of a tokenizer, whether or not it is its own.

  Every special token is a control token, except the one for unknown text,
  which is no structure.
  """
  unknown = tokenizer.named_tokens.get("unk_token")
  return ChatTemplate(
    source,
    tokenizer.named_tokens,
    stop_tokens=[
      text
      for text, number in tokenizer.special_tokens.items()
      if number in tokenizer.stop_ids
    ],
    control_tokens=[
      text for text in tokenizer.special_tokens if text != unknown
    ],
    name=f"the chat template of {tokenizer.folder}",
  )


def _any_of(texts: Any) -> re.Pattern[str]:
  """Matches any of the texts, the longest first; of none, nothing."""
  longest_first = sorted(texts, key=len, reverse=True)
  return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
