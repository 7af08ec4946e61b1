// The way home: sums of landed tokens, or the rows of their routes one by one, to the rank that the tokens came from.
#include "cuda/check.h"
#include "nvshmem/hop.cuh"

namespace ray_deepep {
namespace {

// Calls visit(node, token) with whole warps, for each landed token of each node by turns; `of_chunk` with whole blocks
// before a chunk's tokens.
template <typename OfChunk, typename Visit>
__device__ void visit_landed(const HopFrame& f, OfChunk of_chunk, Visit visit) {
    const int chunks = static_cast<int>(f.part_tokens / kHopChunk), warps = kHopThreads / 32;
    const bool failed = has_failed(f);
    for (int item = blockIdx.x; item < chunks * f.num_nodes && !failed; item += gridDim.x) {
        const int node = node_at_turn(f, item / chunks);
        const int64_t first = int64_t{item % chunks} * kHopChunk;
        of_chunk(node, first);
        for (int64_t token = first + threadIdx.x / 32; token < first + kHopChunk; token += warps) visit(node, token);
    }
}

// Bit k: the token's k-th expert is on this node.
__device__ unsigned routes_here(const HopFrame& f, const int64_t* landed_idx, int node, int64_t token) {
    const int lane = threadIdx.x % 32;
    const int64_t* idx = landed_idx + (node * f.part_tokens + token) * f.num_topk;
    return __ballot_sync(0xffffffffu, lane < f.num_topk && idx[lane] >= 0);
}

// Own tokens need no journey: hop_sum_kernel reads their sums where they are.
__global__ void __launch_bounds__(kHopThreads) hop_return_kernel(const __grid_constant__ HopReturnParams p) {
    const HopFrame& f = p.frame;
    const HopAreaLayout& area = f.layout.area;
    visit_landed(
        f,
        [&](int node, int64_t first) {
            if (!p.has_weights || node == f.node_rank || threadIdx.x >= 32) return;
            const int64_t from = (node * f.part_tokens + first) * f.num_topk;
            const int64_t to = (f.node_rank * f.part_tokens + first) * f.num_topk;
            put(f, node, f.in_area<float>(area.landed_weights_at) + to, f.in_area<float>(area.staged_weights_at) + from,
                size_t{kHopChunk} * f.num_topk * 4);
        },
        [&](int node, int64_t token) {
            if (node == f.node_rank || p.row_bytes == 0) return;
            if (routes_here(f, p.landed_idx, node, token) == 0) return;
            std::byte* from = f.in_area<std::byte>(area.staged_rows_at) + (node * f.part_tokens + token) * p.row_bytes;
            std::byte* to =
                f.in_area<std::byte>(area.landed_rows_at) + (f.node_rank * f.part_tokens + token) * p.row_bytes;
            put_row(f, node, to, from, from, p.row_bytes);
        });
    meet_nodes(f);
}

__global__ void __launch_bounds__(kHopThreads) hop_routes_kernel(const __grid_constant__ HopRoutesParams p) {
    const HopFrame& f = p.frame;
    const int64_t landed = f.num_nodes * f.part_tokens;
    visit_landed(
        f, [](int, int64_t) {},
        [&](int node, int64_t token) {
            for (unsigned left = routes_here(f, p.landed_idx, node, token); left != 0; left &= left - 1) {
                const int k = __ffs(left) - 1;
                const std::byte* from = p.routes + (k * landed + node * f.part_tokens + token) * p.row_bytes;
                std::byte* to = p.home + (token * f.num_topk + k) * p.row_bytes;
                if (node == f.node_rank) {
                    copy_row(from, to, p.row_bytes);
                } else {
                    put(f, node, to, from, p.row_bytes);
                }
            }
        });
    meet_nodes(f);
}

// One warp: the rows of one token, node by node, where it has an expert.
template <typename T>
__device__ void sum_token(const HopSumParams& p, int64_t token, uint64_t nodes) {
    const HopFrame& f = p.frame;
    const int64_t row_bytes = p.hidden * sizeof(T), vectors = row_bytes / 16;
    const std::byte* landed = f.in_area<std::byte>(f.layout.area.landed_rows_at) + token * row_bytes;
    const std::byte* own =
        f.in_area<std::byte>(f.layout.area.staged_rows_at) + (f.node_rank * f.part_tokens + token) * row_bytes;
    for (int64_t i = threadIdx.x % 32; i < vectors; i += 32) {
        Accumulator<T> sum;
        for (uint64_t left = nodes; left != 0; left &= left - 1) {
            const int node = __ffsll(static_cast<long long>(left)) - 1;
            sum.add(load_vec<T>(node == f.node_rank ? own : landed + node * f.part_tokens * row_bytes, i));
        }
        if (p.bias != nullptr) sum.add(load_vec<T>(p.bias + token * row_bytes, i));
        store_vec(p.out + token * row_bytes, i, sum.value());
    }
}

template <typename T>
__global__ void __launch_bounds__(kHopThreads) hop_sum_kernel(const __grid_constant__ HopSumParams p) {
    const HopFrame& f = p.frame;
    if (has_failed(f)) return;
    const HopAreaLayout& area = f.layout.area;
    const int lane = threadIdx.x % 32;
    const int64_t step = int64_t{gridDim.x} * kHopThreads / 32;
    for (int64_t token = (int64_t{blockIdx.x} * kHopThreads + threadIdx.x) / 32; token < f.num_tokens; token += step) {
        int node = -1;
        const int64_t route = token * f.num_topk + lane;
        // An expert out of range, which the dispatch has reported, is none.
        if (lane < f.num_topk && p.topk_idx[route] >= 0 &&
            p.topk_idx[route] < int64_t{f.num_nodes} * f.num_node_experts) {
            node = static_cast<int>(p.topk_idx[route] / f.num_node_experts);
        }
        if (p.out_weights != nullptr && lane < f.num_topk) {
            const int64_t at = (int64_t{max(node, 0)} * f.part_tokens + token) * f.num_topk + lane;
            const int64_t from = node == f.node_rank ? area.staged_weights_at : area.landed_weights_at;
            p.out_weights[route] = node < 0 ? 0.0f : f.in_area<float>(from)[at];
        }
        if (p.out == nullptr) continue;
        uint64_t nodes = node < 0 ? 0 : uint64_t{1} << node;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) nodes |= __shfl_xor_sync(0xffffffffu, nodes, distance);
        sum_token<T>(p, token, nodes);
    }
}

}  // namespace

void launch_hop_return(const HopReturnParams& params, int num_sms, cudaStream_t stream) {
    hop_return_kernel<<<num_sms, kHopThreads, 0, stream>>>(params);
    check_launch("hop_return_kernel");
}

void launch_hop_routes(const HopRoutesParams& params, int num_sms, cudaStream_t stream) {
    hop_routes_kernel<<<num_sms, kHopThreads, 0, stream>>>(params);
    check_launch("hop_routes_kernel");
}

void launch_hop_sum(const HopSumParams& params, int num_sms, cudaStream_t stream) {
    with_float_type(params.dtype,
                    [&](auto type) { hop_sum_kernel<decltype(type)><<<num_sms, kHopThreads, 0, stream>>>(params); });
    check_launch("hop_sum_kernel");
}

}  // namespace ray_deepep
