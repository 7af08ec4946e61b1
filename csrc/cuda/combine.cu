// Combine: sums of what comes as it is, per-rank rows or rows of single routes.
#include "cuda/combine.cuh"

namespace ray_deepep {

void allow_combine() {
    allow_combine_kernels<false>();
    allow_combine_fast();
}

void launch_combine(const CombineParams& given, cudaStream_t stream) {
    CombineParams params = given;
    if (params.staging.num_rows > 0) {
        // Readers of single routes need rows from everywhere before they can begin: then all warps stage first.
        params.staging.num_warps = params.by_rank && !params.fast ? kCopyingWarps : kCombineThreads / 32;
    }
    if (params.fast) return launch_combine_fast(params, stream);
    launch_combine_kernel<false>(params, stream);
}

}  // namespace ray_deepep
