// The frame of every row-moving kernel: publish (unless an earlier kernel did), learn where all ranks' rows are, move
// rows, say that reading is over. One launch is then a whole operation along a plan.
#pragma once

#include "cuda/peers.cuh"

namespace ray_deepep {

// What a rank tells its peers about an operation.
struct Publication {
    uint32_t operation = 0;
    uint32_t signature = 0;
    int32_t fields[8] = {};  // what the signature is made of; see signature.h
    int32_t num_tokens = 0;
    int64_t rows_at = -1;  // offset in the segment of rows that live in the heap; -1: the area's
    int64_t scales_at = -1;
    bool staged = false;   // rows come piece by piece, each with its flag
    bool by_main = false;  // the row-moving kernel publishes
};

#ifdef __CUDACC__

// Whole block.
__device__ inline void announce(const Peers& peers, const Publication& publication, uint32_t sequence) {
    if (threadIdx.x == 0) {
        const int64_t area = peers.layout.area_at[sequence & 1];
        AreaHeader* header = peers.header(peers.rank, sequence);
        header->num_tokens = publication.num_tokens;
        header->staged = publication.staged ? 1 : 0;
        header->rows_at = publication.rows_at >= 0 ? publication.rows_at : area + peers.layout.area.rows_at;
        header->scales_at = publication.scales_at >= 0 ? publication.scales_at : area + peers.layout.area.scales_at;
        for (int i = 0; i < 8; ++i) header->fields[i] = publication.fields[i];
    }
    __syncthreads();
    raise_signals(peers, peers.layout.signals_at, sequence, publication.signature);
}

// Where each rank's rows of the current operation are; in shared memory.
struct Sources {
    const std::byte* rows[kMaxRanks];
    const std::byte* scales[kMaxRanks];
    bool staged[kMaxRanks];
    int starts[kMaxSources + 1];  // first row from each source (part, rank), of the plan
    bool ok;                      // false: the operation has failed
};

// Named barriers of a block; 0 is __syncthreads().
enum class BlockBarrier : int { kSources = 1, kLateSources = 2 };

// Threads of whole warps, `threads` of them in all.
__device__ inline void sync_warps(BlockBarrier barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(barrier)), "r"(threads) : "memory");
}
__device__ inline void arrive_warps(BlockBarrier barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(static_cast<int>(barrier)), "r"(threads) : "memory");
}

// Whole block, first thing in a kernel. Returns the operation's sequence number.
__device__ inline uint32_t begin_operation(const Peers& peers, const Publication& publication) {
    const uint32_t sequence = load_volatile(&peers.control->sequence) + (publication.by_main ? 1 : 0);
    if (publication.by_main && blockIdx.x == 0 && load_volatile(&peers.control->failed) == 0) {
        if (threadIdx.x == 0) peers.control->published = 1;
        announce(peers, publication, sequence);
    }
    __syncthreads();
    return sequence;
}

// One warp of each block; the others see the answer after a barrier. Rows of this rank are read where they are, if
// given. `source_start` is the plan's.
__device__ inline void find_sources(const Peers& peers, const Publication& publication, uint32_t sequence,
                                    const std::byte* own_rows, const float* own_scales, const int32_t* source_start,
                                    Sources* sources) {
    for (int i = threadIdx.x % 32; i <= peers.num_sources(); i += 32) sources->starts[i] = source_start[i];
    const bool count = blockIdx.x == 0;
    const bool ok = wait_for_peers_warp(peers, publication.operation, sequence, publication.signature, count);
    for (int rank = threadIdx.x % 32; ok && rank < peers.num_ranks; rank += 32) {
        const AreaHeader* header = peers.header(rank, sequence);
        const bool own = rank == peers.rank && own_rows != nullptr;
        sources->rows[rank] = own ? own_rows : peers.segments[rank] + header->rows_at;
        sources->scales[rank] =
            own ? reinterpret_cast<const std::byte*>(own_scales) : peers.segments[rank] + header->scales_at;
        sources->staged[rank] = !own && header->staged != 0;
    }
    if (threadIdx.x % 32 == 0) sources->ok = ok;
}

__device__ inline bool rows_ready(const Peers& peers, int source, int64_t row, uint32_t sequence) {
    const uint32_t seen = load_acquire(peers.ready_flag(peers.rank, source, row / kReadyRows));
    return static_cast<int32_t>(seen - sequence) >= 0;
}

// One thread: wait until a source has staged this row. Hundreds of warps wait at a time, on a few flags: they leave
// pauses, for what they poll is written, and rows are staged, through the same caches.
__device__ inline bool wait_rows_ready(const Peers& peers, const Publication& publication, int source, int64_t row,
                                       uint32_t sequence) {
    constexpr unsigned kPause_ns = 200;
    const uint32_t* flag = peers.ready_flag(peers.rank, source, row / kReadyRows);
    return poll(peers, WaitFor{Phase::kStaged, publication.operation, source, sequence}, [&] {
        const uint32_t seen = load_acquire(flag);
        if (static_cast<int32_t>(seen - sequence) < 0) __nanosleep(kPause_ns);
        return seen;
    });
}

// Whole block, last thing in a kernel. The last block tells peers that their rows are no longer read here, and waits
// until this rank's are not either if they belong to the user: the stream may overwrite them next.
__device__ inline void end_operation(const Peers& peers, const Publication& publication, uint32_t sequence) {
    bool last = false;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(&peers.control->main_blocks, 1u) == gridDim.x - 1;
        __threadfence();
    }
    // The barrier itself brings the answer: a word in shared memory for it is one more trip, and racecheck reports it
    // where the block has warps that stage.
    if (__syncthreads_or(last ? 1 : 0) == 0) return;
    report_traffic(peers);
    if (load_volatile(&peers.control->failed) == 0) {
        raise_signals(peers, peers.layout.done_at, sequence, 0);
        const auto* done = reinterpret_cast<const uint64_t*>(peers.segments[peers.rank] + peers.layout.done_at);
        for (int peer = threadIdx.x; publication.rows_at >= 0 && peer < peers.num_ranks; peer += blockDim.x) {
            poll(peers, WaitFor{Phase::kDone, publication.operation, peer, sequence},
                 [&] { return static_cast<uint32_t>(load_acquire(&done[peer]) >> 32); });
        }
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    DeviceControl* control = peers.control;
    control->main_blocks = 0;
    control->next_token = 0;
    if (control->published != 0) control->sequence = sequence;
    control->published = 0;
}

#endif  // __CUDACC__

}  // namespace ray_deepep
