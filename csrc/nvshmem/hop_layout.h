// The symmetric memory of one buffer's hop: where a rank of another node puts rows, and where this rank stages its own.
//
// A token has a fixed place, so nobody need tell counts: rows of node n's token t land at (n, t). All is there twice:
// who sends operation s has received all of s - 1, whose senders had taken all of s - 2, so area s % 2 is free.
#pragma once

#include <cstdint>

namespace ray_deepep {

inline constexpr int kMaxNodes = 64;

struct HopSizes {
    int node_rank = 0;
    int num_nodes = 1;         // M
    int num_node_experts = 1;  // experts of a node
    int64_t part_tokens = 0;   // P, room for the tokens of one rank; whole chunks
    int num_topk = 1;          // largest K
    int64_t hidden = 1;
    int64_t max_element_size = 4;
};

// Offsets in bytes. Landed: written by the rank of the same local rank on each node. Staged: what NVSHMEM reads from.
struct HopAreaLayout {
    int64_t landed_idx_at = 0;      // int64 [M, P, K], experts of this node counted from its first, -1: elsewhere
    int64_t landed_weights_at = 0;  // float [M, P, K]; coming home: numbers of routes
    int64_t landed_places_at = 0;   // int32 [M, P, K], padded layout only
    int64_t landed_scales_at = 0;   // float [M, P, H / 128]
    int64_t landed_rows_at = 0;     // [M, P, H]
    int64_t staged_idx_at = 0;      // int64 [M, P, K]
    int64_t staged_weights_at = 0;  // float [M, P, K]
    int64_t staged_places_at = 0;   // int32 [M, P, K]
    int64_t staged_scales_at = 0;   // float [P, H / 128]
    int64_t staged_rows_at = 0;     // [M, P, H]: own rows of a dispatch, sums of landed tokens on their way home
    int64_t bytes = 0;
};

struct HopLayout {
    int64_t signals_at = 0;  // uint64 [kMaxNodes]: sequence << 32 | signature
    int64_t area_at[2] = {};
    HopAreaLayout area;
    int64_t bytes = 0;
};

// Throws ArgumentError where the sizes do not fit.
HopLayout make_hop_layout(const HopSizes& sizes);

}  // namespace ray_deepep
