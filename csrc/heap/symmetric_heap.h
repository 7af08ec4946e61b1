// A heap of which every rank owns one segment and reads all.
#pragma once

#include <cstddef>
#include <vector>

#include "heap/domain.h"
#include "heap/segment.h"

namespace ray_deepep {

struct SharedHeap {
    std::vector<Segment> segments;  // by rank
};

// Anonymous shared memory of `bytes` per rank; collective over the domain. Errors as Domain::exchange_offers.
SharedHeap allocate_shared_heap(Domain& domain, size_t bytes, const AgreedSizes& sizes, double deadline_s);

}  // namespace ray_deepep
