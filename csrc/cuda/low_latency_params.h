// The two low-latency kernels' parameters, passed by value as grid constants, and their launchers. Each kernel sends,
// or receives, or does both in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "cuda/low_latency_layout.h"

namespace ray_deepep {

// In this rank's device memory; sequence numbers live here, so that a captured graph can be replayed.
struct LowLatencyDeviceState {
    uint64_t masked;  // ranks that are not waited for, a bit each
    // By turn: what the block that looked for the signals found, for the others. `decided` is the operation's sequence
    // number << 1; 1 is added where ranks are absent beyond those masked when it began: `absent` then says which.
    uint64_t absent[kLowLatencyTurns];
    uint64_t decided[kLowLatencyTurns];
    uint32_t sent;  // last operation sent, and received
    uint32_t received;
    uint32_t send_blocks;  // finished blocks of the send in flight, and of the receive
    uint32_t receive_blocks;
    uint32_t failed;  // kernels move nothing any more
};

enum class LowLatencyFault : uint32_t { kNone = 0, kTimeout = 1, kGone = 2, kMismatch = 3, kLeftBehind = 4 };

// In pinned host memory: what the host reads without a CUDA call.
struct LowLatencyHostState {
    uint32_t fault;  // LowLatencyFault
    uint32_t operation;
    uint32_t sequence;
    int32_t peer;
    uint32_t seen;
    int32_t bad_expert;       // 1 + an expert id out of range; 0: none. Its route is dropped.
    int32_t repeated_expert;  // 1 + an expert that a token named twice; 0: none. The second route is dropped.
    uint32_t abort;           // written by the host: end all waits
    uint64_t elapsed_ns;
    uint64_t left_by;         // kLeftBehind: peers that went on without this rank, a bit each
    uint64_t masked_late;     // ranks that a kernel gave up
    uint64_t masked_by_host;  // written by the host, for a kernel that waits
    uint64_t gone;            // written by the host: peers whose process ended
};

struct LowLatencyPeers {
    std::byte* segments[kMaxRanks] = {};
    LowLatencyLayout layout;
    LowLatencyDeviceState* device = nullptr;
    LowLatencyHostState* host = nullptr;
    int rank = 0, num_ranks = 1, num_experts = 1, num_local_experts = 1;
    int64_t max_tokens = 0;
    int64_t hidden = 0;
};

// What both kernels know of a call.
struct LowLatencyStep {
    bool sends = false, receives = false;
    uint32_t operation = 0;
    uint32_t signature = 0;
    int32_t fields[4] = {};
    int num_tokens = 0;  // T
    int num_topk = 0;    // K
    uint64_t timeout_ns = 0;
    bool mask_late = false;
    bool in_place = false;       // peers' rows are read where their callers left them
    int64_t* wait_ns = nullptr;  // [N], added to
    bool* absent = nullptr;      // [N]
    int num_sms = 1;
};

// What a dispatch leaves for its combine; int32 in one piece of memory.
struct LowLatencyPlanArrays {
    uint32_t* sequence = nullptr;    // [4]: of the dispatch; absent ranks, low and high half; none
    int32_t* num_tokens = nullptr;   // [N] from each rank; 0 if it is absent
    int32_t* slot = nullptr;         // [N, M, K] row of each route; -1: not for this rank, -2: there was no room
    float* weight = nullptr;         // [N, M, K]
    int32_t* send_expert = nullptr;  // [T, K]
    float* send_weight = nullptr;    // [T, K]
};

struct LowLatencyDispatchParams {
    LowLatencyPeers peers{};
    LowLatencyStep step;
    // Sent.
    const std::byte* x = nullptr;
    const float* x_scales = nullptr;
    const void* topk_idx = nullptr;
    const float* topk_weights = nullptr;  // null: ones
    bool wide_idx = false;                // int64
    bool stage_own = false;               // own rows are read from the area too
    bool cast = false;
    bool power_of_two = false;
    DType from = DType::kFloat32;  // of x
    int64_t row_bytes = 0;         // as they leave
    // Received.
    LowLatencyPlanArrays plan;
    std::byte* out = nullptr;
    float* out_scales = nullptr;
    int32_t* counts = nullptr;                 // [L]
    int32_t* range_begin = nullptr;            // [L, N]
    int32_t* range_count = nullptr;            // [L, N]
    int32_t* expert_offsets = nullptr;         // [L + 1]
    int32_t* needed = nullptr;                 // [1]
    int64_t* num_tokens_per_expert = nullptr;  // [L], added to
    int64_t alignment = 0;                     // of groups; 0: a block of N * M rows for each expert
    int64_t num_rows = 0;
};

struct LowLatencyCombineParams {
    LowLatencyPeers peers{};
    LowLatencyStep step;
    LowLatencyPlanArrays plan;
    const std::byte* rows = nullptr;
    const float* topk_weights = nullptr;  // exact; null: the plan's
    std::byte* out = nullptr;
    DType dtype = DType::kFloat32;
    bool exact = false;
    int64_t max_routes_here = 1;
    // With step.in_place: each rank's room for tensors of the user's, and where in it `rows` begin, in 16 bytes.
    std::byte* symm[kMaxRanks] = {};
    uint32_t rows_at = 0;
};

void launch_low_latency_dispatch(const LowLatencyDispatchParams& params, cudaStream_t stream);
void launch_low_latency_combine(const LowLatencyCombineParams& params, cudaStream_t stream);
// Set and clear bits of the mask, let `admit` (if not -1) in with this word, and tell all peers.
void launch_low_latency_mask(const LowLatencyPeers& peers, uint64_t set, uint64_t clear, int admit, uint64_t admission,
                             cudaStream_t stream);
// Tell all peers whether this rank waits to be let in, and take back what it signalled.
void launch_low_latency_rejoin(const LowLatencyPeers& peers, uint32_t rejoining, uint32_t sequence,
                               cudaStream_t stream);

}  // namespace ray_deepep
