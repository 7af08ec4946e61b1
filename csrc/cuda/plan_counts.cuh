// The blocks of the plan kernel that list no rows: one writes the counts, some fill what no route fills.
#pragma once

#include "cuda/plan.cuh"

namespace ray_deepep {

#ifdef __CUDACC__

inline constexpr int kFillBlocks = 16;

// Counts for the handle, and for the host, which reads them after the flag. `sums` are of all experts.
__device__ inline void write_counts(const PlanParams& p, uint32_t sequence, const ExpertSums& sums) {
    const Peers& peers = p.peers;
    const int num_local = peers.num_local_experts, first = peers.rank * num_local;
    int32_t *counts = p.plan.counts, *expert_count = counts + kNumPlanCounts;
    auto* host_counts = reinterpret_cast<volatile int32_t*>(peers.status + 1);
    for (int e = threadIdx.x; e < num_local; e += kPlanThreads) {
        expert_count[e] = host_counts[e] = sums.totals[first + e];
        expert_count[num_local + e] = host_counts[num_local + e] = sums.starts[first + e];
    }
    for (int source = threadIdx.x; source <= peers.num_sources(); source += kPlanThreads) {
        p.plan.source_start[source] = rows_before(p, sequence, source, peers.rank);
    }
    if (threadIdx.x == 0) {
        expert_count[2 * num_local] = host_counts[2 * num_local] = sums.ends[peers.rank];
        counts[kOverflow] = counts[kOverflowRows] = 0;
    }
    __syncthreads();
    for (int rank = threadIdx.x; rank < peers.num_ranks; rank += kPlanThreads) {
        const int num_recv_tokens = rows_before(p, sequence, peers.num_sources(), rank);
        const int num_rows = num_rows_of(p, num_recv_tokens, sums.ends[rank]);
        if (rank == peers.rank) {
            counts[kNumRecvTokens] = peers.status->num_recv_tokens = num_recv_tokens;
            counts[kNumRows] = peers.status->num_rows = num_rows;
        }
        // Whichever rank: all of them have one to name, and the same limits.
        const bool fits = num_recv_tokens <= p.plan.max_recv_tokens && num_rows <= p.plan.max_rows;
        if (fits || atomicCAS(&counts[kOverflow], 0, 1 + rank) != 0) continue;
        counts[kOverflowRows] = num_rows;
        if (p.plan.fixed) continue;
        peers.status->overflow = 1 + rank;
        peers.status->overflow_rows = num_rows;
    }
    if (p.ticket == 0) return;
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) *reinterpret_cast<volatile uint32_t*>(&peers.status->counts_ready) = p.ticket;
}

__device__ __host__ inline bool has_padding(const DevicePlan& plan) {
    return plan.layout == LayoutKind::kExpertMajor && plan.alignment > 1;
}

// Output rows that no route fills: padding between experts, and with fixed shapes what is left at the end. `sums` are
// of the local experts.
__device__ inline void fill_rest(const PlanParams& p, uint32_t sequence, int block, const ExpertSums& sums) {
    const DevicePlan& plan = p.plan;
    const int num_local = p.peers.num_local_experts, num_topk = plan.num_topk;
    const bool token_major = plan.layout == LayoutKind::kTokenMajor;
    const auto clear = [&](int64_t row) {
        plan.slot_row[row] = -1;
        if (!token_major && p.topk_weights != nullptr) p.topk_weights[row] = 0.0f;
        for (int k = 0; token_major && p.topk_idx != nullptr && k < num_topk; ++k) {
            p.topk_idx[row * num_topk + k] = -1;
            p.topk_weights[row * num_topk + k] = 0.0f;
        }
    };
    for (int e = block; has_padding(plan) && e < num_local; e += kFillBlocks) {
        const int next = e + 1 < num_local ? sums.starts[e + 1] : sums.ends[0];
        const int64_t end = min(int64_t{next}, plan.max_rows);
        for (int64_t row = sums.starts[e] + sums.totals[e] + threadIdx.x; row < end; row += kPlanThreads) clear(row);
    }
    if (!plan.fixed) return;
    const int num_recv_tokens = rows_before(p, sequence, p.peers.num_sources(), p.peers.rank);
    for (int64_t row = num_rows_of(p, num_recv_tokens, sums.ends[0]) + block * kPlanThreads + threadIdx.x;
         row < plan.max_rows; row += kFillBlocks * kPlanThreads) {
        clear(row);
    }
}

#endif  // __CUDACC__

}  // namespace ray_deepep
