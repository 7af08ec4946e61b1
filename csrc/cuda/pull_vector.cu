// Pull with plain vectors: chips without bulk copies, and rows that are scaled by their routes' weights on the way.
#include "cuda/check.h"
#include "cuda/float8_cast.cuh"
#include "cuda/pull.cuh"
#include "cuda/vec.cuh"

namespace ray_deepep {
namespace {

constexpr int kWarps = 16;
constexpr int kStagingWarps = 8;
constexpr int kInFlight = 4;

template <typename T>
__device__ Vec<T> scaled(const Vec<T>& v, float weight) {
    Vec<T> out;
#pragma unroll
    for (int j = 0; j < Vec<T>::kCount; ++j) out.items[j] = narrow<T>(__fmul_rn(weight, widen(v.items[j])));
    return out;
}

// Lane k knows the place and weight of the row's k-th route; token-major rows have one place.
template <typename T>
__device__ void pull_row(const PullParams& p, const std::byte* from, int places, int slot, float weight) {
    const int lane = threadIdx.x % 32;
    const int64_t vectors = p.row_bytes / 16;
    for (int64_t base = 0; base < vectors; base += 32 * kInFlight) {
        Vec<T> v[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            if (base + j * 32 + lane < vectors) v[j] = load_vec<T>(from, base + j * 32 + lane);
        }
        for (int k = 0; k < places; ++k) {
            const int64_t to = __shfl_sync(0xffffffffu, slot, k);
            const float by = __shfl_sync(0xffffffffu, weight, k);
            if (to < 0) continue;
#pragma unroll
            for (int j = 0; j < kInFlight; ++j) {
                const int64_t i = base + j * 32 + lane;
                if (i >= vectors) continue;
                store_vec(p.out + to * p.row_bytes, i, p.scale_by_weights ? scaled(v[j], by) : v[j]);
            }
        }
    }
}

__device__ void pull_scales(const PullParams& p, const std::byte* from, int places, int slot) {
    const int64_t floats = p.scale_bytes / 4;
    for (int64_t i = threadIdx.x % 32; i < (floats + 31) / 32 * 32; i += 32) {
        const float scale = i < floats ? reinterpret_cast<const float*>(from)[i] : 0.0f;
        for (int k = 0; k < places; ++k) {
            const int64_t to = __shfl_sync(0xffffffffu, slot, k);
            if (to >= 0 && i < floats) p.out_scales[to * floats + i] = scale;
        }
    }
}

__device__ void clear_rows(const PullParams& p, int warp, int num_warps) {
    const int lane = threadIdx.x % 32;
    const int64_t candidates = num_clear_candidates(p.plan);
    for (int64_t slot = warp; slot < candidates; slot += num_warps) {
        if (p.plan.slot_row[slot] >= 0) continue;
        auto* out = reinterpret_cast<uint4*>(p.out + slot * p.row_bytes);
        for (int64_t i = lane; i < p.row_bytes / 16; i += 32) out[i] = make_uint4(0, 0, 0, 0);
        for (int64_t i = lane; p.out_scales != nullptr && i < p.scale_bytes / 4; i += 32) {
            p.out_scales[slot * p.scale_bytes / 4 + i] = 0.0f;
        }
    }
}

template <typename T>
__device__ void pull_rows(const PullParams& p, const Sources& sources, uint32_t sequence, int warp, int num_warps) {
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk;
    const bool token_major = p.plan.layout == LayoutKind::kTokenMajor;
    const PullOrder order(p, sources);
    for (int i = warp; i < order.size(); i += num_warps) {
        const int row = order.row_of(i), source = order.rank_of(i);
        if (row < 0) continue;
        const int64_t token = p.plan.recv_token[row];
        int slot = row;
        float weight = 1.0f;
        if (!token_major && lane < num_topk) {
            slot = p.plan.recv_slot[int64_t{row} * num_topk + lane];
            weight = p.plan.recv_weight[int64_t{row} * num_topk + lane];
        }
        bool ok = true;
        if (sources.staged[source] && lane == 0) ok = wait_rows_ready(p.peers, p.publication, source, token, sequence);
        if (__any_sync(all, !ok)) return;
        const int places = token_major ? 1 : num_topk;
        pull_row<T>(p, sources.rows[source] + token * p.row_bytes, places, slot, weight);
        if (p.out_scales != nullptr) pull_scales(p, sources.scales[source] + token * p.scale_bytes, places, slot);
    }
    clear_rows(p, warp, num_warps);
}

// Not inlined, for the registers of those that pull.
__device__ __noinline__ void stage_casts(const PullParams& p, uint32_t sequence, StagedRows* shared) {
    stage_dispatch(p, sequence, shared, [&](int64_t row) {
        const StagedRow at = staged_row(p.peers, p.staging, sequence, row);
        const auto cast = [&](auto type) {
            cast_row<decltype(type)>(at.from, at.to, at.scales, p.staging.hidden, p.staging.power_of_two);
        };
        switch (p.staging.from) {
            case DType::kFloat32: return cast(float{});
            case DType::kBFloat16: return cast(__nv_bfloat16{});
            default: return cast(__half{});
        }
    });
}

template <typename T>
__global__ void __launch_bounds__((kWarps + kStagingWarps) * 32)
    pull_vector_kernel(const __grid_constant__ PullParams p) {
    __shared__ Sources sources;
    __shared__ StagedRows staged;
    if (!has_room(p)) return;
    init_staged_rows(&staged);
    const uint32_t sequence = begin_operation(p.peers, p.publication);
    const int local = threadIdx.x / 32;
    if (is_staging_warp(p.staging)) {
        if (p.staging.cast) {
            stage_casts(p, sequence, &staged);
        } else {
            stage_copies(p, sequence, &staged);
        }
    } else {
        if (learn_sources(p, sequence, &sources)) {
            pull_rows<T>(p, sources, sequence, blockIdx.x * p.num_warps + local, gridDim.x * p.num_warps);
        }
    }
    end_operation(p.peers, p.publication, sequence);
}

}  // namespace

void launch_pull_vector(const PullParams& given, cudaStream_t stream) {
    PullParams params = given;
    params.num_warps = kWarps;
    if (params.staging.num_rows > 0) params.staging.num_warps = kStagingWarps;
    const int threads = (params.num_warps + params.staging.num_warps) * 32;
    if (params.scale_by_weights) {
        with_float_type(params.dtype, [&](auto type) {
            pull_vector_kernel<decltype(type)><<<params.num_sms, threads, 0, stream>>>(params);
        });
    } else {
        // Copies need no arithmetic: any type of the right width.
        pull_vector_kernel<float><<<params.num_sms, threads, 0, stream>>>(params);
    }
    check_launch("pull_vector_kernel");
}

void launch_pull(const PullParams& params, bool bulk_copy, cudaStream_t stream) {
    if (bulk_copy && !params.scale_by_weights) return launch_pull_bulk(params, stream);
    launch_pull_vector(params, stream);
}

}  // namespace ray_deepep
