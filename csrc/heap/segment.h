// Anonymous shared memory (memfd): no name, so nothing is left behind however a process ends, and no /dev/shm size
// limit applies. Pages are used only where they were written, so a segment may be far larger than what it will hold.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ray_deepep {

// A file descriptor that closes itself.
class Fd {
  public:
    Fd() = default;
    explicit Fd(int fd) : fd_(fd) {}
    Fd(Fd&& other) noexcept : fd_(other.release()) {}
    Fd& operator=(Fd&& other) noexcept;
    ~Fd() { reset(); }
    int get() const { return fd_; }
    bool valid() const { return fd_ >= 0; }
    int release();
    void reset();

  private:
    int fd_ = -1;
};

// A mapping that unmaps itself.
class Segment {
  public:
    Segment() = default;
    Segment(Segment&& other) noexcept;
    Segment& operator=(Segment&& other) noexcept;
    ~Segment() { reset(); }

    // A new segment of `bytes` zeros; `fd` receives its descriptor. Its size is sealed, so a peer that maps it cannot
    // make another's reads fault by shrinking it.
    static Segment create(size_t bytes, Fd* fd);
    static Segment map(int fd, size_t bytes);

    std::byte* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    void reset();

  private:
    std::byte* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace ray_deepep
