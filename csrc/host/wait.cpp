#include "host/wait.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>
#include <utility>

namespace ray_deepep {
namespace {

constexpr int kSpins = 200;         // about 10 us: a peer that runs beside us is met here
constexpr int kYields = 20;         // ranks that share cores let each other run before sleeping
constexpr double kSleep_s = 0.005;  // longest sleep: a peer may end without waking us
constexpr double kInterruptEvery_s = 0.1;

void futex_wait(const std::atomic<uint32_t>* word, uint32_t value, double seconds) {
    timespec timeout{static_cast<time_t>(seconds), static_cast<long>((seconds - static_cast<time_t>(seconds)) * 1e9)};
    ::syscall(SYS_futex, reinterpret_cast<const uint32_t*>(word), FUTEX_WAIT, value, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>* word) {
    ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Sequence numbers wrap around.
bool reached(uint32_t seen, uint32_t wanted) { return static_cast<int32_t>(seen - wanted) >= 0; }

void cpu_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

Signals::Signals(const Domain* domain, std::vector<ControlBlock*> blocks, FaultSlot* fault_slot, Interrupt interrupt)
    : domain_(domain),
      blocks_(std::move(blocks)),
      own_(blocks_[domain->rank()]),
      fault_slot_(fault_slot),
      interrupt_(std::move(interrupt)) {
    own_->waiting_for.store(-1, std::memory_order_relaxed);
    own_->blamed_peer.store(-1, std::memory_order_relaxed);
}

void Signals::raise(uint32_t sequence) {
    own_->published.store(sequence, std::memory_order_release);
    futex_wake_all(&own_->published);
}

void Signals::wait_published(uint32_t sequence, Operation operation, double deadline_s) {
    wait_for_all(&ControlBlock::published, sequence, operation, deadline_s);
}

void Signals::finish(uint32_t sequence, bool wake) {
    own_->finished.store(sequence, std::memory_order_release);
    if (wake) futex_wake_all(&own_->finished);
}

void Signals::wait_finished(uint32_t sequence, Operation operation, double deadline_s) {
    wait_for_all(&ControlBlock::finished, sequence, operation, deadline_s);
}

void Signals::wait_for_all(Signal signal, uint32_t sequence, Operation operation, double deadline_s) {
    const Deadline deadline(deadline_s);
    for (int peer = 0; peer < domain_->num_ranks(); ++peer) {
        if (const auto lost = await_signal(peer, signal, sequence, operation, deadline, {})) fail(*lost);
    }
}

std::optional<FaultRecord> Signals::await_peer(int peer, uint32_t sequence, Operation operation,
                                               const Deadline& deadline, const std::function<bool()>& give_up) {
    return await_signal(peer, &ControlBlock::published, sequence, operation, deadline, give_up);
}

std::optional<FaultRecord> Signals::await_signal(int peer, Signal which, uint32_t sequence, Operation operation,
                                                 const Deadline& deadline, const std::function<bool()>& give_up) {
    const auto& signal = blocks_[peer]->*which;
    const bool finished = which == &ControlBlock::finished;
    if (reached(signal.load(std::memory_order_acquire), sequence)) return std::nullopt;
    own_->waiting_sequence.store(sequence, std::memory_order_relaxed);
    own_->waiting_finished.store(finished, std::memory_order_relaxed);
    own_->waiting_for.store(peer, std::memory_order_release);
    double next_interrupt_s = kInterruptEvery_s;
    for (int round = 0;; ++round) {
        const uint32_t seen = signal.load(std::memory_order_acquire);
        if (reached(seen, sequence)) break;
        if (round < kSpins) {
            cpu_pause();
            continue;
        }
        if (round < kSpins + kYields) {
            ::sched_yield();
            continue;
        }
        FaultRecord record;
        record.operation = operation;
        record.sequence = sequence;
        record.phase = finished ? "wait_finished" : "wait_published";
        record.rank = domain_->rank();
        record.peer = peer;
        record.expected = sequence;
        record.seen = seen;
        record.elapsed_s = deadline.elapsed_s();
        record.deadline_s = deadline.limit_s();
        if (will_not_come(peer, which, &record)) return record;
        if (deadline.expired() || (give_up && give_up())) {
            record.peer = follow_waits(peer);
            record.cause = Cause::kTimeout;
            return record;
        }
        if (interrupt_ && deadline.elapsed_s() >= next_interrupt_s) {
            next_interrupt_s = deadline.elapsed_s() + kInterruptEvery_s;
            try {
                interrupt_();
            } catch (...) {
                leave(RankState::kFailed, domain_->rank(), Cause::kAborted);
                throw;
            }
        }
        futex_wait(&signal, seen, std::min(kSleep_s, deadline.remaining_s() + 1e-4));
    }
    stop_waiting();
    return std::nullopt;
}

// Whether the peer failed, closed, or its process ended; `record` then names the cause.
bool Signals::will_not_come(int peer, Signal signal, FaultRecord* record) const {
    // Liveness first: whatever the peer wrote before it ended is then visible below.
    const bool gone = domain_->peer_is_gone(peer);
    const ControlBlock& block = *blocks_[peer];
    const RankState state = block.state.load(std::memory_order_acquire);
    // It may have raised it between our look at the signal and its end.
    if (reached((block.*signal).load(std::memory_order_acquire), record->expected)) return false;
    if (state == RankState::kFailed) {
        const int blamed = block.blamed_peer.load(std::memory_order_relaxed);
        record->peer = blamed >= 0 ? blamed : peer;
        record->cause = block.blamed_cause.load(std::memory_order_relaxed);
    } else if (state == RankState::kClosed) {
        record->cause = Cause::kPeerClosed;
    } else if (gone) {
        record->cause = Cause::kPeerDied;
    }
    return record->cause != Cause::kNone;
}

void Signals::fail(FaultRecord record) {
    fault_slot_->set(record);
    leave(RankState::kFailed, record.peer, record.cause);
    throw FaultError(std::move(record));
}

void Signals::close() {
    if (own_->state.load(std::memory_order_relaxed) == RankState::kReady) {
        leave(RankState::kClosed, domain_->rank(), Cause::kPeerClosed);
    }
}

void Signals::leave(RankState state, int blamed_peer, Cause cause) {
    own_->blamed_peer.store(blamed_peer, std::memory_order_relaxed);
    own_->blamed_cause.store(cause, std::memory_order_relaxed);
    own_->state.store(state, std::memory_order_release);
    // Peers that sleep on our signals look at our state when they wake.
    futex_wake_all(&own_->published);
    futex_wake_all(&own_->finished);
}

// A peer that itself waits for another is a victim: follow the chain to a rank that waits for nobody. A wait whose
// signal has long come does not count: that rank was stopped in it.
int Signals::follow_waits(int peer) const {
    for (int step = 0; step < domain_->num_ranks(); ++step) {
        const int next = blocks_[peer]->waiting_for.load(std::memory_order_acquire);
        if (next < 0 || next >= domain_->num_ranks() || next == domain_->rank()) return peer;
        const uint32_t wanted = blocks_[peer]->waiting_sequence.load(std::memory_order_relaxed);
        const bool finished = blocks_[peer]->waiting_finished.load(std::memory_order_relaxed) != 0;
        const auto& signal = finished ? blocks_[next]->finished : blocks_[next]->published;
        if (reached(signal.load(std::memory_order_acquire), wanted)) return peer;
        peer = next;
    }
    return peer;
}

}  // namespace ray_deepep
