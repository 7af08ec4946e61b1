// Combine, fast mode: local experts are added up before their rows travel.
#include "cuda/combine.cuh"

namespace ray_deepep {

void allow_combine_fast() { allow_combine_kernels<true>(); }

void launch_combine_fast(const CombineParams& params, cudaStream_t stream) {
    launch_combine_kernel<true>(params, stream);
}

}  // namespace ray_deepep
