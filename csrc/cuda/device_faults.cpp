// What the host waits for, and what it makes of a kernel's report.
#include <sched.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "common/deadline.h"
#include "cuda/check.h"
#include "cuda/device_buffer.h"

namespace ray_deepep {
namespace {

constexpr double kLookEvery_s = 0.05;
constexpr double kKernelGrace_s = 1.0;
constexpr uint32_t kHopPhase = 3;  // Phase::kHop

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
    // All ranks know of an overflow, and end the dispatch here: nobody must wait for its end.
    if (status_->overflow != 0) launch_release(peers_, stream_);
    const auto* counts = reinterpret_cast<const int32_t*>(status_.get() + 1);
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

DeviceTraffic DeviceBuffer::traffic() const {
    const std::lock_guard<std::mutex> lock(status_mutex_);
    DeviceTraffic traffic{};
    if (status_ == nullptr) return traffic;
    const volatile DeviceTraffic& from = status_->traffic;
    std::copy(std::begin(from.wait_ns), std::end(from.wait_ns), traffic.wait_ns);
    std::copy(std::begin(from.recv_bytes), std::end(from.recv_bytes), traffic.recv_bytes);
    return traffic;
}

void DeviceBuffer::give_up_on_gone_peers() {
    if (look_for_gone_peers()) abort_waits();
}

void DeviceBuffer::abort_waits() {
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
    if (!open_) return;
    const int expert = std::exchange(status_->bad_expert, 0) - 1;
    const uint64_t location = std::exchange(status_->bad_location, 0);
    if (expert != -1) {
        throw ArgumentError("topk_idx", std::to_string(expert),
                            "must be in [-1, " + std::to_string(sizes_.num_experts) + ")");
    }
    if (location != 0) {
        throw ArgumentError("locations", std::to_string(static_cast<int32_t>(location)),
                            "must be in [0, " + std::to_string(capacity_) + ")");
    }
}

FaultRecord DeviceBuffer::reported() const {
    // The kernel wrote the fields before the flag that the caller has seen.
    std::atomic_thread_fence(std::memory_order_acquire);
    FaultRecord record;
    record.operation = static_cast<Operation>(status_->operation);
    record.sequence = status_->sequence;
    static const char* const kPhases[] = {"wait_published", "wait_staged", "wait_done", "wait_hop"};
    record.phase = kPhases[status_->phase];
    record.rank = sizes_.rank;
    record.peer = status_->peer;
    record.expected = status_->expected;
    record.seen = status_->seen;
    record.elapsed_s = static_cast<double>(status_->elapsed_ns) * 1e-9;
    record.deadline_s = deadline_s_;
    const bool aborted = read_volatile(status_->fault) == 2;
    // A kernel that was stopped may have waited for a victim of the peer that is gone.
    const bool of_hop = status_->phase == kHopPhase;
    if (aborted && gone_peer_ >= 0) record.peer = gone_peer_;
    if (of_hop && (!aborted || gone_peer_ < 0)) {
        // A node's number, of whose processes the domain knows nothing.
        record.cause = aborted ? Cause::kAborted : Cause::kTimeout;
        return record;
    }
    if (of_hop) record.phase = kPhases[0];
    const bool gone = record.peer != sizes_.rank && domain_->peer_is_gone(record.peer);
    record.cause = gone ? Cause::kPeerDied : (aborted ? Cause::kAborted : Cause::kTimeout);
    return record;
}

// The kernel stopped at the first peer that differs, when others may not have come yet. Wait for them, so that all
// ranks compare the same headers and name the same rank.
void DeviceBuffer::wait_headers(Operation operation, uint32_t sequence) {
    const Deadline deadline(deadline_s_);
    std::vector<uint64_t> signals(sizes_.num_ranks);
    for (int peer = 0; peer < sizes_.num_ranks;) {
        check_cuda(cudaMemcpy(signals.data(), heap_.segments[sizes_.rank]->data() + layout_.signals_at,
                              signals.size() * sizeof(uint64_t), cudaMemcpyDefault),
                   "cudaMemcpy of the signals");
        const auto seen = static_cast<uint32_t>(signals[peer] >> 32);
        if (static_cast<int32_t>(seen - sequence) >= 0) {
            ++peer;
            continue;
        }
        const bool gone = domain_->peer_is_gone(peer);
        if (gone || deadline.expired()) {
            FaultRecord record;
            record.operation = operation;
            record.sequence = record.expected = sequence;
            record.phase = "wait_published";
            record.cause = gone ? Cause::kPeerDied : Cause::kTimeout;
            record.rank = sizes_.rank;
            record.peer = peer;
            record.seen = seen;
            record.elapsed_s = deadline.elapsed_s();
            record.deadline_s = deadline_s_;
            throw FaultError(record);
        }
        if (interrupt_) interrupt_();
        ::sched_yield();
    }
}

// All ranks see the difference in the same operation: each names the field, and the buffer can go on.
void DeviceBuffer::throw_mismatch() {
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    const auto failed_operation = static_cast<Operation>(status_->operation);
    if (status_->phase == kHopPhase) {
        // Not all ranks of the nodes have seen it yet, so none can go on.
        throw MismatchError(failed_operation, sizes_.rank, "arguments", "those of this node's ranks",
                            "others on node " + std::to_string(status_->peer));
    }
    wait_headers(failed_operation, status_->sequence);
    const int64_t at = layout_.area_at[status_->sequence & 1] + layout_.area.header_at;
    std::vector<Signature> signatures(sizes_.num_ranks);
    for (int rank = 0; rank < sizes_.num_ranks; ++rank) {
        AreaHeader header;
        check_cuda(cudaMemcpy(&header, heap_.segments[rank]->data() + at, sizeof(header), cudaMemcpyDefault),
                   "cudaMemcpy of a header");
        std::copy(std::begin(header.fields), std::end(header.fields), signatures[rank].fields.begin());
    }
    const int peer = status_->peer;
    status_->fault = 0;
    check_cuda(cudaMemset(&control_->failed, 0, sizeof(uint32_t)), "cudaMemset");
    const auto operation = static_cast<Operation>(signatures[0].fields[DispatchFields::kOperation]);
    for (int rank = 1; rank < sizes_.num_ranks; ++rank) {
        if (const auto difference = find_difference(signatures[0], signatures[rank])) {
            throw MismatchError(operation, rank, difference->field, difference->expected, difference->seen);
        }
    }
    throw MismatchError(operation, peer, "arguments", "those of rank 0", "others");
}

}  // namespace ray_deepep
