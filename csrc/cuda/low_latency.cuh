// The frame of both low-latency kernels: what a send ends with, what a receive begins and ends with, who is waited for.
#pragma once

#include "cuda/low_latency_params.h"
#include "cuda/peers.cuh"

namespace ray_deepep {

inline constexpr int kLowLatencyThreads = 512;
inline constexpr int kLowLatencyWarps = kLowLatencyThreads / 32;

template <typename T>
__device__ T* in_segment(const LowLatencyPeers& peers, int of, int64_t offset) {
    return reinterpret_cast<T*>(peers.segments[of] + offset);
}
// The mailbox that `source` fills in the segment of `reader`.
__device__ inline std::byte* mailbox(const LowLatencyPeers& peers, int reader, int source, uint32_t sequence) {
    return peers.segments[reader] + peers.layout.mail_at[sequence % kLowLatencyTurns] +
           source * peers.layout.mail_bytes;
}
__device__ inline const MailHeader* mail_header(const LowLatencyPeers& peers, int source, uint32_t sequence) {
    return reinterpret_cast<const MailHeader*>(mailbox(peers, peers.rank, source, sequence));
}
__device__ inline std::byte* area_rows(const LowLatencyPeers& peers, int of, uint32_t sequence) {
    return peers.segments[of] + peers.layout.area_at[sequence % kLowLatencyTurns] + peers.layout.rows_at;
}
__device__ inline float* area_scales(const LowLatencyPeers& peers, int of, uint32_t sequence) {
    return in_segment<float>(peers, of, peers.layout.area_at[sequence % kLowLatencyTurns] + peers.layout.scales_at);
}
__device__ inline uint64_t load_volatile64(const uint64_t* address) {
    return *reinterpret_cast<const volatile uint64_t*>(address);
}
__device__ inline uint64_t bit_of(int rank) { return uint64_t{1} << rank; }

// What every block reads first, in one go.
struct LowLatencyStart {
    uint32_t sequence;
    bool failed;
    uint64_t masked;
};

// Whole block. A kernel that receives only works on the operation that was sent first of those in flight.
__device__ inline LowLatencyStart start_low_latency(const LowLatencyPeers& peers, const LowLatencyStep& step) {
    const uint32_t last = load_volatile(step.sends ? &peers.device->sent : &peers.device->received);
    const uint32_t failed = load_volatile(&peers.device->failed);
    const uint64_t masked = load_volatile64(&peers.device->masked);
    return {last + 1, failed != 0, masked};
}
__device__ inline uint32_t full_signature(const LowLatencyStep& step, uint32_t plan_sequence) {
    return step.signature ^ (plan_sequence * 0x9e3779b1u);
}

__device__ inline uint64_t load_acquire_gpu(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}
__device__ inline void store_release_gpu(uint64_t* address, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Adds 1; what was released to the old value is seen after.
__device__ inline uint32_t add_acquire(uint32_t* address) {
    uint32_t old;
    asm volatile("atom.add.acquire.gpu.global.u32 %0, [%1], 1;" : "=r"(old) : "l"(address) : "memory");
    return old;
}

// Whether this block is the last one of the grid to come here. What all blocks wrote is then visible to it, and to
// whoever sees what it releases to the system.
__device__ inline bool last_block(uint32_t* finished) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence_system();
        last = add_acquire(finished) == gridDim.x - 1;
    }
    __syncthreads();
    return last;
}

// One block, before it sends anything else: what peers compare, and what they need to know.
__device__ inline void write_headers(const LowLatencyPeers& peers, const LowLatencyStep& step,
                                     const LowLatencyStart& start, uint32_t plan_sequence) {
    for (int peer = blockDim.x - 1 - threadIdx.x; peer < peers.num_ranks; peer += blockDim.x) {
        if ((start.masked & bit_of(peer)) != 0) continue;
        auto* header = reinterpret_cast<MailHeader*>(mailbox(peers, peer, peers.rank, start.sequence));
        header->masked = start.masked;
        header->sequence = start.sequence;
        header->signature = full_signature(step, plan_sequence);
        header->num_tokens = step.num_tokens;
        header->plan_sequence = plan_sequence;
        for (int i = 0; i < 4; ++i) header->fields[i] = step.fields[i];
    }
}

