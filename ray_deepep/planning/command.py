"""``ray-deepep plan``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys

from ..errors import InvalidArgumentError, InvalidTypeError, TransportUnavailableError
from .costs import Costs, default_costs
from .fit import read_costs
from .plan_step import simulate_plan_steps
from .predict import predict
from .text import as_json, plan_step_lines, prediction_lines
from .workload import ELEMENT_BYTES, LAYOUTS, REDUCES, TRANSPORTS, Workload


def add_plan(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand; ``options.handler`` is what to call."""
    plan = commands.add_parser("plan", help="predict time, bytes and memory of a layer on a cluster")
    for name, kind in (("--nodes", "nodes"), ("--gpus-per-node", "GPUs of a node; on CPUs ranks")):
        plan.add_argument(name, type=int, required=True, help=kind)
    plan.add_argument("--hidden", type=int, required=True, help="elements of a row")
    plan.add_argument("--experts", type=int, required=True, help="experts, a multiple of the ranks")
    plan.add_argument("--topk", type=int, required=True, help="experts of a token")
    plan.add_argument("--tokens", type=int, required=True, help="tokens of a rank in a normal call")
    plan.add_argument("--low-latency-tokens", type=int, default=128, help="tokens of a rank in a low-latency call")
    plan.add_argument("--dtype", default="bfloat16", help=f"of rows: {', '.join(ELEMENT_BYTES)} (default: bfloat16)")
    plan.add_argument("--layout", default="token_major", help=" or ".join(LAYOUTS))
    plan.add_argument("--reduce", default="fast", help=" or ".join(REDUCES))
    plan.add_argument("--transport", default="cuda", help=f"{' or '.join(TRANSPORTS)} (default: cuda)")
    plan.add_argument("--rows-in-heap", action="store_true", help="tokens and expert outputs are made with symm_empty")
    plan.add_argument("--cached-plan", action="store_true", help="the dispatch follows a plan that is known")
    plan.add_argument("--max-rows", type=int, help="Buffer(max_rows=); the worst case if not given")
    plan.add_argument("--constants", metavar="FILE", help="what ray-deepep doctor --bandwidth --json wrote")
    plan.add_argument("--rdma-gb-per-s", type=float, help="what a GPU sends to other nodes")
    plan.add_argument("--rdma-latency-us", type=float, help="of a put with signal to another node")
    plan.add_argument(
        "--simulate", type=int, nargs="*", metavar="RANKS", help="time the plan step for so many ranks (default: these)"
    )
    plan.add_argument("--json", action="store_true", help="machine-readable output")
    plan.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    """Predict and print; 2 and one line on bad arguments."""
    try:
        workload = _workload(options)
        costs = _costs(options, workload.transport)
        prediction = predict(workload, costs)
        steps = _plan_steps(options, workload)
    except (InvalidArgumentError, InvalidTypeError, TransportUnavailableError) as error:
        print(f"ray-deepep plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_json(prediction, steps), indent=1))
        return 0
    lines = prediction_lines(prediction)
    if steps:
        lines += [
            "",
            f"plan step of one rank, {workload.num_tokens} tokens a rank, one thread",
            *plan_step_lines(steps),
        ]
    print("\n".join(lines))
    return 0


def _workload(options: argparse.Namespace) -> Workload:
    return Workload(
        num_nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        hidden=options.hidden,
        num_experts=options.experts,
        num_topk=options.topk,
        num_tokens=options.tokens,
        low_latency_tokens=options.low_latency_tokens,
        dtype=options.dtype,
        layout=options.layout,
        reduce=options.reduce,
        transport=options.transport,
        rows_in_heap=options.rows_in_heap,
        cached_plan=options.cached_plan,
        max_rows=options.max_rows,
    )


def _costs(options: argparse.Namespace, transport: str) -> Costs:
    costs = read_costs(options.constants, transport) if options.constants else default_costs(transport)
    given = {}
    for name in ("rdma_gb_per_s", "rdma_latency_us"):
        value = getattr(options, name)
        if value is None:
            continue
        if not 0 < value < math.inf:
            raise InvalidArgumentError(name, value, "must be > 0 and finite")
        given[name] = value
    return dataclasses.replace(costs, **given)


def _plan_steps(options: argparse.Namespace, workload: Workload) -> list:
    if options.simulate is None:
        return []
    asked = options.simulate or [workload.num_ranks]
    same = options.simulate == []
    return simulate_plan_steps(
        asked,
        num_tokens=workload.num_tokens,
        num_topk=workload.num_topk,
        # For other numbers of ranks, the experts must divide by them too.
        num_experts=workload.num_experts if same else None,
        layout=workload.layout,
    )
