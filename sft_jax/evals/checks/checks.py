"""Checks: what a reply must satisfy, as functions of the reply alone.

A check is a function of a reply and named arguments, annotated, that raises
ValueError for an argument it cannot use; `register_check` adds one.
An argument with a default may be left out of a row.
"""

import inspect
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from sft_jax.data.conversation import Message
from sft_jax.evals.checks import ifeval, refusals
from sft_jax.evals.checks import json_schema as json_values
from sft_jax.evals.checks import tool_calls as calls
from sft_jax.inference.generate import Reply

# Says nothing: to try a check's arguments on.
BLANK = Reply("", [], False, Message("assistant", ""))

Check = Callable[..., bool]


def exact(reply: Reply, text: str) -> bool:
  """The reply is `text`, but for white space around it."""
  return reply.text.strip() == text.strip()


def normalised(reply: Reply, text: str) -> bool:
  """Equal but for case, ASCII punctuation and spacing: 'A  cat.' is 'a cat'."""
  plain = lambda text: text.casefold().translate(_NO_PUNCTUATION).split()
  return plain(reply.text) == plain(text)


def contains(reply: Reply, text: str) -> bool:
  """`text` stands in the reply as whole words, in any case: 7 is not in 17."""
  whole = rf"(?<!\w){re.escape(text)}(?!\w)"
  return re.search(whole, reply.text, re.IGNORECASE) is not None


def not_contains(reply: Reply, text: str) -> bool:
  """`text` does not stand in the reply as whole words."""
  return not contains(reply, text)


def regex(reply: Reply, pattern: str) -> bool:
  """The pattern is found somewhere in the reply."""
  try:
    return re.search(pattern, reply.text) is not None
  except re.error as error:
    raise ValueError(
      f"pattern: got {pattern!r}; expected a regular expression ({error}). "
      "Correct the pattern."
    ) from error


def contains_any(reply: Reply, texts: list) -> bool:
  """At least one of the texts stands in the reply, as `contains` has it."""
  return any(contains(reply, text) for text in texts)


def contains_all(reply: Reply, texts: list) -> bool:
  """Every one of the texts stands in the reply."""
  return all(contains(reply, text) for text in texts)


def contains_none(reply: Reply, texts: list) -> bool:
  """None of the texts stands in the reply: words that a tone forbids, say."""
  return not contains_any(reply, texts)


def number(reply: Reply, value: int | float) -> bool:
  """The last number of the reply equals `value`: '7 + 5 = 1,012' says 1012."""
  found = _NUMBER.findall(reply.text)
  return bool(found) and float(found[-1].replace(",", "")) == value


def gsm8k(reply: Reply, answer: str, strict: bool = True) -> bool:
  """The final number is that of `answer`, a solution that ends '#### 18'.

  Strict reads what follows the reply's first '####', flexible its last number,
  as lm-evaluation-harness does; without commas, dollars and a last dot both are
  compared as text. Their difference is format learned without arithmetic.
  """
  wanted = _GSM8K_STRICT.findall(answer)
  if not wanted:
    raise ValueError(
      f"answer: got {answer!r}; expected it to end in '#### number'. Give "
      "the worked solution, or '#### ' and the number."
    )
  if strict:
    found = _GSM8K_STRICT.findall(reply.text)[:1]
  else:
    found = ["".join(one) for one in _GSM8K_NUMBER.findall(reply.text)][-1:]
  return bool(found) and _bare(found[0]) == _bare(wanted[-1])


def json_schema(reply: Reply, schema: dict) -> bool:
  """The whole reply is one JSON value that satisfies the schema (2020-12)."""
  json_values.check_schema(schema, "schema")
  found, value = json_values.parse(reply.text)
  return found and json_values.satisfies(value, schema)


def json_equals(reply: Reply, value: Any) -> bool:
  """The whole reply is JSON equal to `value`; the order of keys is free."""
  found, got = json_values.parse(reply.text)
  return found and json_values.equal(got, value)


def tool_call(reply: Reply, name: str, arguments: dict) -> bool:
  """The reply makes exactly one tool call: this one."""
  made = [(call.name, call.arguments) for call in reply.message.tool_calls]
  names = [name for name, _ in made]
  return names == [name] and json_values.equal(made[0][1], arguments)


def tool_calls(reply: Reply, functions: list, answers: list) -> bool:
  """The reply makes the accepted calls and no other; see `calls.match`."""
  calls.check_arguments(functions, answers)
  return calls.match(reply.message.tool_calls, functions, answers)


def refusal(reply: Reply) -> bool:
  """The reply opens as refusals do: the string rule of XSTest's authors."""
  return refusals.opens(reply.text)


def not_refusal(reply: Reply) -> bool:
  """The reply says something and does not open as a refusal."""
  return bool(reply.text.strip()) and not refusal(reply)


def partial_refusal(reply: Reply) -> bool:
  """The reply goes along at first, and a later sentence opens as a refusal."""
  return refusals.partial(reply.text)


def complies(reply: Reply) -> bool:
  """The reply says something, and refuses neither wholly nor in part."""
  return not_refusal(reply) and not partial_refusal(reply)