// Whole block, when all it sends is written. The last block tells every peer; to those that are masked it says that
// they are left out.
__device__ inline void finish_send(const LowLatencyPeers& peers, const LowLatencyStart& start, uint32_t signature) {
    // Those masked meanwhile too. Read here: after the last block is known, it would be one more trip.
    const uint64_t masked = start.masked | load_volatile64(&peers.device->masked);
    if (!last_block(&peers.device->send_blocks)) return;
    if (!start.failed) {
        for (int peer = threadIdx.x; peer < peers.num_ranks; peer += blockDim.x) {
            if ((masked & bit_of(peer)) != 0) {
                store_release(in_segment<uint32_t>(peers, peer, peers.layout.left_at) + peers.rank, start.sequence);
            } else {
                store_release(in_segment<uint64_t>(peers, peer, peers.layout.signals_at) + peers.rank,
                              uint64_t{signature} << 32 | start.sequence);
            }
        }
        if (threadIdx.x == 0) peers.device->sent = start.sequence;
    }
    if (threadIdx.x == 0) peers.device->send_blocks = 0;
}

__device__ inline void report_fault(const LowLatencyPeers& peers, const LowLatencyStep& step, LowLatencyFault fault,
                                    int peer, uint32_t sequence, uint32_t seen, uint64_t elapsed_ns) {
    if (atomicExch(&peers.device->failed, 1u) != 0u) return;
    LowLatencyHostState* host = peers.host;
    host->operation = step.operation;
    host->sequence = sequence;
    host->peer = peer;
    host->seen = seen;
    host->elapsed_ns = elapsed_ns;
    if (fault == LowLatencyFault::kLeftBehind) {
        const auto* masks = in_segment<uint64_t>(peers, peers.rank, peers.layout.masks_at);
        uint64_t by = bit_of(peer);
        for (int other = 0; other < peers.num_ranks; ++other) {
            if ((load_volatile64(&masks[other]) & bit_of(peers.rank)) != 0) by |= bit_of(other);
        }
        host->left_by = by;
    }
    __threadfence_system();
    *reinterpret_cast<volatile uint32_t*>(&host->fault) = static_cast<uint32_t>(fault);
}

// Do not wait for `peer` any more, and spare the others the wait too.
__device__ inline void give_up(const LowLatencyPeers& peers, int peer) {
    const uint64_t masked =
        atomicOr(reinterpret_cast<unsigned long long*>(&peers.device->masked), bit_of(peer)) | bit_of(peer);
    *reinterpret_cast<volatile uint64_t*>(&peers.host->masked_late) = masked;
    for (int other = 0; other < peers.num_ranks; ++other) {
        store_release(in_segment<uint64_t>(peers, other, peers.layout.masks_at) + peers.rank, masked);
    }
}

enum class Arrival : int { kHere, kAbsent, kFailed };

// One thread's wait for one peer: what the slow path of its loop looks at.
struct PeerWait {
    const LowLatencyPeers& peers;
    const LowLatencyStep& step;
    int peer;
    uint32_t sequence;
    uint64_t absent;  // when the wait began
    uint64_t start_ns;

