#!/usr/bin/env bash
# Training on several machines: start this same line on each of them, within the rendezvous' 15 minutes, in any order.
#
#   NODES=4 HEAD=node0.example:29500 bash scripts/launch/several_nodes.sh --recipe llama3_8b_128k [key=value ...]
#
#   NODES         machines                                                         (required)
#   HEAD          host:port of one of them, that all can reach; change the port
#                 where two jobs share a machine                                   (required)
#   GPUS=8        processes on each machine, one a GPU
#   TORCHRUN=     more options of torchrun
#   JOB=anchorctx a name that only this job's machines share
#   DRY_RUN=1     print the command and stop
# The run's out_dir and the packed set must be on a disk that all machines see. Set NCCL_SOCKET_IFNAME where the first
# network interface is not the one that joins the machines.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/environment.sh"
: "${NODES:?set NODES to the number of machines, such as NODES=4}"
: "${HEAD:?set HEAD to host:port of one of the machines, such as HEAD=node0.example:29500}"
read -ra more <<<"${TORCHRUN:-}"
launch "$PYTHON" -m anchorctx.cli.torchrun --nnodes "$NODES" --nproc_per_node "${GPUS:-8}" --max_restarts 0 "${more[@]}" \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD" --rdzv_id "${JOB:-anchorctx}" -m anchorctx train "$@"
