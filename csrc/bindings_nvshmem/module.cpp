// ray_deepep._nvshmem: NVSHMEM's host side. Loads and mints unique ids without a GPU or driver; needs ray_deepep._core,
// whose errors it raises, and libnvshmem_host.so.3.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <exception>

#include "bindings/error_translation.h"
#include "bindings_nvshmem/bindings.h"
#include "common/fault.h"
#include "cuda/check.h"
#include "nvshmem/runtime.h"

namespace py = pybind11;

namespace ray_deepep {
namespace {

NvshmemUniqueId as_unique_id(const py::bytes& bytes) {
    const std::string text = bytes;
    NvshmemUniqueId unique_id;
    if (text.size() != unique_id.size()) {
        throw ArgumentError("unique_id", std::to_string(text.size()) + " bytes", "must be 128 bytes");
    }
    std::copy(text.begin(), text.end(), unique_id.begin());
    return unique_id;
}

void translate_nvshmem_errors(py::module_& module) {
    module.attr("CoreNvshmemError") =
        py::reinterpret_steal<py::object>(PyErr_NewException("ray_deepep._nvshmem.CoreNvshmemError", nullptr, nullptr));
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const CudaError& error) {
            PyErr_SetString(py::module_::import("ray_deepep.errors").attr("CudaError").ptr(), error.what());
        } catch (const NvshmemError& error) {
            const py::object type = py::module_::import("ray_deepep._nvshmem").attr("CoreNvshmemError");
            PyErr_SetObject(type.ptr(), py::make_tuple(error.step(), error.code(), error.status(), error.what()).ptr());
        }
    });
}

void register_functions(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    module.def("built_version", [] { return built_nvshmem_version().text(); });
    module.def("loaded_version", [] { return loaded_nvshmem_version().text(); });
    module.def("status", &nvshmem_status, Release());
    module.def("make_unique_id", [] {
        NvshmemUniqueId made;
        {
            const py::gil_scoped_release release;
            made = make_nvshmem_unique_id();
        }
        return py::bytes(reinterpret_cast<const char*>(made.data()), made.size());
    });
}

void register_runtime(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    module.def(
        "init",
        [](const py::bytes& unique_id, int rank, int num_ranks, int device, double deadline_s) {
            const NvshmemUniqueId id = as_unique_id(unique_id);
            const py::gil_scoped_release release;
            NvshmemRuntime::instance().init(id, rank, num_ranks, device, deadline_s, run_signal_handlers);
        },
        py::arg("unique_id"), py::arg("rank"), py::arg("num_ranks"), py::arg("device"), py::arg("deadline_s"));
    module.def(
        "init_device",
        [](double deadline_s) { NvshmemRuntime::instance().init_device(deadline_s, run_signal_handlers); },
        py::arg("deadline_s"), Release());
    module.def("pe", [] { return NvshmemRuntime::instance().pe(); });
    module.def("num_pes", [] { return NvshmemRuntime::instance().num_pes(); });
    module.def(
        "finalize", [](double deadline_s) { NvshmemRuntime::instance().finalize(deadline_s, run_signal_handlers); },
        py::arg("deadline_s"), Release());
    module.def(
        "abandon", [](const std::string& reason) { NvshmemRuntime::instance().abandon(reason); }, py::arg("reason"));
    module.def("abandoned", [] { return NvshmemRuntime::instance().abandoned(); });
}

void register_memory(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    module.def(
        "allocate",
        [](size_t bytes, double deadline_s) {
            return NvshmemRuntime::instance().allocate(bytes, deadline_s, run_signal_handlers);
        },
        py::arg("bytes"), py::arg("deadline_s"), Release());
    module.def(
        "addresses",
        [](int64_t block, const std::vector<int>& pes) { return NvshmemRuntime::instance().addresses(block, pes); },
        py::arg("block"), py::arg("pes"));
    module.def("release", [](int64_t block) { NvshmemRuntime::instance().release(block); }, py::arg("block"));
    module.def("released", [] { return NvshmemRuntime::instance().released(); });
    module.def(
        "free",
        [](const std::vector<int64_t>& blocks, double deadline_s) {
            NvshmemRuntime::instance().free(blocks, deadline_s, run_signal_handlers);
        },
        py::arg("blocks"), py::arg("deadline_s"), Release());
}

}  // namespace

void run_signal_handlers() {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace ray_deepep

PYBIND11_MODULE(_nvshmem, module) {
    module.doc() = "NVSHMEM's host side. Use ray_deepep.CommConfig(heap_provider=\"nvshmem\") instead.";
    module.attr("version") = RAY_DEEPEP_VERSION;
    const py::module_ core = py::module_::import("ray_deepep._core");
    for (const char* name : {"CoreBootstrapError", "CoreArgumentError"}) module.attr(name) = core.attr(name);
    ray_deepep::translate_errors();
    ray_deepep::translate_nvshmem_errors(module);
    ray_deepep::register_functions(module);
    ray_deepep::register_runtime(module);
    ray_deepep::register_memory(module);
    ray_deepep::register_hop(module);
}
