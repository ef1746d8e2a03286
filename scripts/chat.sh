#!/usr/bin/env bash
# Llama 2-Chat: from a base model to its last version, stage after stage.
#
#   scripts/chat.sh --recipes FILE.py --base CHECKPOINT --data DIR --run DIR
#       [--selections RUN] [--tensor N] [--batch-size N] [--pod NAME --zone ZONE]
#       [--dry-run] [-- OPTION ...]
#   scripts/chat.sh --tiny [--run DIR] [--seeds N] [--prompts N] [--dry-run]
#       [-- OPTION ...]
#
# DIR of --data holds tokenizer.model, values.json (the instructions of Ghost
# Attention), and what people wrote: dialogs, helpfulness and safety (comparisons),
# prompts, all as .jsonl and with NAME_validation.jsonl; ghost.jsonl and ghost_all.jsonl
# (dialogs whose last answer and all of whose answers are sampled for Ghost Attention);
# and, where other comparisons are mixed in, helpfulness_others.jsonl and
# safety_others.jsonl, each with its _validation.jsonl.
# With --selections, the --run of a larger model, versions learn from the best answers
# there in place of their own; V3 still writes for Ghost Attention. While models write,
# --tensor devices share the weights, and --batch-size prompts are answered at a time.
# With --pod, models run on every host of a TPU VM that has this checkout; --data and
# --run are then the same file system there and here. What follows -- goes to each
# `llama-jax train`.
#
# --tiny needs nothing: a small world whose truth is a rule makes the data, compares
# answers, and measures every version, on two CPU cores.
#
# Stopped at any moment and started again, it goes on. docs/chat.md says what each stage
# is; RUN/STAGE/card.md, what became of it. It needs the extra `demo`, for the plots.
set -euo pipefail
shopt -s extglob # +(...) in ${name//pattern/}
here=$PWD
cd "$(dirname "$0")/.."

usage() {
  [[ -z ${1-} ]] || echo "$1" >&2
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' scripts/chat.sh >&2
  exit 2
}

recipes='' base='' data='' run='' selections='' tensor='' batch='' pod='' zone=''
dry_run='' tiny='' seeds='' prompts=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --recipes | --base | --data | --run | --selections | --tensor | --pod | --zone | \
      --seeds | --prompts)
      declare "${1#--}=${2:?$1 needs a value}"; shift 2 ;;
    --batch-size) batch=${2:?$1 needs a value}; shift 2 ;;
    --tiny) tiny=yes; shift ;;
    --dry-run) dry_run=yes; shift ;;
    --) shift; break ;;
    *) usage "There is no option $1." ;;
  esac
done
options=("$@")
for count in "${tensor:-1}" "${batch:-1}" "${seeds:-1}" "${prompts:-1}"; do
  [[ $count =~ ^[1-9][0-9]*$ ]] || usage "$count is no count: give 1 or more."
done
if [[ -n $tiny ]]; then
  [[ -z $recipes$base$data$selections$tensor$batch$pod$zone ]] ||
    usage '--tiny makes its own models and data.'
else
  [[ -n $recipes && -n $base && -n $data && -n $run ]] || usage
  [[ -z $seeds$prompts ]] || usage '--seeds and --prompts are those of --tiny.'
  [[ -n $pod || -z $zone ]] && [[ -z $pod || -n $zone ]] || usage 'Give --pod and --zone.'
