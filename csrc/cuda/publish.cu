// Publishing ahead of the rows: routing and where each chunk of tokens stands in it, or row weights; then one signal
// per peer.
#include "cuda/check.h"
#include "cuda/params.h"

namespace ray_deepep {
namespace {

constexpr int kThreads = 384;  // a column of 256 experts and a few ranks each, and registers for many loads

// Counts of one chunk of tokens, by destination rank and by expert. `experts` is [kChunkTokens * K] in shared memory.
__device__ void publish_chunk(const PublishParams& p, uint32_t sequence, int chunk, int* experts, int* rank_count,
                              int* expert_count) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const int64_t first_route = int64_t{chunk} * kChunkTokens * p.num_topk;
    const int routes = max(0, min(kChunkTokens, p.publication.num_tokens - chunk * kChunkTokens)) * p.num_topk;
    auto* topk_idx = peers.in_area<int32_t>(peers.rank, sequence, area.topk_idx_at) + first_route;
    auto* topk_weights = peers.in_area<float>(peers.rank, sequence, area.topk_weights_at) + first_route;
    auto* locations = peers.in_area<int32_t>(peers.rank, sequence, area.locations_at) + first_route;
    for (int i = threadIdx.x; i < peers.num_ranks; i += blockDim.x) rank_count[i] = 0;
    for (int i = threadIdx.x; i < peers.num_experts; i += blockDim.x) expert_count[i] = 0;
    for (int i = threadIdx.x; i < routes; i += blockDim.x) {
        const int64_t given = p.topk_idx[first_route + i];
        int expert = static_cast<int>(given);
        if (given < -1 || given >= peers.num_experts) {
            peers.status->bad_expert = expert == -1 ? -1 : expert + 1;
            expert = -1;
        }
        // A slot outside its block is another's, or outside the segment: nobody may hear of such a route.
        if (p.locations != nullptr && expert >= 0) {
            const int location = p.locations[first_route + i];
            if (location < 0 || location >= p.capacity) {
                peers.status->bad_location = kLocationSeen | static_cast<uint32_t>(location);
                expert = -1;
            }
            locations[i] = location;
        }
        experts[i] = expert;
        topk_idx[i] = expert;
        topk_weights[i] = p.topk_weights == nullptr ? 1.0f : p.topk_weights[first_route + i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < routes; i += blockDim.x) {
        const int expert = experts[i];
        if (expert < 0) continue;
        atomicAdd(&expert_count[expert], 1);
        const int dest = expert / peers.num_local_experts;
        bool first = true;
        for (int k = i % p.num_topk; k > 0; --k) {
            first = first && (experts[i - k] < 0 || experts[i - k] / peers.num_local_experts != dest);
        }
        if (first) atomicAdd(&rank_count[dest], 1);
    }
    __syncthreads();
    auto* chunk_rank = peers.in_area<int32_t>(peers.rank, sequence, area.chunk_rank_at) + chunk * peers.num_ranks;
    auto* chunk_expert = peers.in_area<int32_t>(peers.rank, sequence, area.chunk_expert_at) + chunk * peers.num_experts;
    for (int i = threadIdx.x; i < peers.num_ranks; i += blockDim.x) chunk_rank[i] = rank_count[i];
    for (int i = threadIdx.x; i < peers.num_experts; i += blockDim.x) chunk_expert[i] = expert_count[i];
}

// Counts of one column, chunk by chunk, become sums over the chunks before, of one part; by the last block, whose view
// of the others' counts is complete.
__device__ int sum_chunks(int32_t* counts, int num_chunks, int columns) {
    constexpr int kTile = 64;  // loads in flight
    int base = 0;
    for (int first = 0; first < num_chunks; first += kTile) {
        int count[kTile];
#pragma unroll
        for (int i = 0; i < kTile; ++i) count[i] = first + i < num_chunks ? __ldcg(&counts[(first + i) * columns]) : 0;
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
            if (first + i < num_chunks) counts[(first + i) * columns] = base;
            base += count[i];
        }
    }
    return base;
}

// Experts' columns and ranks', side by side.
__device__ void sum_part(const PublishParams& p, uint32_t sequence, int part, int first_chunk, int num_chunks) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const auto at = [&](int64_t offset) { return peers.in_area<int32_t>(peers.rank, sequence, offset); };
    for (int i = threadIdx.x; i < peers.num_experts + peers.num_ranks; i += kThreads) {
        const bool of_expert = i < peers.num_experts;
        const int columns = of_expert ? peers.num_experts : peers.num_ranks;
        const int column = of_expert ? i : i - peers.num_experts;
        int32_t* counts = at(of_expert ? area.chunk_expert_at : area.chunk_rank_at) + first_chunk * columns + column;
        at(of_expert ? area.expert_total_at : area.rank_total_at)[part * columns + column] =
            sum_chunks(counts, num_chunks, columns);
    }
}

__global__ void __launch_bounds__(kThreads) publish_kernel(const __grid_constant__ PublishParams p) {
    extern __shared__ int shared[];
    __shared__ bool last;
    const Peers& peers = p.peers;
    const bool failed = load_volatile(&peers.control->failed) != 0;
    const uint32_t sequence = load_volatile(&peers.control->sequence) + 1;
    if (p.has_routing && !failed) {
        int* experts = shared + peers.num_ranks + peers.num_experts;
        publish_chunk(p, sequence, blockIdx.x, experts, shared, shared + peers.num_ranks);
    }
    auto* row_weights = peers.in_area<float>(peers.rank, sequence, peers.layout.area.row_weights_at);
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.num_row_weights && !failed;
         i += int64_t{gridDim.x} * blockDim.x) {
        row_weights[i] = p.row_weights[i];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&peers.control->publish_blocks, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    if (threadIdx.x == 0) peers.control->publish_blocks = 0;
    if (failed) return;
    __threadfence();
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
        shared = (params.peers.num_ranks + params.peers.num_experts + kChunkTokens * params.num_topk) * sizeof(int);
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
