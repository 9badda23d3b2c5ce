#!/bin/bash
# The table of one GPU in at most 9 minutes, what is claimed first.
#
#     tools/bench/gpu_table.sh OUT.jsonl [--tiny]
#
# First which attention keeps the laws on this card and how fast each is; then
# steps of ours and of the best PyTorch beside it in turn, their tokens/s, MFU,
# and peak memory beside the planned. Each result is a line of OUT.jsonl as soon
# as it is there, so a run that is cut counts. TORCH_PYTHON: a Python with torch,
# transformers and peft (default: this one). SECONDS_IN_ALL: 530. With --tiny in
# small, on a CPU.
set -u
out=$(realpath -m "${1:?expected a file for the lines}")
shift
cd "$(dirname "$0")/../.." || exit
end=$(($(date +%s) + ${SECONDS_IN_ALL:-530}))

table() { # The common arguments, then MODEL METHOD and the rest.
  local model=$1 method=$2
  shift 2
  python tools/bench/bench_gpu.py --json "$out" --until "$end" \
    --torch_python "${TORCH_PYTHON-$(command -v python)}" \
    --models "$model" --methods "$method" "$@"
}

table 0.6B full --laws --seq_len 8192 "$@"
table 0.6B full --seq_len 8192 --rows 8 4 2 "$@"
table 1B full "$@"
table 8B lora --rows 8 4 2 "$@"
table 8B full --rows 4 2 1 --documents 4096 184 "$@"
table 8B lora --laws "$@"
echo "$(wc -l <"$out") lines in $out, $((end - $(date +%s))) seconds left"