fi
for path in "$data" "$run" "$selections"; do
  [[ $path != *://* ]] || usage "$path is a bucket: mount it, and give the directory."
done

# What is relative is so to where this was called.
absolute() { [[ -z $1 || $1 == /* || $1 == *://* ]] && echo "$1" || echo "$here/$1"; }
base=$(absolute "$base") data=$(absolute "$data") selections=$(absolute "$selections")
root=$(absolute "${run:-runs/chat}")
[[ -e $recipes ]] || recipes=$(absolute "$recipes")
tensor=${tensor:-1} batch=${batch:-32}
for version in 1 2 3 4 5; do
  needed=samples/v$version.jsonl
  [[ -z $selections || -n $dry_run || -e $selections/$needed ]] || {
    echo "$selections has no $needed: give the --run of a larger model, done." >&2
    exit 1
  }
done

# The environment in use, else the one that `make setup` makes.
PATH=$PATH:$PWD/.venv/bin
PATH=$(dirname "$(command -v llama-jax)"):$PATH # and the Python of that
python -c 'import matplotlib' 2>/dev/null || {
  echo "The plots need matplotlib: pip install 'llama-jax[demo]'." >&2
  exit 1
}

# One book at a time writes here. Commands hold the lock too, should they outlive it.
if [[ -z $dry_run ]]; then
  mkdir -p "$root"
  exec 9>"$root/lock"
  flock -w 3 9 || { echo "$root is being written to: wait, or end that run." >&2; exit 1; }
fi

# once MARK [model] COMMAND: show it and do it, unless it is done, which leaves a mark.
# What begins with `model` runs on every host of the pod, if there is one. Where it runs,
# and with how many devices and prompts at a time, may change: what is made does not.
once() {
  local mark=$run/done/$1 words asked known where=here
  shift
  [[ $1 != model ]] || { where=${pod:-here}; shift; }
  words=("$@")
  asked=$(printf '%q ' "${words[@]}")
  known=${asked//--@(tensor|batch-size) +([0-9]) /}
  if [[ -e $mark ]]; then
    [[ $(<"$mark") != "${known% }" ]] || return 0
    printf '%s was done by another command,\n  %s\nand not by\n  %s\n%s\n' "${mark##*/}" \
      "$(<"$mark")" "$known" 'Use another --run, or go on as it began.' >&2
    exit 1
  fi
  [[ $where == here ]] || words=(scripts/on_every_host.sh "$pod" --zone "$zone" --
    "cd llama-jax && .venv/bin/$asked")
  printf '\n$ %s\n' "$(printf '%q ' "${words[@]}")"
  [[ -z $dry_run ]] || return 0
  persist "${words[@]}"
  mkdir -p "$run/done"
  echo "${known% }" >"$mark.partial"
  mv "$mark.partial" "$mark"
}

# persist COMMAND: do it; on a pod, once more where it was stopped or lost a host.
persist() {
  local losses_left=10 status
  while true; do
    status=0
    "$@" || status=$?
    [[ -n $pod ]] || return "$status"
    case $status in
      75 | 143) ;; # saved, or, by `sample` and cards, as good as that
      76) ((losses_left-- > 0)) || return 76 ;;
      *) return "$status" ;;
    esac
    sleep 30
  done
}

# rows KIND NAME TRAIN VALIDATION [OPTION ...]: a file of lines to rows of tokens.
rows() {
  once "rows-$2" llama-jax data "$1" --tokenizer "$data/tokenizer.model" --train "$3" \
    --validation "$4" --output "$run/rows/$2" "${@:5}"
}

# train RECIPE NAME BEFORE [OPTION ...]: a stage, from the model of another; its card.
train() {
  local asked=(--prompts "$data/prompts_validation.jsonl" --max-new-tokens "$answer")
  asked+=(--tensor "$tensor")
  # What came after the reward models has its answers scored.
  [[ $2 != @(distilled|v?|ppo) ]] || asked+=(--helpfulness "$run/helpfulness"
    --safety "$run/safety" --reference "$run/sft")
  local answering=(model)
  # Reward models do not answer.
  [[ $1 != helpfulness && $1 != safety ]] || asked=() answering=()
  once "train-$2" model llama-jax train "$recipes:$1" --init-from "$3" --workdir "$run/$2" \
    "${seeded[@]}" "${@:4}" "${options[@]}"
  once "card-$2" "${answering[@]}" python -m scripts.card "$run/$2" "${asked[@]}"
}

# sample STEP NAME MODEL [OPTION ...]: what a model makes, to learn from; its card.
sample() {
  once "sample-$2" model llama-jax sample "$1" "$run/$3" --output "$run/samples/$2" \
    --seed "$seed" --max-new-tokens "$answer" --tensor "$tensor" --dtype "$dtype" \
    --batch-size "$batch" "${drawn[@]}" "${@:4}"
  once "card-samples-$2" python -m scripts.card "$run/samples/$2"
}

# join NAME DIR ...: the rows of directories, in one file.
join() {
  local name=$1 files=() directory
  shift
  for directory in "$@"; do files+=("$directory"/rows-*.jsonl); done
  once "join-$name" joined "$run/samples/$name.jsonl" "${files[@]}"
}

joined() {
  cat "${@:2}" >"$1.partial" && mv "$1.partial" "$1"
}

# ghost RESAMPLE DIALOGS [OPTION ...]: rows of Ghost Attention, of V3.
ghost() {
  sample ghost "ghost-$1" v3 --dialogs "$2" --values "$data/values.json" \
    "${judge[@]}" --resample "$1" --cache-length "$length" "${@:3}"
}

