"""One process of a run on every host of a Ray cluster that has accelerators.

ray job submit --working-dir . -- python examples/launch/ray_job.py \
  --config=configs/models/llama3_8b_tpu_v5p.py \
  --config.model.path=gs://BUCKET/llama3_8b \
  --config.data.train=gs://BUCKET/rows/train.jsonl \
  --config.workdir=gs://BUCKET/runs/first

The image of the hosts has sft_jax. The job ends with the highest exit code; 75
and a host that is lost continue by the same command.
"""

import subprocess
import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PORT = 8476


def train(arguments: list[str]) -> int:
  """Runs on a host, and is its process."""
  return subprocess.run(["sft-jax", *arguments], check=False).returncode


def main() -> None:
  ray.init()
  kinds = ("TPU", "GPU")
  hosts = [
    (node, kind)
    for node in sorted(ray.nodes(), key=lambda node: node["NodeID"])
    for kind in kinds
    if node["Alive"] and node["Resources"].get(kind)
  ]
  if not hosts:
    sys.exit(f"error: ray: no host has any of {kinds}. Add some.")
  address = f"{hosts[0][0]['NodeManagerAddress']}:{PORT}"
  codes = []
  for i, (node, kind) in enumerate(hosts):
    who = [f"--coordinator={address}", f"--processes={len(hosts)}"]
    options = {
      "resources": {kind: node["Resources"][kind]},
      "scheduling_strategy": NodeAffinitySchedulingStrategy(
        node["NodeID"], soft=False
      ),
      "max_retries": 0,
    }
    if kind == "GPU":  # Ray's own word for these.
      options["num_gpus"] = options.pop("resources")[kind]
    task = ray.remote(train).options(**options)
    codes.append(task.remote([*sys.argv[1:], *who, f"--process={i}"]))
  sys.exit(max(ray.get(codes)))


if __name__ == "__main__":
  main()
