"""The doctor's judgements, on readings of machines that are well or sick in one way."""

from __future__ import annotations

import json

import doctor_cases as cases
import pytest
from doctor_cases import gpu_readings, machine, no_gpu_readings, software_readings, system_readings

from ray_deepep.doctor import diagnose, worst
from ray_deepep.doctor.findings import Finding, Status
from ray_deepep.doctor.judge_software import satisfies
from ray_deepep.doctor.readings import IbPort, Output, Readings


def by_name(readings: Readings) -> dict[str, Finding]:
    findings = diagnose(readings)
    assert len({finding.name for finding in findings}) == len(findings), "names must tell findings apart"
    return {finding.name: finding for finding in findings}


def changed(reading: str, old: str, new: str) -> dict[str, Output]:
    """One reading of the eight H100s with one thing in it replaced."""
    text = getattr(gpu_readings("h100x8"), reading).text
    assert old in text
    return {reading: Output(text=text.replace(old, new, 1))}


# Machines


def test_eight_healthy_gpus_have_nothing_to_complain_of():
    found = by_name(machine())
    assert {finding.status for finding in found.values()} <= {Status.OK, Status.NOT_APPLICABLE}
    assert found["GPUs"].value == "8 x NVIDIA H100 80GB HBM3, 79.6 GiB"
    assert found["driver"].value == "580.159.04"
    assert found["GPU UUIDs"].value.count("GPU-") == 8
    assert found["NVLink"].value == "18 links x 26.562 GB/s = 478 GB/s per GPU and direction"
    assert found["peer access"].value == "all 28 pairs"
    assert found["IB devices"].value == "8 x 400 Gb/sec (4X NDR) InfiniBand"
    assert found["ECC"].value == "no uncorrected error on 8 GPUs"


def test_two_gpus_without_peer_access():
    found = by_name(machine(gpu=gpu_readings("pcie_x2")))
    assert found["peer access"].status is Status.PROBLEM
    assert found["peer access"].value == "2 of 2 directions have none, such as GPU 0 from 1 (GPU not supported)"
    assert found["NVLink"].status is Status.NOT_APPLICABLE
    assert found["ECC"].status is Status.NOT_APPLICABLE, "a GPU without ECC has no ECC problem"
    assert found["compute mode"].status is Status.OK


def test_a_machine_without_gpu_is_no_problem_and_says_what_it_can_do():
    software = software_readings(cuda_core=Output(problem="No module named 'ray_deepep._cuda'"), nvshmem_core=Output())
    found = by_name(machine(gpu=no_gpu_readings(), system=system_readings(ib_ports=()), software=software))
    assert worst(found.values()) is Status.OK
    assert found["GPUs"].status is Status.NOT_APPLICABLE
    assert "trains on CPUs" in found["GPUs"].value
    assert "driver" not in found and "NVLink" not in found


def test_gpus_on_the_bus_but_no_driver_tools():
    found = by_name(machine(gpu=no_gpu_readings(num_pci_gpus=8)))
    assert found["GPUs"].status is Status.WARNING
    assert "--gpus all" in found["GPUs"].advice


def test_a_driver_that_does_not_answer():
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    found = by_name(machine(gpu=no_gpu_readings(has_nvidia_smi=True, gpus=Output(problem=said))))
    assert (found["driver"].status, found["driver"].value) == (Status.PROBLEM, said)
    assert "GPUs" not in found


