#!/usr/bin/env bash
# Build the CUDA core for the GPU that is here, start MPS so that several ranks share it, and run the GPU tests.
#   tests/gpu/run.sh [--no-mps] [pytest arguments]      without a path among them: all of tests/gpu
# --no-mps: on a host with a GPU for each of the 1 to 8 ranks of the tests; ranks that share one take turns, slowly.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export CPLUS_INCLUDE_PATH=${CPLUS_INCLUDE_PATH:-/usr/local/cuda/include/cccl}
export RAY_DEEPEP_CUDA_ARCHS=${RAY_DEEPEP_CUDA_ARCHS:-90} RAY_DEEPEP_BUILD_JOBS=${RAY_DEEPEP_BUILD_JOBS:-8}
# NVLink multicast stays off: it may put a shared host's GPUs out of service.
export NCCL_NVLS_ENABLE=0 NVSHMEM_DISABLE_NVLS=1
mps=1
[[ ${1:-} == --no-mps ]] && mps= && shift
# Ranks that share a GPU must all find room at once: their kernels wait for each other.
export RAY_DEEPEP_NUM_SMS=${RAY_DEEPEP_NUM_SMS:-8} RAY_DEEPEP_LOW_LATENCY_NUM_SMS=${RAY_DEEPEP_LOW_LATENCY_NUM_SMS:-8}
python3 setup.py -q build_ext --inplace > /tmp/ray_deepep_build.log 2>&1 || { tail -40 /tmp/ray_deepep_build.log; exit 1; }
if [[ $mps ]]; then
  mps=$(mktemp -d)
  export CUDA_MPS_PIPE_DIRECTORY=$mps/pipe CUDA_MPS_LOG_DIRECTORY=$mps/log
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  nvidia-cuda-mps-control -d && trap 'echo quit | nvidia-cuda-mps-control; rm -rf "$mps"' EXIT
fi
named= before=
for word in "$@"; do
  [[ $word == tests/* && $before != --deselect && $before != --ignore ]] && named=1
  before=$word
done
[[ $named ]] || set -- tests/gpu "$@"
DS_ACCELERATOR=${DS_ACCELERATOR:-cuda} python3 -m pytest -q --durations=8 "$@"
