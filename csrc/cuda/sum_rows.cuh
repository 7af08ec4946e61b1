// Sums of rows by one warp, in float32 and in a fixed order.
#pragma once

#include "cuda/bulk_copy.cuh"
#include "cuda/vec.cuh"

namespace ray_deepep {

// Lane i holds the i-th row to add. Rows [group_begin, group_end) are added up and rounded before they are added to the
// others: they are the local experts of one rank.
struct RowList {
    const std::byte* row;
    float weight;
    int k;
    int count;
    int group_begin = 0;
    int group_end = 0;
};

struct RowSum {
    std::byte* out;
    const std::byte* bias;  // null: none
    std::byte* routes;      // rows as they came, at routes + k * route_stride; null: not kept
    int64_t route_stride;
    int vectors;
    bool weighted;  // with a group: its rows only
};

// Lane i finds the lane among the first `num_lanes` that is taken and has position i.
__device__ inline int lane_at_position(bool taken, int position, int num_lanes) {
    const int lane = threadIdx.x % 32, mine = taken ? position : -1;
    int found = lane;
    for (int other = 0; other < num_lanes; ++other) {
        if (__shfl_sync(0xffffffffu, mine, other) == lane) found = other;
    }
    return found;
}

// Pieces of rows on their way into shared memory, a ring of them for each warp, so that loads go on while sums are
// made. By bulk copies where the chip has them: what other copies bring is written there 32 bytes at a time, which
// keeps shared memory busy and limits a multiprocessor to half of what bulk copies reach.
inline constexpr int kRingDepth = 6;
inline constexpr int kPieceWidth = 4;  // vectors of a piece that each lane adds
inline constexpr int kPieceVectors = 32 * kPieceWidth;
inline constexpr int kPieceBytes = 16 * kPieceVectors;
inline constexpr int kRingBytes = kRingDepth * kPieceBytes;

inline constexpr int sum_shared_bytes(int threads) { return threads / 32 * kRingBytes; }

template <typename T>
__device__ inline Vec<T> load_shared(uint32_t address) {
    Vec<T> v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.bits.x), "=r"(v.bits.y), "=r"(v.bits.z), "=r"(v.bits.w)
                 : "r"(address)
                 : "memory");
    return v;
}

struct PieceRing {
    uint32_t room;                              // address in shared memory
    uint32_t slot = 0;                          // of the next piece to take, in bytes
    uint32_t spare = kRingBytes - kPieceBytes;  // of the piece taken last: its loads have ended when it is filled again

    __device__ static uint32_t after(uint32_t slot) {
        return slot + kPieceBytes == kRingBytes ? 0 : slot + kPieceBytes;
    }

#if __CUDA_ARCH__ >= 900
    uint32_t barriers;  // one for each slot
    uint32_t parity = 0;

    // Whole warp, before the block's first __syncthreads().
    __device__ PieceRing(const uint4* of_block, const uint64_t* barriers_of_block)
        : room(shared_address(of_block) + threadIdx.x / 32 * kRingBytes),
          barriers(shared_address(barriers_of_block + threadIdx.x / 32 * kRingDepth)) {
        if (threadIdx.x % 32 != 0) return;
        for (int i = 0; i < kRingDepth; ++i) init_barrier(barriers + i * 8);
        fence_barrier_init();
    }
    // Whole warp: `vectors` vectors at `row`, or as many as a piece has.
    __device__ void put(uint32_t at, const std::byte* row, int vectors) const {
        if (!elect_one()) return;
        const uint32_t bytes = vectors < kPieceVectors ? vectors * 16 : kPieceBytes;
        const uint32_t barrier = barriers + at / (kPieceBytes / 8);
        expect_bytes(barrier, bytes);
        bulk_load(room + at, row, bytes, barrier);
    }
    __device__ void wait() const { wait_barrier(barriers + slot / (kPieceBytes / 8), parity); }
    __device__ static void commit() {}
#else
    __device__ PieceRing(const uint4* of_block, const uint64_t*)
        : room(shared_address(of_block) + threadIdx.x / 32 * kRingBytes) {}
    __device__ void put(uint32_t at, const std::byte* row, int vectors) const {
        const uint32_t to = room + at;
        const int end = min(vectors, kPieceVectors);
        for (int i = threadIdx.x % 32; i < end; i += 32) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i * 16), "l"(row + i * int64_t{16})
                         : "memory");
        }
    }
    __device__ static void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kRingDepth - 2) : "memory"); }
    // After each put, and where one would be if there is nothing left.
    __device__ static void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
