"""Compares our IFEval verdicts with the published checker's.

    NLTK_DATA=FOLDER python tools/dev/ifeval_agreement.py --texts=FILE.jsonl

Needs lm-eval (whose copy of the checker is run; `pip install --no-deps lm-eval`
is enough), nltk with its punkt_tab files in NLTK_DATA, langdetect and
immutabledict. Replies are the texts of the file (a key `output`, `text` or
`answer` per row), as they are and bent towards each instruction: fences,
bullets, capitals, markers, empty lines, quotes, abbreviations.
"""

import argparse
import collections
import importlib
import importlib.metadata
import json
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft_jax.commands import command
from sft_jax.data.readers import files
from sft_jax.evals.checks import ifeval

Arguments = dict[str, Any]
RELATIONS = ("at least", "less than")


def arguments_of(rng: random.Random) -> dict[str, Arguments]:
  """Random arguments for each instruction."""
  few, relation = rng.randint(1, 6), rng.choice(RELATIONS)
  words = rng.sample(["the", "a", "You", "time", "code", r"first", "cat"], 2)
  return {
    "keywords:existence": {"keywords": words},
    "keywords:frequency": {
      "keyword": words[0], "frequency": few, "relation": relation},
    "keywords:forbidden_words": {"forbidden_words": words},
    "keywords:letter_frequency": {
      "letter": rng.choice("aeqZ"), "let_frequency": 3 * few,
      "let_relation": relation},
    "language:response_language": {"language": rng.choice(["en", "de", "fr"])},
    "length_constraints:number_sentences": {
      "num_sentences": few, "relation": relation},
    "length_constraints:number_paragraphs": {"num_paragraphs": few},
    "length_constraints:number_words": {
      "num_words": 20 * few, "relation": relation},
    "length_constraints:nth_paragraph_first_word": {
      "num_paragraphs": min(few, 3),
      "nth_paragraph": rng.randint(1, min(few, 3)),
      "first_word": rng.choice(["the", "This", "first", "Hello"])},
    "detectable_content:number_placeholders": {"num_placeholders": few},
    "detectable_content:postscript": {
      "postscript_marker": rng.choice(["P.S.", "P.P.S", "Note:"])},
    "detectable_format:number_bullet_lists": {"num_bullets": few},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": few},
    "detectable_format:multiple_sections": {
      "section_spliter": rng.choice(["SECTION", "Day"]), "num_sections": few},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "Write a short story."},
    "startend:end_checker": {"end_phrase": "Is there anything else?"},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {
      "capital_frequency": few, "capital_relation": relation},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
  }  # fmt: skip


# Ways to bend a text, and the instructions that each one leans towards.
BENDS: dict[str, tuple[str, Callable[[str, random.Random], str]]] = {
  "as it is": ("keywords length", lambda t, r: t),
  "capitals": ("english_capital", lambda t, r: t.upper()),
  "small": ("english_lowercase", lambda t, r: t.lower()),
  "quoted": ("quotation", lambda t, r: f'"{t}"'),
  "fenced": (
    "json_format",
    lambda t, r: f"```json\n{json.dumps({'a': t[:40]})}\n```",
  ),
  "json": (
    "json_format", lambda t, r: json.dumps([t[:30]]) + r.choice(["", "x"])),
  "stars": (
    "bullet", lambda t, r: "\n".join("* " + one for one in _some(t, " ", r))),
  "dashes": (
    "bullet", lambda t, r: "\n".join(" - " + one for one in _some(t, " ", r))),
  "dividers": (
    "number_paragraphs", lambda t, r: "\n***\n".join(_some(t, " ", r))),
  "paragraphs": (
    "nth_paragraph",
    lambda t, r: "\n\n".join(
      r.choice(["The ", "'this. ", "first, ", "Hello "]) + one
      for one in _some(t, " ", r, 3)),
  ),
  "edges": (
    "number_paragraphs",
    lambda t, r: "***\n" + t + r.choice(["", "\n***", "\n*** ***\n"]),
  ),
  "two": (
    "two_responses",
    lambda t, r: t[:80] + "\n******\n" + r.choice([t[80:160], t[:80], ""]),
  ),
  "title": (
    "title", lambda t, r: f"<<{r.choice(['A title', ' ', ''])}>>\n{t}"),
  "postscript": (
    "postscript",
    lambda t, r: t + r.choice(["\nP.S. More.", "\np. p. s x", "\nNote: x"]),
  ),
  "repeated": ("repeat_prompt", lambda t, r: "write a short story. " + t),
  "ended": (
    "end_checker",
    lambda t, r: t + r.choice(["\nIs there anything else?", "", ' "']),
  ),
  "answer": (
    "constrained",
    lambda t, r: f"So. My answer is {r.choice(['yes', 'no', 'so'])}.",
  ),
  "marked": (
    "highlighted placeholders capital_word",
    lambda t, r: " ".join(
      r.choice([w, f"*{w}*", f"**{w}**", f"[{w}]", w.upper()])
      for w in t.split()[:12]),
  ),
  "sections": (
    "multiple_sections",
    lambda t, r: " ".join(
      f"{r.choice(['SECTION', 'SECTION', 'Day', 'section'])} {i}\n{w}"
      for i, w in enumerate(_some(t, " ", r))),
  ),
  "abbreviations": (
    "sentences",
    lambda t, r: t.replace(" ", r.choice([
      " e.g. ", " Mr. ", " U.S. ", " 3.5 ", "... ", "! ", "? ", ". ", " (a.) ",
    ]), r.randint(1, 4)),
  ),
  "no commas": ("no_comma", lambda t, r: t.replace(",", r.choice(["", ";"]))),
  "odd": (
    "",
    lambda t, r: r.choice([
      "", " ", "\n\n", "12 34", "\u3002", "...", "I. II. III.", "a.b.c",
      "O'NEIL CAN'T GO-ON."]),
  ),
  "preamble": ("", lambda t, r: "Sure!\n" + t + "\nHope this helps, friend."),
}  # fmt: skip


