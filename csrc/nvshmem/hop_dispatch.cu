// Rows to the nodes that have an expert for them, each once per node, to the rank of the same local rank there. What
// lands in this rank's zone, own rows too, are then the tokens of an ordinary dispatch inside the node.
#include "cuda/check.h"
#include "nvshmem/hop.cuh"

namespace ray_deepep {
namespace {

// An expert id as the given node's ranks know it; -1: it is elsewhere, or there is none.
__device__ int64_t localised(const HopFrame& f, int64_t expert, int node) {
    const int64_t local = expert - int64_t{node} * f.num_node_experts;
    return expert >= 0 && local >= 0 && local < f.num_node_experts ? local : -1;
}

// The k-th expert of a token; what is out of range is reported and dropped, as by publish_kernel.
__device__ int64_t checked_expert(const HopDispatchParams& p, int64_t route) {
    const HopFrame& f = p.frame;
    const int64_t expert = p.topk_idx[route];
    if (expert < -1 || expert >= int64_t{f.num_nodes} * f.num_node_experts) {
        f.status->bad_expert = static_cast<int32_t>(expert) == -1 ? -1 : static_cast<int32_t>(expert) + 1;
        return -1;
    }
    if (p.places != nullptr && expert >= 0 && (p.places[route] < 0 || p.places[route] >= p.capacity)) {
        f.status->bad_location = kLocationSeen | static_cast<uint32_t>(p.places[route]);
        return -1;
    }
    return expert;
}

// Routing of one chunk for one node. Tokens that this rank does not have have no experts.
__device__ void send_routing(const HopDispatchParams& p, int node, int64_t first_token) {
    const HopFrame& f = p.frame;
    const HopAreaLayout& area = f.layout.area;
    const bool own = node == f.node_rank;
    const int64_t landed = (f.node_rank * f.part_tokens + first_token) * f.num_topk;
    const int64_t staged = (node * f.part_tokens + first_token) * f.num_topk;
    auto* idx = f.in_area<int64_t>(own ? area.landed_idx_at : area.staged_idx_at) + (own ? landed : staged);
    auto* weights = f.in_area<float>(own ? area.landed_weights_at : area.staged_weights_at) + (own ? landed : staged);
    auto* places = f.in_area<int32_t>(own ? area.landed_places_at : area.staged_places_at) + (own ? landed : staged);
    const int routes = kHopChunk * f.num_topk;
    for (int i = threadIdx.x; i < routes; i += blockDim.x) {
        const int64_t route = first_token * f.num_topk + i;
        const bool there = route < int64_t{f.num_tokens} * f.num_topk;
        idx[i] = there ? localised(f, checked_expert(p, route), node) : -1;
        weights[i] = !there ? 0.0f : (p.topk_weights == nullptr ? 1.0f : p.topk_weights[route]);
        if (p.places != nullptr) places[i] = there ? p.places[route] : 0;
    }
    if (own) return;
    __threadfence_system();
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp == 0) put(f, node, f.in_area<int64_t>(area.landed_idx_at) + landed, idx, routes * 8);
    if (warp == 1) put(f, node, f.in_area<float>(area.landed_weights_at) + landed, weights, routes * 4);
    if (warp == 2 && p.places != nullptr) {
        put(f, node, f.in_area<int32_t>(area.landed_places_at) + landed, places, routes * 4);
    }
}

// One warp.
__device__ void send_token(const HopDispatchParams& p, int node, int64_t token) {
    const HopFrame& f = p.frame;
    const HopAreaLayout& area = f.layout.area;
    const int64_t landed = f.node_rank * f.part_tokens + token;
    std::byte* to = f.in_area<std::byte>(area.landed_rows_at) + landed * p.row_bytes;
    const int64_t floats = p.scale_bytes / 4;
    float* scales_to = f.in_area<float>(area.landed_scales_at) + landed * floats;
    const float* scales = p.scales == nullptr ? nullptr : p.scales + token * floats;
    if (node == f.node_rank) {
        copy_row(p.x + token * p.row_bytes, to, p.row_bytes);
        for (int64_t i = threadIdx.x % 32; scales != nullptr && i < floats; i += 32) scales_to[i] = scales[i];
        return;
    }
    std::byte* staged = f.in_area<std::byte>(area.staged_rows_at) + token * p.row_bytes;
    put_row(f, node, to, p.x + token * p.row_bytes, staged, p.row_bytes);
    if (scales == nullptr) return;
    put_floats(f, node, scales_to, scales, f.in_area<float>(area.staged_scales_at) + token * floats, floats);
}

__global__ void __launch_bounds__(kHopThreads) hop_dispatch_kernel(const __grid_constant__ HopDispatchParams p) {
    const HopFrame& f = p.frame;
    const int lane = threadIdx.x % 32, warps = kHopThreads / 32;
    const int chunks = static_cast<int>(f.part_tokens / kHopChunk);
    const bool failed = has_failed(f);
    for (int item = blockIdx.x; item < chunks * f.num_nodes && !failed; item += gridDim.x) {
        const int node = node_at_turn(f, item / chunks);
        const int64_t first = int64_t{item % chunks} * kHopChunk;
        if (p.has_routing) send_routing(p, node, first);
        const int64_t end = min(first + kHopChunk, static_cast<int64_t>(f.num_tokens));
        for (int64_t token = first + threadIdx.x / 32; token < end; token += warps) {
            const bool asked = lane < f.num_topk && localised(f, p.topk_idx[token * f.num_topk + lane], node) >= 0;
            if (__any_sync(0xffffffffu, asked)) send_token(p, node, token);
        }
    }
    meet_nodes(f);
}

}  // namespace

void launch_hop_dispatch(const HopDispatchParams& params, int num_sms, cudaStream_t stream) {
    hop_dispatch_kernel<<<num_sms, kHopThreads, 0, stream>>>(params);
    check_launch("hop_dispatch_kernel");
}

}  // namespace ray_deepep
