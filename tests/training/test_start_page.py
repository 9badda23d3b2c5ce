"""The start page tells of the run what is so."""

import jax
import numpy as np
import pytest

import tiny
from sft_jax.common import trees
from sft_jax.reporting import terminal
from sft_jax.training import start_page
from sft_jax.training.build import build


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """(config, Setup) of a run over eight devices, in two parts."""
  folder = tmp_path_factory.mktemp("page")
  model = tiny.model_folder(folder / "model")
  rows = tiny.rows_file(folder / "rows.jsonl")
  choices = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2}
  choices |= {"accum_steps": 2, "steps": 30, "optim__warmup_steps": 10}
  config = tiny.config(folder, model, rows, **choices)
  return config, build.build_run(config, print)


def test_the_sharding_table_is_where_arrays_lie(built):
  _, run_ = built
  lines = {line[0]: line[1:] for line in start_page._sharding(run_)}
  leaves = trees.flatten(run_.state.params)
  assert lines.keys() == leaves.keys()
  for path, leaf in leaves.items():
    shape, over, size, note = lines[path]
    assert shape == " x ".join(map(str, leaf.shape))
    part = leaf.addressable_shards[0].data
    assert size == terminal.size(part.nbytes)
    assert (over == "each has it all") == (part.shape == leaf.shape)
    assert note == ""
  assert lines["layers/mlp/up/kernel"][1] == (
    "fsdp (64 = 4 x 16), tensor (128 = 2 x 64)"
  )


def test_memory_by_kind_is_that_of_the_arrays(built):
  config, run_ = built
  page = start_page._memory(config, run_)
  held = lambda tree: sum(
    x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)
  )
  for name, size in (
    ("trained parameters", held(run_.state.params)),
    ("optimizer", held(run_.state.opt_state)),
    # A micro-batch's own, and the float32 sums of them.
    ("gradients", 2 * held(run_.state.params)),
  ):
    assert f"{name} {terminal.size(size)}" in page["of it"]
  assert "activations " in page["of it"]
  assert "frozen" not in page["of it"]
  machine = run_.machine
  tight = machine._replace(chip=machine.chip._replace(memory=1000.0))
  page = start_page._memory(config, run_._replace(machine=tight))
  assert "DOES NOT FIT" in page["in all"]


def test_the_schedule_is_sketched(built):
  config, run_ = built
  line = start_page._schedule(config, run_.num_steps)
  sketch, figures = line.split("  ", 1)
  assert len(sketch) == 30
  assert sketch[10] == "█"
  assert sketch[0] < sketch[5] < sketch[10] > sketch[20] > sketch[29]
  assert figures == "0.0002 at step 1, 0.002 at 11, 0.00011 at 30 (cosine)"


def show(config, run_):
  words = start_page.facts(config, run_, 0)
  start_page.show(run_, words, terminal.console())


def test_copies_of_a_model_need_no_table(built, capsys):
  config, run_ = built
  show(config, run_)
  assert "layers/mlp/up/kernel" in capsys.readouterr().out
  config = config.copy_and_resolve_references()
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 8, 1, 1
  config.accum_steps = 1
  show(config, build.build_run(config, print))
  shown = capsys.readouterr().out
  assert "every device holds all parameters" in shown
  assert "layers/mlp/up/kernel" not in shown


@pytest.mark.parametrize(
  ("size", "said"),
  [(640, "640 B"), (3_210, "3.21 kB"), (141e9, "141 GB"), (1.5e12, "1.5 TB")],
)
def test_sizes(size, said):
  assert terminal.size(size) == said


def test_a_sparkline_has_a_bar_per_value():
  assert terminal.sparkline([0.0, 0.0]) == "▁▁"
  assert terminal.sparkline(list(np.arange(8))) == "▁▂▃▄▅▆▇█"
