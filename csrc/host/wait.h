// Signals with deadlines: raise one's own, wait for those of all peers, and name the cause when a wait ends badly.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/fault.h"
#include "common/interrupt.h"
#include "heap/domain.h"
#include "host/control.h"

namespace ray_deepep {

class Signals {
  public:
    // Faults go to `fault_slot` before they are thrown.
    Signals(const Domain* domain, std::vector<ControlBlock*> blocks, FaultSlot* fault_slot, Interrupt interrupt);

    // Tell all peers that operation `sequence` of this rank is published.
    void raise(uint32_t sequence);
    // Wait until every peer published `sequence`. Throws FaultError; this rank is then failed and its peers know why.
    void wait_published(uint32_t sequence, Operation operation, double deadline_s);
    // Tell all peers that this rank has pulled what it needs of operation `sequence`.
    void finish(uint32_t sequence, bool wake);
    // Wait until every peer has finished `sequence`; as wait_published.
    void wait_finished(uint32_t sequence, Operation operation, double deadline_s);
    // Wait until `peer` published `sequence`. Nothing if it did; otherwise why it will not, and who is to blame. This
    // rank then still shows whom it waits for: `fail`, or go on after `stop_waiting`. `give_up` is asked every few
    // milliseconds; true ends the wait as a time-out.
    std::optional<FaultRecord> await_peer(int peer, uint32_t sequence, Operation operation, const Deadline& deadline,
                                          const std::function<bool()>& give_up = {});
    void stop_waiting() { own_->waiting_for.store(-1, std::memory_order_release); }
    // This rank is failed from now on, and its peers know why.
    [[noreturn]] void fail(FaultRecord record);
    // Say that this rank leaves; peers that wait for it learn so at once.
    void close();

  private:
    using Signal = std::atomic<uint32_t> ControlBlock::*;
    void wait_for_all(Signal signal, uint32_t sequence, Operation operation, double deadline_s);
    std::optional<FaultRecord> await_signal(int peer, Signal which, uint32_t sequence, Operation operation,
                                            const Deadline& deadline, const std::function<bool()>& give_up);
    void leave(RankState state, int blamed_peer, Cause cause);
    bool will_not_come(int peer, Signal signal, FaultRecord* record) const;
    int follow_waits(int peer) const;

    const Domain* domain_;
    std::vector<ControlBlock*> blocks_;
    ControlBlock* own_;
    FaultSlot* fault_slot_;
    Interrupt interrupt_;
};

}  // namespace ray_deepep