    __device__ bool given_up_by_others() const {
        const auto* masks = in_segment<uint64_t>(peers, peers.rank, peers.layout.masks_at);
        for (int other = 0; other < peers.num_ranks; ++other) {
            if (other == peers.rank || other == peer || (absent & bit_of(other)) != 0) continue;
            if ((load_volatile64(&masks[other]) & bit_of(peer)) != 0) return true;
        }
        return false;
    }
    // True: stop waiting, with this outcome unless the signal has come by now.
    __device__ bool stop(Arrival* outcome, LowLatencyFault* fault) const {
        *outcome = Arrival::kFailed;
        *fault = LowLatencyFault::kNone;
        if (load_volatile(&peers.device->failed) != 0) return true;
        const uint32_t left = load_acquire(in_segment<uint32_t>(peers, peers.rank, peers.layout.left_at) + peer);
        const auto* masks = in_segment<uint64_t>(peers, peers.rank, peers.layout.masks_at);
        const bool masked = (load_volatile64(&masks[peer]) & bit_of(peers.rank)) != 0;
        if (masked || (left != 0 && static_cast<int32_t>(left - sequence) >= 0)) {
            *fault = LowLatencyFault::kLeftBehind;
            return true;
        }
        if (load_volatile(&peers.host->abort) != 0) {
            *fault = LowLatencyFault::kGone;
            return true;
        }
        *outcome = Arrival::kAbsent;
        if ((load_volatile64(&peers.host->masked_by_host) & bit_of(peer)) != 0) return true;
        if (step.mask_late && given_up_by_others()) return true;
        const bool gone = (load_volatile64(&peers.host->gone) & bit_of(peer)) != 0;
        if (!gone && global_time_ns() - start_ns < step.timeout_ns) return false;
        if (step.mask_late) return true;
        *outcome = Arrival::kFailed;
        *fault = gone ? LowLatencyFault::kGone : LowLatencyFault::kTimeout;
        return true;
    }
    // `signal`: the last one that was seen.
    __device__ Arrival run(uint64_t* signal, uint64_t* waited_ns) const {
        const auto* from = in_segment<uint64_t>(peers, peers.rank, peers.layout.signals_at) + peer;
        const auto here = [&] {
            *signal = load_acquire(from);
            return static_cast<int32_t>(static_cast<uint32_t>(*signal) - sequence) >= 0;
        };
        *waited_ns = 0;
        if (here()) return Arrival::kHere;
        for (uint32_t round = 1;; ++round) {
            Arrival outcome;
            LowLatencyFault fault;
            const bool stopped = round % 64 == 0 && stop(&outcome, &fault);
            // Also after the decision to stop: a peer that ended well signalled before the host could see it gone.
            if (stopped) __threadfence_system();
            const bool came = here();
            if (!came && !stopped) continue;
            *waited_ns = global_time_ns() - start_ns;
            if (came) return Arrival::kHere;
            if (fault != LowLatencyFault::kNone) {
                report_fault(peers, step, fault, peer, sequence, static_cast<uint32_t>(*signal), *waited_ns);
            }
            if (outcome == Arrival::kAbsent) give_up(peers, peer);
            return outcome;
        }
    }
    // What came must be what this rank takes part in. The signal of this very operation says so itself; from a peer
    // that is ahead, the header does.
    __device__ bool agrees(uint64_t signal, uint32_t signature) const {
        if (signal == (uint64_t{signature} << 32 | sequence)) return true;
        const MailHeader* header = mail_header(peers, peer, sequence);
        const uint32_t of = load_volatile(&header->sequence);
        if (of != sequence || (load_volatile64(&header->masked) & bit_of(peers.rank)) != 0) {
            report_fault(peers, step, LowLatencyFault::kLeftBehind, peer, sequence, of, 0);
            return false;
        }
        if (load_volatile(&header->signature) == signature) return true;
        report_fault(peers, step, LowLatencyFault::kMismatch, peer, sequence, of, 0);
        return false;
    }
};

// One warp of one block: wait for all peers, and decide for the whole grid who takes part. Were every block to look for
// itself, two could differ about a rank that comes as the deadline passes.
__device__ inline void decide_arrivals(const LowLatencyPeers& peers, const LowLatencyStep& step,
                                       const LowLatencyStart& start, uint32_t signature) {
    constexpr unsigned kAllLanes = 0xffffffffu;
    constexpr int kPeersOfLane = kMaxRanks / 32;
    const int lane = threadIdx.x % 32;
    const uint32_t sequence = start.sequence, turn = sequence % kLowLatencyTurns;
    const uint64_t start_ns = global_time_ns(), masked = start.masked;
    uint64_t absent = masked, waited_ns[kPeersOfLane] = {};
    bool ok = !start.failed;
#pragma unroll
    for (int i = 0; i < kPeersOfLane; ++i) {
        const int peer = lane + i * 32;
        if (!ok || peer >= peers.num_ranks || (masked & bit_of(peer)) != 0) continue;
        const PeerWait wait{peers, step, peer, sequence, masked, start_ns};
        uint64_t signal = 0;
        const Arrival arrival = wait.run(&signal, &waited_ns[i]);
        if (arrival == Arrival::kAbsent) absent |= bit_of(peer);
        ok = arrival == Arrival::kAbsent || (arrival == Arrival::kHere && wait.agrees(signal, signature));
    }
    ok = __all_sync(kAllLanes, ok) != 0;
    const uint32_t low = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(absent));
    const uint32_t high = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(absent >> 32));
    // What other lanes have seen, lane 0 releases.
    __syncwarp();
    if (lane == 0 && ok) {
        const uint64_t all_absent = uint64_t{high} << 32 | low;
        const bool more = all_absent != masked;
        if (more) *reinterpret_cast<volatile uint64_t*>(&peers.device->absent[turn]) = all_absent;
        store_release_gpu(&peers.device->decided[turn], uint64_t{sequence} << 1 | (more ? 1 : 0));
    }
    // A rank does not wait for itself: its other blocks only have not finished.
