#include "nvshmem/hop_layout.h"

#include <string>

#include "common/cursor.h"
#include "common/fault.h"
#include "cuda/segment_layout.h"

namespace ray_deepep {

HopLayout make_hop_layout(const HopSizes& sizes) {
    if (sizes.num_nodes < 1 || sizes.num_nodes > kMaxNodes) {
        throw ArgumentError("num_nodes", std::to_string(sizes.num_nodes),
                            "must be in [1, " + std::to_string(kMaxNodes) + "]");
    }
    if (sizes.part_tokens < 0 || sizes.part_tokens % kChunkTokens != 0) {
        throw ArgumentError("part_tokens", std::to_string(sizes.part_tokens),
                            "must be a multiple of " + std::to_string(kChunkTokens));
    }
    const int64_t tokens = sizes.num_nodes * sizes.part_tokens, routes = tokens * sizes.num_topk;
    const int64_t row_bytes = sizes.hidden * sizes.max_element_size, scale_bytes = sizes.hidden / 128 * 4;
    Cursor cursor;
    HopAreaLayout area;
    area.landed_idx_at = cursor.take(routes * 8);
    area.landed_weights_at = cursor.take(routes * 4);
    area.landed_places_at = cursor.take(routes * 4);
    area.landed_scales_at = cursor.take(tokens * scale_bytes);
    area.landed_rows_at = cursor.take(tokens * row_bytes);
    area.staged_idx_at = cursor.take(routes * 8);
    area.staged_weights_at = cursor.take(routes * 4);
    area.staged_places_at = cursor.take(routes * 4);
    area.staged_scales_at = cursor.take(sizes.part_tokens * scale_bytes);
    area.staged_rows_at = cursor.take(tokens * row_bytes);
    area.bytes = cursor.end();

    Cursor zone;
    HopLayout layout;
    layout.area = area;
    layout.signals_at = zone.take(kMaxNodes * 8);
    layout.area_at[0] = zone.take(area.bytes);
    layout.area_at[1] = zone.take(area.bytes);
    layout.bytes = zone.end();
    return layout;
}

}  // namespace ray_deepep
