// CUDA calls as exceptions. The runtime is linked statically; driver entry points are looked up when first needed, so
// nothing here needs a driver to load.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace ray_deepep {

class CudaError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    throw CudaError(std::string(what) + ": " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")");
}

// After a launch; clears a launch error so that it is not seen again elsewhere.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

}  // namespace ray_deepep
