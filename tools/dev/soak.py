"""Kills runs at random moments, many times, and counts what is lost.

    python tools/dev/soak.py --out=/tmp/soak --trials=300              # saving
    python tools/dev/soak.py --out=/tmp/soak --trials=20 --mode=run    # all
    python tools/dev/soak.py --out=/tmp/soak --trials=300 --url=gs://bucket/soak

Each trial is a process that is killed (SIGKILL) at a random time, and that
begins with what the trial before left:

  save   restores, compares every bit with what that step must hold, then saves
         step after step. After one trial in four, a random bit of the newest
         checkpoint is flipped, or a file of it cut short or deleted.
  run    trains (a tiny model, made here), from loading to export. When it got
         through, records and export are compared with those of a run that was
         never disturbed, and the next trial begins anew.

With --url trials of saving save to a bucket, under its lease; nothing is
damaged there. `gs://tests` alone starts an emulator.

A *bad restore* is a state, record or export that is not the undisturbed one's.
A *lost step* was committed (its folder had its name when the process was
killed, and was not damaged by us), and was not restored. Outcomes are appended
to OUT/trials-MODE.jsonl, so that counting goes on where it stopped; the exit
code is 1 if anything was bad or lost.

Trials are forked from this process, which has imported everything and asked
for no device: then JAX has no threads that a fork would lose.
"""

import argparse
import atexit
import collections
import contextlib
import functools
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

# Before NumPy is imported: its threads would not survive a fork.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sft_jax import train
from sft_jax.checkpointing.manager import Checkpoints
from sft_jax.commands import command
from sft_jax.common.buckets import remote_workdir, storage
from sft_jax.reporting.metrics import read_jsonl

_SHAPES = {"w": (128, 96), "m": (64,), "count": ()}


def expected(step: int) -> dict[str, jax.Array]:
  """What the checkpoint of a step must hold, bit for bit."""
  rng = np.random.default_rng(step)
  arrays = {name: rng.random(shape, "f4") for name, shape in _SHAPES.items()}
  return {
    "w": jnp.asarray(arrays["w"]),
    "m": jnp.asarray(arrays["m"], jnp.bfloat16),
    "count": jnp.asarray(step, jnp.int32),
  }


def save_in_bucket(folder: Path, url: str, told: Any) -> None:
  """The same of a bucket, by a machine that has nothing of the run."""
  os.environ["XDG_CACHE_HOME"] = str(folder / f"machine_{os.getpid()}")
  local = remote_workdir.folder(url)
  with remote_workdir.opened(url, local):
    there: Any = epath.Path(storage.join(url, "checkpoints"))
    save_on(there, told)


def save_on(folder: Path, told: Any) -> None:
  """The life of a trial of saving: restores, then saves until it is killed."""
  checkpoints = Checkpoints(folder, keep=2, keep_every=50)
  checkpoints.remove_unfinished()
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    expected(0),
  )
  rejected = []
  restored = checkpoints.restore(shapes, rejected.append)
  step, good = 0, True
  if restored is not None:
    step, should = restored.step, expected(restored.step)
    same = jax.tree.map(
      lambda x, y: bool((x == y).all()), restored.state, should
    )
    good = all(jax.tree.leaves(same)) and restored.meta == {"of": step}
  told.write(
    json.dumps({"restored": step, "good": good, "rejected": len(rejected)})
    + "\n"
  )
  told.flush()
  while True:
    step += 1
    checkpoints.check()
    checkpoints.save(step, expected(step), {"of": step})
    told.write("another\n")
    told.flush()


def in_child(folder: Path, act: Callable[[], Any]) -> int:
  """Forks, with what is printed in a file; returns the process."""
  sys.stdout.flush()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # JAX and Python warn of any fork.
    child = os.fork()
  if child:
    return child
  code = 1
  try:
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    act()
    code = 0
  except BaseException:
    traceback.print_exc()
  finally:
    os._exit(code)


@functools.cache
def _lister() -> subprocess.Popen:
  """Lists buckets, in another process: a client's threads survive no fork."""
  ask = (
    "import sys; from sft_jax.common.buckets import storage\n"
    "for url in sys.stdin: print(*storage.list_objects(url[:-1]), flush=True)"
  )
  pipe = subprocess.PIPE
  command = [sys.executable, "-c", ask]
  asked = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
  atexit.register(asked.kill)
  return asked


