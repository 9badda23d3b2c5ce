"""A whole run: measure, train, measure again, export, report.

`train` takes what a caller gives; `run` is the page of phases.
`build/build.py` builds what they work with, `loop.py` takes the steps,
`checkpointing/resume.py` finds where a run stopped.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import optax

from sft_jax.checkpointing import export
from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.checkpointing.resume import (
  Resumed,
  check_same_config,
  config_changes,
  restore,
  restore_best,
  saved_config,
)
from sft_jax.common import compile_cache, sharding, trees
from sft_jax.common.workdir import (
  Incidents,
  find_json,
  locked,
  write_json,
  write_jsonl,
)
from sft_jax.data.sources import MemoryRows
from sft_jax.evals import suite as evaluation
from sft_jax.models.hf import peft
from sft_jax.models.lora import base_model, merge
from sft_jax.reporting import (
  final_summary,
  metrics,
  terminal,
  throughput,
  trackers,
)
from sft_jax.step.loss import Loss
from sft_jax.step.train_step import TrainState
from sft_jax.training import config_check, selfcheck, start_page
from sft_jax.training.build import evals, host_consistency, model
from sft_jax.training.build.build import BuiltRun, build_run
from sft_jax.training.build.data import (
  Config,
  Own,
  make_render_options,
  pin_date,
)
from sft_jax.training.interrupts import StopRequest
from sft_jax.training.loop import (
  find_origin,
  followed_metric,
  is_finished,
  train_steps,
)
from sft_jax.training.session import Session


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


def train(
  config: Config,
  *,
  rows: Iterable[Any] | None = None,
  eval_rows: Iterable[Any] | None = None,
  loss: Loss | None = None,
  optimizer: optax.GradientTransformation | None = None,
  on_record: Callable[[dict[str, Any]], Any] | None = None,
  force: bool = False,
  dry_run: bool = False,
  command: str = "",
) -> Result:
  """Trains as the config says, in `config.workdir`; resumes what is there.

  Before and after training the model is measured (behaviours, held-out loss,
  perplexity on general text). A finished workdir is reported, not rerun.

  Args:
    config: see configs/base.py and `sft_jax.default_config`.
    rows: dicts or Conversations to train on, in place of data.train; a run
      knows them by their content.
    eval_rows: held-out ones, in place of data.eval.
    loss: minimized in place of config.loss; see `step.loss.Loss`.
    optimizer: any optax transformation, in place of config.optim; it contains
      its own learning rate.
    on_record: called once for each step that is recorded (log.every), with
      its metrics and 'step' as a plain dict.
    force: continues in a workdir of another config or other data, and records
      the change in incidents.jsonl.
    dry_run: shows the start page and stops; nothing is written but encoded
      rows, and the result holds neither metrics nor parameters.
    command: what was typed to get here, for the report.

  Raises:
    ValueError: anything a config, a file or a row can get wrong.
    FloatingPointError: the loss was not finite, or jumped; names the step.
    OSError: what cannot be read or written; no step that was saved is lost.
    interrupts.Stopped: SIGTERM or Ctrl-C; the same call continues.
  """
  own = Own(
    rows=None if rows is None else MemoryRows(rows),
    eval_rows=None if eval_rows is None else MemoryRows(eval_rows),
    loss=loss,
    optimizer=optimizer,
    on_record=on_record,
  )
  config = _with_own(config, own)
  config_check.check(config)
  workdir = Path(config.workdir)
  session = Session(
    config=config,
    workdir=workdir,
    out=terminal.console(),
    messages=[],
    clock=throughput.Clock(),
    incidents=Incidents(workdir),
    stop=StopRequest(),
    own=own,
  )
  with (
    session.stop,
    locked(workdir),
    compile_cache.opened(config.compile_cache, session.log),
  ):
    if dry_run:
      built = _build(session)
      start_page.show(built, start_page.facts(config, built, 0), session.out)
      return Result({}, {}, workdir)
    return run(session, force, command)


def run(session: Session, force: bool, command: str) -> Result:
  """The phases of a run, one after the other."""
  checkpoints = open_checkpoints(session.config, session.workdir)
  with closing(checkpoints):
    early_changes = _check(session, checkpoints, force)
    built = _build(session)
    resumed = _resume(session, built, checkpoints, early_changes, force)
    _write_start(session, built, resumed, command)
    finished = is_finished(session.config, built, resumed)
    result = find_json(_result_path(session))
    if finished and not resumed.changes and result is not None:
      return _report_finished(session, result, resumed.state, checkpoints)
    if step := int(resumed.state.step):
      session.incidents.add("resumed", step, f"at step {step}")
    selfcheck.check_at_start(
      session.config, built, _params(resumed.state), session.log
    )
    suite = evals.make_suite(
      session.config, built, terminal.TaskProgress(session.out)
    )
    before = _measure_before(session, built, suite, resumed.state)
    state = _train(session, built, resumed, checkpoints, suite)
    del resumed  # Its state was donated.
    state, early_stop = _choose(session, built, checkpoints, state)
  params = _params(state)
  del state  # The moments make room: for the base, for what is exported.
  after, params = _measure_after(session, built, suite, params, before)
  result = _compare(session, before, after, early_stop)
  if session.config.export:
    result["export"] = _export(session, built, params)._asdict()
  result["time"] = session.clock.account()
  session.log(final_summary.time_line(result["time"]))
  records = metrics.read_jsonl(session.workdir / "metrics.jsonl")
  if line := final_summary.stop_line(records):
    session.log(line)
  final_summary.write_report(session.workdir, result)
  write_json(_result_path(session), result)
  final_summary.show_places(session.out, session.workdir, session.config)
  return Result(result, params, session.workdir)


def _with_own(config: Config, own: Own) -> Config:
  """The config without the files that rows in memory replace."""
  config = config.copy_and_resolve_references()
  if own.rows is not None:
    config.data.train = "rows in memory"
    for name in ("behaviours", "knowledge", "general_text"):
      if config.eval[name] == "auto":  # Beside files of rows; there are none.
        config.eval[name] = ""
  return config


def _check(
  session: Session, checkpoints: Checkpoints, force: bool
) -> list[str]:
  """Refuses what can be refused before anything is loaded.

  Returns:
    How the config differs from that of the run in the workdir.
  """
  config, workdir = session.config, session.workdir
  changes = []
  if old := saved_config(checkpoints, workdir):
    pin_date(config, old)
    changes = config_changes(old, config.to_dict())
  if not force:
    check_same_config(changes, workdir)
  trackers.check(config.log.writers)
  host_consistency.check_config(config)
  if folder := compile_cache.writable_by_others(workdir / "checkpoints"):
    session.log(
      f"warning: other users can write in {folder}, so what this run resumes "
      f"from could be changed. Take the right from them: chmod go-w {folder}"
    )
  return changes


def _build(session: Session) -> BuiltRun:
  """Data, model, state and step."""
  with session.clock.on("start"):
    built = build_run(session.config, session.log, session.own)
    host_consistency.check_data(built)
  return built


def _resume(
  session: Session,
  built: BuiltRun,
  checkpoints: Checkpoints,
  early_changes: list[str],
  force: bool,
) -> Resumed:
  """The newest state; logs and records every change that was forced."""
  checkpoints.remove_unfinished()
  resumed = restore(
    checkpoints,
    built.state,
    find_origin(session.config, built, session.own),
    session.reject,
    force=force,
  )
  step = int(resumed.state.step)
  if not step:  # There was no checkpoint to compare with.
    resumed = resumed._replace(changes=early_changes)
  for line in resumed.changes:
    session.log(f"Forced: {line}")
    session.incidents.add("forced", step, line)
  if step:
    session.log(f"Resuming after step {step}.")
  return resumed


def _write_start(
  session: Session, built: BuiltRun, resumed: Resumed, command: str
) -> None:
  """Shows the start page, and writes what the run is made from."""
  config, workdir = session.config, session.workdir
  write_json(workdir / "config.json", config.to_dict())
  source = {"path": config.model.path, **built.source._asdict()}
  write_json(workdir / "model.json", source | {"folder": str(source["folder"])})
  write_json(workdir / "ledger.json", built.stream.stats.to_json())
  write_json(
    workdir / "data.json",
    {
      "fingerprint": built.stream.fingerprint,
      "fingerprint_inputs": built.stream.fingerprint_inputs,
    },
  )
  facts = start_page.facts(config, built, int(resumed.state.step))
  start_page.show(built, facts, session.out)
  start_page.write(
    workdir, built, facts, messages=session.messages, command=command
  )


def _report_finished(
  session: Session,
  result: dict[str, Any],
  state: TrainState,
  checkpoints: Checkpoints,
) -> Result:
  """The result of a run that has nothing left to do."""
  session.log(
    f"{session.workdir} is finished. To train again, choose another workdir."
  )
  final_summary.show_result(session.out, result, session.config.eval.samples)
  final_summary.show_places(session.out, session.workdir, session.config)
  if session.config.eval.patience:
    state = restore_best(checkpoints, state, session.reject)
  return Result(result, own_params(state), session.workdir)


def _measure_before(
  session: Session, built: BuiltRun, suite: evaluation.Suite, state: TrainState
) -> dict[str, Any]:
  """Measures the model before training, unless that was done already."""
  path = session.workdir / "evals" / "before.json"
  inputs = evals.measured_inputs(built)
  before, step = find_json(path), int(state.step)
  if before is not None and before.get("inputs", inputs) == inputs:
    suite.measured = {
      name: (done, of)
      for name, (done, of) in before.get("measured", {}).items()
    }
    return before
  session.log("Measuring the model before training ...")
  params, config = _params(state), session.config
  if step:  # The state has been trained: the model is read again.
    _, params = model.load_model(
      _with_model(config, built), built.mesh, session.log
    )
  is_base = not (step or config.model.from_scratch or config.lora.path)
  with session.clock.on("evaluation"):
    before = suite(params, is_base=is_base and config.eval.kl)
    before |= evals.sample_replies(config, built, params)
    rows = evals.held_out_losses(built, params, suite.measured.get("held_out"))
    before["rows"] = {str(row["row"]): row["nats_per_token"] for row in rows}
  for line in suite.left_out():
    session.log(
      f"eval.max_seconds: measured here and from now on are {line}, what "
      "fits. Raise it, or set it to 0 for everything."
    )
  before["inputs"] = inputs
  write_json(path, before)
  return before


def _train(
  session: Session,
  built: BuiltRun,
  resumed: Resumed,
  checkpoints: Checkpoints,
  suite: evaluation.Suite,
) -> TrainState:
  try:
    return train_steps(session, built, resumed, checkpoints, suite)
  except FloatingPointError:
    final_summary.write_report(session.workdir)  # The page to look at first.
    raise


def _choose(
  session: Session, built: BuiltRun, checkpoints: Checkpoints, state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
  """With eval.patience the best state, else the last.

  Returns:
    The state, and what result.json says as 'early_stop', if anything.
  """
  last, patience = int(state.step), session.config.eval.patience
  if patience:
    state = restore_best(checkpoints, state, session.reject)
  best = checkpoints.best()
  if best:
    session.log("Best checkpoint: step {}, {:.4g}.".format(*best))
  if not (patience and best):
    return state, {}
  stopped = last < built.num_steps
  figure = followed_metric(session.config)
  line = (
    ("Stopped early" if stopped else "Trained to the end")
    + f", after step {last} of {built.num_steps}. The model from here on is "
    f"that of step {best[0]}, the best by {figure}."
  )
  session.log(line)
  if stopped:
    session.incidents.add("stopped early", last, line)
  return state, {
    "figure": figure,
    "best": best[1],
    "step": best[0],
    "last_step": last,
    "stopped": stopped,
  }


def _measure_after(
  session: Session,
  built: BuiltRun,
  suite: evaluation.Suite,
  params: trees.Tree,
  before: dict[str, Any],
) -> tuple[dict[str, Any], trees.Tree]:
  """(the measurement after training, the parameters without the base's)."""
  session.log("Measuring the model after training ...")
  with session.clock.on("evaluation"):
    after = suite(_beside_base(session, built, params))
    params = base_model.own(params)
    after |= evals.sample_replies(session.config, built, params)
    rows = evals.held_out_losses(
      *(built, params, suite.measured.get("held_out"), before.get("rows"))
    )
  folder = session.workdir / "evals"
  write_json(folder / "after.json", after)
  write_jsonl(folder / "held_out_rows.jsonl", rows)
  return after, params


def _beside_base(
  session: Session, built: BuiltRun, params: trees.Tree
) -> trees.Tree:
  """The parameters, with what comparing them with the base takes.

  What is missing of the base is read again from the model's folder.
  """
  config = session.config
  if (
    not config.eval.kl
    or config.model.from_scratch
    or not (built.held_out or built.general_text)
    or base_model.base_of(params, built.trained) is not None
  ):
    return params
  _, base = model.load_model(
    _with_model(config, built), built.mesh, session.log
  )
  return base_model.with_copies(params, base_model.to_copy(base, built.trained))


def _with_model(config: Config, built: BuiltRun) -> Config:
  """The config with the model's folder, whatever the model was called."""
  config = config.copy_and_resolve_references()
  config.model.path = str(built.source.folder)
  return config


def _compare(
  session: Session,
  before: dict[str, Any],
  after: dict[str, Any],
  early_stop: dict[str, Any],
) -> dict[str, Any]:
  """Shows before beside after; returns the figures of result.json."""
  result = evaluation.compare(before, after)
  if early_stop:
    result["early_stop"] = early_stop
  result["samples"] = result["samples"] or evals.paired_samples(before, after)
  final_summary.show_result(session.out, result, session.config.eval.samples)
  return result


def _export(
  session: Session, built: BuiltRun, params: trees.Tree
) -> export.Evidence:
  """Writes the model, and the adapters alone where there are some."""
  config, path = session.config, session.workdir / "export"
  session.log(f"Writing {path} ...")
  with session.clock.on("export"):
    if built.model.lora:
      folder = session.workdir / "adapter"
      session.log(save_adapters(config, built, params, folder))
    evidence = export_run(config, built, params, path)
  session.log(f"{path}: {evidence}")
  return evidence


def _result_path(session: Session) -> Path:
  return session.workdir / "result.json"


def _params(state: TrainState) -> trees.Tree:
  return trees.merge(state.params, state.frozen)


def own_params(state: TrainState) -> trees.Tree:
  """The model's parameters, trained and frozen, and no copy of the base's."""
  return base_model.own(_params(state))


def open_checkpoints(config: Config, workdir: Path) -> Checkpoints:
  """The checkpoints of a run, kept as its config says."""
  keep = config.checkpoint
  return Checkpoints(
    workdir / "checkpoints",
    keep=keep.keep,
    keep_every=keep.keep_every,
    keep_best=keep.best_is if followed_metric(config) else "",
  )


def save_adapters(
  config: Config, built: BuiltRun, params: trees.Tree, path: Path
) -> str:
  """Writes the adapters alone; says what merging them will lose.

  What PEFT has no form for (experts that were trained whole) is named and not
  written: the merged export, which follows, holds it all.
  """
  assert built.model.lora
  outcome = "the adapters alone"
  try:
    peft.save_adapter(path, built.model, params, base=config.model.path)
  except ValueError as refusal:
    outcome = f"not written ({refusal})"
  dtype = config.export_dtype or config.model.param_dtype
  _, lost, worst = merge.merge(params, built.model.lora, dtype=dtype)
  where = f", at worst of {worst}" if worst else ""
  return (
    f"{path}: {outcome}. Rounded to {dtype} the merged model loses "
    f"{lost:.2g} of what they do{where}."
  )


def export_run(
  config: Config, built: BuiltRun, params: trees.Tree, path: Path
) -> export.Evidence:
  """Writes and verifies a run's model as its config says."""
  return export.save_pretrained(
    path,
    built.model,
    params,
    built.tokenizer,
    dtype=config.export_dtype or config.model.param_dtype,
    options=make_render_options(config),
    shardings=lambda shapes: sharding.param_shardings(shapes, built.mesh),
  )
