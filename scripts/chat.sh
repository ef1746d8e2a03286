#!/usr/bin/env bash
# Llama 2-Chat: from a base model to its last version, stage after stage.
#
#   scripts/chat.sh --recipes FILE.py --base CHECKPOINT --data DIR --run DIR
#       [--pod NAME --zone ZONE] [--dry-run] [-- OPTION ...]
#   scripts/chat.sh --tiny [--run DIR] [--seeds N] [--prompts N] [--dry-run]
#       [-- OPTION ...]
#
# DIR of --data holds tokenizer.model, values.json (the instructions of Ghost
# Attention), and what people wrote: dialogs, helpfulness and safety (comparisons),
# prompts, all as .jsonl and with NAME_validation.jsonl; ghost.jsonl and ghost_all.jsonl
# (dialogs whose last answer and all of whose answers are sampled for Ghost Attention).
# With --pod the models run on every host of a TPU VM that has this checkout; --data and
# --run are then the same file system there and here. What follows -- goes to each
# `llama-jax train`.
#
# --tiny needs nothing: a small world whose truth is a rule makes the data, compares
# answers, and measures every version. Two CPU cores take half an hour for a seed.
#
# Stopped at any moment and started again, it goes on. docs/chat.md says what each stage
# is; RUN/STAGE/card.md, what became of it.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' scripts/chat.sh >&2
  exit 2
}

recipes='' base='' data='' run='' pod='' zone='' tiny='' dry_run=''
seeds=1 prompts=1000
while [[ $# -gt 0 ]]; do
  case $1 in
    --recipes) recipes=${2:?--recipes needs a value}; shift 2 ;;
    --base) base=${2:?--base needs a value}; shift 2 ;;
    --data) data=${2:?--data needs a value}; shift 2 ;;
    --run) run=${2:?--run needs a value}; shift 2 ;;
    --pod) pod=${2:?--pod needs a value}; shift 2 ;;
    --zone) zone=${2:?--zone needs a value}; shift 2 ;;
    --seeds) seeds=${2:?--seeds needs a value}; shift 2 ;;
    --prompts) prompts=${2:?--prompts needs a value}; shift 2 ;;
    --tiny) tiny=yes; shift ;;
    --dry-run) dry_run=yes; shift ;;
    --) shift; break ;;
    *) usage ;;
  esac
done
options=("$@")
if [[ -n $tiny ]]; then
  [[ -z $recipes$base$data$pod ]] || usage
else
  [[ -n $recipes && -n $base && -n $data && -n $run ]] || usage
  [[ -z $pod || -n $zone ]] || usage
fi

# The environment in use, else the one that `make setup` makes.
PATH=$PATH:$PWD/.venv/bin
PATH=$(dirname "$(command -v llama-jax)"):$PATH # and the Python of that

# once MARK COMMAND: show it and do it, unless it is done, which leaves a mark.
once() {
  local mark=$run/done/$1
  shift
  [[ ! -e $mark ]] || return 0
  local shown=("$@")
  [[ $1 != model ]] || shown[0]=llama-jax
  printf '\n$'; printf ' %q' "${shown[@]}"; echo
  [[ -z $dry_run ]] || return 0
  "$@"
  mkdir -p "$run/done"
  touch "$mark"
}

# A model's work: here, or on every host, which all begin again when one was lost.
model() {
  [[ -n $pod ]] || { llama-jax "$@"; return; }
  local losses_left=10 status
  while true; do
    status=0
    scripts/on_every_host.sh "$pod" --zone "$zone" -- \
      "cd llama-jax && $(printf '%q ' .venv/bin/llama-jax "$@")" || status=$?
    case $status in
      0) return ;;
      75) ;;
      76) ((losses_left-- > 0)) || exit 76 ;;
      *) exit "$status" ;;
    esac
    sleep 30
  done
}

# rows KIND NAME TRAIN VALIDATION [OPTION ...]: files of lines to rows of tokens.
rows() {
  local kind=$1 name=$2 train=$3 validation=$4
  shift 4
  once "rows-$name" llama-jax data "$kind" --tokenizer "$data/tokenizer.model" \
    --train $train --validation "$validation" --output "$run/rows/$name" "$@"
}

# train RECIPE NAME BEFORE [OPTION ...]: a stage, from the model of another.
train() {
  local recipe=$1 name=$2 before=$3
  shift 3
  once "train-$name" model train "$recipes:$recipe" --init-from "$before" \
    --workdir "$run/$name" "${seeded[@]}" "$@" "${options[@]}"
  local asked=(--prompts "$data/prompts_validation.jsonl" --max-new-tokens "$answer")
  [[ $recipe != helpfulness && $recipe != safety ]] || asked=()
  once "card-$name" python -m scripts.card "$run/$name" "${asked[@]}"
}

# sample STEP NAME MODEL [OPTION ...]: what a model makes, to learn from.
sample() {
  local step=$1 name=$2 from=$3
  shift 3
  once "sample-$name" model sample "$step" "$run/$from" --output "$run/samples/$name" \
    --max-new-tokens "$answer" --seed "$seed" "$@"
}

