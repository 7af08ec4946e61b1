#include "cuda/segment_layout.h"

#include <algorithm>
#include <string>

#include "common/cursor.h"
#include "common/fault.h"

namespace ray_deepep {

SegmentLayout make_segment_layout(const DeviceSizes& sizes) {
    // Signals, and what kernels know of peers, have room for so many.
    if (sizes.num_ranks > kMaxRanks) {
        throw ArgumentError("num_ranks", std::to_string(sizes.num_ranks),
                            "must be at most " + std::to_string(kMaxRanks) + " on GPUs of one domain");
    }
    if (sizes.num_parts < 1 || sizes.num_parts * sizes.num_ranks > kMaxSources) {
        throw ArgumentError("num_parts", std::to_string(sizes.num_parts),
                            "times the ranks must be at most " + std::to_string(kMaxSources) + " on GPUs");
    }
    if (sizes.num_parts > 1 && sizes.max_tokens % (int64_t{sizes.num_parts} * kChunkTokens) != 0) {
        throw ArgumentError("max_tokens", std::to_string(sizes.max_tokens),
                            "must be " + std::to_string(sizes.num_parts) + " parts of whole chunks of " +
                                std::to_string(kChunkTokens) + " tokens");
    }
    // Whole chunks: the plan loads a chunk before it knows how many tokens there are.
    const int64_t routes = sizes.num_chunks() * kChunkTokens * sizes.num_topk;
    Cursor cursor;
    AreaLayout area;
    area.header_at = cursor.take(sizeof(AreaHeader));
    area.rank_total_at = cursor.take(int64_t{sizes.num_parts} * sizes.num_ranks * 4);
    area.expert_total_at = cursor.take(int64_t{sizes.num_parts} * sizes.num_experts * 4);
    area.rank_columns = (sizes.num_ranks + 3) / 4 * 4;
    area.expert_columns = (sizes.num_experts + 3) / 4 * 4;
    area.chunk_rank_at = cursor.take(sizes.num_chunks() * area.rank_columns * 4);
    area.chunk_expert_at = cursor.take(sizes.num_chunks() * area.expert_columns * 4);
    area.topk_idx_at = cursor.take(routes * 4);
    area.topk_weights_at = cursor.take(routes * 4);
    area.locations_at = cursor.take(routes * 4);
    area.row_weights_at = cursor.take(std::max(sizes.max_rows, sizes.max_recv_tokens * sizes.num_topk) * 4);
    area.scales_at = cursor.take(sizes.max_tokens * (sizes.hidden / 128) * 4);
    area.rows_at = cursor.take(sizes.num_staged_rows() * sizes.hidden * sizes.max_element_size);
    area.bytes = cursor.end();

    Cursor segment;
    SegmentLayout layout;
    layout.area = area;
    layout.num_chunks = sizes.num_chunks();
    layout.num_parts = sizes.num_parts;
    layout.part_chunks = static_cast<int>(std::max<int64_t>(sizes.num_chunks() / sizes.num_parts, 1));
    layout.num_ready_flags = sizes.num_ready_flags();
    layout.signals_at = segment.take(kMaxRanks * 8);
    layout.done_at = segment.take(kMaxRanks * 8);
    layout.ready_at = segment.take(sizes.num_ranks * layout.num_ready_flags * kReadyFlagBytes);
    layout.area_at[0] = segment.take(area.bytes);
    layout.area_at[1] = segment.take(area.bytes);
    layout.symm_bytes = sizes.symm_bytes;
    layout.symm_at = segment.take(sizes.symm_bytes);
    layout.bytes = segment.end();
    return layout;
}

}  // namespace ray_deepep
