// Plan: chunk by chunk of tokens, the place of every row, received and sent. A block per chunk, one for the counts,
// some for rows that nothing fills. The answer is the host planner's (common/plan.cpp).
#include <algorithm>

#include "cuda/check.h"
#include "cuda/plan_counts.cuh"
#include "cuda/ticket.cuh"

namespace ray_deepep {
namespace {

// Shared memory of a block: one chunk's routing, and the places found for it.
struct Chunk {
    int* experts;    // [kChunkTokens, K]
    int* slots;      // [kChunkTokens, K]
    int* rows;       // [kChunkTokens, K] sent: token row at the destination; received: [kChunkTokens]
    int* firsts;     // [kChunkTokens, K] sent: first k of the token that goes to the same rank
    float* weights;  // [kChunkTokens, K]
    int* counters;   // [E + N]
    int first_token;
    int tokens;
    int routes;
};

__device__ int padded_slot(const PlanParams& p, int source, int local_expert, int location) {
    return static_cast<int>((int64_t{source} * p.peers.num_local_experts + local_expert) * p.plan.capacity + location);
}

// As many as a chunk can have, so that nobody waits for the number of tokens first; areas have whole chunks.
__device__ void load_routing(const PlanParams& p, uint32_t sequence, int rank, const Chunk& c) {
    const AreaLayout& area = p.peers.layout.area;
    const int64_t first_route = int64_t{c.first_token} * p.plan.num_topk;
    const auto* topk_idx = p.peers.in_area<const int32_t>(rank, sequence, area.topk_idx_at) + first_route;
    const auto* weights = p.peers.in_area<const float>(rank, sequence, area.topk_weights_at) + first_route;
#pragma unroll 4
    for (int i = threadIdx.x; i < kChunkTokens * p.plan.num_topk; i += kPlanThreads) {
        c.experts[i] = topk_idx[i];
        c.weights[i] = weights[i];
    }
}

// Of one chunk: what came before it.
struct Earlier {
    const int32_t* experts;  // [E] routes
    const int32_t* ranks;    // [N] token rows
};

__device__ Earlier earlier_chunks(const PlanParams& p, uint32_t sequence, int rank, int chunk) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    return Earlier{peers.in_area<const int32_t>(rank, sequence, area.chunk_expert_at) + chunk * peers.num_experts,
                   peers.in_area<const int32_t>(rank, sequence, area.chunk_rank_at) + chunk * peers.num_ranks};
}

// First output row of this chunk's routes to each expert of `sums`, into c.counters.
__device__ void start_experts(const ExpertSums& sums, const Chunk& c) {
    for (int e = threadIdx.x; e < sums.count; e += kPlanThreads) c.counters[e] = sums.starts[e] + sums.before[e];
}

// Token rows of a received chunk, in c.rows: two warps, a lane per token.
__device__ void number_received(const PlanParams& p, int rank, int first_row, const Chunk& c) {
    __shared__ int of_first_warp;
    const int num_local = p.peers.num_local_experts, first_expert = p.peers.rank * num_local;
    const int token = threadIdx.x, num_topk = p.plan.num_topk;
    bool needed = false;
    for (int k = 0; token < c.tokens && k < num_topk; ++k) {
        const int local = c.experts[token * num_topk + k] - first_expert;
        needed = needed || (local >= 0 && local < num_local);
    }
    const unsigned ballot = __ballot_sync(kAll, needed);
    if (threadIdx.x == 0) of_first_warp = __popc(ballot);
    __syncthreads();
    if (token >= kChunkTokens) return;
    int row = first_row + __popc(ballot & ((1u << (token % 32)) - 1)) + (token >= 32 ? of_first_warp : 0);
    if (!needed || row >= p.plan.max_recv_tokens) row = -1;
    c.rows[token] = row;
    if (row < 0) return;
    p.plan.recv_source[row] = rank;
    p.plan.recv_token[row] = c.first_token + token;
}

// Rows that arrive from one chunk of one rank.
__device__ void list_received(const PlanParams& p, uint32_t sequence, int rank, int chunk, const ExpertSums& sums,
                              const Chunk& c) {
    const Peers& peers = p.peers;
    const int source = peers.source(chunk, rank);
    const AreaLayout& area = peers.layout.area;
    const int num_topk = p.plan.num_topk, num_local = peers.num_local_experts, first_expert = peers.rank * num_local;
    const bool expert_major = p.plan.layout == LayoutKind::kExpertMajor;
    const bool token_major = p.plan.layout == LayoutKind::kTokenMajor;
    const Earlier earlier = earlier_chunks(p, sequence, rank, chunk);
    const int first_row = rows_before(p, sequence, source, peers.rank) + earlier.ranks[peers.rank];
    if (expert_major) {
        sum_experts(p, sequence, source, earlier.experts, sums);
        start_experts(sums, c);
    }
    number_received(p, rank, first_row, c);
    __syncthreads();
    for (int step = 0; expert_major && threadIdx.x < 32 && step < c.routes; step += 32) {
        const int i = step + threadIdx.x, local = i < c.routes ? c.experts[i] - first_expert : -1;
        const int slot = take_ticket(c.counters, local, local >= 0 && local < num_local);
        if (i < c.routes) c.slots[i] = slot;
    }
    __syncthreads();
    const int64_t first_route = int64_t{c.first_token} * num_topk;
    const auto* locations = peers.in_area<const int32_t>(rank, sequence, area.locations_at) + first_route;
    for (int i = threadIdx.x; i < c.routes; i += kPlanThreads) {
        const int row = c.rows[i / num_topk], local = c.experts[i] - first_expert;
        if (row < 0) continue;
        const bool active = local >= 0 && local < num_local;
        const int64_t route = int64_t{row} * num_topk + i % num_topk;
        int slot = active ? row : -1;
        if (active && expert_major) slot = c.slots[i];
        if (active && p.plan.layout == LayoutKind::kPadded) slot = padded_slot(p, source, local, locations[i]);
        if (slot >= p.plan.max_rows) slot = -1;
        const float weight = active ? c.weights[i] : 0.0f;
        p.plan.recv_slot[route] = slot;
        p.plan.recv_weight[route] = weight;
        if (slot >= 0) p.plan.slot_row[slot] = row;
        if (token_major && p.topk_idx != nullptr) p.topk_idx[route] = active ? local : -1;
        if (token_major && p.topk_weights != nullptr) p.topk_weights[route] = weight;
        if (!token_major && p.topk_weights != nullptr && slot >= 0) p.topk_weights[slot] = weight;
    }
}

// c.firsts of all routes, and c.rows, their destinations: worked out once, a division costs as much as many
// comparisons.
__device__ void find_firsts(const PlanParams& p, const Chunk& c) {
    const int num_topk = p.plan.num_topk;
    for (int i = threadIdx.x; i < c.routes; i += kPlanThreads) {
        c.rows[i] = c.experts[i] >= 0 ? c.experts[i] / p.peers.num_local_experts : -1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < c.routes; i += kPlanThreads) {
        const int k = i % num_topk, dest = c.rows[i];
        int first = k;
        for (int earlier = k - 1; earlier >= 0; --earlier) {
            if (c.rows[i - k + earlier] == dest) first = earlier;
        }
        c.firsts[i] = first;
    }
}

// Where one chunk of this rank's tokens goes.
__device__ void list_sent(const PlanParams& p, uint32_t sequence, int chunk, const ExpertSums& sums, const Chunk& c) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const int num_topk = p.plan.num_topk, num_local = peers.num_local_experts, warp = threadIdx.x / 32;
    const bool expert_major = p.plan.layout == LayoutKind::kExpertMajor;
    const int source = peers.source(chunk, peers.rank);
    int* rank_counters = c.counters + peers.num_experts;
    const Earlier earlier = earlier_chunks(p, sequence, peers.rank, chunk);
    for (int r = threadIdx.x; r < peers.num_ranks; r += kPlanThreads) {
        rank_counters[r] = rows_before(p, sequence, source, r) + earlier.ranks[r];
    }
    if (expert_major) {
        sum_experts(p, sequence, source, earlier.experts, sums);
        start_experts(sums, c);
    }
    find_firsts(p, c);
    __syncthreads();
    for (int step = 0; warp < 2 && step < c.routes; step += 32) {
        const int i = step + threadIdx.x % 32, expert = i < c.routes ? c.experts[i] : -1;
        if (warp == 0) {
            const bool first = expert >= 0 && c.firsts[i] == i % num_topk;
            const int row = take_ticket(rank_counters, first ? c.rows[i] : 0, first);
            if (i < c.routes) c.rows[i] = row;
        } else if (expert_major) {
            const int slot = take_ticket(c.counters, expert, expert >= 0);
            if (i < c.routes) c.slots[i] = slot;
        }
    }
    __syncthreads();
    const int64_t first_route = int64_t{c.first_token} * num_topk;
    const auto* locations = peers.in_area<const int32_t>(peers.rank, sequence, area.locations_at) + first_route;
    for (int i = threadIdx.x; i < c.routes; i += kPlanThreads) {
        int expert = c.experts[i], row = -1, slot = -1;
        if (expert >= 0) {
            row = slot = c.rows[i - i % num_topk + c.firsts[i]];
            if (expert_major) slot = c.slots[i];
            if (p.plan.layout == LayoutKind::kPadded) slot = padded_slot(p, source, expert % num_local, locations[i]);
        }
        // What does not fit is dropped on both sides alike; the handle reports it.
        if (p.plan.fixed && (row >= p.plan.max_recv_tokens || slot >= p.plan.max_rows)) expert = row = slot = -1;
        p.plan.send_expert[first_route + i] = expert;
        p.plan.send_row[first_route + i] = row;
        p.plan.send_slot[first_route + i] = slot;
        p.plan.send_weight[first_route + i] = expert >= 0 ? c.weights[i] : 0.0f;
    }
}

