// Plan: chunk by chunk of tokens, the place of every row, received and sent. A block per chunk, one for the counts,
// some for rows that nothing fills. The answer is the host planner's (common/plan.cpp).
#include <algorithm>

#include "cuda/check.h"
#include "cuda/plan_counts.cuh"
#include "cuda/ticket.cuh"
#include "cuda/token_sets.cuh"

namespace ray_deepep {
namespace {

// Shared memory of a block: one chunk's routing, and who has its tokens.
struct Chunk {
    int* experts;      // [kChunkTokens, K]
    float* weights;    // [kChunkTokens, K]
    int* to;           // [kChunkTokens, K] rank that the route goes to, -1: none
    int* slots;        // [kChunkTokens, K] output row of the route
    TokenSets ranks;   // [N] tokens for each rank
    TokenSets expert;  // [E] tokens for each expert, expert-major
    int* rank_starts;  // [N] first row of this chunk at each rank
    int first_token;
    int tokens;
    int routes;

    static __host__ __device__ int num_ints(const Peers& peers, int num_topk) {
        return 4 * kChunkTokens * num_topk + TokenSets::num_words(peers.num_ranks + peers.num_experts) +
               peers.num_ranks;
    }
};

__device__ Chunk chunk_at(int* room, const Peers& peers, int num_topk, int chunk) {
    const int routes = kChunkTokens * num_topk;
    auto* sets = reinterpret_cast<uint32_t*>(room + 4 * routes);
    const int words = TokenSets::num_words(peers.num_ranks), all = words + TokenSets::num_words(peers.num_experts);
    for (int i = threadIdx.x; i < all; i += kPlanThreads) sets[i] = 0;
    return Chunk{room,
                 reinterpret_cast<float*>(room + routes),
                 room + 2 * routes,
                 room + 3 * routes,
                 TokenSets{sets},
                 TokenSets{sets + words},
                 room + 4 * routes + all,
                 chunk * kChunkTokens,
                 0,
                 0};
}

__device__ int padded_slot(const PlanParams& p, int source, int local_expert, int location) {
    return static_cast<int>((int64_t{source} * p.peers.num_local_experts + local_expert) * p.plan.capacity + location);
}

// The last warp of a block asks what came before while the others load the routing.
constexpr int kRoutingThreads = kPlanThreads - 32;

// As many as a chunk can have, so that nobody waits for the number of tokens first; areas have whole chunks.
__device__ void load_routing(const PlanParams& p, uint32_t sequence, int rank, Chunk& c) {
    const AreaLayout& area = p.peers.layout.area;
    const int64_t first_route = int64_t{c.first_token} * p.plan.num_topk;
    const auto* topk_idx = p.peers.in_area<const int32_t>(rank, sequence, area.topk_idx_at) + first_route;
    const auto* weights = p.peers.in_area<const float>(rank, sequence, area.topk_weights_at) + first_route;
    const int num_tokens = p.peers.header(rank, sequence)->num_tokens;
#pragma unroll 4
    for (int i = threadIdx.x; threadIdx.x < kRoutingThreads && i < kChunkTokens * p.plan.num_topk;
         i += kRoutingThreads) {
        const int expert = topk_idx[i];
        c.weights[i] = weights[i];
        c.experts[i] = expert;
        c.to[i] = rank_of(expert, p.peers.num_local_experts);
    }
    c.tokens = min(kChunkTokens, num_tokens - c.first_token);
    c.routes = c.tokens * p.plan.num_topk;
}

// Of one chunk: what came before it.
struct Earlier {
    const int32_t* experts;  // [E] routes
    const int32_t* ranks;    // [N] token rows
};

__device__ Earlier earlier_chunks(const PlanParams& p, uint32_t sequence, int rank, int chunk) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    return Earlier{peers.in_area<const int32_t>(rank, sequence, area.chunk_expert_at) + chunk * area.expert_columns,
                   peers.in_area<const int32_t>(rank, sequence, area.chunk_rank_at) + chunk * area.rank_columns};
}

// Output rows of the chunk's routes to the experts of `sums`, in c.slots; by one warp, route by route. Where a token
// goes to an expert twice.
__device__ void take_slots(const ExpertSums& sums, const Chunk& c) {
    for (int e = threadIdx.x; e < sums.count; e += kPlanThreads) sums.starts[e] += sums.before[e];
    __syncthreads();
    for (int step = 0; threadIdx.x < 32 && step < c.routes; step += 32) {
        const int i = step + threadIdx.x, e = i < c.routes ? c.experts[i] - sums.first : -1;
        const int slot = take_ticket(sums.starts, e, e >= 0 && e < sums.count);
        if (i < c.routes) c.slots[i] = slot;
    }
    __syncthreads();
}

// The same, all at once. `again`: whether this thread saw a token go to an expert twice.
__device__ void find_slots(const PlanParams& p, const ExpertSums& sums, const Chunk& c, bool again) {
    if (__syncthreads_or(again)) return take_slots(sums, c);
    for (int i = threadIdx.x; i < c.routes; i += kPlanThreads) {
        const int e = c.experts[i] - sums.first;
        if (e < 0 || e >= sums.count) continue;
        c.slots[i] = sums.starts[e] + sums.before[e] + c.expert.before(e, i / p.plan.num_topk);
    }
}

// Rows that arrive from one chunk of one rank.
__device__ void list_received(const PlanParams& p, uint32_t sequence, int rank, int chunk, const ExpertSums& sums,
                              Chunk& c) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const int source = peers.source(chunk, rank), num_topk = p.plan.num_topk;
    const bool expert_major = p.plan.layout == LayoutKind::kExpertMajor;
    const bool token_major = p.plan.layout == LayoutKind::kTokenMajor;
    const Earlier earlier = earlier_chunks(p, sequence, rank, chunk);
    if (threadIdx.x == kRoutingThreads) {
        c.rank_starts[peers.rank] = rows_before(p, sequence, source, peers.rank) + earlier.ranks[peers.rank];
    }
    load_routing(p, sequence, rank, c);
    if (c.tokens <= 0) return;
    if (expert_major) sum_experts(p, sequence, source, earlier.experts, sums);
    __syncthreads();
    bool again = false;
    for (int i = threadIdx.x; i < c.routes; i += kPlanThreads) {
        const int local = c.experts[i] - sums.first;
        again = (expert_major && local >= 0 && local < sums.count && c.expert.add(local, i / num_topk)) || again;
    }
    find_ranks(c.to, c.tokens, num_topk, peers.num_ranks, c.ranks);
    if (expert_major) find_slots(p, sums, c, again);
    __syncthreads();
    const int first_row = c.rank_starts[peers.rank];
    for (int token = threadIdx.x; token < c.tokens; token += kPlanThreads) {
        const int row = first_row + c.ranks.before(peers.rank, token);
        if (!c.ranks.has(peers.rank, token) || row >= p.plan.max_recv_tokens) continue;
        p.plan.recv_source[row] = rank;
        p.plan.recv_token[row] = c.first_token + token;
    }
    const int64_t first_route = int64_t{c.first_token} * num_topk;
    const auto* locations = peers.in_area<const int32_t>(rank, sequence, area.locations_at) + first_route;
    for (int i = threadIdx.x; i < c.routes; i += kPlanThreads) {
        const int token = i / num_topk, local = c.experts[i] - sums.first;
        const int row = first_row + c.ranks.before(peers.rank, token);
        if (!c.ranks.has(peers.rank, token) || row >= p.plan.max_recv_tokens) continue;
        const bool active = local >= 0 && local < sums.count;
        const int64_t route = int64_t{row} * num_topk + (i - token * num_topk);
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

// Where one chunk of this rank's tokens goes.
__device__ void list_sent(const PlanParams& p, uint32_t sequence, int chunk, const ExpertSums& sums, Chunk& c) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const int num_topk = p.plan.num_topk, num_local = peers.num_local_experts;
    const bool expert_major = p.plan.layout == LayoutKind::kExpertMajor;
    const int source = peers.source(chunk, peers.rank);
    const Earlier earlier = earlier_chunks(p, sequence, peers.rank, chunk);
    for (int r = threadIdx.x - kRoutingThreads; 0 <= r && r < peers.num_ranks; r += kPlanThreads - kRoutingThreads) {
        c.rank_starts[r] = rows_before(p, sequence, source, r) + earlier.ranks[r];
    }
    load_routing(p, sequence, peers.rank, c);
    if (c.tokens <= 0) return;
    if (expert_major) sum_experts(p, sequence, source, earlier.experts, sums);
    __syncthreads();
    bool again = false;
    for (int i = threadIdx.x; i < c.routes; i += kPlanThreads) {
        const int expert = c.experts[i];
        again = (expert_major && expert >= 0 && c.expert.add(expert, i / num_topk)) || again;
    }
    find_ranks(c.to, c.tokens, num_topk, peers.num_ranks, c.ranks);
    if (expert_major) find_slots(p, sums, c, again);
    __syncthreads();
    const int64_t first_route = int64_t{c.first_token} * num_topk;
    const auto* locations = peers.in_area<const int32_t>(peers.rank, sequence, area.locations_at) + first_route;
    for (int i = threadIdx.x; i < c.routes; i += kPlanThreads) {
        int expert = c.experts[i], row = -1, slot = -1;
        if (expert >= 0) {
            const int dest = c.to[i];
            row = slot = c.rank_starts[dest] + c.ranks.before(dest, i / num_topk);
            if (expert_major) slot = c.slots[i];
            if (p.plan.layout == LayoutKind::kPadded) {
                slot = padded_slot(p, source, expert - dest * num_local, locations[i]);
            }
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
    // The publishing kernel has waited for all peers.
    if (load_volatile(&peers.control->failed) != 0) return;
    int* chunk_room = shared + 3 * num_experts + peers.num_ranks;
    const ExpertSums all{
        0, num_experts, shared, shared + num_experts, shared + 2 * num_experts, shared + 3 * num_experts};
    ExpertSums local = all;
    local.first = peers.rank * num_local;
    local.count = num_local;
    if (blockIdx.x == 0) return write_counts(p, sequence, all);
    const int fill_blocks = num_fill_blocks(p.plan);
    if (blockIdx.x <= fill_blocks) {
        sum_experts(p, sequence, 0, nullptr, local);
        return fill_rest(p, sequence, blockIdx.x - 1, local);
    }
    const int num_chunks = static_cast<int>(peers.layout.num_chunks), item = blockIdx.x - 1 - fill_blocks;
    const int rank = item / num_chunks, chunk = item % num_chunks;
    Chunk c = chunk_at(chunk_room, peers, p.plan.num_topk, chunk);
    if (rank == peers.num_ranks) return list_sent(p, sequence, chunk, all, c);
    list_received(p, sequence, rank, chunk, local, c);
}

}  // namespace

void launch_plan(const PlanParams& params, cudaStream_t stream) {
    const Peers& peers = params.peers;
    const int chunks = static_cast<int>((peers.num_ranks + 1) * peers.layout.num_chunks);
    const int sums = 3 * peers.num_experts + peers.num_ranks;
    const size_t shared = (sums + Chunk::num_ints(peers, params.plan.num_topk)) * sizeof(int);
    if (shared > 48 << 10) {
        check_cuda(
            cudaFuncSetAttribute(plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
            "shared memory of plan_kernel");
    }
    plan_kernel<<<1 + num_fill_blocks(params.plan) + chunks, kPlanThreads, shared, stream>>>(params);
    check_launch("plan_kernel");
}

}  // namespace ray_deepep
