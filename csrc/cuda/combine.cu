// Combine: sums of what comes as it is, per-rank rows or rows of single routes.
#include <algorithm>

#include "cuda/check.h"
#include "cuda/combine.cuh"

namespace ray_deepep {

void launch_combine(const CombineParams& given, cudaStream_t stream) {
    CombineParams params = given;
    if (params.staging.num_rows > 0) {
        // Readers of single routes need rows from everywhere before they can begin: then all warps stage first.
        params.staging.num_warps = params.by_rank && !params.fast ? kCopyingWarps : kCombineThreads / 32;
    }
    if (params.fast) return launch_combine_fast(params, stream);
    const int num_topk = params.plan.num_topk, num_ranks = params.peers.num_ranks;
    with_float_type(params.dtype, [&](auto type) {
        with_most_rows(params.by_rank ? std::min(num_topk, num_ranks) : num_topk, [&](auto most) {
            combine_kernel<decltype(type), most.value, false><<<params.num_sms, kCombineThreads, 0, stream>>>(params);
        });
    });
    check_launch("combine_kernel");
}

}  // namespace ray_deepep
