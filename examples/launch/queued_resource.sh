#!/usr/bin/env bash
# A TPU slice that starts the run by itself on every host, without ssh:
#   PROJECT=p ZONE=us-east5-a BUCKET=b examples/launch/queued_resource.sh NAME v5p-128
set -euo pipefail
startup=$(mktemp)
cat > "$startup" <<END
#!/usr/bin/env bash
python3 -m pip install 'sft_jax[tpu,remote]'
sft-jax --config.model.path=gs://$BUCKET/model \
  --config.data.train=gs://$BUCKET/rows/train.jsonl \
  --config.workdir=gs://$BUCKET/runs/$1 \
  --config.mesh.data=1 --config.mesh.fsdp=-1
END
gcloud compute tpus queued-resources create "$1" --node-id="$1" \
  --project="$PROJECT" --zone="$ZONE" --accelerator-type="$2" \
  --runtime-version=v2-alpha-tpuv5 --scopes=cloud-platform \
  --metadata-from-file=startup-script="$startup"
