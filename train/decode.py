"""Decoding with a key-value cache, expert-parallel: MoE layers run over the low-latency calls of a `Buffer`. No Ray.

    model = load_model(run, rank=comm.rank, num_ranks=comm.num_ranks, device=device)  # train/decode_run.py
    decoder = Decoder(model, comm, context=run.context, vocab_size=run.vocab_size)    # collective
    decoder.start(prompts, Sampling(num_tokens=64))                                   # each rank has its own
    times = decoder.run(32)                                                           # collective: 32 steps

Notable: a step takes the ids that are not in the cache yet, of all sequences of the rank at once. For a new prompt that
is a piece of it, for the others one id, so prompts are read and texts continued by the same code, and by the same two
calls per MoE layer. Sequences that ended leave the batch; a rank that has none left still enters every call, with 0
tokens, until no rank has any.

Shape suffixes: T rows of a step, B sequences, S ids of the sequence that has most in it, L cached positions, C context,
H hidden, N heads, D head size, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor

from ray_deepep import Buffer, Communicator
from train.clock import Clock
from train.convert import require
from train.decode_run import Prompt, Sampling
from train.decode_stats import StepTime
from train.model import Attention, Block, MoELanguageModel, rotary_table, rotate
from train.sample import attention_of_any_length, draw_token

_ROW_MULTIPLE = 128
"""Low-latency calls move rows of a multiple of this many elements."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt, continued."""

    index: int
    """The prompt's."""
    prompt_ids: tuple[int, ...]
    """The prompt's."""
    ids: tuple[int, ...]
    """What was drawn, the stop id included."""
    end: str
    """Why it ended: `stop` (the stop id), `length` (as many as asked for), or `context` (no room left)."""


def route(gate_EH: Tensor, x_TH: Tensor, num_topk: int) -> tuple[Tensor, Tensor]:
    """Experts [T, K] int64 of each row, and their weights [T, K] fp32: the choice of DeepSpeed's gate in evaluation.

    Softmax in fp32; the K largest, divided by their sum for K > 1. Two things differ from training, and from a
    validation: nothing is dropped, because there is no capacity; and for K = 2, where DeepSpeed's gate *draws* the
    second expert (from the softmax without the first), the likeliest one is taken, so that a text can be repeated.
    """
    gates_TE = F.linear(x_TH.float(), gate_EH.float()).softmax(dim=-1)
    weights_TK, topk_idx_TK = gates_TE.topk(num_topk, dim=-1)
    if num_topk > 1:
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        weights_TK = weights_TK / total_T1.clamp_min(torch.finfo(torch.float32).eps)
    return topk_idx_TK, weights_TK


@dataclass(kw_only=True)
class _Sequence:
    prompt: Prompt
    ids: list[int]
    generator: torch.Generator
    num_cached: int = 0


@dataclass(frozen=True, kw_only=True)
class _Step:
    """Where the rows of a step belong. Tensors are int64 but for the last two."""

    lengths: list[int]
    """Ids of each sequence, B numbers."""
    prefill: bool
    """Whether some sequence had more than its last id to read."""
    tokens_T: Tensor
    sequence_T: Tensor
    """Row's sequence in the batch, in [0, B)."""
    column_T: Tensor
    """Row's place among its sequence's ids of this step, in [0, S)."""
    position_T: Tensor
    """Row's place in its sequence, in [0, C)."""
    mask_B1SL: Tensor
    """Which cached positions a row may look at, bool."""
    rope_2T1D: Tensor
    """cos and sin of `position_T`."""


