"""``ray-deepep submit``, ``status``, ``stop`` and ``dashboard``: training runs as jobs of a Ray cluster."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import dashboard, entrypoint, run_state
from .checkout import commit_of
from .errors import ClusterUnreachableError, InvalidArgumentError, UnknownJobError
from .report.reader import find_runs

if TYPE_CHECKING:
    from .cluster.jobs import JobClient

_PACKAGE = Path(__file__).parent
_ERRORS = (InvalidArgumentError, ClusterUnreachableError, UnknownJobError)
_ADDRESS_HELP = "of the cluster: http://HEAD:8265 (default: RAY_ADDRESS, or the cluster of this machine)"


def register(commands: argparse._SubParsersAction) -> dict[str, Callable[[argparse.Namespace], int]]:
    """Add the subcommands; returns what each of them runs."""
    _add_submit(commands)
    status = commands.add_parser("status", help="how jobs, or runs in folders, are doing")
    status.add_argument("job", nargs="?", metavar="JOB", help="a job, or the folder of a run (default: all jobs)")
    status.add_argument("--address", metavar="URL", help=_ADDRESS_HELP)
    status.add_argument("--json", action="store_true", help="a line of JSON for each")
    stop = commands.add_parser("stop", help="stop a job, which writes a checkpoint first")
    stop.add_argument("job", metavar="JOB")
    stop.add_argument("--address", metavar="URL", help=_ADDRESS_HELP)
    stop.add_argument("--wait", type=float, default=150.0, metavar="S", help="seconds to wait for its end (150)")
    board = commands.add_parser("dashboard", help="the Grafana board")
    board.add_argument("action", choices=("install", "show"), help="put it beside Ray's own, or print it")
    board.add_argument("--session", default="", metavar="DIR", help="Ray's session folder (/tmp/ray/session_latest)")
    return {
        "dashboard": _reported(_dashboard),
        "submit": _reported(_submit),
        "status": _reported(_status),
        "stop": _reported(_stop),
    }


def _add_submit(commands: argparse._SubParsersAction) -> None:
    submit = commands.add_parser(
        "submit",
        help="run a command, or a Python module, as a job",
        usage="ray-deepep submit [options] (MODULE | COMMAND) [args ...]",
    )
    add = submit.add_argument
    add("--address", metavar="URL", help=_ADDRESS_HELP)
    add("--working-dir", metavar="DIR", help="send this folder along; the job runs in a copy of it")
    add(
        "--ship",
        default="auto",
        metavar="WHAT",
        help="how ray_deepep (and the module's package) gets to the nodes: modules (sent along), a wheel's path, none"
        " (it is installed there), auto: modules, unless the cluster has GPUs and this build has no CUDA core",
    )
    add("--env", nargs=1, action="extend", default=[], metavar="NAME=VALUE", help="environment of the job")
    add("--num-cpus", type=float, default=0.0, metavar="N", help="CPUs of the entry point itself (0)")
    add("--num-gpus", type=float, default=0.0, metavar="N", help="GPUs of the entry point itself (0)")
    add("--memory", type=int, default=0, metavar="BYTES", help="memory of the entry point itself (0)")
    add("--resource", nargs=1, action="extend", default=[], metavar="NAME=AMOUNT", help="others of the entry point")
    add("--metadata", nargs=1, action="extend", default=[], metavar="KEY=VALUE", help="more to keep with the job")
    add("--job-id", default="", metavar="ID", help="its name (default: Ray makes one)")
    add("--stop-wait", type=int, default=120, metavar="S", help="seconds that it has to end when it is stopped (120)")
    add("--python", default="", metavar="PATH", help="of the cluster's nodes, for a MODULE")
    add("--no-wait", action="store_true", help="return when it is submitted; else its log is shown to its end")
    add("--no-check", action="store_true", help="submit also what no node has room for now: the cluster may grow")
    add("words", nargs=argparse.REMAINDER, metavar="MODULE | COMMAND", help="what to run, and its arguments")


def _reported(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """What the user can do something about is one line and exit code 2."""

    def run(options: argparse.Namespace) -> int:
        try:
            return command(options)
        except _ERRORS as error:
            print(f"ray-deepep {options.command}: {error}", file=sys.stderr)
            return 2

    return run


def _client(options: argparse.Namespace) -> JobClient:
    try:
        from .cluster.jobs import JobClient
    except ImportError as error:
        raise InvalidArgumentError("ray", str(error), "must be installed: pip install 'ray-deepep[ray]'") from error
    return JobClient(options.address)


# submit


def _submit(options: argparse.Namespace) -> int:
    folder = os.path.abspath(options.working_dir or os.getcwd())
    if not os.path.isdir(folder):
        raise InvalidArgumentError("--working-dir", options.working_dir, "must be a folder")
    parsed = entrypoint.parse(options.words, folder)
    described = entrypoint.describe(parsed)  # before the cluster is asked: what is refused here costs nobody a start
    pairs = _pairs("--metadata", options.metadata)
    client = _client(options)
    from .cluster.jobs import JobSpec

    stays = client.head_is_here and not options.working_dir
    described |= _out_dir(described.get("out_dir", ""), folder if stays else "")
    sha = commit_of(parsed.root or folder)
    with _shipped(options, parsed, client) as modules:
        spec = JobSpec(
            command=_command(options, parsed, folder, here=client.head_is_here),
            runtime_env=_runtime_env(options, modules),
            metadata=described | ({"git_sha": sha} if sha else {}) | pairs,
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
            memory=options.memory,
            resources={name: _amount(name, text) for name, text in _pairs("--resource", options.resource).items()},
            job_id=options.job_id,
            stop_wait_s=options.stop_wait,
        )
        job_id = client.submit(spec, check=not options.no_check)
    print(f"submitted {job_id} to {client.url}", flush=True)
    return 0 if options.no_wait else _follow(client, job_id)


def _follow(client: JobClient, job_id: str) -> int:
    try:
        status = client.follow(job_id, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"\n{job_id} goes on; ray-deepep status {job_id}, or ray-deepep stop {job_id}", file=sys.stderr)
        return 130
    print(f"{job_id} {status.lower()}")
    return 0 if status == "SUCCEEDED" else 1


def _out_dir(out_dir: str, folder: str) -> dict[str, str]:
    """The output folder, absolute. folder: where the job will run; empty: in a copy that Ray deletes, or on whatever
    machine, where a relative one would be lost."""
    if not out_dir:
        return {}
    if not folder and not os.path.isabs(out_dir):
        rule = "must be absolute, and a folder that all nodes see: the job does not run in this folder"
        raise InvalidArgumentError("out_dir", out_dir, rule)
    return {"out_dir": os.path.join(folder, out_dir)}


def _command(options: argparse.Namespace, parsed: entrypoint.Entrypoint, folder: str, *, here: bool) -> str:
    command = parsed.command(options.python or (sys.executable if here else "python"))
    # Without a folder of its own a job runs where Ray was started. exec: a shell in between would end first when the
    # job is stopped, and Ray would not see the end of a process that is no child of its own.
    return f"cd {shlex.quote(folder)} && exec {command}" if here and not options.working_dir else command


def _runtime_env(options: argparse.Namespace, modules: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if options.working_dir:
        found["working_dir"] = os.path.abspath(options.working_dir)
    if modules:
        found["py_modules"] = list(modules)
    if options.env:
        found["env_vars"] = _pairs("--env", options.env)
    return found


@contextlib.contextmanager
def _shipped(options: argparse.Namespace, parsed: entrypoint.Entrypoint, client: JobClient) -> Iterator[list[str]]:
    """Folders of packages to send along."""
    with tempfile.TemporaryDirectory(prefix="ray_deepep_ship_") as scratch:
        if options.ship.endswith(".whl"):
            yield _unpacked(options.ship, scratch)
        elif options.ship in ("auto", "modules"):
            yield [] if options.ship == "auto" and _leaves_cuda_behind(client) else _modules(options, parsed)
        elif options.ship == "none":
            yield []
        else:
            rule = "must be auto, modules, none, or the path of a wheel"
            raise InvalidArgumentError("--ship", options.ship, rule)


def _unpacked(wheel: str, scratch: str) -> list[str]:
    """Packages of a wheel. Ray can take the wheel too, and would install all it depends on, torch included, anew."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
    except (OSError, zipfile.BadZipFile) as error:
        raise InvalidArgumentError("--ship", wheel, f"must be a wheel ({error})") from error
    return sorted(str(path.parent) for path in Path(scratch).glob("*/__init__.py"))


