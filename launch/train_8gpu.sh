#!/usr/bin/env bash
# One machine, from a recipe to a student: looks at the machine, at the memory, encodes the clips, trains.
#   launch/train_8gpu.sh RECIPE OUTPUT [--dry-run] [options of vpae distill, such as --set engine.ema_on=cpu]
# The same command goes on where it was stopped or fell over. --dry-run only says what would be run.
#   RANKS=8            processes, one a GPU (2 on a CPU, to try it: RANKS=2)
#   MAX_RESTARTS=3     times that all ranks are started again, from the last checkpoint, when one is lost
#   GPU_MEMORY=79.2    GiB of each GPU, for vpae plan (default: as the first GPU says; none, or without a GPU: no plan).
#                      It plans recipes of kind distill; with --no-plan-check none.
#   PYTHON=...         interpreter that vpae is installed for (default: .venv of this checkout)
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/steps.sh
source "$root/launch/steps.sh"
arguments "$@"
ranks=${RANKS:-8}

with=("$recipe" ${overrides[@]+"${overrides[@]}"})

total='import torch; print(round(torch.cuda.get_device_properties(0).total_memory / 2**30, 2) if torch.cuda.is_available() else "none")'
gpu_memory=${GPU_MEMORY:-$("$python" -c "$total")}

step "$python" -m vpae preflight "${with[@]}" --output "$output" --ranks "$ranks"
planned=$(sed -n 's/^kind:[[:space:]]*\([a-z_]*\).*/\1/p' "$recipe")
for argument in ${more[@]+"${more[@]}"}; do
    if [[ $argument == --no-plan-check ]]; then planned=no; fi
done
if [[ $gpu_memory != none && $planned == distill ]]; then
    step "$python" -m vpae plan "${with[@]}" --gpus "$ranks" --gpu-memory "$gpu_memory"
fi
step "$python" -m vpae cache "${with[@]}" --ranks "$ranks"
step "$python" -m vpae distill "$recipe" --output "$output" --ranks "$ranks" \
    --max-restarts "${MAX_RESTARTS:-3}" --resume ${more[@]+"${more[@]}"}
