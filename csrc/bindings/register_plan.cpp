// The plan arithmetic by itself, for `ray-deepep plan --simulate`: routing of many ranks, the plan of one.
#include "bindings/bindings.h"
#include "common/fault.h"
#include "common/plan.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

namespace py = pybind11;

namespace ray_deepep {
namespace {

// What all ranks would have published, each with equally many tokens.
class RoutingTable {
  public:
    // topk_idx: int32 [num_ranks, num_tokens, num_topk]; it must outlive the table.
    RoutingTable(int num_ranks, int num_experts, int64_t num_tokens, int num_topk, uintptr_t topk_idx)
        : geometry_{0, num_ranks, num_experts, 1}, num_topk_(num_topk), part_begin_{0, num_tokens} {
        if (num_ranks < 1 || num_experts < 1 || num_experts % num_ranks != 0) {
            throw ArgumentError("num_experts", std::to_string(num_experts), "must be a multiple of num_ranks");
        }
        const auto* first = reinterpret_cast<const int32_t*>(topk_idx);
        const int64_t num_routes = num_tokens * num_topk;
        for (int64_t i = 0; i < num_ranks * num_routes; ++i) {
            if (first[i] < -1 || first[i] >= num_experts) {
                throw ArgumentError("topk_idx", std::to_string(first[i]), "must be in [-1, num_experts)");
            }
        }
        num_per_rank_.resize(static_cast<size_t>(num_ranks) * num_ranks);
        num_per_expert_.resize(static_cast<size_t>(num_ranks) * num_experts);
        for (int rank = 0; rank < num_ranks; ++rank) {
            const int32_t* own = first + rank * num_routes;
            int64_t* per_rank = num_per_rank_.data() + static_cast<size_t>(rank) * num_ranks;
            int64_t* per_expert = num_per_expert_.data() + static_cast<size_t>(rank) * num_experts;
            count_routing(geometry_, own, 0, num_tokens, num_topk, per_rank, per_expert);
            routing_.push_back(Routing{num_tokens, own, nullptr, part_begin_.data(), per_rank, per_expert});
        }
    }

    Plan plan(int rank, const Layout& layout) const {
        if (rank < 0 || rank >= geometry_.num_ranks) {
            throw ArgumentError("rank", std::to_string(rank), "must be a rank");
        }
        Geometry geometry = geometry_;
        geometry.rank = rank;
        return make_plan(geometry, layout, num_topk_, routing_);
    }

    // What the rank reads: routing and counts of all ranks.
    int64_t published_bytes() const {
        const int64_t routes = routing_[0].num_tokens * num_topk_ * geometry_.num_ranks;
        return routes * 4 + static_cast<int64_t>(num_per_rank_.size() + num_per_expert_.size()) * 8;
    }

  private:
    Geometry geometry_;
    int num_topk_;
    std::array<int64_t, 2> part_begin_;  // one part
    std::vector<int64_t> num_per_rank_, num_per_expert_;
    std::vector<Routing> routing_;
};

template <typename T>
int64_t bytes_of(const std::vector<T>& list) {
    return static_cast<int64_t>(list.capacity() * sizeof(T));
}

int64_t plan_bytes(const Plan& plan) {
    return bytes_of(plan.recv_base) + bytes_of(plan.recv_token) + bytes_of(plan.route_begin) +
           bytes_of(plan.route_slot) + bytes_of(plan.route_k) + bytes_of(plan.route_expert) +
           bytes_of(plan.expert_count) + bytes_of(plan.expert_offset) + bytes_of(plan.send_expert) +
           bytes_of(plan.send_row) + bytes_of(plan.send_slot);
}

}  // namespace

void register_plan(py::module_& module) {
    py::class_<Plan>(module, "Plan")
        .def_property_readonly("num_recv_tokens", &Plan::num_recv_tokens)
        .def_readonly("num_rows", &Plan::num_rows)
        .def_readonly("expert_count", &Plan::expert_count)
        .def_property_readonly("num_bytes", plan_bytes);
    using Release = py::call_guard<py::gil_scoped_release>;
    py::class_<RoutingTable>(module, "RoutingTable")
        .def(py::init<int, int, int64_t, int, uintptr_t>(), py::arg("num_ranks"), py::arg("num_experts"),
             py::arg("num_tokens"), py::arg("num_topk"), py::arg("topk_idx"), Release())
        .def("plan", &RoutingTable::plan, py::arg("rank"), py::arg("layout"), Release())
        .def_property_readonly("published_bytes", &RoutingTable::published_bytes);
}

}  // namespace ray_deepep