def _modules(options: argparse.Namespace, parsed: entrypoint.Entrypoint) -> list[str]:
    found = [str(_PACKAGE)]
    package = Path(parsed.root, parsed.module.split(".")[0]) if parsed.root and "." in parsed.module else None
    in_working_dir = options.working_dir and Path(parsed.root) == Path(options.working_dir).resolve()
    if package is not None and package != _PACKAGE and not in_working_dir:
        found.append(str(package))
    return found


def _leaves_cuda_behind(client: JobClient) -> bool:
    if any(_PACKAGE.glob("_cuda.*.so")) or not any(node.get("GPU") for node in client.nodes()):
        return False
    print("the cluster has GPUs and this build no CUDA core: its own ray_deepep is used; --ship modules sends this one")
    return True


def _pairs(name: str, items: Sequence[str]) -> dict[str, str]:
    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise InvalidArgumentError(name, item, "must be NAME=VALUE")
        found[key] = value
    return found


def _amount(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidArgumentError("--resource", f"{name}={text}", "must be NAME=NUMBER") from error


# status and stop


def _status(options: argparse.Namespace) -> int:
    if options.job is not None and os.path.isdir(options.job):
        states = [run_state.state_of_folder(run) for run in find_runs([options.job])]
    elif options.job is not None:
        states = [_client(options).state(options.job)]
    else:
        states = _client(options).states()
    if options.json:
        print("\n".join(state.to_json() for state in states))
    elif options.job is not None and len(states) == 1:
        print(states[0])
    else:
        print(run_state.table(states) if states else "no jobs")
    return 0


def _dashboard(options: argparse.Namespace) -> int:
    if options.action == "show":
        print(json.dumps(dashboard.board(), indent=1))
    else:
        print(dashboard.install(options.session))
    return 0


def _stop(options: argparse.Namespace) -> int:
    client = _client(options)
    before = client.state(options.job)
    if before.ended:
        raise InvalidArgumentError("job", options.job, f"must be running; it has {before.phase}")
    client.stop(options.job)
    client.wait(options.job, options.wait)
    state = client.state(options.job)
    print(f"{options.job} {state.phase}; {f'checkpoint {state.checkpoint}' if state.checkpoint else 'no checkpoint'}")
    return 0 if state.ended else 1
