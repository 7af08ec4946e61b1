#!/usr/bin/env bash
# compute-sanitizer over small cases of the CUDA core, then faults (both without MPS). Run after run.sh has built.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
cases=(
  'test_cuda_core.py::test_layouts_and_dtypes[1]'
  'test_cuda_core.py::test_sizes_in_turn[1-ExpertMajor(alignment=16)-False]'
  'test_cuda_staging.py::test_sizes[1]'
  'test_cuda_row_dots.py::test_scaled_rows_have_the_bits_of_torch[torch.float32-8-1]'
  'test_cuda_row_dots.py::test_scaled_rows_have_the_bits_of_torch[torch.bfloat16-7168-8]'
  'test_cuda_low_latency.py::test_layouts_and_dtypes[ExpertBlocks()-1]'
  'test_cuda_zero_copy.py::test_layouts_and_dtypes[ExpertMajor(alignment=8)-1]'
)
# Ranks need a GPU each here: without MPS, kernels that wait for each other would take turns on one.
[[ $(nvidia-smi -L | wc -l) -ge 2 ]] && cases+=(
  'test_cuda_staging.py::test_sizes[2]'
  'test_cuda_staging.py::test_one_after_the_other[2]'
  'test_cuda_staging.py::test_odd_values[torch.bfloat16-float32]'
  'test_cuda_zero_copy.py::test_layouts_and_dtypes[ExpertBlocks()-2]'
)
for tool in memcheck racecheck; do
  echo "== $tool"
  compute-sanitizer --tool $tool --target-processes all --error-exitcode 9 \
    python3 -m pytest -q "${cases[@]/#/tests/gpu/}" 2>&1 | tail -8
done
python3 -m pytest -q --durations=3 tests/gpu/test_cuda_faults.py tests/gpu/test_cuda_health.py \
  tests/gpu/test_cuda_hop.py -k "not test_cuda_hop or lost" 2>&1 | tail -25
