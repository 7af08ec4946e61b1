"""Checkpoints: DeepSpeed's files (dense, one per expert, optimizer) sealed by one small JSON file written last.

In an elastic run the optimizer's state is by name of the parameter instead (`optimizer_files.py`), so that any number
of ranks can read it.

A checkpoint is the folder `step_NNNNNN`. It counts once `trainer_state.json` is in it; that file lists size and CRC-32
of every other file, so truncation and bit rot are seen before anything is loaded. `latest` names the newest one. No
random state is stored: batches and gate noise are functions of (seed, step, rank), so the step is all there is.
All methods but the pure functions are collective. All ranks must see the folder.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed

from ray_deepep import run_files
from train.config import TrainConfig
from train.distributed import World, gather_objects, on_main
from train.errors import CheckpointError
from train.files import write_text_atomic
from train.optimizer_files import load_optimizer, write_optimizer

STATE_FILE = run_files.CHECKPOINT_SEAL
LATEST_FILE = "latest"
_TAG = re.compile(r"step_(\d+)")
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What `trainer_state.json` holds."""

    step: int
    """Optimizer steps done."""
    world_size: int
    """Ranks that wrote it; the same number must read it, unless `by_name`."""
    ep_size: int
    """Ranks of one EP group."""
    backend: str
    """Which all-to-all backend trained it (either can continue it)."""
    config_digest: str
    """`TrainConfig.digest` of the run."""
    config_identity: dict[str, Any]
    """The fields behind that digest, to name what differs."""
    data_digest: str
    """SHA-256 of the tokens."""
    files: dict[str, list[int]]
    """[size in bytes, CRC-32] of every file, by path inside the folder."""
    num_shares: int = 0
    """Shares of a step's batch; 0: `world_size`."""
    by_name: bool = False
    """Whether the optimizer's state is by name of the parameter, for any number of ranks."""


@dataclass(frozen=True, kw_only=True)
class CheckpointChoice:
    """The checkpoint to continue from, and why newer ones were passed over."""

    folder: Path
    state: TrainerState
    skipped: tuple[str, ...]


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after `step`."""
    return f"step_{step:06d}"


def step_folders(root: Path) -> list[Path]:
    """Checkpoint folders in `root`, sealed or not, newest first."""
    found = [p for p in root.glob("step_*") if p.is_dir() and _TAG.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine, root: Path, *, state: TrainerState, keep: int, world: World
) -> Path:
    """Write and seal the checkpoint of `state.step` (filling in `files`), then drop all but the `keep` newest."""
    folder = root / tag_of(state.step)
    on_main(world, lambda: shutil.rmtree(folder, ignore_errors=True))
    engine.save_checkpoint(str(root), tag=folder.name, save_latest=False)
    if state.by_name:
        write_optimizer(engine, folder)
        on_main(world, lambda: _drop_optimizer_by_rank(folder))
    stamps: dict[str, list[int]] = {}
    for part in gather_objects(world, _stamp_share(folder, world)):
        stamps |= part

    def seal() -> None:
        sealed = asdict(state) | {"files": dict(sorted(stamps.items()))}
        write_text_atomic(folder / STATE_FILE, json.dumps(sealed, indent=2))
        write_text_atomic(root / LATEST_FILE, folder.name)
        _prune(root, keep)

    on_main(world, seal)
    return folder


def _drop_optimizer_by_rank(folder: Path) -> None:
    """What DeepSpeed wrote of the optimizer: the same numbers again, for one number of ranks."""
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()


def _stamp_share(folder: Path, world: World) -> dict[str, list[int]]:
    """This rank's share of the files: large checkpoints are read by all ranks, not by one."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): _stamp(p) for p in paths[world.rank :: world.world_size]}


