// What a rank shows its peers of the arguments of an operation: small numbers that must be equal on all ranks. Which
// one is which, and how an error shows it, in the words of the CPU core (host/host_buffer.cpp).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

namespace ray_deepep {

struct Signature {
    std::array<int32_t, 8> fields{};
    uint32_t hash() const;
};

// Places in `fields`.
struct DispatchFields {
    enum { kOperation, kDType, kNumTopk, kLayout, kAlignment, kRoom, kCached, kScaleByWeights };
};
struct CombineFields {
    enum { kOperation, kDType, kNumTopk, kLayout, kReduce, kWeighted, kRowWeights };
};

struct SignatureDifference {
    std::string field, expected, seen;
};

// The first argument that differs; nothing if none does.
std::optional<SignatureDifference> find_difference(const Signature& expected, const Signature& seen);

}  // namespace ray_deepep