@pytest.mark.parametrize(
    ("name", "status", "words", "readings"),
    [
        ("ECC", Status.PROBLEM, "GPU 3: 2 uncorrected", changed("ecc", "3, 0", "3, 2")),
        ("ECC", Status.WARNING, "waits for a reset", changed("remapped_rows", "No", "Yes")),
        ("ECC", Status.PROBLEM, "failed", changed("remapped_rows", "No, No", "No, 1")),
        (
            "clocks",
            Status.PROBLEM,
            "GPU 5: hardware slowdown, too hot (hardware)",
            changed("clocks", "5, 0x0000000000000001", "5, 0x0000000000000048"),
        ),
        (
            "clocks",
            Status.WARNING,
            "GPU 0: power cap",
            changed("clocks", "0, 0x0000000000000001", "0, 0x0000000000000004"),
        ),
        (
            "clocks",
            Status.NOT_APPLICABLE,
            "not a valid field",
            {"clocks": Output(problem="not a valid field to query")},
        ),
        ("NVLink", Status.WARNING, "GPU 0 has 17", changed("nvlink", "Link 4: 26.562 GB/s", "Link 4: <inactive>")),
        ("compute mode", Status.PROBLEM, "Prohibited: GPU 0", changed("gpus", "Default", "Prohibited")),
        ("compute mode", Status.WARNING, "Exclusive_Process: GPU 0", changed("gpus", "Default", "Exclusive_Process")),
        ("compute mode", Status.PROBLEM, "MIG is on: GPU 0", changed("gpus", "Disabled", "Enabled")),
        ("GPUs", Status.WARNING, "1 x NVIDIA A100", changed("gpus", "H100 80GB HBM3", "A100")),
        (
            "peer access",
            Status.PROBLEM,
            "1 of 56 directions have none, such as GPU 0 from 1 (chipset not supported)",
            changed("peer_access", "X\tOK", "X\tCNS"),
        ),
        ("Xid events", Status.NOT_APPLICABLE, "not readable", {}),
        (
            "Xid events",
            Status.WARNING,
            "Xid 79: 1 times",
            {"kernel_log": Output(text="[1.2] NVRM: Xid (PCI:0000:18:00): 79, GPU has fallen off the bus.")},
        ),
        ("Xid events", Status.OK, "none", {"kernel_log": Output(text="NVRM: loading NVIDIA UNIX Kernel Module")}),
        ("MPS", Status.OK, "daemon 77 runs", {"mps_daemons": ("77",), "mps_pipe_exists": True}),
        ("MPS", Status.WARNING, "not with pipe directory", {"mps_daemons": ("77",)}),
        ("MPS", Status.WARNING, "no daemon seen", {"mps_pipe_exists": True}),
        (
            "CUDA runtime",
            Status.PROBLEM,
            "driver on your system is too old",
            {"torch": Output(text='{"error": "The NVIDIA driver on your system is too old", "num_gpus": 0}')},
        ),
        (
            "CUDA runtime",
            Status.PROBLEM,
            "did not answer",
            {"torch": Output(problem="python did not answer within 60 s")},
        ),
        ("CUDA runtime", Status.OK, "torch sees 2 of 8", {"torch": Output(text='{"error": "", "num_gpus": 2}')}),
    ],
)
def test_trouble_with_gpus(name, status, words, readings):
    found = by_name(machine(gpu=gpu_readings("h100x8", **readings)))
    assert found[name].status is status
    assert words in found[name].value
    others = [finding for finding in found.values() if finding.name != name]
    assert worst(others) is Status.OK, "one sickness, one finding"


def test_a_fabric_manager_that_is_down_is_called_by_its_name():
    said = "CUDA error 802: system not yet initialized"
    readings = gpu_readings("h100x8", torch=Output(text=json.dumps({"error": said, "num_gpus": 0})))
    assert "nvidia-fabricmanager" in by_name(machine(gpu=readings))["CUDA runtime"].advice


@pytest.mark.parametrize(
    ("name", "status", "words", "readings"),
    [
        (
            "IB devices",
            Status.WARNING,
            "mlx5_9 port 1 (DOWN)",
            {
                "ib_ports": (
                    *cases.system_readings().ib_ports,
                    IbPort(device="mlx5_9", port=1, state="1: DOWN", rate="40 Gb/sec", link_layer="InfiniBand"),
                )
            },
        ),
        ("memlock limit", Status.PROBLEM, "8 MiB", {"memlock_bytes": 8 * 2**20}),
        ("/dev/shm", Status.WARNING, "0.1 GiB", {"shm_bytes": 64 * 2**20}),
        ("/dev/shm", Status.WARNING, "not there", {"shm_bytes": None}),
        ("GPUDirect RDMA", Status.WARNING, "nvidia_peermem is not loaded", {"kernel_modules": ("gdrdrv",)}),
        ("GPUDirect RDMA", Status.OK, "GDRCopy is not", {"kernel_modules": ("nvidia_peermem",)}),
        ("heap", Status.PROBLEM, "pid 7", {"machine_id": "pid 7: no /proc"}),
    ],
)
def test_trouble_with_the_host(name, status, words, readings):
    found = by_name(machine(system=system_readings(**readings)))[name]
    assert found.status is status
    assert words in found.value


