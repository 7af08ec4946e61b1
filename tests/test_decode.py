"""Decoding through the low-latency calls gives the scores and texts of the model that was trained, on any ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import shutil

import pytest
import torch
from harness import RankContext, shm_problem
from train_cases import STEPS, tiny, train

from train.decode_run import Prompt, Sampling, encode_prompts, load_model, open_run, share_prompts
from train.decode_stats import StepTime, summarize
from train.errors import CheckpointError, ConfigError

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "05_decode.py"
NUM_TOKENS, MAX_TOKENS, CONTEXT = 8, 16, 32
VARIANTS = {
    "top2": {},
    "top1_residual_alternate": {"model.num_topk": 1, "model.use_residual": True, "model.moe_every": 2},
    "top3": {"model.num_topk": 3},
}
BF16 = {"model.dtype": "bf16", "optim.zero_stage": 1}


def prompts_of(*lengths: int) -> list[Prompt]:
    """Prompts of these lengths, from a sentence of bytes."""
    text = b"def main(argv: list[str] | None = None) -> int:"
    return [Prompt(index=i, ids=tuple(text[i : i + n])) for i, n in enumerate(lengths)]


PROMPTS = prompts_of(5, 20, 1, 9, 30)


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """The run folder of a variant, trained once by two ranks."""
    folders: dict[str, pathlib.Path] = {}

    def folder_of(variant: str) -> pathlib.Path:
        if variant not in folders:
            folders[variant] = tmp_path_factory.mktemp("runs") / variant
            steps = {"run.steps": STEPS if variant == "top2" else 3, "run.sample_tokens": 0, "run.eval_every": 0}
            fields = steps | VARIANTS.get(variant, BF16)
            ranks.run(2, train, tiny(folders[variant], **fields).to_json(), deadline_s=120)
        return folders[variant]

    return folder_of


@pytest.fixture(scope="module")
def expected(ranks, trained):
    """What `stock` gives for `PROMPTS` with a variant; computed once."""
    found: dict[str, dict] = {}

    def expected_of(variant: str) -> dict:
        if variant not in found:
            [found[variant]] = ranks.run(1, stock, trained(variant), PROMPTS, NUM_TOKENS)
        return found[variant]

    return expected_of


# Run on the ranks


def stock(_: RankContext, folder: pathlib.Path, prompts: list[Prompt], num_tokens: int):
    """Greedy ids and their scores by prompt: DeepSpeed's own layers on one process, all ids again for every new one."""
    from train.model import MoELanguageModel

    run = open_run(folder, num_ranks=1)
    model = MoELanguageModel(run.config.model, vocab_size=264, ep_size=1).eval()
    weights = {}
    for path in run.checkpoint.glob("*model_states.pt"):
        found = torch.load(path, weights_only=False)
        weights |= found.get("module", found)
    model.load_state_dict(weights)
    for name, module in model.named_modules():
        if name.endswith("gate"):
            module.top2_2nd_expert_sampling = False
            module.min_capacity = 0  # the gate of K = 1 refuses fewer tokens
    drawn: dict[int, list[tuple[int, torch.Tensor]]] = {}
    with torch.no_grad(), model.no_drop():
        for prompt in prompts:
            ids = list(prompt.ids)
            while len(ids) < min(len(prompt.ids) + num_tokens, CONTEXT):
                scores = model.logits(torch.tensor([ids]))[0, : run.vocab_size]
                ids.append(int(scores.argmax()))
                drawn.setdefault(prompt.index, []).append((ids[-1], scores))
    return drawn


