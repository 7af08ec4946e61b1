"""Benchmarks: times of several ways to do one thing, as ratios within one run.

    python -m benchmarks.dispatch_combine       # rows to experts and back: ours, gloo, memcpy
    python -m benchmarks.deepspeed_layer        # a DeepSpeed MoE layer, stock and swapped
    python -m benchmarks.cuda_dispatch_combine  # on GPUs: dispatch and combine, NCCL beside them
    python -m benchmarks.cuda_low_latency       # on GPUs: calls of a decode step in CUDA graphs
    python -m benchmarks.cuda_layer             # on GPUs: a DeepSpeed MoE layer, stock and swapped
    python -m benchmarks.cuda_overlap           # on GPUs: a matrix product beside them
    python -m benchmarks.telemetry              # what measuring a training run costs it
    python -m benchmarks.plan_check             # what ray-deepep plan predicts, against what is measured
    python -m benchmarks.start                  # a Ray job, from its submission to its first training step
    python -m benchmarks.recovery               # faults of a training run, to their report and to training again
    python -m benchmarks.table                  # results into README.md and docs/images

Each appends JSON lines to ``benchmarks/results`` and prints a table. They measure and never judge: there are no
asserts. The ways take turns within a run, because a machine's speed drifts and ratios must not.
"""
