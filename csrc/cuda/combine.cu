// Combine: each token's rows are pulled from where its experts are and added up in float32, in a fixed order.
#include "common/fault.h"
#include "cuda/check.h"
#include "cuda/params.h"
#include "cuda/sources.cuh"
#include "cuda/vec.cuh"

namespace ray_deepep {
namespace {

constexpr int kThreads = 512;

// The rows of one token in the order in which they are added; one per lane, `count` of them.
struct Order {
    const std::byte* row;
    float weight;
    int k;
    int count;
};

// Per-rank sums take the first route of each rank, by rank; the others each route, by k or by expert. Lane i ends up
// with the i-th row: each lane holds one k, and its position is the number of kept ones that come before it.
__device__ Order order_rows(const CombineParams& p, const Sources& sources, int64_t token) {
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk, num_local = p.peers.num_local_experts;
    const unsigned all = 0xffffffffu;
    const bool inside = lane < num_topk;
    const int64_t route = token * num_topk + (inside ? lane : 0);
    const int expert = inside ? p.plan.send_expert[route] : -1;
    const int dest = expert >= 0 ? expert / num_local : -1;
    bool keep = expert >= 0;
    int position = 0;
    for (int other = 0; other < num_topk; ++other) {
        const int other_expert = __shfl_sync(all, expert, other);
        if (other_expert < 0 || expert < 0) continue;
        const int other_dest = other_expert / num_local;
        if (p.by_rank && other < lane && other_dest == dest) keep = false;
    }
    for (int other = 0; other < num_topk; ++other) {
        const int other_expert = __shfl_sync(all, expert, other);
        const bool other_kept = __shfl_sync(all, keep ? 1 : 0, other) != 0;
        if (!other_kept || !keep) continue;
        bool before = other < lane;
        if (p.by_rank) before = other_expert / num_local < dest;
        if (p.by_expert) before = other_expert < expert || (other_expert == expert && other < lane);
        position += before ? 1 : 0;
    }
    const std::byte* row = nullptr;
    float weight = 0.0f;
    if (keep) {
        const int64_t at = p.by_rank ? p.plan.send_row[route] : p.plan.send_slot[route];
        row = sources.rows[dest] + at * p.hidden * element_size(p.dtype);
        weight = p.plan.send_weight[route];
    }
    Order order{nullptr, 0.0f, 0, __popc(__ballot_sync(all, keep))};
    // Lane i looks for the lane whose position is i.
    for (int other = 0; other < num_topk; ++other) {
        const bool kept = __shfl_sync(all, keep ? 1 : 0, other) != 0;
        const int its_position = __shfl_sync(all, position, other);
        const auto its_row = __shfl_sync(all, reinterpret_cast<uint64_t>(row), other);
        const float its_weight = __shfl_sync(all, weight, other);
        if (!kept || its_position != lane) continue;
        order = Order{reinterpret_cast<const std::byte*>(its_row), its_weight, other, order.count};
    }
    return order;
}

template <typename T>
__device__ void combine_token(const CombineParams& p, const Order& order, int64_t token, int64_t row_bytes) {
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % 32;
    const int64_t vectors = row_bytes / 16;
    for (int64_t base = 0; base < vectors; base += 64) {
        // Two vectors a lane: loads of both are in flight together, for each of the rows.
        const int64_t i = base + lane, j = i + 32;
        Accumulator<T> first, second;
        for (int n = 0; n < order.count; ++n) {
            const auto row =
                reinterpret_cast<const std::byte*>(__shfl_sync(all, reinterpret_cast<uint64_t>(order.row), n));
            const float weight = __shfl_sync(all, order.weight, n);
            const int k = __shfl_sync(all, order.k, n);
            Vec<T> a, b;
            if (i < vectors) a = load_vec<T>(row, i);
            if (j < vectors) b = load_vec<T>(row, j);
            if (p.weighted && !p.by_rank) {
                first.add_scaled(a, weight);
                second.add_scaled(b, weight);
            } else {
                first.add(a);
                second.add(b);
            }
            if (p.routes == nullptr) continue;
            std::byte* kept = p.routes + (int64_t{k} * p.plan.num_tokens + token) * row_bytes;
            if (i < vectors) store_vec(kept, i, a);
            if (j < vectors) store_vec(kept, j, b);
        }
        if (p.bias != nullptr) {
            if (i < vectors) first.add(load_vec<T>(p.bias + token * row_bytes, i));
            if (j < vectors) second.add(load_vec<T>(p.bias + token * row_bytes, j));
        }
        if (i < vectors) store_vec(p.out + token * row_bytes, i, first.value());
        if (j < vectors) store_vec(p.out + token * row_bytes, j, second.value());
    }
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
    const int64_t routes = int64_t{p.plan.num_tokens} * p.plan.num_topk;
    for (int64_t route = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; route < routes;
         route += int64_t{gridDim.x} * blockDim.x) {
        const int expert = p.plan.send_expert[route];
        float value = 0.0f;
        if (expert >= 0) {
            const auto* weights = p.peers.in_area<const float>(expert / p.peers.num_local_experts, sequence,
                                                               p.peers.layout.area.row_weights_at);
            const int num_topk = p.plan.num_topk;
            value = p.plan.layout == LayoutKind::kTokenMajor
                        ? weights[int64_t{p.plan.send_row[route]} * num_topk + route % num_topk]
                        : weights[p.plan.send_slot[route]];
        }
        p.topk_weights[route] = value;
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CombineParams p) {
    __shared__ Sources sources;
    const uint32_t sequence = load_volatile(&p.peers.control->sequence);
    const auto operation = p.has_rows ? Operation::kCombine : Operation::kCombineWeights;
    if (!wait_for_peers(p.peers, sequence, p.signature, static_cast<uint32_t>(operation))) return;
    find_sources(p.peers, sequence, p.own_rows, nullptr, &sources);
    if (p.topk_weights != nullptr) pull_row_weights(p, sequence);
    if (!p.has_rows) return;
    const int64_t row_bytes = p.hidden * sizeof(T);
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, num_warps = gridDim.x * blockDim.x / 32;
    for (int64_t token = warp; token < p.plan.num_tokens; token += num_warps) {
        const Order order = order_rows(p, sources, token);
        combine_token<T>(p, order, token, row_bytes);
        if (p.routes != nullptr) clear_missing_routes(p, token, row_bytes);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) reduce_local_kernel(const __grid_constant__ ReduceLocalParams p) {
    const Peers& peers = p.peers;
    if (load_volatile(&peers.control->failed) != 0) return;
    const uint32_t sequence = load_volatile(&peers.control->sequence) + 1;
    auto* staged = peers.in_area<std::byte>(peers.rank, sequence, peers.layout.area.rows_at);
    const int64_t row_bytes = p.hidden * sizeof(T);
    const int num_rows = static_cast<int>(min(int64_t{p.plan.counts[0]}, p.plan.max_recv_tokens));
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk;
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, num_warps = gridDim.x * blockDim.x / 32;
    for (int row = warp; row < num_rows; row += num_warps) {
        const int64_t first_route = int64_t{row} * num_topk;
        for (int64_t i = lane; i < row_bytes / 16; i += 32) {
            Accumulator<T> sum;
            for (int k = 0; k < num_topk; ++k) {
                const int slot = p.plan.recv_slot[first_route + k];
                if (slot < 0) continue;
                const Vec<T> v = load_vec<T>(p.rows + slot * row_bytes, i);
                if (p.weighted) {
                    sum.add_scaled(v, p.plan.recv_weight[first_route + k]);
                } else {
                    sum.add(v);
                }
            }
            store_vec(staged + row * row_bytes, i, sum.value());
        }
    }
}

}  // namespace

void launch_reduce_local(const ReduceLocalParams& params, cudaStream_t stream) {
    with_float_type(params.dtype, [&](auto type) {
        reduce_local_kernel<decltype(type)><<<params.num_sms, kThreads, 0, stream>>>(params);
    });
    check_launch("reduce_local_kernel");
}

void launch_combine(const CombineParams& params, cudaStream_t stream) {
    with_float_type(params.dtype, [&](auto type) {
        combine_kernel<decltype(type)><<<params.num_sms, kThreads, 0, stream>>>(params);
    });
    check_launch("combine_kernel");
}

}  // namespace ray_deepep
