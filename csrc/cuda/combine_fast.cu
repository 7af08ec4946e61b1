// Combine, fast mode: local experts are added up before their rows travel.
#include "cuda/check.h"
#include "cuda/combine.cuh"

namespace ray_deepep {

void launch_combine_fast(const CombineParams& params, cudaStream_t stream) {
    with_float_type(params.dtype, [&](auto type) {
        if (params.plan.num_topk <= 8) {
            combine_kernel<decltype(type), 8, true><<<params.num_sms, kCombineThreads, 0, stream>>>(params);
        } else {
            combine_kernel<decltype(type), 0, true><<<params.num_sms, kCombineThreads, 0, stream>>>(params);
        }
    });
    check_launch("combine_kernel, fast");
}

}  // namespace ray_deepep