# All stages, with the recipes, base and data that are set.
chat() {
  local judge=(--helpfulness "$run/helpfulness" --safety "$run/safety")
  local held_out=$data/dialogs_validation.jsonl

  # 1. Supervised fine-tuning (section 3.1).
  rows dialogs sft "$data/dialogs.jsonl" "$held_out" --row-length "$length"
  train sft sft "$base" --data.paths "$run/rows/sft"

  # 2. Two reward models, from it (section 3.2.2), with other comparisons mixed in as
  #    the recipe says.
  [[ -z $tiny ]] || compare_answers
  local about kind mixed
  for about in helpfulness safety; do
    mixed=(--data.paths)
    for kind in "$about" "${about}_others"; do
      [[ $kind == "$about" || -e $data/$kind.jsonl ]] || continue
      rows comparisons "$kind" "$data/$kind.jsonl" "$data/${kind}_validation.jsonl" \
        --row-length "$length"
      mixed+=("$run/rows/$kind")
    done
    ((${#mixed[@]} == 3)) || mixed+=(--data.weights 1)
    train "$about" "$about" "$run/sft" "${mixed[@]}"
  done

  # 3. Context distillation (section 4.2.4): safer answers, learnt without what brought
  #    them forth.
  sample distil distilled sft --prompts "$data/prompts.jsonl" --safety "$run/safety" \
    --cache-length "$context"
  join distilled "$run/samples/distilled"
  rows dialogs distilled "$run/samples/distilled.jsonl" "$held_out" --row-length "$length"
  train sft distilled "$base" --data.paths "$run/rows/sft" "$run/rows/distilled" \
    --data.weights 5 1

  # 4. Versions 1 to 5 by rejection sampling (section 3.2.3), each from the base: up to
  #    V3 on the best of the newest answers, then on the best of all; and from V4 on
  #    with Ghost Attention (section 3.3).
  local version newest=distilled keep=latest iterations=() winners paths weights steps
  for version in 1 2 3 4 5; do
    ((version < 4)) || keep=all
    winners=$selections/samples/v$version.jsonl
    if [[ -z $selections ]]; then
      sample answers "v$version" "$newest" --prompts "$data/prompts.jsonl" \
        "${judge[@]}" --num-samples "$samples" --cache-length "$context"
      iterations+=("$run/samples/v$version")
      winners=$run/samples/v$version.jsonl
      once "pool-v$version" llama-jax sample pool "${iterations[@]}" --keep "$keep" \
        --output "$winners"
    fi
    rows dialogs "v$version" "$winners" "$held_out" --row-length "$length"
    paths=("$run/rows/sft" "$run/rows/v$version" "$run/rows/distilled")
    weights=(5 4 1) steps=()
    if ((version == 4)); then
      ghost last "$data/ghost.jsonl" --num-samples "$samples"
      ghost all "$data/ghost_all.jsonl" --num-samples 1
      join ghost "$run/samples/ghost-last" "$run/samples/ghost-all"
      rows dialogs ghost "$run/samples/ghost.jsonl" "$held_out" --row-length "$length"
    fi
    if ((version >= 4)); then
      paths+=("$run/rows/ghost")
      weights+=(5) steps=("${ghost_steps[@]}")
    fi
    train sft "v$version" "$base" --data.paths "${paths[@]}" \
      --data.weights "${weights[@]}" "${steps[@]}"
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
  local row
  for row in 256 512; do
    rows prepare "documents-$row" "$data/documents.jsonl" \
      "$data/documents_validation.jsonl" --row-length "$row"
  done
  once train-base-256 model llama-jax train "$recipes:base" --workdir "$run/base-256" \
    --data.paths "$run/rows/documents-256" "${seeded[@]}" "${options[@]}"
  train base_long base "$run/base-256" --data.paths "$run/rows/documents-512"
}

compare_answers() {
  once raters python -m scripts.raters "$run/sft" --output "$data" --seed "$seed" \
    --prompts "$((2 * prompts))"
}

if [[ -z $tiny ]]; then
  length=4096 context=4096 prompt_length=2048 answer=1024 samples=20 dtype=bfloat16
  run=$root seed=0 seeded=() drawn=() ghost_steps=()
  chat
  exit
fi
recipes=configs/chat/small.py prompts=${prompts:-1000}
length=512 context=192 prompt_length=128 answer=24 samples=4 dtype=float32
drawn=(--temperature 0.5) # a small model errs more, and its reward models see less
# A third of them for rows of Ghost Attention, and as many as else for the others.
ghost_steps=(--train.num-steps 510)
runs=()
for ((seed = 0; seed < ${seeds:-1}; seed++)); do
  run=$root/seed-$seed data=$root/seed-$seed/data base=$root/seed-$seed/base
  seeded=(--data.seed "$seed" --train.seed "$seed")
  make_base
  chat
  runs+=("$run")
done
report=(python -m scripts.chat_report "${runs[@]}" --output "$root")
printf '\n$ %s\n' "$(printf '%q ' "${report[@]}")"
[[ -n $dry_run ]] || "${report[@]}"
