// Publishing ahead of the rows: routing and where each chunk of tokens stands in it, or row weights; then one signal
// per peer.
#include "cuda/check.h"
#include "cuda/params.h"
#include "cuda/token_sets.cuh"

namespace ray_deepep {
namespace {

constexpr int kSlices = 8;         // of the chunks, summed side by side
constexpr int kTile = 8;           // of a slice, held at a time
constexpr int kColumnGroups = 80;  // of four columns: 256 experts, a few ranks
constexpr int kThreads = kSlices * kColumnGroups;

// Of one chunk of tokens, in shared memory.
struct ChunkCounts {
    TokenSets ranks;  // [N]
    int* per_expert;  // [E] routes
    int* to;          // [kChunkTokens, K] rank that a route goes to, -1: none

    static __host__ __device__ int num_ints(const Peers& peers, int num_topk) {
        return TokenSets::num_words(peers.num_ranks) + peers.num_experts + kChunkTokens * num_topk;
    }
};

// -1: a route that nobody may hear of: no such expert, or a slot outside its block, which is another's or outside the
// segment.
__device__ int checked_expert(const PublishParams& p, int64_t route, int32_t* published_location) {
    const Peers& peers = p.peers;
    const int64_t given = p.topk_idx[route];
    if (given < -1 || given >= peers.num_experts) {
        const int bad = static_cast<int>(given);
        peers.status->bad_expert = bad == -1 ? -1 : bad + 1;
        return -1;
    }
    if (p.locations == nullptr || given < 0) return static_cast<int>(given);
    const int location = *published_location = p.locations[route];
    if (location >= 0 && location < p.capacity) return static_cast<int>(given);
    peers.status->bad_location = kLocationSeen | static_cast<uint32_t>(location);
    return -1;
}

// Routing of one chunk, and its counts by destination rank and by expert.
__device__ void publish_chunk(const PublishParams& p, uint32_t sequence, int chunk, const ChunkCounts& counts) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const int64_t first_route = int64_t{chunk} * kChunkTokens * p.num_topk;
    const int tokens = max(0, min(kChunkTokens, p.publication.num_tokens - chunk * kChunkTokens));
    auto* topk_idx = peers.in_area<int32_t>(peers.rank, sequence, area.topk_idx_at) + first_route;
    auto* topk_weights = peers.in_area<float>(peers.rank, sequence, area.topk_weights_at) + first_route;
    auto* locations = peers.in_area<int32_t>(peers.rank, sequence, area.locations_at) + first_route;
    for (int i = threadIdx.x; i < peers.num_experts; i += kThreads) counts.per_expert[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * p.num_topk; i += kThreads) {
        const float weight = p.topk_weights == nullptr ? 1.0f : p.topk_weights[first_route + i];
        const int expert = checked_expert(p, first_route + i, &locations[i]);
        topk_idx[i] = expert;
        topk_weights[i] = weight;
        counts.to[i] = rank_of(expert, peers.num_local_experts);
        if (expert >= 0) atomicAdd(&counts.per_expert[expert], 1);
    }
    __syncthreads();
    find_ranks(counts.to, tokens, p.num_topk, peers.num_ranks, counts.ranks);
    __syncthreads();
    auto* ranks = peers.in_area<int32_t>(peers.rank, sequence, area.chunk_rank_at) + chunk * area.rank_columns;
    auto* experts = peers.in_area<int32_t>(peers.rank, sequence, area.chunk_expert_at) + chunk * area.expert_columns;
    for (int i = threadIdx.x; i < peers.num_ranks; i += kThreads) ranks[i] = counts.ranks.size(i);
    for (int i = threadIdx.x; i < peers.num_experts; i += kThreads) experts[i] = counts.per_expert[i];
}

__device__ int4 operator+(const int4& a, const int4& b) {
    return make_int4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Four columns of the counts of a part's chunks.
struct Columns {
    int4* counts;     // of the part's first chunk
    int stride;       // from chunk to chunk
    int32_t* totals;  // of the part
    int num_columns;  // without padding; may be negative
};

// Experts' columns and ranks', side by side.
__device__ Columns columns_of(const PublishParams& p, uint32_t sequence, int part, int first_chunk, int group) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const int expert_groups = area.expert_columns / 4;
    const bool of_experts = group < expert_groups;
    const int own = of_experts ? group : group - expert_groups;
    const int stride = of_experts ? expert_groups : area.rank_columns / 4;
    const int num_columns = of_experts ? peers.num_experts : peers.num_ranks;
    const auto at = [&](int64_t offset) { return peers.in_area<int32_t>(peers.rank, sequence, offset); };
    auto* counts = reinterpret_cast<int4*>(at(of_experts ? area.chunk_expert_at : area.chunk_rank_at));
    int32_t* totals = at(of_experts ? area.expert_total_at : area.rank_total_at) + part * num_columns + own * 4;
    return Columns{counts + first_chunk * stride + own, stride, totals, num_columns - own * 4};
}

// Counts of some chunks: all loads in flight together, which stores between them would not let be. Returns their sum.
__device__ int4 load_tile(const Columns& columns, int first, int end, int4 (&counts)[kTile]) {
    int4 sum{};
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
        counts[i] = first + i < end ? __ldcg(&columns.counts[(first + i) * columns.stride]) : int4{};
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) sum = sum + counts[i];
    return sum;
}

