// The ranks that share memory: one authenticated socket to each peer, and heaps made over them.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "common/deadline.h"
#include "heap/peer_socket.h"
#include "heap/segment.h"

namespace ray_deepep {

// What a rank gives its peers when a heap is made: a descriptor or a handle, and sizes that all must agree on.
struct HeapOffer {
    Fd fd;
    std::array<unsigned char, 64> blob{};
};

// Sizes that must be the same on all ranks, with the names that an error uses.
struct AgreedSizes {
    std::vector<const char*> names;
    std::vector<uint64_t> values;
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

    // Swap offers with all peers; collective, in the same order on all ranks. Returns them by rank, this rank's own
    // entry empty. Throws BootstrapError naming who did not come, MismatchError where sizes differ.
    std::vector<HeapOffer> exchange_offers(const HeapOffer& own, const AgreedSizes& sizes, double deadline_s);

    // Whether the peer's process ended or left. Safe to call from any thread, also beside close().
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
    mutable std::mutex mutex_;  // held for moments: descriptors are closed while others look at them
    std::vector<Peer> peers_;
};

}  // namespace ray_deepep
