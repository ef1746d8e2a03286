#!/usr/bin/env bash
# Run one command on every host of a TPU VM, and say how it ended on each.
#
#   scripts/on_every_host.sh NAME --zone ZONE [--dry-run] -- COMMAND
#
# What a host writes comes with its number in front. The exit status is 0 if all hosts
# gave 0. Else it is that of a host that failed; only if none did, 76 (a host was lost:
# another one says so, or ssh does, by 255), then 75 (saved and stopped as asked): see
# docs/training.md.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}

name='' zone='' dry_run=false
while [[ $# -gt 0 ]]; do
  case $1 in
    --zone) zone=${2:?--zone needs a value}; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    --) shift; break ;;
    -*) usage ;;
    *) [[ -z $name ]] || usage; name=$1; shift ;;
  esac
done
command=$*
[[ -n $name && -n $zone && -n $command ]] || usage

count=(gcloud compute tpus tpu-vm describe "$name" --zone "$zone"
  --format 'value(networkEndpoints.len())')
ssh=(gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --command "$command")

if $dry_run; then
  printf '%q ' "${count[@]}"; echo
  printf '%q ' "${ssh[@]}" --worker EACH; echo
  exit
fi

hosts=$("${count[@]}")
statuses=$(mktemp -d)
trap 'rm -rf "$statuses"' EXIT

for ((host = 0; host < hosts; host++)); do
  {
    status=0
    "${ssh[@]}" --worker "$host" </dev/null 2>&1 || status=$?
    echo "$status" >"$statuses/$host"
  } | sed -u "s/^/[$host] /" &
done
wait

failed=0 lost=0 stopped=0
for ((host = 0; host < hosts; host++)); do
  status=$(<"$statuses/$host")
  case $status in
    0) ;;
    75) stopped=75 ;;
    76 | 255) lost=76 ;;
    *) failed=$status ;;
  esac
  [[ $status == 0 ]] || echo "host $host of $hosts ended with status $status" >&2
done
for status in "$failed" "$lost" "$stopped"; do
  [[ $status == 0 ]] || exit "$status"
done
