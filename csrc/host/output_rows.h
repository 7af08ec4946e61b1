// Where the expert outputs of a combine lie: in one tensor of the plan's layout, or in a block per local expert.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/plan.h"

namespace ray_deepep {

class OutputRows {
  public:
    // One tensor.
    OutputRows(const std::byte* rows, int64_t row_bytes) : rows_(rows), row_bytes_(row_bytes) {}

    // A block per local expert: of its group if expert-major; of its slots for each source, in order, if padded.
    OutputRows(const std::vector<uintptr_t>& blocks, const Plan& plan, int64_t row_bytes)
        : row_bytes_(row_bytes), num_local_(plan.geometry.num_local_experts()) {
        for (const uintptr_t block : blocks) blocks_.push_back(reinterpret_cast<const std::byte*>(block));
        for (int64_t source = 0; source < plan.geometry.num_sources(); ++source) {
            for (int64_t e = 0; e < num_local_; ++e) {
                const int64_t before = (source * num_local_ + e - source) * plan.layout.capacity;
                first_slot_.push_back(plan.layout.kind == LayoutKind::kPadded ? before : plan.expert_offset[e]);
            }
        }
    }

    // The row of a route from `source` to local expert `expert`, in `slot` of the layout.
    const std::byte* row(int source, int expert, int64_t slot) const {
        if (blocks_.empty()) return rows_ + slot * row_bytes_;
        return blocks_[expert] + (slot - first_slot_[source * num_local_ + expert]) * row_bytes_;
    }

  private:
    const std::byte* rows_ = nullptr;
    int64_t row_bytes_;
    int64_t num_local_ = 0;
    std::vector<const std::byte*> blocks_;
    // [num_sources, num_local]: the slot that would be row 0 of the expert's block, for rows of that source.
    std::vector<int64_t> first_slot_;
};

}  // namespace ray_deepep
