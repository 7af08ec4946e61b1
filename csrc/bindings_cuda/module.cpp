// ray_deepep._cuda: the CUDA core. Loads without a GPU or driver; needs ray_deepep._core, whose types it shares.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <exception>

#include "bindings/error_translation.h"
#include "bindings_cuda/bindings.h"
#include "cuda/check.h"
#include "cuda/device_buffer.h"

namespace py = pybind11;

namespace ray_deepep {
namespace {

// A public class of the package's: errors travel between processes, also to those that have no CUDA core.
void translate_cuda_error() {
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const CudaError& error) {
            PyErr_SetString(py::module_::import("ray_deepep.errors").attr("CudaError").ptr(), error.what());
        }
    });
}

// What errors say needs no GPU to be tested.
void register_signature(py::module_& module) {
    module.def(
        "find_difference",
        [](const std::array<int32_t, 8>& expected, const std::array<int32_t, 8>& seen) -> py::object {
            const auto found = find_difference(Signature{expected}, Signature{seen});
            if (!found) return py::none();
            return py::make_tuple(found->field, found->expected, found->seen);
        },
        py::arg("expected"), py::arg("seen"));
}

void register_plan(py::module_& module) {
    py::class_<DevicePlan>(module, "DevicePlan")
        .def_readonly("num_tokens", &DevicePlan::num_tokens)
        .def_readonly("num_topk", &DevicePlan::num_topk)
        .def_readonly("max_recv_tokens", &DevicePlan::max_recv_tokens)
        .def_readonly("max_rows", &DevicePlan::max_rows)
        .def_readonly("fixed", &DevicePlan::fixed);
    py::class_<PlanCounts>(module, "PlanCounts")
        .def_readonly("num_recv_tokens", &PlanCounts::num_recv_tokens)
        .def_readonly("num_rows", &PlanCounts::num_rows)
        .def_readonly("overflow_rank", &PlanCounts::overflow_rank)
        .def_readonly("overflow_rows", &PlanCounts::overflow_rows)
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
        .def_readwrite("max_element_size", &DeviceSizes::max_element_size)
        .def_readwrite("symm_bytes", &DeviceSizes::symm_bytes)
        .def_readwrite("num_parts", &DeviceSizes::num_parts)
        .def_readwrite("bulk_copy", &DeviceSizes::bulk_copy);
    py::class_<DeviceDispatchArgs>(module, "DispatchArgs")
        .def(py::init([](uintptr_t x, uintptr_t x_scales, uintptr_t topk_idx, uintptr_t topk_weights,
                         uintptr_t locations, DType dtype, DType x_dtype, bool power_of_two, bool scale_by_weights,
                         uintptr_t out_topk_idx, uintptr_t out_topk_weights) {
                 return DeviceDispatchArgs{x,     x_scales,     topk_idx,        topk_weights,     locations,
                                           dtype, x_dtype,      power_of_two,    scale_by_weights, 0,
                                           0,     out_topk_idx, out_topk_weights};
             }),
             py::arg("x"), py::arg("x_scales"), py::arg("topk_idx"), py::arg("topk_weights"), py::arg("locations"),
             py::arg("dtype"), py::arg("x_dtype"), py::arg("power_of_two"), py::arg("scale_by_weights"),
             py::arg("out_topk_idx"), py::arg("out_topk_weights"))
        .def_readwrite("out_x", &DeviceDispatchArgs::out_x)
        .def_readwrite("out_scales", &DeviceDispatchArgs::out_scales);
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

DevicePlan make_plan(const DeviceBuffer& buffer, uintptr_t address, int num_tokens, int num_topk,
                     int64_t max_recv_tokens, int64_t max_rows, LayoutKind layout, int64_t alignment, int64_t capacity,
                     bool fixed) {
    DevicePlan sizes;
    sizes.num_tokens = num_tokens;
    sizes.num_topk = num_topk;
    sizes.max_recv_tokens = max_recv_tokens;
    sizes.max_rows = max_rows;
    sizes.layout = layout;
    sizes.alignment = alignment;
    sizes.capacity = capacity;
    sizes.fixed = fixed;
    return buffer.make_plan(address, sizes);
}

void register_buffer(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    py::enum_<HeapProvider>(module, "HeapProvider")
        .value("VMM", HeapProvider::kVmm)
        .value("IPC", HeapProvider::kIpc)
        .value("GIVEN", HeapProvider::kGiven);
    module.def(
        "segment_bytes", [](const DeviceSizes& sizes) { return make_segment_layout(sizes).bytes; }, py::arg("sizes"));
    module.def("vmm_supported", &vmm_supported, py::arg("device"));
    py::class_<DeviceBuffer>(module, "DeviceBuffer")
        .def(py::init([](std::shared_ptr<Domain> domain, const DeviceSizes& sizes, HeapProvider provider,
                         std::vector<uintptr_t> segments, double bootstrap_deadline_s, double deadline_s) {
                 const HeapSource source{provider, std::move(segments)};
                 return std::make_unique<DeviceBuffer>(std::move(domain), sizes, source, bootstrap_deadline_s,
                                                       deadline_s, run_signal_handlers);
             }),
             py::arg("domain"), py::arg("sizes"), py::arg("provider"), py::arg("segments"),
             py::arg("bootstrap_deadline_s"), py::arg("deadline_s"), Release())
        .def_property_readonly("segment_bytes", &DeviceBuffer::segment_bytes)
        .def_property_readonly("symm_address", &DeviceBuffer::symm_address)
        .def_property_readonly("symm_bytes", &DeviceBuffer::symm_bytes)
        .def_property_readonly("symm_addresses", &DeviceBuffer::symm_addresses)
        .def_property_readonly("control_address", &DeviceBuffer::control_address)
        .def_property_readonly("status_address", &DeviceBuffer::status_address)
        .def("abort_waits", &DeviceBuffer::abort_waits)
        .def("plan_ints", &DeviceBuffer::plan_ints, py::arg("num_tokens"), py::arg("num_topk"),
             py::arg("max_recv_tokens"), py::arg("max_rows"))
        .def("make_plan", &make_plan, py::arg("address"), py::arg("num_tokens"), py::arg("num_topk"),
             py::arg("max_recv_tokens"), py::arg("max_rows"), py::arg("layout"), py::arg("alignment"),
             py::arg("capacity"), py::arg("fixed"))
        .def(
            "begin_dispatch",
            [](DeviceBuffer& buffer, const DeviceDispatchArgs& args, const DevicePlan& plan, bool report,
               uintptr_t stream) { buffer.begin_dispatch(args, plan, report, as_stream(stream)); },
            py::arg("args"), py::arg("plan"), py::arg("report"), py::arg("stream"), Release())
        .def("wait_counts", &DeviceBuffer::wait_counts, Release())
        .def("check_routing", &DeviceBuffer::check_routing)
        .def(
            "pull_dispatch",
            [](DeviceBuffer& buffer, const DeviceDispatchArgs& args, const DevicePlan& plan, bool cached, int64_t room,
               int num_sms,
               uintptr_t stream) { buffer.pull_dispatch(args, plan, cached, room, num_sms, as_stream(stream)); },
            py::arg("args"), py::arg("plan"), py::arg("cached"), py::arg("room"), py::arg("num_sms"), py::arg("stream"),
            Release())
        .def(
            "combine",
            [](DeviceBuffer& buffer, const DeviceCombineArgs& args, const DevicePlan& plan, int num_sms,
               uintptr_t stream) { buffer.combine(args, plan, num_sms, as_stream(stream)); },
            py::arg("args"), py::arg("plan"), py::arg("num_sms"), py::arg("stream"), Release())
        .def(
            "check",
            [](DeviceBuffer& buffer) {
                buffer.check();
                buffer.check_routing();
            },
            Release())
        .def("fault_record", [](const DeviceBuffer& buffer) { return to_python(buffer.fault_record()); })
        // By rank, ns waited and bytes received since the buffer was made.
        .def("traffic",
             [](const DeviceBuffer& buffer) {
                 const DeviceTraffic traffic = buffer.traffic();
                 const int num_ranks = buffer.sizes().num_ranks;
                 const auto by_rank = [&](const unsigned long long* values) {
                     return std::vector<uint64_t>(values, values + num_ranks);
                 };
                 return py::make_tuple(by_rank(traffic.wait_ns), by_rank(traffic.recv_bytes));
             })
        .def("give_up_on_gone_peers", &DeviceBuffer::give_up_on_gone_peers, Release())
        .def("close", &DeviceBuffer::close, Release());
}

}  // namespace

void run_signal_handlers() {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace ray_deepep

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "The compiled CUDA core of ray_deepep. Use ray_deepep.Communicator and ray_deepep.Buffer instead.";
    module.attr("version") = RAY_DEEPEP_VERSION;
    py::module_::import("ray_deepep._core");
    ray_deepep::translate_errors();
    ray_deepep::translate_cuda_error();
    ray_deepep::register_signature(module);
    ray_deepep::register_plan(module);
    ray_deepep::register_arguments(module);
    ray_deepep::register_buffer(module);
    ray_deepep::register_device_low_latency(module);
    ray_deepep::register_expert_bias(module);
    ray_deepep::register_row_dots(module);
}
