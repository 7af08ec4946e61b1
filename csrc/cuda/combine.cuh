// The combine kernel. Each token's rows are pulled from where its experts are and added up in float32, in a fixed
// order. In fast mode a rank first adds up, for each token of another rank, its local experts' rows, and peers read
// those sums; the local experts of its own tokens are added up when their token's turn comes.
#pragma once

#include "cuda/check.h"
#include "cuda/params.h"
#include "cuda/sum_rows.cuh"

namespace ray_deepep {

inline constexpr int kCombineThreads = 512;
inline constexpr int kCopyingWarps = 8;  // that stage token-major rows, whose readers can start early

// One route of a token, in lane k.
struct Route {
    int expert = -1;
    int row = 0;   // token row at the destination
    int slot = 0;  // output row at the destination
    float weight = 0.0f;
};

__device__ inline Route load_route(const CombineParams& p, int token) {
    const int lane = threadIdx.x % 32;
    if (token >= p.plan.num_tokens || lane >= p.plan.num_topk) return Route{};
    const int64_t route = int64_t{token} * p.plan.num_topk + lane;
    return Route{p.plan.send_expert[route], p.plan.send_row[route], p.plan.send_slot[route], p.plan.send_weight[route]};
}

// What a lane adds to its token's list.
struct Entry {
    bool keep = false;
    bool counts = false;  // among the rows that come from there: of those summed per rank, one for each token
    int dest = 0;
    int at = 0;  // row there
};

// Per-rank sums take the first route of each rank; in fast mode all routes of this rank, whose rows are here.
__device__ inline Entry make_entry(const CombineParams& p, const Route& route) {
    const int lane = threadIdx.x % 32;
    const int dest = route.expert >= 0 ? route.expert / p.peers.num_local_experts : -1 - lane;
    const bool own_group = p.fast && dest == p.peers.rank;
    const unsigned same = p.by_rank ? __match_any_sync(0xffffffffu, dest) : 0u;
    const bool first = (same & ((1u << lane) - 1)) == 0;
    const int at = p.by_rank && !own_group ? route.row : route.slot;
    return Entry{route.expert >= 0 && (first || own_group), route.expert >= 0 && first, dest, at};
}

// The order in which a token's rows are added: by rank and k, by expert and k, or by k. A lane's position is the number
// of kept entries that come before its own.
__device__ inline RowList order_rows(const CombineParams& p, const Sources& sources, const Route& route,
                                     const Entry& entry) {
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk;
    const unsigned kept = __ballot_sync(all, entry.keep);
    const int key = p.by_rank ? entry.dest : (p.by_expert ? route.expert : 0);
    int position = 0;
    for (int other = 0; other < num_topk; ++other) {
        const int its_key = __shfl_sync(all, key, other);
        if ((kept >> other & 1) != 0) position += its_key < key || (its_key == key && other < lane) ? 1 : 0;
    }
    const std::byte* row = nullptr;
    if (entry.keep) row = sources.rows[entry.dest] + entry.at * p.hidden * element_size(p.dtype);
    const int from = lane_at_position(entry.keep, position, num_topk);
    const auto its_row = __shfl_sync(all, reinterpret_cast<uint64_t>(row), from);
    const float its_weight = __shfl_sync(all, route.weight, from);
    RowList list{reinterpret_cast<const std::byte*>(its_row), its_weight, from, __popc(kept)};
    if (p.fast) {
        const unsigned own = __ballot_sync(all, entry.keep && entry.dest == p.peers.rank);
        list.group_begin = __popc(__ballot_sync(all, entry.keep && entry.dest < p.peers.rank));
        list.group_end = list.group_begin + __popc(own);
    }
    return list;
}

// The numbers that travelled beside the rows, home to their (token, k).
__device__ inline void pull_row_weights(const CombineParams& p, uint32_t sequence) {
    const int num_topk = p.plan.num_topk;
    const int64_t routes = int64_t{p.plan.num_tokens} * num_topk;
    for (int64_t route = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; route < routes;
         route += int64_t{gridDim.x} * blockDim.x) {
        const int expert = p.plan.send_expert[route];
        float value = 0.0f;
        if (expert >= 0) {
            const auto* weights = p.peers.in_area<const float>(expert / p.peers.num_local_experts, sequence,
                                                               p.peers.layout.area.row_weights_at);
            value = p.plan.layout == LayoutKind::kTokenMajor
                        ? weights[int64_t{p.plan.send_row[route]} * num_topk + route % num_topk]
                        : weights[p.plan.send_slot[route]];
        }
        p.topk_weights[route] = value;
    }
}

// Sum of a received token's local experts, into the area.
template <typename T>
__device__ void stage_sum(const CombineParams& p, uint32_t sequence, int64_t row, SumRing& ring) {
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk;
    const int64_t row_bytes = p.hidden * sizeof(T);
    int slot = -1;
    float weight = 0.0f;
    if (lane < num_topk) {
        slot = p.plan.recv_slot[row * num_topk + lane];
        weight = p.plan.recv_weight[row * num_topk + lane];
    }
    const unsigned held = __ballot_sync(all, slot >= 0);
    const int from = lane_at_position(slot >= 0, __popc(held & ((1u << lane) - 1)), num_topk);
    const int its_slot = __shfl_sync(all, slot, from);
    const float its_weight = __shfl_sync(all, weight, from);
    auto* area = p.peers.in_area<std::byte>(p.peers.rank, sequence, p.peers.layout.area.rows_at);
    const RowSum to{area + row * row_bytes, nullptr, nullptr, 0, static_cast<int>(row_bytes / 16), p.weighted};
    sum_rows<T, false>(to, RowList{p.staging.rows + its_slot * row_bytes, its_weight, from, __popc(held)}, ring);
}

template <typename Started>
__device__ void stage_copy(const CombineParams& p, uint32_t sequence, int64_t row, SumRing& ring, Started started) {
    const StagedRow at = staged_row(p.peers, p.staging, sequence, row);
    copy_row(at.from, at.to, p.staging.row_bytes, ring, started);
}

// Not inlined, for its registers; the ring comes back by value, to stay in registers too. Rows that peers will read:
// per-rank sums, in the segments of all other sources by turns; else every filled slot.
template <typename T, bool kFast>
__device__ __noinline__ SumRing stage_combine(const CombineParams& p, uint32_t sequence, StagedRows* shared,
                                              SumRing ring) {
    const DevicePlan& plan = p.plan;
    const int rank = p.peers.rank, num_ranks = p.peers.num_ranks, others = num_ranks - 1;
    const int num_sources = p.peers.num_sources(), turns = p.peers.layout.num_parts * others;
    if (!p.by_rank) {
        const int64_t pieces = (p.staging.num_rows + kReadyRows - 1) / kReadyRows;
        stage_rows<true>(
            p.peers, p.staging, sequence, pieces, shared, [](int64_t i) { return i; },
            [&](int64_t row, auto finish_last) {
                if (plan.slot_row[row] < 0 || plan.recv_source[plan.slot_row[row]] == rank) return;
                stage_copy(p, sequence, row, ring, finish_last);
            });
        return ring;
    }
    int most = 0;
    for (int source = 0; source < num_sources; ++source) {
        most = max(most, plan.source_start[source + 1] - plan.source_start[source]);
    }
    const auto piece_at = [&](int64_t i) {
        const int turn = static_cast<int>(i % turns);
        const int source = turn / others * num_ranks + (rank + 1 + turn % others) % num_ranks;
        const int start = plan.source_start[source], end = plan.source_start[source + 1];
        const int64_t piece = start / kReadyRows + i / turns;
        return start < end && piece <= (end - 1) / kReadyRows ? piece : -1;
    };
    const int64_t pieces = (most / kReadyRows + 2) * int64_t{turns};
    stage_rows<!kFast>(p.peers, p.staging, sequence, pieces, shared, piece_at, [&](int64_t row, auto finish_last) {
        if (row >= plan.source_start[num_sources] || plan.recv_source[row] == rank) return;
        if constexpr (kFast) {
            return stage_sum<T>(p, sequence, row, ring);
        }
        stage_copy(p, sequence, row, ring, finish_last);
    });
    return ring;
}

__device__ inline void clear_missing_routes(const CombineParams& p, int64_t token, int64_t row_bytes) {
    for (int k = 0; k < p.plan.num_topk; ++k) {
        if (p.plan.send_expert[token * p.plan.num_topk + k] >= 0) continue;
        auto* kept = reinterpret_cast<uint4*>(p.routes + (int64_t{k} * p.plan.num_tokens + token) * row_bytes);
        for (int64_t i = threadIdx.x % 32; i < row_bytes / 16; i += 32) kept[i] = make_uint4(0, 0, 0, 0);
    }
}

// Whole warp: false if the operation has failed.
__device__ inline bool wait_entries_ready(const CombineParams& p, const Sources& sources, const Entry& entry,
                                          uint32_t sequence) {
    const bool staged = entry.keep && sources.staged[entry.dest];
    if (!__any_sync(0xffffffffu, staged)) return true;
    const bool ok = !staged || wait_rows_ready(p.peers, p.publication, entry.dest, entry.at, sequence);
    const bool all_ok = __all_sync(0xffffffffu, ok);
    __syncwarp();
    fence_bulk_copies();
    return all_ok;
}

// A warp takes one token after the other; what it needs to know about the next is loaded while it adds.
template <typename T, bool kFast>
__device__ void combine_tokens(const CombineParams& p, const Sources& sources, uint32_t sequence, SumRing& ring,
                               int* num_rows) {
    const int lane = threadIdx.x % 32, num_warps = gridDim.x * blockDim.x / 32;
    const int64_t row_bytes = p.hidden * sizeof(T);
    uint32_t* counter = &p.peers.control->next_token;
    const auto take_token = [&] { return lane == 0 ? num_warps + static_cast<int>(atomicAdd(counter, 1u)) : 0; };
    int token = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    int next = take_token();
    Route route = load_route(p, token);
    next = __shfl_sync(0xffffffffu, next, 0);
    while (token < p.plan.num_tokens) {
        const int after = take_token();
        const Route next_route = load_route(p, next);
        const Entry entry = make_entry(p, route);
        if (entry.counts) atomicAdd(&num_rows[entry.dest], 1);
        const RowList list = order_rows(p, sources, route, entry);
        if (!wait_entries_ready(p, sources, entry, sequence)) return;
        const int64_t at = token * row_bytes;
        const RowSum to{p.out + at,
                        p.bias == nullptr ? nullptr : p.bias + at,
                        p.routes == nullptr ? nullptr : p.routes + at,
                        p.plan.num_tokens * row_bytes,
                        static_cast<int>(row_bytes / 16),
                        p.weighted};
        sum_rows<T, kFast>(to, list, ring);
        if (p.routes != nullptr) clear_missing_routes(p, token, row_bytes);
        token = next;
        route = next_route;
        next = __shfl_sync(0xffffffffu, after, 0);
    }
}

// Every warp: go on when the first one has found the sources. Those that stage come later than the others, who do not
// wait for them, unless the first is one of them.
__device__ inline void share_sources(int staging_threads) {
    const int first = kCombineThreads - staging_threads;
    if (first == 0 || staging_threads == 0) return sync_warps(BlockBarrier::kSources, kCombineThreads);
    const int late = staging_threads + 32;
    if (static_cast<int>(threadIdx.x) >= first) return sync_warps(BlockBarrier::kLateSources, late);
    sync_warps(BlockBarrier::kSources, first);
    if (threadIdx.x < 32) arrive_warps(BlockBarrier::kLateSources, late);
}

template <typename T, bool kFast>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_kernel(const __grid_constant__ CombineParams p) {
    extern __shared__ __align__(128) uint4 room[];
    __shared__ Sources sources;
    __shared__ StagedRows staged;
    __shared__ uint64_t barriers[kCombineThreads / 32 * SumRing::kDepth];
    SumRing ring(room, barriers, threadIdx.x / 32);
    __shared__ int num_rows[kMaxRanks];  // that this block reads from each rank
    if (threadIdx.x < kMaxRanks) num_rows[threadIdx.x] = 0;
    init_staged_rows(&staged);
    const uint32_t sequence = begin_operation(p.peers, p.publication);
    const int staging = p.staging.num_warps * 32;
    if (threadIdx.x >= kCombineThreads - staging) ring = stage_combine<T, kFast>(p, sequence, &staged, ring);
    if (threadIdx.x < 32) {
        find_sources(p.peers, p.publication, sequence, p.own_rows, nullptr, p.plan.source_start, &sources);
    }
    share_sources(staging);
    fence_bulk_copies();
    if (sources.ok) {
        if (p.topk_weights != nullptr) pull_row_weights(p, sequence);
        if (p.has_rows) combine_tokens<T, kFast>(p, sources, sequence, ring, num_rows);
    }
    __syncthreads();
    const int rank = threadIdx.x;
    if (rank < p.peers.num_ranks && num_rows[rank] > 0) {
        count_received(p.peers, rank, num_rows[rank] * p.hidden * static_cast<int64_t>(sizeof(T)));
    }
    end_operation(p.peers, p.publication, sequence);
}

inline constexpr int kCombineSharedBytes = sum_shared_bytes(kCombineThreads);

template <bool kFast>
void allow_combine_kernels() {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        with_float_type(dtype, [](auto type) {
            check_cuda(cudaFuncSetAttribute(combine_kernel<decltype(type), kFast>,
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, kCombineSharedBytes),
                       "shared memory of combine_kernel");
        });
    }
}

template <bool kFast>
void launch_combine_kernel(const CombineParams& params, cudaStream_t stream) {
    with_float_type(params.dtype, [&](auto type) {
        combine_kernel<decltype(type), kFast><<<params.num_sms, kCombineThreads, kCombineSharedBytes, stream>>>(params);
    });
    check_launch("combine_kernel");
}

void allow_combine_fast();
void launch_combine_fast(const CombineParams& params, cudaStream_t stream);

}  // namespace ray_deepep
