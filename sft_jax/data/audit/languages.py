"""The language of texts: by script, and Latin ones by their commonest words.

No model and no table of frequencies: enough to see that a row is in another
language than its neighbours.
"""

import functools
import itertools

import numpy as np
from jaxtyping import Int64, UInt64

from sft_jax.data.audit import text_hashing as words_lib
from sft_jax.data.audit.text_hashing import Words

# First code point of each block that matters, and whose it is.
_BLOCKS = (
  (0x0000, ""), (0x0041, "Latin"), (0x005B, ""), (0x0061, "Latin"),
  (0x007B, ""), (0x00C0, "Latin"), (0x0250, ""), (0x0370, "Greek"),
  (0x0400, "Russian script"), (0x0530, ""), (0x0590, "Hebrew"),
  (0x0600, "Arabic script"), (0x0780, ""), (0x0900, "Hindi script"),
  (0x0980, "other script"), (0x0E00, "Thai"), (0x0E80, "other script"),
  (0x1100, "Korean"), (0x1200, "other script"), (0x1E00, "Latin"),
  (0x1F00, "Greek"), (0x2000, ""), (0x3040, "Japanese"), (0x3100, ""),
  (0x4E00, "Chinese"), (0xA000, ""), (0xAC00, "Korean"), (0xD7B0, ""),
)  # fmt: skip
# Words of one of these languages that are rare in the others.
_COMMON = {
  "English": "the and of is that it with for was you this are have not they",
  "German": "der und das ist nicht ein eine mit auf den von dem sich auch wird",
  "French": "les des est une dans pour que qui pas avec sur vous cette sont du",
  "Spanish": "el los las una por con para es como pero muy este su donde hay",
  "Italian": "il gli che di una non sono della con anche questo nel alla più",
  "Portuguese": "os uma não para com mais como mas foi ao ele das tem são você",
  "Dutch": "het een van en niet dat op zijn voor met aan ook maar wordt deze",
}
_MIN_WORDS = 3  # different ones found, before a language is named
UNKNOWN = "unknown"


def names() -> list[str]:
  """All that `detect` may answer, by number."""
  scripts = dict.fromkeys(script for _, script in _BLOCKS if script)
  del scripts["Latin"]
  return [UNKNOWN, *_COMMON, *scripts]


def detect(texts: list[str], words: Words) -> Int64[np.ndarray, " texts"]:
  """The number in `names()` of the language of each text.

  Args:
    texts: as they are.
    words: of the same texts.
  """
  every = names()
  found = _by_words(words)
  for i, text in enumerate(texts):
    if not text.isascii() and (script := _script(text)) != "Latin":
      found[i] = every.index(script)
  return found


def _by_words(words: Words) -> Int64[np.ndarray, " texts"]:
  """The Latin language that most different words of each text are of."""
  words, (known, owner) = words_lib.sets(words), _known()
  at = np.minimum(np.searchsorted(known, words.hashes), len(known) - 1)
  hit = known[at] == words.hashes
  votes = np.stack(
    [
      words_lib.sums(
        (hit & (owner[at] == language)).astype(np.uint64), words.starts
      )
      for language in range(len(_COMMON))
    ]
  ).astype(np.int64)
  best = votes.argmax(0)
  ranked = np.sort(votes, axis=0)
  clear = (ranked[-1] >= _MIN_WORDS) & (ranked[-1] > 1.5 * ranked[-2])
  return np.where(clear, best + 1, 0)


def _script(text: str) -> str:
  """The script of most letters; kana make any Chinese beside it Japanese."""
  starts = np.array([start for start, _ in _BLOCKS])
  points = words_lib.code_points(text)
  block = np.searchsorted(starts, points, side="right") - 1
  counts: dict[str, int] = {}
  for (_, script), number in zip(
    _BLOCKS, np.bincount(block, minlength=len(_BLOCKS)).tolist(), strict=True
  ):
    if script:
      counts[script] = counts.get(script, 0) + number
  if counts["Japanese"] * 5 > counts["Chinese"]:
    counts["Japanese"] += counts.pop("Chinese")
  script = max(counts, key=counts.__getitem__)
  return script if counts[script] else UNKNOWN


@functools.cache
def _known() -> tuple[
  UInt64[np.ndarray, " words"], Int64[np.ndarray, " words"]
]:
  """Hashes of the common words, ascending, and whose they are."""
  lists = [text.split() for text in _COMMON.values()]
  owner = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
  hashes = words_lib.split(list(itertools.chain(*lists))).hashes
  order = np.argsort(hashes)
  return hashes[order], owner[order]
