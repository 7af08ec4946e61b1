// Fast combine, first step: a token's local experts are added up where they are, into this rank's area.
#include "cuda/check.h"
#include "cuda/params.h"
#include "cuda/sum_rows.cuh"

namespace ray_deepep {
namespace {

constexpr int kThreads = 1024;

// Routes of a received row that ended up in a slot, in k order.
__device__ RowList list_routes(const ReduceLocalParams& p, int slot, float weight, int64_t row_bytes) {
    const unsigned all = 0xffffffffu, held = __ballot_sync(all, slot >= 0);
    const int lane = threadIdx.x % 32;
    const int from = lane_at_position(slot >= 0, __popc(held & ((1u << lane) - 1)), p.plan.num_topk);
    const int its_slot = __shfl_sync(all, slot, from);
    const float its_weight = __shfl_sync(all, weight, from);
    return RowList{p.rows + its_slot * row_bytes, its_weight, from, __popc(held)};
}

template <typename T, int kMostRows>
__global__ void __launch_bounds__(kThreads, 1) reduce_local_kernel(const __grid_constant__ ReduceLocalParams p) {
    const Peers& peers = p.peers;
    if (load_volatile(&peers.control->failed) != 0) return;
    const uint32_t sequence = load_volatile(&peers.control->sequence) + 1;
    auto* area = peers.in_area<std::byte>(peers.rank, sequence, peers.layout.area.rows_at);
    const int64_t row_bytes = p.hidden * sizeof(T);
    const int num_rows = static_cast<int>(min(int64_t{p.plan.counts[kNumRecvTokens]}, p.plan.max_recv_tokens));
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk;
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, num_warps = gridDim.x * blockDim.x / 32;
    const auto slot_of = [&](int row) {
        return row < num_rows && lane < num_topk ? p.plan.recv_slot[int64_t{row} * num_topk + lane] : -1;
    };
    const auto weight_of = [&](int row) {
        return row < num_rows && lane < num_topk ? p.plan.recv_weight[int64_t{row} * num_topk + lane] : 0.0f;
    };
    int slot = slot_of(warp);
    float weight = weight_of(warp);
    for (int row = warp; row < num_rows; row += num_warps) {
        const RowList list = list_routes(p, slot, weight, row_bytes);
        // Looked up while this row is added.
        slot = slot_of(row + num_warps);
        weight = weight_of(row + num_warps);
        sum_rows<T, kMostRows, 2>(
            RowSum{area + row * row_bytes, nullptr, nullptr, 0, static_cast<int>(row_bytes / 16), p.weighted}, list);
    }
}

}  // namespace

void launch_reduce_local(const ReduceLocalParams& params, cudaStream_t stream) {
    with_float_type(params.dtype, [&](auto type) {
        with_most_rows(params.plan.num_topk, [&](auto most) {
            reduce_local_kernel<decltype(type), most.value><<<params.num_sms, kThreads, 0, stream>>>(params);
        });
    });
    check_launch("reduce_local_kernel");
}

}  // namespace ray_deepep
