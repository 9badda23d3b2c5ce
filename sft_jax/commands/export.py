"""Model folders: of a run's newest checkpoint, or of several models.

    sft-jax export --workdir=runs/demo --out=my_model
    sft-jax export --workdir=runs/demo --out=my_model --gguf=q8_0 --check
    sft-jax export --workdir=runs/demo --out=my_model --push=me/my_model

writes a verified Hugging Face folder, and a file for llama.cpp; --check has
other tools load them. --push uploads both, with a model card in OUT/README.md:
a card that is there stays, so write it by --dry-run, fill it in, and push.

    sft-jax merge --models A B C --out=merged
    sft-jax merge --method=ties --models A B --base=BASE --out=merged
    sft-jax merge --method=arithmetic --weights 0.7 --models A --base=BASE ...
    sft-jax merge --greedy=held_out.jsonl --models A B C --out=merged

Models are Hugging Face folders or PEFT folders (adapters) of one base; see
sft_jax/models/hf/merging.py for the formulas. With --greedy they are tried from
the best to the worst by their loss on these rows, and each is kept in the
average if it does not become worse (the greedy soup of arXiv 2203.05482).
Memory does not grow with the models; merge.json in OUT says what was merged.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from sft_jax.checkpointing import gguf, serving
from sft_jax.checkpointing.resume import restore
from sft_jax.commands import evaluate
from sft_jax.common import hub
from sft_jax.common.buckets import remote_workdir, storage
from sft_jax.common.workdir import read_json
from sft_jax.evals import forgetting
from sft_jax.models.hf import merging
from sft_jax.reporting import final_summary, run_files, terminal
from sft_jax.training.build import build, load_run, outputs
from sft_jax.training.build.data import make_render_options


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--workdir", required=True, help="the folder of a run")
  add("--out", required=True, help="the folder to write")
  add("--dtype", help="of the weights; as trained by default")
  add("--gguf", choices=gguf.DTYPES, help="write OUT-gguf too, for llama.cpp")
  check = "compare replies of transformers and llama.cpp with the model's, and"
  check += " the folder with what vLLM and SGLang load it by"
  add("--check", action="store_true", help=check)
  into = "a folder to copy, perhaps multimodal, with the text model's weights"
  add("--into", help=into)
  add("--push", metavar="OWNER/NAME", help="a repository of the hub")
  add("--dry-run", action="store_true", help="show what --push would upload")
  args = parser.parse_args()
  out = terminal.console()
  log = out.print
  card = storage.join(args.out, "README.md")
  if args.dry_run and not args.push:
    parser.error("--dry-run: expected --push=OWNER/NAME with it")
  # Before the work: who has no token learns it now.
  target = hub.push_target(args.push) if args.push else ""
  written = Path(card).read_text("utf-8") if Path(card).is_file() else ""
  with remote_workdir.copied(args.workdir, checkpoints=True) as copy:
    read = read_json(copy / "config.json")
    config: Any = ml_collections.ConfigDict(read, type_safe=False)
    config.workdir = args.workdir  # It may have been moved.
    checkpoints = outputs.open_checkpoints(config, copy)
    if not checkpoints.steps():
      raise ValueError(
        f"{args.workdir}/checkpoints: got no checkpoint; expected at least "
        "one. Train first, or name another workdir."
      )
    run = build.build_run(config, log)
    origin = outputs.find_origin(config, run)
    state = restore(checkpoints, run.state, origin, log).state
    checkpoints.close()
  params = outputs.own_params(state)
  if args.dtype:
    config.export_dtype = args.dtype
  if args.into:
    config.export_into = args.into
  step = int(state.step)
  log(f"Writing step {step} to {args.out} ...")
  del state  # The moments make room for the folder's parameters.
  options = make_render_options(config)

  def write(folder: Path) -> None:
    evidence = outputs.export_run(config, run, params, folder)
    log(f"{args.out}: {evidence}")
    file = None
    if args.gguf:
      file = folder.with_name(f"{folder.name}-gguf") / f"model-{args.gguf}.gguf"
      file.parent.mkdir(exist_ok=True)
      wide = gguf.write(folder, file, dtype=args.gguf)
      made = gguf.modelfile(file.name, run.tokenizer, run.model.config, options)
      (file.parent / "Modelfile").write_text(made, encoding="utf-8")
      log(f"{args.out}-gguf: {len(wide)} matrices stay in float32.")
    verdicts = []
    if args.check:
      adapter: Any = storage.join(args.workdir, "adapter")
      settings = storage.join(adapter, remote_workdir.MARKERS["adapter"])
      if storage.is_remote(adapter) and storage.exists(settings):
        adapter = storage.fetch(settings).parent
      verdicts = outputs.check_served(
        config, run, params, folder, Path(adapter), file
      )
    for verdict in verdicts:
      log(str(verdict))
    differs = [x for x in verdicts if x.state == serving.DIFFERS]
    if differs:
      checks = "; ".join(f"{x.tool}, {x.check}" for x in differs)
      raise ValueError(
        f"{args.out}: would not be served as it was trained ({checks}); "
        "expected the same everywhere. See the lines above."
      )
    if args.push:
      more = [file, file.with_name("Modelfile")] if file else []
      push(folder, more, verdicts)

  def push(
    folder: Path, more: list[Path], verdicts: list[serving.Verdict]
  ) -> None:
    if final_summary.CARD_TAG in written:
      log(f"{card}: stays as it was; remove it for one of this run.")
      text = written
    else:
      found = run_files.read(args.workdir)
      served = {"served": [verdict._asdict() for verdict in verdicts]}
      found["result"] = found.get("result", {}) | (served if verdicts else {})
      text = final_summary.model_card(found, args.push.partition("/")[2])
      log(f"{card}: its license is to be filled in.")
    (folder / "README.md").write_text(text, encoding="utf-8")
    files = [*sorted(folder.iterdir()), *more]
    sizes = {file.name: f"{file.stat().st_size:,} bytes" for file in files}
    terminal.facts(out, f"To {target}", sizes)
    if args.dry_run:
      return log("Nothing was uploaded: --dry-run.")
    title = f"Step {step} of a run of sft_jax"
    log(f"{hub.push(args.push, files, title)}: uploaded.")

  if not storage.is_remote(args.out):
    return write(Path(args.out))
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "export"
    write(path)
    storage.upload_folder(path, args.out, "config.json")
    if args.gguf:
      made = path.with_name("export-gguf")
      storage.upload_folder(made, f"{args.out}-gguf", "Modelfile")
  log(f"{args.out}: written.")


def held_out_nats(model: Path, rows: str, max_length: int) -> float:
  """Nats per trained token of a model's folder over the rows of a file."""
  asked = load_run.load(str(model))
  examples = evaluate.texts(rows, asked, asked.options, max_length)
  found = forgetting.compare_models(
    asked.model, asked.params, None, examples, batch_size=8
  )
  return float(found.nats / found.weight)


