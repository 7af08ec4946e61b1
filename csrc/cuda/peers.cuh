// What every kernel knows: the segments of all ranks, this rank's control words, and where to report a fault. Signals
// are written into the reader's own memory, so a wait polls locally.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/segment_layout.h"

namespace ray_deepep {

// What a rank has counted since its buffer was made, by rank; see host/traffic.h.
struct DeviceTraffic {
    unsigned long long wait_ns[kMaxRanks];
    unsigned long long recv_bytes[kMaxRanks];
};

// In this rank's device memory. Sequence numbers live here rather than in launch arguments, so that a captured graph
// can be replayed.
struct DeviceControl {
    uint32_t sequence;        // of the last published operation
    uint32_t publish_blocks;  // finished blocks of the publishing kernel in flight
    uint32_t main_blocks;     // finished blocks of the row-moving kernel in flight
    uint32_t next_token;      // of a combine in flight
    uint32_t published;       // the row-moving kernel in flight has published its operation itself
    uint32_t failed;          // set once; kernels then return at once
    DeviceTraffic traffic;
};

inline constexpr uint64_t kLocationSeen = uint64_t{1} << 32;

// In pinned host memory: what the host reads without a CUDA call.
struct HostStatus {
    uint32_t fault;  // 0, or 1: timeout, 2: aborted, 3: arguments differ
    uint32_t operation;
    uint32_t sequence;
    int32_t peer;
    uint32_t expected;
    uint32_t seen;
    uint64_t elapsed_ns;
    uint32_t phase;         // 0: published, 1: rows staged, 2: reading done, 3: come from another node (`peer`)
    uint32_t abort;         // written by the host: end all waits
    uint32_t counts_ready;  // ticket of the dispatch whose counts are below
    int32_t num_recv_tokens;
    int32_t num_rows;
    uint32_t overflow;      // 1 + a rank on which the dispatch does not fit the buffer; 0: it fits
    int32_t overflow_rows;  // that it needs there
    int32_t bad_expert;     // 1 + an expert id out of range that was seen; 0: none. Its route is dropped.
    uint64_t bad_location;  // kLocationSeen | a location out of range that was seen; 0: none. Its route is dropped.
    DeviceTraffic traffic;  // a copy, for threads that ask at any time
    // int32 expert_count[L] and expert_offset[L + 1] follow
};

#ifdef __CUDACC__
#define RAY_DEEPEP_DEVICE __device__
#else
#define RAY_DEEPEP_DEVICE
#endif

struct Peers {
    std::byte* segments[kMaxRanks];
    SegmentLayout layout;
    DeviceControl* control;
    HostStatus* status;
    uint64_t deadline_ns;
    int rank, num_ranks, num_experts, num_local_experts;

