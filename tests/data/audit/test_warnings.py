"""What looks wrong with an answer by itself, and what only seems to."""

import pytest

from sft_jax.data.audit import warnings


@pytest.mark.parametrize(
  "text", ["", " ", "<nooutput>", "No Output", "N/A", "None.", "...", "null"]
)
def test_placeholders(text):
  assert warnings.is_empty(text)


@pytest.mark.parametrize("text", ["No", "0", "None of them.", "Empty the bin."])
def test_short_answers_are_not_placeholders(text):
  assert not warnings.is_empty(text)


@pytest.mark.parametrize(
  "text",
  [
    "I'm sorry, but I can't help with that.",
    "I cannot provide medical advice.",
    "As an AI language model, I have no taste.",
    "Unfortunately I am unable to assist you.",
    "Good question. As an AI, I don\u2019t have access to prices.",
  ],
)
def test_refusals(text):
  assert warnings.is_refusal(text)


@pytest.mark.parametrize(
  "text",
  [
    "I'm sorry to hear that. Call a doctor.",
    "I couldn't help but laugh.",
    "The word 'cannot' is one word.",
    "x" * 400 + " I cannot help with that.",
    "Jim: I am sorry, I cannot help with that.\nAnn: Oh.",
    '"I am sorry, as an AI I cannot," said the robot.',
    "I'm sorry, but I'm unable to come into work today.",
    "As an AI assistant, I would help them in five steps.",
  ],
)
def test_what_only_sounds_like_a_refusal(text):
  assert not warnings.is_refusal(text)


@pytest.mark.parametrize(
  ("text", "why"),
  [
    ("Run this:\n```python\nprint(1)", "open code fence"),
    ("It rained all day. So we stayed in and played with the", "dangling word"),
    ("It rained all day. So we stayed inside and played a ga",
     "no end of sentence"),
  ],
)  # fmt: skip
def test_cut_off(text, why):
  assert warnings.cut_off(text) == why


@pytest.mark.parametrize(
  "text",
  [
    "Paris",
    "It rained all day. So we stayed inside and played a game.",
    "1. Salt and pepper. 2. Bread and butter and jam and some honey",
    "Run it:\n```\nmake\n```",
    "for (int i = 0; i < n; i++) {\n  total += values[i] * weights[i];\n}",
    "What a day it was. Come and see it for yourself #travel #sun",
  ],
)
def test_whole_answers(text):
  assert warnings.cut_off(text) == ""
