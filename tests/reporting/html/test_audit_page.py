"""The page of an audit: whole, self-contained, and nothing in it runs."""

import html.parser

from sft_jax.reporting import terminal
from sft_jax.reporting.html import audit_page

HOSTILE = "\x1b[31m</script><script>alert(1)</script>&\u202eevil\x00\x9b[bold]"


def _found(text: str) -> dict:
  """An inspection with `text` wherever the data has a say."""
  counts = {"rows_in": 3, "rows_trained": 2, "tokens_prompt": 7,
            "rows_held_out": 0, "tokens_trained": 5,
            "dropped": {text: 1}, "dropped_turns": {},
            "notes": {}, "places": {text: [text]},
            "roles": {"user": [7, 0], "answer": [5, 5]}}  # fmt: skip
  mixed = {"copies": 1.0, "loss_weight": 1.0, "tokens": 12, "share": 1.0,
           "trained_share": 1.0}  # fmt: skip
  spread = {"total": 12, "mean": 6.0, "max": 6,
            "histogram": [{"from": 6, "to": 6, "examples": 2}]}  # fmt: skip
  row = {"place": text, "prompt": text, "answer": text}
  finding = {"name": "stop", "of": "train", "passed": False, "allowed": False,
             "count": 2, "message": text, "places": [text, text]}  # fmt: skip
  piece = {"text": text, "special": True, "weight": 0.5, "role": "answer"}
  return {
    "passed": False,
    "findings": [finding, {**finding, "passed": True, "message": ""}],
    "warnings": [
      {"name": "conflicts", "count": 2, "message": text,
       "examples": [{"note": text, "rows": [row, row]}]}
    ],
    "ledger": {"sources": {text: counts},
               "epoch": {"packs": 2, "slots": 16, "tokens_prompt": 7,
                         "tokens_trained": 5, "tokens_padding": 4,
                         "mixture": {text: mixed}}},
    "scores": {
      "rows": 2, "unscored": 3, "changed": 4,
      "spread": {"nats": {"rows": 2, "p50": 1.5}},
      "ends": [{"name": "Hardest", "rows": [{**row, "nats": 2.25}]}],
    },
    "coverage": {
      "points": {"left": [[0.0, 1.0]], "kept": [[0.5, 0.5]], "held out": [],
                 "far": [[1.0, 0.0]]},
      "near": 0.25, "counts": {"held_out": 1, "far": 1},
      "far": [{"place": text, "text": text}],
      "kinds": {"refusal": [0, 0], "long": [7, 3]},
    },
    "epoch": {"steps": 1.5, "fill": 0.9, "seq_len": 8, "batch_size": 1},
    "lengths": {"tokens": spread, "trained": {"total": 0, "histogram": []}},
    "samples": [{"place": text, "tokens": [1, 2], "loss_weights": [0, 0.5],
                 "spans": [piece]}],
  }  # fmt: skip


class _Reader(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.tags: list[str] = []
    self.text = ""

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    assert not [name for name, _ in attrs if name.startswith("on")]
    assert not {"src", "href"} & {name for name, _ in attrs}

  def handle_data(self, data):
    self.text += data


def test_hostile_text_is_shown_and_not_obeyed(tmp_path):
  audit_page.write(tmp_path / "page.html", _found(HOSTILE))
  page = (tmp_path / "page.html").read_text()
  reader = _Reader()
  reader.feed(page)
  assert "script" not in reader.tags
  assert not set(page) & set("\x00\x1b\x9b\u202e")
  assert reader.text.count(terminal.visible(HOSTILE)) >= 15
  assert "default-src 'none'" in page
  assert "http" not in page.replace("http-equiv", "")
  assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_what_the_page_says(tmp_path):
  audit_page.write(tmp_path / "page.html", _found("some text"))
  reader = _Reader()
  reader.feed((tmp_path / "page.html").read_text())
  for said in ("1 failed", "90.0%", "FAILED", "conflicts", "total 12",
               "nats 2.25", "3 have none", "1 of 1 held-out", "0.25",
               "● kept: 1", "✕ far: 1", "nonerefusal",
               "3long, kept of 7"):  # fmt: skip
    assert said in reader.text
