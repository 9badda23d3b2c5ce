"""The story of a run: measured, trained, measured again, exported.

`run(config)` is what `main` calls; `build/build.py` builds what it works with,
`loop.py` takes the steps, `checkpointing/resume.py` finds where a run stopped.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from sft_jax.checkpointing import export
from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.checkpointing.resume import (
  changes_of_config,
  check_same_config,
  restore,
  restore_best,
)
from sft_jax.common import compile_cache, folders, sharding, trees
from sft_jax.common.workdir import Incidents, locked, write_json, write_jsonl
from sft_jax.evals import suite as measure
from sft_jax.models.hf import peft
from sft_jax.models.lora import base_model, merge
from sft_jax.reporting import final_summary, terminal, throughput, trackers
from sft_jax.step.train_step import TrainState
from sft_jax.training import setup_selfcheck, start_page
from sft_jax.training.build import host_consistency, model, setup_rows
from sft_jax.training.build.build import Setup, setup
from sft_jax.training.build.data import Config, Say, make_render_options
from sft_jax.training.build.evals import make_suite
from sft_jax.training.interrupts import StopRequest
from sft_jax.training.loop import followed, make_patience, train_steps


class Result(NamedTuple):
  """What a run leaves behind.

  Attributes:
    metrics: the figures of `workdir/result.json`.
    params: the parameters after the last step, trained and frozen.
    workdir: the folder the run wrote.
  """

  metrics: dict[str, Any]
  params: trees.Tree
  workdir: Path


def run(config: Config, *, force: bool = False, command: str = "") -> Result:
  """Trains as the config says, in `config.workdir`; resumes what is there.

  Before and after training the model is measured (behaviours, held-out loss,
  perplexity on general text). A finished workdir is reported, not rerun.

  Args:
    config: see configs/base.py.
    force: goes on in a workdir of another config or other data, and records
      the break in incidents.jsonl.
    command: what was typed to get here, for the report.

  Raises:
    ValueError: anything a config, a file or a row can get wrong.
    FloatingPointError: the loss was not finite, or jumped; names the step.
    OSError: what cannot be read or written; no step that was saved is lost.
    stop.Stopped: SIGTERM or Ctrl-C; the same call goes on.
  """
  workdir = Path(config.workdir)
  out = terminal.console()
  say = lambda line: out.print(Text(line))
  with (
    StopRequest() as stop,
    locked(workdir),
    compile_cache.opened(config.compile_cache, say),
  ):
    return _run(config, workdir, stop, force, command, out)


def _run(
  config: Config,
  workdir: Path,
  stop: StopRequest,
  force: bool,
  command: str,
  out: Console,
) -> Result:
  said = []

  def say(line: str) -> None:
    said.append(line)
    out.print(Text(line))

  clock = throughput.Clock()
  incidents = Incidents(workdir)
  breaks = changes_of_config(config, workdir)
  if not force:
    check_same_config(breaks, workdir)
  trackers.check(config.log.writers)
  host_consistency.check_config(config)

  if folder := folders.writable_by_others(workdir / "checkpoints"):
    say(
      f"warning: other users can write in {folder}, so what this run resumes "
      f"from could be changed. Take the right from them: chmod go-w {folder}"
    )
  with clock.on("start"):
    run_ = setup(config, say)
    host_consistency.check_data(run_)
  checkpoints = open_checkpoints(config, workdir)
  checkpoints.remove_unfinished()

  def reject(line: str) -> None:
    say(line)
    incidents.add("rejected", None, line)

  resumed = restore(checkpoints, run_, reject, force=force)
  start_step = int(resumed.state.step)
  breaks += resumed.breaks
  for line in breaks:
    say(f"Forced: {line}")
    incidents.add("forced", start_step, line)
  if start_step:
    say(f"Resuming after step {start_step}.")
  write_json(workdir / "config.json", config.to_dict())
  source = {"path": config.model.path, **run_.source._asdict()}
  write_json(workdir / "model.json", source | {"folder": str(source["folder"])})
  write_json(workdir / "ledger.json", run_.stream.stats.to_json())
  data = {
    "fingerprint": run_.stream.fingerprint,
    "fingerprint_inputs": run_.stream.fingerprint_inputs,
  }
  write_json(workdir / "data.json", data)
  words = start_page.facts(config, run_, start_step)
  start_page.show(run_, words, out)
  start_page.write(workdir, run_, words, said=said, command=command)
  result_path = workdir / "result.json"
  done = (
    start_step == run_.num_steps or make_patience(config, resumed.memory).out
  )
  if result_path.exists() and done and not breaks:
    say(f"{workdir} is finished. To train again, choose another workdir.")
    result = json.loads(result_path.read_text())
    final_summary.show_result(out, result, config.eval.samples)
    with closing(checkpoints):
      state = chosen(config, checkpoints, resumed.state, reject)
    return Result(result, own_params(state), workdir)
  if start_step:
    incidents.add("resumed", start_step, f"at step {start_step}")

  setup_selfcheck.at_start(
    config, run_, trees.merge(resumed.state.params, resumed.state.frozen), say
  )

  # -- Before ---------------------------------------------------------------
  suite = make_suite(config, run_, terminal.TaskProgress(out))
  before_path = workdir / "evals" / "before.json"
  if before_path.exists():
    before = json.loads(before_path.read_text())
    suite.measured = {
      name: (done, of)
      for name, (done, of) in before.get("measured", {}).items()
    }
  else:
    say("Measuring the model before training ...")
    params = trees.merge(resumed.state.params, resumed.state.frozen)
    is_base = not (start_step or config.model.from_scratch or config.lora.path)
    with clock.on("evaluation"):
      before = suite(params, is_base=is_base and config.eval.kl)
      before |= setup_rows.replies(config, run_, params)
    del params  # They are donated.
    for line in suite.left_out():
      say(
        f"eval.max_seconds: measured here and from now on are {line}, what "
        "fits. Raise it, or set it to 0 for everything."
      )
    write_json(before_path, before)

  # -- Train ----------------------------------------------------------------
  with closing(checkpoints):
    try:
      state = train_steps(
        *(config, run_, resumed, checkpoints, suite, out),
        clock=clock,
        stop=stop,
        incidents=incidents,
      )
    except FloatingPointError:
      final_summary.write_report(workdir)  # Of all runs this one is looked at.
      raise
    del resumed  # Its state was donated.
    last = int(state.step)
    state = chosen(config, checkpoints, state, reject)
    if best := checkpoints.best():
      say("Best checkpoint: step {}, {:.4g}.".format(*best))
  early = {}
  if config.eval.patience and best:
    early = {
      "figure": followed(config),
      "best": best[1],
      "step": best[0],
      "last_step": last,
      "stopped": last < run_.num_steps,
    }
    line = early_line(early, run_.num_steps)
    say(line)
    if early["stopped"]:
      incidents.add("stopped early", last, line)

  # -- After ----------------------------------------------------------------
  params = trees.merge(state.params, state.frozen)
  del state  # The moments make room: for the base, for what is exported.
  say("Measuring the model after training ...")
  with clock.on("evaluation"):
    after = suite(beside_base(config, run_, params, say))
    params = base_model.own(params)
    after |= setup_rows.replies(config, run_, params)
    rows = setup_rows.losses(run_, params, suite.measured.get("held_out"))
  write_json(workdir / "evals" / "after.json", after)
  write_jsonl(workdir / "evals" / "held_out_rows.jsonl", rows)
  result = measure.compare(before, after)
  if early:
    result["early_stop"] = early
  result["samples"] = result["samples"] or setup_rows.samples(before, after)
  final_summary.show_result(out, result, config.eval.samples)
  if config.export:
    say(f"Writing {workdir / 'export'} ...")
    with clock.on("export"):
      if run_.model.lora:
        say(save_adapters(config, run_, params, workdir / "adapter"))
      evidence = export_run(config, run_, params, workdir / "export")
    result["export"] = evidence._asdict()
    say(f"{workdir / 'export'}: {evidence}")
  result["time"] = clock.account()
  say(final_summary.time_line(result["time"]))
  final_summary.write_report(workdir, result)
  write_json(result_path, result)
  return Result(result, params, workdir)


def chosen(
  config: Config, checkpoints: Checkpoints, state: TrainState, say: Say
) -> TrainState:
  """With eval.patience the best state, else the last, which is given."""
  if not config.eval.patience:
    return state
  return restore_best(checkpoints, state, say)


def early_line(early: dict[str, Any], num_steps: int) -> str:
  """What a person is told of `early_stop` in result.json."""
  return (
    ("Stopped early" if early["stopped"] else "Trained to the end")
    + f", after step {early['last_step']} of {num_steps}. The model from here "
    f"on is that of step {early['step']}, the best by {early['figure']}."
  )


def own_params(state: TrainState) -> trees.Tree:
  """The model's parameters, trained and frozen, and no copy of the base's."""
  return base_model.own(trees.merge(state.params, state.frozen))


def beside_base(
  config: Config, run_: Setup, params: trees.Tree, say: Say
) -> trees.Tree:
  """The parameters, with what comparing them with the base takes.

  What of the base is not among them is read again from the model's folder.
  """
  if (
    not config.eval.kl
    or config.model.from_scratch
    or not (run_.held_out or run_.general_text)
    or base_model.base_of(params, run_.trained) is not None
  ):
    return params
  config = config.copy_and_resolve_references()
  config.model.path = str(run_.source.folder)
  _, base = model.load_model(config, run_.mesh, say)
  return base_model.with_copies(params, base_model.to_copy(base, run_.trained))


def open_checkpoints(config: Config, workdir: Path) -> Checkpoints:
  """The checkpoints of a run, kept as its config says.

  Raises:
    ValueError: the best shall be kept of what is never measured.
  """
  keep, figure = config.checkpoint, followed(config)
  # Patience remembers in checkpoints how many evaluations it has borne.
  every = keep.every if config.eval.patience else keep.every or 1
  if figure and not (
    config.eval.every and every and config.eval.every % every == 0
  ):
    raise ValueError(
      f"checkpoint.keep_best: got {figure!r} with eval.every="
      f"{config.eval.every} and checkpoint.every={keep.every}, expected "
      "checkpoints where something is measured. Set eval.every to a multiple "
      "of checkpoint.every; with eval.patience neither may be 0."
    )
  return Checkpoints(
    workdir / "checkpoints",
    keep=keep.keep,
    keep_every=keep.keep_every,
    keep_best=keep.best_is if figure else "",
  )


def save_adapters(
  config: Config, run_: Setup, params: trees.Tree, path: Path
) -> str:
  """Writes the adapters alone; says what merging them will lose.

  What PEFT has no form for (experts that were trained whole) is said and not
  written: the merged export, which follows, holds it all.
  """
  assert run_.model.lora
  alone = "the adapters alone"
  try:
    peft.save_adapter(path, run_.model, params, base=config.model.path)
  except ValueError as refusal:
    alone = f"not written ({refusal})"
  dtype = config.export_dtype or config.model.param_dtype
  _, lost, worst = merge.merge(params, run_.model.lora, dtype=dtype)
  where = f", at worst of {worst}" if worst else ""
  return (
    f"{path}: {alone}. Rounded to {dtype} the merged model loses "
    f"{lost:.2g} of what they do{where}."
  )


def export_run(
  config: Config, run_: Setup, params: trees.Tree, path: Path
) -> export.Evidence:
  """Writes and verifies a run's model as its config says."""
  return export.save_pretrained(
    path,
    run_.model,
    params,
    run_.tokenizer,
    dtype=config.export_dtype or config.model.param_dtype,
    options=make_render_options(config),
    shardings=lambda shapes: sharding.param_shardings(shapes, run_.mesh),
  )
