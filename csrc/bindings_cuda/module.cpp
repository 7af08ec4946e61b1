// ray_deepep._cuda: the CUDA core. Loads without a GPU or driver; needs ray_deepep._core, whose types it shares.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/error_translation.h"
#include "cuda/check.h"
#include "cuda/device_buffer.h"

namespace py = pybind11;

namespace ray_deepep {
namespace {

void run_signal_handlers() {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

cudaStream_t as_stream(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// A field that holds a device address, as an integer in Python.
template <typename T>
void address_field(py::class_<DevicePlan>& type, const char* name, T* DevicePlan::* field) {
    type.def_property(
        name, [field](const DevicePlan& plan) { return reinterpret_cast<uintptr_t>(plan.*field); },
        [field](DevicePlan& plan, uintptr_t address) { plan.*field = reinterpret_cast<T*>(address); });
}

void register_plan(py::module_& module) {
    py::class_<DevicePlan> plan(module, "DevicePlan");
    plan.def(py::init())
        .def_readwrite("num_tokens", &DevicePlan::num_tokens)
        .def_readwrite("num_topk", &DevicePlan::num_topk)
        .def_readwrite("max_recv_tokens", &DevicePlan::max_recv_tokens)
        .def_readwrite("max_rows", &DevicePlan::max_rows)
        .def_readwrite("layout", &DevicePlan::layout)
        .def_readwrite("alignment", &DevicePlan::alignment)
        .def_readwrite("capacity", &DevicePlan::capacity);
    address_field(plan, "recv_source", &DevicePlan::recv_source);
    address_field(plan, "recv_token", &DevicePlan::recv_token);
    address_field(plan, "recv_slot", &DevicePlan::recv_slot);
    address_field(plan, "recv_weight", &DevicePlan::recv_weight);
    address_field(plan, "slot_row", &DevicePlan::slot_row);
    address_field(plan, "send_expert", &DevicePlan::send_expert);
    address_field(plan, "send_row", &DevicePlan::send_row);
    address_field(plan, "send_slot", &DevicePlan::send_slot);
    address_field(plan, "send_weight", &DevicePlan::send_weight);
    address_field(plan, "counts", &DevicePlan::counts);
    py::class_<PlanCounts>(module, "PlanCounts")
        .def_readonly("num_recv_tokens", &PlanCounts::num_recv_tokens)
        .def_readonly("num_rows", &PlanCounts::num_rows)
        .def_readonly("overflow", &PlanCounts::overflow)
        .def_readonly("expert_count", &PlanCounts::expert_count)
        .def_readonly("expert_offset", &PlanCounts::expert_offset);
}

void register_arguments(py::module_& module) {
    py::class_<DeviceSizes>(module, "DeviceSizes")
        .def(py::init())
        .def_readwrite("rank", &DeviceSizes::rank)
        .def_readwrite("num_ranks", &DeviceSizes::num_ranks)
        .def_readwrite("num_experts", &DeviceSizes::num_experts)
        .def_readwrite("hidden", &DeviceSizes::hidden)
        .def_readwrite("num_topk", &DeviceSizes::num_topk)
        .def_readwrite("max_tokens", &DeviceSizes::max_tokens)
        .def_readwrite("max_recv_tokens", &DeviceSizes::max_recv_tokens)
        .def_readwrite("max_rows", &DeviceSizes::max_rows)
        .def_readwrite("max_element_size", &DeviceSizes::max_element_size);
    py::class_<DeviceDispatchArgs>(module, "DispatchArgs")
        .def(py::init())
        .def_readwrite("x", &DeviceDispatchArgs::x)
        .def_readwrite("x_scales", &DeviceDispatchArgs::x_scales)
        .def_readwrite("topk_idx", &DeviceDispatchArgs::topk_idx)
        .def_readwrite("topk_weights", &DeviceDispatchArgs::topk_weights)
        .def_readwrite("locations", &DeviceDispatchArgs::locations)
        .def_readwrite("dtype", &DeviceDispatchArgs::dtype)
        .def_readwrite("scale_by_weights", &DeviceDispatchArgs::scale_by_weights)
        .def_readwrite("out_x", &DeviceDispatchArgs::out_x)
        .def_readwrite("out_scales", &DeviceDispatchArgs::out_scales)
        .def_readwrite("out_topk_idx", &DeviceDispatchArgs::out_topk_idx)
        .def_readwrite("out_topk_weights", &DeviceDispatchArgs::out_topk_weights);
    py::class_<DeviceCombineArgs>(module, "CombineArgs")
        .def(py::init())
        .def_readwrite("rows", &DeviceCombineArgs::rows)
        .def_readwrite("row_weights", &DeviceCombineArgs::row_weights)
        .def_readwrite("bias", &DeviceCombineArgs::bias)
        .def_readwrite("num_rows", &DeviceCombineArgs::num_rows)
        .def_readwrite("num_row_weights", &DeviceCombineArgs::num_row_weights)
        .def_readwrite("dtype", &DeviceCombineArgs::dtype)
        .def_readwrite("has_rows", &DeviceCombineArgs::has_rows)
        .def_readwrite("has_row_weights", &DeviceCombineArgs::has_row_weights)
        .def_readwrite("weighted", &DeviceCombineArgs::weighted)
        .def_readwrite("reduce", &DeviceCombineArgs::reduce)
        .def_readwrite("out_x", &DeviceCombineArgs::out_x)
        .def_readwrite("out_topk_weights", &DeviceCombineArgs::out_topk_weights)
        .def_readwrite("out_routes", &DeviceCombineArgs::out_routes);
}

void register_buffer(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    py::enum_<HeapProvider>(module, "HeapProvider").value("VMM", HeapProvider::kVmm).value("IPC", HeapProvider::kIpc);
    module.def("vmm_supported", &vmm_supported, py::arg("device"));
    py::class_<DeviceBuffer>(module, "DeviceBuffer")
        .def(py::init([](std::shared_ptr<Domain> domain, const DeviceSizes& sizes, HeapProvider provider,
                         double bootstrap_deadline_s, double deadline_s) {
                 return std::make_unique<DeviceBuffer>(std::move(domain), sizes, provider, bootstrap_deadline_s,
                                                       deadline_s, run_signal_handlers);
             }),
             py::arg("domain"), py::arg("sizes"), py::arg("provider"), py::arg("bootstrap_deadline_s"),
             py::arg("deadline_s"), Release())
        .def_property_readonly("segment_bytes", &DeviceBuffer::segment_bytes)
        .def(
            "begin_dispatch",
            [](DeviceBuffer& buffer, const DeviceDispatchArgs& args, const DevicePlan& plan, bool report, int num_sms,
               uintptr_t stream) { buffer.begin_dispatch(args, plan, report, num_sms, as_stream(stream)); },
            py::arg("args"), py::arg("plan"), py::arg("report"), py::arg("num_sms"), py::arg("stream"), Release())
        .def(
            "begin_cached_dispatch",
            [](DeviceBuffer& buffer, const DeviceDispatchArgs& args, const DevicePlan& plan, int num_sms,
               uintptr_t stream) { buffer.begin_cached_dispatch(args, plan, num_sms, as_stream(stream)); },
            py::arg("args"), py::arg("plan"), py::arg("num_sms"), py::arg("stream"), Release())
        .def("wait_counts", &DeviceBuffer::wait_counts, Release())
        .def(
            "pull_dispatch",
            [](DeviceBuffer& buffer, const DeviceDispatchArgs& args, const DevicePlan& plan, bool cached, int num_sms,
               uintptr_t stream) { buffer.pull_dispatch(args, plan, cached, num_sms, as_stream(stream)); },
            py::arg("args"), py::arg("plan"), py::arg("cached"), py::arg("num_sms"), py::arg("stream"), Release())
        .def(
            "combine",
            [](DeviceBuffer& buffer, const DeviceCombineArgs& args, const DevicePlan& plan, int num_sms,
               uintptr_t stream) { buffer.combine(args, plan, num_sms, as_stream(stream)); },
            py::arg("args"), py::arg("plan"), py::arg("num_sms"), py::arg("stream"), Release())
        .def("check", &DeviceBuffer::check)
        .def("close", &DeviceBuffer::close, Release());
}

}  // namespace
}  // namespace ray_deepep

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "The compiled CUDA core of ray_deepep. Use ray_deepep.Communicator and ray_deepep.Buffer instead.";
    module.attr("version") = RAY_DEEPEP_VERSION;
    py::module_::import("ray_deepep._core");
    ray_deepep::translate_errors();
    py::register_exception<ray_deepep::CudaError>(module, "CudaError", PyExc_RuntimeError);
    ray_deepep::register_plan(module);
    ray_deepep::register_arguments(module);
    ray_deepep::register_buffer(module);
}
