#include "heap/peer_socket.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstring>

#include "heap/system_error.h"

namespace ray_deepep {

namespace {

socklen_t fill_address(const std::string& name, sockaddr_un* address) {
    *address = {};
    address->sun_family = AF_UNIX;
    // A leading zero byte puts the name into the abstract namespace.
    std::memcpy(address->sun_path + 1, name.data(), name.size());
    return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

bool same_user(int socket) {
    ucred credentials{};
    socklen_t size = sizeof(credentials);
    return ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) == 0 && credentials.uid == ::geteuid();
}

// Wait until `socket` can be read; false on expiry.
bool wait_readable(int socket, const Deadline& deadline) {
    while (true) {
        pollfd entry{socket, POLLIN, 0};
        const int wait_ms = static_cast<int>(std::ceil(std::min(deadline.remaining_s(), 0.1) * 1e3));
        const int ready = ::poll(&entry, 1, wait_ms);
        if (ready > 0) return true;
        if (ready < 0 && errno != EINTR) throw_errno("poll");
        if (deadline.expired()) return false;
    }
}

}  // namespace

std::string random_hex(size_t num_bytes) {
    std::string out;
    for (size_t i = 0; i < num_bytes; ++i) {
        unsigned char byte = 0;
        if (::getrandom(&byte, 1, 0) != 1) throw_errno("getrandom");
        const char* digits = "0123456789abcdef";
        out += digits[byte >> 4];
        out += digits[byte & 15];
    }
    return out;
}

Fd listen_abstract(const std::string& name, int backlog) {
    Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!socket.valid()) throw_errno("socket");
    sockaddr_un address;
    const socklen_t size = fill_address(name, &address);
    if (::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), size) != 0) throw_errno("bind");
    if (::listen(socket.get(), backlog) != 0) throw_errno("listen");
    return socket;
}

Fd connect_abstract(const std::string& name) {
    Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!socket.valid()) throw_errno("socket");
    sockaddr_un address;
    const socklen_t size = fill_address(name, &address);
    if (::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), size) != 0) throw_errno("connect to a peer");
    if (!same_user(socket.get())) throw std::runtime_error("the peer's socket belongs to another user");
    return socket;
}

Fd accept_peer(int listener, const Deadline& deadline) {
    while (wait_readable(listener, deadline)) {
        Fd socket(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
        if (!socket.valid()) {
            if (errno == EINTR || errno == ECONNABORTED) continue;
            throw_errno("accept");
        }
        if (same_user(socket.get())) return socket;
    }
    return Fd();
}

void send_message(int socket, const PeerMessage& message, int fd_to_pass) {
    iovec data{const_cast<PeerMessage*>(&message), sizeof(message)};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr header{};
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    if (fd_to_pass >= 0) {
        header.msg_control = control;
        header.msg_controllen = sizeof(control);
        cmsghdr* entry = CMSG_FIRSTHDR(&header);
        entry->cmsg_level = SOL_SOCKET;
        entry->cmsg_type = SCM_RIGHTS;
        entry->cmsg_len = CMSG_LEN(sizeof(int));
        std::memcpy(CMSG_DATA(entry), &fd_to_pass, sizeof(int));
    }
    // A peer that is gone shows at the next receive, so a failed send is not an error here.
    ssize_t sent = 0;
    do {
        sent = ::sendmsg(socket, &header, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
}

bool receive_message(int socket, const Deadline& deadline, PeerMessage* message, Fd* passed_fd) {
    size_t received = 0;
    while (received < sizeof(*message)) {
        if (!wait_readable(socket, deadline)) return false;
        iovec data{reinterpret_cast<char*>(message) + received, sizeof(*message) - received};
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
        msghdr header{};
        header.msg_iov = &data;
        header.msg_iovlen = 1;
        header.msg_control = control;
        header.msg_controllen = sizeof(control);
        const ssize_t size = ::recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
        if (size < 0 && errno == EINTR) continue;
        if (size <= 0) return false;
        received += static_cast<size_t>(size);
        for (cmsghdr* entry = CMSG_FIRSTHDR(&header); entry != nullptr; entry = CMSG_NXTHDR(&header, entry)) {
            if (entry->cmsg_level != SOL_SOCKET || entry->cmsg_type != SCM_RIGHTS) continue;
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(entry), sizeof(fd));
            *passed_fd = Fd(fd);
        }
    }
    return true;
}

int peer_pid(int socket) {
    ucred credentials{};
    socklen_t size = sizeof(credentials);
    return ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) == 0 ? credentials.pid : 0;
}

Fd open_pidfd(int pid) {
#ifdef SYS_pidfd_open
    if (pid > 0) return Fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
#endif
    return Fd();
}

bool peer_is_gone(int socket, int pidfd) {
    // Both: a forked child of the peer keeps its socket open, and a pidfd is not to be had everywhere.
    pollfd entries[2] = {{socket, POLLIN | POLLRDHUP, 0}, {pidfd, POLLIN, 0}};
    if (::poll(entries, pidfd >= 0 ? 2 : 1, 0) <= 0) return false;
    if (pidfd >= 0 && (entries[1].revents & POLLIN) != 0) return true;
    return (entries[0].revents & (POLLHUP | POLLRDHUP | POLLERR)) != 0;
}

}  // namespace ray_deepep
