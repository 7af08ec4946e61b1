#!/usr/bin/env bash
# compute-sanitizer over small cases of the CUDA core, then faults (both without MPS). Run after run.sh has built.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Two ranks need a GPU each here: without MPS, kernels that wait for each other would take turns on one.
[[ $(nvidia-smi -L | wc -l) -ge 2 ]] && two=" or test_one_after_the_other and 2 or test_odd_values"
for tool in memcheck racecheck; do
  echo "== $tool"
  compute-sanitizer --tool $tool --target-processes all --error-exitcode 9 \
    python3 -m pytest -q tests/gpu/test_cuda_core.py tests/gpu/test_cuda_row_dots.py tests/gpu/test_cuda_staging.py \
    'tests/gpu/test_cuda_low_latency.py::test_layouts_and_dtypes[ExpertBlocks()-1]' \
    'tests/gpu/test_cuda_zero_copy.py::test_layouts_and_dtypes[ExpertMajor(alignment=8)-1]' \
    -k "layouts_and_dtypes and 1 or bits or test_sizes and 1${two:-}" 2>&1 | tail -8
done
python3 -m pytest -q --durations=3 tests/gpu/test_cuda_faults.py tests/gpu/test_cuda_health.py \
  tests/gpu/test_cuda_hop.py -k "not test_cuda_hop or lost" 2>&1 | tail -25
