#!/bin/bash
# Runs two CPU ranks over gloo on any machine: stage 1, then a few steps of stages 2 and 3. Takes minutes, needs no GPU.
#   configs/cluster/cpu-smoke.sh [run_folder]
set -eu
run=${1:-runs/cpu-smoke}
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
train() {
  python -m torch.distributed.run --standalone --nproc-per-node=2 -m fastlightgen.train \
    run="$run" model=tiny engine=deepspeed device=cpu zero=3 sample_every=0 "$@"
}
train stage=1 clips=4 batch=2 timesteps=2
train stage=2 batch=4 iters=4
train stage=3 batch=4 iters=4 critic_start=0
