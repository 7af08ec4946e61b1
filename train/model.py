"""A decoder-only Mixture-of-Experts language model: RMSNorm, rotary attention, MoE layers through `deepspeed.moe`.

Notable: every weight is drawn from a generator seeded by (seed, parameter name), where an expert's name holds its
*global* id. Initial weights are thus the same for every backend, world size and EP degree.

Shape suffixes: B sequences, S tokens, H hidden, N heads, D head size, F inner width of an expert, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.config import ModelConfig

_MAX_DRAWING = 8
"""Threads that draw weights; ranks of one node do it at the same time."""


class LossOutput(NamedTuple):
    """Losses of one batch, scalars in fp32. A tuple, because DeepSpeed looks for tensors in tuples only."""

    total: Tensor
    """What is minimised: `lm` plus the weighted load-balancing losses."""
    lm: Tensor
    """Mean cross-entropy per token, in nats."""
    aux: Tensor
    """Sum of the layers' load-balancing losses, unweighted (0 without MoE layers)."""
    expert_tokens: Tensor
    """Tokens routed to each expert by this rank's gates, before drops, int64 [MoE layers, E]."""


class _Rows(NamedTuple):
    """What blocks give."""

    x_BSH: Tensor
    aux: Tensor
    """Load-balancing loss, 0 without MoE."""
    expert_tokens: Tensor
    """As in `LossOutput`; [0, E] without MoE."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32. Formula: Zhang & Sennrich 2019, eq. 4."""

    def __init__(self, hidden: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x_BSH: Tensor) -> Tensor:
        x = x_BSH.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x.to(x_BSH.dtype) * self.weight


class Expert(nn.Module):
    """SwiGLU feed-forward, H → F → H, without biases. Accepts any leading shape, 0 rows included."""

    def __init__(self, hidden: int, expert_hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * expert_hidden, bias=False)
        self.down = nn.Linear(expert_hidden, hidden, bias=False)

    def forward(self, x_H: Tensor) -> Tensor:
        gate_F, up_F = self.gate_up(x_H).chunk(2, dim=-1)
        return self.down(F.silu(gate_F) * up_F)