#pragma unroll
    for (int i = 0; i < kPeersOfLane; ++i) {
        const int peer = lane + i * 32;
        if (waited_ns[i] != 0 && peer != peers.rank) step.wait_ns[peer] += static_cast<int64_t>(waited_ns[i]);
    }
}

struct Arrivals {
    uint64_t absent;
    bool ok;
};

// Whole block. After it, what all ranks that are not absent have sent is visible.
__device__ inline Arrivals await_arrivals(const LowLatencyPeers& peers, const LowLatencyStep& step,
                                          const LowLatencyStart& start, uint32_t signature) {
    __shared__ Arrivals found;
    const uint32_t sequence = start.sequence, turn = sequence % kLowLatencyTurns;
    if (blockIdx.x == 0 && threadIdx.x < 32) decide_arrivals(peers, step, start, signature);
    if (threadIdx.x == 0) {
        constexpr uint64_t kGrace_ns = 1'000'000'000;
        const uint64_t start_ns = global_time_ns();
        found = {start.masked, false};
        for (uint32_t round = 1;; ++round) {
            const uint64_t decided = load_acquire_gpu(&peers.device->decided[turn]);
            found.ok = decided >> 1 == sequence;
            if (found.ok && (decided & 1) != 0) found.absent = load_volatile64(&peers.device->absent[turn]);
            if (found.ok) break;
            if (round % 16 != 0) continue;
            if (load_volatile(&peers.device->failed) != 0) break;
            const uint64_t elapsed = global_time_ns() - start_ns;
            if (elapsed < step.timeout_ns + kGrace_ns) continue;
            // The block that looks does not run: more blocks were launched than fit the GPU.
            report_fault(peers, step, LowLatencyFault::kTimeout, peers.rank, sequence, 0, elapsed);
        }
    }
    __syncthreads();
    return found;
}

// Whole block, last thing in a receive. Peers that masked this rank did not wait for its reads: had they begun to
// overwrite what it read? Each block asks after its own reads, beside counting itself finished. Rows that were read in
// place may be overwritten as soon as the next operation was.
__device__ inline void finish_receive(const LowLatencyPeers& peers, const LowLatencyStep& step,
                                      const LowLatencyStart& start, const Arrivals& arrivals) {
    const uint32_t sequence = start.sequence, sent = threadIdx.x == 0 ? load_volatile(&peers.device->sent) : 0;
    const int allowed = step.in_place ? 1 : kLowLatencyTurns - 1;
    __syncthreads();
    for (int peer = blockDim.x - 1 - threadIdx.x; arrivals.ok && peer < peers.num_ranks; peer += blockDim.x) {
        if ((arrivals.absent & bit_of(peer)) != 0) continue;
        const uint32_t left = load_acquire(in_segment<uint32_t>(peers, peers.rank, peers.layout.left_at) + peer);
        if (left == 0 || static_cast<int32_t>(left - sequence) < allowed) continue;
        report_fault(peers, step, LowLatencyFault::kLeftBehind, peer, sequence, left, 0);
    }
    if (threadIdx.x != 0 || add_acquire(&peers.device->receive_blocks) != gridDim.x - 1) return;
    peers.device->receive_blocks = 0;
    // What this launch sent itself may not have been noted yet when this block looked.
    const bool was_sent = step.sends ? !start.failed : static_cast<int32_t>(sent - sequence) >= 0;
    if (was_sent) peers.device->received = sequence;
}

// By the block that `chosen` says.
__device__ inline void write_absent(const LowLatencyPeers& peers, const LowLatencyStep& step, uint64_t absent,
                                    bool chosen) {
    for (int rank = threadIdx.x; chosen && rank < peers.num_ranks; rank += blockDim.x) {
        step.absent[rank] = (absent & bit_of(rank)) != 0;
    }
}

}  // namespace ray_deepep