def decode(context: RankContext, transport: str, folder: pathlib.Path, prompts: list[Prompt], sampling: Sampling):
    """What this rank's share of the prompts became: completions, scores of each, and the steps."""
    from train.decode import Decoder

    run = open_run(folder, num_ranks=context.num_ranks)
    comm = context.communicator(transport)
    model = load_model(run, rank=comm.rank, num_ranks=comm.num_ranks, device=torch.device("cpu"))
    shares = share_prompts(prompts, comm.num_ranks, max_tokens=MAX_TOKENS)
    scores: dict[int, list[torch.Tensor]] = {}
    decoder = Decoder(
        model,
        comm,
        context=run.context,
        vocab_size=run.vocab_size,
        max_tokens=MAX_TOKENS,
        on_scores=lambda index, scores_V: scores.setdefault(index, []).append(scores_V.clone()),
    )
    decoder.start(shares[context.rank], sampling)
    # Enough for the fullest rank to read the longest prompt, and to continue it; all ranks take as many steps.
    most = max(len(p.ids) for p in prompts) // (MAX_TOKENS // len(shares[0])) + 1
    times = decoder.run(most + sampling.num_tokens)
    assert decoder.num_live == 0
    decoder.close()
    return decoder.completions, scores, times


# Against the layers it was trained with


@pytest.mark.parametrize(
    ("variant", "num_ranks"), [("top2", 1), ("top2", 2), ("top2", 4), ("top1_residual_alternate", 2), ("top3", 2)]
)
def test_scores_and_texts_are_those_of_the_stock_layers(ranks, trained, expected, transport, variant, num_ranks):
    sampling = Sampling(num_tokens=NUM_TOKENS)
    by_rank = ranks.run(num_ranks, decode, transport, trained(variant), PROMPTS, sampling)
    for rank, (completions, scores, _) in enumerate(by_rank):
        assert sorted(c.index for c in completions) == list(range(rank, len(PROMPTS), num_ranks))
        for c in completions:
            wanted_ids, wanted_scores = zip(*expected(variant)[c.index], strict=True)
            torch.testing.assert_close(torch.stack(scores[c.index]), torch.stack(wanted_scores), rtol=1e-4, atol=1e-5)
            assert c.ids == wanted_ids
            assert c.prompt_ids == PROMPTS[c.index].ids
            assert c.end == ("context" if len(c.prompt_ids) + NUM_TOKENS > CONTEXT else "length")


def test_bf16_rows_stay_close_to_fp32(ranks, trained, expected, transport):
    """The same weights; only the first scores of each prompt, before a rounding may choose another id."""
    for _, scores, _ in ranks.run(2, decode, transport, trained("bf16"), PROMPTS, Sampling(num_tokens=1)):
        for index, (first,) in scores.items():
            torch.testing.assert_close(first, expected("bf16")[index][0][1], rtol=0.02, atol=0.05)


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem() or "-")
def test_ranks_without_prompts_and_sequences_that_end_early(ranks, trained, expected):
    """Two of four ranks never have a token; a sequence that draws the stop id leaves, the others go on as before."""
    prompts = [PROMPTS[0], PROMPTS[1]]
    ids = {prompt.index: [token for token, _ in expected("top2")[prompt.index]] for prompt in prompts}
    stop = ids[0][2]
    for num_ranks in (1, 4):
        sampling = Sampling(num_tokens=NUM_TOKENS, stop_id=stop)
        by_rank = ranks.run(num_ranks, decode, "shm", trained("top2"), prompts, sampling)
        found = {c.index: c for completions, _, _ in by_rank for c in completions}
        assert found[0].end == "stop"
        for index, whole in ids.items():
            end = whole.index(stop) + 1 if stop in whole else len(whole)
            assert list(found[index].ids) == whole[:end]
        idle = [sum(t.num_rows for t in times) == 0 for _, _, times in by_rank]
        assert idle == ([False] if num_ranks == 1 else [False, False, True, True])


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem() or "-")
def test_draws_depend_on_the_seed_and_the_prompt_alone(ranks, trained):
    def texts(num_ranks: int, seed: int) -> dict[int, tuple[int, ...]]:
        sampling = Sampling(num_tokens=NUM_TOKENS, temperature=1.0, seed=seed)
        by_rank = ranks.run(num_ranks, decode, "shm", trained("top2"), prompts_of(4, 4, 4), sampling)
        return {c.index: c.ids for completions, _, _ in by_rank for c in completions}

    alone = texts(1, 7)
    assert texts(2, 7) == alone
    assert texts(1, 8) != alone


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem() or "-")
def test_steps_read_prompts_in_pieces_then_one_id_each(ranks, trained):
    sampling = Sampling(num_tokens=NUM_TOKENS)
    [(_, _, times)] = ranks.run(1, decode, "shm", trained("top2"), prompts_of(20, 2), sampling)
    used = [t for t in times if t.num_rows]
    # 16 rows for 2 sequences: 8 ids of the first and all of the second, then 8 + 1, and 4 + 1.
    assert [t.num_rows for t in used] == [10, 9, 5] + [2] * 5 + [1] * 2
    assert [t.num_drawn for t in used] == [1, 1] + [2] * 6 + [1] * 2
    assert [t.prefill for t in used] == [True] * 3 + [False] * 7
    assert all(0 < t.dispatch_us + t.combine_us < t.step_us for t in used)


