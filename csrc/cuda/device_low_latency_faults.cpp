// What the host makes of a kernel's report, and the masks: who is left out, and the way back.
#include <time.h>

#include <algorithm>
#include <string>
#include <utility>

#include "common/deadline.h"
#include "cuda/device_low_latency.h"

namespace ray_deepep {
namespace {

constexpr double kPoll_s = 0.001;

template <typename T>
T read_volatile(const T& word) {
    return *const_cast<const volatile T*>(&word);
}
template <typename T>
void write_volatile(T& word, T value) {
    *const_cast<volatile T*>(&word) = value;
}

std::vector<int> ranks_of(uint64_t bits) {
    std::vector<int> ranks;
    for (int rank = 0; rank < kMaxRanks; ++rank) {
        if ((bits >> rank & 1) != 0) ranks.push_back(rank);
    }
    return ranks;
}

std::string field_text(int field, int32_t value) {
    switch (field) {
        case 0: return to_string(static_cast<Operation>(value));
        case 1: return to_string(static_cast<DType>(value));
        case 3: return value == kReduceFast ? "fast" : (value == kReduceExact ? "exact" : "exact, zero_copy");
        default: return std::to_string(value);
    }
}

}  // namespace

void DeviceLowLatency::check() {
    if (!open_) throw ArgumentError("buffer", "closed", "must be open");
    const auto fault = static_cast<LowLatencyFault>(read_volatile(host_->fault));
    if (fault == LowLatencyFault::kNone) return;
    std::atomic_thread_fence(std::memory_order_acquire);
    if (fault == LowLatencyFault::kMismatch) throw_mismatch();
    if (fault == LowLatencyFault::kLeftBehind) {
        throw MaskedError(static_cast<Operation>(host_->operation), ranks_of(host_->left_by));
    }
    throw FaultError(reported());
}

void DeviceLowLatency::check_routing() {
    if (!open_) return;
    if (host_->bad_expert != 0) {
        throw ArgumentError("topk_idx", std::to_string(std::exchange(host_->bad_expert, 0) - 1),
                            "must be in [-1, " + std::to_string(sizes_.num_experts) + ")");
    }
    if (host_->repeated_expert != 0) {
        throw ArgumentError("topk_idx", std::to_string(std::exchange(host_->repeated_expert, 0) - 1),
                            "must not name an expert twice in low-latency calls");
    }
}

std::optional<FaultRecord> DeviceLowLatency::fault_record() const {
    const std::lock_guard<std::mutex> lock(host_mutex_);
    if (host_ == nullptr) return std::nullopt;
    const auto fault = static_cast<LowLatencyFault>(read_volatile(host_->fault));
    if (fault != LowLatencyFault::kTimeout && fault != LowLatencyFault::kGone) return std::nullopt;
    return reported();
}

void DeviceLowLatency::give_up_on_gone_peers() {
    uint64_t gone = 0;
    for (int peer = 0; peer < sizes_.num_ranks; ++peer) {
        if (peer != sizes_.rank && domain_->peer_is_gone(peer)) gone |= uint64_t{1} << peer;
    }
    const std::lock_guard<std::mutex> lock(host_mutex_);
    if (host_ != nullptr && gone != 0) write_volatile(host_->gone, gone);
}

FaultRecord DeviceLowLatency::reported() const {
    std::atomic_thread_fence(std::memory_order_acquire);
    FaultRecord record;
    record.operation = static_cast<Operation>(host_->operation);
    record.sequence = record.expected = host_->sequence;
    record.phase = "wait_published";
    record.rank = sizes_.rank;
    record.peer = host_->peer;
    record.seen = host_->seen;
    record.elapsed_s = static_cast<double>(host_->elapsed_ns) * 1e-9;
    record.deadline_s = deadline_s_;
    const bool stopped = read_volatile(host_->fault) == static_cast<uint32_t>(LowLatencyFault::kGone);
    const bool gone = record.peer != sizes_.rank && domain_->peer_is_gone(record.peer);
    record.cause = gone ? Cause::kPeerDied : (stopped ? Cause::kAborted : Cause::kTimeout);
    return record;
}

// All ranks see the difference in the same operation, which is over: the buffer can go on.
void DeviceLowLatency::throw_mismatch() {
    static const char* const kFields[] = {"operation", "dtype", "num_topk", "reduce"};
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    const uint64_t masked = masked_bits();
    int first = 0;
    while (first < sizes_.rank && (masked >> first & 1) != 0) ++first;
    const int other = host_->peer == first ? sizes_.rank : host_->peer;
    const uint32_t sequence = host_->sequence;
    MailHeader headers[2];
    const int ranks[] = {first, other};
    for (int i = 0; i < 2; ++i) {
        const std::byte* from =
            peers_.segments[sizes_.rank] + layout_.mail_at[sequence % kLowLatencyTurns] + ranks[i] * layout_.mail_bytes;
        check_cuda(cudaMemcpy(&headers[i], from, sizeof(MailHeader), cudaMemcpyDefault), "cudaMemcpy of a header");
    }
    const auto operation = static_cast<Operation>(headers[0].fields[0]);
    host_->fault = 0;
    check_cuda(cudaMemset(&device_->failed, 0, sizeof(uint32_t)), "cudaMemset");
    for (int i = 0; i < 4; ++i) {
        if (headers[0].fields[i] == headers[1].fields[i]) continue;
        throw MismatchError(operation, other, kFields[i], field_text(i, headers[0].fields[i]),
                            field_text(i, headers[1].fields[i]), first);
    }
    throw MismatchError(operation, other, "handle (dispatch number)", std::to_string(headers[0].plan_sequence),
                        std::to_string(headers[1].plan_sequence), first);
}

uint64_t DeviceLowLatency::masked_bits() const {
    return read_volatile(host_->masked_late) | read_volatile(host_->masked_by_host);
}

std::vector<int> DeviceLowLatency::masked() const {
    if (!open_) throw ArgumentError("buffer", "closed", "must be open");
    return ranks_of(masked_bits());
}

// By the ranks that wrote them, from this rank's own segment.
template <typename T>
std::vector<T> DeviceLowLatency::read_own(int64_t offset) const {
    std::vector<T> words(sizes_.num_ranks);
    const std::byte* from = peers_.segments[sizes_.rank] + offset;
    check_cuda(cudaMemcpyAsync(words.data(), from, words.size() * sizeof(T), cudaMemcpyDefault, mask_stream_),
               "cudaMemcpy");
    check_cuda(cudaStreamSynchronize(mask_stream_), "cudaStreamSynchronize");
    return words;
}

LowLatencyDeviceState DeviceLowLatency::read_device() const {
    LowLatencyDeviceState state{};
    check_cuda(cudaMemcpyAsync(&state, device_.get(), sizeof(state), cudaMemcpyDefault, mask_stream_), "cudaMemcpy");
    check_cuda(cudaStreamSynchronize(mask_stream_), "cudaStreamSynchronize");
    return state;
}

void DeviceLowLatency::mask(int rank, bool masked) {
    if (!open_) throw ArgumentError("buffer", "closed", "must be open");
    const uint64_t bit = uint64_t{1} << rank;
    if (masked) {
        // First the word that a kernel which waits looks at.
        write_volatile(host_->masked_by_host, host_->masked_by_host | bit);
        launch_low_latency_mask(peers_, bit, 0, -1, 0, mask_stream_);
        check_cuda(cudaStreamSynchronize(mask_stream_), "cudaStreamSynchronize");
        return;
    }
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    write_volatile(host_->masked_by_host, host_->masked_by_host & ~bit);
    write_volatile(host_->masked_late, host_->masked_late & ~bit);
    const uint64_t admission = uint64_t{++admitted_[rank]} << 32 | read_device().sent;
    launch_low_latency_mask(peers_, 0, bit, rank, admission, mask_stream_);
    check_cuda(cudaStreamSynchronize(mask_stream_), "cudaStreamSynchronize");
}

std::vector<int> DeviceLowLatency::returning() const {
    const std::vector<int> masked_ranks = masked();
    const auto rejoining = read_own<uint32_t>(layout_.rejoining_at);
    std::vector<int> ranks;
    for (const int rank : masked_ranks) {
        if (rejoining[rank] != 0) ranks.push_back(rank);
    }
    return ranks;
}

// Peers that have not let this rank in since it last used an admission, or did so at another operation than the first.
std::vector<int> DeviceLowLatency::not_admitted_by(uint32_t* sequence) const {
    const auto admitted = read_own<uint64_t>(layout_.admitted_at), masks = read_own<uint64_t>(layout_.masks_at);
    const uint64_t masked = masked_bits();
    std::vector<int> waiting;
    bool any = false;
    for (int peer = 0; peer < sizes_.num_ranks; ++peer) {
        if (peer == sizes_.rank || (masked >> peer & 1) != 0) continue;
        const auto at = static_cast<uint32_t>(admitted[peer]);
        const bool fresh = admitted[peer] >> 32 > admissions_[peer] && (masks[peer] >> sizes_.rank & 1) == 0;
        if (fresh && !any) *sequence = at;
        if (!fresh || at != *sequence) waiting.push_back(peer);
        any = any || fresh;
    }
    return waiting;
}

void DeviceLowLatency::rejoin(double deadline_s) {
    if (!open_) throw ArgumentError("buffer", "closed", "must be open");
    const Deadline deadline(deadline_s);
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    LowLatencyDeviceState state = read_device();
    uint32_t sequence = state.received;
    launch_low_latency_rejoin(peers_, 1, state.received, mask_stream_);
    try {
        for (auto waiting = not_admitted_by(&sequence); !waiting.empty(); waiting = not_admitted_by(&sequence)) {
            if (deadline.expired()) throw BootstrapError("rejoin", waiting, deadline_s, "");
            if (interrupt_) interrupt_();
            const timespec pause{0, static_cast<long>(kPoll_s * 1e9)};
            ::nanosleep(&pause, nullptr);
        }
    } catch (...) {
        launch_low_latency_rejoin(peers_, 0, state.received, mask_stream_);
        cudaStreamSynchronize(mask_stream_);
        throw;
    }
    const auto admitted = read_own<uint64_t>(layout_.admitted_at);
    for (int peer = 0; peer < sizes_.num_ranks; ++peer) admissions_[peer] = static_cast<uint32_t>(admitted[peer] >> 32);
    // Peers write nothing of what is cleared here any more, since they let this rank in.
    LowLatencyDeviceState fresh{};
    fresh.masked = state.masked;
    fresh.sent = fresh.received = sequence;
    check_cuda(cudaMemset(peers_.segments[sizes_.rank] + layout_.left_at, 0, kMaxRanks * sizeof(uint32_t)),
               "cudaMemset");
    check_cuda(cudaMemcpy(device_.get(), &fresh, sizeof(fresh), cudaMemcpyDefault), "cudaMemcpy");
    host_->fault = 0;
    launch_low_latency_rejoin(peers_, 0, sequence, mask_stream_);
    check_cuda(cudaStreamSynchronize(mask_stream_), "cudaStreamSynchronize");
}

}  // namespace ray_deepep
