#include "cuda/low_latency_layout.h"

#include <string>

#include "common/cursor.h"
#include "common/fault.h"

namespace ray_deepep {
namespace {

std::string gib(int64_t bytes) { return std::to_string(static_cast<double>(bytes) / (1 << 30)); }

}  // namespace

LowLatencyLayout make_low_latency_layout(const DeviceLowLatencySizes& sizes) {
    if (sizes.num_ranks > kMaxRanks) {
        throw ArgumentError("num_ranks", std::to_string(sizes.num_ranks),
                            "must be at most " + std::to_string(kMaxRanks) + " on GPUs of one domain");
    }
    const int64_t routes = sizes.max_tokens * sizes.num_topk;
    LowLatencyLayout layout;
    Cursor mail, area, segment;
    mail.take(sizeof(MailHeader));
    layout.topk_idx_at = mail.take(routes * 4);
    layout.topk_weights_at = mail.take(routes * 4);
    layout.mail_bytes = mail.end();
    layout.scales_at = area.take(sizes.max_tokens * (sizes.hidden / 128) * 4);
    // The most: a combine that sends every route.
    const int64_t rows = sizes.num_ranks * sizes.max_tokens * sizes.max_routes_here();
    layout.rows_at = area.take(std::max(rows * sizes.max_element_size, sizes.max_tokens * int64_t{4}) * sizes.hidden);
    layout.signals_at = segment.take(kMaxRanks * 8);
    layout.left_at = segment.take(kMaxRanks * 4);
    layout.masks_at = segment.take(kMaxRanks * 8);
    layout.admitted_at = segment.take(kMaxRanks * 8);
    layout.rejoining_at = segment.take(kMaxRanks * 4);
    for (int64_t& at : layout.mail_at) at = segment.take(sizes.num_ranks * mail.end());
    for (int64_t& at : layout.area_at) at = segment.take(area.end());
    layout.bytes = segment.end();
    if (layout.bytes > sizes.max_segment_bytes) {
        throw ArgumentError("low_latency_max_tokens", std::to_string(sizes.max_tokens),
                            "needs " + gib(layout.bytes) + " GiB of heap on each GPU, which has " +
                                gib(sizes.max_segment_bytes) + " GiB");
    }
    return layout;
}

}  // namespace ray_deepep
