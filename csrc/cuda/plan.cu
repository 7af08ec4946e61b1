// Plan: from the published counts, where each chunk's rows start (one block); then, chunk by chunk and warp by warp,
// the place of every row. The answer is the host planner's (common/plan.cpp), in parallel.
#include <algorithm>

#include "common/fault.h"
#include "cuda/check.h"
#include "cuda/params.h"

namespace ray_deepep {
namespace {

constexpr int kBaseThreads = 1024;
constexpr int kMaxGroups = 32;
constexpr int kListWarps = 4;
constexpr unsigned kAll = 0xffffffffu;

__device__ int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Exclusive sums down the columns of a [num_rows, num_columns] matrix given by load(row, column). `totals` (shared,
// [num_columns]) gets the column sums; base(row, column) = init(column) + sum of the rows above goes to store. Rows are
// split between groups of threads; consecutive threads read consecutive columns. Whole block.
template <typename Load, typename Init, typename Store>
__device__ void scan_columns(int num_rows, int num_columns, int* group_sums, int* totals, Load load, Init init,
                             Store store) {
    for (int first = 0; first < num_columns; first += kBaseThreads) {
        const int columns = min(num_columns - first, kBaseThreads);
        const int groups = min(kMaxGroups, kBaseThreads / columns);
        const int group = threadIdx.x / columns, local = threadIdx.x % columns, column = first + local;
        const int span = (num_rows + groups - 1) / groups;
        const int begin = min(group * span, num_rows), end = min(begin + span, num_rows);
        int sum = 0;
        if (group < groups) {
#pragma unroll 8
            for (int row = begin; row < end; ++row) sum += load(row, column);
            group_sums[group * columns + local] = sum;
        }
        __syncthreads();
        int base = 0;
        for (int g = 0; g < min(group, groups); ++g) base += group_sums[g * columns + local];
        if (group == groups - 1) totals[column] = base + sum;
        if (group < groups) {
            base += init(column);
#pragma unroll 8
            for (int row = begin; row < end; ++row) {
                store(row, column, base);
                base += load(row, column);
            }
        }
        __syncthreads();
    }
}

struct BaseShared {
    int num_tokens[kMaxRanks];
    int row_totals[kMaxRanks];
    int group_sums[kBaseThreads];
};

// Aligned starts of each destination's experts, from the totals over all sources. One warp per destination.
__device__ void expert_starts(const PlanParams& p, const int* totals, int* starts) {
    const int lane = threadIdx.x % 32, num_local = p.peers.num_local_experts;
    for (int dest = threadIdx.x / 32; dest < p.peers.num_ranks; dest += kBaseThreads / 32) {
        int start = 0;
        for (int first = 0; first < num_local; first += 32) {
            const int local = first + lane;
            const int size = local < num_local ? round_up(totals[dest * num_local + local], p.plan.alignment) : 0;
            int sum = size;
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(kAll, sum, step);
                if (lane >= step) sum += other;
            }
            if (local < num_local) starts[dest * num_local + local] = start + sum - size;
            start += __shfl_sync(kAll, sum, 31);
        }
    }
}

__device__ void write_counts(const PlanParams& p, uint32_t sequence, int num_recv_tokens, const int* totals,
                             const int* starts) {
    const int num_local = p.peers.num_local_experts, first = p.peers.rank * num_local;
    int* counts = p.plan.counts;
    auto* host_counts = reinterpret_cast<volatile int32_t*>(p.peers.status + 1);
    for (int e = threadIdx.x; e < num_local; e += blockDim.x) {
        counts[2 + e] = host_counts[e] = totals[first + e];
        counts[2 + num_local + e] = host_counts[num_local + e] = starts[first + e];
    }
    if (threadIdx.x != 0) return;
    const int last = first + num_local - 1;
    const int end = starts[last] + round_up(totals[last], p.plan.alignment);
    counts[2 + 2 * num_local] = host_counts[2 * num_local] = end;
    int64_t num_rows = num_recv_tokens;
    if (p.plan.layout == LayoutKind::kExpertMajor) num_rows = end;
    if (p.plan.layout == LayoutKind::kPadded) num_rows = p.peers.num_ranks * num_local * p.plan.capacity;
    counts[0] = num_recv_tokens;
    counts[1] = static_cast<int>(num_rows);
    p.peers.status->num_recv_tokens = num_recv_tokens;
    p.peers.status->num_rows = static_cast<int>(num_rows);
    if (num_recv_tokens > p.plan.max_recv_tokens || num_rows > p.plan.max_rows) p.peers.status->overflow = sequence;
}

__global__ void __launch_bounds__(kBaseThreads) plan_bases_kernel(const __grid_constant__ PlanParams p) {
    extern __shared__ int expert_shared[];
    __shared__ BaseShared s;
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const int num_ranks = peers.num_ranks, num_experts = peers.num_experts, num_local = peers.num_local_experts;
    const int num_chunks = p.num_chunks, first = peers.rank * num_local;
    int *totals = expert_shared, *starts = totals + num_experts, *before = starts + num_experts;
    int* column_totals = before + num_experts;
    const uint32_t sequence = load_volatile(&peers.control->sequence);
    if (!wait_for_peers(peers, sequence, p.signature, static_cast<uint32_t>(Operation::kDispatch))) return;

    for (int rank = threadIdx.x; rank < num_ranks; rank += blockDim.x) {
        s.num_tokens[rank] = peers.header(rank, sequence)->num_tokens;
        p.scratch.num_tokens[rank] = s.num_tokens[rank];
        int earlier = 0;
        for (int source = 0; source < peers.rank; ++source) {
            earlier += peers.in_area<const int32_t>(source, sequence, area.rank_total_at)[rank];
        }
        s.row_totals[rank] = earlier;
    }
    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
        int total = 0, earlier = 0;
        for (int source = 0; source < num_ranks; ++source) {
            const int count = peers.in_area<const int32_t>(source, sequence, area.expert_total_at)[e];
            earlier += source < peers.rank ? count : 0;
            total += count;
        }
        totals[e] = total;
        before[e] = earlier;
    }
    __syncthreads();
    expert_starts(p, totals, starts);
    __syncthreads();

