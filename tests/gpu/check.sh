#!/usr/bin/env bash
# compute-sanitizer over small cases of the CUDA core, then faults (both without MPS). Run after run.sh has built.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
for tool in memcheck racecheck; do
  echo "== $tool"
  compute-sanitizer --tool $tool --target-processes all --error-exitcode 9 \
    python3 -m pytest -q tests/gpu/test_cuda_core.py tests/gpu/test_cuda_row_dots.py \
    -k "layouts_and_dtypes and 1 or bits" 2>&1 | tail -8
done
python3 -m pytest -q --durations=3 tests/gpu/test_cuda_faults.py tests/gpu/test_cuda_health.py \
  tests/gpu/test_cuda_hop.py -k "not test_cuda_hop or lost" 2>&1 | tail -25
