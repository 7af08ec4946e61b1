// What the host waits for, and what it makes of a kernel's report.
#include <sched.h>

#include <algorithm>
#include <string>
#include <utility>

#include "common/deadline.h"
#include "cuda/check.h"
#include "cuda/device_buffer.h"

namespace ray_deepep {
namespace {

constexpr double kLookEvery_s = 0.05;
constexpr double kKernelGrace_s = 1.0;

uint32_t read_volatile(const uint32_t& word) { return *const_cast<const volatile uint32_t*>(&word); }
void write_volatile(uint32_t& word, uint32_t value) { *const_cast<volatile uint32_t*>(&word) = value; }

}  // namespace

PlanCounts DeviceBuffer::wait_counts() {
    // The kernels have the deadline; ours is a little later, for a GPU that does not run them.
    const Deadline deadline(deadline_s_ + kKernelGrace_s);
    double next_look_s = kLookEvery_s;
    while (read_volatile(status_->counts_ready) != ticket_) {
        check();
        if (deadline.elapsed_s() < next_look_s) {
            ::sched_yield();
            continue;
        }
        next_look_s = deadline.elapsed_s() + kLookEvery_s;
        if (look_for_gone_peers()) write_volatile(status_->abort, 1);
        if (interrupt_) interrupt_();
        if (deadline.expired()) {
            FaultRecord record;
            record.operation = Operation::kDispatch;
            record.phase = "wait_counts";
            record.cause = Cause::kTimeout;
            record.rank = record.peer = sizes_.rank;
            record.elapsed_s = deadline.elapsed_s();
            record.deadline_s = deadline_s_;
            throw FaultError(record);
        }
    }
    if (status_->bad_expert != 0 || status_->overflow != 0) {
        // This dispatch ends here; peers must not wait for its end.
        launch_release(peers_, stream_);
    }
    check_routing();
    const auto* counts = reinterpret_cast<const int32_t*>(status_ + 1);
    const int num_local = sizes_.num_local_experts();
    PlanCounts result;
    result.num_recv_tokens = status_->num_recv_tokens;
    result.num_rows = status_->num_rows;
    result.overflow_rank = static_cast<int>(status_->overflow) - 1;
    result.overflow_rows = status_->overflow_rows;
    result.expert_count.assign(counts, counts + num_local);
    result.expert_offset.assign(counts + num_local, counts + 2 * num_local + 1);
    status_->overflow = 0;
    return result;
}

void DeviceBuffer::check() {
    if (!open_) throw ArgumentError("buffer", "closed", "must be open");
    const uint32_t fault = read_volatile(status_->fault);
    if (fault == 3) throw_mismatch();
    if (fault != 0) throw FaultError(reported());
}

std::optional<FaultRecord> DeviceBuffer::fault_record() const {
    const std::lock_guard<std::mutex> lock(status_mutex_);
    if (status_ == nullptr) return std::nullopt;
    const uint32_t fault = read_volatile(status_->fault);
    if (fault == 0 || fault == 3) return std::nullopt;
    return reported();
}

void DeviceBuffer::give_up_on_gone_peers() {
    if (!look_for_gone_peers()) return;
    const std::lock_guard<std::mutex> lock(status_mutex_);
    if (status_ != nullptr) write_volatile(status_->abort, 1);
}

bool DeviceBuffer::look_for_gone_peers() {
    for (int peer = 0; peer < sizes_.num_ranks; ++peer) {
        if (peer == sizes_.rank || !domain_->peer_is_gone(peer)) continue;
        int nobody = -1;
        gone_peer_.compare_exchange_strong(nobody, peer);
        return true;
    }
    return false;
}

void DeviceBuffer::check_routing() {
    if (!open_ || status_->bad_expert == 0) return;
    const int expert = std::exchange(status_->bad_expert, 0) - 1;
    throw ArgumentError("topk_idx", std::to_string(expert),
                        "must be in [-1, " + std::to_string(sizes_.num_experts) + ")");
}

FaultRecord DeviceBuffer::reported() const {
    // The kernel wrote the fields before the flag that the caller has seen.
    std::atomic_thread_fence(std::memory_order_acquire);
    FaultRecord record;
    record.operation = static_cast<Operation>(status_->operation);
    record.sequence = status_->sequence;
    static const char* const kPhases[] = {"wait_published", "wait_staged", "wait_done"};
    record.phase = kPhases[status_->phase];
    record.rank = sizes_.rank;
    record.peer = status_->peer;
    record.expected = status_->expected;
    record.seen = status_->seen;
    record.elapsed_s = static_cast<double>(status_->elapsed_ns) * 1e-9;
    record.deadline_s = deadline_s_;
    const bool aborted = read_volatile(status_->fault) == 2;
    // A kernel that was stopped may have waited for a victim of the peer that is gone.
    if (aborted && gone_peer_ >= 0) record.peer = gone_peer_;
    const bool gone = record.peer != sizes_.rank && domain_->peer_is_gone(record.peer);
    record.cause = gone ? Cause::kPeerDied : (aborted ? Cause::kAborted : Cause::kTimeout);
    return record;
}

// All ranks see the difference in the same operation: each names the field, and the buffer can go on.
void DeviceBuffer::throw_mismatch() {
    static const char* const kFields[] = {"operation",
                                          "dtype",
                                          "num_topk",
                                          "layout",
                                          "reduce or alignment",
                                          "weighted, capacity or max_recv_tokens",
                                          "handle or topk_weights",
                                          "scale_by_weights"};
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    AreaHeader headers[2];
    const int ranks[] = {0, status_->peer == 0 ? sizes_.rank : status_->peer};
    const int64_t at = layout_.area_at[status_->sequence & 1] + layout_.area.header_at;
    for (int i = 0; i < 2; ++i) {
        check_cuda(
            cudaMemcpy(&headers[i], heap_.segments[ranks[i]]->data() + at, sizeof(AreaHeader), cudaMemcpyDefault),
            "cudaMemcpy of a header");
    }
    const auto operation = static_cast<Operation>(status_->operation);
    status_->fault = 0;
    check_cuda(cudaMemset(&control_->failed, 0, sizeof(uint32_t)), "cudaMemset");
    for (int i = 0; i < 8; ++i) {
        if (headers[0].fields[i] == headers[1].fields[i]) continue;
        throw MismatchError(operation, ranks[1], kFields[i], std::to_string(headers[0].fields[i]),
                            std::to_string(headers[1].fields[i]));
    }
    throw MismatchError(operation, ranks[1], "arguments", "those of rank 0", "others");
}

}  // namespace ray_deepep
