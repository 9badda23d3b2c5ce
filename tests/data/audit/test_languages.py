"""Languages are named where the text is long enough to tell."""

import pytest

from sft_jax.data.audit import languages, text_hashing

TEXTS = {
  "English": "The house is on the hill, and it was built for you.",
  "German": "Das Haus ist nicht auf dem Berg, und der Weg ist eine Straße.",
  "French": "La maison est dans les bois, et vous êtes une amie pour elle.",
  "Spanish": "El coche de los niños es para una fiesta, pero hay muy pocas.",
  "Italian": "Il cane non è della donna che gli parla, anche questo.",
  "Portuguese": "Você não tem uma casa como as mais antigas das ilhas.",
  "Dutch": "Het huis is niet van ons, maar het wordt een van deze.",
  "Chinese": "您好，很高兴为您服务。",
  "Japanese": "彼女は優秀な教師です。",
  "Korean": "안녕하세요, 반갑습니다.",
  "Russian script": "Он живёт в этом доме уже много лет.",
  "Greek": "Το σπίτι είναι στον λόφο.",
  "Arabic script": "البيت على التل.",
  "unknown": "x = 3; print(x)",
}


@pytest.mark.parametrize("name", TEXTS)
def test_each_language(name):
  text = [TEXTS[name]]
  (found,) = languages.detect(text, text_hashing.split(text))
  assert languages.names()[found] == name


def test_many_at_once_and_none():
  texts = list(TEXTS.values())
  found = languages.detect(texts, text_hashing.split(texts))
  assert [languages.names()[i] for i in found] == list(TEXTS)
  assert len(languages.detect([], text_hashing.split([]))) == 0