    const auto chunk_of = [&](int row) { return row % num_chunks; };
    const auto absent = [&](int row) { return chunk_of(row) * kChunkTokens >= s.num_tokens[row / num_chunks]; };
    // Token rows that each (source, chunk) brings here.
    scan_columns(
        num_ranks * num_chunks, 1, s.group_sums, column_totals,
        [&](int row, int) {
            if (absent(row)) return 0;
            const auto* counts = peers.in_area<const int32_t>(row / num_chunks, sequence, area.chunk_rank_at);
            return counts[int64_t{chunk_of(row)} * num_ranks + peers.rank];
        },
        [](int) { return 0; }, [&](int row, int, int base) { p.scratch.recv_row_base[row] = base; });
    write_counts(p, sequence, column_totals[0], totals, starts);
    __syncthreads();
    // Token rows that each chunk of this rank sends to each destination.
    scan_columns(
        num_chunks, num_ranks, s.group_sums, column_totals,
        [&](int row, int dest) {
            if (row * kChunkTokens >= s.num_tokens[peers.rank]) return 0;
            return peers.in_area<const int32_t>(peers.rank, sequence, area.chunk_rank_at)[row * num_ranks + dest];
        },
        [&](int dest) { return s.row_totals[dest]; },
        [&](int row, int dest, int base) { p.scratch.send_row_base[row * num_ranks + dest] = base; });
    if (p.plan.layout == LayoutKind::kExpertMajor) {
        scan_columns(
            num_ranks * num_chunks, num_local, s.group_sums, column_totals,
            [&](int row, int e) {
                if (absent(row)) return 0;
                const auto* counts = peers.in_area<const int32_t>(row / num_chunks, sequence, area.chunk_expert_at);
                return counts[int64_t{chunk_of(row)} * num_experts + first + e];
            },
            [&](int e) { return starts[first + e]; },
            [&](int row, int e, int base) { p.scratch.recv_slot_base[int64_t{row} * num_local + e] = base; });
        scan_columns(
            num_chunks, num_experts, s.group_sums, column_totals,
            [&](int row, int e) {
                if (row * kChunkTokens >= s.num_tokens[peers.rank]) return 0;
                return peers.in_area<const int32_t>(peers.rank, sequence, area.chunk_expert_at)[row * num_experts + e];
            },
            [&](int e) { return starts[e] + before[e]; },
            [&](int row, int e, int base) { p.scratch.send_slot_base[row * num_experts + e] = base; });
    }
    // The host reads its counts after the flag.
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0 && p.ticket != 0) {
        *reinterpret_cast<volatile uint32_t*>(&peers.status->counts_ready) = p.ticket;
    }
}

