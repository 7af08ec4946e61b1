// Plan, first half: from the published counts, where the rows of each chunk of tokens start. A warp per column of
// counts; every block works out the few totals that it needs by itself, so that blocks need not wait for each other.
#include "cuda/check.h"
#include "cuda/plan.cuh"

namespace ray_deepep {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ int round_up(int value, int64_t multiple) {
    return static_cast<int>((value + multiple - 1) / multiple * multiple);
}

// Sums over all sources, in shared memory.
struct Totals {
    int* experts;  // [E] routes
    int* before;   // [E] routes from sources before this rank
    int* starts;   // [E] first output row at the expert's rank
    int* rows;     // [N] token rows that each rank receives
    int* ends;     // [N] output rows of each rank, expert-major
    int* chunks;   // [N] chunks of each source
};

__device__ int chunks_of(int num_tokens) { return (num_tokens + kChunkTokens - 1) / kChunkTokens; }

__device__ void sum_totals(const PlanParams& p, uint32_t sequence, const Totals& t) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    for (int rank = threadIdx.x; rank < peers.num_ranks; rank += kThreads) {
        t.chunks[rank] = chunks_of(peers.header(rank, sequence)->num_tokens);
        int total = 0;
#pragma unroll 8
        for (int source = 0; source < peers.num_ranks; ++source) {
            total += peers.in_area<const int32_t>(source, sequence, area.rank_total_at)[rank];
        }
        t.rows[rank] = total;
    }
    for (int e = threadIdx.x; e < peers.num_experts; e += kThreads) {
        int total = 0, before = 0;
#pragma unroll 8
        for (int source = 0; source < peers.num_ranks; ++source) {
            const int count = peers.in_area<const int32_t>(source, sequence, area.expert_total_at)[e];
            before += source < peers.rank ? count : 0;
            total += count;
        }
        t.experts[e] = total;
        t.before[e] = before;
    }
}

// Aligned starts of each rank's experts, a warp per rank.
__device__ void expert_starts(const PlanParams& p, const Totals& t) {
    const int lane = threadIdx.x % 32, num_local = p.peers.num_local_experts;
    for (int dest = threadIdx.x / 32; dest < p.peers.num_ranks; dest += kWarps) {
        int start = 0;
        for (int first = 0; first < num_local; first += 32) {
            const int local = first + lane;
            const int size = local < num_local ? round_up(t.experts[dest * num_local + local], p.plan.alignment) : 0;
            int sum = size;
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(kAll, sum, step);
                if (lane >= step) sum += other;
            }
            if (local < num_local) t.starts[dest * num_local + local] = start + sum - size;
            start += __shfl_sync(kAll, sum, 31);
        }
        if (lane == 0) t.ends[dest] = start;
    }
}

__device__ int rows_of(const PlanParams& p, const Totals& t, int rank) {
    if (p.plan.layout == LayoutKind::kExpertMajor) return t.ends[rank];
    if (p.plan.layout == LayoutKind::kTokenMajor) return t.rows[rank];
    return static_cast<int>(p.peers.num_ranks * p.peers.num_local_experts * p.plan.capacity);
}

// One block: counts for the handle, and for the host, which reads them after the flag.
__device__ void write_counts(const PlanParams& p, const Totals& t) {
    const Peers& peers = p.peers;
    const int num_local = peers.num_local_experts, first = peers.rank * num_local;
    int32_t *counts = p.plan.counts, *expert_count = counts + kNumPlanCounts;
    auto* host_counts = reinterpret_cast<volatile int32_t*>(peers.status + 1);
    for (int e = threadIdx.x; e < num_local; e += kThreads) {
        expert_count[e] = host_counts[e] = t.experts[first + e];
        expert_count[num_local + e] = host_counts[num_local + e] = t.starts[first + e];
    }
    if (threadIdx.x == 0) {
        expert_count[2 * num_local] = host_counts[2 * num_local] = t.ends[peers.rank];
        const int num_recv_tokens = t.rows[peers.rank], num_rows = rows_of(p, t, peers.rank);
        counts[kNumRecvTokens] = peers.status->num_recv_tokens = num_recv_tokens;
        counts[kNumRows] = peers.status->num_rows = num_rows;
        counts[kOverflow] = counts[kOverflowRows] = 0;
        for (int rank = peers.num_ranks - 1; p.plan.fixed && rank >= 0; --rank) {
            if (rows_of(p, t, rank) <= p.plan.max_rows) continue;
            counts[kOverflow] = 1 + rank;
            counts[kOverflowRows] = rows_of(p, t, rank);
        }
        if (!p.plan.fixed && (num_recv_tokens > p.plan.max_recv_tokens || num_rows > p.plan.max_rows)) {
            peers.status->overflow = 1;
        }
    }
    if (p.ticket == 0) return;
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) *reinterpret_cast<volatile uint32_t*>(&peers.status->counts_ready) = p.ticket;
}