    // Sources in the order of their rows: by part, then rank.
    RAY_DEEPEP_DEVICE int num_sources() const { return layout.num_parts * num_ranks; }
    RAY_DEEPEP_DEVICE int source(int chunk, int of_rank) const {
        return chunk / layout.part_chunks * num_ranks + of_rank;
    }
    RAY_DEEPEP_DEVICE std::byte* area(int peer, uint32_t sequence) const {
        return segments[peer] + layout.area_at[sequence & 1];
    }
    template <typename T>
    RAY_DEEPEP_DEVICE T* in_area(int peer, uint32_t sequence, int64_t offset) const {
        return reinterpret_cast<T*>(area(peer, sequence) + offset);
    }
    RAY_DEEPEP_DEVICE AreaHeader* header(int peer, uint32_t sequence) const {
        return in_area<AreaHeader>(peer, sequence, layout.area.header_at);
    }
    // The flag in the memory of `reader` about a piece of rows of `source`.
    RAY_DEEPEP_DEVICE uint32_t* ready_flag(int reader, int source, int64_t piece) const {
        const int64_t flag = source * layout.num_ready_flags + piece;
        return reinterpret_cast<uint32_t*>(segments[reader] + layout.ready_at + flag * kReadyFlagBytes);
    }
};

#ifdef __CUDACC__

__device__ inline uint64_t global_time_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

__device__ inline uint64_t load_acquire(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ inline uint32_t load_acquire(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ inline void store_release(uint64_t* address, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ inline void store_release(uint32_t* address, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ inline uint32_t load_volatile(const uint32_t* address) {
    return *reinterpret_cast<const volatile uint32_t*>(address);
}

// Bulk copies read and write through a proxy of their own: what was seen or written before this is seen by them after.
__device__ inline void fence_bulk_copies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

enum class Phase : uint32_t { kPublished = 0, kStaged = 1, kDone = 2, kHop = 3 };

// Whom a wait is for, and in which operation; for the report.
struct WaitFor {
    Phase phase;
    uint32_t operation;
    int peer;
    uint32_t sequence;
};

// First fault wins; the host reads the fields after the flag. `peers`: Peers, or a kernel's own struct that has their
// control, status and deadline_ns.
template <typename P>
__device__ void report_fault(const P& peers, uint32_t fault, const WaitFor& wait, uint32_t seen, uint64_t elapsed_ns) {
    if (atomicExch(&peers.control->failed, 1u) != 0u) return;
    HostStatus* status = peers.status;
    status->operation = wait.operation;
    status->sequence = wait.sequence;
    status->peer = wait.peer;
    status->expected = wait.sequence;
    status->seen = seen;
    status->elapsed_ns = elapsed_ns;
    status->phase = static_cast<uint32_t>(wait.phase);
    __threadfence_system();
    *reinterpret_cast<volatile uint32_t*>(&status->fault) = fault;
}

// Poll until load() has reached the sequence number; false, and a report, if it does not within the deadline.
template <typename P, typename Load>
__device__ bool poll(const P& peers, const WaitFor& wait, Load load) {
    const uint64_t start = global_time_ns();
    for (uint32_t round = 1;; ++round) {
        const uint32_t seen = load();
        if (static_cast<int32_t>(seen - wait.sequence) >= 0) return true;
        if ((round & 255) != 0) continue;
        if (load_volatile(&peers.control->failed) != 0) return false;
        const uint64_t elapsed = global_time_ns() - start;
        const bool aborted = load_volatile(&peers.status->abort) != 0;
        if (elapsed < peers.deadline_ns && !aborted) continue;
        // A peer that ended well raised its signal before the host could see it gone: look once more.
        __threadfence_system();
        const uint32_t last = load();
        if (static_cast<int32_t>(last - wait.sequence) >= 0) return true;
        report_fault(peers, aborted ? 2 : 1, wait, last, elapsed);
        return false;
    }
}

// `count`: whether the time is to be counted that a peer let this rank wait.
__device__ inline bool wait_for_signal(const Peers& peers, uint32_t operation, int peer, uint32_t sequence,
                                       uint32_t signature, bool count) {
    const auto* signal = reinterpret_cast<const uint64_t*>(peers.segments[peers.rank] + peers.layout.signals_at) + peer;
    const WaitFor wait{Phase::kPublished, operation, peer, sequence};
    const uint64_t begin = count ? global_time_ns() : 0;
    uint64_t value = 0, waited_ns = 0;
    uint32_t looks = 0;
    const auto load = [&] {
        value = load_acquire(signal);
        // Taken here: lanes with other peers leave the loop together with the last.
        if (count && looks++ > 0 && waited_ns == 0 && static_cast<int32_t>((value >> 32) - sequence) >= 0) {
            waited_ns = global_time_ns() - begin;
        }
        return static_cast<uint32_t>(value >> 32);
    };
    if (!poll(peers, wait, load)) return false;
    if (waited_ns > 0) atomicAdd(&peers.control->traffic.wait_ns[peer], static_cast<unsigned long long>(waited_ns));
    // A peer that is ahead has agreed already, and its signature belongs to a later operation.
    const uint32_t seen = static_cast<uint32_t>(value >> 32);
    if (seen != sequence || static_cast<uint32_t>(value) == signature) return true;
    report_fault(peers, 3, wait, seen, 0);
    return false;
}

// One warp: wait until all peers have published. What they wrote before is visible to this warp afterwards.
__device__ inline bool wait_for_peers_warp(const Peers& peers, uint32_t operation, uint32_t sequence,
                                           uint32_t signature, bool count) {
    // Not waited for before the signals are: a wait sees by itself, if a little later, that there is no use in it.
    const uint32_t failed = load_volatile(&peers.control->failed);
    bool ok = true;
    for (int peer = threadIdx.x % 32; ok && peer < peers.num_ranks; peer += 32) {
        ok = wait_for_signal(peers, operation, peer, sequence, signature, count && peer != peers.rank);
    }
    ok = ok && failed == 0;
    ok = __all_sync(0xffffffffu, ok) != 0;
    asm volatile("fence.acq_rel.sys;" ::: "memory");
    return ok;
}

// Whole block, one of the grid.
__device__ inline bool wait_for_peers(const Peers& peers, uint32_t operation, uint32_t sequence, uint32_t signature) {
    const bool ok = threadIdx.x >= 32 || wait_for_peers_warp(peers, operation, sequence, signature, true);
    return __syncthreads_and(ok) != 0;
}

// One thread per peer: tell it that `sequence` is published, or that its rows are no longer read. After a barrier of
// the block: a release also covers what other threads did before the barrier.
__device__ inline void raise_signals(const Peers& peers, int64_t signals_at, uint32_t sequence, uint32_t signature) {
    for (int peer = threadIdx.x; peer < peers.num_ranks; peer += blockDim.x) {
        auto* signals = reinterpret_cast<uint64_t*>(peers.segments[peer] + signals_at);
        store_release(&signals[peers.rank], (static_cast<uint64_t>(sequence) << 32) | signature);
    }
}

__device__ inline void count_received(const Peers& peers, int rank, int64_t bytes) {
    atomicAdd(&peers.control->traffic.recv_bytes[rank], static_cast<unsigned long long>(bytes));
}

// The last threads of the grid's last block: the host's copy of the sums.
__device__ inline void report_traffic(const Peers& peers) {
    const int peer = blockDim.x - 1 - threadIdx.x;
    if (peer >= peers.num_ranks) return;
    const volatile DeviceTraffic& here = peers.control->traffic;
    volatile DeviceTraffic& on_host = peers.status->traffic;
    on_host.wait_ns[peer] = here.wait_ns[peer];
    on_host.recv_bytes[peer] = here.recv_bytes[peer];
}

#endif  // __CUDACC__

}  // namespace ray_deepep