@pytest.mark.parametrize("num_topk", [1, 2, 3, 4])
def test_route_chooses_what_deepspeeds_gate_chooses(num_topk):
    from deepspeed.moe.sharded_moe import TopKGate

    from train.decode import route

    torch.manual_seed(num_topk)
    gate = TopKGate(32, 8, k=num_topk, drop_tokens=False, min_capacity=0, top2_2nd_expert_sampling=False).eval()
    x = torch.randn(64, 32)
    _, _, _, indices, _, gates, _ = gate(x, sparse_routes=True)
    topk_idx, weights = route(gate.wg.weight, x, num_topk)
    assert torch.equal(topk_idx, indices.T.long())
    torch.testing.assert_close(weights, gates.T, rtol=1e-6, atol=1e-7)
    assert [tuple(t.shape) for t in route(gate.wg.weight, x[:0], num_topk)] == [(0, num_topk)] * 2


# Bad input, before anything starts


def test_what_is_no_run_says_how_to_get_one(tmp_path):
    with pytest.raises(ConfigError, match=r"--run = .*must be the folder of a training run .*make demo"):
        open_run(tmp_path / "nothing", num_ranks=2)


@pytest.mark.parametrize("num_ranks", [0, 3, 8])
def test_ranks_must_divide_the_experts(trained, num_ranks):
    with pytest.raises(ConfigError, match=f"--ranks = {num_ranks}: must divide the model's 4 experts"):
        open_run(trained("top2"), num_ranks=num_ranks)


def test_checkpoints_are_looked_at_first(trained, tmp_path):
    folder = shutil.copytree(trained("top2"), tmp_path / "run")
    expert = folder / "checkpoints" / "step_000008" / "layer_1_expert_3_mp_rank_00_model_states.pt"
    expert.write_bytes(expert.read_bytes()[:-1])
    assert open_run(folder, num_ranks=2).step == 4
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoints: holds no complete checkpoint"):
        open_run(folder, num_ranks=2)


def test_an_expert_that_cannot_be_read_is_named(trained, tmp_path):
    run = open_run(shutil.copytree(trained("top2"), tmp_path / "run"), num_ranks=2)
    (run.checkpoint / "layer_1_expert_3_mp_rank_00_model_states.pt").unlink()
    load_model(run, rank=0, num_ranks=2, device=torch.device("cpu"))  # has experts 0 and 1
    with pytest.raises(CheckpointError, match=r"layer_1_expert_3_mp_rank_00_model_states.pt: cannot be read"):
        load_model(run, rank=1, num_ranks=2, device=torch.device("cpu"))
    other = dataclasses.replace(run, config=run.config.replace(**{"model.expert_hidden": 64}))
    with pytest.raises(CheckpointError, match=r"does not fit the run's config .*deepspeed_experts"):
        load_model(other, rank=0, num_ranks=2, device=torch.device("cpu"))


