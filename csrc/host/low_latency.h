// Low-latency dispatch and combine on the CPU: small batches, fixed shapes, sending apart from receiving.
//
// A segment holds a control block, what this rank says about each peer, and four areas used by turns. At most two
// operations are sent and not yet received, and they are received in the order in which they were sent. So a rank that
// sends s has received s - 2: it saw every peer send s - 2, and a peer sends s - 2 only when it has received s - 4,
// whose area s takes. A rank that is masked is not waited for, so its reads may be overtaken; it looks after each pull.
//
// Rows that combine sends stand at (source rank, token): no plan is needed to find them, so ranks need not agree about
// who is masked. Rows that are read in place lie anywhere in the room for the caller's tensors: the area then says
// which row each route has.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/dtype.h"
#include "common/plan.h"
#include "heap/domain.h"
#include "heap/symmetric_heap.h"
#include "host/control.h"
#include "host/float8.h"
#include "host/host_buffer.h"
#include "host/thread_pool.h"
#include "host/wait.h"

namespace ray_deepep {

inline constexpr int kLowLatencyAreas = 4;

// Byte offsets in an area.
struct LowLatencyAreaMap {
    int64_t masked_at, topk_idx_at, topk_weights_at, scales_at, rows_at, bytes;
};

struct LowLatencySizes {
    int num_experts = 1;
    int64_t hidden = 128;
    int num_topk = 1;
    int64_t max_tokens = 1;
    int64_t max_segment_bytes = 0;
    LowLatencyAreaMap area(int num_ranks) const;
    int64_t segment_bytes(int num_ranks) const;
};

// What a rank shows beside its signal.
struct LowLatencyControl {
    // Last operation whose area this rank began to write. Peers that were not waited for compare it after a pull.
    alignas(64) std::atomic<uint32_t> begun;
    std::atomic<uint32_t> rejoining;
};

// What a rank says about one peer.
struct PeerView {
    std::atomic<uint64_t> admitted;  // how often it let the peer in again, then (low half) its last operation by then
    std::atomic<uint32_t> masked;
};

// One sent operation. Ranks that are not masked must agree on the first part.
struct LowLatencyHeader {
    Operation operation;
    DType dtype;
    int32_t num_topk;
    Reduce reduce;           // combine
    uint32_t plan_sequence;  // combine: of its dispatch

    uint32_t sequence;
    // Combine: where rows that are read in place begin in the room for the caller's tensors; -1: they are in the area.
    // Ranks must agree on which of the two.
    int64_t rows_at;
    int64_t num_tokens;
    int64_t sent_ns;  // CLOCK_MONOTONIC, the same clock on all ranks of a host
};

// A sent operation, to be received.
struct LowLatencyCall {
    Operation operation = Operation::kNone;
    uint32_t sequence = 0;
    std::vector<uint8_t> absent;  // masked when it was sent
    bool staged_own = false;      // own rows are read from the area too: the caller may have overwritten its tensor
};

// Who sent what to this rank, and where it landed: what a handle holds.
struct LowLatencyPlan {
    uint32_t sequence = 0;
    int num_topk = 0;
    int64_t num_tokens = 0;
    std::vector<uint8_t> absent;
    std::vector<int32_t> send_expert;  // [T, K], -1: none
    std::vector<float> send_weight;    // [T, K]
    // Tokens with a route to this rank, by (source rank, token); routes by k.
    std::vector<int64_t> recv_token;  // source rank * max_tokens + token
    std::vector<int64_t> route_begin;
    std::vector<int64_t> route_slot;  // row of the output; -1: there was no room
    std::vector<int8_t> route_k;
    std::vector<float> route_weight;
};

// Addresses of torch tensors; 0 where there is none. Shapes as in ray_deepep/low_latency.py.
struct LowLatencyDispatchArgs {
    uintptr_t x = 0, x_scales = 0, topk_idx = 0, topk_weights = 0;
    int64_t num_tokens = 0;
    int num_topk = 0;
    DType dtype = DType::kFloat32;  // of x
    Float8Scale cast = Float8Scale::kNone;
    bool stage_own = false;
};

struct LowLatencyDispatchOutputs {
    uintptr_t x = 0, x_scales = 0;
    uintptr_t counts = 0, range_begin = 0, range_count = 0, expert_offsets = 0, needed = 0;  // int32
    uintptr_t absent = 0;                                                                    // bool, [N]
    uintptr_t num_tokens_per_expert = 0;                                                     // int64, added to
    int64_t alignment = 0;  // of groups; 0: a block of max_tokens * N rows for each expert
    int64_t num_rows = 0;
};

struct LowLatencyCombineArgs {
    uintptr_t rows = 0, topk_weights = 0;
    DType dtype = DType::kFloat32;
    Reduce reduce = Reduce::kFast;
    bool zero_copy = false;  // exact: peers read `rows` where they are
};

struct LowLatencyCombineOutputs {
    uintptr_t x = 0, absent = 0;
};

struct LowLatencyWait {
    double timeout_s = 0;
    bool mask_late = false;  // a rank that does not come is masked; otherwise it is a fault
    uintptr_t wait_ns = 0;   // int64, [N], added to
};

class LowLatencyBuffer {
  public:
    // Collective over `domain`. `symm`: the room for the caller's tensors.
    LowLatencyBuffer(std::shared_ptr<Domain> domain, const LowLatencySizes& sizes, HostBuffer::SymmRegion symm,
                     double bootstrap_deadline_s, int num_threads, Interrupt interrupt);
    ~LowLatencyBuffer() { close(); }

