"""Benchmarks: times of several ways to do one thing, as ratios within one run.

    python -m benchmarks.dispatch_combine       # rows to experts and back: ours, gloo, memcpy
    python -m benchmarks.deepspeed_layer        # a DeepSpeed MoE layer, stock and swapped
    python -m benchmarks.cuda_dispatch_combine  # on GPUs: dispatch and combine, NCCL beside them
    python -m benchmarks.cuda_low_latency       # on GPUs: calls of a decode step in CUDA graphs
    python -m benchmarks.cuda_layer             # on GPUs: a DeepSpeed MoE layer, stock and swapped
    python -m benchmarks.cuda_overlap           # on GPUs: a matrix product beside them
    python -m benchmarks.table                  # results into README.md and docs/images

Each appends JSON lines to ``benchmarks/results`` and prints a table. They measure and never judge: there are no
asserts. The ways take turns within a run, because a machine's speed drifts and ratios must not.
"""
