"""A whole run: measure, train, measure again, export, report.

`train` takes what a caller gives; `run` is the page of phases.
`build/build.py` builds what they work with, `loop.py` takes the steps,
`checkpointing/resume.py` finds where a run stopped.
"""

import errno
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import optax

from sft_jax.checkpointing import export, resume
from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.common import compile_cache, trees
from sft_jax.common.buckets import remote_workdir
from sft_jax.common.workdir import Incidents, find_json, write_json
from sft_jax.data.sources import MemoryRows
from sft_jax.evals import suite as evaluation
from sft_jax.reporting import (
  final_summary,
  metrics,
  terminal,
  throughput,
  trackers,
)
from sft_jax.step.loss import Loss
from sft_jax.step.train_step import TrainState, model_params
from sft_jax.training import config_check, loop, selfcheck, start_page
from sft_jax.training.build import (
  data,
  evals,
  host_consistency,
  measuring,
  outputs,
)
from sft_jax.training.build import step as setup_step
from sft_jax.training.build.build import BuiltRun, build_run
from sft_jax.training.build.data import Config, Own
from sft_jax.training.interrupts import StopRequest
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
  extend: str = "",
  dry_run: bool = False,
  command: str = "",
) -> Result:
  """Trains as the config says, in `config.workdir`; resumes what is there.

  Before and after training the model is measured (behaviors, held-out loss,
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
    extend: 'constant', 'rewarm' or 'stretch': the config may have more epochs
      or steps than the run in the workdir, and so its schedule continues; see
      `training.build.step.schedule`.
    dry_run: shows the start page and stops; nothing is written but encoded
      rows, and the result holds neither metrics nor parameters.
    command: what was typed to get here, for the report.

  Raises:
    ValueError: anything a config, a file or a row can get wrong.
    FloatingPointError: the loss was not finite, or jumped; names the step.
    OSError: what cannot be read or written; no step that was saved is lost.
    interrupts.Stopped: SIGTERM or Ctrl-C; the same call continues.
  """
  in_memory = lambda x: None if x is None else MemoryRows(x)
  own = Own(in_memory(rows), in_memory(eval_rows), loss, optimizer, on_record)
  config = config.copy_and_resolve_references()
  if own.rows is not None:
    config.data.train = "rows in memory"
    for name in ("behaviors", "knowledge", "general_text"):
      if config.eval[name] == "auto":  # Beside files of rows; there are none.
        config.eval[name] = ""
  config_check.check(config)
  workdir = remote_workdir.folder(config.workdir)
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
    remote_workdir.opened(config.workdir, workdir),
    compile_cache.opened(config.compile_cache, session.log),
  ):
    if dry_run:
      built = _build(session)
      start_page.show(built, start_page.facts(config, built, 0), session.out)
      return Result({}, {}, workdir)
    try:
      return run(session, force, extend, command)
    except OSError as error:
      if error.errno not in _FULL:
        raise
      # The system says of writes no place, of copies where from, too.
      place = error.filename2 or error.filename or workdir
      raise OSError(
        f"{place}: {error.strerror}, expected a disk with room. Make room, and "
        "run the same command again."
      ) from error


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run(session: Session, force: bool, extend: str, command: str) -> Result:
  """The phases of a run, one after the other."""
  config, workdir = session.config, session.workdir
  checkpoints = outputs.open_checkpoints(config, workdir, runs=True)
  with closing(checkpoints):
    early_changes = _check(session, checkpoints, force, extend)
    built = _build(session)
    resumed = _resume(session, built, checkpoints, early_changes, force, extend)
    if extend:
      resumed = _extended(session, built, resumed)
    _write_start(session, built, resumed, command)
    result = find_json(workdir / "result.json")
    done = loop.is_finished(config, built, resumed) and not resumed.changes
    if done and result is not None:
      return _report_finished(session, result, resumed.state, checkpoints)
    step = int(resumed.state.step)
    params = model_params(resumed.state)
    selfcheck.check_at_start(config, built, params, session.log)
    suite = evals.make_suite(config, built, terminal.TaskProgress(session.out))
    before = measuring.before(session, built, suite, params, step)
    del params
    try:
      state = loop.train_steps(session, built, resumed, checkpoints, suite)
    except FloatingPointError:
      final_summary.write_report(workdir)  # The page to look at first.
      raise
    del resumed  # Its state was donated.
    state, early_stop = _choose(session, built, checkpoints, state)
  params = model_params(state)
  del state  # The moments make room: for the base, for what is exported.
  after, params = measuring.after(session, built, suite, params, before)
  result = evaluation.compare(before, after) | early_stop
  result["samples"] = result["samples"] or evals.paired_samples(before, after)
  final_summary.show_result(session.out, result, config.eval.samples)
  if config.export:
    result["export"] = _export(session, built, params)._asdict()
    if config.export_check:
      places = workdir / "export", workdir / "adapter"
      verdicts = outputs.check_served(config, built, params, *places)
      result["served"] = [verdict._asdict() for verdict in verdicts]
      for verdict in verdicts:
        session.log(str(verdict))
  if lost := throughput.lost_to_interruptions(session.incidents.read()):
    result["interruptions"] = lost._asdict()
    session.log(f"Lost to interruptions: {lost}.")
  result["time"] = session.clock.account()
  session.log(final_summary.time_line(result["time"]))
  path = workdir / "metrics.jsonl"  # Without a common disk the first has it.
  records = metrics.read_jsonl(path) if path.exists() else []
  if line := final_summary.stop_line(records):
    session.log(line)
  final_summary.write_report(workdir, result)
  write_json(workdir / "result.json", result)
  final_summary.show_places(session.out, workdir, config)
  return Result(result, params, workdir)


