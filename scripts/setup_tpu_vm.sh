#!/usr/bin/env bash
# Get a TPU slice, and install this checkout on every host of it.
#
#   scripts/setup_tpu_vm.sh NAME --zone ZONE --type TYPE [--spot] [--dry-run]
#
# TYPE is the cloud's name, as v5p-256 (cores) or v5e's v5litepod-256 (chips). A slice
# that is there already is kept; installing again brings every host to this commit.
# The project is gcloud's own: `gcloud config set project PROJECT`.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' scripts/setup_tpu_vm.sh >&2
  exit 2
}

name='' zone='' type='' spot='' dry_run=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --zone) zone=${2:?--zone needs a value}; shift 2 ;;
    --type) type=${2:?--type needs a value}; shift 2 ;;
    --spot) spot=yes; shift ;;
    --dry-run) dry_run=yes; shift ;;
    -*) usage ;;
    *) [[ -z $name ]] || usage; name=$1; shift ;;
  esac
done
[[ -n $name && -n $zone && -n $type ]] || usage

case $type in
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) echo "--type $type: give v4-N, v5litepod-N, v5p-N or v6e-N." >&2; exit 2 ;;
esac

run() {
  if [[ -n $dry_run ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_every_host() {
  scripts/on_every_host.sh "$name" --zone "$zone" ${dry_run:+--dry-run} -- "$@"
}
state() {
  gcloud compute tpus queued-resources describe "$name" --zone "$zone" \
    --format 'value(state.state)' 2>/dev/null || echo ABSENT
}

# 1. The slice: asked for in the queue, which gives it when there is capacity.
if [[ -n $dry_run || $(state) == ABSENT ]]; then
  run gcloud compute tpus queued-resources create "$name" --node-id "$name" \
    --zone "$zone" --accelerator-type "$type" --runtime-version "$runtime" \
    ${spot:+--spot}
fi
if [[ -z $dry_run ]]; then
  until [[ $(state) == ACTIVE ]]; do
    case $(state) in
      FAILED | SUSPENDED) echo "$name is $(state): delete it and ask again." >&2; exit 1 ;;
    esac
    echo "$name is $(state); looking again in 30 s"
    sleep 30
  done
fi

# 2. This commit, the same on every host: a run refuses hosts whose code differs.
archive=$(mktemp -d)
trap 'rm -rf "$archive"' EXIT
run git archive --format tar.gz --output "$archive/llama-jax.tar.gz" HEAD
run gcloud compute tpus tpu-vm scp "$archive/llama-jax.tar.gz" "$name": \
  --zone "$zone" --worker all

# 3. Python 3.11 or newer, which the images do not bring, and an environment.
on_every_host 'set -e
sudo apt-get -o DPkg::Lock::Timeout=600 install -qq --yes python3.11-venv
rm -rf llama-jax && mkdir llama-jax && tar -xzf llama-jax.tar.gz -C llama-jax
cd llama-jax
python3.11 -m venv .venv
.venv/bin/pip install --quiet ".[tpu,gcs,demo]"'

# 4. The hosts find one another, and see all chips.
on_every_host 'cd llama-jax && .venv/bin/python -c "
import jax
jax.distributed.initialize()
print(jax.process_index(), jax.process_count(), jax.device_count())"'
