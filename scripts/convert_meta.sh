#!/usr/bin/env bash
# Meta's weights into a checkpoint that trains and writes, looked at before and after.
#
#   scripts/convert_meta.sh SOURCE TARGET [--to orbax|hf|meta] [--prompt TEXT] [--dry-run]
#       [-- OPTION ...]
#
# SOURCE holds params.json, consolidated.*.pth and tokenizer.model, here or in a bucket;
# TARGET does not exist yet. What follows -- goes to `llama-jax convert`: --dtype,
# --model-parallel, --tokenizer and more. Stopped and started again, it goes on.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}

source='' target='' to=orbax prompt='Once upon a time' dry_run=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --to) to=${2:?--to needs a value}; shift 2 ;;
    --prompt) prompt=${2:?--prompt needs a value}; shift 2 ;;
    --dry-run) dry_run=yes; shift ;;
    --) shift; break ;;
    -*) usage ;;
    *) if [[ -z $source ]]; then source=$1; elif [[ -z $target ]]; then target=$1
       else usage; fi; shift ;;
  esac
done
[[ -n $source && -n $target ]] || usage

# The environment in use, else the one that `make setup` makes.
PATH=$PATH:$(cd "$(dirname "$0")/.." && pwd)/.venv/bin

# 1. What it is: the sizes, the type, whether there is a tokenizer.
llama-jax inspect "$source"

# 2. Convert. Digests of the source are compared on the way; the result is read back,
#    and the logits of both ends are compared, before it appears.
llama-jax convert "$source" "$target" --to "$to" ${dry_run:+--dry-run} "$@"
[[ -z $dry_run ]] || exit 0

# 3. As anyone can, at any later time: read all of it again.
llama-jax inspect "$target" --verify

# 4. It writes, if it has a tokenizer. A model that was read in a wrong order would
#    write nonsense here.
if [[ $(llama-jax inspect "$target") == *tokenizer.model* ]]; then
  llama-jax generate "$target" --prompt "$prompt" --max-new-tokens 40 --temperature 0
fi
