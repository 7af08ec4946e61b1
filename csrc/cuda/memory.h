// Memory of CUDA's that frees itself, whatever is thrown.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cuda/check.h"

namespace ray_deepep {

// Errors of a free have nobody to go to: the context may be gone.
struct FreeDevice {
    void operator()(void* memory) const { cudaFree(memory); }
};
struct FreeHost {
    void operator()(void* memory) const { cudaFreeHost(memory); }
};
template <typename T>
using DeviceMemory = std::unique_ptr<T, FreeDevice>;
template <typename T>
using HostMemory = std::unique_ptr<T, FreeHost>;

// Addresses come from Python as numbers.
template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Memory of the current GPU, not initialised.
template <typename T>
DeviceMemory<T> device_memory(size_t bytes) {
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, bytes), "cudaMalloc");
    return DeviceMemory<T>(static_cast<T*>(memory));
}

// Pinned memory of the host that the GPU writes to, not initialised.
template <typename T>
HostMemory<T> mapped_host_memory(size_t bytes) {
    void* memory = nullptr;
    check_cuda(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped), "cudaHostAlloc");
    return HostMemory<T>(static_cast<T*>(memory));
}

}  // namespace ray_deepep