def committed(folder: Path, url: str = "") -> int:
  """The newest step whose checkpoint has its name; in a bucket its marker."""
  if url:
    asked = _lister()
    assert asked.stdin
    assert asked.stdout
    print(storage.join(url, "checkpoints"), file=asked.stdin, flush=True)
    names = asked.stdout.readline()
    steps = re.findall(r"(\d+)/commit_success.txt", names)
    return max(map(int, steps), default=0)
  names = [p.name for p in (folder / "checkpoints").glob("*")]
  return max((int(name) for name in names if name.isdigit()), default=0)


def damage(folder: Path, rng: random.Random) -> str:
  """Spoils a file of the newest checkpoint; says how."""
  newest = folder / "checkpoints" / str(committed(folder))
  files = sorted(p for p in newest.rglob("*") if p.is_file())
  if not files:
    return ""
  file, how = rng.choice(files), rng.choice(["flip", "truncate", "delete"])
  raw = bytearray(file.read_bytes())
  if how == "delete":
    file.unlink()
  elif how == "truncate":
    file.write_bytes(raw[: rng.randrange(len(raw))])
  else:
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)
  return f"{how} {file.name[:20]}"


def trial_of_saving(
  folder: Path, rng: random.Random, url: str = "", before: int | None = None
) -> dict[str, Any]:
  """One process, killed; what it restored, against what was committed.

  `before`: what the trial before said of that, where it is known.
  """
  before = committed(folder, url) if before is None else before
  mark = folder / "spoiled"
  many = len(list((folder / "checkpoints").glob("[0-9]*"))) > 1
  if many and not mark.exists() and rng.random() < 0.25:
    mark.write_text(damage(folder, rng))
  # Until somebody restores, it stays so.
  spoiled = mark.read_text() if mark.exists() else ""
  read, write = os.pipe()
  act = functools.partial(save_on, folder / "checkpoints")
  if url:
    act = functools.partial(save_in_bucket, folder, url)
  child = in_child(folder, lambda: act(os.fdopen(write, "w")))
  os.close(write)
  with os.fdopen(read) as pipe:
    # One trial in ten dies before it has restored, the others in one of their
    # first saves, at a moment of about as long as the last one took.
    line, seconds = "" if rng.random() < 0.1 else pipe.readline(), 1.0
    for _ in range(rng.randint(1, 3) if line else 0):
      begin = time.monotonic()
      pipe.readline()
      seconds = time.monotonic() - begin
    time.sleep(rng.uniform(0, 1.5 * seconds))
    os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    line = line or pipe.readline()
  outcome = {
    "spoiled": spoiled,
    "before": before,
    "after": committed(folder, url),
  }
  for machine in folder.glob("machine_*"):
    shutil.rmtree(machine)
  if ended != -signal.SIGKILL:
    return {**outcome, "bad": True, "why": f"ended with {ended}"}
  if not line:
    return {**outcome, "bad": False, "lost": False, "early": True}
  told = json.loads(line)
  mark.unlink(missing_ok=True)
  # What was spoiled by us may be found, and cost a step; no more.
  lost = told["restored"] < before and not spoiled
  return {**outcome, **told, "bad": not told["good"], "lost": lost}


def trial_of_runs(
  folder: Path, rng: random.Random, make: Callable[[Path], Any]
) -> dict[str, Any]:
  """One training process, killed; then what its successor says of it."""
  killed, whole = folder / "killed", folder / "whole"
  go = lambda where: in_child(folder, lambda: train(make(where)))
  if not (whole / "result.json").exists():
    shutil.rmtree(whole, ignore_errors=True)
    os.waitpid(go(whole), 0)
    # Once more, with what was compiled: as long as the others may live.
    shutil.rmtree(whole)
    started = time.monotonic()
    os.waitpid(go(whole), 0)
    (folder / "seconds").write_text(str(time.monotonic() - started))
  within = 1.1 * float((folder / "seconds").read_text())
  incidents = killed / "incidents.jsonl"
  number = len(read_jsonl(incidents)) if incidents.exists() else 0
  before = committed(killed)
  child = go(killed)
  end = time.monotonic() + rng.uniform(0, within)
  while time.monotonic() < end and not os.waitid(
    os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
  ):
    time.sleep(0.02)
  with contextlib.suppress(ProcessLookupError):
    os.kill(child, signal.SIGKILL)
  ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  after = committed(killed)
  new = read_jsonl(incidents)[number:] if incidents.exists() else []
  resumed = [line["step"] for line in new if line["kind"] == "resumed"]
  outcome = {
    "before": before,
    "after": after,
    "bad": ended not in (0, -signal.SIGKILL)
    or any(line["kind"] == "rejected" for line in new),
    "lost": bool(resumed) and resumed[0] < before,
    "finished": ended == 0,
  }
  if ended == 0:
    outcome["bad"] |= not same_run(killed, whole)
    shutil.rmtree(killed)
  return outcome


