#!/usr/bin/env bash
# compute-sanitizer over small cases of the CUDA core, then faults, all without MPS. Run after run.sh has built.
#   tests/gpu/check.sh [memcheck] [racecheck] [faults]     default: all three
# On one GPU ranks take turns, as their kernels wait for each other: right, and slow (a case of two ranks 20 to 65 s).
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
  'test_cuda_staging.py::test_sizes[2]'
  'test_cuda_staging.py::test_one_after_the_other[2]'
  'test_cuda_staging.py::test_odd_values[torch.bfloat16-float32]'
  'test_cuda_zero_copy.py::test_layouts_and_dtypes[ExpertBlocks()-2]'
)
[[ $# -gt 0 ]] || set -- memcheck racecheck faults
for check in "$@"; do
  echo "== $check"
  if [[ $check == faults ]]; then
    python3 -m pytest -q --durations=3 tests/gpu/test_cuda_faults.py tests/gpu/test_cuda_health.py \
      tests/gpu/test_cuda_hop.py -k "not test_cuda_hop or lost" 2>&1 | tail -25
  else
    compute-sanitizer --tool "$check" --target-processes all --error-exitcode 9 \
      python3 -m pytest -q "${cases[@]/#/tests/gpu/}" 2>&1 | tail -8
  fi
done
