"""A model's own chat template: its text for messages, and its tokens."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_jax.data.chat import sandbox
from sft_jax.data.tokenizers import files
from sft_jax.data.tokenizers.literal import any_of
from sft_jax.data.tokenizers.tokenizer import Tokenizer

# Names under which templates read the thinking of a turn. `reasoning_content`
# and `thinking` are filled in both, as transformers does.
_READS_REASONING = re.compile(
  r"reasoning_content|[.'\"](?:thinking|reasoning)\b"
)


class ChatTemplate:
  """A model's Jinja chat template and the special tokens it writes.

  Args:
    special_tokens: variables for the template: {'bos_token': '<s>', ...}.
    stop_tokens: texts at which generation stops.
    control_tokens: texts that no message may contain, since the tokenizer
      would read them as structure; stop tokens are always among them.
    name: for errors.

  Raises ValueError: the source is no template; its line.
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
    self.writes_bos = bool(re.search(r"\bbos_token\b", source))
    self.reads_tools = bool(re.search(r"\btools\b", source))
    self.name = name
    sandbox.check(source)

  @functools.cached_property
  def stop(self) -> re.Pattern[str]:
    return any_of(self.stop_tokens)

  @functools.cached_property
  def control(self) -> re.Pattern[str]:
    return any_of({*self.stop_tokens, *self.control_tokens})

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
      messages: see `template_messages.to_template_messages`.
      tools: JSON schemas; none is passed to the template as None.
      **kwargs: more variables; `date` ('2026-01-31') is for strftime_now.

    Raises:
      sandbox.TemplateFailed: the template's refusal, in its own words.
      ValueError: the template asks for today's date and none is pinned.
    """
    cuts = [(len(messages), add_generation_prompt)]
    job = self.job(messages, cuts, tools, kwargs)
    text = sandbox.render(self.source, [job])[0][0]
    if not isinstance(text, str):
      assert text is not None  # One cut by itself.
      raise text
    return text

  def job(
    self,
    messages: Sequence[Mapping[str, Any]],
    cuts: Sequence[tuple[Any, ...]],
    tools: Sequence[Mapping[str, Any]],
    kwargs: Mapping[str, Any],
  ) -> sandbox.Job:
    """Renderings of first turns, for `sandbox.render`."""
    variables = {"tools": list(tools) or None, "documents": None, **kwargs}
    return sandbox.Job(messages, self.special_tokens | variables, cuts)


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
  """The tokenizer's chat template; a ValueError where it has none."""
  if tokenizer.chat_template is None:
    named = list(tokenizer.chat_templates)
    got = f"the chat templates {named}" if named else "no chat template"
    raise ValueError(
      f"{tokenizer.folder}: got {got}; expected one named default, to render "
      "conversations. Add chat_template.jinja to the folder, or train on raw "
      "text."
    )
  return with_tokens(tokenizer, tokenizer.chat_template)


# The templates of templates/*.jinja: their control tokens, the stop token last;
# others stop at the tokenizer's EOS.
TEMPLATES = {
  "chatml": ("<|im_start|>", "<|im_end|>"),
  "gemma": ("<start_of_turn>", "<end_of_turn>"),
  "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
  "mistral": (),
  "plain": (),
}


def choose(tokenizer: Tokenizer, template: str, name: str) -> Tokenizer:
  """The tokenizer with the chat template that a config asks for.

  `template` is model.chat_template: '' is the folder's; one of `TEMPLATES`, or
  the path of a file. The control tokens of a named one are made special, and
  added to a vocabulary that lacks them: the model grows. `name` is
  model.chat_template_name, of a folder with several.

  Raises ValueError: no such template; one that needs an EOS, and there is none.
  """
  if not template:
    if name not in tokenizer.chat_templates:
      if name == "default":  # `chat_template` refuses, where one is needed.
        return tokenizer
      raise ValueError(
        f"model.chat_template_name: got {name!r}, expected one of "
        f"{sorted(tokenizer.chat_templates)}, which {tokenizer.folder} has."
      )
    source = tokenizer.chat_templates[name]
  elif template in TEMPLATES:
    path = Path(__file__).parent / "templates" / f"{template}.jinja"
    source = path.read_text(encoding="utf-8")
    tokens = TEMPLATES[template]
    if tokens:
      tokenizer, _ = tokenizer.with_new_tokens(tokens, stop=tokens[-1:])
    elif tokenizer.eos_id is None:
      raise ValueError(
        f"model.chat_template: got {template!r}, which ends turns with the EOS "
        f"that {tokenizer.folder} does not have; expected one with tokens of "
        "its own. Choose another, such as chatml."
      )
  elif (path := Path(template).expanduser()).is_file():
    source = files.read_text(path)
  else:
    raise ValueError(
      f"model.chat_template: got {template!r}, expected '', one of "
      f"{', '.join(TEMPLATES)}, or the path of a .jinja file. Correct it."
    )
  if source == tokenizer.chat_template:
    return tokenizer
  return tokenizer.with_chat_template(source)


@functools.lru_cache(maxsize=8)
def with_tokens(tokenizer: Tokenizer, source: str) -> ChatTemplate:
  """A template with the tokens of a tokenizer, whether or not it is its own:
  all special ones but the one for unknown text are control tokens."""
  unknown = tokenizer.named_tokens.get("unk_token")
  special, stop_ids = tokenizer.special_tokens, tokenizer.stop_ids
  return ChatTemplate(
    source,
    tokenizer.named_tokens,
    stop_tokens=[text for text in special if special[text] in stop_ids],
    control_tokens=[text for text in special if text != unknown],
    name=f"the chat template of {tokenizer.folder}",
  )
