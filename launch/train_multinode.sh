#!/usr/bin/env bash
# Several machines: start it on each of them, with the same arguments and variables but NODE_RANK.
#   MASTER_ADDR=node0 NNODES=2 NODE_RANK=0 launch/train_multinode.sh RECIPE OUTPUT [--dry-run] [options of vpae distill]
# Weights are sharded inside each machine (engine.parallel=hsdp; --set engine.parallel=fsdp: over all). RECIPE, OUTPUT, the
# cache and the teacher lie on a file system that all machines share. The same command goes on where it was stopped.
#   NNODES, NODE_RANK  machines, and which of them this is: 0 .. NNODES - 1 (under Slurm known from it)
#   MASTER_ADDR        name or address of machine 0, as the others reach it
#   MASTER_PORT=29500  a free port there; the next one up is used too
#   LOCAL_ADDR         this machine's own address, where its host name does not lead the others to it
#   RANKS=8            processes on each machine, one a GPU
#   MAX_RESTARTS=3     times that all ranks are started again, from the last checkpoint, when one is lost
#   RUN_ID=vpae        tells this run from others that use the same port of machine 0
#   PYTHON=...         interpreter that vpae is installed for (default: .venv of this checkout)
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/steps.sh
source "$root/launch/steps.sh"
arguments "$@"
nodes=${NNODES:-${SLURM_NNODES:-}} node=${NODE_RANK:-${SLURM_NODEID:-}}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "NNODES must say how many machines there are, not '$nodes'"
if ! [[ $node =~ ^[0-9]+$ ]] || ((node >= nodes)); then
    die "NODE_RANK must be 0 .. $((nodes - 1)) on this machine, not '$node'"
fi
[[ -n ${MASTER_ADDR:-} ]] || die "MASTER_ADDR must name machine 0"
master=$MASTER_ADDR port=${MASTER_PORT:-29500}
# torchrun gives its ranks others of these names
unset MASTER_ADDR MASTER_PORT NODE_RANK

# Ranks that are started again need a store of their own: pytorch issue 135712.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds that ranks have after a signal to end their micro-batch and to save: 271 GB of a 14B student at 0.15 GB/s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}
# torchrun sets 1 and says so in a banner.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((($(nproc) - 1) / ${RANKS:-8}) + 1))}

host=$([[ $node == 0 ]] && echo true || echo false)

# A rendezvous has a port of its own, so that none meets the end of the one before it.
torchrun() {
    local name=$1 at=$2 restarts=$3
    shift 3
    step "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "${RANKS:-8}" --max-restarts "$restarts" \
        --rdzv-backend c10d --rdzv-endpoint "$master:$at" --rdzv-id "${RUN_ID:-vpae}-$name" \
        --rdzv-conf "is_host=$host,join_timeout=600" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} -m vpae "$@"
}

parallel=()
if ((nodes > 1)); then parallel=(--set engine.parallel=hsdp); fi

torchrun preflight $((port + 1)) 0 preflight "$recipe" --output "$output" ${overrides[@]+"${overrides[@]}"}
torchrun distill "$port" "${MAX_RESTARTS:-3}" distill "$recipe" --output "$output" --resume \
    ${parallel[@]+"${parallel[@]}"} ${more[@]+"${more[@]}"}
