// CUDA memory that frees itself.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "cuda/check.h"

namespace ray_deepep {

struct FreeDevice {
    void operator()(void* address) const { cudaFree(address); }
};
struct FreePinned {
    void operator()(void* address) const { cudaFreeHost(address); }
};
template <typename T>
using DeviceMemory = std::unique_ptr<T, FreeDevice>;
template <typename T>
using PinnedMemory = std::unique_ptr<T, FreePinned>;

// Both zeroed.
template <typename T>
DeviceMemory<T> device_object() {
    void* address = nullptr;
    check_cuda(cudaMalloc(&address, sizeof(T)), "cudaMalloc");
    DeviceMemory<T> memory(static_cast<T*>(address));
    check_cuda(cudaMemset(address, 0, sizeof(T)), "cudaMemset");
    return memory;
}

template <typename T>
PinnedMemory<T> pinned_object() {
    void* address = nullptr;
    check_cuda(cudaHostAlloc(&address, sizeof(T), cudaHostAllocMapped), "cudaHostAlloc");
    PinnedMemory<T> memory(static_cast<T*>(address));
    *memory = T{};
    return memory;
}

}  // namespace ray_deepep