def _some(text: str, by: str, rng: random.Random, most: int = 6) -> list[str]:
  return text.split(by)[: rng.randint(1, most)]


def pairs(texts: list[str], number: int, seed: int) -> Iterator[tuple]:
  """(instruction, arguments, reply), every instruction equally often."""
  rng = random.Random(seed)
  names = list(ifeval.INSTRUCTIONS)
  for i in range(number):
    name = names[i % len(names)]
    text = rng.choice(texts)[: rng.choice([60, 200, 700])]
    fitting = [
      bend
      for towards, bend in BENDS.values()
      if any(part in name for part in towards.split())
    ]
    anything = [bend for _, bend in BENDS.values()]
    for _ in range(rng.randint(0, 1)):
      text = rng.choice(anything)(text, rng)
    text = rng.choice(rng.choice([fitting or anything, anything]))(text, rng)
    yield name, arguments_of(rng)[name], text


def reference() -> Callable[[str, Arguments, str], bool]:
  """The published checker's verdict, loaded without the rest of lm-eval."""
  found = importlib.metadata.distribution("lm-eval").locate_file("lm_eval")
  for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
    package = types.ModuleType(name)
    parts = name.split(".")[1:]
    package.__path__ = [str(Path(str(found)).joinpath(*parts))]
    sys.modules[name] = package
  util = importlib.import_module("lm_eval.tasks.ifeval.instructions_util")
  registry = importlib.import_module(
    "lm_eval.tasks.ifeval.instructions_registry"
  )
  langdetect = importlib.import_module("langdetect")
  nltk = importlib.import_module("nltk")

  langdetect.DetectorFactory.seed = 0
  # The pickle it asks for is refused by every safe nltk; the tables are the
  # same model.
  punkt = nltk.tokenize.PunktTokenizer("english")
  vars(util)["_get_sentence_tokenizer"] = lambda: punkt

  def verdict(name: str, arguments: Arguments, text: str) -> bool:
    check = registry.INSTRUCTION_DICT[name](name)
    check.build_description(**arguments)
    return bool(text.strip()) and bool(check.check_following(text))

  return verdict


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--texts", required=True, help="jsonl or json of rows")
  parser.add_argument("--pairs", type=int, default=5000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--show", type=int, default=10, help="differences shown")
  args = parser.parse_args()
  texts = [
    text
    for _, row in files.read_rows(args.texts)
    for key in ("output", "text", "answer")
    if isinstance(text := row.get(key), str) and text.strip()
  ]
  theirs = reference()
  total, differs, passed = (collections.Counter() for _ in range(3))
  shown = 0
  for name, arguments, text in pairs(texts, args.pairs, args.seed):
    for reading in ifeval.loose_variants(text):
      want = theirs(name, arguments, reading)
      got = ifeval.follows(reading, name, **arguments)
      total[name] += 1
      passed[name] += want
      if want != got:
        differs[name] += 1
        if shown < args.show:
          shown += 1
          print(f"{name} {arguments}: theirs {want}, ours {got}: {reading!r}")
  print(f"{'instruction':48}{'verdicts':>9}{'followed':>9}{'differ':>7}")
  for name in ifeval.INSTRUCTIONS:
    print(f"{name:48}{total[name]:9}{passed[name]:9}{differs[name]:7}")
  print(f"{'all':48}{total.total():9}{passed.total():9}{differs.total():7}")


if __name__ == "__main__":
  command.run(main)
