// Places in groups, in order, by one warp.
#pragma once

#include <cstdint>

namespace ray_deepep {

// Position of this lane's item among earlier ones with the same key; `counter[key]` carries on from step to step. All
// lanes of a warp call it; those not `active` get -1.
__device__ inline int take_ticket(int* counter, int key, bool active) {
    constexpr unsigned kAllLanes = 0xffffffffu;
    const int lane = threadIdx.x % 32;
    const unsigned same = __match_any_sync(kAllLanes, active ? key : -1 - lane);
    const int leader = __ffs(same) - 1;
    int base = 0;
    if (active && lane == leader) {
        base = counter[key];
        counter[key] = base + __popc(same);
    }
    base = __shfl_sync(kAllLanes, base, leader);
    __syncwarp();
    return active ? base + __popc(same & ((1u << lane) - 1)) : -1;
}

}  // namespace ray_deepep
