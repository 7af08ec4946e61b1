"""From GPU readings to findings. Pure functions; ``tests/test_doctor.py`` shows them well and sick machines."""

from __future__ import annotations

import collections
import json

from . import parsing
from .findings import Finding, not_applicable, ok, problem, warning
from .readings import GpuReadings, SoftwareReadings

PEER_CODES = {
    "CNS": "chipset not supported",
    "GNS": "GPU not supported",
    "TNS": "topology not supported",
    "NS": "not supported",
    "DR": "disabled in the driver's settings",
    "U": "unknown",
}
# Bits of NVML's clocks event reasons. Those of an idle GPU and of display clocks say nothing about its health.
SLOWDOWNS = {0x8: "hardware slowdown", 0x40: "too hot (hardware)", 0x80: "power brake (power supply)"}
LIMITS = {0x2: "application clocks are set", 0x4: "power cap", 0x10: "sync boost", 0x20: "too hot (software)"}
NO_GPU = (
    "no NVIDIA GPU: trains on CPUs, ranks of this host over shared memory (transport shm), "
    "ranks of several hosts over torch.distributed (transport reference)"
)


def judge_gpus(gpu: GpuReadings, software: SoftwareReadings) -> list[Finding]:
    """All findings about GPUs; one line if there is none."""
    if not gpu.has_nvidia_smi:
        return [_no_driver(gpu.num_pci_gpus)]
    found = parsing.gpus(gpu.gpus.text)
    if gpu.gpus.problem or not found:
        value = gpu.gpus.problem or "nvidia-smi lists no GPU"
        return [problem("driver", value, "load or reinstall the NVIDIA driver; the kernel log says why it failed")]
    return [
        judge_driver(found),
        judge_names(found),
        judge_uuids(found),
        judge_torch(gpu, software, len(found)),
        judge_modes(found),
        judge_nvlink(gpu, len(found)),
        judge_peers(gpu, len(found)),
        judge_clocks(gpu),
        judge_ecc(gpu),
        judge_xids(gpu),
        judge_mps(gpu),
    ]


def _no_driver(num_pci_gpus: int) -> Finding:
    if num_pci_gpus == 0:
        return not_applicable("GPUs", NO_GPU)
    return warning(
        "GPUs",
        f"{num_pci_gpus} NVIDIA GPUs on the PCI bus, but no nvidia-smi here",
        "install the NVIDIA driver; in a container, start it with the GPUs (docker run --gpus all)",
    )


def judge_driver(found: list[parsing.Gpu]) -> Finding:
    """The driver's version."""
    return ok("driver", ", ".join(sorted({gpu.driver for gpu in found})))


def judge_names(found: list[parsing.Gpu]) -> Finding:
    """How many GPUs of which kind."""
    kinds = collections.Counter((gpu.name, gpu.memory_mib) for gpu in found)
    value = ", ".join(f"{count} x {name}, {mib / 1024:.1f} GiB" for (name, mib), count in kinds.items())
    if len(kinds) > 1:
        return warning("GPUs", value, "ranks wait for the slowest GPU: use equal ones in one EP group")
    return ok("GPUs", value)


def judge_uuids(found: list[parsing.Gpu]) -> Finding:
    """By which GPUs are told apart in fault reports and at bootstrap."""
    value = ", ".join(f"{gpu.index}: {gpu.uuid}" for gpu in found)
    if len({gpu.uuid for gpu in found}) < len(found):
        return problem("GPU UUIDs", value, "two GPUs have the same UUID: the driver's list is wrong")
    return ok("GPU UUIDs", value)


