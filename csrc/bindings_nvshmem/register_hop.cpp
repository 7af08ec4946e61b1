#include <pybind11/stl.h>

#include "bindings_nvshmem/bindings.h"
#include "nvshmem/hop.h"

namespace py = pybind11;

namespace ray_deepep {
namespace {

cudaStream_t as_stream(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void register_sizes(py::module_& module) {
    py::class_<HopSizes>(module, "HopSizes")
        .def(py::init([](int node_rank, int num_nodes, int num_node_experts, int64_t part_tokens, int num_topk,
                         int64_t hidden, int64_t max_element_size) {
                 return HopSizes{node_rank, num_nodes, num_node_experts, part_tokens,
                                 num_topk,  hidden,    max_element_size};
             }),
             py::kw_only(), py::arg("node_rank"), py::arg("num_nodes"), py::arg("num_node_experts"),
             py::arg("part_tokens"), py::arg("num_topk"), py::arg("hidden"), py::arg("max_element_size"));
    py::class_<HopAreaLayout>(module, "HopAreaLayout")
        .def_readonly("landed_idx_at", &HopAreaLayout::landed_idx_at)
        .def_readonly("landed_weights_at", &HopAreaLayout::landed_weights_at)
        .def_readonly("landed_places_at", &HopAreaLayout::landed_places_at)
        .def_readonly("landed_scales_at", &HopAreaLayout::landed_scales_at)
        .def_readonly("landed_rows_at", &HopAreaLayout::landed_rows_at)
        .def_readonly("staged_weights_at", &HopAreaLayout::staged_weights_at)
        .def_readonly("staged_rows_at", &HopAreaLayout::staged_rows_at);
    module.def("hop_zone_bytes", [](const HopSizes& sizes) { return make_hop_layout(sizes).bytes; }, py::arg("sizes"));
    module.def("hop_area_layout", [](const HopSizes& sizes) { return make_hop_layout(sizes).area; }, py::arg("sizes"));
}

void register_arguments(py::module_& module) {
    const py::module_ core = py::module_::import("ray_deepep._core");
    py::class_<HopCall>(module, "HopCall")
        .def(py::init([](const std::string& operation, uint32_t sequence, uint32_t signature, int num_tokens,
                         int num_topk, int num_sms) {
                 Operation kind = Operation::kDispatch;
                 if (operation == "combine") kind = Operation::kCombine;
                 if (operation == "combine_weights") kind = Operation::kCombineWeights;
                 return HopCall{kind, sequence, signature, num_tokens, num_topk, num_sms};
             }),
             py::kw_only(), py::arg("operation"), py::arg("sequence"), py::arg("signature"), py::arg("num_tokens"),
             py::arg("num_topk"), py::arg("num_sms"));
    py::class_<HopDispatchArgs>(module, "HopDispatchArgs")
        .def(py::init([](uintptr_t x, uintptr_t x_scales, uintptr_t topk_idx, uintptr_t topk_weights,
                         uintptr_t locations, int64_t capacity, DType dtype, bool cached) {
                 return HopDispatchArgs{x, x_scales, topk_idx, topk_weights, locations, capacity, dtype, cached};
             }),
             py::kw_only(), py::arg("x"), py::arg("x_scales"), py::arg("topk_idx"), py::arg("topk_weights"),
             py::arg("locations"), py::arg("capacity"), py::arg("dtype"), py::arg("cached"));
}

}  // namespace

void register_hop(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    register_sizes(module);
    register_arguments(module);
    py::class_<Hop>(module, "Hop")
        .def(py::init([](const HopSizes& sizes, const std::vector<int>& pes, uintptr_t zone, uintptr_t control,
                         uintptr_t status, double deadline_s) {
                 return std::make_unique<Hop>(sizes, pes, zone, HopFaultWords{control, status, deadline_s});
             }),
             py::kw_only(), py::arg("sizes"), py::arg("pes"), py::arg("zone"), py::arg("control"), py::arg("status"),
             py::arg("deadline_s"), Release())
        .def("area", &Hop::area, py::arg("sequence"))
        .def(
            "dispatch",
            [](const Hop& hop, const HopCall& call, const HopDispatchArgs& args, uintptr_t stream) {
                hop.dispatch(call, args, as_stream(stream));
            },
            py::arg("call"), py::arg("args"), py::arg("stream"), Release())
        .def(
            "give_back",
            [](const Hop& hop, const HopCall& call, uintptr_t landed_idx, int64_t element_size, bool weights,
               uintptr_t stream) { hop.give_back(call, landed_idx, element_size, weights, as_stream(stream)); },
            py::arg("call"), py::arg("landed_idx"), py::arg("element_size"), py::arg("weights"), py::arg("stream"),
            Release())
        .def(
            "give_routes_back",
            [](const Hop& hop, const HopCall& call, uintptr_t landed_idx, uintptr_t routes, uintptr_t home,
               int64_t element_size, uintptr_t stream) {
                hop.give_routes_back(call, landed_idx, routes, home, element_size, as_stream(stream));
            },
            py::arg("call"), py::arg("landed_idx"), py::arg("routes"), py::arg("home"), py::arg("element_size"),
            py::arg("stream"), Release())
        .def(
            "sum",
            [](const Hop& hop, const HopCall& call, uintptr_t topk_idx, uintptr_t bias, uintptr_t out,
               uintptr_t out_weights, DType dtype,
               uintptr_t stream) { hop.sum(call, topk_idx, bias, out, out_weights, dtype, as_stream(stream)); },
            py::arg("call"), py::arg("topk_idx"), py::arg("bias"), py::arg("out"), py::arg("out_weights"),
            py::arg("dtype"), py::arg("stream"), Release());
}

}  // namespace ray_deepep
