"""The chat, with its input scripted: what is asked, shown and remembered."""

import io
import json

import pytest
from rich.console import Console

import tiny
from sft_jax.commands import chat
from sft_jax.data.conversation import Conversation, Message
from sft_jax.inference import generate
from sft_jax.training.build import load_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.model_folder(tmp_path_factory.mktemp("chat") / "model")


def talk(monkeypatch, capsys, lines, *flags):
  """What is printed between the first prompt and the end of the input."""
  said = iter(lines)

  def scripted(prompt):
    del prompt
    try:
      return next(said)
    except StopIteration:
      raise EOFError from None

  monkeypatch.setattr("builtins.input", scripted)
  monkeypatch.setattr("sys.argv", ["chat.py", *flags])
  chat.main()
  return capsys.readouterr().out


def test_two_turns_each_with_what_was_said_before(folder, monkeypatch, capsys):
  flags = [f"--model={folder}", "--max_new_tokens=6", "--system=Be kind."]
  shown = talk(monkeypatch, capsys, ["Hi", "And?", "/new", "Hi", ""], *flags)
  asked = load_run.load(folder)
  turns, want = (Message("system", "Be kind."),), []
  for said in ("Hi", "And?"):
    turns = (*turns, Message("user", said))
    (reply,) = generate.generate(
      asked.model, asked.params, asked.tokenizer,
      [Conversation(messages=turns)], max_new_tokens=6,
    )  # fmt: skip
    turns = (*turns, reply.message)
    want.append(asked.tokenizer.decode(reply.tokens, skip_special=False))
  places = [shown.find(text) for text in want]
  assert -1 < places[0] <= places[1]
  # Starting over says the first thing again.
  assert shown.count(want[0]) >= 2
  assert shown.count("(cut off at --max_new_tokens)") == 3


def test_a_control_token_typed_in_is_an_error_and_the_talk_goes_on(
  folder, monkeypatch, capsys
):
  tokenizer = load_run.load(folder).tokenizer
  (stop, *_) = tokenizer.stop_ids
  special = tokenizer.decode([stop], skip_special=False)
  flags = [f"--model={folder}", "--max_new_tokens=2", "--control_tokens=error"]
  shown = talk(monkeypatch, capsys, [f"a{special}b", "Hi"], *flags)
  assert "error:" in shown
  assert shown.count("(cut off at --max_new_tokens)") == 1


def test_compare_answers_with_both(folder, monkeypatch, capsys):
  flags = [f"--model={folder}", f"--compare={folder}/.", "--max_new_tokens=3"]
  shown = talk(monkeypatch, capsys, ["Hi"], *flags)
  first, second = shown.split(f"{folder}/.:")
  # The same model says the same.
  assert first.split(f"{folder}:")[1].split() == second.split()


def test_on_a_terminal_they_stand_side_by_side(folder):
  """A line of the table holds a part of each reply."""
  parser_args = ["--model", str(folder), "--max_new_tokens=40"]
  args = chat.parser().parse_args(parser_args)
  talks = {name: chat.Talk(str(folder), args) for name in ("one", "two")}
  out = Console(
    force_terminal=True, color_system=None, width=60, file=io.StringIO()
  )
  chat.side_by_side(out, talks, "Hi", seed=0)
  last = out.file.getvalue().split("┏")[-1]
  rows = [line.split("│")[1:3] for line in last.splitlines() if "│" in line]
  assert len(rows) > 1
  # The same model says the same.
  assert all(left.strip() == right.strip() for left, right in rows)
  assert "one" in last
  assert "two" in last
  alone = chat.Talk(str(folder), args)
  *_, whole = alone.answer("Hi", seed=0)
  joined = "".join(left.strip() for left, _ in rows)
  assert joined.replace(" ", "") == "".join(whole.plain.split())


def test_unknown_folders_are_named(tmp_path):
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  with pytest.raises(ValueError, match="got no checkpoint"):
    load_run.load(tmp_path / "run")
  (tmp_path / "config.json").write_text(json.dumps({}))
  with pytest.raises(ValueError, match="expected"):
    load_run.load(tmp_path)
