// Shared by the two plan kernels.
#pragma once

#include "cuda/params.h"

namespace ray_deepep {

inline constexpr unsigned kAll = 0xffffffffu;

void launch_plan_bases(const PlanParams& params, cudaStream_t stream);
void launch_plan_lists(const PlanParams& params, cudaStream_t stream);

}  // namespace ray_deepep
