// What low-latency operations share: areas, signals, who is masked, agreement.
#include "host/low_latency.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "host/traffic.h"

namespace ray_deepep {
namespace {

constexpr double kPoll_s = 0.001;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// As the CUDA core says it.
const char* reduce_text(const LowLatencyHeader& header) {
    if (header.reduce == Reduce::kFast) return "fast";
    return header.rows_at >= 0 ? "exact, zero_copy" : "exact";
}

int64_t control_bytes(int num_ranks) {
    return kPage + round_up(static_cast<int64_t>(sizeof(LowLatencyControl)) +
                                num_ranks * static_cast<int64_t>(sizeof(PeerView)),
                            kPage);
}

}  // namespace

LowLatencyAreaMap LowLatencySizes::area(int num_ranks) const {
    LowLatencyAreaMap map{};
    const int64_t routes = max_tokens * num_topk;
    map.masked_at = round_up(sizeof(LowLatencyHeader), 64);
    map.topk_idx_at = round_up(map.masked_at + num_ranks, 64);
    map.topk_weights_at = round_up(map.topk_idx_at + routes * 4, 64);
    map.scales_at = round_up(map.topk_weights_at + routes * 4, 64);
    map.rows_at = round_up(map.scales_at + max_tokens * (hidden / kScaleBlock) * 4, kPage);
    // The largest: a combine that sends every route, in float32.
    map.bytes = round_up(map.rows_at + num_ranks * routes * hidden * 4, kPage);
    return map;
}

int64_t LowLatencySizes::segment_bytes(int num_ranks) const {
    return control_bytes(num_ranks) + kLowLatencyAreas * area(num_ranks).bytes;
}

LowLatencyBuffer::LowLatencyBuffer(std::shared_ptr<Domain> domain, const LowLatencySizes& sizes,
                                   HostBuffer::SymmRegion symm, double bootstrap_deadline_s, int num_threads,
                                   Interrupt interrupt)
    : domain_(std::move(domain)),
      geometry_{domain_->rank(), domain_->num_ranks(), sizes.num_experts},
      sizes_(sizes),
      symm_(std::move(symm)),
      map_(sizes.area(geometry_.num_ranks)),
      control_bytes_(control_bytes(geometry_.num_ranks)),
      interrupt_(std::move(interrupt)),
      admissions_(geometry_.num_ranks, 0),
      threads_(num_threads) {
    const int64_t bytes = sizes.segment_bytes(geometry_.num_ranks);
    if (bytes > sizes.max_segment_bytes) {
        throw ArgumentError("heap_gib", std::to_string(static_cast<double>(sizes.max_segment_bytes) / (1 << 30)),
                            "must be at least " + std::to_string(static_cast<double>(bytes) / (1 << 30)) +
                                " for low-latency calls of this size (RAY_DEEPEP_HEAP_GIB)");
    }
    const AgreedSizes agreed{{"num_experts", "hidden", "num_topk", "low_latency_max_tokens"},
                             {static_cast<uint64_t>(sizes.num_experts), static_cast<uint64_t>(sizes.hidden),
                              static_cast<uint64_t>(sizes.num_topk), static_cast<uint64_t>(sizes.max_tokens)}};
    heap_ = allocate_shared_heap(*domain_, bytes, agreed, bootstrap_deadline_s);
    std::vector<ControlBlock*> blocks;
    for (const Segment& segment : heap_.segments) blocks.push_back(reinterpret_cast<ControlBlock*>(segment.data()));
    signals_ = std::make_unique<Signals>(domain_.get(), std::move(blocks), &fault_slot_, interrupt_);
}

void LowLatencyBuffer::close() {
    if (signals_ == nullptr) return;
    signals_->close();
    signals_.reset();
    heap_.segments.clear();
    symm_ = {};
}

std::byte* LowLatencyBuffer::area(int rank, uint32_t sequence) const {
    return heap_.segments[rank].data() + control_bytes_ + sequence % kLowLatencyAreas * map_.bytes;
}

LowLatencyControl& LowLatencyBuffer::control(int rank) const {
    return *reinterpret_cast<LowLatencyControl*>(heap_.segments[rank].data() + kPage);
}

PeerView& LowLatencyBuffer::view(int rank, int of) const { return reinterpret_cast<PeerView*>(&control(rank) + 1)[of]; }

void LowLatencyBuffer::check_open() const {
    if (signals_ == nullptr) throw ArgumentError("buffer", "closed", "must be open");
}

// The next operation, its area marked as being written. What the caller writes there comes before `publish`.
std::shared_ptr<LowLatencyCall> LowLatencyBuffer::begin(Operation operation) {
    check_open();
    auto call = std::make_shared<LowLatencyCall>();
    call->operation = operation;
    call->absent.resize(geometry_.num_ranks);
    for (int peer = 0; peer < geometry_.num_ranks; ++peer) call->absent[peer] = is_masked(peer) ? 1 : 0;
    call->sequence = sequence_ + 1;
    check_not_left(*call, call->absent, Step::kSend);
    sequence_ = call->sequence;
    control(geometry_.rank).begun.store(sequence_, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    LowLatencyHeader& own = header(geometry_.rank, sequence_);
    own = LowLatencyHeader{};
    own.rows_at = -1;
    own.operation = operation;
    own.sequence = sequence_;
    std::memcpy(at<uint8_t>(geometry_.rank, sequence_, map_.masked_at), call->absent.data(), call->absent.size());
    return call;
}

void LowLatencyBuffer::publish(const LowLatencyCall& call) {
    header(geometry_.rank, call.sequence).sent_ns = now_ns();
    signals_->raise(call.sequence);
}

// Wait for all ranks that take part. Returns which do not.
std::vector<uint8_t> LowLatencyBuffer::arrive(const LowLatencyCall& call, const LowLatencyWait& wait) {
    check_open();
    const int64_t start_ns = now_ns();
    const Deadline deadline(wait.timeout_s);
    auto* wait_ns = reinterpret_cast<int64_t*>(wait.wait_ns);
    std::vector<uint8_t> absent = call.absent;
    for (int peer = 0; peer < geometry_.num_ranks; ++peer) {
        if (is_masked(peer)) absent[peer] = 1;
        if (absent[peer] != 0 || await_or_mask(peer, call, wait, deadline, absent)) continue;
        absent[peer] = 1;
        wait_ns[peer] += now_ns() - start_ns;
    }
    check_not_left(call, absent, Step::kPull);
    check_agreement(call, absent);
    for (int peer = 0; peer < geometry_.num_ranks; ++peer) {
        // By the sender's clock: ranks are waited for one after the other, and that is not their fault.
        if (absent[peer] == 0) {
            wait_ns[peer] += std::max<int64_t>(0, header(peer, call.sequence).sent_ns - start_ns);
        }
    }
    return absent;
}

// False if the peer did not come and is masked now.
bool LowLatencyBuffer::await_or_mask(int peer, const LowLatencyCall& call, const LowLatencyWait& wait,
                                     const Deadline& deadline, const std::vector<uint8_t>& absent) {
    const auto give_up = [&] { return given_up(peer, wait, absent); };
    const auto lost = signals_->await_peer(peer, call.sequence, call.operation, deadline, give_up);
    if (!lost) return true;
    if (!wait.mask_late && !is_masked(peer)) signals_->fail(*lost);
    signals_->stop_waiting();
    mask(peer, true);
    return false;
}

// By hand, from another thread; or by a peer: whoever gave a rank up spares the others the wait, else they would be
// late themselves, one after the other.
bool LowLatencyBuffer::given_up(int peer, const LowLatencyWait& wait, const std::vector<uint8_t>& absent) const {
    if (is_masked(peer)) return true;
    if (!wait.mask_late) return false;
    for (int other = 0; other < geometry_.num_ranks; ++other) {
        if (other == geometry_.rank || other == peer || absent[other] != 0) continue;
        if (view(other, peer).masked.load(std::memory_order_acquire) != 0) return true;
    }
    return false;
}

// Throw if a peer went on without this rank. Before a send: it has masked this rank. Before a pull: it had when it
// sent. Always: it is so far ahead that what it sent is no longer there. An operation that came whole is good, also if
// a peer masked this rank since; but nobody can tell whether it did where rows were read in place, which the peer's
// caller may have overwritten after its next operation.
void LowLatencyBuffer::check_not_left(const LowLatencyCall& call, const std::vector<uint8_t>& absent, Step step) const {
    std::atomic_thread_fence(std::memory_order_acquire);
    const bool any_mask = step == Step::kSend || step == Step::kPulledInPlace;
    std::vector<int> by;
    for (int peer = 0; peer < geometry_.num_ranks; ++peer) {
        if (absent[peer] != 0 || peer == geometry_.rank) continue;
        const auto ahead = static_cast<int32_t>(control(peer).begun.load(std::memory_order_relaxed) - call.sequence);
        bool left = ahead >= kLowLatencyAreas;
        if (any_mask) left |= view(peer, geometry_.rank).masked.load(std::memory_order_relaxed) != 0;
        if (step == Step::kPull) {
            left |= header(peer, call.sequence).sequence != call.sequence ||
                    at<uint8_t>(peer, call.sequence, map_.masked_at)[geometry_.rank] != 0;
        }
        if (left) by.push_back(peer);
    }
    if (!by.empty()) throw MaskedError(call.operation, std::move(by));
}

void LowLatencyBuffer::check_agreement(const LowLatencyCall& call, const std::vector<uint8_t>& absent) const {
    const auto present = std::find(absent.begin(), absent.end(), 0);
    const int first_rank = static_cast<int>(present - absent.begin());
    const LowLatencyHeader& first = header(first_rank, call.sequence);
    for (int rank = first_rank + 1; rank < geometry_.num_ranks; ++rank) {
        if (absent[rank] != 0) continue;
        const LowLatencyHeader& other = header(rank, call.sequence);
        const auto differ = [&](const char* field, const std::string& expected, const std::string& seen) {
            if (expected != seen) throw MismatchError(first.operation, rank, field, expected, seen, first_rank);
        };
        differ("operation", to_string(first.operation), to_string(other.operation));
        differ("dtype", to_string(first.dtype), to_string(other.dtype));
        differ("num_topk", std::to_string(first.num_topk), std::to_string(other.num_topk));
        differ("handle (dispatch number)", std::to_string(first.plan_sequence), std::to_string(other.plan_sequence));
        differ("reduce", reduce_text(first), reduce_text(other));
    }
}

void LowLatencyBuffer::mask(int rank, bool masked) {
    check_open();
    PeerView& own = view(geometry_.rank, rank);
    if (!masked) {
        const uint64_t times = (own.admitted.load(std::memory_order_relaxed) >> 32) + 1;
        own.admitted.store(times << 32 | sequence_, std::memory_order_release);
    }
    own.masked.store(masked ? 1 : 0, std::memory_order_release);
}

std::vector<int> LowLatencyBuffer::masked() const {
    check_open();
    std::vector<int> ranks;
    for (int rank = 0; rank < geometry_.num_ranks; ++rank) {
        if (is_masked(rank)) ranks.push_back(rank);
    }
    return ranks;
}

std::vector<int> LowLatencyBuffer::returning() const {
    check_open();
    std::vector<int> ranks;
    for (const int rank : masked()) {
        if (control(rank).rejoining.load(std::memory_order_acquire) != 0) ranks.push_back(rank);
    }
    return ranks;
}

// Peers that have not let this rank in since it last used an admission, or did so at another operation than the first.
std::vector<int> LowLatencyBuffer::not_admitted_by(uint32_t* sequence) const {
    std::vector<int> waiting;
    bool any = false;
    for (int peer = 0; peer < geometry_.num_ranks; ++peer) {
        if (peer == geometry_.rank || is_masked(peer)) continue;
        const uint64_t admitted = view(peer, geometry_.rank).admitted.load(std::memory_order_acquire);
        const auto at = static_cast<uint32_t>(admitted);
        // A peer writes its admission first and takes its mask away after.
        const bool fresh = admitted >> 32 > admissions_[peer] &&
                           view(peer, geometry_.rank).masked.load(std::memory_order_acquire) == 0;
        if (fresh && !any) *sequence = at;
        if (!fresh || at != *sequence) waiting.push_back(peer);
        any = any || fresh;
    }
    return waiting;
}

void LowLatencyBuffer::rejoin(double deadline_s) {
    check_open();
    const Deadline deadline(deadline_s);
    LowLatencyControl& own = control(geometry_.rank);
    own.rejoining.store(1, std::memory_order_release);
    uint32_t sequence = sequence_;
    try {
        for (std::vector<int> waiting = not_admitted_by(&sequence); !waiting.empty();
             waiting = not_admitted_by(&sequence)) {
            if (deadline.expired()) throw BootstrapError("rejoin", waiting, deadline_s, "");
            if (interrupt_) interrupt_();
            const timespec pause{0, static_cast<long>(kPoll_s * 1e9)};
            ::nanosleep(&pause, nullptr);
        }
    } catch (...) {
        own.rejoining.store(0, std::memory_order_release);
        throw;
    }
    for (int peer = 0; peer < geometry_.num_ranks; ++peer) {
        const uint64_t admitted = view(peer, geometry_.rank).admitted.load(std::memory_order_acquire);
        admissions_[peer] = static_cast<uint32_t>(admitted >> 32);
    }
    sequence_ = sequence;
    signals_->raise(sequence);
    own.begun.store(sequence, std::memory_order_relaxed);
    own.rejoining.store(0, std::memory_order_release);
}

}  // namespace ray_deepep
