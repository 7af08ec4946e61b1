#include "host/rows.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "host/multiversion.h"

namespace ray_deepep {
namespace {

#define RAY_DEEPEP_ROW_LOOPS(T, NAME)                                                                           \
    RAY_DEEPEP_MULTIVERSION [[maybe_unused]] void widen_##NAME(float* __restrict dst, const T* __restrict src,  \
                                                               int64_t n) {                                     \
        for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i]);                                              \
    }                                                                                                           \
    RAY_DEEPEP_MULTIVERSION void scale_##NAME(T* __restrict dst, const T* __restrict src, int64_t n, float w) { \
        for (int64_t i = 0; i < n; ++i) dst[i] = from_float<T>(w * to_float(src[i]));                           \
    }                                                                                                           \
    RAY_DEEPEP_MULTIVERSION void set_##NAME(float* __restrict acc, const T* __restrict src, int64_t n) {        \
        for (int64_t i = 0; i < n; ++i) acc[i] = 0.0f + to_float(src[i]);                                       \
    }                                                                                                           \
    RAY_DEEPEP_MULTIVERSION void set_scaled_##NAME(float* __restrict acc, const T* __restrict src, int64_t n,   \
                                                   float w) {                                                   \
        for (int64_t i = 0; i < n; ++i) acc[i] = 0.0f + w * to_float(src[i]);                                   \
    }                                                                                                           \
    RAY_DEEPEP_MULTIVERSION void add_##NAME(float* __restrict acc, const T* __restrict src, int64_t n) {        \
        for (int64_t i = 0; i < n; ++i) acc[i] += to_float(src[i]);                                             \
    }                                                                                                           \
    RAY_DEEPEP_MULTIVERSION void add_scaled_##NAME(float* __restrict acc, const T* __restrict src, int64_t n,   \
                                                   float w) {                                                   \
        for (int64_t i = 0; i < n; ++i) acc[i] += w * to_float(src[i]);                                         \
    }                                                                                                           \
    RAY_DEEPEP_MULTIVERSION [[maybe_unused]] void store_##NAME(T* __restrict dst, const float* __restrict acc,  \
                                                               int64_t n) {                                     \
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

void widen_row(float* dst, const void* src, int64_t count, DType dtype) {
    switch (dtype) {
        case DType::kFloat32: std::memcpy(dst, src, count * sizeof(float)); return;
        case DType::kBFloat16: return widen_bfloat16(dst, static_cast<const BFloat16*>(src), count);
        case DType::kFloat16: return widen_float16(dst, static_cast<const Float16*>(src), count);
        case DType::kFloat8E4M3: return;
    }
}

void set_row(float* acc, const void* src, int64_t hidden, DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return set_float32(acc, static_cast<const float*>(src), hidden);
        case DType::kBFloat16: return set_bfloat16(acc, static_cast<const BFloat16*>(src), hidden);
        case DType::kFloat16: return set_float16(acc, static_cast<const Float16*>(src), hidden);
        case DType::kFloat8E4M3: return;
    }
}

void set_scaled_row(float* acc, const void* src, int64_t hidden, DType dtype, float weight) {
    switch (dtype) {
        case DType::kFloat32: return set_scaled_float32(acc, static_cast<const float*>(src), hidden, weight);
        case DType::kBFloat16: return set_scaled_bfloat16(acc, static_cast<const BFloat16*>(src), hidden, weight);
        case DType::kFloat16: return set_scaled_float16(acc, static_cast<const Float16*>(src), hidden, weight);
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

namespace {

// Elements converted at a time before they are streamed: stays in the first-level cache.
constexpr int64_t kBlock = 512;

void store_block(void* dst, const float* acc, int64_t count, DType dtype) {
    switch (dtype) {
        case DType::kFloat32: std::memcpy(dst, acc, count * sizeof(float)); return;
        case DType::kBFloat16: return store_bfloat16(static_cast<BFloat16*>(dst), acc, count);
        case DType::kFloat16: return store_float16(static_cast<Float16*>(dst), acc, count);
        case DType::kFloat8E4M3: return;
    }
}

}  // namespace

void copy_row(void* dst, const void* src, int64_t bytes, bool streamed) {
#if defined(__SSE2__)
    if (streamed && reinterpret_cast<uintptr_t>(dst) % 16 == 0) {
        auto* to = static_cast<__m128i*>(dst);
        const auto* from = static_cast<const __m128i*>(src);
        const int64_t vectors = bytes / 16;
        int64_t i = 0;
        for (; i + 4 <= vectors; i += 4) {
            const __m128i a = _mm_loadu_si128(from + i), b = _mm_loadu_si128(from + i + 1);
            const __m128i c = _mm_loadu_si128(from + i + 2), d = _mm_loadu_si128(from + i + 3);
            _mm_stream_si128(to + i, a);
            _mm_stream_si128(to + i + 1, b);
            _mm_stream_si128(to + i + 2, c);
            _mm_stream_si128(to + i + 3, d);
        }
        for (; i < vectors; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
        std::memcpy(to + vectors, from + vectors, bytes % 16);
        return;
    }
#endif
    (void)streamed;
    std::memcpy(dst, src, bytes);
}

void clear_row(void* dst, int64_t bytes, bool streamed) {
#if defined(__SSE2__)
    if (streamed && reinterpret_cast<uintptr_t>(dst) % 16 == 0) {
        auto* to = static_cast<__m128i*>(dst);
        const int64_t vectors = bytes / 16;
        for (int64_t i = 0; i < vectors; ++i) _mm_stream_si128(to + i, _mm_setzero_si128());
        std::memset(to + vectors, 0, bytes % 16);
        return;
    }
#endif
    (void)streamed;
    std::memset(dst, 0, bytes);
}

void finish_streaming() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

void store_row(void* dst, const float* acc, int64_t hidden, DType dtype, bool streamed) {
    if (!streamed) return store_block(dst, acc, hidden, dtype);
    if (dtype == DType::kFloat32) return copy_row(dst, acc, hidden * sizeof(float), true);
    alignas(16) std::byte block[kBlock * 2];
    const int64_t size = element_size(dtype);
    for (int64_t i = 0; i < hidden; i += kBlock) {
        const int64_t count = std::min(kBlock, hidden - i);
        store_block(block, acc + i, count, dtype);
        copy_row(static_cast<std::byte*>(dst) + i * size, block, count * size, true);
    }
}

}  // namespace ray_deepep
