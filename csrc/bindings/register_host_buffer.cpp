#include "bindings/bindings.h"
#include "bindings/error_translation.h"
#include "host/host_buffer.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace ray_deepep {

void run_signal_handlers() {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

namespace {

struct SymmBytes {
    std::shared_ptr<const SharedHeap> heap;
    std::byte* data;
    int64_t count;
    py::object owner;
};

uintptr_t address_of(const std::byte* data) { return reinterpret_cast<uintptr_t>(data); }

std::unique_ptr<SymmBytes> symm_bytes(const HostBuffer::SymmRegion& region, uintptr_t address, int64_t num_bytes,
                                      py::object owner) {
    const uintptr_t begin = address_of(region.data);
    if (num_bytes < 0 || address < begin || address + num_bytes > begin + region.bytes) {
        throw std::out_of_range("bytes outside of the region");
    }
    return std::make_unique<SymmBytes>(
        SymmBytes{region.heap, region.data + (address - begin), num_bytes, std::move(owner)});
}

void register_arguments(py::module_& module) {
    py::enum_<DType>(module, "DType")
        .value("FLOAT32", DType::kFloat32)
        .value("BFLOAT16", DType::kBFloat16)
        .value("FLOAT16", DType::kFloat16)
        .value("FLOAT8_E4M3", DType::kFloat8E4M3);
    py::enum_<LayoutKind>(module, "LayoutKind")
        .value("TOKEN_MAJOR", LayoutKind::kTokenMajor)
        .value("EXPERT_MAJOR", LayoutKind::kExpertMajor)
        .value("PADDED", LayoutKind::kPadded);
    py::enum_<Reduce>(module, "Reduce")
        .value("exact", Reduce::kExact)
        .value("fast", Reduce::kFast)
        .value("expert_order", Reduce::kExpertOrder);
    py::class_<BufferSizes>(module, "BufferSizes")
        .def(py::init())
        .def("area_bytes", &BufferSizes::area_bytes, py::arg("num_ranks"))
        .def_readwrite("num_experts", &BufferSizes::num_experts)
        .def_readwrite("hidden", &BufferSizes::hidden)
        .def_readwrite("num_topk", &BufferSizes::num_topk)
        .def_readwrite("max_tokens", &BufferSizes::max_tokens)
        .def_readwrite("max_capacity", &BufferSizes::max_capacity)
        .def_readwrite("num_parts", &BufferSizes::num_parts)
        .def_readwrite("low_latency_max_tokens", &BufferSizes::low_latency_max_tokens)
        .def_readwrite("max_segment_bytes", &BufferSizes::max_segment_bytes)
        .def_readwrite("symm_bytes", &BufferSizes::symm_bytes);
    py::class_<Layout>(module, "Layout")
        .def(py::init<LayoutKind, int64_t, int64_t>(), py::arg("kind"), py::arg("alignment") = 1,
             py::arg("capacity") = 0);
    py::class_<DispatchArgs>(module, "DispatchArgs")
        .def(py::init())
        .def_readwrite("x", &DispatchArgs::x)
        .def_readwrite("x_scales", &DispatchArgs::x_scales)
        .def_readwrite("topk_idx", &DispatchArgs::topk_idx)
        .def_readwrite("topk_weights", &DispatchArgs::topk_weights)
        .def_readwrite("locations", &DispatchArgs::locations)
        .def_readwrite("num_tokens", &DispatchArgs::num_tokens)
        .def_readwrite("part_tokens", &DispatchArgs::part_tokens)
        .def_readwrite("num_topk", &DispatchArgs::num_topk)
        .def_readwrite("dtype", &DispatchArgs::dtype)
        .def_readwrite("layout", &DispatchArgs::layout)
        .def_readwrite("scale_by_weights", &DispatchArgs::scale_by_weights)
        .def_readwrite("max_recv_tokens", &DispatchArgs::max_recv_tokens);
    py::class_<DispatchOutputs>(module, "DispatchOutputs")
        .def(py::init())
        .def_readwrite("x", &DispatchOutputs::x)
        .def_readwrite("x_scales", &DispatchOutputs::x_scales)
        .def_readwrite("topk_idx", &DispatchOutputs::topk_idx)
        .def_readwrite("topk_weights", &DispatchOutputs::topk_weights);
    py::class_<CombineArgs>(module, "CombineArgs")
        .def(py::init())
        .def_readwrite("rows", &CombineArgs::rows)
        .def_readwrite("expert_rows", &CombineArgs::expert_rows)
        .def_readwrite("row_weights", &CombineArgs::row_weights)
        .def_readwrite("bias", &CombineArgs::bias)
        .def_readwrite("dtype", &CombineArgs::dtype)
        .def_readwrite("has_rows", &CombineArgs::has_rows)
        .def_readwrite("has_row_weights", &CombineArgs::has_row_weights)
        .def_readwrite("weighted", &CombineArgs::weighted)
        .def_readwrite("routes_only", &CombineArgs::routes_only)
        .def_readwrite("reduce", &CombineArgs::reduce);
    py::class_<CombineOutputs>(module, "CombineOutputs")
        .def(py::init())
        .def_readwrite("x", &CombineOutputs::x)
        .def_readwrite("topk_weights", &CombineOutputs::topk_weights)
        .def_readwrite("routes", &CombineOutputs::routes);
}

}  // namespace

void register_host_buffer(py::module_& module) {
    register_arguments(module);
    py::class_<HostPlan, std::shared_ptr<HostPlan>>(module, "HostPlan")
        .def_property_readonly("num_rows", [](const HostPlan& p) { return p.plan.num_rows; })
        .def_property_readonly("num_recv_tokens", [](const HostPlan& p) { return p.plan.num_recv_tokens(); })
        .def_property_readonly("expert_count", [](const HostPlan& p) { return p.plan.expert_count; })
        .def_property_readonly("expert_offset", [](const HostPlan& p) { return p.plan.expert_offset; });
    // Bytes of the region; they and the mapping live while someone holds them, and so does `owner`.
    py::class_<SymmBytes>(module, "SymmBytes", py::buffer_protocol()).def_buffer([](SymmBytes& bytes) {
        const py::ssize_t count = bytes.count;
        return py::buffer_info(bytes.data, 1, py::format_descriptor<uint8_t>::format(), 1, {count}, {1});
    });
    py::class_<HostBuffer::SymmRegion>(module, "SymmRegion")
        .def_property_readonly("address", [](const HostBuffer::SymmRegion& r) { return address_of(r.data); })
        .def_readonly("num_bytes", &HostBuffer::SymmRegion::bytes)
        .def("bytes", symm_bytes, py::arg("address"), py::arg("num_bytes"), py::arg("owner"));
    using Release = py::call_guard<py::gil_scoped_release>;
    py::class_<HostBuffer>(module, "HostBuffer")
        .def(py::init([](std::shared_ptr<Domain> domain, const BufferSizes& sizes, double bootstrap_deadline_s,
                         double deadline_s, int num_threads) {
                 return std::make_unique<HostBuffer>(std::move(domain), sizes, bootstrap_deadline_s, deadline_s,
                                                     num_threads, run_signal_handlers);
             }),
             py::arg("domain"), py::arg("sizes"), py::arg("bootstrap_deadline_s"), py::arg("deadline_s"),
             py::arg("num_threads"), Release())
        .def("begin_dispatch", &HostBuffer::begin_dispatch, py::arg("args"), Release())
        .def("begin_cached_dispatch", &HostBuffer::begin_cached_dispatch, py::arg("args"), py::arg("plan"), Release())
        .def("pull_dispatch", &HostBuffer::pull_dispatch, py::arg("args"), py::arg("plan"), py::arg("out"), Release())
        .def("combine", &HostBuffer::combine, py::arg("args"), py::arg("plan"), py::arg("out"), Release())
        .def("symm_region", &HostBuffer::symm_region)
        // By rank, ns waited and bytes received since the buffer was made, and the most bytes an operation took.
        .def("traffic",
             [](const HostBuffer& buffer) {
                 const Traffic& traffic = buffer.traffic();
                 return py::make_tuple(traffic.wait_ns(), traffic.recv_bytes(), traffic.used_bytes());
             })
        .def("fault_record", [](const HostBuffer& buffer) { return to_python(buffer.fault_record()); })
        .def("close", &HostBuffer::close, Release());
}

}  // namespace ray_deepep
