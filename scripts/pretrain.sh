#!/usr/bin/env bash
# Pretrain on a TPU slice, from nothing to the last checkpoint.
#
#   scripts/pretrain.sh NAME --zone ZONE --type TYPE --recipe FILE.py:FUNCTION \
#       --workdir gs://BUCKET/RUN --data DIR [--spot] [--dry-run] [-- OPTION ...]
#
# DIR holds prepared data and is there on every host: a disk or a bucket, mounted. What
# follows -- goes to `llama-jax train`. Run it on a machine that stays on; started
# again, it goes on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' scripts/pretrain.sh >&2
  exit 2
}

name='' zone='' type='' recipe='' workdir='' data='' spot='' dry_run=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --zone) zone=${2:?--zone needs a value}; shift 2 ;;
    --type) type=${2:?--type needs a value}; shift 2 ;;
    --recipe) recipe=${2:?--recipe needs a value}; shift 2 ;;
    --workdir) workdir=${2:?--workdir needs a value}; shift 2 ;;
    --data) data=${2:?--data needs a value}; shift 2 ;;
    --spot) spot=yes; shift ;;
    --dry-run) dry_run=yes; shift ;;
    --) shift; break ;;
    -*) usage ;;
    *) [[ -z $name ]] || usage; name=$1; shift ;;
  esac
done
[[ -n $name && -n $zone && -n $type && -n $recipe && -n $workdir && -n $data ]] || usage

on_every_host() {
  scripts/on_every_host.sh "$name" --zone "$zone" ${dry_run:+--dry-run} -- \
    "cd llama-jax && $(printf '%q ' "$@")"
}

# 1. The slice, with this commit on it.
scripts/setup_tpu_vm.sh "$name" --zone "$zone" --type "$type" ${spot:+--spot} ${dry_run:+--dry-run}

# 2. Before anything is paid for: the data are there on every host, and the recipe fits.
on_every_host .venv/bin/llama-jax inspect "$data"
train=(.venv/bin/llama-jax train "$recipe" --workdir "$workdir" --data.paths "$data" "$@")
on_every_host "${train[@]}" --dry-run

# 3. Train. After a preemption (75) or the loss of a host (76) all begin again where the
#    newest checkpoint stands; anything else is for a human to look at.
losses_left=10
while true; do
  status=0
  on_every_host "${train[@]}" || status=$?
  case $status in
    0) break ;;
    75) echo 'Stopped as asked, all saved: starting again.' ;;
    76) ((losses_left-- > 0)) || exit 76
        echo "A host was lost: starting again, $losses_left times more." ;;
    *) exit "$status" ;;
  esac
  sleep 30
done