def rotary_table(seq_len: int, head_size: int, theta: float, device: torch.device) -> Tensor:
    """Angles position · theta^(−2i/D) as cos and sin, [2, S, D/2] fp32. Formula: Su et al. 2021, eq. 34."""
    frequencies = theta ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x_BNSD: Tensor, rope_2SD: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) by the angles of `rotary_table`, in fp32."""
    cos, sin = rope_2SD
    a, b = x_BNSD.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_BNSD.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x_BSH: Tensor, rope_2SD: Tensor) -> Tensor:
        batch, seq_len, hidden = x_BSH.shape
        qkv = self.qkv(x_BSH).view(batch, seq_len, 3, self.num_heads, -1)
        q_BNSD, k_BNSD, v_BNSD = qkv.permute(2, 0, 3, 1, 4)
        q_BNSD, k_BNSD = rotate(q_BNSD, rope_2SD), rotate(k_BNSD, rope_2SD)
        y_BNSD = F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, is_causal=True)
        return self.out(y_BNSD.transpose(1, 2).reshape(batch, seq_len, hidden))


class Block(nn.Module):
    """Attention and a feed-forward part (MoE or one dense expert), each on a normalised residual branch."""

    def __init__(self, config: ModelConfig, *, moe: bool, ep_size: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden)
        expert = Expert(config.hidden, config.expert_hidden)
        self.ffn = _moe_layer(config, expert, ep_size) if moe else expert
        self.num_experts = config.num_experts

    def forward(self, x_BSH: Tensor, rope_2SD: Tensor) -> _Rows:
        """Takes and gives rows [B, S, H]."""
        x_BSH = x_BSH + self.attn(self.attn_norm(x_BSH), rope_2SD)
        normed_BSH = self.ffn_norm(x_BSH)
        if isinstance(self.ffn, MoE):
            y_BSH, aux, tokens_E = self.ffn(normed_BSH)
            return _Rows(x_BSH + y_BSH, aux, tokens_E.long()[None])
        no_loss, no_tokens = x_BSH.new_zeros((), dtype=torch.float32), x_BSH.new_zeros((0, self.num_experts)).long()
        return _Rows(x_BSH + self.ffn(normed_BSH), no_loss, no_tokens)


def _moe_layer(config: ModelConfig, expert: Expert, ep_size: int) -> MoE:
    return MoE(
        hidden_size=config.hidden,
        expert=expert,
        num_experts=config.num_experts,
        ep_size=ep_size,
        k=config.num_topk,
        capacity_factor=config.capacity_factor,
        eval_capacity_factor=config.eval_capacity_factor,
        min_capacity=config.min_capacity,
        use_residual=config.use_residual,
        noisy_gate_policy=config.noisy_gate_policy or None,
        drop_tokens=config.drop_tokens,
    )


class MoELanguageModel(nn.Module):
    """Next-token predictor. `forward` gives losses, `logits` the scores for sampling.

    vocab_size: rows V of the embedding and the head. ep_size: ranks of one EP group.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, ep_size: int):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(vocab_size, config.hidden)
        self.blocks = nn.ModuleList(
            Block(config, moe=config.is_moe_layer(layer), ep_size=ep_size) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> LossOutput:
        """tokens_BS, targets_BS: int64 ids. Collective over the EP group, as every method that runs the blocks."""
        rows = self._hidden(tokens_BS)
        lm = F.cross_entropy(self.head(rows.x_BSH).float().flatten(0, 1), targets_BS.flatten())
        total = lm + self.config.aux_loss_coef * rows.aux
        return LossOutput(total=total, lm=lm.detach(), aux=rows.aux.detach(), expert_tokens=rows.expert_tokens)

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Scores of the token after the last one, [B, V] fp32."""
        return self.head(self._hidden(tokens_BS).x_BSH[:, -1]).float()

    def _hidden(self, tokens_BS: Tensor) -> _Rows:
        config = self.config
        x_BSH = self.embed(tokens_BS)
        rope = rotary_table(tokens_BS.shape[1], config.hidden // config.num_heads, config.rope_theta, x_BSH.device)
        total_aux = torch.zeros((), device=x_BSH.device)
        expert_tokens = []
        for block in self.blocks:
            if config.activation_checkpointing and torch.is_grad_enabled():
                x_BSH, aux, tokens = checkpoint(block, x_BSH, rope, use_reentrant=False)
            else:
                x_BSH, aux, tokens = block(x_BSH, rope)
            total_aux = total_aux + aux.float()
            expert_tokens.append(tokens)
        return _Rows(self.norm(x_BSH), total_aux, torch.cat(expert_tokens))

    @contextmanager
    def no_drop(self) -> Iterator[None]:
        """Inside, gates drop no token, so that a prediction does not depend on how full an expert is."""
        gates = [module.deepspeed_moe.gate for module in self.modules() if isinstance(module, MoE)]
        for gate in gates:
            gate.drop_tokens = False
        try:
            yield
        finally:
            for gate in gates:
                gate.drop_tokens = self.config.drop_tokens


EXPERT_NAME = re.compile(r"(?<=\.deepspeed_experts\.)\d+(?=\.)")
"""The number of an expert in a parameter's name; counts from 0 on every rank."""


def init_weights(model: MoELanguageModel, *, seed: int, ep_rank: int) -> None:
    """Draw every weight from its own generator; `ep_rank` turns local expert numbers into global ids.

    Drawn on the CPU, so that they are the same on all devices; a generator uses one core, so several draw at once.
    """
    config = model.config
    num_local_experts = config.num_experts
    for module in model.modules():
        if isinstance(module, MoE):
            num_local_experts = module.num_local_experts
    branch_std = config.init_std / math.sqrt(2 * config.num_layers)

    @torch.no_grad()
    def draw(name: str, param: nn.Parameter) -> None:
        if param.ndim < 2:
            param.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            return
        unique = EXPERT_NAME.sub(lambda m: str(ep_rank * num_local_experts + int(m.group())), name)
        digest = hashlib.sha256(f"{seed}/{unique}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        std = branch_std if name.endswith(("down.weight", "attn.out.weight")) else config.init_std
        param.copy_(torch.randn(param.shape, generator=generator, device="cpu").mul_(std))

    with ThreadPoolExecutor(min(_MAX_DRAWING, os.cpu_count() or 1)) as pool:
        for drawn in [pool.submit(draw, *item) for item in model.named_parameters()]:
            drawn.result()


def split_for_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for the optimizer: matrices with decay, vectors without. Empty groups are left out."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"name": "decay", "params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