def packages(**versions: str) -> dict[str, str]:
    return software_readings().packages | {name.replace("_", "-"): version for name, version in versions.items()}


@pytest.mark.parametrize(
    ("name", "status", "words", "readings"),
    [
        ("torch", Status.PROBLEM, "2.10.0, supported is >=2.11,<2.15", {"packages": packages(torch="2.10.0")}),
        ("ray", Status.PROBLEM, "2.61.1, supported is", {"packages": packages(ray="2.61.1")}),
        ("deepspeed", Status.PROBLEM, "0.19.3", {"packages": packages(deepspeed="0.19.3")}),
        ("deepspeed", Status.OK, "0.19.4", {"packages": packages(deepspeed="0.19.4")}),
        ("ray", Status.NOT_APPLICABLE, "not installed", {"packages": {"torch": "2.11.0"}, "nvshmem_core": Output()}),
        ("torch", Status.OK, "2.99", {"packages": packages(torch="2.99"), "requirements": ()}),
        ("NVSHMEM", Status.PROBLEM, "torch wants ==3.4.5", {"packages": packages(nvidia_nvshmem_cu13="3.8.0")}),
        ("NVSHMEM", Status.PROBLEM, "built with 3.3.0", {"nvshmem_core": Output(text="3.3.0")}),
        (
            "NVSHMEM",
            Status.PROBLEM,
            "not installed, but the core is built with 3.4.5",
            {"packages": {"torch": "2.11.0"}},
        ),
        ("NVSHMEM core", Status.OK, "built with NVSHMEM 3.4.5", {}),
        ("NVSHMEM core", Status.NOT_APPLICABLE, "not built", {"nvshmem_core": Output()}),
        ("NVSHMEM core", Status.PROBLEM, "3.8.0 is loaded", {"nvshmem_core": Output(problem="3.8.0 is loaded")}),
        (
            "CPU core",
            Status.PROBLEM,
            "version 0.0.9",
            {"cpu_core": Output(problem="the compiled core is version 0.0.9")},
        ),
        ("CUDA core", Status.PROBLEM, "No module", {"cuda_core": Output(problem="No module named '_cuda'")}),
        ("CUDA runtime", Status.PROBLEM, "CPU build", {"torch_cuda": ""}),
        (
            "nvcc",
            Status.WARNING,
            "12.4, but torch is built for CUDA 13.0",
            {"nvcc": Output(text="release 12.4, V12.4")},
        ),
        ("nvcc", Status.NOT_APPLICABLE, "nvcc not found", {"nvcc": Output(problem="nvcc not found")}),
        ("bytecode", Status.OK, "1700 of torch's 1700 modules", {}),
        ("bytecode", Status.WARNING, "not kept on disk for 1690 of torch's 1700", {"num_uncompiled": 1690}),
    ],
)
def test_trouble_with_versions(name, status, words, readings):
    found = by_name(machine(software=software_readings(**readings)))[name]
    assert found.status is status
    assert words in found.value
    assert found.advice or status is not Status.PROBLEM


@pytest.mark.parametrize(
    ("version", "wanted", "answer"),
    [
        ("2.13.0+cpu", ">=2.11,<2.15", True),
        ("2.15.0", ">=2.11,<2.15", False),
        ("2.9", ">=2.11", False),
        ("2.60", "==2.60.0", True),
        ("0.19.4rc1", ">=0.19.4", True),
    ],
)
def test_version_ranges(version, wanted, answer):
    assert satisfies(version, wanted) is answer
