#!/usr/bin/env bash
# The GPU figures of README.md and docs/performance.md, in parts that each have a time limit; builds the cores first.
#   benchmarks/gpu.sh [PART ...]     parts: see below; default: all, about half an hour on two GPUs
# A rank for each GPU, or RANKS of them; results are appended to benchmarks/results, python -m benchmarks.table shows them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CPLUS_INCLUDE_PATH=${CPLUS_INCLUDE_PATH:-/usr/local/cuda/include/cccl}
export RAY_DEEPEP_CUDA_ARCHS=${RAY_DEEPEP_CUDA_ARCHS:-90} RAY_DEEPEP_BUILD_JOBS=${RAY_DEEPEP_BUILD_JOBS:-8}
# NVLink multicast stays off: it may put a shared host's GPUs out of service.
export NCCL_NVLS_ENABLE=0 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 DS_ACCELERATOR=${DS_ACCELERATOR:-cuda}
# Without bytecode on disk each new process compiles its imports, 8 s of a start (ray-deepep doctor looks).
unset PYTHONDONTWRITEBYTECODE
python=${PYTHON:-python3} out=${GPU_RUNS:-runs/gpu}

gpus=$(nvidia-smi -L 2> /dev/null | grep -c ^GPU)
ranks=${RANKS:-$gpus}

dispatch() { part 240 -m benchmarks.cuda_dispatch_combine --ranks "$ranks" --num-sms 8 16 24 32 64; }
sizes() { part 300 -m benchmarks.cuda_dispatch_combine --ranks "$ranks" --tokens 256 1024 8192 16384 --num-sms 24; }
skewed() {
  part 120 -m benchmarks.cuda_dispatch_combine --ranks "$ranks" --routing one_hot_expert one_rank --num-sms 24
}
heaps() {
  for provider in vmm nvshmem vmm nvshmem; do
    part 60 -m benchmarks.cuda_dispatch_combine --ranks "$ranks" --num-sms 24 --only 'in heap' \
      --heap-provider $provider --out "$out/heaps.jsonl"
  done
}
low_latency() { part 240 -m benchmarks.cuda_low_latency --ranks "$ranks" --num-sms 132 --replays 10000; }
batches() {
  part 300 -m benchmarks.cuda_low_latency --ranks "$ranks" --tokens 1 8 32 512 --num-sms 132 --replays 10000
}
overlap() { part 120 -m benchmarks.cuda_overlap --ranks "$ranks"; }
layer() { part 180 -m benchmarks.cuda_layer --ranks "$ranks"; }
step() { part 420 -m train.demo --preset pair --workers "$ranks" --out "$out/step-$(date +%s)"; }
groups() { # two EP groups, whose experts are averaged
  ((ranks >= 4)) || { echo "== groups: left out, two of them want 4 ranks"; return; }
  part 420 -m train.demo --preset pair --workers "$ranks" --out "$out/groups-$(date +%s)" --set model.ep_size=$((ranks / 2))
}
start() { part 400 -m benchmarks.start --workers "$ranks"; }
recovery() { part 400 -m benchmarks.recovery --transport cuda --workers "$ranks"; }
plan() { part 200 -m benchmarks.plan_check --transport cuda --ranks "$ranks"; }

# part SECONDS ARGUMENTS...: a Python program; says how long it took, and goes on when it fails or is cut off.
part() {
  local limit=$1 begin=$SECONDS
  shift
  echo "== $*"
  timeout "$limit" "$python" "$@" || echo "   ended with $? (124: its $limit s were over)"
  echo "   $((SECONDS - begin)) s"
}

parts=(dispatch sizes skewed heaps low_latency batches overlap layer step groups start recovery plan)
[[ $# -gt 0 ]] || set -- "${parts[@]}"
for name in "$@"; do
  [[ " ${parts[*]} " == *" $name "* ]] || { echo "no part $name: ${parts[*]}"; exit 2; }
done
((gpus)) || { echo "no GPU: nvidia-smi lists none"; exit 1; }
nvidia-smi -L
mkdir -p "$out"
"$python" setup.py -q build_ext --inplace > /tmp/ray_deepep_build.log 2>&1 || { tail -40 /tmp/ray_deepep_build.log; exit 1; }
for name in "$@"; do "$name"; done
