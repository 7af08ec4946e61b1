// Dispatch and combine on GPUs of one NVLink domain: publish, plan, pull, as host/host_buffer.h on CPUs.
//
// All calls are asynchronous on the caller's stream except wait_counts(). Faults of a kernel show at the next call that
// looks: check(), or any operation.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "common/fault.h"
#include "common/interrupt.h"
#include "cuda/device_heap.h"
#include "cuda/memory.h"
#include "cuda/params.h"
#include "cuda/segment_layout.h"
#include "cuda/signature.h"
#include "heap/domain.h"

namespace ray_deepep {

struct DeviceDispatchArgs {
    uintptr_t x = 0, x_scales = 0, topk_idx = 0, topk_weights = 0, locations = 0;
    DType dtype = DType::kFloat32;    // of the rows sent
    DType x_dtype = DType::kFloat32;  // of x; another one where rows are cast to float8 on the way
    bool power_of_two = false;        // scales of such a cast
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
    int overflow_rank = -1;  // on which it does not fit; -1: it fits everywhere
    int64_t overflow_rows = 0;
    std::vector<int64_t> expert_count, expert_offset;
};

class DeviceBuffer {
  public:
    DeviceBuffer(std::shared_ptr<Domain> domain, const DeviceSizes& sizes, const HeapSource& source,
                 double bootstrap_deadline_s, double deadline_s, Interrupt interrupt);
    ~DeviceBuffer() { close(); }

    const DeviceSizes& sizes() const { return sizes_; }
    int64_t segment_bytes() const { return layout_.bytes; }

    // Tensors of the user's in the heap.
    uintptr_t symm_address() const {
        return reinterpret_cast<uintptr_t>(peers_.segments[sizes_.rank]) + layout_.symm_at;
    }
    int64_t symm_bytes() const { return layout_.symm_bytes; }
    // By rank.
    std::vector<uintptr_t> symm_addresses() const;

    // Where kernels of a hop in front of this buffer's report faults, to stop its own; and where these stop them.
    uintptr_t control_address() const { return reinterpret_cast<uintptr_t>(control_.get()); }
    uintptr_t status_address() const { return reinterpret_cast<uintptr_t>(status_.get()); }
    // Let kernels in flight stop waiting, because a rank elsewhere has failed. Any thread.
    void abort_waits();

    // A plan's arrays are int32 in one piece of memory; `fixed`: outputs have max_rows rows, whatever arrives.
    int64_t plan_ints(int64_t num_tokens, int num_topk, int64_t max_recv_tokens, int64_t max_rows) const;
    DevicePlan make_plan(uintptr_t address, const DevicePlan& sizes) const;

    // Publish routing and make the plan; with `report`, wait_counts() may follow. pull_dispatch() moves the rows.
    void begin_dispatch(const DeviceDispatchArgs& args, const DevicePlan& plan, bool report, cudaStream_t stream);
    // Counts of the last begin_dispatch(report = true); blocks the host until its plan is made. Routing that is out of
    // range is no error here: the rank must still move its rows, for its peers wait for them. check_routing() follows.
    PlanCounts wait_counts();
    // `cached`: along a plan made earlier; a whole dispatch. `room`: rows of the outputs, where wait_counts() comes
    // only later: nothing happens if more arrive, and this is called again; else -1.
    void pull_dispatch(const DeviceDispatchArgs& args, const DevicePlan& plan, bool cached, int64_t room, int num_sms,
                       cudaStream_t stream);
    void combine(const DeviceCombineArgs& args, const DevicePlan& plan, int num_sms, cudaStream_t stream);
    // Throw if a kernel of this buffer has reported a fault.
    void check();
    // Throw if a dispatch that nobody waited for saw an expert id or a location out of range. Not part of check(): an
    // operation that is about to start must start, as its peers' do.
    void check_routing();
    void close();

    // For a thread that looks while another one waits, in an operation or for the GPU. No CUDA call, and no lock that
    // is held for longer than a read.
    //
    // What a kernel of this buffer has reported, if it did; nothing once the buffer is closed.
    std::optional<FaultRecord> fault_record() const;
    // What its kernels have counted; zeros once the buffer is closed.
    DeviceTraffic traffic() const;
    // End the waits of kernels in flight where a peer's process is gone, instead of letting them run to the deadline.
    void give_up_on_gone_peers();

  private:
    int64_t offset_in_heap(uintptr_t address) const;
    Publication publication(Operation operation, const Signature& signature, const DevicePlan& plan) const;
    Publication dispatch_publication(const DeviceDispatchArgs& args, const DevicePlan& plan, bool cached,
                                     Staging* staging) const;
    Publication combine_publication(const DeviceCombineArgs& args, const DevicePlan& plan, bool fast,
                                    Staging* staging) const;
    FaultRecord reported() const;
    bool look_for_gone_peers();
    void wait_headers(Operation operation, uint32_t sequence);
    [[noreturn]] void throw_mismatch();

    std::shared_ptr<Domain> domain_;
    DeviceSizes sizes_;
    SegmentLayout layout_;
    double deadline_s_;
    Interrupt interrupt_;
    DeviceHeap heap_;
    Peers peers_{};
    DeviceMemory<DeviceControl> control_;
    HostMemory<HostStatus> status_;
    mutable std::mutex status_mutex_;  // against freeing status_ under fault_record()
    std::atomic<int> gone_peer_{-1};   // whose end made us stop the kernels
    uint32_t ticket_ = 0;
    int64_t capacity_ = 0;  // of the last new dispatch, for an error
    bool bulk_copy_ = false;
    cudaStream_t stream_ = nullptr;  // of the dispatch whose counts are awaited
    bool open_ = false;
};

}  // namespace ray_deepep
