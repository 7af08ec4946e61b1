// One struct per hop kernel, passed by value as a grid constant.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "cuda/peers.cuh"
#include "nvshmem/hop_layout.h"

namespace ray_deepep {

// What every hop kernel knows. Faults are reported where the domain's kernels report theirs, and stop these too.
struct HopFrame {
    DeviceControl* control = nullptr;  // of the domain's buffer
    HostStatus* status = nullptr;
    uint64_t deadline_ns = 0;
    uint32_t* blocks = nullptr;  // finished blocks of the kernel in flight
    std::byte* zone = nullptr;   // a symmetric address: also that of the other nodes' zones
    HopLayout layout;
    int pe[kMaxNodes] = {};  // of the rank of the same local rank, by node
    int node_rank = 0, num_nodes = 1, num_node_experts = 1;
    int64_t part_tokens = 0;
    int num_topk = 0;    // K of this operation
    int num_tokens = 0;  // T of this rank
    uint32_t operation = 0, sequence = 0, signature = 0;

    template <typename T>
    RAY_DEEPEP_DEVICE T* in_area(int64_t offset) const {
        return reinterpret_cast<T*>(zone + layout.area_at[sequence & 1] + offset);
    }
    RAY_DEEPEP_DEVICE uint64_t* signals() const { return reinterpret_cast<uint64_t*>(zone + layout.signals_at); }
};

// Rows, and with a new plan their routing, to every node that has an expert for them; then meet all nodes.
struct HopDispatchParams {
    HopFrame frame;
    const std::byte* x = nullptr;         // [T, H]
    const float* scales = nullptr;        // [T, H / 128] or null
    const int64_t* topk_idx = nullptr;    // [T, K] global
    const float* topk_weights = nullptr;  // [T, K]; null: ones
    const int32_t* places = nullptr;      // [T, K], padded layout only
    int64_t capacity = 0;                 // what places are below
    int64_t row_bytes = 0, scale_bytes = 0;
    bool has_routing = false;  // a new plan
};

// One row per landed token home, and numbers of its routes. The rows are staged_rows, the numbers staged_weights.
struct HopReturnParams {
    HopFrame frame;
    const int64_t* landed_idx = nullptr;  // [M, P, K] of the plan
    int64_t row_bytes = 0;                // 0: no rows
    bool has_weights = false;
};

// One row per landed route home, to [T, K, H].
struct HopRoutesParams {
    HopFrame frame;
    const int64_t* landed_idx = nullptr;  // [M, P, K] of the plan
    const std::byte* routes = nullptr;    // [K, M * P, H], symmetric
    std::byte* home = nullptr;            // [P, K, H], symmetric
    int64_t row_bytes = 0;
};

// What came home, added up in float32 by ascending node and rounded once: [T, H]. Numbers of routes to [T, K].
struct HopSumParams {
    HopFrame frame;
    const int64_t* topk_idx = nullptr;  // [T, K] global
    const std::byte* bias = nullptr;    // [T, H] or null
    std::byte* out = nullptr;           // null: no rows
    float* out_weights = nullptr;       // null: no numbers
    int64_t hidden = 0;
    DType dtype = DType::kFloat32;
};

void launch_hop_dispatch(const HopDispatchParams& params, int num_sms, cudaStream_t stream);
void launch_hop_return(const HopReturnParams& params, int num_sms, cudaStream_t stream);
void launch_hop_routes(const HopRoutesParams& params, int num_sms, cudaStream_t stream);
void launch_hop_sum(const HopSumParams& params, int num_sms, cudaStream_t stream);

}  // namespace ray_deepep
