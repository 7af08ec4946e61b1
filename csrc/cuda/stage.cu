// Staging: rows into the heap, where peers can read them. Left out for tensors that live there already.
#include "cuda/check.h"
#include "cuda/params.h"

namespace ray_deepep {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) stage_rows_kernel(const __grid_constant__ StageRowsParams p) {
    if (load_volatile(&p.peers.control->failed) != 0) return;
    const uint32_t sequence = p.peers.control->sequence + 1;
    auto* rows = p.peers.in_area<uint4>(p.peers.rank, sequence, p.peers.layout.area.rows_at);
    const auto* source = reinterpret_cast<const uint4*>(p.rows);
    const int64_t vectors = p.row_bytes / 16;
    const int lane = threadIdx.x % 32;
    const int64_t warp = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
    const int64_t num_warps = int64_t{gridDim.x} * blockDim.x / 32;
    for (int64_t row = warp; row < p.num_rows; row += num_warps) {
        if (p.slot_row != nullptr && p.slot_row[row] < 0) continue;
        int64_t i = lane;
        // Four loads in flight before the first store.
        for (; i + 96 < vectors; i += 128) {
            uint4 v[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) v[j] = __ldcs(&source[row * vectors + i + j * 32]);
#pragma unroll
            for (int j = 0; j < 4; ++j) rows[row * vectors + i + j * 32] = v[j];
        }
        for (; i < vectors; i += 32) rows[row * vectors + i] = __ldcs(&source[row * vectors + i]);
    }
    if (p.scales == nullptr) return;
    auto* scales = p.peers.in_area<float>(p.peers.rank, sequence, p.peers.layout.area.scales_at);
    const int64_t count = p.num_rows * p.scale_bytes / 4;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
        scales[i] = p.scales[i];
    }
}

}  // namespace

void launch_stage_rows(const StageRowsParams& params, cudaStream_t stream) {
    if (params.num_rows == 0) return;
    stage_rows_kernel<<<params.num_sms, kThreads, 0, stream>>>(params);
    check_launch("stage_rows_kernel");
}

}  // namespace ray_deepep
