// Low-latency calls on GPUs: where things are in a rank's segment, the same on every rank from the buffer's sizes
// alone.
//
// A segment holds words that peers write (signals and masks), four *mailboxes* per source that peers write (what they
// sent: routing and a header) and four *areas* that this rank writes and peers read (rows), all used by turns. Why four
// are enough stands in host/low_latency.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/segment_layout.h"

namespace ray_deepep {

inline constexpr int kLowLatencyTurns = 4;

struct DeviceLowLatencySizes {
    int rank = 0;
    int num_ranks = 1;
    int num_experts = 1;
    int64_t hidden = 128;
    int num_topk = 1;  // largest K
    int64_t max_tokens = 1;
    int64_t max_element_size = 4;
    int64_t max_segment_bytes = 0;
    int num_local_experts() const { return num_experts / num_ranks; }
    // Rows of one token that a rank may send back: a token names an expert once.
    int64_t max_routes_here() const { return std::min(num_topk, num_local_experts()); }
};

struct LowLatencyLayout {
    // Arrays by the peer that writes them.
    int64_t signals_at = 0;   // uint64: signature << 32 | sequence of its last sent operation
    int64_t left_at = 0;      // uint32: its last operation that it sent without this rank; 0: none
    int64_t masks_at = 0;     // uint64: ranks that it has masked, a bit each
    int64_t admitted_at = 0;  // uint64: how often it let this rank in again, then (low half) its last operation by then
    int64_t rejoining_at = 0;                // uint32: whether it waits to be let in again
    int64_t mail_at[kLowLatencyTurns] = {};  // [N] mailboxes
    int64_t mail_bytes = 0;                  // of one, which begins with a MailHeader
    int64_t topk_idx_at = 0;                 // in a mailbox: int32 [T, K]; combine in place: uint32, the routes' places
    int64_t topk_weights_at = 0;             // in a mailbox: float [T, K]
    int64_t area_at[kLowLatencyTurns] = {};
    int64_t scales_at = 0;  // in an area: float [T, H / 128]
    int64_t rows_at = 0;    // in an area
    int64_t bytes = 0;
};

// In place of a route's place: there was no room for its row.
inline constexpr uint32_t kNoRow = 0xffffffffu;
// How a combine brings rows home, in MailHeader::fields[3].
enum : int { kReduceFast = 0, kReduceExact = 1, kReduceInPlace = 2 };

// What a rank says about an operation that it sent.
struct MailHeader {
    uint64_t masked;  // ranks that it went on without, a bit each
    uint32_t sequence;
    uint32_t signature;
    int32_t num_tokens;
    uint32_t plan_sequence;  // combine: of its dispatch
    int32_t fields[4];       // what the signature is made of, with plan_sequence
};

// Throws ArgumentError where there are too many ranks, or where it is more than max_segment_bytes.
LowLatencyLayout make_low_latency_layout(const DeviceLowLatencySizes& sizes);

}  // namespace ray_deepep
