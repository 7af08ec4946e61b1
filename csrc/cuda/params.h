// One struct per kernel: all it needs, passed by value as a grid constant. Each knows its own launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/plan.h"
#include "cuda/peers.cuh"

namespace ray_deepep {

// Copy rows that do not live in the heap into this rank's area of the next operation.
struct StageRowsParams {
    Peers peers;
    const std::byte* rows = nullptr;
    const float* scales = nullptr;
    int64_t row_bytes = 0;
    int64_t scale_bytes = 0;
    int64_t num_rows = 0;
    // Combine: only rows that hold something are copied, [num_rows] with -1 where there is nothing; null: all.
    const int32_t* slot_row = nullptr;
    int num_sms = 1;
};

// Write routing and counts (a new dispatch), the header, and raise the signals.
struct PublishParams {
    Peers peers;
    const int64_t* topk_idx = nullptr;  // [T, K]; null: no routing (a plan is reused)
    const float* topk_weights = nullptr;
    const int32_t* locations = nullptr;
    const float* row_weights = nullptr;  // combine
    int64_t num_row_weights = 0;
    int num_tokens = 0;
    int num_topk = 0;
    int64_t rows_at = -1;  // offset in the segment of rows that live in the heap; -1: the area's staged rows
    int64_t scales_at = -1;
    uint32_t signature = 0;
    int32_t fields[8] = {};
};

// Arrays of a plan, in this rank's device memory; made by the caller, kept by the handle.
struct DevicePlan {
    int32_t* recv_source = nullptr;  // [max_recv_tokens] source rank
    int32_t* recv_token = nullptr;   // [max_recv_tokens] token there
    int32_t* recv_slot = nullptr;    // [max_recv_tokens, K] output row of each route, -1: not for this rank
    float* recv_weight = nullptr;    // [max_recv_tokens, K]
    int32_t* slot_row = nullptr;     // [max_rows] token row whose route fills this output row, -1: none
    int32_t* send_expert = nullptr;  // [T, K]
    int32_t* send_row = nullptr;     // [T, K] token row at the destination
    int32_t* send_slot = nullptr;    // [T, K] output row at the destination
    float* send_weight = nullptr;    // [T, K]
    int32_t* counts = nullptr;       // [2 + L + L + 1]: num_recv_tokens, num_rows, expert_count, expert_offset
    int num_tokens = 0;
    int num_topk = 0;
    int64_t max_recv_tokens = 0;
    int64_t max_rows = 0;
    LayoutKind layout = LayoutKind::kTokenMajor;
    int64_t alignment = 1;
    int64_t capacity = 0;
};

// Scratch of the plan kernels, in this rank's device memory.
struct PlanScratch {
    int32_t* num_tokens = nullptr;      // [N]
    int32_t* recv_row_base = nullptr;   // [N, C] first token row of each chunk
    int32_t* recv_slot_base = nullptr;  // [N * C, L] first output row per chunk and local expert
    int32_t* send_row_base = nullptr;   // [C, N]
    int32_t* send_slot_base = nullptr;  // [C, E]
};

struct PlanParams {
    Peers peers;
    DevicePlan plan;
    PlanScratch scratch;
    int num_chunks = 0;
    uint32_t signature = 0;
    uint32_t ticket = 0;  // given to the host with the counts; 0: the host does not wait for them
    // Outputs that a dispatch returns beside the rows; null where the layout has none.
    int64_t* topk_idx = nullptr;    // [R, K] local experts
    float* topk_weights = nullptr;  // [R, K] or [S]
};

struct PullParams {
    Peers peers;
    DevicePlan plan;
    const std::byte* own_rows = nullptr;  // this rank's rows are read where they are
    const float* own_scales = nullptr;
    std::byte* out = nullptr;
    float* out_scales = nullptr;
    int64_t row_bytes = 0;
    int64_t scale_bytes = 0;
    int64_t hidden = 0;
    DType dtype = DType::kFloat32;
    bool scale_by_weights = false;
    bool wait = false;  // the plan was made earlier: wait for the signals of this operation first
    uint32_t signature = 0;
    int num_sms = 1;
};

// Add up a token's local experts into this rank's area (fast mode).
struct ReduceLocalParams {
    Peers peers;
    DevicePlan plan;
    const std::byte* rows = nullptr;
    int64_t hidden = 0;
    DType dtype = DType::kFloat32;
    bool weighted = false;
    int num_sms = 1;
};

struct CombineParams {
    Peers peers;
    DevicePlan plan;
    const std::byte* own_rows = nullptr;  // null: read the staged ones
    const std::byte* bias = nullptr;
    std::byte* out = nullptr;
    std::byte* routes = nullptr;    // [K, T, H]
    float* topk_weights = nullptr;  // [T, K]
    int64_t hidden = 0;
    DType dtype = DType::kFloat32;
    bool has_rows = true;
    bool weighted = false;
    bool by_rank = false;
    bool by_expert = false;
    uint32_t signature = 0;
    int num_sms = 1;
};

void launch_stage_rows(const StageRowsParams& params, cudaStream_t stream);
void launch_publish(const PublishParams& params, cudaStream_t stream);
void launch_plan(const PlanParams& params, cudaStream_t stream);
void launch_pull(const PullParams& params, cudaStream_t stream);
void launch_reduce_local(const ReduceLocalParams& params, cudaStream_t stream);
void launch_combine(const CombineParams& params, cudaStream_t stream);

}  // namespace ray_deepep
