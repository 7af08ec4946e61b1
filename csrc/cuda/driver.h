// Driver entry points, looked up when first needed: loading this code needs no driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#include "cuda/check.h"

namespace ray_deepep {

template <typename Function>
Function* driver_function(const char* name) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    check_cuda(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
    if (found == nullptr || result != cudaDriverEntryPointSuccess) {
        throw CudaError(std::string("the driver has no ") + name + "; it needs CUDA 12 or newer");
    }
    return reinterpret_cast<Function*>(found);
}

inline void check_driver(CUresult status, const char* what) {
    if (status == CUDA_SUCCESS) return;
    const char* name = nullptr;
    driver_function<decltype(cuGetErrorName)>("cuGetErrorName")(status, &name);
    throw CudaError(std::string(what) + ": " + (name != nullptr ? name : "unknown driver error"));
}

}  // namespace ray_deepep
