#include "heap/domain.h"

#include <cstring>
#include <string>
#include <utility>

#include "common/fault.h"

namespace ray_deepep {
namespace {

constexpr uint64_t kMagic = 0x7261795f64656570ull;  // "ray_deep"
enum MessageKind : uint32_t { kHello = 1, kHeap = 2 };

// Comparing in time that does not depend on where the secrets differ.
bool same_secret(const char* given, const std::string& wanted) {
    unsigned char difference = 0;
    for (size_t i = 0; i < wanted.size(); ++i) difference |= static_cast<unsigned char>(given[i] ^ wanted[i]);
    return difference == 0;
}

}  // namespace

Domain::Domain(int rank, int num_ranks) : rank_(rank), num_ranks_(num_ranks) {
    address_ = "ray_deepep-" + random_hex(16);
    secret_ = random_hex(sizeof(PeerMessage::secret) / 2);
    listener_ = listen_abstract(address_, num_ranks + 8);
    peers_.resize(num_ranks);
}

void Domain::greet(const Fd& socket, int peer) const {
    PeerMessage hello;
    hello.magic = kMagic;
    hello.kind = kHello;
    hello.rank = rank_;
    std::memcpy(hello.secret, secrets_[peer].data(), sizeof(hello.secret));
    send_message(socket.get(), hello, -1);
}

void Domain::connect(const std::vector<std::string>& addresses, const std::vector<std::string>& secrets,
                     double deadline_s) {
    const Deadline deadline(deadline_s);
    secrets_ = secrets;
    // Every listener exists before addresses are known, so connecting never waits: the backlog holds us.
    for (int peer = 0; peer < rank_; ++peer) {
        try {
            Fd socket = connect_abstract(addresses[peer]);
            greet(socket, peer);
            peers_[peer].socket = std::move(socket);
        } catch (const std::exception& error) {
            throw BootstrapError("connect", {peer}, deadline_s, error.what());
        }
    }
    accept_rest(deadline);
    for (int peer = 0; peer < rank_; ++peer) {
        PeerMessage reply;
        Fd unused;
        const bool came = receive_message(peers_[peer].socket.get(), deadline, &reply, &unused);
        if (!came || reply.magic != kMagic || reply.rank != peer || !same_secret(reply.secret, secret_)) {
            throw BootstrapError("connect", {peer}, deadline_s, came ? "it answered with a wrong greeting" : "");
        }
    }
    for (Peer& peer : peers_) {
        if (peer.socket.valid()) peer.pidfd = open_pidfd(peer_pid(peer.socket.get()));
    }
    listener_.reset();
}

void Domain::accept_rest(const Deadline& deadline) {
    for (int waiting = num_ranks_ - 1 - rank_; waiting > 0;) {
        Fd socket = accept_peer(listener_.get(), deadline);
        if (!socket.valid()) throw BootstrapError("connect", missing_peers(), deadline.limit_s(), "");
        PeerMessage hello;
        Fd unused;
        // A stranger that connects and says nothing may cost a second, not the whole deadline.
        const Deadline patience(std::min(1.0, deadline.remaining_s()));
        if (!receive_message(socket.get(), patience, &hello, &unused)) continue;
        const bool known = hello.magic == kMagic && hello.kind == kHello && hello.rank > rank_ &&
                           hello.rank < num_ranks_ && same_secret(hello.secret, secret_) &&
                           !peers_[hello.rank].socket.valid();
        if (!known) continue;
        greet(socket, hello.rank);
        peers_[hello.rank].socket = std::move(socket);
        --waiting;
    }
}

std::vector<int> Domain::missing_peers() const {
    std::vector<int> missing;
    for (int peer = 0; peer < num_ranks_; ++peer) {
        if (peer != rank_ && !peers_[peer].socket.valid()) missing.push_back(peer);
    }
    return missing;
}

std::vector<HeapOffer> Domain::exchange_offers(const HeapOffer& own, const AgreedSizes& sizes, double deadline_s) {
    const Deadline deadline(deadline_s);
    PeerMessage mine;
    if (sizes.values.size() > std::size(mine.values)) throw std::logic_error("too many sizes to agree on");
    mine.magic = kMagic;
    mine.kind = kHeap;
    mine.rank = rank_;
    std::copy(sizes.values.begin(), sizes.values.end(), mine.values);
    std::copy(own.blob.begin(), own.blob.end(), mine.blob);
    for (int peer = 0; peer < num_ranks_; ++peer) {
        if (peer != rank_) send_message(peers_[peer].socket.get(), mine, own.fd.get());
    }
    std::vector<PeerMessage> messages(num_ranks_, mine);
    std::vector<HeapOffer> offers(num_ranks_);
    std::vector<int> missing;
    for (int peer = 0; peer < num_ranks_; ++peer) {
        if (peer == rank_) continue;
        if (!receive_message(peers_[peer].socket.get(), deadline, &messages[peer], &offers[peer].fd)) {
            missing.push_back(peer);
        }
        std::copy(std::begin(messages[peer].blob), std::end(messages[peer].blob), offers[peer].blob.begin());
    }
    if (!missing.empty()) throw BootstrapError("allocate", missing, deadline_s, "");
    for (int peer = 0; peer < num_ranks_; ++peer) {
        for (size_t i = 0; i < sizes.values.size(); ++i) {
            const uint64_t expected = messages[0].values[i], seen = messages[peer].values[i];
            if (expected == seen) continue;
            throw MismatchError(Operation::kAllocate, peer, sizes.names[i], std::to_string(expected),
                                std::to_string(seen));
        }
    }
    return offers;
}

bool Domain::peer_is_gone(int peer) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return ray_deepep::peer_is_gone(peers_[peer].socket.get(), peers_[peer].pidfd.get());
}

void Domain::close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    listener_.reset();
    for (Peer& peer : peers_) {
        peer.socket.reset();
        peer.pidfd.reset();
    }
}

}  // namespace ray_deepep
