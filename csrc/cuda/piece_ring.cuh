// Pieces of rows on their way into shared memory, a ring of them for each warp, so that loads go on while pieces are
// used. By bulk copies where the chip has them: what other copies bring is written there 32 bytes at a time, which
// keeps shared memory busy and limits a multiprocessor to half of what bulk copies reach.
#pragma once

#include "cuda/bulk_copy.cuh"
#include "cuda/vec.cuh"

namespace ray_deepep {

template <typename T>
__device__ inline Vec<T> load_shared(uint32_t address) {
    Vec<T> v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.bits.x), "=r"(v.bits.y), "=r"(v.bits.z), "=r"(v.bits.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// Of `depth` pieces, all but one are on their way at a time; `width`: vectors of a piece for each lane.
template <int depth, int width>
struct PieceRing {
    static constexpr int kDepth = depth;
    static constexpr int kVectors = 32 * width;  // of a piece
    static constexpr int kPieceBytes = 16 * kVectors;
    static constexpr int kBytes = depth * kPieceBytes;

    uint32_t room;                          // address in shared memory
    uint32_t slot = 0;                      // of the next piece to take, in bytes
    uint32_t spare = kBytes - kPieceBytes;  // of the piece taken last: its loads have ended when it is filled again

    __device__ static uint32_t after(uint32_t slot) { return slot + kPieceBytes == kBytes ? 0 : slot + kPieceBytes; }
    // Of the next piece, once it is there.
    __device__ uint32_t address() const { return room + slot; }

#if __CUDA_ARCH__ >= 900
    uint32_t barriers;  // one for each slot
    uint32_t parity = 0;

    // Whole warp, before the block's first __syncthreads(). `warp`: which of those that have rings here.
    __device__ PieceRing(const void* of_block, const uint64_t* barriers_of_block, int warp)
        : room(shared_address(of_block) + warp * kBytes), barriers(shared_address(barriers_of_block + warp * depth)) {
        if (threadIdx.x % 32 != 0) return;
        for (int i = 0; i < depth; ++i) init_barrier(barriers + i * 8);
        fence_barrier_init();
    }
    // Whole warp: `vectors` vectors at `row`, or as many as a piece has.
    __device__ void put(uint32_t at, const std::byte* row, int vectors) const {
        if (!elect_one()) return;
        const uint32_t bytes = vectors < kVectors ? vectors * 16 : kPieceBytes;
        const uint32_t barrier = barriers + at / (kPieceBytes / 8);
        expect_bytes(barrier, bytes);
        bulk_load(room + at, row, bytes, barrier);
    }
    __device__ void wait() const { wait_barrier(barriers + slot / (kPieceBytes / 8), parity); }
    __device__ static void commit() {}
#else
    __device__ PieceRing(const void* of_block, const uint64_t*, int warp)
        : room(shared_address(of_block) + warp * kBytes) {}
    __device__ void put(uint32_t at, const std::byte* row, int vectors) const {
        const uint32_t to = room + at;
        const int end = min(vectors, kVectors);
        for (int i = threadIdx.x % 32; i < end; i += 32) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i * 16), "l"(row + i * int64_t{16})
                         : "memory");
        }
    }
    __device__ static void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(depth - 2) : "memory"); }
    // After each put, and where one would be if there is nothing left.
    __device__ static void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
#endif

    // This lane's vectors of the next piece.
    template <typename T>
    __device__ void take(Vec<T>* into) const {
        wait();
        const uint32_t at = address() + threadIdx.x % 32 * 16;
#pragma unroll
        for (int j = 0; j < width; ++j) into[j] = load_shared<T>(at + j * 512);
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

// Whole warp, one row of `vectors` vectors, nothing else in the ring. started(): first loads are under way. take(first,
// left) waits for the piece that begins at vector `first` and loads it, with a __syncwarp() behind; use(first, left)
// does what it likes with it.
template <typename Ring, typename Started, typename Take, typename Use>
__device__ void walk_row(Ring& ring, const std::byte* row, int vectors, Started started, Take take, Use use) {
    int put = 0;
    const auto put_next = [&](uint32_t slot) {
        if (put < vectors) ring.put(slot, row + put * int64_t{16}, vectors - put);
        put += Ring::kVectors;
        ring.commit();
    };
    uint32_t filled = ring.slot;
    for (int i = 0; i < Ring::kDepth - 1; ++i, filled = Ring::after(filled)) put_next(filled);
    started();
    for (int first = 0; first < vectors; first += Ring::kVectors) {
        take(first, vectors - first);
        put_next(ring.spare);
        ring.advance();
        use(first, vectors - first);
    }
}

}  // namespace ray_deepep