class Decoder:
    """Continues the prompts of this rank while other ranks continue theirs; making one and `run` are collective.

    model: from `load_model`, this rank's share. comm: the EP group that shares the experts. context: C, most ids of a
    sequence. vocab_size: ids that may be drawn. max_tokens: most rows T that any rank puts into one step, at most
    1,024, the same on all ranks. on_scores: told the prompt's index and the scores [V] fp32 of each id to be drawn.
    Raises what `Buffer` and its low-latency calls raise.
    """

    def __init__(
        self,
        model: MoELanguageModel,
        comm: Communicator,
        *,
        context: int,
        vocab_size: int,
        max_tokens: int = 64,
        on_scores: Callable[[int, Tensor], None] | None = None,
    ):
        config = model.config
        self._model = model
        self._context, self._vocab_size, self._max_tokens = context, vocab_size, max_tokens
        self._on_scores = on_scores
        self._buffer = Buffer(
            comm,
            num_experts=config.num_experts,
            hidden=-(-config.hidden // _ROW_MULTIPLE) * _ROW_MULTIPLE,
            num_topk=config.num_topk,
            max_tokens=0,  # no normal calls
            low_latency_max_tokens=max_tokens,
        )
        self._device = model.embed.weight.device
        self._rope_2CD = rotary_table(context, config.hidden // config.num_heads, config.rope_theta, self._device)
        self._sampling = Sampling()
        self._live: list[_Sequence] = []
        self._cache = self._empty_cache(0)
        self.completions: list[Completion] = []
        """Sequences that ended, in the order in which they did."""

    @property
    def num_live(self) -> int:
        """Sequences of this rank that have not ended."""
        return len(self._live)

    def start(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Forget what was, and take `prompts`. Local.

        Raises ConfigError for more of them than rows in a step, and for one that is empty or fills the context.
        """
        rule = f"must be at most max_tokens={self._max_tokens} on a rank"
        require(len(prompts) <= self._max_tokens, "prompts", len(prompts), rule)
        for prompt in prompts:
            rule = f"must have at least 1 token, and fewer than the context of {self._context}"
            require(1 <= len(prompt.ids) < self._context, f"prompts[{prompt.index}]", len(prompt.ids), rule)
        self._sampling = sampling
        self._live = [
            _Sequence(prompt=p, ids=list(p.ids), generator=_generator(sampling.seed, p.index)) for p in prompts
        ]
        self._cache = self._empty_cache(len(prompts))
        self.completions = []

    @torch.no_grad()
    def run(self, num_steps: int) -> list[StepTime]:
        """So many steps, also where this rank has nothing to do in them. Collective; all ranks pass the same number."""
        with attention_of_any_length():
            return [self._run_step() for _ in range(num_steps)]

    def close(self) -> None:
        """Free the buffer."""
        self._buffer.close()

    def _run_step(self) -> StepTime:
        clock = Clock()
        step = self._next_step()
        x_TH = self._model.embed(step.tokens_T)
        for block, cache_2BCND in zip(self._model.blocks, self._cache, strict=True):
            x_TH = x_TH + self._attend(block.attn, block.attn_norm(x_TH), cache_2BCND, step)
            x_TH = x_TH + self._feed_forward(block, block.ffn_norm(x_TH), clock)
        num_drawn = self._draw(x_TH, step)
        clock.lap("compute")
        return StepTime(
            num_rows=len(step.tokens_T),
            num_drawn=num_drawn,
            prefill=step.prefill,
            step_us=clock.total_ms * 1e3,
            dispatch_us=clock.ms["dispatch"] * 1e3,
            combine_us=clock.ms["combine"] * 1e3,
        )

    def _next_step(self) -> _Step:
        """What is not cached yet, of each sequence as much as leaves room for the others."""
        most = self._max_tokens // max(len(self._live), 1)
        ids = [s.ids[s.num_cached : s.num_cached + most] for s in self._live]
        places = [
            (token, b, column, self._live[b].num_cached + column)
            for b, tokens in enumerate(ids)
            for column, token in enumerate(tokens)
        ]
        table = torch.tensor(places, dtype=torch.int64).view(-1, 4).T.contiguous().to(self._device)
        begin_B = torch.tensor([s.num_cached for s in self._live], dtype=torch.int64, device=self._device)
        lengths = [len(tokens) for tokens in ids]
        most_ids = max(lengths, default=0)
        end = max((s.num_cached + n for s, n in zip(self._live, lengths, strict=True)), default=0)
        query_BS = begin_B[:, None] + torch.arange(most_ids, device=self._device)
        mask_BSL = torch.arange(end, device=self._device) <= query_BS[:, :, None]
        return _Step(
            lengths=lengths,
            prefill=any(len(s.ids) - s.num_cached > 1 for s in self._live),
            tokens_T=table[0],
            sequence_T=table[1],
            column_T=table[2],
            position_T=table[3],
            mask_B1SL=mask_BSL[:, None],
            rope_2T1D=self._rope_2CD[:, table[3], None],
        )

    def _attend(self, attn: Attention, x_TH: Tensor, cache_2BCND: Tensor, step: _Step) -> Tensor:
        """Write keys and values of the rows to the cache, then let them look at all of their sequence's."""
        num_rows, num_heads = len(x_TH), attn.num_heads
        if num_rows == 0:
            return x_TH
        q_TND, k_TND, v_TND = attn.qkv(x_TH).view(num_rows, 3, num_heads, -1).unbind(1)
        q_TND, k_TND = rotate(q_TND, step.rope_2T1D), rotate(k_TND, step.rope_2T1D)
        row = (step.sequence_T, step.position_T)
        cache_2BCND[0][row], cache_2BCND[1][row] = k_TND, v_TND
        batch, _, most_ids, end = step.mask_B1SL.shape
        q_BSND = q_TND.new_zeros(batch, most_ids, num_heads, q_TND.shape[-1])
        q_BSND[step.sequence_T, step.column_T] = q_TND
        k_BNLD, v_BNLD = cache_2BCND[:, :, :end].transpose(2, 3)
        y_BNSD = F.scaled_dot_product_attention(q_BSND.transpose(1, 2), k_BNLD, v_BNLD, attn_mask=step.mask_B1SL)
        return attn.out(y_BNSD.transpose(1, 2)[step.sequence_T, step.column_T].reshape(num_rows, -1))

    def _feed_forward(self, block: Block, x_TH: Tensor, clock: Clock) -> Tensor:
        if not isinstance(block.ffn, MoE):
            return block.ffn(x_TH)
        y_TH = self._experts(block.ffn, x_TH, clock)
        if block.ffn.use_residual:
            share_T2 = block.ffn.coefficient(x_TH).softmax(dim=-1)
            y_TH = y_TH * share_T2[:, :1] + block.ffn.mlp(x_TH) * share_T2[:, 1:]
        return y_TH

    def _experts(self, layer: MoE, x_TH: Tensor, clock: Clock) -> Tensor:
        """Rows to the ranks of their experts, through these, and back; one dispatch and one combine."""
        gate, experts = layer.deepspeed_moe.gate, layer.deepspeed_moe.experts.deepspeed_experts
        topk_idx, weights = route(gate.wg.weight, x_TH, gate.k)
        hidden = x_TH.shape[1]
        padded = F.pad(x_TH, (0, self._buffer.geometry.hidden - hidden))
        clock.lap("compute")
        got = self._buffer.low_latency_dispatch(padded, topk_idx, topk_weights=weights)
        clock.lap("dispatch")
        # In place: the block of an expert has its rows in front, and nobody reads those behind them.
        for expert, rows, count in zip(experts, got.x, got.counts.tolist(), strict=True):
            rows[:count, :hidden] = expert(rows[:count, :hidden])
        clock.lap("compute")
        back = self._buffer.low_latency_combine(got.x, got.handle)
        clock.lap("combine")
        return back.x[:, :hidden]

    def _draw(self, x_TH: Tensor, step: _Step) -> int:
        """An id for every sequence whose ids are all cached; those that end by it leave. Returns their number."""
        last_rows = []
        ready = []
        for sequence, length, end in zip(self._live, step.lengths, itertools.accumulate(step.lengths), strict=True):
            sequence.num_cached += length
            if sequence.num_cached == len(sequence.ids):
                ready.append(sequence)
                last_rows.append(end - 1)
        scores_BV = self._model.head(self._model.norm(x_TH[last_rows])).float()[:, : self._vocab_size].cpu()
        for sequence, scores_V in zip(ready, scores_BV, strict=True):
            if self._on_scores is not None:
                self._on_scores(sequence.prompt.index, scores_V)
            sequence.ids.append(draw_token(scores_V, self._sampling.temperature, sequence.generator))
        self._let_go()
        return len(ready)

    def _let_go(self) -> None:
        ends = [self._end_of(sequence) for sequence in self._live]
        for sequence, end in zip(self._live, ends, strict=True):
            if end:
                prompt = sequence.prompt
                drawn = tuple(sequence.ids[len(prompt.ids) :])
                self.completions.append(Completion(index=prompt.index, prompt_ids=prompt.ids, ids=drawn, end=end))
        if any(ends):
            stay = [b for b, end in enumerate(ends) if not end]
            self._live = [self._live[b] for b in stay]
            self._cache = self._cache[:, :, stay]

    def _end_of(self, sequence: _Sequence) -> str:
        num_drawn = len(sequence.ids) - len(sequence.prompt.ids)
        if num_drawn and sequence.ids[-1] == self._sampling.stop_id:
            return "stop"
        if num_drawn == self._sampling.num_tokens:
            return "length"
        return "context" if len(sequence.ids) == self._context else ""

    def _empty_cache(self, num_sequences: int) -> Tensor:
        """Keys and values, [layers, 2, B, C, N, D] in the model's dtype."""
        config = self._model.config
        head_size = config.hidden // config.num_heads
        shape = (config.num_layers, 2, num_sequences, self._context, config.num_heads, head_size)
        # Zeros: attention multiplies what it masks by 0, and 0 times what memory may hold need not be 0.
        return torch.zeros(shape, dtype=self._model.embed.weight.dtype, device=self._device)


def _generator(seed: int, index: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
