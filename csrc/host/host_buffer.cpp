// What every operation shares: areas, headers, agreement, signals.
#include "host/host_buffer.h"

#include <algorithm>
#include <string>
#include <utility>

namespace ray_deepep {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
double gib(int64_t bytes) { return static_cast<double>(bytes) / (1 << 30); }

}  // namespace

int64_t BufferSizes::area_bytes(int num_ranks) const {
    // In doubles first: generous limits times each other may pass 2^63.
    const double tokens = static_cast<double>(max_tokens), routes = tokens * num_topk;
    const double row = static_cast<double>(hidden) * 4;
    const double slots = std::max(routes, static_cast<double>(max_capacity) * num_experts * num_parts);
    const double dispatch =
        tokens * (row + hidden / 32.0 + 64) + routes * 12 + num_parts * (num_ranks + num_experts + 1) * 8.0;
    // Aligned groups: room for an alignment of up to 256 rows.
    const double aligned = 256.0 * num_experts / num_ranks;
    const double combine = (num_ranks * slots + aligned) * (row + 4.0 * num_topk);
    return round_up(static_cast<int64_t>(std::min(std::max(dispatch, combine) + 16 * 1024, 1e15)), kPage);
}

HostBuffer::HostBuffer(std::shared_ptr<Domain> domain, const BufferSizes& sizes, double bootstrap_deadline_s,
                       double deadline_s, int num_threads, Interrupt interrupt)
    : domain_(std::move(domain)),
      geometry_{domain_->rank(), domain_->num_ranks(), sizes.num_experts, sizes.num_parts},
      sizes_(sizes),
      deadline_s_(deadline_s),
      traffic_(domain_->num_ranks()),
      threads_(num_threads) {
    const int64_t largest = (sizes.max_segment_bytes - kPage) / 2 / kPage * kPage;
    area_bytes_ = std::min(sizes.area_bytes(geometry_.num_ranks), largest);
    if (largest < 64 * kPage) {
        throw ArgumentError("heap_gib", std::to_string(gib(sizes.max_segment_bytes)), "must be at least 0.001");
    }
    const AgreedSizes agreed{{"num_experts", "hidden", "num_topk", "max_tokens", "max_capacity", "num_parts",
                              "low_latency_max_tokens", "heap_bytes", "symm_bytes"},
                             {static_cast<uint64_t>(sizes.num_experts), static_cast<uint64_t>(sizes.hidden),
                              static_cast<uint64_t>(sizes.num_topk), static_cast<uint64_t>(sizes.max_tokens),
                              static_cast<uint64_t>(sizes.max_capacity), static_cast<uint64_t>(sizes.num_parts),
                              static_cast<uint64_t>(sizes.low_latency_max_tokens), static_cast<uint64_t>(area_bytes_),
                              static_cast<uint64_t>(sizes.symm_bytes)}};
    const int64_t bytes = kPage + 2 * area_bytes_ + round_up(sizes.symm_bytes, kPage);
    heap_ = std::make_shared<SharedHeap>(allocate_shared_heap(*domain_, bytes, agreed, bootstrap_deadline_s));
    std::vector<ControlBlock*> blocks;
    for (const Segment& segment : heap_->segments) blocks.push_back(reinterpret_cast<ControlBlock*>(segment.data()));
    signals_ = std::make_unique<Signals>(domain_.get(), std::move(blocks), &fault_slot_, std::move(interrupt));
}

void HostBuffer::close() {
    if (signals_ == nullptr) return;
    signals_->close();
    signals_.reset();
    heap_.reset();
}

std::byte* HostBuffer::area(int rank) const {
    return heap_->segments[rank].data() + kPage + (sequence_ & 1) * area_bytes_;
}

int64_t HostBuffer::reserve(int64_t bytes) {
    const int64_t begin = used_;
    used_ += round_up(bytes, 64);
    if (used_ > area_bytes_) {
        throw ArgumentError("heap_gib", std::to_string(gib(kPage + 2 * area_bytes_)),
                            "this operation needs " + std::to_string(gib(kPage + 2 * used_)) +
                                " GiB of a rank's heap; make the buffer with larger sizes or raise heap_gib "
                                "(RAY_DEEPEP_HEAP_GIB)");
    }
    return area(geometry_.rank) - heap_->segments[geometry_.rank].data() + begin;
}

