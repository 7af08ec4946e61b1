"""A trained model writes text on Ray actors: its experts are shared, each MoE layer is two low-latency calls.

    make demo && python examples/05_decode.py
    python examples/05_decode.py --run runs/mine --ranks 4 --prompt "def main(" --num-tokens 100 --temperature 0.7

Every actor is a rank: it loads the dense weights and its own experts, takes its share of the prompts, and continues
them with a key-value cache (`train/decode.py`). In each step and layer, `low_latency_dispatch` brings rows to the ranks
of their experts and `low_latency_combine` brings the results back. Ranks may have different numbers of prompts.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import ray
import torch

from ray_deepep.cluster import bootstrap, current
from train.decode import Decoder
from train.decode_run import DecodeRun, Prompt, Sampling, encode_prompts, load_model, open_run, share_prompts
from train.decode_stats import StepTime, summarize
from train.errors import CheckpointError, ConfigError

PROMPTS = ("import ", "def test_", "class Error(Exc", "    for key, value in ", '"""The ')
MAX_TOKENS, ROUND, DEADLINE_S = 64, 16, 300.0


@ray.remote
class Rank:
    """One rank; `bootstrap` has given it a communicator before `load`."""

    def load(self, run: DecodeRun, prompts: list[Prompt], sampling: Sampling) -> str:
        """Weights and buffer; collective. Returns the transport."""
        torch.set_num_threads(1)  # ranks on CPUs share the cores
        comm = current().communicator
        device = torch.device("cuda" if comm.transport == "cuda" else "cpu")
        model = load_model(run, rank=comm.rank, num_ranks=comm.num_ranks, device=device)
        self.decoder = Decoder(model, comm, context=run.context, vocab_size=run.vocab_size, max_tokens=MAX_TOKENS)
        self.decoder.start(prompts, sampling)
        self.tokenizer = run.tokenizer()
        return comm.transport

    def decode(self, num_steps: int) -> tuple[list[StepTime], int]:
        """So many steps with all ranks; and how many sequences of this one go on."""
        return self.decoder.run(num_steps), self.decoder.num_live

    def texts(self) -> list[dict]:
        """Every prompt of this rank with what was added, and why no more was."""
        rank, text = current().world_rank, self.tokenizer.decode
        return [
            {"index": c.index, "rank": rank, "prompt": text([*c.prompt_ids]), "text": text([*c.ids]), "end": c.end}
            for c in self.decoder.completions
        ]


def start_ranks(num_ranks: int) -> list:
    """Actors with a GPU each, where the cluster has so many, else with half a core."""
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)  # a cluster that runs; it must see the run's folder
    else:
        ray.init(address="local", num_cpus=max(4, num_ranks), include_dashboard=False, log_to_driver=False)
    cpu = {"num_cpus": 0.5, "runtime_env": {"env_vars": {"DS_ACCELERATOR": "cpu"}}}
    options = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) >= num_ranks else cpu
    ranks = [Rank.options(**options).remote() for _ in range(num_ranks)]
    ray.get([rank.__ray_ready__.remote() for rank in ranks], timeout=DEADLINE_S)  # they import DeepSpeed
    return ranks


def decode(args: argparse.Namespace) -> dict:
    """Texts and times, as `--json` writes them. What is wrong with the arguments is raised before any actor starts."""
    run = open_run(args.run, num_ranks=args.ranks)
    stop_id = run.tokenizer().end_id
    sampling = Sampling(num_tokens=args.num_tokens, temperature=args.temperature, seed=args.seed, stop_id=stop_id)
    shares = share_prompts(encode_prompts(run, args.prompt or PROMPTS), args.ranks, max_tokens=MAX_TOKENS)

    ranks = start_ranks(args.ranks)
    bootstrap(ranks)
    loading = [rank.load.remote(run, share, sampling) for rank, share in zip(ranks, shares, strict=True)]
    transport = ray.get(loading, timeout=DEADLINE_S)[0]
    times: list[list[StepTime]] = [[] for _ in ranks]
    live = 1
    while live:  # a rank whose texts are done goes on with 0 tokens, for its experts are needed
        answers = ray.get([rank.decode.remote(ROUND) for rank in ranks], timeout=DEADLINE_S)
        live = sum(num_live for _, num_live in answers)
        for own, (steps, _) in zip(times, answers, strict=True):
            own.extend(steps)
    texts = [text for own in ray.get([rank.texts.remote() for rank in ranks], timeout=DEADLINE_S) for text in own]
    ray.shutdown()
    about = {"run": str(args.run), "step": run.step, "experts": run.config.model.num_experts, "ranks": args.ranks}
    texts.sort(key=lambda text: text["index"])
    return about | {"transport": transport, "stats": dataclasses.asdict(summarize(times)), "texts": texts}


REPORT = """---
{num_drawn} tokens; {tokens_per_s:,.0f} tokens/s in {num_decode_steps} decode steps
a step: p50 {step_us_p50:,.0f} µs, p99 {step_us_p99:,.0f} µs
  dispatch p50 {dispatch_us_p50:,.0f} µs, combine p50 {combine_us_p50:,.0f} µs: {comm_share:.0%} of the time"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo/ray_deepep"), help="folder of a training run")
    parser.add_argument("--ranks", type=int, default=2, help="actors that share the experts (default 2)")
    parser.add_argument("--prompt", action="append", help="text to continue; give it more than once for a batch")
    parser.add_argument("--num-tokens", type=int, default=64, help="most tokens to add to a prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--json", type=Path, help="write texts and times to this file")
    args = parser.parse_args(argv)
    try:
        result = decode(args)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("{run}, step {step}: {experts} experts on {ranks} ranks, transport {transport}".format(**result))
    for text in result["texts"]:
        print("--- rank {rank}, {end}\n{prompt}⟶{text}".format(**text))
    print(REPORT.format(**result["stats"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
