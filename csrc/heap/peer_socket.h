// Stream sockets between the ranks of one host, in the abstract namespace: they leave no file, and the kernel tells
// who is at the other end. They carry segment descriptors, and their hang-up tells of a dead peer.
#pragma once

#include <cstdint>
#include <string>

#include "common/deadline.h"
#include "heap/segment.h"

namespace ray_deepep {

// Fixed-size message; a descriptor may travel beside it.
struct PeerMessage {
    uint64_t magic = 0;
    uint32_t kind = 0;
    int32_t rank = -1;
    char secret[32] = {};
    uint64_t values[12] = {};
    unsigned char blob[64] = {};  // a handle that is not a descriptor
};

std::string random_hex(size_t num_bytes);

Fd listen_abstract(const std::string& address, int backlog);
// Connect, and refuse a server of another user.
Fd connect_abstract(const std::string& address);
// One waiting connection, or an invalid Fd if the deadline expires first. Connections of other users are dropped.
Fd accept_peer(int listener, const Deadline& deadline);

void send_message(int socket, const PeerMessage& message, int fd_to_pass);
// False if the deadline expires or the peer hangs up first. A descriptor that came along goes to `passed_fd`.
bool receive_message(int socket, const Deadline& deadline, PeerMessage* message, Fd* passed_fd);

// Process id at the other end, 0 if it is not visible from here.
int peer_pid(int socket);
// A descriptor that becomes readable when process `pid` ends; invalid where the kernel has none.
Fd open_pidfd(int pid);
// Whether the peer hung up or its process ended.
bool peer_is_gone(int socket, int pidfd);

}  // namespace ray_deepep
