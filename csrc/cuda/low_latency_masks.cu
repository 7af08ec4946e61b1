// Who is waited for: small kernels that the host starts beside the others.
#include "cuda/check.h"
#include "cuda/low_latency.cuh"

namespace ray_deepep {
namespace {

__global__ void mask_kernel(const __grid_constant__ LowLatencyPeers peers, uint64_t set, uint64_t clear, int admit,
                            uint64_t admission) {
    __shared__ uint64_t masked;
    if (threadIdx.x == 0) {
        auto* word = reinterpret_cast<unsigned long long*>(&peers.device->masked);
        atomicOr(word, set);
        masked = atomicAnd(word, ~clear) & ~clear;
        // A rank is let in first, and its mask goes after: it looks in the other order.
        if (admit >= 0) {
            store_release(in_segment<uint64_t>(peers, admit, peers.layout.admitted_at) + peers.rank, admission);
            __threadfence_system();
        }
    }
    __syncthreads();
    for (int peer = threadIdx.x; peer < peers.num_ranks; peer += blockDim.x) {
        store_release(in_segment<uint64_t>(peers, peer, peers.layout.masks_at) + peers.rank, masked);
    }
}

__global__ void rejoin_kernel(const __grid_constant__ LowLatencyPeers peers, uint32_t rejoining, uint32_t sequence) {
    for (int peer = threadIdx.x; peer < peers.num_ranks; peer += blockDim.x) {
        // What it sent and nobody took is not to be taken for the operation that it will send under that number.
        store_release(in_segment<uint64_t>(peers, peer, peers.layout.signals_at) + peers.rank, uint64_t{sequence});
        store_release(in_segment<uint32_t>(peers, peer, peers.layout.rejoining_at) + peers.rank, rejoining);
    }
}

}  // namespace

void launch_low_latency_mask(const LowLatencyPeers& peers, uint64_t set, uint64_t clear, int admit, uint64_t admission,
                             cudaStream_t stream) {
    mask_kernel<<<1, kMaxRanks, 0, stream>>>(peers, set, clear, admit, admission);
    check_launch("mask_kernel");
}

void launch_low_latency_rejoin(const LowLatencyPeers& peers, uint32_t rejoining, uint32_t sequence,
                               cudaStream_t stream) {
    rejoin_kernel<<<1, kMaxRanks, 0, stream>>>(peers, rejoining, sequence);
    check_launch("rejoin_kernel");
}

}  // namespace ray_deepep
