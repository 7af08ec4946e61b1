"""Findings of several nodes side by side, without a cluster; ``test_cluster_ray.py`` has the doctor on a real one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from doctor_cases import gpu_readings, machine, no_gpu_readings, software_readings, system_readings

from ray_deepep.doctor import diagnose
from ray_deepep.doctor.findings import Status, problem
from ray_deepep.doctor.nodes import NodeReport, differences, node_lines
from ray_deepep.doctor.readings import Output, Readings


def node(number: int, readings: Readings) -> NodeReport:
    return NodeReport(
        node_id=f"{number:056x}", host=f"node-{number}", address=f"10.0.0.{number}", findings=tuple(diagnose(readings))
    )


def with_driver(version: str) -> Readings:
    gpus = gpu_readings("h100x8").gpus.text.replace("580.159.04", version)
    return machine(gpu=gpu_readings("h100x8", gpus=Output(text=gpus)))


def test_equal_nodes_agree():
    nodes = [node(i, machine()) for i in range(3)]
    assert differences(nodes) == []
    assert node_lines(nodes, [])[-1] == "3 nodes agree"


def test_a_driver_that_differs_is_named_with_its_node():
    nodes = [node(i, with_driver("570.10" if i == 2 else "580.159.04")) for i in range(4)]
    (found,) = differences(nodes)
    assert (found.name, found.status) == ("driver differs", Status.WARNING)
    assert found.value == "580.159.04 on 3 nodes; 570.10 on node-2 (10.0.0.2, node 00000000)"
    lines = node_lines(nodes, differences(nodes))
    assert sum("8 x NVIDIA H100" in line for line in lines) == 4, "one line per node"
    assert any("driver differs" in line for line in lines)


def test_cores_that_differ_are_a_problem():
    old = machine(software=software_readings(version="0.0.9", cpu_core=Output(text="0.0.9")))
    found = {finding.name: finding.status for finding in differences([node(0, machine()), node(1, old)])}
    assert found == {"ray_deepep differs": Status.PROBLEM, "CPU core differs": Status.PROBLEM}


def test_a_head_node_without_gpus_is_no_difference_in_gpus():
    head = machine(gpu=no_gpu_readings(), system=system_readings(ib_ports=()))
    assert differences([node(0, head), node(1, machine()), node(2, machine())]) == []


def test_a_package_that_one_node_lacks_is_a_difference():
    lacks = machine(software=software_readings(packages={"torch": "2.11.0+cu130", "nvidia-nvshmem-cu13": "3.4.5"}))
    found = {finding.name: finding.value for finding in differences([node(0, machine()), node(1, lacks)])}
    assert set(found) == {"ray differs", "deepspeed differs"}
    assert "not installed on node-1" in found["deepspeed differs"]


def test_nodes_that_did_not_answer_are_not_said_to_agree():
    silent = [
        NodeReport(node_id=str(i), host="h", address="a", findings=(problem("node", "did not answer", "look"),))
        for i in range(2)
    ]
    lines = node_lines(silent, differences(silent))
    assert sum("did not answer" in line for line in lines) == 2
    assert not any("agree" in line for line in lines)


def test_no_cluster_at_the_address_is_said_at_once():
    pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")
    command = [sys.executable, "-m", "ray_deepep.cli", "doctor", "--cluster", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no Ray cluster at '127.0.0.1:1': [Errno 111] Connection refused" in done.stderr
