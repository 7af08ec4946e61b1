"""The optimizer's state by name of the parameter, so that any number of ranks and any EP degree can read it.

DeepSpeed keeps it by rank: a file per ZeRO partition, or per place in the EP group. Here it is by the parameter's name,
in which an expert has its *global* id:

| file | holds |
|---|---|
| `optimizer_dense_RRRR.pt` | a share of the parameters that all ranks have, written by rank R |
| `optimizer_expert_EEEE.pt` | those of expert E, of all layers |

Each is a dict with `step` (updates done) and `params`: for each name `exp_avg`, `exp_avg_sq` and, where the model's
weights are not fp32, `fp32`, all of the parameter's shape. Only torch's Adam and AdamW are known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from train.errors import CheckpointError, ConfigError
from train.model import EXPERT_NAME

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "fp32"


@dataclass(frozen=True, kw_only=True)
class _Named:
    """A parameter of this rank."""

    name: str
    """The same on every rank that has it."""
    param: nn.Parameter
    file: str
    is_mine: bool
    """Whether this rank writes it."""


def check_optimizer(engine: Any) -> None:
    """Raises ConfigError unless the state of the engine's optimizer can be written by name."""
    optimizer = _base(engine)
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        rule = "runs with run.num_shares need torch's Adam or AdamW; leave it out of the DeepSpeed config"
        raise ConfigError("optimizer", type(optimizer).__name__, rule)


def write_optimizer(engine: Any, folder: Path) -> None:
    """Write the state into `folder`, each parameter once. Collective. An update must have been done."""
    step = _step_of(engine)
    if engine.zero_optimization():
        _link_partitions(engine.optimizer)
    files: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(dict)
    for named in _named_params(engine):
        state = _read(engine, named.param)  # collective, so it comes before the question whose it is
        if named.is_mine:
            files[named.file][named.name] = {key: value.detach().cpu().clone() for key, value in state.items()}
    for name, params in files.items():
        torch.save({"step": step, "params": params}, folder / name)


def load_optimizer(engine: Any, folder: Path) -> None:
    """Put the state in `folder` into an engine that has done no update yet and has its weights. Not collective.

    Raises CheckpointError naming a file that lacks a parameter of this rank, or has it in another shape.
    """
    reader = _Reader(folder)
    is_zero = engine.zero_optimization()
    if is_zero:
        _prepare_partitions(engine.optimizer, reader.step)
    for named in _named_params(engine):
        state = reader.state_of(named)
        if is_zero:
            for key in _MOMENTS:
                safe_set_full_optimizer_state(named.param, state[key].to(named.param.device), key)
            if _MASTER in state:
                safe_set_full_fp32_param(named.param, state[_MASTER].to(named.param.device))
        else:
            moments = {key: state[key].to(named.param.device, copy=True) for key in _MOMENTS}
            step = _step_tensor(reader.step, engine.optimizer, named.param)
            engine.optimizer.state[named.param] = {"step": step} | moments
    if engine.lr_scheduler is not None:
        for group, lr in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_lr(), strict=True):
            group["lr"] = lr


class _Reader:
    """The files of a folder, each read when a parameter of this rank needs it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, dict[str, Any]] = {}
        self._file_of: dict[str, str] = {}
        for path in sorted(folder.glob("optimizer_dense_*.pt")):
            self._file_of |= dict.fromkeys(self._read(path.name)["params"], path.name)
        if not self._files:
            raise CheckpointError(str(folder), "has no optimizer state by name (optimizer_dense_*.pt)")
        self.step: float = next(iter(self._files.values()))["step"]

    def state_of(self, named: _Named) -> dict[str, Tensor]:
        """The state of a parameter, on the CPU."""
        file = named.file if is_moe_param(named.param) else self._file_of.get(named.name, named.file)
        state = self._read(file)["params"].get(named.name)
        if state is None:
            raise CheckpointError(str(self._folder / file), f"has no optimizer state of {named.name}")
        for key in _MOMENTS:
            if key not in state or state[key].shape != named.param.shape:
                raise CheckpointError(str(self._folder / file), f"{key} of {named.name} does not fit the model")
        return state

    def _read(self, name: str) -> dict[str, Any]:
        if name not in self._files:
            path = self._folder / name
            try:
                self._files[name] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # torch raises many types for a file it cannot read
                raise CheckpointError(str(path), f"cannot be read ({error})") from error
        return self._files[name]


def _named_params(engine: Any) -> Iterator[_Named]:
    """Trainable parameters, in the same order on every rank; shared out so that all ranks write about equally much."""
    num_experts = engine.module.config.num_experts
    num_dense = 0
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            continue
        if not is_moe_param(param):
            writer = num_dense % dist.get_world_size()
            num_dense += 1
            yield _Named(
                name=name,
                param=param,
                file=f"optimizer_dense_{writer:04d}.pt",
                is_mine=writer == dist.get_rank(),
            )
            continue
        num_local = num_experts // groups._get_expert_parallel_world_size(param.group_name)
        local = int(EXPERT_NAME.search(name).group())
        expert = groups._get_expert_parallel_rank(param.group_name) * num_local + local
        replicas = groups._get_expert_data_parallel_group(param.group_name)
        yield _Named(
            name=EXPERT_NAME.sub(str(expert), name),
            param=param,
            file=f"optimizer_expert_{expert:04d}.pt",
            is_mine=local % dist.get_world_size(replicas) == dist.get_rank(replicas),
        )


def _read(engine: Any, param: nn.Parameter) -> dict[str, Tensor]:
    """State of one parameter; collective over the ranks that share it, where ZeRO has cut it."""
    if not engine.zero_optimization():
        return {key: engine.optimizer.state[param][key] for key in _MOMENTS}
    state = {key: safe_get_full_optimizer_state(param, key) for key in _MOMENTS}
    if param.dtype != torch.float32:
        state[_MASTER] = safe_get_full_fp32_param(param)
    return state


def _prepare_partitions(optimizer: Any, step: float) -> None:
    """Give each of ZeRO's flat partitions an Adam state, as a first update does, and link the parameters to it."""
    for flat in optimizer.single_partition_of_fp32_groups:
        zeros = {key: torch.zeros_like(flat) for key in _MOMENTS}
        optimizer.optimizer.state[flat] = {"step": _step_tensor(step, optimizer.optimizer, flat)} | zeros
    _link_partitions(optimizer)


def _link_partitions(optimizer: Any) -> None:
    """Tell every parameter its place in the state of its partition.

    DeepSpeed 0.19.8 does so once, after the update of the first parameter group: those of the others, which have no
    state yet at that moment, never hear of theirs.
    """
    for params, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for param in params:
            if param._hp_mapping is not None:
                param._hp_mapping.set_optim_state_fragment(flat, optimizer.optimizer.state[flat])


def _base(engine: Any) -> Any:
    """The torch optimizer behind ZeRO's, or the engine's own."""
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def _step_of(engine: Any) -> float:
    return float(next(iter(_base(engine).state.values()))["step"])


def _step_tensor(step: float, optimizer: torch.optim.Optimizer, param: Tensor) -> Tensor:
    """Where torch keeps it: beside the parameter for a fused optimizer, else on the CPU."""
    device = param.device if optimizer.defaults.get("fused") else torch.device("cpu")
    return torch.tensor(step, dtype=torch.float32, device=device)