// Position of this lane's route among earlier ones with the same key, in order; `counter[key]` carries on from step to
// step. All lanes call it; those not `active` get -1.
__device__ int take_ticket(int* counter, int key, bool active) {
    const int lane = threadIdx.x % 32;
    const unsigned same = __match_any_sync(kAll, active ? key : -1 - lane);
    const int leader = __ffs(same) - 1;
    int base = 0;
    if (active && lane == leader) {
        base = counter[key];
        counter[key] = base + __popc(same);
    }
    base = __shfl_sync(kAll, base, leader);
    __syncwarp();
    return active ? base + __popc(same & ((1u << lane) - 1)) : -1;
}

__device__ int64_t padded_slot(const PlanParams& p, int source, int local_expert, int location) {
    return (int64_t{source} * p.peers.num_local_experts + local_expert) * p.plan.capacity + location;
}

// Rows that arrive from one chunk of one source.
__device__ void list_received(const PlanParams& p, uint32_t sequence, int source, int chunk, int* counter,
                              int* token_row) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk, num_local = peers.num_local_experts;
    const int first_expert = peers.rank * num_local, first_token = chunk * kChunkTokens;
    const int tokens = min(kChunkTokens, p.scratch.num_tokens[source] - first_token);
    if (tokens <= 0) return;
    const auto* topk_idx = peers.in_area<const int32_t>(source, sequence, area.topk_idx_at) + first_token * num_topk;
    const auto* weights = peers.in_area<const float>(source, sequence, area.topk_weights_at) + first_token * num_topk;
    const auto* locations = peers.in_area<const int32_t>(source, sequence, area.locations_at) + first_token * num_topk;
    const int64_t item = int64_t{source} * p.num_chunks + chunk;
    int row = p.scratch.recv_row_base[item];
    for (int half = 0; half < kChunkTokens; half += 32) {
        const int token = half + lane;
        bool needed = false;
        for (int k = 0; token < tokens && k < num_topk; ++k) {
            const int local = topk_idx[token * num_topk + k] - first_expert;
            needed = needed || (local >= 0 && local < num_local);
        }
        const unsigned ballot = __ballot_sync(kAll, needed);
        const int mine = row + __popc(ballot & ((1u << lane) - 1));
        const bool fits = needed && mine < p.plan.max_recv_tokens;
        token_row[token] = fits ? mine : -1;
        if (fits) {
            p.plan.recv_source[mine] = source;
            p.plan.recv_token[mine] = first_token + token;
        }
        row += __popc(ballot);
    }
    const bool expert_major = p.plan.layout == LayoutKind::kExpertMajor;
    for (int e = lane; expert_major && e < num_local; e += 32) {
        counter[e] = p.scratch.recv_slot_base[item * num_local + e];
    }
    __syncwarp();
    for (int step = 0; step < tokens * num_topk; step += 32) {
        const int i = step + lane;
        const bool inside = i < tokens * num_topk;
        const int local = inside ? topk_idx[i] - first_expert : -1;
        const bool active = local >= 0 && local < num_local;
        const int ticket = expert_major ? take_ticket(counter, local, active) : -1;
        const int token_at = inside ? token_row[i / num_topk] : -1;
        if (token_at < 0) continue;
        const int64_t route = int64_t{token_at} * num_topk + i % num_topk;
        int64_t slot = active ? token_at : -1;
        if (active && expert_major) slot = ticket;
        if (active && p.plan.layout == LayoutKind::kPadded) slot = padded_slot(p, source, local, locations[i]);
        const float weight = active ? weights[i] : 0.0f;
        if (slot >= p.plan.max_rows) slot = -1;
        p.plan.recv_slot[route] = static_cast<int32_t>(slot);
        p.plan.recv_weight[route] = weight;
        const bool token_major = p.plan.layout == LayoutKind::kTokenMajor;
        if (slot >= 0) p.plan.slot_row[slot] = token_at;
        if (token_major && p.topk_idx != nullptr) p.topk_idx[route] = active ? local : -1;
        if (token_major && p.topk_weights != nullptr) p.topk_weights[route] = weight;
        if (!token_major && p.topk_weights != nullptr && slot >= 0) p.topk_weights[slot] = weight;
    }
}

