// Dispatch and combine on the CPU: publish, plan, pull over the segments of a symmetric heap.
//
// A segment holds the control block and two areas used by turns. A rank publishes operation s + 2 into the area of s
// only after it saw every peer publish s + 1, which a peer does only when it has pulled all of s. So one signal per
// operation is enough: no acknowledgement, no second wait.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "common/dtype.h"
#include "common/plan.h"
#include "heap/domain.h"
#include "heap/symmetric_heap.h"
#include "host/control.h"
#include "host/output_rows.h"
#include "host/thread_pool.h"
#include "host/traffic.h"
#include "host/wait.h"

namespace ray_deepep {

// Outputs from this size on are written past the cache: they would not stay in it, and lines that are overwritten whole
// need not be read first.
inline constexpr int64_t kStreamedBytes = 1 << 20;

struct BufferSizes {
    int num_experts = 1;
    int64_t hidden = 1;
    int num_topk = 1;
    int64_t max_tokens = 0;
    int64_t max_capacity = 0;
    int num_parts = 1;                   // see Geometry
    int64_t low_latency_max_tokens = 0;  // only to agree on: those calls have a heap of their own
    int64_t max_segment_bytes = 0;
    int64_t symm_bytes = 0;  // room for the caller's own tensors, behind the areas
    // Bytes of one area for these sizes, before the limit.
    int64_t area_bytes(int num_ranks) const;
};

// A plan with the weights of its routes: what a handle holds.
struct HostPlan {
    Plan plan;
    uint32_t sequence = 0;            // of the dispatch that made it: the same on all ranks
    std::vector<float> send_weight;   // [T, K]
    std::vector<float> route_weight;  // beside Plan::route_slot
    // What this rank sent, and will get back: by rank, (token, rank) pairs and routes.
    std::vector<int64_t> send_tokens, send_routes;
};

// Addresses of torch tensors; 0 where there is none, and for empty tensors. Shapes as in handle.py.
struct DispatchArgs {
    uintptr_t x = 0, x_scales = 0, topk_idx = 0, topk_weights = 0, locations = 0;
    int64_t num_tokens = 0;
    std::vector<int64_t> part_tokens;  // of each part; empty: one part. Not for a cached dispatch
    int num_topk = 0;
    DType dtype = DType::kFloat32;
    Layout layout;
    bool scale_by_weights = false;
    int64_t max_recv_tokens = 0;  // only to agree on: the caller cuts or pads the outputs; 0: as many as arrive
};

struct DispatchOutputs {
    uintptr_t x = 0, x_scales = 0, topk_idx = 0, topk_weights = 0;
};

struct CombineArgs {
    uintptr_t rows = 0, row_weights = 0, bias = 0;
    // Instead of `rows`: one block per local expert, [rows of the expert, hidden] in the order of the layout.
    std::vector<uintptr_t> expert_rows;
    DType dtype = DType::kFloat32;
    bool has_rows = true;
    bool has_row_weights = false;
    bool weighted = false;
    // Only the rows of the routes are wanted, and no sum: one after the other by (token, k), without empty ones.
    bool routes_only = false;
    Reduce reduce = Reduce::kExact;
};

// `routes`: [K, T, H], or [number of routes, H] with CombineArgs::routes_only.
struct CombineOutputs {
    uintptr_t x = 0, topk_weights = 0, routes = 0;
};

class HostBuffer {
  public:
    // Collective over `domain`.
    HostBuffer(std::shared_ptr<Domain> domain, const BufferSizes& sizes, double bootstrap_deadline_s, double deadline_s,
               int num_threads, Interrupt interrupt);
    ~HostBuffer() { close(); }

    // Publish rows and routing, and plan. `pull_dispatch` must follow, with outputs of the plan's sizes.
    std::shared_ptr<HostPlan> begin_dispatch(const DispatchArgs& args);
    // Publish rows for a plan made earlier. `pull_dispatch` must follow.
    void begin_cached_dispatch(const DispatchArgs& args, const HostPlan& plan);
    void pull_dispatch(const DispatchArgs& args, HostPlan& plan, const DispatchOutputs& out);
    void combine(const CombineArgs& args, const HostPlan& plan, const CombineOutputs& out);
    void close();
    // The fault that ended this buffer, if one did. From any thread, also while another one waits in an operation.
    std::optional<FaultRecord> fault_record() const { return fault_slot_.get(); }
    // From any thread.
    const Traffic& traffic() const { return traffic_; }

    // The room for the caller's own tensors: rows that lie in it are not staged. It stays mapped while someone holds
    // it.
    struct SymmRegion {
        std::shared_ptr<const SharedHeap> heap;
        std::byte* data = nullptr;
        int64_t bytes = 0;
    };
    SymmRegion symm_region() const;

  private:
    const OpHeader& header(int rank) const { return *reinterpret_cast<const OpHeader*>(area(rank)); }
    std::byte* area(int rank) const;
    // Room in this rank's area for `bytes`; the offset from the segment's start.
    int64_t reserve(int64_t bytes);
    OpHeader& open_operation(Operation operation);
    void publish(OpHeader& header);
    // All rows are pulled; if peers read this rank's in place, wait for them.
    void finish();
    // Where `address` is in this rank's segment if it lies in the room for the caller's tensors; 0 if not.
    int64_t symm_offset(uintptr_t address) const;
    void check_agreement() const;
    template <typename T>
    T* at(int rank, int64_t offset) const {
        return reinterpret_cast<T*>(heap_->segments[rank].data() + offset);
    }

    void stage_rows(const DispatchArgs& args, OpHeader& header, const int32_t* send_expert);
    void publish_routing(const DispatchArgs& args, OpHeader& header);
    void check_parts(const DispatchArgs& args) const;
    void check_locations(const DispatchArgs& args) const;
    void count_sent(const OpHeader& own, HostPlan& plan) const;
    void pull_rows(const DispatchArgs& args, const HostPlan& plan, const DispatchOutputs& out);
    void fill_unused(const Plan& plan, const DispatchArgs& args, const DispatchOutputs& out);
    void pull_routing(const HostPlan& plan, const DispatchOutputs& out);

    OutputRows output_rows(const CombineArgs& args, const Plan& plan) const;
    void stage_outputs(const CombineArgs& args, const HostPlan& plan, OpHeader& header);
    void reduce_local(const CombineArgs& args, const HostPlan& plan, std::byte* staged);
    void pull_outputs(const CombineArgs& args, const HostPlan& plan, const CombineOutputs& out);
    void pull_routes(const CombineArgs& args, const HostPlan& plan, const CombineOutputs& out);
    void pull_row_weights(const Plan& plan, const CombineOutputs& out);

    std::shared_ptr<Domain> domain_;
    Geometry geometry_;
    BufferSizes sizes_;
    double deadline_s_;
    std::shared_ptr<const SharedHeap> heap_;
    int64_t area_bytes_ = 0, used_ = 0;
    uint32_t sequence_ = 0;
    FaultSlot fault_slot_;
    Traffic traffic_;
    std::unique_ptr<Signals> signals_;
    ThreadPool threads_;
};

}  // namespace ray_deepep
