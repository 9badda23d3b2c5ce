"""Progress: figures that matter, plain lines in a log, nothing elsewhere."""

import contextlib
import io
import os
import re
import sys

import pytest
from rich.console import Console
from rich.text import Text

from sft_jax.reporting import terminal

RECORD = {
  "loss/nats_per_token": 1.2345,
  "speed/trained_tokens_per_s": 12_345.6,
  "speed/mfu": 0.412,
  "memory/device_peak_bytes": 71_900_000_000,
  "memory/host_peak_bytes": 1_500_000_000,
  "time/step_s": 2.0,
}


def shown(**options) -> str:
  out = io.StringIO()
  console = Console(file=out, markup=False, highlight=False, **options)
  bar = terminal.StepProgress(console, total=100, start=0)
  bar.update(40, RECORD)
  bar.close()
  return out.getvalue()


def test_a_log_has_a_plain_line_per_record():
  assert shown(force_terminal=False, width=200) == (
    "step 40/100  loss 1.234  12,346 trained/s  MFU 41%  71.9 GB  "
    "2 min 00 s left\n"
  )


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_terminal_has_one_line_with_all_of_it(width):
  text = shown(force_terminal=True, width=width)
  last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip().splitlines()[-1]
  assert last.startswith("step 40/100")
  assert ("━" in last) == (width >= 100)
  for word in ("loss 1.234", "12,346 trained/s", "MFU 41%", "71.9 GB"):
    assert word in last
  assert last.rstrip().endswith("2 min 00 s left")
  assert len(last) <= width


def test_other_processes_show_nothing(monkeypatch):
  monkeypatch.setattr(terminal.jax, "process_index", lambda: 1)
  out = terminal.console()
  assert out.quiet
  assert shown(quiet=True, force_terminal=True) == ""


def test_without_a_published_peak_the_share_is_of_this_machine():
  record = {name: x for name, x in RECORD.items() if "device" not in name}
  record["speed/peak_share"] = record.pop("speed/mfu")
  assert terminal.figures(record) == (
    "loss 1.234  12,346 trained/s  41% of peak  1.5 GB"
  )


@pytest.mark.parametrize(
  ("seconds", "said"),
  [(0.4, "0 s"), (59, "59 s"), (125, "2 min 05 s"), (7260, "2 h 01 min")],
)
def test_durations(seconds, said):
  assert terminal.duration(seconds) == said


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_keeps_its_figures_however_narrow_the_terminal(width):
  out = io.StringIO()
  cells = ["a name " * 9, "1 x 2 x 3", "0.123456789"]
  terminal.print_table(
    Console(file=out, width=width, soft_wrap=True, markup=False),
    "Figures",
    ("name", "shape", "value"),
    [cells],
  )
  text = out.getvalue()
  for cell in cells:
    assert cell.strip() in text
  assert "…" not in text


def test_what_takes_long_says_so_with_the_time_left():
  """A batch takes 8 s; what is done within 20 s says nothing."""
  out = Console(file=io.StringIO(), width=80)
  now = [0.0]
  progress = terminal.TaskProgress(out, now=lambda: now[0])
  for done in range(1, 11):
    progress("held_out", done, 10)
    now[0] += 8
  progress("general_text", 1, 2)
  progress("general_text", 2, 2)
  lines = out.file.getvalue().splitlines()
  assert lines == [
    "held out 4/10  48 s left",
    "held out 7/10  24 s left",
  ]


def test_the_console_obeys_no_text(capsys):
  """Names of files, runs and models, whichever way they are printed."""
  out, name = terminal.console(), "run\x1b[2J\u202e\r.jsonl"
  out.print(name)
  out.print(Text(name, style="bold"))
  terminal.facts(out, name, {"a": name})
  terminal.lines(out, name, [name])
  terminal.print_table(out, name, ("a",), [[name]])
  shown = capsys.readouterr().out
  assert not set(shown) & set("\x1b\u202e\r")
  assert shown.count("run␛[2J<202E>") == 8


def test_a_closed_pipe_is_an_error_and_no_silent_exit(monkeypatch):
  """As of "| head -1": the command says what happened."""
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w", buffering=1) as file:
    monkeypatch.setattr(sys, "stdout", file)
    out = terminal.console()
    with pytest.raises(BrokenPipeError):
      out.print("nobody reads this")
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
      file.close()
