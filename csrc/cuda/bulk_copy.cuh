// Bulk copies of sm_90: rows through shared memory by the copy engine of each multiprocessor, completion on an
// mbarrier. Addresses and sizes are multiples of 16 bytes.
#pragma once

#include <cstdint>

namespace ray_deepep {

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One lane of the warp, all of whose lanes are here; the compiler knows that it is one.
__device__ inline bool elect_one() {
    uint32_t elected = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
#endif
    return elected != 0;
}

// Barriers and targets of loads are given by their addresses in shared memory.
__device__ inline void init_barrier(uint32_t barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// Make barrier initialisation visible to the copy engine.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Once per phase, for all loads of the phase together.
__device__ inline void expect_bytes(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}

__device__ inline void wait_barrier(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}

__device__ inline void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
                 : "memory");
}
__device__ inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
    bulk_store(global, shared_address(shared), bytes);
}

__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the newest group have been read from shared memory.
__device__ inline void wait_stores_read_but_one() { asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory"); }

__device__ inline void wait_stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace ray_deepep
