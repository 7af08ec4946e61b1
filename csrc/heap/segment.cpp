#include "heap/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "heap/system_error.h"

namespace ray_deepep {

Fd& Fd::operator=(Fd&& other) noexcept {
    if (this != &other) {
        reset();
        fd_ = other.release();
    }
    return *this;
}

int Fd::release() { return std::exchange(fd_, -1); }

void Fd::reset() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

Segment::Segment(Segment&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Segment& Segment::operator=(Segment&& other) noexcept {
    if (this != &other) {
        reset();
        data_ = std::exchange(other.data_, nullptr);
        bytes_ = std::exchange(other.bytes_, 0);
    }
    return *this;
}

Segment Segment::create(size_t bytes, Fd* fd) {
    Fd file(::memfd_create("ray_deepep", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (!file.valid()) throw_errno("memfd_create");
    if (::ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) throw_errno("ftruncate of a heap segment");
    if (::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) throw_errno("F_ADD_SEALS");
    Segment segment = map(file.get(), bytes);
    *fd = std::move(file);
    return segment;
}

Segment Segment::map(int fd, size_t bytes) {
    struct stat info{};
    if (::fstat(fd, &info) != 0) throw_errno("fstat of a heap segment");
    if (static_cast<size_t>(info.st_size) != bytes) {
        throw std::runtime_error("a peer's heap segment has " + std::to_string(info.st_size) + " bytes, expected " +
                                 std::to_string(bytes));
    }
    void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (data == MAP_FAILED) throw_errno("mmap of a heap segment of " + std::to_string(bytes) + " bytes");
    Segment segment;
    segment.data_ = static_cast<std::byte*>(data);
    segment.bytes_ = bytes;
    return segment;
}

void Segment::reset() {
    if (data_ != nullptr) ::munmap(std::exchange(data_, nullptr), std::exchange(bytes_, 0));
}

}  // namespace ray_deepep
