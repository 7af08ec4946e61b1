#include "bindings/bindings.h"

PYBIND11_MODULE(_core, module) {
    module.doc() = "The compiled CPU core of ray_deepep. Use ray_deepep.Communicator and ray_deepep.Buffer instead.";
    module.attr("version") = RAY_DEEPEP_VERSION;
    ray_deepep::register_errors(module);
    ray_deepep::register_domain(module);
    ray_deepep::register_block_pool(module);
    ray_deepep::register_host_buffer(module);
    ray_deepep::register_low_latency(module);
    ray_deepep::register_plan(module);
}