def same_run(one: Path, other: Path) -> bool:
  """Two runs recorded and exported the same."""

  def left(folder: Path) -> Any:
    clock = ("time/", "speed/", "memory/")
    rows = [
      {k: v for k, v in row.items() if not k.startswith(clock)}
      for row in read_jsonl(folder / "metrics.jsonl")
    ]
    return rows, (folder / "export" / "model.safetensors").read_bytes()

  return left(one) == left(other)


def tiny_run(folder: Path) -> Callable[[Path], Any]:
  """Makes configs of a tiny run."""
  from configs import base  # The demo's data and model.

  def make(workdir: Path) -> Any:
    config = cast(Any, base.get_config())
    config.workdir = str(workdir)
    config.data.cache_dir = str(workdir / "cache")
    config.data.train = str(folder / "rows.jsonl")
    config.steps, config.batch_size, config.data.seq_len = 12, 2, 64
    config.optim.warmup_steps = 2
    config.eval.behaviors = config.eval.general_text = ""
    config.eval.every, config.log.every, config.checkpoint.every = 4, 1, 2
    config.data.workers = 1
    return config

  rows = [
    {"instruction": f"Say {i}.", "output": f"{i}, {i} and {i * i}."}
    for i in range(60)
  ]
  (folder / "rows.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rows)
  )
  return make


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", required=True, help="a folder for the trials")
  parser.add_argument("--trials", type=int, default=300, help="in all")
  parser.add_argument("--mode", choices=["save", "run"], default="save")
  parser.add_argument("--url", default="", help="of a bucket, to save there")
  parser.add_argument("--seconds", type=float, default=1e9, help="at most")
  args = parser.parse_args()
  name = args.url.partition(":")[0] or args.mode
  folder = Path(args.out) / name
  folder.mkdir(parents=True, exist_ok=True)
  # What was compiled once is not compiled in every trial.
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  record = Path(args.out) / f"trials-{name}.jsonl"
  done = read_jsonl(record) if record.exists() else []
  if args.url == "gs://tests":  # Its objects end with it.
    sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
    buckets = importlib.import_module("buckets")
    for left in folder.glob("env.json"):
      left.unlink()
    emulator = buckets.Buckets(folder)
    atexit.register(emulator.close)
    os.environ.update(emulator.env)
    args.url = f"gs://{buckets.BUCKET}/soak"
  act: Any = functools.partial(trial_of_saving, folder, url=args.url)
  if args.mode == "run":
    act = functools.partial(trial_of_runs, folder, make=tiny_run(folder))
  end = time.monotonic() + args.seconds
  while len(done) < args.trials and time.monotonic() < end:
    # Seeded by the trial: a count that is taken up again draws anew.
    outcome = act(rng=random.Random(len(done)))
    if args.url:
      act = functools.partial(act, before=outcome["after"])
    done.append({"trial": len(done), **outcome})
    with record.open("a") as file:
      file.write(json.dumps(done[-1]) + "\n")
    if outcome["bad"] or outcome["lost"]:
      print(done[-1], flush=True)
  sys.exit(report(done))


def report(done: list[dict[str, Any]]) -> int:
  """Prints the counts; 1 if anything was bad or lost."""
  counts = collections.Counter(
    trials=len(done),
    spoiled=sum(bool(x.get("spoiled")) for x in done),
    rejected=sum(bool(x.get("rejected")) for x in done),
    killed_before_restoring=sum(bool(x.get("early")) for x in done),
    steps=sum(max(0, x["after"] - x["before"]) for x in done),
    finished=sum(bool(x.get("finished")) for x in done),
    bad_restores=sum(bool(x["bad"]) for x in done),
    lost_steps=sum(bool(x.get("lost")) for x in done),
  )
  for name, count in counts.items():
    print(f"{name.replace('_', ' '):24} {count}")
  return int(counts["bad_restores"] + counts["lost_steps"] > 0)


if __name__ == "__main__":
  command.run(main)