def judge_torch(gpu: GpuReadings, software: SoftwareReadings, num_gpus: int) -> Finding:
    """Whether torch's CUDA runtime can use the GPUs that the driver lists."""
    name = "CUDA runtime"
    if not software.torch_cuda:
        return problem(name, "this torch is a CPU build", "install a CUDA build of torch to use the GPUs")
    if gpu.torch.problem:
        return problem(name, gpu.torch.problem, "torch could not look at the GPUs: try python -c 'import torch'")
    seen = json.loads(gpu.torch.text)
    if error := " ".join(str(seen["error"]).split()):
        if "not yet initialized" in error or "802" in error:
            advice = "start the fabric manager of the NVSwitches: systemctl start nvidia-fabricmanager"
        elif "too old" in error:
            advice = "install a newer NVIDIA driver, or a torch built for an older CUDA"
        else:
            advice = "torch cannot start CUDA: is CUDA_VISIBLE_DEVICES empty? else see the kernel log"
        return problem(name, error[:200], advice)
    advice = "" if seen["num_gpus"] == num_gpus else "the others are hidden, by CUDA_VISIBLE_DEVICES or the container"
    return ok(name, f"{software.torch_cuda}, torch sees {seen['num_gpus']} of {num_gpus} GPUs", advice)


def judge_modes(found: list[parsing.Gpu]) -> Finding:
    """Compute mode and MIG."""
    name = "compute mode"
    mig = [gpu.index for gpu in found if gpu.mig]
    if mig:
        advice = "MIG slices cannot read each other's memory: nvidia-smi -mig 0 (root, idle GPU)"
        return problem(name, f"MIG is on: {_gpus(mig)}", advice)
    by_mode = collections.defaultdict(list)
    for gpu in found:
        by_mode[gpu.compute_mode].append(gpu.index)
    value = ", ".join(f"{mode}: {_gpus(indices)}" for mode, indices in sorted(by_mode.items()))
    if "Prohibited" in by_mode:
        return problem(name, value, "no process may compute there: nvidia-smi -c DEFAULT (root)")
    if "Exclusive_Process" in by_mode:
        return warning(name, value, "a second process on a GPU fails, unless MPS runs: nvidia-smi -c DEFAULT (root)")
    return ok(name, ", ".join(by_mode))


def judge_nvlink(gpu: GpuReadings, num_gpus: int) -> Finding:
    """Links of all GPUs: as many on each."""
    name, links = "NVLink", parsing.nvlinks(gpu.nvlink.text)
    if gpu.nvlink.problem:
        return not_applicable(name, gpu.nvlink.problem)
    active = {link.index: link.num_active for link in links}
    if not any(active.values()):
        advice = "" if num_gpus == 1 else "rows go over PCIe, about a tenth as fast"
        return not_applicable(name, "no active link", advice)
    most = max(active.values())
    rate = max(link.gb_per_s for link in links)
    value = f"{most} links x {rate:g} GB/s = {most * rate:.0f} GB/s per GPU and direction"
    lame = [index for index in range(num_gpus) if active.get(index, 0) < most]
    if lame:
        counts = ", ".join(f"GPU {index} has {active.get(index, 0)}" for index in lame)
        return warning(name, f"{value}, but {counts}", "links are down: reset those GPUs, then have them looked at")
    return ok(name, value)


def judge_peers(gpu: GpuReadings, num_gpus: int) -> Finding:
    """Whether each GPU can read each other's memory, which one NVLink domain means."""
    name = "peer access"
    if num_gpus == 1:
        return not_applicable(name, "one GPU")
    codes = parsing.peer_matrix(gpu.peer_access.text)
    if gpu.peer_access.problem or not codes:
        return not_applicable(name, gpu.peer_access.problem or "nvidia-smi topo gave no matrix")
    bad = {pair: code for pair, code in codes.items() if code != "OK"}
    if not bad:
        return ok(name, f"all {len(codes) // 2} pairs")
    (reader, peer), code = min(bad.items())
    value = f"{len(bad)} of {len(codes)} directions have none, such as GPU {reader} from {peer}"
    value += f" ({PEER_CODES.get(code, code)})"
    advice = "transport cuda cannot join these GPUs: choose GPUs that reach each other; check IOMMU and ACS settings"
    return problem(name, value, advice)


