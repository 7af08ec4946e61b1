#include "bindings/bindings.h"
#include "host/low_latency.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace ray_deepep {
namespace {

void register_arguments(py::module_& module) {
    py::enum_<Float8Scale>(module, "Float8Scale")
        .value("none", Float8Scale::kNone)
        .value("float32", Float8Scale::kFloat32)
        .value("power_of_two", Float8Scale::kPowerOfTwo);
    py::class_<LowLatencySizes>(module, "LowLatencySizes")
        .def(py::init())
        .def("segment_bytes", &LowLatencySizes::segment_bytes, py::arg("num_ranks"))
        .def_readwrite("num_experts", &LowLatencySizes::num_experts)
        .def_readwrite("hidden", &LowLatencySizes::hidden)
        .def_readwrite("num_topk", &LowLatencySizes::num_topk)
        .def_readwrite("max_tokens", &LowLatencySizes::max_tokens)
        .def_readwrite("max_segment_bytes", &LowLatencySizes::max_segment_bytes);
    using Dispatch = LowLatencyDispatchArgs;
    py::class_<Dispatch>(module, "LowLatencyDispatchArgs")
        .def(py::init())
        .def_readwrite("x", &Dispatch::x)
        .def_readwrite("x_scales", &Dispatch::x_scales)
        .def_readwrite("topk_idx", &Dispatch::topk_idx)
        .def_readwrite("topk_weights", &Dispatch::topk_weights)
        .def_readwrite("num_tokens", &Dispatch::num_tokens)
        .def_readwrite("num_topk", &Dispatch::num_topk)
        .def_readwrite("dtype", &Dispatch::dtype)
        .def_readwrite("cast", &Dispatch::cast)
        .def_readwrite("stage_own", &Dispatch::stage_own);
    using Dispatched = LowLatencyDispatchOutputs;
    py::class_<Dispatched>(module, "LowLatencyDispatchOutputs")
        .def(py::init())
        .def_readwrite("x", &Dispatched::x)
        .def_readwrite("x_scales", &Dispatched::x_scales)
        .def_readwrite("counts", &Dispatched::counts)
        .def_readwrite("range_begin", &Dispatched::range_begin)
        .def_readwrite("range_count", &Dispatched::range_count)
        .def_readwrite("expert_offsets", &Dispatched::expert_offsets)
        .def_readwrite("needed", &Dispatched::needed)
        .def_readwrite("absent", &Dispatched::absent)
        .def_readwrite("num_tokens_per_expert", &Dispatched::num_tokens_per_expert)
        .def_readwrite("alignment", &Dispatched::alignment)
        .def_readwrite("num_rows", &Dispatched::num_rows);
    py::class_<LowLatencyCombineArgs>(module, "LowLatencyCombineArgs")
        .def(py::init())
        .def_readwrite("rows", &LowLatencyCombineArgs::rows)
        .def_readwrite("topk_weights", &LowLatencyCombineArgs::topk_weights)
        .def_readwrite("dtype", &LowLatencyCombineArgs::dtype)
        .def_readwrite("reduce", &LowLatencyCombineArgs::reduce)
        .def_readwrite("zero_copy", &LowLatencyCombineArgs::zero_copy);
    py::class_<LowLatencyCombineOutputs>(module, "LowLatencyCombineOutputs")
        .def(py::init())
        .def_readwrite("x", &LowLatencyCombineOutputs::x)
        .def_readwrite("absent", &LowLatencyCombineOutputs::absent);
    py::class_<LowLatencyWait>(module, "LowLatencyWait")
        .def(py::init())
        .def_readwrite("timeout_s", &LowLatencyWait::timeout_s)
        .def_readwrite("mask_late", &LowLatencyWait::mask_late)
        .def_readwrite("wait_ns", &LowLatencyWait::wait_ns);
    py::class_<LowLatencyCall, std::shared_ptr<LowLatencyCall>>(module, "LowLatencyCall");
    py::class_<LowLatencyPlan, std::shared_ptr<LowLatencyPlan>>(module, "LowLatencyPlan");
}

}  // namespace

void register_low_latency(py::module_& module) {
    register_arguments(module);
    using Release = py::call_guard<py::gil_scoped_release>;
    using Self = LowLatencyBuffer;
    py::class_<Self>(module, "LowLatencyBuffer")
        .def(py::init([](std::shared_ptr<Domain> domain, const LowLatencySizes& sizes,
                         const HostBuffer::SymmRegion& symm, double bootstrap_deadline_s, int num_threads) {
                 return std::make_unique<Self>(std::move(domain), sizes, symm, bootstrap_deadline_s, num_threads,
                                               run_signal_handlers);
             }),
             py::arg("domain"), py::arg("sizes"), py::arg("symm"), py::arg("bootstrap_deadline_s"),
             py::arg("num_threads"), Release())
        .def("send_dispatch", &Self::send_dispatch, py::arg("args"), Release())
        .def("receive_dispatch", &Self::receive_dispatch, py::arg("call"), py::arg("args"), py::arg("out"),
             py::arg("wait"), Release())
        .def("send_combine", &Self::send_combine, py::arg("args"), py::arg("plan"), Release())
        .def("receive_combine", &Self::receive_combine, py::arg("call"), py::arg("args"), py::arg("plan"),
             py::arg("out"), py::arg("wait"), Release())
        .def("mask", &Self::mask, py::arg("rank"), py::arg("masked"), Release())
        .def("masked", &Self::masked)
        .def("returning", &Self::returning)
        .def("rejoin", &Self::rejoin, py::arg("deadline_s"), Release())
        .def("close", &Self::close, Release());
}

}  // namespace ray_deepep