def _check(
  session: Session, checkpoints: Checkpoints, force: bool, extend: str
) -> list[str]:
  """Refuses what can be refused before anything is loaded.

  Returns how the config differs from that of the run in the workdir.
  """
  config, workdir = session.config, session.workdir
  changes = []
  if old := resume.saved_config(checkpoints, workdir):
    data.pin(config, old)
    if extend:
      _extend(config, old, max(checkpoints.steps(), default=0), extend)
    changes = resume.config_changes(
      old, config.to_dict(), allowed=resume.LENGTH if extend else ()
    )
  elif extend:
    raise ValueError(
      f"--extend: got {workdir}, which holds no run, expected one to extend. "
      "Train without --extend first."
    )
  if not force:
    resume.check_same_config(changes, str(workdir))
  trackers.check(config.log.writers)
  host_consistency.check_config(config)
  if folder := compile_cache.writable_by_others(workdir / "checkpoints"):
    session.log(
      f"warning: other users can write in {folder}, so what this run resumes "
      f"from could be changed. Take the right from them: chmod go-w {folder}"
    )
  return changes


def _extend(config: Config, old: dict[str, Any], step: int, how: str) -> None:
  """Notes in the config where the run is extended, unless it was already.

  Raises:
    ValueError: nothing to extend, or nothing to extend it by.
  """
  longer = any(config[key] != old[key] for key in ("steps", "epochs"))
  if not longer and config.optim.extended:
    return  # The same command again: the extension was begun.
  if not (longer and step):
    raise ValueError(
      f"--extend: got steps={config.steps}, epochs={config.epochs} for a run "
      f"of {old['steps']} and {old['epochs']} at step {step}, expected more "
      "than those, and a checkpoint. Raise epochs or steps."
    )
  config.optim.extended = (*config.optim.extended, (step, how))
  config_check.check(config)