def judge_clocks(gpu: GpuReadings) -> Finding:
    """What holds the clocks down right now."""
    name = "clocks"
    if gpu.clocks.problem:
        return not_applicable(name, gpu.clocks.problem)
    masks = parsing.numbers_by_gpu(gpu.clocks.text)
    slow, limited = (_reasons(masks, names) for names in (SLOWDOWNS, LIMITS))
    if slow:
        return problem(name, slow, "check cooling and power of this machine; a slow GPU slows every rank")
    if limited:
        advice = "usual under load; on an idle GPU check power limit (nvidia-smi -q -d POWER) and set clocks"
        return warning(name, limited, advice)
    return ok(name, f"nothing slows {_count(len(masks))}")


def judge_ecc(gpu: GpuReadings) -> Finding:
    """Uncorrected memory errors since the driver was loaded, and rows that wait to be remapped."""
    name, errors = "ECC", parsing.numbers_by_gpu(gpu.ecc.text)
    remapped = parsing.rows(gpu.remapped_rows.text, 3)
    failed = [uuid for uuid, _, failure in remapped if failure in ("Yes", "1")]
    pending = [uuid for uuid, waits, _ in remapped if waits in ("Yes", "1")]
    wrong = {index: count for index, count in errors.items() if count}
    if failed:
        return problem(name, f"row remapping failed on {', '.join(failed)}", "replace this GPU")
    if wrong:
        value = ", ".join(f"GPU {index}: {count} uncorrected errors" for index, count in wrong.items())
        return problem(
            name, value, "results may be wrong: drain the machine, reset these GPUs, replace them if it recurs"
        )
    if pending:
        return warning(name, f"row remapping waits for a reset of {', '.join(pending)}", "reset these GPUs when idle")
    if not errors:
        return not_applicable(name, gpu.ecc.problem or "these GPUs do not report ECC errors")
    return ok(name, f"no uncorrected error on {_count(len(errors))}")


def judge_xids(gpu: GpuReadings) -> Finding:
    """Xid events of the kernel log."""
    if gpu.kernel_log.problem:
        advice = "run as root, or with the right to read it (dmesg), to see Xid events"
        return not_applicable("Xid events", f"kernel log not readable ({gpu.kernel_log.problem})", advice)
    events = collections.Counter(parsing.xids(gpu.kernel_log.text))
    if not events:
        return ok("Xid events", "none in the kernel log")
    value = ", ".join(f"Xid {number}: {count} times" for number, count in events.items())
    return warning(
        "Xid events", value, "look the numbers up in NVIDIA's Xid catalogue; 48, 63, 64, 74, 79, 94, 95: hardware"
    )


def judge_mps(gpu: GpuReadings) -> Finding:
    """The daemon that lets several processes share a GPU."""
    where = gpu.mps_pipe_directory
    if gpu.mps_daemons and gpu.mps_pipe_exists:
        return ok("MPS", f"daemon {', '.join(gpu.mps_daemons)} runs, pipe directory {where}")
    if gpu.mps_daemons:
        advice = "set CUDA_MPS_PIPE_DIRECTORY to the daemon's, or this process does not share GPUs through it"
        return warning("MPS", f"daemon {', '.join(gpu.mps_daemons)} runs, but not with pipe directory {where}", advice)
    if gpu.mps_pipe_exists:
        advice = "fine if the daemon runs outside this container; else CUDA programs fail: remove that directory"
        return warning("MPS", f"no daemon seen, but {where}/control is there", advice)
    return not_applicable("MPS", "off; only needed to run several ranks on one GPU")


def _reasons(masks: dict[str, int], names: dict[int, str]) -> str:
    """Such as ``GPU 3: too hot (hardware)``; empty if no bit of ``names`` is set."""
    texts = []
    for index, mask in masks.items():
        said = [text for bit, text in names.items() if mask & bit]
        if said:
            texts.append(f"GPU {index}: {', '.join(said)}")
    return "; ".join(texts)


def _gpus(indices: list[int]) -> str:
    return ("GPU " if len(indices) == 1 else "GPUs ") + ", ".join(map(str, indices))


def _count(num_gpus: int) -> str:
    return "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