// Where one chunk of this rank's tokens goes.
__device__ void list_sent(const PlanParams& p, uint32_t sequence, int chunk, int* expert_counter, int* rank_counter) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk, num_local = peers.num_local_experts;
    const int first_token = chunk * kChunkTokens, tokens = min(kChunkTokens, p.plan.num_tokens - first_token);
    if (tokens <= 0) return;
    const int64_t first_route = int64_t{first_token} * num_topk;
    const auto* topk_idx = peers.in_area<const int32_t>(peers.rank, sequence, area.topk_idx_at) + first_route;
    const auto* weights = peers.in_area<const float>(peers.rank, sequence, area.topk_weights_at) + first_route;
    const auto* locations = peers.in_area<const int32_t>(peers.rank, sequence, area.locations_at) + first_route;
    const bool expert_major = p.plan.layout == LayoutKind::kExpertMajor;
    for (int r = lane; r < peers.num_ranks; r += 32) {
        rank_counter[r] = p.scratch.send_row_base[chunk * peers.num_ranks + r];
    }
    for (int e = lane; expert_major && e < peers.num_experts; e += 32) {
        expert_counter[e] = p.scratch.send_slot_base[chunk * peers.num_experts + e];
    }
    __syncwarp();
    for (int step = 0; step < tokens * num_topk; step += 32) {
        const int i = step + lane, k = i % num_topk;
        const bool inside = i < tokens * num_topk;
        const int expert = inside ? topk_idx[i] : -1, dest = expert >= 0 ? expert / num_local : -1;
        int first_k = k;
        for (int earlier = 0; expert >= 0 && earlier < k; ++earlier) {
            const int other = topk_idx[i - k + earlier];
            if (other < 0 || other / num_local != dest) continue;
            first_k = earlier;
            break;
        }
        const int row = take_ticket(rank_counter, dest, expert >= 0 && first_k == k);
        int64_t slot = expert_major ? take_ticket(expert_counter, expert, expert >= 0) : -1;
        if (!inside) continue;
        if (expert >= 0 && p.plan.layout == LayoutKind::kPadded) {
            slot = padded_slot(p, peers.rank, expert % num_local, locations[i]);
        }
        p.plan.send_expert[first_route + i] = expert;
        p.plan.send_weight[first_route + i] = expert >= 0 ? weights[i] : 0.0f;
        p.plan.send_slot[first_route + i] = static_cast<int32_t>(expert >= 0 ? slot : -1);
        // A rank that a token reaches twice holds it once: look up the first route's row below.
        p.plan.send_row[first_route + i] = expert < 0 ? -1 : (first_k == k ? row : -2 - first_k);
    }
    __syncwarp();
    for (int i = lane; i < tokens * num_topk; i += 32) {
        const int64_t route = first_route + i;
        int row = p.plan.send_row[route];
        if (row <= -2) row = p.plan.send_row[route - i % num_topk + (-2 - row)];
        p.plan.send_row[route] = row;
        if (p.plan.layout == LayoutKind::kTokenMajor) p.plan.send_slot[route] = row;
    }
}

__global__ void __launch_bounds__(kListWarps * 32) plan_lists_kernel(const __grid_constant__ PlanParams p) {
    extern __shared__ int shared[];
    if (load_volatile(&p.peers.control->failed) != 0) return;
    const uint32_t sequence = load_volatile(&p.peers.control->sequence);
    const int per_warp = p.peers.num_experts + p.peers.num_ranks + kChunkTokens;
    int* mine = shared + threadIdx.x / 32 * per_warp;
    const int item = blockIdx.x * kListWarps + threadIdx.x / 32;
    const int received = p.peers.num_ranks * p.num_chunks;
    if (item < received) {
        list_received(p, sequence, item / p.num_chunks, item % p.num_chunks, mine, mine + p.peers.num_experts);
    } else if (item < received + p.num_chunks) {
        list_sent(p, sequence, item - received, mine, mine + p.peers.num_experts);
    }
}

}  // namespace

void launch_plan(const PlanParams& params, cudaStream_t stream) {
    const int num_experts = params.peers.num_experts;
    const size_t base_shared = (3 * num_experts + std::max(num_experts, params.peers.num_ranks)) * sizeof(int);
    plan_bases_kernel<<<1, kBaseThreads, base_shared, stream>>>(params);
    check_launch("plan_bases_kernel");
    const int items = (params.peers.num_ranks + 1) * params.num_chunks;
    if (items == 0) return;
    const size_t list_shared = kListWarps * (num_experts + params.peers.num_ranks + kChunkTokens) * sizeof(int);
    plan_lists_kernel<<<(items + kListWarps - 1) / kListWarps, kListWarps * 32, list_shared, stream>>>(params);
    check_launch("plan_lists_kernel");
}

}  // namespace ray_deepep
