// The blocks of the plan kernel that list no rows: one writes the counts, some fill what no route fills.
#pragma once

#include "cuda/plan.cuh"

namespace ray_deepep {

#ifdef __CUDACC__

inline constexpr int kFillBlocks = 16;

// What the host reads. Each value is stored twice, from a register: one that is assigned through both pointers at once
// is read back, and a read of the host's memory takes microseconds.
struct Stored {
    int32_t* here;
    volatile int32_t* on_host;

    __device__ void store(int i, int32_t value) const {
        here[i] = value;
        on_host[i] = value;
    }
};

// One of the ranks, a thread each: whether what it receives fits.
__device__ inline void write_rank(const PlanParams& p, int rank, int num_recv_tokens, int num_rows) {
    int32_t* counts = p.plan.counts;
    if (rank == p.peers.rank) {
        counts[kNumRecvTokens] = num_recv_tokens;
        counts[kNumRows] = num_rows;
        p.peers.status->num_recv_tokens = num_recv_tokens;
        p.peers.status->num_rows = num_rows;
    }
    // Whichever rank: all of them have one to name, and the same limits.
    const bool fits = num_recv_tokens <= p.plan.max_recv_tokens && num_rows <= p.plan.max_rows;
    if (fits || atomicCAS(&counts[kOverflow], 0, 1 + rank) != 0) return;
    counts[kOverflowRows] = num_rows;
    if (p.plan.fixed) return;
    p.peers.status->overflow = 1 + rank;
    p.peers.status->overflow_rows = num_rows;
}

// One block: counts for the handle, and for the host, which reads them after the flag. `sums` have room for all
// experts.
__device__ inline void write_counts(const PlanParams& p, uint32_t sequence, const ExpertSums& sums) {
    static_assert(kMaxRanks <= kPlanThreads && kMaxSources <= kPlanThreads);
    const Peers& peers = p.peers;
    const int i = threadIdx.x, num_local = peers.num_local_experts, first = peers.rank * num_local;
    const int num_sources = peers.num_sources();
    // Other warps than those of the sources, so that both load at once.
    const int rank = kPlanThreads - 1 - i;
    const int num_recv_tokens = rank < peers.num_ranks ? rows_before(p, sequence, num_sources, rank) : 0;
    const int start = i < num_sources ? rows_before(p, sequence, i, peers.rank) : 0;
    sum_experts(p, sequence, 0, nullptr, sums);
    if (i == 0) p.plan.counts[kOverflow] = p.plan.counts[kOverflowRows] = 0;
    if (i < num_sources) p.plan.source_start[i] = start;
    if (rank == peers.rank) p.plan.source_start[num_sources] = num_recv_tokens;
    const Stored counts{p.plan.counts + kNumPlanCounts, reinterpret_cast<volatile int32_t*>(peers.status + 1)};
    for (int e = i; e < num_local; e += kPlanThreads) {
        counts.store(e, sums.totals[first + e]);
        counts.store(num_local + e, sums.starts[first + e]);
    }
    if (i == 0) counts.store(2 * num_local, sums.ends[peers.rank]);
    __syncthreads();
    if (rank < peers.num_ranks) {
        write_rank(p, rank, num_recv_tokens, num_rows_of(p, num_recv_tokens, sums.ends[rank]));
    }
    if (p.ticket == 0) return;
    __threadfence_system();
    __syncthreads();
    if (i == 0) *reinterpret_cast<volatile uint32_t*>(&peers.status->counts_ready) = p.ticket;
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