def starts_with(reply: Reply, text: str) -> bool:
  return reply.text.strip().startswith(text)


def ends_with(reply: Reply, text: str) -> bool:
  return reply.text.strip().endswith(text)


def max_words(reply: Reply, count: int) -> bool:
  """At most `count` words between spaces."""
  return len(reply.text.split()) <= count


def min_words(reply: Reply, count: int) -> bool:
  """At least `count` words between spaces."""
  return len(reply.text.split()) >= count


def has_reasoning(reply: Reply) -> bool:
  """The reply thought before it answered."""
  return bool((reply.message.reasoning or "").strip())


def _instruction(name: str) -> Check:
  """An instruction of IFEval as a check, with `loose` as a further argument."""
  signature = inspect.signature(ifeval.INSTRUCTIONS[name])

  def check(reply: Reply, loose: bool = False, **arguments: Any) -> bool:
    follows = ifeval.follows_loosely if loose else ifeval.follows
    return follows(reply.text, name, **arguments)

  loosely = inspect.signature(check).parameters["loose"]
  parameters = [*signature.parameters.values(), loosely]
  vars(check)["__signature__"] = signature.replace(parameters=parameters)
  return check


_OURS: tuple[Check, ...] = (
  *(exact, normalised, contains, not_contains, contains_any, contains_all),
  *(contains_none, regex, number, gsm8k, json_schema, json_equals, tool_call),
  *(tool_calls, refusal, not_refusal, partial_refusal, complies, starts_with),
  *(ends_with, max_words, min_words, has_reasoning),
)
CHECKS: dict[str, Check] = {
  **{check.__name__: check for check in _OURS},
  **{name: _instruction(name) for name in ifeval.INSTRUCTIONS},
}

# Checks of the form alone: what a model may learn to imitate without being any
# the wiser. The others ask whether what is said is right.
FORMAT = {
  *("regex", "json_schema", "starts_with", "ends_with", "max_words"),
  *("min_words", "has_reasoning"),
  *ifeval.INSTRUCTIONS,
}

KINDS = ("format", "content")


def register_check(name: str, check: Check, *, kind: str = "content") -> None:
  """Adds a check (reply, named annotated arguments) -> whether it passes.

  It raises ValueError for an argument it cannot use, also of an empty reply.
  `kind`: 'format' or 'content', see there.

  Raises ValueError: the name is taken, or the kind is none.
  """
  if name in CHECKS or kind not in KINDS:
    raise ValueError(
      f"register_check: got {name!r} of kind {kind!r}, expected a name that is "
      f"free and a kind of {KINDS}. Choose another."
    )
  CHECKS[name] = check
  if kind == "format":
    FORMAT.add(name)


def kind(check: Mapping[str, Any]) -> str:
  """'format' or 'content'; a row may say otherwise, as `"kind": "format"`."""
  ours = "format" if check["check"] in FORMAT else "content"
  return check.get("kind", ours)


def passes(reply: Reply, check: Mapping[str, Any]) -> bool:
  """Whether a reply satisfies `{"check": name, ...arguments}`."""
  arguments = {key: x for key, x in check.items() if key != "kind"}
  return CHECKS[arguments.pop("check")](reply, **arguments)


def validate(check: Any, where: str) -> None:
  """Raises a ValueError that names `where` if a check cannot be run: found, as
  without a reply, are unknown names, and arguments that it cannot use."""
  if not isinstance(check, dict) or check.get("check") not in CHECKS:
    raise ValueError(
      f"{where}: got {check!r}; expected {{'check': name, ...}} with a name "
      f"of {', '.join(CHECKS)}. Correct the name, or add it to CHECKS."
    )
  if check.get("kind", KINDS[0]) not in KINDS:
    raise ValueError(
      f"{where}: got kind {check['kind']!r}; expected one of {KINDS}. "
      "Correct it, or leave it out."
    )
  arguments = {key: x for key, x in check.items() if key != "kind"}
  name = arguments.pop("check")
  wanted = [*inspect.signature(CHECKS[name]).parameters.values()][1:]
  takes = ", ".join(str(p) for p in wanted) or "no arguments"
  needed = {p.name for p in wanted if p.default is p.empty}
  types = {p.name: p.annotation for p in wanted}
  of_type = lambda x, wanted: (
    wanted is Any
    or (isinstance(x, wanted) and isinstance(x, bool) == (wanted is bool))
  )
  fits = needed <= arguments.keys() <= types.keys() and all(
    of_type(x, types[key]) for key, x in arguments.items()
  )
  if not fits:
    raise ValueError(
      f"{where}: got {name} with {arguments}; expected {takes}. "
      "Correct the arguments."
    )
  try:
    CHECKS[name](BLANK, **arguments)
  except ValueError as error:
    raise ValueError(f"{where}: {name}: {error}") from error


_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_GSM8K_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_GSM8K_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _bare(number: str) -> str:
  """'$1,018.' is '1018'."""
  return re.sub(r"[,$]", "", number).removesuffix(".").lower()
