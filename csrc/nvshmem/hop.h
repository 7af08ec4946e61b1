// The hop of one buffer over the GPUs of several nodes: launches of its kernels. Asynchronous on the caller's stream;
// faults show at the domain's buffer, whose control and status words the kernels use.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/fault.h"
#include "cuda/memory.h"
#include "nvshmem/hop_params.h"

namespace ray_deepep {

// What the domain's buffer lends: addresses of its DeviceControl and HostStatus, and its deadline.
struct HopFaultWords {
    uintptr_t control = 0, status = 0;
    double deadline_s = 0.0;
};

// Which operation this is, the same on all nodes. `signature`: of its arguments, to find those that differ.
struct HopCall {
    Operation operation = Operation::kDispatch;
    uint32_t sequence = 0;  // counts up by one
    uint32_t signature = 0;
    int num_tokens = 0;
    int num_topk = 0;
    int num_sms = 1;
};

struct HopDispatchArgs {
    uintptr_t x = 0, x_scales = 0, topk_idx = 0, topk_weights = 0, locations = 0;
    int64_t capacity = 0;
    DType dtype = DType::kFloat32;
    bool cached = false;
};

class Hop {
  public:
    // `zone`: make_hop_layout(sizes).bytes of symmetric memory at the same place on all PEs, cleared, before any other
    // rank may send. `pes`: of the rank of the same local rank on each node.
    Hop(const HopSizes& sizes, const std::vector<int>& pes, uintptr_t zone, const HopFaultWords& faults);

    const HopLayout& layout() const { return layout_; }
    // Where operation `sequence` has its area.
    uintptr_t area(uint32_t sequence) const;

    void dispatch(const HopCall& call, const HopDispatchArgs& args, cudaStream_t stream) const;
    // `landed_idx`: int64 [M, P, K] of the plan. element_size 0: only numbers of routes, no rows.
    void give_back(const HopCall& call, uintptr_t landed_idx, int64_t element_size, bool weights,
                   cudaStream_t stream) const;
    void give_routes_back(const HopCall& call, uintptr_t landed_idx, uintptr_t routes, uintptr_t home,
                          int64_t element_size, cudaStream_t stream) const;
    // After give_back() of the same call.
    void sum(const HopCall& call, uintptr_t topk_idx, uintptr_t bias, uintptr_t out, uintptr_t out_weights, DType dtype,
             cudaStream_t stream) const;

  private:
    HopFrame frame(const HopCall& call) const;

    HopSizes sizes_;
    HopLayout layout_;
    HopFrame frame_{};
    DeviceMemory<uint32_t> blocks_;
};

}  // namespace ray_deepep
