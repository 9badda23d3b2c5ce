"""A million rows: prepared on all cores, in flat memory, and opened again.

    python tools/bench/bench_million_rows.py --shared=../shared/data \\
        --rows=1000000

Real rows are repeated in turn. Another process builds
the store, and then one more opens it; meanwhile this one adds up the memory
of the process and its workers (resident, shared pages counted each time).
"""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import bench_data
from sft_jax.commands import command

BUILD = """
import sys, time
from pathlib import Path
import sft_jax
from sft_jax.data import pipeline
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.store import build
from sft_jax.data.tokenizers import tokenizer as tokenizers
folder, rows = sys.argv[1:]
tokenizer = tokenizers.load_tokenizer(Path(folder) / "model")
begin = time.perf_counter()
store = build.build(rows, tokenizer, RenderOptions(), max_length=2048,
                    directory=Path(folder) / "cache")
built = time.perf_counter()
stream = pipeline.Stream(store, seq_len=2048, batch_size=8)
next(stream.batches())
print(f"store in {built - begin:.2f} s, first batch "
      f"{time.perf_counter() - built:.2f} s later: {len(store.lengths):,} "
      f"examples, {int(store.lengths.sum()):,} tokens, fill "
      f"{stream.fill:.2%}")
"""


def resident(process: int) -> int:
  """Bytes of a process and all that it started; 0 once it is gone."""
  total, todo = 0, [process]
  while todo:
    number = todo.pop()
    try:
      status = Path(f"/proc/{number}/statm").read_text().split()
      total += int(status[1]) * 4096
      for task in Path(f"/proc/{number}/task").iterdir():
        todo += map(int, (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
      continue  # It ended while we looked.
  return total


def run(folder: str, rows: Path) -> None:
  begin = time.perf_counter()
  process = subprocess.Popen([sys.executable, "-c", BUILD, folder, str(rows)])
  samples: list[tuple[float, int]] = []
  done = threading.Event()

  def watch() -> None:
    while not done.wait(0.5):
      samples.append((time.perf_counter() - begin, resident(process.pid)))

  watcher = threading.Thread(target=watch)
  watcher.start()
  code = process.wait()
  done.set()
  watcher.join()
  if code:
    raise ValueError(f"the build: got exit code {code}; expected 0. See above.")
  print(f"  {time.perf_counter() - begin:.1f} s with the start of Python")
  if samples:
    print(f"  resident at most {max(b for _, b in samples) / 1e9:.2f} GB")
    # Once the workers run, the second half should need no more than the first.
    for share in (0.1, 0.25, 0.5, 0.75, 0.95):
      at, size = samples[int(share * len(samples))]
      print(f"    after {at:7.1f} s {size / 1e9:.2f} GB")


def main() -> None:
  parser = bench_data.parser(__doc__)
  parser.add_argument("--rows", type=int, default=1_000_000)
  flags = parser.parse_args()
  print(bench_data.machine())
  with tempfile.TemporaryDirectory() as folder:
    bench_data.tokenizer_folder(flags.shared, Path(folder) / "model")
    rows = Path(folder) / "rows.jsonl"
    size = bench_data.write_jsonl(rows, flags.shared, flags.rows)
    print(f"{flags.rows:,} rows, {size / 1e6:,.0f} MB")
    for name in ("first start", "second start"):
      print(f"{name}:", flush=True)
      run(folder, rows)
    stored = sum(
      file.stat().st_size for file in (Path(folder) / "cache").rglob("*.*")
    )
    print(f"store: {stored / 1e6:,.0f} MB")


if __name__ == "__main__":
  command.run(main)
