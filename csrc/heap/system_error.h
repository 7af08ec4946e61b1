// Failed system calls as exceptions.
#pragma once

#include <cerrno>
#include <string>
#include <system_error>

namespace ray_deepep {

[[noreturn]] inline void throw_errno(const std::string& what) {
    throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace ray_deepep
