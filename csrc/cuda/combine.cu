// Combine: each token's rows are pulled from where its experts are and added up in float32, in a fixed order.
#include <algorithm>

#include "common/fault.h"
#include "cuda/check.h"
#include "cuda/params.h"
#include "cuda/sum_rows.cuh"

namespace ray_deepep {
namespace {

constexpr int kThreads = 640;
constexpr int kStagingWarps = 8;  // of token-major rows, whose readers can start early

// One route of a token, in lane k.
struct Route {
    int expert = -1;
    int at = 0;  // row at the destination
    float weight = 0.0f;
};

__device__ Route load_route(const CombineParams& p, int token) {
    const int lane = threadIdx.x % 32;
    if (token >= p.plan.num_tokens || lane >= p.plan.num_topk) return Route{};
    const int64_t route = int64_t{token} * p.plan.num_topk + lane;
    return Route{p.plan.send_expert[route], p.by_rank ? p.plan.send_row[route] : p.plan.send_slot[route],
                 p.plan.send_weight[route]};
}

// The order in which a token's rows are added. Per-rank sums take the first route of each rank, by rank; the others
// each route, by k or by expert. A lane's position is the number of kept ones that come before it.
__device__ RowList order_rows(const CombineParams& p, const Sources& sources, const Route& route, bool* keep_lane) {
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk, num_local = p.peers.num_local_experts;
    const int dest = route.expert >= 0 ? route.expert / num_local : -1 - lane;
    // Of lanes with the same rank the lowest is kept.
    const unsigned same = p.by_rank ? __match_any_sync(all, dest) : 0u;
    const bool keep = route.expert >= 0 && (same & ((1u << lane) - 1)) == 0;
    const unsigned kept = __ballot_sync(all, keep);
    int position = __popc(kept & ((1u << lane) - 1));
    if (p.by_rank || p.by_expert) {
        position = 0;
        for (int other = 0; other < num_topk; ++other) {
            const int its_expert = __shfl_sync(all, route.expert, other);
            if ((kept >> other & 1) == 0 || !keep) continue;
            position += its_expert < route.expert || (its_expert == route.expert && other < lane) ? 1 : 0;
        }
    }
    *keep_lane = keep;
    const std::byte* row = keep ? sources.rows[dest] + route.at * p.hidden * element_size(p.dtype) : nullptr;
    const int from = lane_at_position(keep, position, num_topk);
    const auto its_row = __shfl_sync(all, reinterpret_cast<uint64_t>(row), from);
    const float its_weight = __shfl_sync(all, route.weight, from);
    return RowList{reinterpret_cast<const std::byte*>(its_row), its_weight, from, __popc(kept)};
}

__device__ void clear_missing_routes(const CombineParams& p, int64_t token, int64_t row_bytes) {
    for (int k = 0; k < p.plan.num_topk; ++k) {
        if (p.plan.send_expert[token * p.plan.num_topk + k] >= 0) continue;
        auto* kept = reinterpret_cast<uint4*>(p.routes + (int64_t{k} * p.plan.num_tokens + token) * row_bytes);
        for (int64_t i = threadIdx.x % 32; i < row_bytes / 16; i += 32) kept[i] = make_uint4(0, 0, 0, 0);
    }
}

// The numbers that travelled beside the rows, home to their (token, k).
__device__ void pull_row_weights(const CombineParams& p, uint32_t sequence) {
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

// Not inlined, for its registers. Rows that peers will read: token-major, the segments of all other sources by turns;
// else every filled slot.
__device__ __noinline__ void stage_combine(const CombineParams& p, uint32_t sequence) {
    const DevicePlan& plan = p.plan;
    const int rank = p.peers.rank, others = p.peers.num_ranks - 1;
    if (plan.layout != LayoutKind::kTokenMajor) {
        const int64_t pieces = (p.staging.num_rows + kReadyRows - 1) / kReadyRows;
        return stage_rows(
            p.peers, p.staging, sequence, pieces, [](int64_t i) { return i; },
            [&](int64_t row) { return plan.slot_row[row] >= 0 && plan.recv_source[plan.slot_row[row]] != rank; });
    }
    int most = 0;
    for (int source = 0; source <= others; ++source) {
        most = max(most, plan.source_start[source + 1] - plan.source_start[source]);
    }
    const int own_start = plan.source_start[rank], own_end = plan.source_start[rank + 1];
    const auto piece_at = [&](int64_t i) {
        const int source = static_cast<int>((rank + 1 + i % others) % (others + 1));
        const int start = plan.source_start[source], end = plan.source_start[source + 1];
        const int64_t piece = start / kReadyRows + i / others;
        return start < end && piece <= (end - 1) / kReadyRows ? piece : -1;
    };
    stage_rows(p.peers, p.staging, sequence, (most / kReadyRows + 2) * int64_t{others}, piece_at,
               [&](int64_t row) { return row < own_start || row >= own_end; });
}

// A warp takes one token after the other; what it needs to know about the next is loaded while it adds.
template <typename T, int kMostRows>
__device__ void combine_tokens(const CombineParams& p, const Sources& sources, uint32_t sequence) {
    const int lane = threadIdx.x % 32, num_local = p.peers.num_local_experts;
    const int64_t row_bytes = p.hidden * sizeof(T);
    const int num_warps = gridDim.x * blockDim.x / 32;
    int token = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    uint32_t* counter = &p.peers.control->next_token;
    int next = lane == 0 ? num_warps + static_cast<int>(atomicAdd(counter, 1u)) : 0;
    Route route = load_route(p, token);
    next = __shfl_sync(0xffffffffu, next, 0);
    while (token < p.plan.num_tokens) {
        const int after = lane == 0 ? num_warps + static_cast<int>(atomicAdd(counter, 1u)) : 0;
        const Route next_route = load_route(p, next);
        bool keep = false, ok = true;
        const RowList list = order_rows(p, sources, route, &keep);
        if (keep && sources.staged[route.expert / num_local]) {
            ok = wait_rows_ready(p.peers, p.publication, route.expert / num_local, route.at, sequence);
        }
        if (__any_sync(0xffffffffu, !ok)) return;
        const int64_t at = token * row_bytes;
        std::byte* routes = p.routes == nullptr ? nullptr : p.routes + at;
        const RowSum to{p.out + at,
                        p.bias == nullptr ? nullptr : p.bias + at,
                        routes,
                        p.plan.num_tokens * row_bytes,
                        static_cast<int>(row_bytes / 16),
                        p.weighted && !p.by_rank};
        sum_rows<T, kMostRows, 4>(to, list);
        if (p.routes != nullptr) clear_missing_routes(p, token, row_bytes);
        token = next;
        route = next_route;
        next = __shfl_sync(0xffffffffu, after, 0);
    }
}

template <typename T, int kMostRows>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const __grid_constant__ CombineParams p) {
    __shared__ Sources sources;
    const uint32_t sequence = begin_operation(p.peers, p.publication, &sources);
    if (p.staging.num_warps > 0 && threadIdx.x / 32 >= kThreads / 32 - p.staging.num_warps) stage_combine(p, sequence);
    if (threadIdx.x < 32) find_sources(p.peers, p.publication, sequence, p.own_rows, nullptr, &sources);
    if (await_sources(&sources)) {
        if (p.topk_weights != nullptr) pull_row_weights(p, sequence);
        if (p.has_rows) combine_tokens<T, kMostRows>(p, sources, sequence);
    }
    end_operation(p.peers, p.publication, sequence);
}

}  // namespace

void launch_combine(const CombineParams& given, cudaStream_t stream) {
    CombineParams params = given;
    if (params.staging.num_rows > 0) {
        params.staging.num_warps = params.plan.layout == LayoutKind::kTokenMajor ? kStagingWarps : kThreads / 32;
    }
    const int num_topk = params.plan.num_topk, num_ranks = params.peers.num_ranks;
    with_float_type(params.dtype, [&](auto type) {
        with_most_rows(params.by_rank ? std::min(num_topk, num_ranks) : num_topk, [&](auto most) {
            combine_kernel<decltype(type), most.value><<<params.num_sms, kThreads, 0, stream>>>(params);
        });
    });
    check_launch("combine_kernel");
}

}  // namespace ray_deepep
