#include "host/block_pool.h"

#include <sys/mman.h>

#include <string>

#include "heap/system_error.h"

namespace ray_deepep {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kStepBytes = 4 << 20;

// Few sizes, so that a block fits the next output of about the same size: powers of two, then steps of 4 MiB.
size_t capacity_for(size_t bytes) {
    if (bytes > kStepBytes) return (bytes + kStepBytes - 1) / kStepBytes * kStepBytes;
    size_t capacity = kPageBytes;
    while (capacity < bytes) capacity *= 2;
    return capacity;
}

}  // namespace

Block::~Block() { pool_->give_back(data_, capacity_); }

BlockPool::~BlockPool() {
    for (const auto& [capacity, blocks] : idle_) {
        for (std::byte* data : blocks) ::munmap(data, capacity);
    }
}

std::unique_ptr<Block> BlockPool::take(size_t bytes) {
    const size_t capacity = capacity_for(bytes);
    {
        const std::lock_guard lock(mutex_);
        std::vector<std::byte*>& blocks = idle_[capacity];
        if (!blocks.empty()) {
            std::byte* data = blocks.back();
            blocks.pop_back();
            idle_bytes_ -= capacity;
            return std::make_unique<Block>(shared_from_this(), data, bytes, capacity);
        }
    }
    void* data = ::mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw_errno("mmap of " + std::to_string(capacity) + " bytes for an output");
    return std::make_unique<Block>(shared_from_this(), static_cast<std::byte*>(data), bytes, capacity);
}

void BlockPool::give_back(std::byte* data, size_t capacity) {
    {
        const std::lock_guard lock(mutex_);
        if (idle_bytes_ + capacity <= max_idle_bytes_) {
            idle_[capacity].push_back(data);
            idle_bytes_ += capacity;
            return;
        }
    }
    ::munmap(data, capacity);
}

}  // namespace ray_deepep
