#include "cuda/signature.h"

#include <vector>

#include "common/dtype.h"
#include "common/fault.h"
#include "common/plan.h"

namespace ray_deepep {
namespace {

using Show = std::string (*)(int32_t value);

struct Field {
    int place;
    const char* name;
    Show show;
};

std::string number(int32_t value) { return std::to_string(value); }
std::string flag(int32_t value) { return value != 0 ? "True" : "False"; }
std::string number_or_none(int32_t value) { return value != 0 ? std::to_string(value) : "None"; }
template <typename T>
std::string word(int32_t value) {
    return to_string(static_cast<T>(value));
}
// A captured graph plans anew at each replay, so a GPU's plans have no number that the host knows.
std::string handle(int32_t cached) { return cached != 0 ? "that of an earlier one" : "0"; }

std::vector<Field> fields_of(const Signature& signature) {
    const auto operation = static_cast<Operation>(signature.fields[DispatchFields::kOperation]);
    if (operation == Operation::kDispatch) {
        const bool padded = static_cast<LayoutKind>(signature.fields[DispatchFields::kLayout]) == LayoutKind::kPadded;
        return {{DispatchFields::kDType, "dtype", word<DType>},
                {DispatchFields::kCached, "handle (dispatch number)", handle},
                {DispatchFields::kNumTopk, "num_topk", number},
                {DispatchFields::kLayout, "layout", word<LayoutKind>},
                {DispatchFields::kAlignment, "layout.alignment", number},
                {DispatchFields::kScaleByWeights, "scale_by_weights", flag},
                padded ? Field{DispatchFields::kRoom, "layout.capacity", number}
                       : Field{DispatchFields::kRoom, "max_recv_tokens", number_or_none}};
    }
    return {{CombineFields::kDType, "dtype", word<DType>},        {CombineFields::kNumTopk, "num_topk", number},
            {CombineFields::kLayout, "layout", word<LayoutKind>}, {CombineFields::kReduce, "reduce", word<Reduce>},
            {CombineFields::kWeighted, "weighted", flag},         {CombineFields::kRowWeights, "topk_weights", flag}};
}

}  // namespace

uint32_t Signature::hash() const {
    uint32_t hash = 2166136261u;
    for (const int32_t field : fields) hash = (hash ^ static_cast<uint32_t>(field)) * 16777619u;
    return hash;
}

std::optional<SignatureDifference> find_difference(const Signature& expected, const Signature& seen) {
    const int operation = DispatchFields::kOperation;
    if (expected.fields[operation] != seen.fields[operation]) {
        return SignatureDifference{"operation", word<Operation>(expected.fields[operation]),
                                   word<Operation>(seen.fields[operation])};
    }
    for (const Field& field : fields_of(expected)) {
        const int32_t a = expected.fields[field.place], b = seen.fields[field.place];
        if (a != b) return SignatureDifference{field.name, field.show(a), field.show(b)};
    }
    return std::nullopt;
}

}  // namespace ray_deepep
