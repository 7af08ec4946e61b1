// Shared by the two pull kernels: in which order rows are pulled, and the launchers.
#pragma once

#include "cuda/params.h"

namespace ray_deepep {

#ifdef __CUDACC__

// Rows of all sources by turns, starting behind this rank, so that links and local memory are busy all the time and no
// source is read by everybody at once.
struct PullOrder {
    const int* starts;
    int rank, num_ranks, num_sources, room;
    int most = 0;  // rows of the source that sends most

    __device__ PullOrder(const PullParams& p, const Sources& sources)
        : starts(sources.starts),
          rank(p.peers.rank),
          num_ranks(p.peers.num_ranks),
          num_sources(p.peers.num_sources()),
          room(static_cast<int>(p.plan.max_recv_tokens)) {
        for (int source = 0; source < num_sources; ++source) most = max(most, starts[source + 1] - starts[source]);
    }
    __device__ int size() const { return most * num_sources; }
    __device__ int rank_of(int i) const { return (rank + 1 + i % num_sources) % num_ranks; }
    // -1: this turn's source has no more rows, or there is no room.
    __device__ int row_of(int i) const {
        const int turn = i % num_sources, source = turn - turn % num_ranks + (rank + 1 + turn) % num_ranks;
        const int row = starts[source] + i / num_sources;
        return row < starts[source + 1] && row < room ? row : -1;
    }
};

// Output rows that may be empty, to be cleared: none where rows are dense.
__device__ inline int64_t num_clear_candidates(const DevicePlan& plan) {
    if (plan.fixed) return plan.max_rows;
    const bool dense =
        plan.layout == LayoutKind::kTokenMajor || (plan.layout == LayoutKind::kExpertMajor && plan.alignment == 1);
    return dense ? 0 : min(int64_t{plan.counts[kNumRows]}, plan.max_rows);
}

// Every thread, first thing. A launch that the host made before it knew how many rows come does nothing where they do
// not fit, or where a rank has more than it can take: the host then launches again, or raises.
__device__ inline bool has_room(const PullParams& p) {
    return p.room < 0 || (p.plan.counts[kOverflow] == 0 && p.plan.counts[kNumRows] <= p.room);
}

// Warps that stage take part in nothing else.
__device__ inline bool is_staging_warp(const Staging& staging) {
    return staging.num_warps > 0 && threadIdx.x / 32 >= blockDim.x / 32 - staging.num_warps;
}

// One warp of the grid: rows that come from each rank, with their scales.
__device__ inline void count_pulled(const PullParams& p, const Sources& sources) {
    const int room = static_cast<int>(p.plan.max_recv_tokens), num_ranks = p.peers.num_ranks;
    const int64_t bytes = p.row_bytes + (p.out_scales != nullptr ? p.scale_bytes : 0);
    for (int rank = threadIdx.x % 32; rank < num_ranks; rank += 32) {
        int rows = 0;
        for (int source = rank; source < p.peers.num_sources(); source += num_ranks) {
            rows += min(sources.starts[source + 1], room) - min(sources.starts[source], room);
        }
        count_received(p.peers, rank, rows * bytes);
    }
}

// Every warp that pulls.
__device__ inline bool learn_sources(const PullParams& p, uint32_t sequence, Sources* sources) {
    if (threadIdx.x < 32) {
        find_sources(p.peers, p.publication, sequence, p.own_rows, p.own_scales, p.plan.source_start, sources);
    }
    sync_warps(BlockBarrier::kSources, p.num_warps * 32);
    if (blockIdx.x == 0 && threadIdx.x < 32 && sources->ok) count_pulled(p, *sources);
    fence_bulk_copies();
    return sources->ok;
}

// stage(row), by a warp, puts a row of this rank into its area.
template <typename Stage>
__device__ void stage_dispatch(const PullParams& p, uint32_t sequence, StagedRows* shared, Stage stage) {
    const int64_t pieces = (p.staging.num_rows + kReadyRows - 1) / kReadyRows;
    stage_rows<false>(
        p.peers, p.staging, sequence, pieces, shared, [](int64_t i) { return i; },
        [&](int64_t row, auto) { stage(row); });
}

// Not inlined, for the registers of those that pull.
__device__ __noinline__ static void stage_copies(const PullParams& p, uint32_t sequence, StagedRows* shared) {
    stage_dispatch(p, sequence, shared,
                   [&](int64_t row) { stage_copy(staged_row(p.peers, p.staging, sequence, row), p.staging, row); });
}

#endif  // __CUDACC__

void launch_pull_bulk(const PullParams& params, cudaStream_t stream);
void launch_pull_vector(const PullParams& params, cudaStream_t stream);

}  // namespace ray_deepep
