#include <pybind11/stl.h>

#include "bindings/error_translation.h"
#include "bindings_cuda/bindings.h"
#include "cuda/device_low_latency.h"

namespace py = pybind11;

namespace ray_deepep {
namespace {

void register_arguments(py::module_& module) {
    using Sizes = DeviceLowLatencySizes;
    py::class_<Sizes>(module, "LowLatencySizes")
        .def(py::init())
        .def_readwrite("rank", &Sizes::rank)
        .def_readwrite("num_ranks", &Sizes::num_ranks)
        .def_readwrite("num_experts", &Sizes::num_experts)
        .def_readwrite("hidden", &Sizes::hidden)
        .def_readwrite("num_topk", &Sizes::num_topk)
        .def_readwrite("max_tokens", &Sizes::max_tokens)
        .def_readwrite("max_element_size", &Sizes::max_element_size)
        .def_readwrite("max_segment_bytes", &Sizes::max_segment_bytes)
        .def("segment_bytes", [](const Sizes& sizes) { return make_low_latency_layout(sizes).bytes; });
    using Launch = LowLatencyLaunch;
    py::class_<Launch>(module, "LowLatencyLaunch")
        .def(py::init())
        .def_readwrite("sends", &Launch::sends)
        .def_readwrite("receives", &Launch::receives)
        .def_readwrite("timeout_s", &Launch::timeout_s)
        .def_readwrite("mask_late", &Launch::mask_late)
        .def_readwrite("wait_ns", &Launch::wait_ns)
        .def_readwrite("absent", &Launch::absent)
        .def_readwrite("num_sms", &Launch::num_sms);
    using Dispatch = DeviceLowLatencyDispatch;
    py::class_<Dispatch>(module, "LowLatencyDispatchArgs")
        .def(py::init())
        .def_readwrite("x", &Dispatch::x)
        .def_readwrite("x_scales", &Dispatch::x_scales)
        .def_readwrite("topk_idx", &Dispatch::topk_idx)
        .def_readwrite("topk_weights", &Dispatch::topk_weights)
        .def_readwrite("num_tokens", &Dispatch::num_tokens)
        .def_readwrite("num_topk", &Dispatch::num_topk)
        .def_readwrite("wide_idx", &Dispatch::wide_idx)
        .def_readwrite("stage_own", &Dispatch::stage_own)
        .def_readwrite("x_dtype", &Dispatch::x_dtype)
        .def_readwrite("dtype", &Dispatch::dtype)
        .def_readwrite("power_of_two", &Dispatch::power_of_two)
        .def_readwrite("plan", &Dispatch::plan)
        .def_readwrite("out_x", &Dispatch::out_x)
        .def_readwrite("out_scales", &Dispatch::out_scales)
        .def_readwrite("counts", &Dispatch::counts)
        .def_readwrite("range_begin", &Dispatch::range_begin)
        .def_readwrite("range_count", &Dispatch::range_count)
        .def_readwrite("expert_offsets", &Dispatch::expert_offsets)
        .def_readwrite("needed", &Dispatch::needed)
        .def_readwrite("num_tokens_per_expert", &Dispatch::num_tokens_per_expert)
        .def_readwrite("alignment", &Dispatch::alignment)
        .def_readwrite("num_rows", &Dispatch::num_rows);
    using Combine = DeviceLowLatencyCombine;
    py::class_<Combine>(module, "LowLatencyCombineArgs")
        .def(py::init())
        .def_readwrite("rows", &Combine::rows)
        .def_readwrite("topk_weights", &Combine::topk_weights)
        .def_readwrite("plan", &Combine::plan)
        .def_readwrite("out_x", &Combine::out_x)
        .def_readwrite("num_tokens", &Combine::num_tokens)
        .def_readwrite("num_topk", &Combine::num_topk)
        .def_readwrite("dtype", &Combine::dtype)
        .def_readwrite("exact", &Combine::exact)
        .def_readwrite("zero_copy", &Combine::zero_copy);
}

}  // namespace

void register_device_low_latency(py::module_& module) {
    register_arguments(module);
    using Release = py::call_guard<py::gil_scoped_release>;
    using Self = DeviceLowLatency;
    py::class_<Self>(module, "DeviceLowLatency")
        .def(py::init([](std::shared_ptr<Domain> domain, const DeviceLowLatencySizes& sizes, HeapProvider provider,
                         std::vector<uintptr_t> segments, std::vector<uintptr_t> symm_addresses, int64_t symm_bytes,
                         double bootstrap_deadline_s) {
                 const HeapSource source{provider, std::move(segments)};
                 return std::make_unique<Self>(std::move(domain), sizes, source,
                                               SymmRoom{std::move(symm_addresses), symm_bytes}, bootstrap_deadline_s,
                                               run_signal_handlers);
             }),
             py::arg("domain"), py::arg("sizes"), py::arg("provider"), py::arg("segments"), py::arg("symm_addresses"),
             py::arg("symm_bytes"), py::arg("bootstrap_deadline_s"), Release())
        .def_property_readonly("segment_bytes", &Self::segment_bytes)
        .def("plan_ints", &Self::plan_ints, py::arg("num_tokens"), py::arg("num_topk"))
        .def(
            "dispatch",
            [](Self& self, const DeviceLowLatencyDispatch& args, const LowLatencyLaunch& launch, uintptr_t stream) {
                self.dispatch(args, launch, as_stream(stream));
            },
            py::arg("args"), py::arg("launch"), py::arg("stream"), Release())
        .def(
            "combine",
            [](Self& self, const DeviceLowLatencyCombine& args, const LowLatencyLaunch& launch, uintptr_t stream) {
                self.combine(args, launch, as_stream(stream));
            },
            py::arg("args"), py::arg("launch"), py::arg("stream"), Release())
        .def("check",
             [](Self& self) {
                 self.check();
                 self.check_routing();
             })
        .def("fault_record", [](const Self& self) { return to_python(self.fault_record()); })
        .def("give_up_on_gone_peers", &Self::give_up_on_gone_peers, Release())
        .def("mask", &Self::mask, py::arg("rank"), py::arg("masked"), Release())
        .def("masked", &Self::masked)
        .def("returning", &Self::returning, Release())
        .def("rejoin", &Self::rejoin, py::arg("deadline_s"), Release())
        .def("close", &Self::close, Release());
}

}  // namespace ray_deepep
