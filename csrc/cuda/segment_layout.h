// Where things are in a rank's segment of the device heap: the same on every rank, from the buffer's sizes alone, so a
// kernel finds a peer's data without asking.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ray_deepep {

// Tokens are planned in chunks: a rank publishes what came before each chunk, and any chunk's rows can then be placed
// without looking at the others' routing.
inline constexpr int kChunkTokens = 64;
// Rows that do not live in the heap are staged while peers read those that are there already, so many at a time.
inline constexpr int kReadyRows = 16;
// Of each flag about such a piece of rows: a sector of its own, so that polls of one do not delay the next one's store.
inline constexpr int kReadyFlagBytes = 32;
inline constexpr int kMaxRanks = 64;
// Sources are ranks, or (part, rank) where a rank's tokens come in parts; see Geometry in common/plan.h.
inline constexpr int kMaxSources = 256;

struct DeviceSizes {
    int rank = 0;
    int num_ranks = 1;
    int num_experts = 1;
    int64_t hidden = 1;
    int num_topk = 1;             // largest K
    int64_t max_tokens = 0;       // of one rank
    int64_t max_recv_tokens = 0;  // token rows that a rank may receive
    int64_t max_rows = 0;         // rows of an output in any layout
    int64_t max_element_size = 4;
    int64_t symm_bytes = 0;  // for tensors of the user's
    int num_parts = 1;       // of a rank's tokens, each max_tokens / num_parts of them, whole chunks
    bool bulk_copy = true;   // false: plain vectors also on chips that have bulk copies
    int num_local_experts() const { return num_experts / num_ranks; }
    int64_t num_chunks() const { return (max_tokens + kChunkTokens - 1) / kChunkTokens; }
    int64_t num_staged_rows() const { return std::max({max_tokens, max_recv_tokens, max_rows}); }
    int64_t num_ready_flags() const { return (num_staged_rows() + kReadyRows - 1) / kReadyRows; }
};

// Offsets inside an area, in bytes.
struct AreaLayout {
    int64_t header_at = 0;        // AreaHeader
    int64_t rank_total_at = 0;    // int32 [P, N]: token rows of each part for each rank
    int64_t expert_total_at = 0;  // int32 [P, E]: routes of each part for each expert
    // Token rows for each rank, and routes for each expert, in the chunks before, of the same part. Rows are padded,
    // for vector loads.
    int64_t chunk_rank_at = 0;    // int32 [C, rank_columns]
    int64_t chunk_expert_at = 0;  // int32 [C, expert_columns]
    int64_t topk_idx_at = 0;      // int32 [T, K]
    int64_t topk_weights_at = 0;  // float [T, K]
    int64_t locations_at = 0;     // int32 [T, K]
    int64_t row_weights_at = 0;   // float, combine
    int64_t scales_at = 0;        // float [T, H / 128]
    int64_t rows_at = 0;
    int64_t bytes = 0;
    int rank_columns = 0;    // N, and padding
    int expert_columns = 0;  // E, and padding
};

struct SegmentLayout {
    int64_t signals_at = 0;   // uint64 [kMaxRanks], written by peers: sequence << 32 | signature
    int64_t done_at = 0;      // uint64 [kMaxRanks], written by peers: sequence << 32, their reading is over
    int64_t ready_at = 0;     // [N, F] flags, written by peers: sequence in which these rows of theirs were staged
    int64_t area_at[2] = {};  // used by turns
    int64_t symm_at = 0;      // tensors of the user's
    int64_t symm_bytes = 0;
    int64_t num_chunks = 0;       // C
    int num_parts = 1;            // P
    int part_chunks = 1;          // of each part
    int64_t num_ready_flags = 0;  // F
    AreaLayout area;
    int64_t bytes = 0;
};

// What a rank publishes about its operation.
struct AreaHeader {
    int32_t num_tokens;
    int32_t staged;   // 1: rows arrive in the area piece by piece, each with its flag
    int64_t rows_at;  // from the segment's start: the staged rows, or a tensor that lives in the heap
    int64_t scales_at;
    int32_t fields[8];  // what the signature is made of, to name the difference
};

SegmentLayout make_segment_layout(const DeviceSizes& sizes);

}  // namespace ray_deepep
