"""``ray-deepep doctor --cluster``: the doctor's probes on every node of a Ray cluster, and where the nodes differ.

A task that asks for no resources goes to each node, so a cluster that is full is examined too.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import sys
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..doctor import Finding, examine
from ..doctor.findings import problem
from ..doctor.nodes import NodeReport, differences, node_lines
from ..doctor.report import exit_code, terminal, write
from ..errors import InvalidArgumentError
from .gather import gather, one_line

_CONNECT_S = 10.0


def examine_cluster(deadline_s: float) -> list[NodeReport]:
    """Findings of every node that is alive, head node first. A node that does not answer within ``deadline_s`` seconds,
    or cannot run the probes, has a finding that says so. Needs a connection to Ray."""
    if not deadline_s > 0:
        raise InvalidArgumentError("deadline_s", deadline_s, "must be > 0")
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=_order)
    refs = []
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        # The process changes its environment, so it serves no other task.
        task = ray.remote(num_cpus=0, max_calls=1, max_retries=0, scheduling_strategy=strategy)(_examine_node)
        refs.append(task.remote())
    answers = gather(refs, deadline_s, stop_at_error=False)
    for index in answers.missing:
        ray.cancel(refs[index], force=True)
    reports = []
    for index, node in enumerate(nodes):
        findings = answers.values.get(index)
        if findings is None:
            findings = [_no_answer(answers.errors.get(index), deadline_s)]
        reports.append(
            NodeReport(
                node_id=node["NodeID"],
                host=node["NodeManagerHostname"],
                address=node["NodeManagerAddress"],
                findings=tuple(findings),
            )
        )
    return reports


def run_cluster(address: str = "auto", *, as_json: bool = False, deadline_s: float = 120.0) -> int:
    """Examine a cluster and print.

    Args:
        address: of the cluster; ``auto``: ``RAY_ADDRESS``, or the cluster of this machine.
        as_json: print an object with ``nodes`` and ``differences``.
        deadline_s: seconds that nodes have to answer.

    Returns:
        The exit code: 1 if there is a problem on a node or between nodes, 2 if there is no cluster.
    """
    ours = not ray.is_initialized()
    if ours:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError) as error:
            print(f"ray-deepep doctor: no Ray cluster at {address!r}: {one_line(error)}", file=sys.stderr)
            return 2
    try:
        nodes = examine_cluster(deadline_s)
    finally:
        if ours:
            ray.shutdown()
    found = differences(nodes)
    if as_json:
        report = {
            "nodes": [dataclasses.asdict(node) for node in nodes],
            "differences": [dataclasses.asdict(finding) for finding in found],
        }
        print(json.dumps(report, indent=1))
    else:
        write(node_lines(nodes, found, **terminal(sys.stdout)))
    return exit_code([*found, *(finding for node in nodes for finding in node.findings)])


def _knock(address: str) -> None:
    """Raise at once if nothing listens at ``address``: Ray itself would try for minutes."""
    found = None if "://" in address else canonicalize_bootstrap_address(address)
    if found is not None:
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()


def _examine_node() -> list[Finding]:
    # Ray hides the GPUs from a task that asked for none; this is about the machine.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return examine()


def _no_answer(error: Exception | None, deadline_s: float) -> Finding:
    if error is None:
        value = f"did not answer within {deadline_s:g} s"
        return problem("node", value, "is it overloaded, or does a driver hang? run ray-deepep doctor there")
    return problem("node", one_line(error), "install the same ray-deepep on every node, then run it there by hand")


def _order(node: dict[str, Any]) -> tuple[bool, str, str]:
    return "node:__internal_head__" not in node["Resources"], node["NodeManagerAddress"], node["NodeID"]
