#include "common/fault.h"

namespace ray_deepep {

const char* to_string(Operation operation) {
    switch (operation) {
        case Operation::kDispatch: return "dispatch";
        case Operation::kCombine: return "combine";
        case Operation::kCombineWeights: return "combine_weights";
        case Operation::kAllocate: return "allocate";
        case Operation::kLowLatencyDispatch: return "low_latency_dispatch";
        case Operation::kLowLatencyCombine: return "low_latency_combine";
        case Operation::kNone: break;
    }
    return "none";
}

const char* to_string(Cause cause) {
    switch (cause) {
        case Cause::kTimeout: return "timeout";
        case Cause::kPeerDied: return "peer_died";
        case Cause::kPeerClosed: return "peer_closed";
        case Cause::kAborted: return "aborted";
        case Cause::kNone: break;
    }
    return "none";
}

}  // namespace ray_deepep