    // Sends never wait. Receives come in the order of the sends, at most two behind.
    std::shared_ptr<LowLatencyCall> send_dispatch(const LowLatencyDispatchArgs& args);
    std::shared_ptr<LowLatencyPlan> receive_dispatch(const LowLatencyCall& call, const LowLatencyDispatchArgs& args,
                                                     const LowLatencyDispatchOutputs& out, const LowLatencyWait& wait);
    std::shared_ptr<LowLatencyCall> send_combine(const LowLatencyCombineArgs& args, const LowLatencyPlan& plan);
    void receive_combine(const LowLatencyCall& call, const LowLatencyCombineArgs& args, const LowLatencyPlan& plan,
                         const LowLatencyCombineOutputs& out, const LowLatencyWait& wait);

    void mask(int rank, bool masked);
    std::vector<int> masked() const;  // both may be called while another thread waits
    // Masked ranks that wait in `rejoin`.
    std::vector<int> returning() const;
    // Take part again, from the operation on before which every other rank unmasked this one.
    void rejoin(double deadline_s);
    void close();

  private:
    enum class Step { kSend, kPull, kPulled, kPulledInPlace };

    std::byte* area(int rank, uint32_t sequence) const;
    LowLatencyHeader& header(int rank, uint32_t sequence) const {
        return *reinterpret_cast<LowLatencyHeader*>(area(rank, sequence));
    }
    template <typename T>
    T* at(int rank, uint32_t sequence, int64_t offset) const {
        return reinterpret_cast<T*>(area(rank, sequence) + offset);
    }
    LowLatencyControl& control(int rank) const;
    PeerView& view(int rank, int of) const;

    void check_open() const;
    std::shared_ptr<LowLatencyCall> begin(Operation operation);
    void publish(const LowLatencyCall& call);
    std::vector<uint8_t> arrive(const LowLatencyCall& call, const LowLatencyWait& wait);
    bool await_or_mask(int peer, const LowLatencyCall& call, const LowLatencyWait& wait, const Deadline& deadline,
                       const std::vector<uint8_t>& absent);
    bool given_up(int peer, const LowLatencyWait& wait, const std::vector<uint8_t>& absent) const;
    bool is_masked(int peer) const { return view(geometry_.rank, peer).masked.load(std::memory_order_acquire) != 0; }
    void check_agreement(const LowLatencyCall& call, const std::vector<uint8_t>& absent) const;
    void check_not_left(const LowLatencyCall& call, const std::vector<uint8_t>& absent, Step step) const;
    std::vector<int> not_admitted_by(uint32_t* sequence) const;

    void stage_rows(const LowLatencyDispatchArgs& args, const LowLatencyCall& call);
    void place_rows(const LowLatencyCall& call, const LowLatencyDispatchOutputs& out, LowLatencyPlan& plan) const;
    void pull_rows(const LowLatencyCall& call, const LowLatencyDispatchArgs& args, const LowLatencyDispatchOutputs& out,
                   const LowLatencyPlan& plan);
    void stage_sums(const LowLatencyCombineArgs& args, const LowLatencyPlan& plan, std::byte* staged);
    void stage_routes(const LowLatencyCombineArgs& args, const LowLatencyPlan& plan, std::byte* staged);
    int64_t offset_of_rows(const LowLatencyCombineArgs& args) const;
    const std::byte* route_row(int rank, uint32_t sequence, int64_t route, int64_t row_bytes) const;

    std::shared_ptr<Domain> domain_;
    Geometry geometry_;
    LowLatencySizes sizes_;
    HostBuffer::SymmRegion symm_;
    LowLatencyAreaMap map_;
    int64_t control_bytes_ = 0;
    Interrupt interrupt_;
    SharedHeap heap_;
    uint32_t sequence_ = 0;
    std::vector<uint32_t> admissions_;  // by peer: how many of its admissions this rank has used
    FaultSlot fault_slot_;
    std::unique_ptr<Signals> signals_;
    ThreadPool threads_;
};

}  // namespace ray_deepep
