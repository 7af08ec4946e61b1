// Places in a piece of memory, one after the other.
#pragma once

#include <cstdint>

namespace ray_deepep {

// At multiples of 256 bytes, enough for every vector and bulk access.
class Cursor {
  public:
    int64_t take(int64_t bytes) {
        const int64_t begin = next_;
        next_ += (bytes + 255) / 256 * 256;
        return begin;
    }
    int64_t end() const { return next_; }

  private:
    int64_t next_ = 0;
};

}  // namespace ray_deepep
