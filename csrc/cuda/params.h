// One struct per kernel: all it needs, passed by value as a grid constant. Each knows its own launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/plan.h"
#include "cuda/operation.cuh"
#include "cuda/peers.cuh"
#include "cuda/staging.cuh"

namespace ray_deepep {

// Write routing and counts (a new dispatch) or row weights (combine), the header, and raise the signals.
struct PublishParams {
    Peers peers{};
    Publication publication;
    bool has_routing = false;             // a new dispatch; without tokens its arrays may be null
    const int64_t* topk_idx = nullptr;    // [T, K]
    const float* topk_weights = nullptr;  // [T, K]; null: ones
    const int32_t* locations = nullptr;   // [T, K], padded layout only
    int64_t capacity = 0;                 // what locations are below
    const float* row_weights = nullptr;   // combine
    int64_t num_row_weights = 0;
    int num_topk = 0;
};

// Arrays of a plan, in this rank's device memory; kept by the handle.
struct DevicePlan {
    int32_t* counts = nullptr;        // see PlanCount
    int32_t* source_start = nullptr;  // [P * N + 1] first token row from each source
    int32_t* recv_source = nullptr;   // [max_recv_tokens] rank it comes from
    int32_t* recv_token = nullptr;    // [max_recv_tokens] token there
    int32_t* recv_slot = nullptr;     // [max_recv_tokens, K] output row of each route, -1: not for this rank
    float* recv_weight = nullptr;     // [max_recv_tokens, K]
    int32_t* slot_row = nullptr;      // [max_rows] token row whose route fills this output row, -1: none
    int32_t* send_expert = nullptr;   // [T, K]
    int32_t* send_row = nullptr;      // [T, K] token row at the destination
    int32_t* send_slot = nullptr;     // [T, K] output row at the destination
    float* send_weight = nullptr;     // [T, K]
    int num_tokens = 0;
    int num_topk = 0;
    int64_t max_recv_tokens = 0;
    int64_t max_rows = 0;
    LayoutKind layout = LayoutKind::kTokenMajor;
    int64_t alignment = 1;
    int64_t capacity = 0;
    bool fixed = false;  // outputs have max_rows rows, whatever arrives; what does not fit is reported
};

// Places in `counts`; expert_count[L] and expert_offset[L + 1] follow.
enum PlanCount { kNumRecvTokens = 0, kNumRows = 1, kOverflow = 2, kOverflowRows = 3, kNumPlanCounts = 4 };

struct PlanParams {
    Peers peers{};
    DevicePlan plan;
    uint32_t ticket = 0;  // given to the host with the counts; 0: the host does not wait for them
    // Outputs that a dispatch returns beside the rows; null where the layout has none.
    int64_t* topk_idx = nullptr;    // [R, K] local experts
    float* topk_weights = nullptr;  // [R, K] or [S]
};

struct PullParams {
    Peers peers{};
    Publication publication;
    Staging staging;
    DevicePlan plan;
    const std::byte* own_rows = nullptr;  // this rank's rows are read where they are; null: from the area
    const float* own_scales = nullptr;
    std::byte* out = nullptr;
    float* out_scales = nullptr;
    int64_t row_bytes = 0;
    int64_t scale_bytes = 0;
    DType dtype = DType::kFloat32;
    bool scale_by_weights = false;
    int64_t room = -1;  // rows that fit, where the host did not know how many come; -1: it did
    int num_warps = 0;  // of each block that pull, the first ones
    int num_sms = 1;
};

struct CombineParams {
    Peers peers{};
    Publication publication;
    Staging staging;
    DevicePlan plan;
    const std::byte* own_rows = nullptr;  // this rank's rows are read where they are
    const std::byte* bias = nullptr;
    std::byte* out = nullptr;
    std::byte* routes = nullptr;    // [K, T, H]
    float* topk_weights = nullptr;  // [T, K]
    int64_t hidden = 0;
    DType dtype = DType::kFloat32;
    bool has_rows = true;
    bool weighted = false;
    bool by_rank = false;    // rows are sums per rank
    bool fast = false;       // made here, from the local experts' rows
    bool by_expert = false;  // routes are added by expert, else by k
    int num_sms = 1;
};

void launch_publish(const PublishParams& params, cudaStream_t stream);
// For a dispatch that ends with its plan: tell peers that nothing of theirs is read.
void launch_release(const Peers& peers, cudaStream_t stream);
void launch_plan(const PlanParams& params, cudaStream_t stream);
// Once per device, before the first launch that needs it: kernels may use much shared memory.
void allow_pull_bulk();
void allow_combine();
void launch_pull(const PullParams& params, bool bulk_copy, cudaStream_t stream);
void launch_combine(const CombineParams& params, cudaStream_t stream);

}  // namespace ray_deepep