def _stamp(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
    return [size, crc]


def _prune(root: Path, keep: int) -> None:
    sealed = [folder for folder in step_folders(root) if (folder / STATE_FILE).is_file()]
    for folder in sealed[keep:]:
        # Unsealed first: a crash in the middle leaves a folder that counts as an interrupted save.
        (folder / STATE_FILE).unlink()
    kept = set(sealed[:keep])
    for folder in step_folders(root):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def choose_checkpoint(root: Path, world: World) -> CheckpointChoice | None:
    """The newest good checkpoint of a run, or None if none was ever completed.

    Raises CheckpointError naming the broken file when there are checkpoints and none of them is good.
    """
    broken: list[CheckpointError] = []
    for folder in on_main(world, lambda: _candidates(root)):
        try:
            state = verify_checkpoint(folder, world)
        except CheckpointError as error:
            broken.append(error)
            continue
        return CheckpointChoice(folder=folder, state=state, skipped=tuple(str(error) for error in broken))
    if broken:
        raise CheckpointError(broken[0].path, f"{broken[0].problem}; no other good checkpoint is in {root}")
    return None


def _candidates(root: Path) -> list[Path]:
    """Folders to try: the one `latest` names, then sealed ones from new to old.

    An unsealed folder is a save that was cut short, not damage, unless `latest` says it was complete.
    """
    sealed = [folder for folder in step_folders(root) if (folder / STATE_FILE).is_file()]
    pointer = root / LATEST_FILE
    if not pointer.is_file():
        return sealed
    latest = root / pointer.read_text(encoding="utf-8").strip()
    return [latest, *(folder for folder in sealed if folder != latest)]


def verify_checkpoint(folder: Path, world: World) -> TrainerState:
    """Read the seal of `folder` and check every file against it. Raises CheckpointError naming the first bad file."""
    state: TrainerState = on_main(world, lambda: _read_state(folder))
    problems = gather_objects(world, _check_share(folder, state, world))
    for problem in problems:
        if problem is not None:
            raise problem
    return state


def _read_state(folder: Path) -> TrainerState:
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(str(path), "is missing: the checkpoint is incomplete")
    try:
        return TrainerState(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(path), f"is corrupt ({error})") from error


def _check_share(folder: Path, state: TrainerState, world: World) -> CheckpointError | None:
    for name in sorted(state.files)[world.rank :: world.world_size]:
        path = folder / name
        size, crc = state.files[name]
        if not path.is_file():
            return CheckpointError(str(path), "is missing: the checkpoint is incomplete")
        found = path.stat().st_size
        if found != size:
            return CheckpointError(str(path), f"is corrupt: {found} bytes instead of {size}")
        if _stamp(path)[1] != crc:
            return CheckpointError(str(path), "is corrupt: its checksum differs from the recorded one")
    return None


def check_fits(folder: Path, state: TrainerState, *, config: TrainConfig, data_digest: str, world: World) -> None:
    """Raises CheckpointError, naming what differs, unless this run continues the checkpoint with the same numbers."""
    path = str(folder / STATE_FILE)
    theirs: dict[str, Any] = {"tokens (SHA-256)": state.data_digest}
    ours: dict[str, Any] = {"tokens (SHA-256)": data_digest}
    if not state.by_name:
        theirs = {"world size": state.world_size, "EP size": state.ep_size} | theirs
        ours = {"world size": world.world_size, "EP size": config.resolve_ep_size(world.world_size)} | ours
    if state.by_name or config.run.is_elastic:
        theirs["shares of the batch"] = state.num_shares or state.world_size
        ours["shares of the batch"] = config.run.num_shares or world.world_size
    if state.config_digest != config.digest():
        theirs |= state.config_identity
        ours |= config.identity()
    different = [
        f"{key}: {theirs.get(key)!r} there, {value!r} here" for key, value in ours.items() if theirs.get(key) != value
    ]
    if different:
        raise CheckpointError(path, "belongs to another run (" + "; ".join(different) + ")")
    if state.step > config.run.steps:
        raise CheckpointError(path, f"is at step {state.step}, beyond run.steps = {config.run.steps}")


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, choice: CheckpointChoice) -> None:
    """Put weights, optimizer, schedule and step count of a verified checkpoint into the engine."""
    by_name = choice.state.by_name
    try:
        loaded, _ = engine.load_checkpoint(
            str(choice.folder.parent), tag=choice.folder.name, load_optimizer_states=not by_name
        )
    except Exception as error:  # DeepSpeed and torch raise many types for a file they cannot read
        raise CheckpointError(str(choice.folder), f"DeepSpeed cannot load it ({error})") from error
    if loaded is None or engine.global_steps != choice.state.step:
        raise CheckpointError(
            str(choice.folder), f"DeepSpeed loaded step {engine.global_steps}, not {choice.state.step}"
        )
    if by_name:
        load_optimizer(engine, choice.folder)
