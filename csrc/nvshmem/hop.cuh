// What the hop kernels share: putting rows, and meeting the ranks of the other nodes at the end.
//
// Only public device functions of NVSHMEM. A put to a GPU that this one reaches over NVLink is a copy by the calling
// warp, from any memory; over a network the adapter reads symmetric memory only, so rows are staged there first.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "cuda/staging.cuh"
#include "nvshmem/hop_params.h"

namespace ray_deepep {

inline constexpr int kHopThreads = 512;
inline constexpr int kHopChunk = kChunkTokens;  // tokens of one item of work

__device__ inline bool has_failed(const HopFrame& f) { return load_volatile(&f.control->failed) != 0; }

// Other nodes first, each rank starting behind its own, so that no link is written by everybody at once.
__device__ inline int node_at_turn(const HopFrame& f, int turn) { return (f.node_rank + 1 + turn) % f.num_nodes; }

// One warp: `bytes`, a multiple of 4, to the same place on a node. `staged` is symmetric.
__device__ inline void put(const HopFrame& f, int node, void* to, const void* staged, size_t bytes) {
    if (bytes > 0) nvshmemx_putmem_nbi_warp(to, staged, bytes, f.pe[node]);
}

// One warp: a row of whole 16-byte vectors to the same place on a node, over `staged` where a network is in between.
__device__ inline void put_row(const HopFrame& f, int node, std::byte* to, const std::byte* row, std::byte* staged,
                               int64_t bytes) {
    if (row != staged && nvshmem_ptr(to, f.pe[node]) == nullptr) {
        copy_row(row, staged, bytes);
        // The adapter reads what this warp wrote.
        __threadfence_system();
        __syncwarp();
        row = staged;
    }
    nvshmemx_putmem_nbi_warp(to, row, bytes, f.pe[node]);
}

// One warp: as put_row, for the few bytes of a row's scales.
__device__ inline void put_floats(const HopFrame& f, int node, float* to, const float* from, float* staged,
                                  int64_t count) {
    for (int64_t i = threadIdx.x % 32; i < count; i += 32) staged[i] = from[i];
    __threadfence_system();
    __syncwarp();
    put(f, node, to, staged, count * 4);
}

// One thread per node: wait for its signal; false, and a report, if it does not come or if it is of another operation.
__device__ inline bool wait_for_node(const HopFrame& f, int node) {
    const uint64_t* signal = f.signals() + node;
    const WaitFor wait{Phase::kHop, f.operation, node, f.sequence};
    uint64_t value = 0;
    const auto load = [&] { return static_cast<uint32_t>((value = load_acquire(signal)) >> 32); };
    if (!poll(f, wait, load)) return false;
    const uint32_t seen = static_cast<uint32_t>(value >> 32);
    if (seen != f.sequence || static_cast<uint32_t>(value) == f.signature) return true;
    report_fault(f, 3, wait, seen, 0);
    return false;
}

// Whole block, last thing in a kernel that sent. The last block tells all nodes, behind all that was put, and waits for
// them: what they put is then visible to the kernels that follow.
__device__ inline void meet_nodes(const HopFrame& f) {
    __shared__ bool last;
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(f.blocks, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    if (threadIdx.x == 0) *f.blocks = 0;
    if (has_failed(f)) return;
    __threadfence_system();
    // Orders the puts of all blocks, not only this thread's, before the signals.
    if (threadIdx.x == 0) nvshmem_fence();
    __syncthreads();
    const int node = threadIdx.x;
    if (node >= f.num_nodes || node == f.node_rank) return;
    const uint64_t signal = (static_cast<uint64_t>(f.sequence) << 32) | f.signature;
    nvshmemx_signal_op(f.signals() + f.node_rank, signal, NVSHMEM_SIGNAL_SET, f.pe[node]);
    wait_for_node(f, node);
    __threadfence_system();
}

}  // namespace ray_deepep