__device__ void store_tile(const Columns& columns, int first, int end, const int4 (&counts)[kTile], int4* base) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
        if (first + i < end) columns.counts[(first + i) * columns.stride] = *base;
        *base = *base + counts[i];
    }
}

// Counts of a part, chunk by chunk, become sums over the chunks before; by the last block, whose view of the others'
// counts is complete. A thread has four columns of a slice of the chunks.
__device__ void sum_part(const PublishParams& p, uint32_t sequence, int part, int first_chunk, int num_chunks) {
    __shared__ int4 sums[kSlices][kColumnGroups];
    const AreaLayout& area = p.peers.layout.area;
    const int groups = (area.expert_columns + area.rank_columns) / 4;
    const int slice = threadIdx.x / kColumnGroups, column = threadIdx.x % kColumnGroups;
    const int size = (num_chunks + kSlices - 1) / kSlices;
    const int begin = min(slice * size, num_chunks), end = min(begin + size, num_chunks);
    for (int first = 0; first < groups; first += kColumnGroups) {
        const bool active = first + column < groups;
        const Columns columns = columns_of(p, sequence, part, first_chunk, active ? first + column : 0);
        int4 counts[kTile];
        int4 base = load_tile(columns, begin, active ? end : 0, counts);
        for (int i = begin + kTile; active && i < end; i += kTile) base = base + load_tile(columns, i, end, counts);
        sums[slice][column] = base;
        __syncthreads();
        base = int4{};
        for (int earlier = 0; earlier < slice; ++earlier) base = base + sums[earlier][column];
        for (int i = begin; active && i < end; i += kTile) {
            if (size > kTile) load_tile(columns, i, end, counts);
            store_tile(columns, i, end, counts, &base);
        }
        const int totals[4] = {base.x, base.y, base.z, base.w};
        for (int i = 0; active && slice == kSlices - 1 && i < min(4, columns.num_columns); ++i) {
            columns.totals[i] = totals[i];
        }
        __syncthreads();
    }
}

__global__ void __launch_bounds__(kThreads) publish_kernel(const __grid_constant__ PublishParams p) {
    extern __shared__ int shared[];
    __shared__ bool last;
    const Peers& peers = p.peers;
    const bool failed = load_volatile(&peers.control->failed) != 0;
    const uint32_t sequence = load_volatile(&peers.control->sequence) + 1;
    if (p.has_routing && !failed) {
        int* per_expert = shared + TokenSets::num_words(peers.num_ranks);
        const TokenSets ranks{reinterpret_cast<uint32_t*>(shared)};
        publish_chunk(p, sequence, blockIdx.x, ChunkCounts{ranks, per_expert, per_expert + peers.num_experts});
    }
    auto* row_weights = peers.in_area<float>(peers.rank, sequence, peers.layout.area.row_weights_at);
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.num_row_weights && !failed;
         i += int64_t{gridDim.x} * blockDim.x) {
        row_weights[i] = p.row_weights[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(&peers.control->publish_blocks, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    if (threadIdx.x == 0) peers.control->publish_blocks = 0;
    if (failed) return;
    const int part_chunks = peers.layout.part_chunks;
    for (int part = 0; p.has_routing && part < peers.layout.num_parts; ++part) {
        const int first = part * part_chunks;
        sum_part(p, sequence, part, first, max(0, min(part_chunks, static_cast<int>(gridDim.x) - first)));
    }
    __syncthreads();
    if (threadIdx.x == 0) peers.control->sequence = sequence;
    announce(peers, p.publication, sequence);
    // This block waits, not the plan's hundreds: on a GPU that ranks share they would leave a peer no room to publish.
    if (p.has_routing) wait_for_peers(peers, p.publication.operation, sequence, p.publication.signature);
}

__global__ void release_kernel(const __grid_constant__ Peers peers) {
    if (load_volatile(&peers.control->failed) != 0) return;
    raise_signals(peers, peers.layout.done_at, load_volatile(&peers.control->sequence), 0);
}

}  // namespace

void launch_publish(const PublishParams& params, cudaStream_t stream) {
    int blocks = 1;
    size_t shared = 0;
    if (params.has_routing) {
        blocks = (params.publication.num_tokens + kChunkTokens - 1) / kChunkTokens;
        blocks = blocks > 0 ? blocks : 1;
        shared = ChunkCounts::num_ints(params.peers, params.num_topk) * sizeof(int);
    } else if (params.num_row_weights > 0) {
        blocks = static_cast<int>((params.num_row_weights + kThreads * 4 - 1) / (kThreads * 4));
        blocks = blocks < 32 ? blocks : 32;
    }
    publish_kernel<<<blocks, kThreads, shared, stream>>>(params);
    check_launch("publish_kernel");
}

void launch_release(const Peers& peers, cudaStream_t stream) {
    release_kernel<<<1, 64, 0, stream>>>(peers);
    check_launch("release_kernel");
}

}  // namespace ray_deepep
