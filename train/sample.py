"""Text from the model: rank 0 draws each token and tells the others, so that all ranks run the same forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.distributed import World
from train.model import MoELanguageModel


@torch.no_grad()
def sample_tokens(
    model: MoELanguageModel,
    prompt: list[int],
    *,
    num_tokens: int,
    max_context: int,
    vocab_size: int,
    temperature: float,
    seed: int,
    world: World,
) -> list[int]:
    """Continue `prompt` by `num_tokens` ids below `vocab_size`, looking back `max_context` ids. Collective.

    The model must be in eval mode; no token is dropped. temperature: 0 takes the most likely id.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    with model.no_drop(), attention_of_any_length():
        for _ in range(num_tokens):
            tokens_BS = torch.tensor([ids[-max_context:]], device=world.device)
            scores_V = model.logits(tokens_BS)[0, :vocab_size].cpu()
            chosen = torch.tensor([draw_token(scores_V, temperature, generator)], device=world.device)
            if world.world_size > 1:
                dist.broadcast(chosen, src=0)
            ids.append(int(chosen))
    return ids[len(prompt) :]


def attention_of_any_length() -> AbstractContextManager[None]:
    """Inside, torch leaves out cuDNN's attention: it plans 64 ms (H200) for each new length, and texts grow by one."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def draw_token(scores_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """An id drawn from scores [V] on the CPU; with temperature 0 the most likely one."""
    if temperature == 0:
        return int(scores_V.argmax())
    return int(torch.multinomial(torch.softmax(scores_V / temperature, dim=-1), 1, generator=generator))