#endif

    // This lane's vectors of the next piece.
    template <typename T>
    __device__ void take(Vec<T>* into) const {
        wait();
        const uint32_t at = room + slot + threadIdx.x % 32 * 16;
#pragma unroll
        for (int j = 0; j < kPieceWidth; ++j) into[j] = load_shared<T>(at + j * 512);
        __syncwarp();
    }
    __device__ void advance() {
        spare = slot;
        slot = after(slot);
#if __CUDA_ARCH__ >= 900
        parity ^= slot == 0 ? 1 : 0;
#endif
    }
};

// Sums of one piece of a token's rows.
template <typename T, bool kGroup>
struct PieceSum {
    Accumulator<T> all[kPieceWidth];
    Accumulator<T> group[kGroup ? kPieceWidth : 1];

    // The n-th row of the list.
    __device__ void add(const RowSum& to, const RowList& list, int n, const Vec<T>* v, float weight) {
        if (!kGroup || n < list.group_begin || n >= list.group_end) {
            return add_to(all, v, weight, to.weighted && !kGroup);
        }
        add_to(group, v, weight, to.weighted);
        if (n + 1 < list.group_end) return;
#pragma unroll
        for (int j = 0; j < kPieceWidth; ++j) all[j].add(group[j % (kGroup ? kPieceWidth : 1)].value());
    }
    __device__ static void add_to(Accumulator<T>* sums, const Vec<T>* v, float weight, bool weighted) {
        if (weighted) {
#pragma unroll
            for (int j = 0; j < kPieceWidth; ++j) sums[j].add_scaled(v[j], weight);
        } else {
#pragma unroll
            for (int j = 0; j < kPieceWidth; ++j) sums[j].add(v[j]);
        }
    }
    __device__ void finish(const RowSum& to, int first) {
#pragma unroll
        for (int j = 0; j < kPieceWidth; ++j) {
            const int i = first + j * 32 + threadIdx.x % 32;
            if (i >= to.vectors) return;
            if (to.bias != nullptr) all[j].add(load_vec<T>(to.bias, i));
            store_vec(to.out, i, all[j].value());
        }
    }
};

template <typename T>
__device__ void keep_piece(const RowSum& to, int k, int first, const Vec<T>* v) {
    std::byte* row = to.routes + k * to.route_stride;
#pragma unroll
    for (int j = 0; j < kPieceWidth; ++j) {
        const int i = first + j * 32 + threadIdx.x % 32;
        if (i < to.vectors) store_vec(row, i, v[j]);
    }
}

// One warp: piece by piece, the sum over all rows of the list. Between sums the ring is empty.
template <typename T, bool kGroup>
__device__ void sum_rows(const RowSum& to, const RowList& list, PieceRing& ring) {
    constexpr unsigned kAllLanes = 0xffffffffu;
    const auto own_row = reinterpret_cast<uint64_t>(list.row);
    int keep = to.routes != nullptr ? 1 : 0;
    asm volatile("" : "+r"(keep));  // or it is worked out again for every piece
    int put_first = 0, put_n = 0;
    const auto put_next = [&](uint32_t slot) {
        if (put_first < to.vectors) {
            const auto row = reinterpret_cast<const std::byte*>(__shfl_sync(kAllLanes, own_row, put_n));
            ring.put(slot, row + put_first * int64_t{16}, to.vectors - put_first);
            const bool last = ++put_n == list.count;
            put_n = last ? 0 : put_n;
            put_first += last ? kPieceVectors : 0;
        }
        ring.commit();
    };
    if (list.count == 0) put_first = to.vectors;
    uint32_t filled = ring.slot;
    for (int i = 0; i < kRingDepth - 1; ++i, filled = ring.after(filled)) put_next(filled);
    for (int first = 0; first < to.vectors; first += kPieceVectors) {
        PieceSum<T, kGroup> sum;
#pragma unroll 1
        for (int n = 0; n < list.count; ++n) {
            Vec<T> v[kPieceWidth];
            ring.take(v);
            put_next(ring.spare);
            ring.advance();
            sum.add(to, list, n, v, __shfl_sync(kAllLanes, list.weight, n));
            if (keep != 0) keep_piece(to, __shfl_sync(kAllLanes, list.k, n), first, v);
        }
        sum.finish(to, first);
    }
}

}  // namespace ray_deepep
