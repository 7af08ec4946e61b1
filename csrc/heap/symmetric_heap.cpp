#include "heap/symmetric_heap.h"

namespace ray_deepep {

SharedHeap allocate_shared_heap(Domain& domain, size_t bytes, const AgreedSizes& sizes, double deadline_s) {
    SharedHeap heap;
    heap.segments.resize(domain.num_ranks());
    HeapOffer own;
    heap.segments[domain.rank()] = Segment::create(bytes, &own.fd);
    const std::vector<HeapOffer> offers = domain.exchange_offers(own, sizes, deadline_s);
    for (int peer = 0; peer < domain.num_ranks(); ++peer) {
        if (peer != domain.rank()) heap.segments[peer] = Segment::map(offers[peer].fd.get(), bytes);
    }
    return heap;
}

}  // namespace ray_deepep
