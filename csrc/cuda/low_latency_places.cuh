// Where the rows of a low-latency dispatch land: every block of the receiving side works it out for its own range of
// tokens, from the routing of all ranks, without waiting for another block.
#pragma once

#include <algorithm>

#include "cuda/low_latency.cuh"
#include "cuda/ticket.cuh"

namespace ray_deepep {

inline constexpr unsigned kEveryLane = 0xffffffffu;
inline constexpr int kPlacedRoutes = 2048;  // of the tokens that a block places at a time

// Shared memory of a receiving block.
struct Places {
    int* starts;   // [N + 1] first token of each source, in the row of all that came
    int* arrived;  // [L, N] routes by expert and source
    int* next;     // [L] routes to each expert that came before the one in turn
    int* offsets;  // [L + 1] first row of each expert's group
    int* slots;    // [chunk of tokens, K]
    __device__ Places(int* shared, const LowLatencyPeers& peers) {
        starts = shared;
        arrived = starts + peers.num_ranks + 1;
        next = arrived + peers.num_experts;
        offsets = next + peers.num_local_experts;
        slots = offsets + peers.num_local_experts + 1;
    }
};

inline int places_ints(const LowLatencyPeers& peers, int num_topk) {
    const int chunk = std::max(kPlacedRoutes, num_topk);
    return peers.num_ranks + 1 + peers.num_experts + 2 * peers.num_local_experts + 1 + chunk;
}

// The routes that each block places: a range of all tokens that came.
struct TokenRange {
    int first, last;
    __device__ explicit TokenRange(int total) {
        const int each = (total + gridDim.x - 1) / gridDim.x;
        first = min(total, static_cast<int>(blockIdx.x) * each);
        last = min(total, first + each);
    }
};

// Routes of one source that this thread looks at first: loaded before it is known how many there are.
inline constexpr int kEarly = 4;

struct EarlyRoutes {
    int experts[kEarly];
};

__device__ inline const int32_t* mail_experts(const LowLatencyPeers& peers, int source, uint32_t sequence) {
    return reinterpret_cast<const int32_t*>(mailbox(peers, peers.rank, source, sequence) + peers.layout.topk_idx_at);
}

__device__ inline void load_early(const LowLatencyDispatchParams& p, uint32_t sequence, int source,
                                  EarlyRoutes& early) {
    const int32_t* experts = mail_experts(p.peers, source, sequence);
    const int room = static_cast<int>(p.peers.max_tokens) * p.step.num_topk;
#pragma unroll
    for (int j = 0; j < kEarly; ++j) {
        const int i = threadIdx.x + j * kLowLatencyThreads;
        early.experts[j] = i < room ? __ldcg(&experts[i]) : -1;
    }
}

// What needs no routing, before the wait for it.
__device__ inline void clear_places(const LowLatencyDispatchParams& p, const Places& places) {
    const int num_local = p.peers.num_local_experts;
    for (int i = threadIdx.x; i < p.peers.num_experts; i += blockDim.x) places.arrived[i] = 0;
    for (int i = threadIdx.x; i < num_local; i += blockDim.x) places.next[i] = 0;
    if (p.alignment != 0) return;
    const int block = static_cast<int>(p.peers.max_tokens) * p.peers.num_ranks;
    for (int i = threadIdx.x; i <= num_local; i += blockDim.x) places.offsets[i] = i * block;
}

// First token of each source among all that came.
__device__ inline void find_starts(const LowLatencyDispatchParams& p, uint32_t sequence, uint64_t absent,
                                   const Places& places) {
    const LowLatencyPeers& peers = p.peers;
    for (int source = threadIdx.x; source < peers.num_ranks; source += blockDim.x) {
        const bool here = (absent & bit_of(source)) == 0;
        places.starts[source] = here ? mail_header(peers, source, sequence)->num_tokens : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int total = 0;
        for (int source = 0; source < peers.num_ranks; ++source) {
            const int count = places.starts[source];
            places.starts[source] = total;
            total += count;
        }
        places.starts[peers.num_ranks] = total;
    }
    __syncthreads();
}

// Counts all routes to this rank's experts, and those that came before this block's range; `early` and `next` are of
// sources 0 and 1.
__device__ inline void count_routes(const LowLatencyDispatchParams& p, uint32_t sequence, const Places& places,
                                    const TokenRange& range, EarlyRoutes early, EarlyRoutes next) {
    const LowLatencyPeers& peers = p.peers;
    const int num_local = peers.num_local_experts, first_expert = peers.rank * num_local, num_topk = p.step.num_topk;
    for (int source = 0; source < peers.num_ranks; ++source) {
        const int start = places.starts[source], routes = (places.starts[source + 1] - start) * num_topk;
        const int before = (range.first - start) * num_topk;  // routes of this source before this block's range
        const auto count = [&](int i, int expert) {
            const int local = expert - first_expert;
            if (i >= routes || local < 0 || local >= num_local) return;
            atomicAdd(&places.arrived[local * peers.num_ranks + source], 1);
            if (i < before) atomicAdd(&places.next[local], 1);
        };
#pragma unroll
        for (int j = 0; j < kEarly; ++j) count(threadIdx.x + j * kLowLatencyThreads, early.experts[j]);
        const int32_t* experts = mail_experts(peers, source, sequence);
        for (int i = threadIdx.x + kEarly * kLowLatencyThreads; i < routes; i += blockDim.x) {
            count(i, __ldcg(&experts[i]));
        }
        early = next;
        if (source + 2 < peers.num_ranks) load_early(p, sequence, source + 2, next);
    }
    __syncthreads();
}

__device__ inline int routes_to(const LowLatencyPeers& peers, const Places& places, int local) {
    int count = 0;
    for (int source = 0; source < peers.num_ranks; ++source) count += places.arrived[local * peers.num_ranks + source];
    return count;
}

// One warp, with aligned groups.
__device__ inline void find_offsets(const LowLatencyDispatchParams& p, const Places& places) {
    const LowLatencyPeers& peers = p.peers;
    const int lane = threadIdx.x % 32, alignment = static_cast<int>(p.alignment);
    int base = 0;
    for (int first = 0; first < peers.num_local_experts; first += 32) {
        const int local = first + lane;
        int size = 0;
        if (local < peers.num_local_experts) {
            size = (routes_to(peers, places, local) + alignment - 1) / alignment * alignment;
        }
        int sum = size;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int from = __shfl_up_sync(kEveryLane, sum, step);
            if (lane >= step) sum += from;
        }
        if (local < peers.num_local_experts) places.offsets[local] = base + sum - size;
        base += __shfl_sync(kEveryLane, sum, 31);
    }
    if (lane == 0) places.offsets[peers.num_local_experts] = base;
}

