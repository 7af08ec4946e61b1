// Which tokens of a chunk go to each of some groups (ranks, or experts), in shared memory: a bit per token, so that a
// token's place in its group is a count of bits, and all places are found at once.
#pragma once

#include <cstdint>

#include "cuda/segment_layout.h"

namespace ray_deepep {

#ifdef __CUDACC__

struct TokenSets {
    static constexpr int kWords = kChunkTokens / 32;
    static __host__ __device__ constexpr int num_words(int groups) { return groups * kWords; }

    uint32_t* words;  // [groups, kWords]

    // Into a zeroed set. Whether the token was in this group already.
    __device__ bool add(int group, int token) const {
        const uint32_t bit = 1u << (token % 32);
        return (atomicOr(&words[group * kWords + token / 32], bit) & bit) != 0;
    }
    __device__ bool has(int group, int token) const {
        return (words[group * kWords + token / 32] >> (token % 32) & 1u) != 0;
    }
    // Tokens of this group before this one.
    __device__ int before(int group, int token) const {
        const uint32_t* of_group = words + group * kWords;
        int count = __popc(of_group[token / 32] & ((1u << (token % 32)) - 1));
        for (int word = 0; word < token / 32; ++word) count += __popc(of_group[word]);
        return count;
    }
    __device__ int size(int group) const {
        int count = 0;
        for (int word = 0; word < kWords; ++word) count += __popc(words[group * kWords + word]);
        return count;
    }
};

// Of an expert, -1: none.
__device__ inline int rank_of(int expert, int num_local_experts) {
    return expert < 0 ? -1 : static_cast<int>(static_cast<unsigned>(expert) / static_cast<unsigned>(num_local_experts));
}

// The set of each rank, of a chunk's first `tokens` tokens with where their routes go, [kChunkTokens, K], -1: nowhere.
// A thread per token: the first warps of a block, the others have nothing to do here. A rank's bits come from a ballot:
// few words, and atomic additions to them would wait for each other.
__device__ inline void find_ranks(const int* to, int tokens, int num_topk, int num_ranks, const TokenSets& ranks) {
    static_assert(kMaxRanks <= 64, "a bit per rank");
    const int token = threadIdx.x;
    if (token >= kChunkTokens) return;
    uint64_t goes_to = 0;
#pragma unroll 8
    for (int k = 0; k < (token < tokens ? num_topk : 0); ++k) {
        const int rank = to[token * num_topk + k];
        if (rank >= 0) goes_to |= uint64_t{1} << rank;
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
        const uint32_t word = __ballot_sync(0xffffffffu, (goes_to >> rank & 1) != 0);
        if (token % 32 == 0) ranks.words[rank * TokenSets::kWords + token / 32] = word;
    }
}

#endif  // __CUDACC__

}  // namespace ray_deepep
