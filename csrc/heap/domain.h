// The ranks that share memory: one authenticated socket to each peer, and heaps made over them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "common/deadline.h"
#include "heap/peer_socket.h"
#include "heap/segment.h"

namespace ray_deepep {

// One segment per rank, all mapped here.
struct SymmetricHeap {
    std::vector<Segment> segments;  // by rank; [rank] is this rank's own
    size_t bytes = 0;               // of each
};

class Domain {
  public:
    // Opens this rank's listener. `address()` and `secret()` then go to all ranks by a trusted way.
    Domain(int rank, int num_ranks);

    const std::string& address() const { return address_; }
    const std::string& secret() const { return secret_; }
    int rank() const { return rank_; }
    int num_ranks() const { return num_ranks_; }

    // Connect to all peers; collective. Throws BootstrapError naming the ranks that did not come.
    void connect(const std::vector<std::string>& addresses, const std::vector<std::string>& secrets, double deadline_s);

    // Make a heap of `bytes` per rank; collective. `geometry` must be the same on all ranks (checked, field by field
    // under `field_names`).
    SymmetricHeap allocate(size_t bytes, const std::vector<uint64_t>& geometry,
                           const std::vector<std::string>& field_names, double deadline_s);

    // Whether the peer's process ended or left. Safe to call from the waiting thread only.
    bool peer_is_gone(int peer) const;
    void close();

  private:
    struct Peer {
        Fd socket;
        Fd pidfd;
    };

    void greet(const Fd& socket, int peer) const;
    void accept_rest(const Deadline& deadline);
    std::vector<int> missing_peers() const;

    int rank_, num_ranks_;
    std::string address_, secret_;
    std::vector<std::string> secrets_;
    Fd listener_;
    std::vector<Peer> peers_;
    uint64_t num_heaps_ = 0;
};

}  // namespace ray_deepep
