// Dispatch and combine on GPUs of one NVLink domain: publish, plan, pull, as host/host_buffer.h on CPUs.
//
// All calls are asynchronous on the caller's stream except wait_counts(). Faults of a kernel show at the next call that
// looks: check(), or any operation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "common/fault.h"
#include "common/interrupt.h"
#include "cuda/device_heap.h"
#include "cuda/params.h"
#include "cuda/segment_layout.h"
#include "heap/domain.h"

namespace ray_deepep {

struct DeviceDispatchArgs {
    uintptr_t x = 0, x_scales = 0, topk_idx = 0, topk_weights = 0, locations = 0;
    DType dtype = DType::kFloat32;
    bool scale_by_weights = false;
    // Outputs.
    uintptr_t out_x = 0, out_scales = 0, out_topk_idx = 0, out_topk_weights = 0;
};

struct DeviceCombineArgs {
    uintptr_t rows = 0, row_weights = 0, bias = 0;
    int64_t num_rows = 0, num_row_weights = 0;
    DType dtype = DType::kFloat32;
    bool has_rows = true;
    bool has_row_weights = false;
    bool weighted = false;
    Reduce reduce = Reduce::kExact;
    uintptr_t out_x = 0, out_topk_weights = 0, out_routes = 0;
};

struct PlanCounts {
    int64_t num_recv_tokens = 0;
    int64_t num_rows = 0;
    bool overflow = false;
    std::vector<int64_t> expert_count, expert_offset;
};

class DeviceBuffer {
  public:
    DeviceBuffer(std::shared_ptr<Domain> domain, const DeviceSizes& sizes, HeapProvider provider,
                 double bootstrap_deadline_s, double deadline_s, Interrupt interrupt);
    ~DeviceBuffer() { close(); }

    const DeviceSizes& sizes() const { return sizes_; }
    int64_t segment_bytes() const { return layout_.bytes; }

    // Publish rows and routing and make the plan; with `report`, wait_counts() may follow.
    void begin_dispatch(const DeviceDispatchArgs& args, const DevicePlan& plan, bool report, int num_sms,
                        cudaStream_t stream);
    // Publish rows for a plan made earlier.
    void begin_cached_dispatch(const DeviceDispatchArgs& args, const DevicePlan& plan, int num_sms,
                               cudaStream_t stream);
    // Counts of the last begin_dispatch(report = true); blocks the host until its plan is made.
    PlanCounts wait_counts();
    void pull_dispatch(const DeviceDispatchArgs& args, const DevicePlan& plan, bool cached, int num_sms,
                       cudaStream_t stream);
    void combine(const DeviceCombineArgs& args, const DevicePlan& plan, int num_sms, cudaStream_t stream);
    // Throw if a kernel of this buffer has reported a fault.
    void check();
    void close();

  private:
    struct Signature {
        int32_t fields[8] = {};
        uint32_t hash() const;
    };
    Signature dispatch_signature(const DeviceDispatchArgs& args, const DevicePlan& plan, bool cached) const;
    void throw_fault();
    [[noreturn]] void throw_mismatch();
    void free_memory();

    std::shared_ptr<Domain> domain_;
    DeviceSizes sizes_;
    SegmentLayout layout_;
    double deadline_s_;
    Interrupt interrupt_;
    DeviceHeap heap_;
    Peers peers_{};
    PlanScratch scratch_{};
    DeviceControl* control_ = nullptr;
    HostStatus* status_ = nullptr;
    int32_t* scratch_memory_ = nullptr;
    uint32_t ticket_ = 0;
    bool open_ = false;
};

}  // namespace ray_deepep
