"""The model's card: what the hub reads of it, and what nobody smuggles in."""

from huggingface_hub import ModelCard

import fake_runs
from sft_jax.reporting import final_summary


def test_a_card_names_what_the_hub_has_and_no_local_path(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "my" / "rows").mkdir(parents=True)
  run = fake_runs.finished("x")
  (source,) = run["ledger"]["sources"].values()
  names = (
    *("org/rows@v1#train[:10%]", "hf://org/more", "my/rows"),
    *("data/rows.jsonl", "/home/me/secret.jsonl"),
  )
  run["ledger"] = {"sources": dict.fromkeys(names, source), "epoch": None}
  run["start"]["facts"]["Model"]["from"] = f"org/base@{'a' * 40}"
  card = ModelCard(final_summary.model_card(run, "mine"))
  assert card.data.base_model == "org/base"
  assert card.data.datasets == ["org/rows", "org/more"]
  assert card.data.license == "unknown"
  assert "/home/me" not in card.content
  assert "| secret.jsonl | 5 | 3 |" in card.text
  assert "| held-out rows, loss, nats per token | 3.250 | 1.125 |" in card.text
  run["start"]["facts"]["Model"]["from"] = "/home/me/base"
  local = ModelCard(final_summary.model_card(run, "mine"))
  assert local.data.base_model is None
  assert "`base`, tuned" in local.text


def test_what_data_say_stays_in_its_cell():
  text = "a|b <script> `c`\n\n---\nlicense: mit"
  card = ModelCard(final_summary.model_card(fake_runs.finished(text), "mine"))
  assert card.data.license == "unknown"
  assert r"| a\|b \<script> \`c\` --- license: mit |" in card.text
