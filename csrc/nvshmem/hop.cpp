#include "nvshmem/hop.h"

#include <string>

#include "cuda/check.h"

namespace ray_deepep {

Hop::Hop(const HopSizes& sizes, const std::vector<int>& pes, uintptr_t zone, const HopFaultWords& faults)
    : sizes_(sizes), layout_(make_hop_layout(sizes)) {
    if (static_cast<int>(pes.size()) != sizes.num_nodes) {
        throw ArgumentError("pes", std::to_string(pes.size()), "must be one for each node");
    }
    blocks_ = device_memory<uint32_t>(sizeof(uint32_t));
    check_cuda(cudaMemset(blocks_.get(), 0, sizeof(uint32_t)), "cudaMemset");
    frame_.control = pointer<DeviceControl>(faults.control);
    frame_.status = pointer<HostStatus>(faults.status);
    frame_.deadline_ns = static_cast<uint64_t>(faults.deadline_s * 1e9);
    frame_.blocks = blocks_.get();
    frame_.zone = pointer<std::byte>(zone);
    frame_.layout = layout_;
    for (int node = 0; node < sizes.num_nodes; ++node) frame_.pe[node] = pes[node];
    frame_.node_rank = sizes.node_rank;
    frame_.num_nodes = sizes.num_nodes;
    frame_.num_node_experts = sizes.num_node_experts;
    frame_.part_tokens = sizes.part_tokens;
    // Signals of an earlier buffer must not be met, nor routing that nobody sent.
    check_cuda(cudaMemset(frame_.zone, 0, layout_.bytes), "cudaMemset of the hop's zone");
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

uintptr_t Hop::area(uint32_t sequence) const {
    return reinterpret_cast<uintptr_t>(frame_.zone) + layout_.area_at[sequence & 1];
}

HopFrame Hop::frame(const HopCall& call) const {
    if (call.num_tokens > sizes_.part_tokens || call.num_topk > sizes_.num_topk) {
        throw ArgumentError(
            "num_tokens, num_topk", std::to_string(call.num_tokens) + ", " + std::to_string(call.num_topk),
            "must be at most " + std::to_string(sizes_.part_tokens) + ", " + std::to_string(sizes_.num_topk));
    }
    HopFrame frame = frame_;
    frame.operation = static_cast<uint32_t>(call.operation);
    frame.sequence = call.sequence;
    frame.signature = call.signature;
    frame.num_tokens = call.num_tokens;
    frame.num_topk = call.num_topk;
    return frame;
}

void Hop::dispatch(const HopCall& call, const HopDispatchArgs& args, cudaStream_t stream) const {
    HopDispatchParams params;
    params.frame = frame(call);
    params.x = pointer<const std::byte>(args.x);
    params.scales = pointer<const float>(args.x_scales);
    params.topk_idx = pointer<const int64_t>(args.topk_idx);
    params.topk_weights = pointer<const float>(args.topk_weights);
    params.places = pointer<const int32_t>(args.locations);
    params.capacity = args.capacity;
    params.row_bytes = sizes_.hidden * element_size(args.dtype);
    params.scale_bytes = sizes_.hidden / 128 * 4;
    params.has_routing = !args.cached;
    launch_hop_dispatch(params, call.num_sms, stream);
}

void Hop::give_back(const HopCall& call, uintptr_t landed_idx, int64_t element_size, bool weights,
                    cudaStream_t stream) const {
    HopReturnParams params;
    params.frame = frame(call);
    params.landed_idx = pointer<const int64_t>(landed_idx);
    params.row_bytes = sizes_.hidden * element_size;
    params.has_weights = weights;
    launch_hop_return(params, call.num_sms, stream);
}

void Hop::give_routes_back(const HopCall& call, uintptr_t landed_idx, uintptr_t routes, uintptr_t home,
                           int64_t element_size, cudaStream_t stream) const {
    HopRoutesParams params;
    params.frame = frame(call);
    params.landed_idx = pointer<const int64_t>(landed_idx);
    params.routes = pointer<const std::byte>(routes);
    params.home = pointer<std::byte>(home);
    params.row_bytes = sizes_.hidden * element_size;
    launch_hop_routes(params, call.num_sms, stream);
}

void Hop::sum(const HopCall& call, uintptr_t topk_idx, uintptr_t bias, uintptr_t out, uintptr_t out_weights,
              DType dtype, cudaStream_t stream) const {
    HopSumParams params;
    params.frame = frame(call);
    params.topk_idx = pointer<const int64_t>(topk_idx);
    params.bias = pointer<const std::byte>(bias);
    params.out = pointer<std::byte>(out);
    params.out_weights = pointer<float>(out_weights);
    params.hidden = sizes_.hidden;
    params.dtype = dtype;
    launch_hop_sum(params, call.num_sms, stream);
}

}  // namespace ray_deepep
