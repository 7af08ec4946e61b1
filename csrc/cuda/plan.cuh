// What the blocks of the plan kernel share: sums over the totals that all ranks published. Every block works out what
// it needs by itself, so that blocks need not wait for each other.
#pragma once

#include "cuda/params.h"

namespace ray_deepep {

#ifdef __CUDACC__

inline constexpr int kPlanThreads = 128;
inline constexpr unsigned kAll = 0xffffffffu;

// In 32 bits where they do: a division of 64 is a hundred instructions.
__device__ inline int round_up(int value, int64_t multiple) {
    if (multiple >= 1 << 30) return static_cast<int>((value + multiple - 1) / multiple * multiple);
    const auto step = static_cast<uint32_t>(multiple);
    return static_cast<int>((value + step - 1) / step * step);
}

// What a rank published for one part of its tokens, a number for each of `columns`.
__device__ inline const int32_t* totals_of(const PlanParams& p, uint32_t sequence, int source, int64_t at,
                                           int columns) {
    const Peers& peers = p.peers;
    const int part = peers.layout.num_parts == 1 ? 0 : source / peers.num_ranks;
    return peers.in_area<const int32_t>(source - part * peers.num_ranks, sequence, at) + part * columns;
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

// Totals of two experts: what several ranks published of both is on its way together. (Loops over ranks that are only
// unrolled leave two ranks to a rest that loads one by one.)
__device__ inline void sum_two_experts(const PlanParams& p, uint32_t sequence, int source, const int32_t* earlier,
                                       const ExpertSums& sums, const int (&experts)[2]) {
    constexpr int kRanks = 4;  // in flight
    const Peers& peers = p.peers;
    int total[2] = {}, before[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        if (earlier != nullptr && experts[j] < sums.count) before[j] = earlier[sums.first + experts[j]];
    }
    const int num_sources = peers.num_sources();
    for (int base = 0; base < num_sources; base += kRanks) {
        int counts[2][kRanks];
#pragma unroll
        for (int i = 0; i < 2 * kRanks; ++i) {
            const int of = base + i / 2, expert = experts[i % 2];
            counts[i % 2][i / 2] = 0;
            if (of >= num_sources || expert >= sums.count) continue;
            const int64_t at = peers.layout.area.expert_total_at;
            counts[i % 2][i / 2] = totals_of(p, sequence, of, at, peers.num_experts)[sums.first + expert];
        }
#pragma unroll
        for (int i = 0; i < 2 * kRanks; ++i) {
            total[i % 2] += counts[i % 2][i / 2];
            before[i % 2] += base + i / 2 < source ? counts[i % 2][i / 2] : 0;
        }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        if (experts[j] >= sums.count) continue;
        sums.totals[experts[j]] = total[j];
        sums.before[experts[j]] = before[j];
    }
}

// Whole block. `earlier`: [E] routes to each expert in the chunks before one of the source's; null: none.
__device__ inline void sum_experts(const PlanParams& p, uint32_t sequence, int source, const int32_t* earlier,
                                   const ExpertSums& sums) {
    const Peers& peers = p.peers;
    const int num_local = peers.num_local_experts, lane = threadIdx.x % 32;
    for (int first = threadIdx.x; first < sums.count; first += 2 * kPlanThreads) {
        const int experts[2] = {first, first + kPlanThreads};
        sum_two_experts(p, sequence, source, earlier, sums, experts);
    }
    __syncthreads();
    for (int rank = threadIdx.x / 32; rank * num_local < sums.count; rank += kPlanThreads / 32) {
        int start = 0;
        for (int at = 0; at < num_local; at += 32) {
            const int local = at + lane, e = rank * num_local + local;
            const int size = local < num_local ? round_up(sums.totals[e], p.plan.alignment) : 0;
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
    constexpr int kRanks = 8;  // in flight
    const Peers& peers = p.peers;
    int rows = 0;
    for (int base = 0; base < source; base += kRanks) {
        int counts[kRanks];
#pragma unroll
        for (int i = 0; i < kRanks; ++i) {
            const int of = base + i;
            counts[i] = 0;
            if (of >= source) continue;
            counts[i] = totals_of(p, sequence, of, peers.layout.area.rank_total_at, peers.num_ranks)[rank];
        }
#pragma unroll
        for (int i = 0; i < kRanks; ++i) rows += counts[i];
    }
    return rows;
}

__device__ inline int num_rows_of(const PlanParams& p, int num_recv_tokens, int end) {
    if (p.plan.layout == LayoutKind::kExpertMajor) return end;
    if (p.plan.layout == LayoutKind::kTokenMajor) return num_recv_tokens;
    return static_cast<int>(p.peers.num_sources() * p.peers.num_local_experts * p.plan.capacity);
}

#endif  // __CUDACC__

}  // namespace ray_deepep