OpHeader& HostBuffer::open_operation(Operation operation) {
    if (signals_ == nullptr) throw ArgumentError("buffer", "closed", "must be open");
    ++sequence_;
    used_ = kPage;
    auto& header = *reinterpret_cast<OpHeader*>(area(geometry_.rank));
    header = OpHeader{};
    header.operation = operation;
    header.sequence = sequence_;
    return header;
}

void HostBuffer::publish(OpHeader& header) {
    header.published_ns = now_ns();
    signals_->raise(header.sequence);
    signals_->wait_published(header.sequence, header.operation, deadline_s_);
    check_agreement();
    traffic_.note_used(used_);
    for (int peer = 0; peer < geometry_.num_ranks; ++peer) {
        // By the peer's clock: ranks are waited for one after the other, and that is not their fault.
        traffic_.add_wait(peer, this->header(peer).published_ns - header.published_ns);
    }
}

void HostBuffer::finish() {
    bool anyone = false;
    for (int rank = 0; rank < geometry_.num_ranks; ++rank) anyone = anyone || header(rank).in_place != 0;
    signals_->finish(sequence_, anyone);
    const OpHeader& own = header(geometry_.rank);
    if (own.in_place != 0) signals_->wait_finished(sequence_, own.operation, deadline_s_);
}

HostBuffer::SymmRegion HostBuffer::symm_region() const {
    if (heap_ == nullptr) throw ArgumentError("buffer", "closed", "must be open");
    return SymmRegion{heap_, heap_->segments[geometry_.rank].data() + kPage + 2 * area_bytes_, sizes_.symm_bytes};
}

int64_t HostBuffer::symm_offset(uintptr_t address) const {
    const auto segment = reinterpret_cast<uintptr_t>(heap_->segments[geometry_.rank].data());
    const uintptr_t begin = segment + kPage + 2 * area_bytes_;
    const bool inside = address >= begin && address < begin + sizes_.symm_bytes;
    return inside ? static_cast<int64_t>(address - segment) : 0;
}

void HostBuffer::check_agreement() const {
    const OpHeader& first = header(0);
    for (int rank = 0; rank < geometry_.num_ranks; ++rank) {
        const OpHeader& other = header(rank);
        const auto differ = [&](const char* field, const std::string& expected, const std::string& seen) {
            if (expected != seen) throw MismatchError(first.operation, rank, field, expected, seen);
        };
        const auto number = [&](const char* field, int64_t expected, int64_t seen) {
            if (expected != seen) differ(field, std::to_string(expected), std::to_string(seen));
        };
        const auto flag = [&](const char* field, int32_t expected, int32_t seen) {
            if (expected != seen) differ(field, expected != 0 ? "True" : "False", seen != 0 ? "True" : "False");
        };
        differ("operation", to_string(first.operation), to_string(other.operation));
        differ("dtype", to_string(first.dtype), to_string(other.dtype));
        number("handle (dispatch number)", first.plan_sequence, other.plan_sequence);
        number("num_topk", first.num_topk, other.num_topk);
        differ("layout", to_string(first.layout_kind), to_string(other.layout_kind));
        number("layout.alignment", first.alignment, other.alignment);
        number("layout.capacity", first.capacity, other.capacity);
        flag("scale_by_weights", first.scale_by_weights, other.scale_by_weights);
        if (first.max_recv_tokens != other.max_recv_tokens) {
            const auto room = [](int64_t rows) { return rows != 0 ? std::to_string(rows) : "None"; };
            differ("max_recv_tokens", room(first.max_recv_tokens), room(other.max_recv_tokens));
        }
        differ("reduce", to_string(static_cast<Reduce>(first.reduce)), to_string(static_cast<Reduce>(other.reduce)));
        flag("weighted", first.weighted, other.weighted);
        flag("topk_weights", first.has_row_weights, other.has_row_weights);
    }
}

}  // namespace ray_deepep
