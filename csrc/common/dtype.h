// Row element types and their conversions to float32, rounding to nearest even as torch does.
#pragma once

#include <cstdint>
#include <cstring>

namespace ray_deepep {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8E4M3 = 3 };

#ifdef __CUDACC__
#define RAY_DEEPEP_HOST_DEVICE __host__ __device__
#else
#define RAY_DEEPEP_HOST_DEVICE
#endif

RAY_DEEPEP_HOST_DEVICE inline int64_t element_size(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return 4;
        case DType::kBFloat16:
        case DType::kFloat16: return 2;
        case DType::kFloat8E4M3: return 1;
    }
    return 0;
}

inline const char* to_string(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return "float32";
        case DType::kBFloat16: return "bfloat16";
        case DType::kFloat16: return "float16";
        case DType::kFloat8E4M3: return "float8_e4m3fn";
    }
    return "unknown";
}

struct BFloat16 {
    uint16_t bits;
};
#ifndef __CUDACC__
// nvcc does not know the host's half type; kernels use CUDA's own.
struct Float16 {
    _Float16 value;
};
#endif

inline float to_float(float v) { return v; }
inline float to_float(BFloat16 v) {
    const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
    float out;
    std::memcpy(&out, &wide, sizeof(out));
    return out;
}
#ifndef __CUDACC__
inline float to_float(Float16 v) { return static_cast<float>(v.value); }
#endif

template <typename T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
    return v;
}
template <>
inline BFloat16 from_float<BFloat16>(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}
#ifndef __CUDACC__
template <>
inline Float16 from_float<Float16>(float v) {
    return Float16{static_cast<_Float16>(v)};
}
#endif

}  // namespace ray_deepep