def test_prompts_must_fit(trained):
    run = open_run(trained("top2"), num_ranks=2)
    assert [len(p.ids) for p in encode_prompts(run, ["a", "b" * 31])] == [1, 31]
    with pytest.raises(ConfigError, match=r"--prompt = 'bbb.*shorter than the context of 32 tokens; it has 32"):
        encode_prompts(run, ["a", "b" * 32])
    with pytest.raises(ConfigError, match="--prompt = '': must not be empty"):
        encode_prompts(run, ["a", ""])
    with pytest.raises(ConfigError, match="--prompt = '5 prompts': must be at most 4"):
        share_prompts(PROMPTS, 2, max_tokens=2)


@pytest.mark.parametrize(
    ("field", "value"), [("num_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("seed", -1)]
)
def test_sampling_is_checked(field, value):
    with pytest.raises(ConfigError, match=f"--{field.replace('_', '-')} = "):
        Sampling(**{field: value})


def test_the_example_starts_no_actor_for_bad_input(trained, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray", reason="the example needs Ray")
    spec = importlib.util.spec_from_file_location("decode_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "start_ranks", lambda num_ranks: pytest.fail("actors were started"))
    assert example.main(["--run", str(tmp_path)]) == 2
    assert "make demo" in capsys.readouterr().err
    assert example.main(["--run", str(trained("top2")), "--prompt", "x" * 32]) == 2
    assert "shorter than the context" in capsys.readouterr().err


# Times


def test_summary_counts_decode_steps_and_their_slowest_rank():
    def step(num_rows: int, us: float, prefill: bool = False) -> StepTime:
        return StepTime(
            num_rows=num_rows,
            num_drawn=num_rows,
            prefill=prefill,
            step_us=us,
            dispatch_us=us / 4,
            combine_us=us / 8,
        )

    first = [step(5, 900.0, prefill=True), step(2, 100.0), step(2, 200.0), step(0, 50.0), step(0, 1.0)]
    second = [step(1, 800.0), step(1, 100.0), step(0, 100.0), step(1, 300.0), step(0, 1.0)]
    stats = summarize([first, second])
    assert (stats.num_drawn, stats.num_prefill_steps, stats.num_decode_steps) == (12, 1, 3)
    assert stats.tokens_per_s == pytest.approx(6 / 600e-6)
    assert (stats.step_us_p50, stats.step_us_p99) == (200.0, pytest.approx(298.0))
    assert (stats.dispatch_us_p50, stats.combine_us_p50) == (37.5, 18.75)
    assert stats.comm_share == pytest.approx((100 + 150 + 175) * 3 / 8 / 600)
    assert json.loads(json.dumps(summarize([[], []]).__dict__))["tokens_per_s"] == 0


def test_a_growing_text_leaves_cudnns_attention_out():
    """On GPUs it would plan anew, 64 ms, for each length; what follows may use it again."""
    from train.distributed import World
    from train.sample import sample_tokens

    allowed: list[bool] = []

    class Counting:
        """Predicts the number of ids it sees."""

        no_drop = staticmethod(contextlib.nullcontext)

        def logits(self, tokens_BS):
            allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
            return torch.nn.functional.one_hot(torch.tensor([tokens_BS.shape[1]]), 16).float()

    model, before = Counting(), torch.backends.cuda.cudnn_sdp_enabled()
    world = World(rank=0, world_size=1, device=torch.device("cpu"))
    options = {"max_context": 6, "vocab_size": 16, "temperature": 0.0, "seed": 1, "world": world}
    assert sample_tokens(model, [1, 2], num_tokens=6, **options) == [2, 3, 4, 5, 6, 6]
    assert allowed == [False] * 6
    assert torch.backends.cuda.cudnn_sdp_enabled() is before is True