// By one block: what the result says beside the rows.
__device__ inline void write_counts(const LowLatencyDispatchParams& p, const Places& places) {
    const LowLatencyPeers& peers = p.peers;
    const int num_local = peers.num_local_experts, room = static_cast<int>(p.num_rows);
    for (int local = threadIdx.x; local <= num_local; local += blockDim.x) {
        const int offset = min(places.offsets[local], room);
        p.expert_offsets[local] = offset;
        if (local == num_local) {
            *p.needed = places.offsets[num_local];
            continue;
        }
        const int block = p.alignment == 0 ? static_cast<int>(peers.max_tokens) * peers.num_ranks : room - offset;
        int count = 0;
        for (int source = 0; source < peers.num_ranks; ++source) {
            const int begin = min(count, block), at = local * peers.num_ranks + source;
            count += places.arrived[at];
            p.range_begin[at] = begin;
            p.range_count[at] = min(count, block) - begin;
        }
        p.counts[local] = min(count, block);
        p.num_tokens_per_expert[local] += count;
    }
}

__device__ inline int source_of(const LowLatencyPeers& peers, const Places& places, int token) {
    int source = 0;
    while (token >= places.starts[source + 1]) ++source;
    return source;
}

// A route to place, in a lane.
struct PlacedRoute {
    int local = -1;   // expert among those of this rank; outside of them: not for it
    int64_t at = -1;  // place in the plan; -1: no route
    float weight = 0.0f;
};

// Whole warp: the lane's route of `routes` from `first` (a token) on, beginning with `begin`.
__device__ inline PlacedRoute load_route(const LowLatencyDispatchParams& p, uint32_t sequence, const Places& places,
                                         int first, int begin, int routes) {
    const LowLatencyPeers& peers = p.peers;
    const int num_topk = p.step.num_topk, i = begin + static_cast<int>(threadIdx.x % 32);
    PlacedRoute found;
    if (i >= routes) return found;
    const int token = first + i / num_topk, source = source_of(peers, places, token);
    const int route = (token - places.starts[source]) * num_topk + i % num_topk;
    const std::byte* mail = mailbox(peers, peers.rank, source, sequence);
    const int expert = __ldcg(reinterpret_cast<const int32_t*>(mail + peers.layout.topk_idx_at) + route);
    found.weight = __ldcg(reinterpret_cast<const float*>(mail + peers.layout.topk_weights_at) + route);
    found.local = expert - peers.rank * peers.num_local_experts;
    found.at = source * peers.max_tokens * num_topk + route;
    return found;
}

// One warp: rows of the output for the routes of tokens [first, last), in order, into places.slots and the plan.
// `route`: of each lane, the first ones.
__device__ inline void place_routes(const LowLatencyDispatchParams& p, uint32_t sequence, const Places& places,
                                    int first, int last, PlacedRoute route) {
    const int lane = threadIdx.x % 32, routes = (last - first) * p.step.num_topk;
    for (int begin = 0; begin < routes; begin += 32) {
        if (begin > 0) route = load_route(p, sequence, places, first, begin, routes);
        const bool mine = route.local >= 0 && route.local < p.peers.num_local_experts;
        const int position = take_ticket(places.next, route.local, mine);
        int slot = -1;
        if (mine) {
            slot = places.offsets[route.local] + position;
            if (slot >= p.num_rows) slot = -2;
        }
        if (route.at < 0) continue;
        places.slots[begin + lane] = slot;
        p.plan.slot[route.at] = slot;
        p.plan.weight[route.at] = route.weight;
    }
}

}  // namespace ray_deepep
