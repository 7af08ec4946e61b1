"""Whether a node of the cluster is still there, sooner than Ray's own health checks say so."""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections.abc import Collection, Mapping

import ray

_OWN_TROUBLE = (errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN)
"""What this machine lacks says nothing of another one."""


def lost_nodes(node_ids: Collection[str], timeout_s: float) -> set[str]:
    """Those of ``node_ids`` that Ray counts as dead, or whose Ray daemon takes no connection within ``timeout_s``.

    Ray notices a lost node after some failed health checks, 15 seconds and more by its defaults.
    """
    if not node_ids:
        return set()
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["NodeID"] in node_ids}
    lost = {node_id for node_id in node_ids if node_id not in nodes or not nodes[node_id]["Alive"]}
    addresses = {
        node_id: (node["NodeManagerAddress"], node["NodeManagerPort"])
        for node_id, node in nodes.items()
        if node_id not in lost
    }
    return lost | (addresses.keys() - reachable(addresses, timeout_s))


def reachable(addresses: Mapping[str, tuple[str, int]], timeout_s: float) -> set[str]:
    """Names of those addresses that accept a TCP connection, or could not be tried; all are tried at once."""
    found: set[str] = set()
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for name, address in addresses.items():
            probe = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
            probe.setblocking(False)
            result = probe.connect_ex(address)
            if result == 0 or result in _OWN_TROUBLE:
                found.add(name)
            if result != errno.EINPROGRESS:
                # Refused at once, as where there is no route; the socket would be writable all the same.
                probe.close()
                continue
            selector.register(probe, selectors.EVENT_WRITE, name)
        while selector.get_map():
            left = deadline - time.monotonic()
            answered = selector.select(max(left, 0.0))
            # Looked at once more after the deadline: on a busy machine this process may not run for a while.
            if not answered and left <= 0:
                break
            for key, _ in answered:
                if key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    found.add(key.data)
                selector.unregister(key.fileobj)
                key.fileobj.close()
        for key in list(selector.get_map().values()):
            key.fileobj.close()
    return found
