"""Data of extreme sizes, encoded by the demo's tokenizer: time and memory.

    PYTHONPATH=. python tools/dev/stress_data.py many_rows --size=5000000
    PYTHONPATH=. python tools/dev/stress_data.py full_disk      (as root)

    many_rows   SIZE rows of a few tokens
    many_files  SIZE files of a row each, named by one glob
    long_row    a row of SIZE characters
    one_line    a .json array of SIZE bytes on one line
    full_disk   a tmpfs of SIZE bytes that is full at every phase of a build

Prints the outcome, the seconds and the peak of resident memory of the process
and of its workers.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
from pathlib import Path
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.store import build
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
folder, rows, cache, length = sys.argv[1:]
try:
  store = build.build(rows, load_tokenizer(Path(folder)), RenderOptions(),
                      directory=cache, max_length=int(length))
except (ValueError, OSError) as error:
  sys.exit(f"error: {error}")
print(f"{len(store.index):,} examples, {int(store.lengths.sum()):,} tokens")
"""


def row(number: int) -> str:
  return json.dumps({"prompt": f"{number}?", "completion": "Yes."})


def write(kind: str, folder: Path, size: int) -> str:
  """Writes the data; returns what names them."""
  path = folder / "rows.jsonl"
  if kind == "many_files":
    for number in range(size):
      (folder / f"{number:06}.jsonl").write_text(row(number) + "\n")
    return str(folder / "*.jsonl")
  if kind == "long_row":
    text = "All that glitters is not gold. " * (size // 31)
    path.write_text(json.dumps({"prompt": "Say.", "completion": text}) + "\n")
    return str(path)
  if kind == "one_line":
    path = folder / "rows.json"
    with path.open("w") as file:
      file.write("[")
      number = 0
      while file.tell() < size:
        file.write((", " if number else "") + row(number))
        number += 1
      file.write("]")
    return str(path)
  with path.open("w") as file:
    file.writelines(row(number) + "\n" for number in range(size))
  return str(path)


def encode(rows: str, cache: Path, length: int) -> None:
  """Builds a store in a process of its own; prints what came of it."""
  begin = time.perf_counter()
  done = subprocess.run(
    [sys.executable, "-c", BUILD, str(ROOT / "sft_jax" / "demo" / "base"),
     rows, str(cache), str(length)],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  last = (done.stdout + done.stderr).strip().splitlines()[-1:]
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
  print(
    f"exit {done.returncode} in {time.perf_counter() - begin:.0f} s, largest "
    f"process {peak:.2f} GiB: {' '.join(last)}",
    flush=True,
  )


def full_disk(folder: Path, size: int) -> None:
  """Gives the cache ever more room, from none up to what it needs."""
  rows = write("many_rows", folder, 20_000)
  disk = folder / "disk"
  disk.mkdir()
  for room in range(1, 40):
    bytes_ = room * size
    subprocess.run(
      ["mount", "-t", "tmpfs", "-o", f"size={bytes_}", "none", str(disk)],
      check=True,
    )
    try:
      print(f"{bytes_:,} bytes: ", end="")
      encode(rows, disk / "cache", 256)
      left = [one for one in disk.rglob("*") if one.is_file()]
      print(f"  left: {len(left)} files")
      done = any(one.name == "meta.json" for one in left)
    finally:
      subprocess.run(["umount", str(disk)], check=True)
    if done:
      return


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  sizes = {
    "many_rows": 5_000_000,
    "many_files": 100_000,
    "long_row": 4_000_000,
    "one_line": 2 * 10**9,
    "full_disk": 1 << 17,
  }
  parser.add_argument("kind", choices=sizes)
  parser.add_argument("--size", type=int)
  parser.add_argument("--length", type=int, default=256, help="max_length")
  args = parser.parse_args()
  size = args.size or sizes[args.kind]
  with tempfile.TemporaryDirectory() as made:
    folder = Path(made)
    if args.kind == "full_disk":
      full_disk(folder, size)
      return
    (folder / "rows").mkdir()
    rows = write(args.kind, folder / "rows", size)
    encode(rows, folder / "cache", args.length)


if __name__ == "__main__":
  main()
