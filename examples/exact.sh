#!/usr/bin/env bash
# Shows on the files of a demonstration (make demo) that
#   1. two processes train to the same losses as one with the same global batch, to rounding;
#   2. a run that was killed with -9 and resumed ends with the same weights, to the bit.
#
#     examples/exact.sh runs/demo /tmp/exact
set -euo pipefail
demo=$1 out=$2
lm=$demo/language_model pairs=$demo/pairs/train.jsonl
export OMP_NUM_THREADS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
mkdir -p "$out"

reward() { # launcher..., then flags
  "$@" reward --model_name_or_path "$lm" --dataset_name "$pairs" --granularity segment \
    --entropy_threshold 1.5 --entropy_cache_dir "$out/entropy" --max_length 128 \
    --max_prompt_length 64 --learning_rate 1e-3 --logging_steps 10 --report_to none \
    --disable_tqdm true
}
ppo() {
  "$@" ppo --model_name_or_path "$lm" --reward_model "$demo/reward_models/segment" \
    --dataset_name "$pairs" --response_length 48 --rollout_batch_size 32 --mini_batch_size 16 \
    --total_episodes 192 --learning_rate 1e-4 --value_learning_rate 1e-3 --kl_coef 0.02
}
one() { command=$1; shift; segrlhf "$command" "$@" "${flags[@]}"; }
two() { command=$1; shift; torchrun --nproc_per_node 2 -m segrlhf.cli "$command" "$@" "${flags[@]}"; }
quiet() { "$@" > "$out/log" 2>&1 || { cat "$out/log"; exit 1; }; }

# Starts a command, kills it with -9 when $1 is complete, and starts it again to resume.
kill_and_resume() {
  local marker=$1 pid; shift
  setsid bash -c "$(declare -f one reward ppo); flags=(${flags[*]}); $(declare -p lm pairs demo out); $*" \
    > "$out/log" 2>&1 &
  pid=$!
  until [ -e "$marker" ]; do sleep 0.2; done
  kill -9 -- "-$pid"
  wait "$pid" 2> /dev/null || true
  echo "killed with -9 after $(dirname "$marker")"
  flags+=(--resume_from_checkpoint true)
  quiet "$@"
}

echo "1. reward model, loss of every 10 steps: one process (32 pairs), then two (16 each)"
flags=(--max_steps 40 --save_strategy no --per_device_train_batch_size 32 --output_dir "$out/rm1")
reward one 2> /dev/null | grep -o "{'loss': '[0-9.]*'" | tr -cd "0-9.\n"
flags=(--max_steps 40 --save_strategy no --per_device_train_batch_size 16 --output_dir "$out/rm2")
reward two 2> /dev/null | grep -o "{'loss': '[0-9.]*'" | tr -cd "0-9.\n"

echo "1. PPO, loss/policy_avg, loss/value_avg and objective/kl of every update: one process, then two"
show='import json, sys
for line in open(sys.argv[1]):
    m = json.loads(line)
    print(*(f"{m[k]:.6f}" for k in ("loss/policy_avg", "loss/value_avg", "objective/kl")))'
flags=(--save_steps 0 --output_dir "$out/ppo1") && quiet ppo one
python -c "$show" "$out/ppo1/metrics.jsonl"
flags=(--save_steps 0 --output_dir "$out/ppo2") && quiet ppo two
python -c "$show" "$out/ppo2/metrics.jsonl"

echo "2. reward model: uninterrupted, then killed and resumed"
base=(--max_steps 40 --save_steps 10 --per_device_train_batch_size 32)
flags=("${base[@]}" --output_dir "$out/rm-whole") && quiet reward one
flags=("${base[@]}" --output_dir "$out/rm-killed")
kill_and_resume "$out/rm-killed/checkpoint-20/complete.json" reward one
(cd "$out" && sha256sum rm-whole/model.safetensors rm-killed/model.safetensors)

echo "2. PPO: uninterrupted, then killed and resumed"
flags=(--save_steps 2 --output_dir "$out/ppo-whole") && quiet ppo one
flags=(--save_steps 2 --output_dir "$out/ppo-killed")
kill_and_resume "$out/ppo-killed/checkpoint-4/complete.json" ppo one
(cd "$out" && sha256sum ppo-whole/model.safetensors ppo-killed/model.safetensors)
