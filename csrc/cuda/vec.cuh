// Element types on the device, and 16-byte vectors of them. Products and sums are never fused: the CPU core's bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace ray_deepep {

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }

template <typename T>
__device__ T narrow(float v);
template <>
__device__ inline float narrow<float>(float v) {
    return v;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half narrow<__half>(float v) {
    return __float2half_rn(v);
}

// 16 bytes of T.
template <typename T>
struct Vec {
    static constexpr int kCount = 16 / sizeof(T);
    union {
        uint4 bits;
        T items[kCount];
    };
    __device__ Vec() {}
};

template <typename T>
__device__ inline Vec<T> load_vec(const std::byte* row, int64_t i) {
    Vec<T> v;
    v.bits = reinterpret_cast<const uint4*>(row)[i];
    return v;
}

template <typename T>
__device__ inline void store_vec(std::byte* row, int64_t i, const Vec<T>& v) {
    reinterpret_cast<uint4*>(row)[i] = v.bits;
}

// Elements as float32, two at a time where that is one instruction each.
__device__ inline void widen_all(const Vec<float>& v, float* out) {
#pragma unroll
    for (int j = 0; j < Vec<float>::kCount; ++j) out[j] = v.items[j];
}
__device__ inline void widen_all(const Vec<__nv_bfloat16>& v, float* out) {
    const uint32_t words[4] = {v.bits.x, v.bits.y, v.bits.z, v.bits.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        out[2 * j] = __uint_as_float(words[j] << 16);
        out[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
    }
}
__device__ inline void widen_all(const Vec<__half>& v, float* out) {
#pragma unroll
    for (int j = 0; j < Vec<__half>::kCount; ++j) out[j] = __half2float(v.items[j]);
}

// float32 sums of one vector.
template <typename T>
struct Accumulator {
    float sums[Vec<T>::kCount];
    __device__ Accumulator() {
#pragma unroll
        for (float& sum : sums) sum = 0.0f;
    }
    __device__ void add(const Vec<T>& v) {
        float values[Vec<T>::kCount];
        widen_all(v, values);
#pragma unroll
        for (int j = 0; j < Vec<T>::kCount; ++j) sums[j] = __fadd_rn(sums[j], values[j]);
    }
    __device__ void add_scaled(const Vec<T>& v, float weight) {
        float values[Vec<T>::kCount];
        widen_all(v, values);
#pragma unroll
        for (int j = 0; j < Vec<T>::kCount; ++j) sums[j] = __fadd_rn(sums[j], __fmul_rn(weight, values[j]));
    }
    __device__ Vec<T> value() const {
        Vec<T> v;
#pragma unroll
        for (int j = 0; j < Vec<T>::kCount; ++j) v.items[j] = narrow<T>(sums[j]);
        return v;
    }
};

// Call launch(T{}) with the element type of `dtype`; false for a type that is not summed.
template <typename Launch>
bool with_float_type(DType dtype, Launch launch) {
    switch (dtype) {
        case DType::kFloat32: return launch(float{}), true;
        case DType::kBFloat16: return launch(__nv_bfloat16{}), true;
        case DType::kFloat16: return launch(__half{}), true;
        case DType::kFloat8E4M3: return false;
    }
    return false;
}

}  // namespace ray_deepep
