"""Answers that look wrong by themselves: none at all, refused, cut off.

Rules of thumb on plain text, for warnings with examples, not for findings.
"""

import re

# What stands for an answer where there is none.
_PLACEHOLDER = re.compile(
  r"\W*(?:nooutput|no (?:output|answer|response)|n/?a|none|null|nan|undefined"
  r"|todo|tbd|empty)?\W*",
  re.IGNORECASE,
)
_REFUSAL = re.compile(
  r"\b(?:(?:i['\u2019]?m|i am) (?:really |very |so )?sorry,?(?: but)? "
  r"(?:i|as an?)\b"
  r"|(?:i|we) (?:can(?:no|['\u2019])?t|could ?n[o'\u2019]t|won['\u2019]?t"
  r"|am not able to|am unable to|['\u2019]m unable to|['\u2019]m not able to)"
  r" (?:help(?! but)|assist|provide|answer|comply|fulfil|do that|complete"
  r"|create|generate|write|give|support|engage|access|browse|share)"
  r"|as an ai(?: language)?(?: model| assistant)?\b"
  r"|(?:i|we) (?:must|have to) (?:decline|refuse)"
  r"|against my (?:guidelines|programming))",
  re.IGNORECASE,
)
_LOOKED_AT = 300  # first characters, where a refusal stands
_PROSE = re.compile(r"[.!?][\"')\u201d]* +[A-Z\u00c0-\u00de]")
_ENDS = frozenset(".!?:;\"'`)]}>\u2019\u201d\u2026\u3002\uff01\uff1f")
_CODE = re.compile(r"[;{}]\s*$|^\s*(?:#include|import |def |class |<\w+)", re.M)
_LOOSE = re.compile(
  r"^\s*(?:[-*\u2022]|\d+[.)])|#\w|\b(?:yours|sincerely|regards)|\bhttps?:",
  re.IGNORECASE,
)
_DANGLING = re.compile(
  r"[,;(\[\u2013]$|\b(?:and|or|but|the|an|of|to|with|for|because|which|that"
  r"|is|are|was|were|in|on|by|from|as)$",
  re.IGNORECASE,
)


def is_empty(answer: str) -> bool:
  """Whether a placeholder stands where an answer should: '<nooutput>'."""
  return len(answer) < 40 and _PLACEHOLDER.fullmatch(answer) is not None


def is_refusal(answer: str) -> bool:
  """Whether the beginning of an answer declines, in English."""
  return _REFUSAL.search(answer, 0, _LOOKED_AT) is not None


def cut_off(answer: str) -> str:
  """How an answer looks cut off: '' where it does not.

  'open code fence', 'dangling word' or 'no end of sentence': the last for
  prose alone, whose last line is a sentence's without its end.
  """
  text = answer.rstrip()
  if text.count("```") % 2:
    return "open code fence"
  if not text or text[-1] in _ENDS:
    return ""
  last = text[text.rfind("\n") + 1 :]
  if len(last.split()) < 8 or _CODE.search(text):
    return ""
  if _DANGLING.search(last):
    return "dangling word"
  # Lists, tags and letters end without a full stop; other prose does not.
  if last[-1].isalnum() and _PROSE.search(last) and not _LOOSE.search(last):
    return "no end of sentence"
  return ""