# ghost RESAMPLE DIALOGS [OPTION ...]: rows of Ghost Attention, of V3.
ghost() {
  local resample=$1 dialogs=$2
  shift 2
  sample ghost "ghost-$resample" v3 --dialogs "$dialogs" --values "$data/values.json" \
    --helpfulness "$run/helpfulness" --safety "$run/safety" --resample "$resample" \
    --cache-length "$length" "$@"
}

# All stages, with the recipes, base and data that are set.
chat() {
  local judge=(--helpfulness "$run/helpfulness" --safety "$run/safety")
  local held_out=$data/dialogs_validation.jsonl

  # 1. Supervised fine-tuning (section 3.1).
  rows dialogs sft "$data/dialogs.jsonl" "$held_out" --row-length "$length"
  train sft sft "$base" --data.paths "$run/rows/sft"

  # 2. Two reward models, from it (section 3.2.2).
  [[ -z $tiny ]] || compare_answers
  for about in helpfulness safety; do
    rows comparisons "$about" "$data/$about.jsonl" "$data/${about}_validation.jsonl" \
      --row-length "$length"
    train "$about" "$about" "$run/sft" --data.paths "$run/rows/$about" --data.weights 1
  done

  # 3. Context distillation (section 4.2.4): safer answers, learnt without what brought
  #    them forth.
  sample distil distilled sft --prompts "$data/prompts.jsonl" --safety "$run/safety" \
    --cache-length "$context"
  rows dialogs distilled "$run/samples/distilled/rows-*.jsonl" "$held_out" \
    --row-length "$length"
  train sft distilled "$base" --data.paths "$run/rows/distilled" "$run/rows/sft" \
    --data.weights 1 5

  # 4. Versions 1 to 5 by rejection sampling (section 3.2.3), each from the base: up to
  #    V3 on the best of the newest answers, then on the best of all; and from V4 on
  #    with Ghost Attention (section 3.3).
  local version newest=distilled keep=latest iterations=() paths weights
  for version in 1 2 3 4 5; do
    sample answers "v$version" "$newest" --prompts "$data/prompts.jsonl" "${judge[@]}" \
      --num-samples "$samples" --cache-length "$context"
    once "card-samples-v$version" python -m scripts.card "$run/samples/v$version"
    iterations+=("$run/samples/v$version")
    paths=("$run/rows/v$version" "$run/rows/sft" "$run/rows/distilled")
    weights=(3 5 1)
    if ((version == 4)); then
      keep=all
      ghost last "$data/ghost.jsonl" --num-samples "$samples"
      ghost all "$data/ghost_all.jsonl" --num-samples 1
      rows dialogs ghost "$run/samples/ghost-*/rows-*.jsonl" "$held_out" \
        --row-length "$length"
    fi
    if ((version >= 4)); then
      paths+=("$run/rows/ghost")
      weights=(3 5 1 7)
    fi
    once "pool-v$version" llama-jax sample pool "${iterations[@]}" --keep "$keep" \
      --output "$run/samples/v$version.jsonl"
    rows dialogs "v$version" "$run/samples/v$version.jsonl" "$held_out" \
      --row-length "$length"
    train sft "v$version" "$base" --data.paths "${paths[@]}" \
      --data.weights "${weights[@]}"
    newest=v$version
  done

  # 5. PPO, from V5 (section 3.2.3).
  rows prompts prompts "$data/prompts.jsonl" "$data/prompts_validation.jsonl" \
    --row-length "$prompt_length" --max-new-tokens "$answer"
  train ppo ppo "$run/v5" --data.paths "$run/rows/prompts" \
    --ppo.helpfulness "$run/helpfulness" --ppo.safety "$run/safety"
}

# The small world: what people wrote there, and a base model that has read it.
make_base() {
  once world python -m scripts.small_world "$data" --seed "$seed" --prompts "$prompts"
  once tokenizer llama-jax data tokenizer --vocab-size 1024 \
    --train "$data/spelling.jsonl" --output "$data/tokenizer.model"
  local length
  for length in 256 512; do
    rows prepare "documents-$length" "$data/documents.jsonl" \
      "$data/documents_validation.jsonl" --row-length "$length"
  done
  once train-first model train "$recipes:base" --workdir "$run/base-256" \
    --data.paths "$run/rows/documents-256" "${seeded[@]}" "${options[@]}"
  train base_long base "$run/base-256" --data.paths "$run/rows/documents-512"
}

compare_answers() {
  once raters python -m scripts.raters "$run/sft" --output "$data" --seed "$seed" \
    --prompts "$((2 * prompts))"
}

if [[ -z $tiny ]]; then
  length=4096 context=4096 prompt_length=2048 answer=1024 samples=20
  seed=0 seeded=()
  chat
  exit
fi
recipes=configs/chat/small.py
length=400 context=192 prompt_length=128 answer=24 samples=4
root=${run:-runs/chat} runs=()
for ((seed = 0; seed < seeds; seed++)); do
  run=$root/seed-$seed data=$root/seed-$seed/data base=$root/seed-$seed/base
  seeded=(--data.seed "$seed" --train.seed "$seed")
  make_base
  chat
  runs+=("$run")
done
once report python -m scripts.chat_report "${runs[@]}"