def _extended(
  session: Session, built: BuiltRun, resumed: resume.Resumed
) -> resume.Resumed:
  """Logs how an extended run continues; its patience begins again.

  Raises:
    ValueError: the run would not become longer.
  """
  begin, how = session.config.optim.extended[-1]
  step, end = int(resumed.state.step), built.num_steps
  if end <= begin:
    raise ValueError(
      f"--extend: got {end} steps for a run at step {begin}, expected more. "
      "Raise epochs or steps."
    )
  if step > begin:
    return resumed
  rate: Any = setup_step.schedule(session.config, end)
  says = {
    "constant": "stays",
    "rewarm": "warms up again and falls",
    "stretch": f"is that of a run of {end} steps",
  }
  line = (
    f"Extended at step {begin} to {end}: the learning rate {says[how]}, "
    f"{float(rate(begin - 1)):.2g} -> {float(rate(begin)):.2g} -> "
    f"{float(rate(end - 1)):.2g}."
  )
  session.log(line)
  session.incidents.add("extended", begin, line)
  return resumed._replace(loop={**resumed.loop, "since_best": 0})


def _build(session: Session) -> BuiltRun:
  """Data, model, state and step."""
  with session.clock.on("start"):
    built = build_run(session.config, session.log, session.own)
    if built.suggestion:  # Kept: a resumed run logs it no more.
      session.incidents.add("learning rate", 0, str(built.suggestion))
    host_consistency.check_data(built)
  return built


def _resume(
  session: Session,
  built: BuiltRun,
  checkpoints: Checkpoints,
  early_changes: list[str],
  force: bool,
  extend: str,
) -> resume.Resumed:
  """The newest state; logs and records every change that was forced."""
  checkpoints.remove_unfinished()
  origin = outputs.find_origin(session.config, built, session.own)
  resumed = resume.restore(
    *(checkpoints, built.state, origin, session.reject),
    force=force,
    allowed=resume.LENGTH if extend else (),
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
  session: Session, built: BuiltRun, resumed: resume.Resumed, command: str
) -> None:
  """Shows the start page, and writes what the run is made from."""
  config, workdir, stream = session.config, session.workdir, built.stream
  write_json(workdir / "config.json", config.to_dict())
  source = {"path": config.model.path, **built.source._asdict()}
  write_json(workdir / "model.json", source | {"folder": str(source["folder"])})
  write_json(workdir / "ledger.json", stream.stats.to_json())
  names = ("fingerprint", "fingerprint_inputs")
  origin = {name: getattr(stream, name) for name in names}
  write_json(workdir / "data.json", origin)
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
  config, workdir = session.config, session.workdir
  session.log(f"{workdir} is finished. To train again, choose another workdir.")
  final_summary.show_result(session.out, result, config.eval.samples)
  final_summary.show_places(session.out, workdir, config)
  if config.eval.patience:
    state = resume.restore_best(checkpoints, state, session.reject)
  return Result(result, outputs.own_params(state), workdir)


def _choose(
  session: Session, built: BuiltRun, checkpoints: Checkpoints, state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
  """(with eval.patience the best state, else the last; {'early_stop': what
  result.json says of it}, or {} where there is nothing to say)."""
  last, patience = int(state.step), session.config.eval.patience
  if patience:
    state = resume.restore_best(checkpoints, state, session.reject)
  best = checkpoints.best()
  if best:
    session.log("Best checkpoint: step {}, {:.4g}.".format(*best))
  if not (patience and best):
    return state, {}
  stopped = last < built.num_steps
  figure = outputs.followed_metric(session.config)
  line = (
    f"{'Stopped early' if stopped else 'Trained to the end'}, after step "
    f"{last} of {built.num_steps}. The model from here on is that of step "
    f"{best[0]}, the best by {figure}."
  )
  session.log(line)
  if stopped:
    session.incidents.add("stopped early", last, line)
  early_stop = {
    "figure": figure,
    "best": best[1],
    "step": best[0],
    "last_step": last,
    "stopped": stopped,
  }
  return state, {"early_stop": early_stop}


def _export(
  session: Session, built: BuiltRun, params: trees.Tree
) -> export.Evidence:
  """Writes the model, and the adapters alone where there are some."""
  config, path = session.config, session.workdir / "export"
  session.log(f"Writing {path} ...")
  with session.clock.on("export"):
    if built.model.lora:
      folder = session.workdir / "adapter"
      session.log(outputs.save_adapters(config, built, params, folder))
    evidence = outputs.export_run(config, built, params, path)
  session.log(f"{path}: {evidence}")
  return evidence
