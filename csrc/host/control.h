// What a rank shows its peers: the control block at the head of its segment and the header of each operation.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/dtype.h"
#include "common/fault.h"
#include "common/plan.h"

namespace ray_deepep {

enum class RankState : uint32_t { kReady = 0, kClosed = 1, kFailed = 2 };

struct ControlBlock {
    // The signal: sequence number of the last published operation. Peers sleep on it with a futex.
    alignas(64) std::atomic<uint32_t> published;
    alignas(64) std::atomic<RankState> state;
    // Sequence number of the last operation whose rows this rank has pulled. Peers whose rows were read in place wait
    // for it before they return.
    alignas(64) std::atomic<uint32_t> finished;
    // Whom a failed rank blames, so that its own peers name the cause and not the victim.
    std::atomic<int32_t> blamed_peer;
    std::atomic<Cause> blamed_cause;
    // Whom this rank waits for now (-1: nobody), for which sequence and of which of the two signals; peers follow it to
    // the end of a chain of waits.
    alignas(64) std::atomic<int32_t> waiting_for;
    std::atomic<uint32_t> waiting_sequence;
    std::atomic<uint32_t> waiting_finished;
};
static_assert(std::atomic<uint32_t>::is_always_lock_free, "signals are shared between processes");

// One published operation. All ranks of a call must agree on the first part.
struct OpHeader {
    Operation operation;
    DType dtype;
    int32_t num_topk;
    LayoutKind layout_kind;
    int64_t alignment;
    int64_t capacity;
    uint32_t plan_sequence;    // of the dispatch whose plan is reused; 0: a new plan
    int32_t scale_by_weights;  // dispatch
    int64_t max_recv_tokens;   // dispatch: rows that the outputs will have; 0: as many as arrive
    int32_t reduce;            // combine
    int32_t weighted;          // combine
    int32_t has_row_weights;   // combine: numbers travel beside the rows

    // This rank's own part.
    uint32_t sequence;
    int64_t num_tokens;
    int64_t published_ns;  // CLOCK_MONOTONIC
    // Byte offsets from the segment's start.
    int64_t part_begin_at, num_per_rank_at, num_per_expert_at, topk_idx_at, topk_weights_at, locations_at;
    int64_t rows_at, scales_at, row_weights_at;
    int32_t in_place;  // rows_at is the caller's own tensor, which may change when the call returns
};

inline constexpr int64_t kPage = 4096;
static_assert(sizeof(ControlBlock) <= kPage && sizeof(OpHeader) <= kPage);

}  // namespace ray_deepep
