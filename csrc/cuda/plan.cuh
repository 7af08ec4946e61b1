// What the blocks of the plan kernel share: sums over the totals that all ranks published. Every block works out what
// it needs by itself, so that blocks need not wait for each other.
#pragma once

#include "cuda/params.h"

namespace ray_deepep {

#ifdef __CUDACC__

inline constexpr int kPlanThreads = 256;
inline constexpr unsigned kAll = 0xffffffffu;

__device__ inline int round_up(int value, unsigned multiple) {
    return multiple == 1 ? value : static_cast<int>((value + multiple - 1) / multiple * multiple);
}

// Calls use(source, *at(rank, part)) for the first sources in order. Some loads are in flight together: a peer's memory
// is microseconds away.
template <typename At, typename Use>
__device__ void for_sources(const PlanParams& p, int num_sources, At at, Use use) {
    constexpr int kLoads = 8;
    const int num_ranks = p.peers.num_ranks;
    for (int first = 0, part = 0, rank = 0; first < num_sources; first += kLoads) {
        int found[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            found[i] = first + i < num_sources ? *at(rank, part) : 0;
            rank = rank + 1 == num_ranks ? 0 : rank + 1;
            part += rank == 0 ? 1 : 0;
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) use(first + i, found[i]);
    }
}

// Experts [first, first + count), whole ranks of them, in shared memory.
struct ExpertSums {
    int first;
    int count;
    int* totals;  // [count] routes
    int* starts;  // [count] first output row at the expert's rank
    int* before;  // [count] routes from sources before `source`, and from earlier chunks of it
    int* ends;    // [N] output rows of each of the ranks, expert-major
};

// Whole block. `earlier`: [E] routes to each expert in the chunks before one of the source's; null: none.
__device__ inline void sum_experts(const PlanParams& p, uint32_t sequence, int source, const int32_t* earlier,
                                   const ExpertSums& sums) {
    const Peers& peers = p.peers;
    const int num_local = peers.num_local_experts, lane = threadIdx.x % 32;
    for (int e = threadIdx.x; e < sums.count; e += kPlanThreads) {
        int total = 0, before = earlier == nullptr ? 0 : earlier[sums.first + e];
        for_sources(
            p, peers.num_sources(),
            [&](int other, int part) {
                const auto* totals = peers.in_area<const int32_t>(other, sequence, peers.layout.area.expert_total_at);
                return totals + part * peers.num_experts + sums.first + e;
            },
            [&](int of_source, int count) {
                before += of_source < source ? count : 0;
                total += count;
            });
        sums.totals[e] = total;
        sums.before[e] = before;
    }
    __syncthreads();
    for (int rank = threadIdx.x / 32; rank * num_local < sums.count; rank += kPlanThreads / 32) {
        int start = 0;
        for (int at = 0; at < num_local; at += 32) {
            const int local = at + lane, e = rank * num_local + local;
            const int size = local < num_local ? round_up(sums.totals[e], static_cast<unsigned>(p.plan.alignment)) : 0;
            int sum = size;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(kAll, sum, step);
                if (lane >= step) sum += other;
            }
            if (local < num_local) sums.starts[e] = start + sum - size;
            start += __shfl_sync(kAll, sum, 31);
        }
        if (lane == 0) sums.ends[rank] = start;
    }
    __syncthreads();
}

// Token rows that `rank` receives from sources before `source`.
__device__ inline int rows_before(const PlanParams& p, uint32_t sequence, int source, int rank) {
    int rows = 0;
    for_sources(
        p, source,
        [&](int other, int part) {
            const auto* totals = p.peers.in_area<const int32_t>(other, sequence, p.peers.layout.area.rank_total_at);
            return totals + part * p.peers.num_ranks + rank;
        },
        [&](int, int count) { rows += count; });
    return rows;
}

__device__ inline int num_rows_of(const PlanParams& p, int num_recv_tokens, int end) {
    if (p.plan.layout == LayoutKind::kExpertMajor) return end;
    if (p.plan.layout == LayoutKind::kTokenMajor) return num_recv_tokens;
    return static_cast<int>(p.peers.num_sources() * p.peers.num_local_experts * p.plan.capacity);
}

#endif  // __CUDACC__

}  // namespace ray_deepep