__host__ __device__ int num_fill_blocks(const DevicePlan& plan) {
    return plan.fixed || has_padding(plan) ? kFillBlocks : 0;
}

// Blocks: the counts; rows to fill; chunks received, rank by rank; chunks sent.
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ PlanParams p) {
    extern __shared__ int shared[];
    const Peers& peers = p.peers;
    const int num_experts = peers.num_experts, num_local = peers.num_local_experts;
    const uint32_t sequence = load_volatile(&peers.control->sequence);
    if (!wait_for_peers(peers, p.publication.operation, sequence, p.publication.signature)) return;
    int* chunk_room = shared + 3 * num_experts + peers.num_ranks;
    const ExpertSums all{
        0, num_experts, shared, shared + num_experts, shared + 2 * num_experts, shared + 3 * num_experts};
    ExpertSums local = all;
    local.first = peers.rank * num_local;
    local.count = num_local;
    if (blockIdx.x == 0) {
        sum_experts(p, sequence, 0, nullptr, all);
        return write_counts(p, sequence, all);
    }
    const int fill_blocks = num_fill_blocks(p.plan);
    if (blockIdx.x <= fill_blocks) {
        sum_experts(p, sequence, 0, nullptr, local);
        return fill_rest(p, sequence, blockIdx.x - 1, local);
    }
    const int num_chunks = static_cast<int>(peers.layout.num_chunks), item = blockIdx.x - 1 - fill_blocks;
    const int room = kChunkTokens * p.plan.num_topk, chunk = item % num_chunks;
    const bool sent = item / num_chunks == peers.num_ranks;
    const int rank = sent ? peers.rank : item / num_chunks;
    Chunk c{chunk_room,
            chunk_room + room,
            chunk_room + 2 * room,
            chunk_room + 3 * room,
            reinterpret_cast<float*>(chunk_room + 4 * room),
            chunk_room + 5 * room,
            chunk * kChunkTokens,
            0,
            0};
    load_routing(p, sequence, rank, c);
    c.tokens = min(kChunkTokens, peers.header(rank, sequence)->num_tokens - c.first_token);
    if (c.tokens <= 0) return;
    c.routes = c.tokens * p.plan.num_topk;
    __syncthreads();
    if (sent) return list_sent(p, sequence, chunk, all, c);
    list_received(p, sequence, rank, chunk, local, c);
}

}  // namespace

void launch_plan(const PlanParams& params, cudaStream_t stream) {
    const Peers& peers = params.peers;
    const int chunks = static_cast<int>((peers.num_ranks + 1) * peers.layout.num_chunks);
    const int ints = 5 * kChunkTokens * params.plan.num_topk + 4 * peers.num_experts + 2 * peers.num_ranks;
    const size_t shared = ints * sizeof(int);
    if (shared > 48 << 10) {
        check_cuda(
            cudaFuncSetAttribute(plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
            "shared memory of plan_kernel");
    }
    plan_kernel<<<1 + num_fill_blocks(params.plan) + chunks, kPlanThreads, shared, stream>>>(params);
    check_launch("plan_kernel");
}

}  // namespace ray_deepep
