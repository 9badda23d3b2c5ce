"""Languages are named where the text is long enough to tell."""

import json

import pytest

from sft_jax.data.audit import languages
from tiny_tokenizers import SHARED

TEXTS = {
  "en": "The house is on the hill, and it was built for you.",
  "de": "Das Haus ist nicht auf dem Berg, und der Weg ist eine Straße.",
  "fr": "La maison est dans les bois, et vous êtes une amie pour elle.",
  "es": "El coche de los niños es para una fiesta, pero hay muy pocas.",
  "it": "Il cane non è della donna che gli parla, anche questo.",
  "pt": "Você não tem uma casa como as mais antigas das ilhas.",
  "nl": "Het huis is niet van ons, maar het wordt een van deze.",
  "zh": "您好，很高兴为您服务。",
  "ja": "彼女は優秀な教師です。",
  "ko": "안녕하세요, 반갑습니다.",
  "ru": "Он живёт в этом доме уже много лет.",
  "el": "Το σπίτι είναι στον λόφο.",
  "ar": "البيت على التل الأخضر.",
  "unknown": "x = 3; print(x)",
}


def test_each_language():
  assert languages.detect(TEXTS.values()) == list(TEXTS)
  assert languages.detect([]) == []
  assert languages.detect(["", "\ud800 42", "Hallo"]) == ["unknown"] * 3


@pytest.mark.slow
def test_real_answers():
  """The 20 answers of alpaca_5000 that are no English, and nearly no others."""
  path = SHARED / "instruction" / "alpaca_5000.json"
  if not path.is_file():
    pytest.skip(f"needs {path}")
  answers = [row["output"] for row in json.loads(path.read_text())]
  found = languages.detect(answers)
  assert found.count("en") > 4300
  other = [
    answer
    for answer, name in zip(answers, found, strict=True)
    if name not in ("en", "unknown")
  ]
  foreign = ("déjeuner", "étudiant.", "彼女は", "Estoy", "Ich fühle", "besoin",
             "Il est un", "Der Himmel", "Los siete", "私の人生", "Soy un",
             "comment allez", "entreprise")  # fmt: skip
  for word in foreign:
    assert any(word in answer for answer in other), word
  assert len(other) <= len(foreign) + 5
