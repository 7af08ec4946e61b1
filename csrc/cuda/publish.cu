// Publishing: routing and counts per chunk of tokens, the header, then one signal to every peer.
#include "cuda/check.h"
#include "cuda/params.h"

namespace ray_deepep {
namespace {

constexpr int kThreads = 256;

// Counts of one chunk of tokens, by destination rank and by expert.
__device__ void publish_chunk(const PublishParams& p, uint32_t sequence, int chunk, int* rank_count,
                              int* expert_count) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    auto* topk_idx = peers.in_area<int32_t>(peers.rank, sequence, area.topk_idx_at);
    auto* topk_weights = peers.in_area<float>(peers.rank, sequence, area.topk_weights_at);
    auto* locations = peers.in_area<int32_t>(peers.rank, sequence, area.locations_at);
    for (int i = threadIdx.x; i < peers.num_ranks; i += blockDim.x) rank_count[i] = 0;
    for (int i = threadIdx.x; i < peers.num_experts; i += blockDim.x) expert_count[i] = 0;
    __syncthreads();
    const int first_token = chunk * kChunkTokens;
    const int routes = max(0, min(kChunkTokens, p.num_tokens - first_token)) * p.num_topk;
    for (int i = threadIdx.x; i < routes; i += blockDim.x) {
        const int64_t route = int64_t{first_token} * p.num_topk + i;
        int expert = static_cast<int>(p.topk_idx[route]);
        if (expert < -1 || expert >= peers.num_experts) {
            peers.status->bad_expert = expert + 1;
            expert = -1;
        }
        topk_idx[route] = expert;
        topk_weights[route] = p.topk_weights[route];
        if (p.locations != nullptr) locations[route] = p.locations[route];
        if (expert < 0) continue;
        atomicAdd(&expert_count[expert], 1);
        const int dest = expert / peers.num_local_experts;
        bool first = true;
        for (int k = i % p.num_topk; k > 0 && first; --k) {
            const int earlier = static_cast<int>(p.topk_idx[route - k]);
            const bool valid = earlier >= 0 && earlier < peers.num_experts;
            first = !valid || earlier / peers.num_local_experts != dest;
        }
        if (first) atomicAdd(&rank_count[dest], 1);
    }
    __syncthreads();
    auto* chunk_rank = peers.in_area<int32_t>(peers.rank, sequence, area.chunk_rank_at);
    auto* chunk_expert = peers.in_area<int32_t>(peers.rank, sequence, area.chunk_expert_at);
    for (int i = threadIdx.x; i < peers.num_ranks; i += blockDim.x) {
        chunk_rank[int64_t{chunk} * peers.num_ranks + i] = rank_count[i];
    }
    for (int i = threadIdx.x; i < peers.num_experts; i += blockDim.x) {
        chunk_expert[int64_t{chunk} * peers.num_experts + i] = expert_count[i];
    }
}

// Sums over the chunks, by the last block: its own view of what the others wrote is complete.
__device__ void publish_totals(const PublishParams& p, uint32_t sequence, int num_chunks) {
    const Peers& peers = p.peers;
    const AreaLayout& area = peers.layout.area;
    const auto sum = [&](int64_t from, int64_t to, int columns) {
        const auto* counts = peers.in_area<const int32_t>(peers.rank, sequence, from);
        auto* totals = peers.in_area<int32_t>(peers.rank, sequence, to);
        for (int column = threadIdx.x; column < columns; column += blockDim.x) {
            int total = 0;
#pragma unroll 8
            for (int chunk = 0; chunk < num_chunks; ++chunk)
                total += __ldcg(&counts[int64_t{chunk} * columns + column]);
            totals[column] = total;
        }
    };
    sum(area.chunk_rank_at, area.rank_total_at, peers.num_ranks);
    sum(area.chunk_expert_at, area.expert_total_at, peers.num_experts);
}

__device__ void publish_header(const PublishParams& p, uint32_t sequence) {
    const Peers& peers = p.peers;
    const int64_t area = peers.layout.area_at[sequence & 1];
    AreaHeader* header = peers.header(peers.rank, sequence);
    header->num_tokens = p.num_tokens;
    header->rows_at = p.rows_at >= 0 ? p.rows_at : area + peers.layout.area.rows_at;
    header->scales_at = p.scales_at >= 0 ? p.scales_at : area + peers.layout.area.scales_at;
    for (int i = 0; i < 8; ++i) header->fields[i] = p.fields[i];
}

__global__ void __launch_bounds__(kThreads) publish_kernel(const __grid_constant__ PublishParams p) {
    extern __shared__ int counts[];
    __shared__ bool last;
    const Peers& peers = p.peers;
    if (load_volatile(&peers.control->failed) != 0) return;
    const uint32_t sequence = load_volatile(&peers.control->sequence) + 1;
    if (p.topk_idx != nullptr) {
        publish_chunk(p, sequence, blockIdx.x, counts, counts + peers.num_ranks);
    }
    auto* row_weights = peers.in_area<float>(peers.rank, sequence, peers.layout.area.row_weights_at);
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.num_row_weights;
         i += int64_t{gridDim.x} * blockDim.x) {
        row_weights[i] = p.row_weights[i];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&peers.control->blocks_done, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (p.topk_idx != nullptr) publish_totals(p, sequence, gridDim.x);
    if (threadIdx.x == 0) {
        publish_header(p, sequence);
        peers.control->blocks_done = 0;
        peers.control->sequence = sequence;
    }
    __threadfence_system();
    __syncthreads();
    raise_signals(peers, sequence, p.signature);
}

}  // namespace

void launch_publish(const PublishParams& params, cudaStream_t stream) {
    int blocks = 1;
    size_t shared = 0;
    if (params.topk_idx != nullptr) {
        blocks = (params.num_tokens + kChunkTokens - 1) / kChunkTokens;
        blocks = blocks > 0 ? blocks : 1;
        shared = (params.peers.num_ranks + params.peers.num_experts) * sizeof(int);
    } else if (params.num_row_weights > 0) {
        blocks = static_cast<int>((params.num_row_weights + kThreads * 8 - 1) / (kThreads * 8));
        blocks = blocks < 16 ? blocks : 16;
    }
    publish_kernel<<<blocks, kThreads, shared, stream>>>(params);
    check_launch("publish_kernel");
}

}  // namespace ray_deepep
