// Where each rank's rows of the current operation are.
#pragma once

#include "cuda/peers.cuh"

namespace ray_deepep {

struct Sources {
    const std::byte* rows[kMaxRanks];
    const std::byte* scales[kMaxRanks];
};

// Whole block; `sources` is shared. Rows of this rank may be read where they are, if given.
__device__ inline void find_sources(const Peers& peers, uint32_t sequence, const std::byte* own_rows,
                                    const float* own_scales, Sources* sources) {
    for (int rank = threadIdx.x; rank < peers.num_ranks; rank += blockDim.x) {
        const AreaHeader* header = peers.header(rank, sequence);
        const bool own = rank == peers.rank && own_rows != nullptr;
        sources->rows[rank] = own ? own_rows : peers.segments[rank] + header->rows_at;
        sources->scales[rank] =
            own ? reinterpret_cast<const std::byte*>(own_scales) : peers.segments[rank] + header->scales_at;
    }
    __syncthreads();
}

}  // namespace ray_deepep
