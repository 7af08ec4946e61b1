// C++ errors as the exceptions of ray_deepep._core; each module that throws them calls translate_errors() once.
#pragma once

namespace ray_deepep {

void translate_errors();

}  // namespace ray_deepep