// One warp: out[row] = start + sum of the counts of earlier rows; count(row) is called twice for each.
template <typename Count>
__device__ int scan_column(int num_rows, int start, int32_t* out, Count count) {
    const int lane = threadIdx.x % 32, span = (num_rows + 31) / 32;
    const int begin = min(lane * span, num_rows), end = min(begin + span, num_rows);
    int sum = 0;
#pragma unroll 4
    for (int row = begin; row < end; ++row) sum += count(row);
    int inclusive = sum;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAll, inclusive, step);
        if (lane >= step) inclusive += other;
    }
    int base = start + inclusive - sum;
#pragma unroll 4
    for (int row = begin; row < end; ++row) {
        out[row] = base;
        base += count(row);
    }
    return start + __shfl_sync(kAll, inclusive, 31);
}

// Rows that arrive, by source and chunk: token rows, or routes to one local expert.
__device__ void scan_received(const PlanParams& p, uint32_t sequence, const Totals& t, int64_t counts_at, int column,
                              int start, int32_t* out, int32_t* source_start) {
    const int pitch = static_cast<int>(p.peers.layout.num_chunks);
    for (int source = 0; source < p.peers.num_ranks; ++source) {
        const auto* counts = p.peers.in_area<const int32_t>(source, sequence, counts_at) + int64_t{column} * pitch;
        if (source_start != nullptr && threadIdx.x % 32 == 0) source_start[source] = start;
        start = scan_column(t.chunks[source], start, out + source * pitch, [&](int row) { return counts[row]; });
    }
    if (source_start != nullptr && threadIdx.x % 32 == 0) source_start[p.peers.num_ranks] = start;
}

__device__ void scan_sent(const PlanParams& p, uint32_t sequence, const Totals& t, int64_t counts_at, int column,
                          int start, int32_t* out) {
    const auto* counts =
        p.peers.in_area<const int32_t>(p.peers.rank, sequence, counts_at) + column * p.peers.layout.num_chunks;
    scan_column(t.chunks[p.peers.rank], start, out + column * p.peers.layout.num_chunks,
                [&](int row) { return counts[row]; });
}

// Columns: token rows received; token rows sent to each rank; then, expert-major, routes received by each local expert
// and routes sent to each expert.
__device__ void scan(const PlanParams& p, uint32_t sequence, const Totals& t, int column) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const int num_local = peers.num_local_experts, first = peers.rank * num_local;
    const int64_t pitch = peers.layout.num_chunks;
    if (column == 0) {
        return scan_received(p, sequence, t, area.chunk_rank_at, peers.rank, 0, p.scratch.recv_row_base,
                             p.plan.source_start);
    }
    if (const int dest = column - 1; dest < peers.num_ranks) {
        int earlier = 0;
        for (int source = 0; source < peers.rank; ++source) {
            earlier += peers.in_area<const int32_t>(source, sequence, area.rank_total_at)[dest];
        }
        return scan_sent(p, sequence, t, area.chunk_rank_at, dest, earlier, p.scratch.send_row_base);
    }
    if (const int e = column - 1 - peers.num_ranks; e < num_local) {
        return scan_received(p, sequence, t, area.chunk_expert_at, first + e, t.starts[first + e],
                             p.scratch.recv_slot_base + e * peers.num_ranks * pitch, nullptr);
    }
    const int e = column - 1 - peers.num_ranks - num_local;
    scan_sent(p, sequence, t, area.chunk_expert_at, e, t.starts[e] + t.before[e], p.scratch.send_slot_base);
}

__device__ __host__ int num_columns(const PlanParams& p) {
    const bool by_expert = p.plan.layout == LayoutKind::kExpertMajor;
    return 1 + p.peers.num_ranks + (by_expert ? p.peers.num_local_experts + p.peers.num_experts : 0);
}

__global__ void __launch_bounds__(kThreads) plan_bases_kernel(const __grid_constant__ PlanParams p) {
    extern __shared__ int shared[];
    const Peers& peers = p.peers;
    const int num_experts = peers.num_experts, num_ranks = peers.num_ranks;
    int* next = shared + 3 * num_experts;
    const Totals totals{shared, shared + num_experts, shared + 2 * num_experts,
                        next,   next + num_ranks,     next + 2 * num_ranks};
    const uint32_t sequence = load_volatile(&peers.control->sequence);
    if (!wait_for_peers(peers, p.publication.operation, sequence, p.publication.signature)) return;
    sum_totals(p, sequence, totals);
    __syncthreads();
    expert_starts(p, totals);
    __syncthreads();
    // The first block writes the counts, and the host starts on them while the others scan.
    if (blockIdx.x == 0) return write_counts(p, totals);
    const int column = (blockIdx.x - 1) * kWarps + threadIdx.x / 32;
    if (column < num_columns(p)) scan(p, sequence, totals, column);
}

}  // namespace

void launch_plan_bases(const PlanParams& params, cudaStream_t stream) {
    const int blocks = 1 + (num_columns(params) + kWarps - 1) / kWarps;
    const size_t shared = (3 * params.peers.num_experts + 3 * params.peers.num_ranks) * sizeof(int);
    plan_bases_kernel<<<blocks, kThreads, shared, stream>>>(params);
    check_launch("plan_bases_kernel");
}

void launch_plan(const PlanParams& params, cudaStream_t stream) {
    launch_plan_bases(params, stream);
    launch_plan_lists(params, stream);
}

}  // namespace ray_deepep
