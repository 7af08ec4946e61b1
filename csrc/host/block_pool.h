// Memory of outputs, kept when they die and given out again. The C library returns large blocks to the system, and a
// fresh page costs a fault at its first write: as much as copying some rows into it.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace ray_deepep {

class BlockPool;

// A piece of writable memory; goes back to its pool when destroyed.
class Block {
  public:
    Block(std::shared_ptr<BlockPool> pool, std::byte* data, size_t bytes, size_t capacity)
        : pool_(std::move(pool)), data_(data), bytes_(bytes), capacity_(capacity) {}
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block();
    std::byte* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    std::shared_ptr<BlockPool> pool_;
    std::byte* data_;
    size_t bytes_, capacity_;
};

class BlockPool : public std::enable_shared_from_this<BlockPool> {
  public:
    // Keeps at most `max_idle_bytes` of memory that nobody uses.
    explicit BlockPool(size_t max_idle_bytes) : max_idle_bytes_(max_idle_bytes) {}
    ~BlockPool();
    // At least `bytes`, page-aligned, contents undefined.
    std::unique_ptr<Block> take(size_t bytes);

  private:
    friend class Block;
    void give_back(std::byte* data, size_t capacity);

    size_t max_idle_bytes_, idle_bytes_ = 0;
    std::mutex mutex_;
    std::map<size_t, std::vector<std::byte*>> idle_;  // by capacity
};

}  // namespace ray_deepep