def greedy(models: Sequence[Path], rows: str, max_length: int) -> list[Path]:
  """The models whose average is best by the rows, tried from the best on."""
  log = terminal.console().print
  scores = {path: held_out_nats(path, rows, max_length) for path in models}
  first, *others = sorted(models, key=scores.__getitem__)
  kept, best = [first], scores[first]
  log(f"{first}: {best:.4f} nats per token, the first")
  with tempfile.TemporaryDirectory(prefix="sft_jax-merge-") as folder:
    for path in others:
      tried = Path(folder) / "tried"
      shutil.rmtree(tried, ignore_errors=True)
      merging.merge_folders(merging.Merge("average"), [*kept, path], tried)
      nats = held_out_nats(tried, rows, max_length)
      log(
        f"{path}: {scores[path]:.4f} alone, {nats:.4f} in the average: "
        + ("kept" if nats <= best else "left out")
      )
      if nats <= best:
        kept, best = [*kept, path], nats
  return kept


def merge(argv: Sequence[str] | None = None) -> None:
  """Makes one model of several, on the command line's arguments by default."""
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--models", required=True, nargs="+", type=Path, help="their folders")
  add("--out", required=True, type=Path, help="the folder to write")
  add("--method", choices=merging.METHODS, default="average")
  add("--base", type=Path, help="what the models were tuned from")
  add("--weights", type=float, nargs="+", default=(), help="of each; 1 each")
  add("--density", type=float, default=0.2, help="kept by ties and dare")
  add("--seed", type=int, default=0, help="of what dare drops")
  add("--greedy", help="rows to choose models by: jsonl")
  add("--max_length", type=int, default=1024, help="tokens of these rows")
  args = parser.parse_args(argv)
  models = args.models
  if args.greedy:
    if args.method != "average" or args.weights:
      raise ValueError(
        f"merge --greedy: got --method={args.method} and --weights="
        f"{args.weights}; expected the plain average. Leave them out."
      )
    models = greedy(models, args.greedy, args.max_length)
  weights = tuple(args.weights)
  choice = merging.Merge(args.method, weights, args.density, args.seed)
  merging.merge_folders(choice, models, args.out, base=args.base)
  terminal.console().print(f"{args.out}: {args.method} of {len(models)} models")
