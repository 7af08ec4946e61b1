#include "host/rows.h"

#include <utility>

// One build serves every x86-64: the loader picks the widest version that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RAY_DEEPEP_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RAY_DEEPEP_MULTIVERSION
#endif

namespace ray_deepep {
namespace {

#define RAY_DEEPEP_ROW_LOOPS(T, NAME)                                                                           \
    RAY_DEEPEP_MULTIVERSION void scale_##NAME(T* __restrict dst, const T* __restrict src, int64_t n, float w) { \
        for (int64_t i = 0; i < n; ++i) dst[i] = from_float<T>(w * to_float(src[i]));                           \
    }                                                                                                           \
    RAY_DEEPEP_MULTIVERSION void add_##NAME(float* __restrict acc, const T* __restrict src, int64_t n) {        \
        for (int64_t i = 0; i < n; ++i) acc[i] += to_float(src[i]);                                             \
    }                                                                                                           \
    RAY_DEEPEP_MULTIVERSION void add_scaled_##NAME(float* __restrict acc, const T* __restrict src, int64_t n,   \
                                                   float w) {                                                   \
        for (int64_t i = 0; i < n; ++i) acc[i] += w * to_float(src[i]);                                         \
    }                                                                                                           \
    RAY_DEEPEP_MULTIVERSION void store_##NAME(T* __restrict dst, const float* __restrict acc, int64_t n) {      \
        for (int64_t i = 0; i < n; ++i) dst[i] = from_float<T>(acc[i]);                                         \
    }

// Macros, because versioned functions cannot be templates.
RAY_DEEPEP_ROW_LOOPS(float, float32)
RAY_DEEPEP_ROW_LOOPS(BFloat16, bfloat16)
RAY_DEEPEP_ROW_LOOPS(Float16, float16)

}  // namespace

void scale_row(void* dst, const void* src, int64_t hidden, DType dtype, float weight) {
    switch (dtype) {
        case DType::kFloat32:
            return scale_float32(static_cast<float*>(dst), static_cast<const float*>(src), hidden, weight);
        case DType::kBFloat16:
            return scale_bfloat16(static_cast<BFloat16*>(dst), static_cast<const BFloat16*>(src), hidden, weight);
        case DType::kFloat16:
            return scale_float16(static_cast<Float16*>(dst), static_cast<const Float16*>(src), hidden, weight);
        case DType::kFloat8E4M3: return;
    }
}

void add_row(float* acc, const void* src, int64_t hidden, DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return add_float32(acc, static_cast<const float*>(src), hidden);
        case DType::kBFloat16: return add_bfloat16(acc, static_cast<const BFloat16*>(src), hidden);
        case DType::kFloat16: return add_float16(acc, static_cast<const Float16*>(src), hidden);
        case DType::kFloat8E4M3: return;
    }
}

void add_scaled_row(float* acc, const void* src, int64_t hidden, DType dtype, float weight) {
    switch (dtype) {
        case DType::kFloat32: return add_scaled_float32(acc, static_cast<const float*>(src), hidden, weight);
        case DType::kBFloat16: return add_scaled_bfloat16(acc, static_cast<const BFloat16*>(src), hidden, weight);
        case DType::kFloat16: return add_scaled_float16(acc, static_cast<const Float16*>(src), hidden, weight);
        case DType::kFloat8E4M3: return;
    }
}

void store_row(void* dst, const float* acc, int64_t hidden, DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return store_float32(static_cast<float*>(dst), acc, hidden);
        case DType::kBFloat16: return store_bfloat16(static_cast<BFloat16*>(dst), acc, hidden);
        case DType::kFloat16: return store_float16(static_cast<Float16*>(dst), acc, hidden);
        case DType::kFloat8E4M3: return;
    }
}

}  // namespace ray_deepep
