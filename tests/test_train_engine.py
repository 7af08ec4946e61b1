"""What the training program asks of DeepSpeed's engine, without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("deepspeed", reason="train/ needs DeepSpeed")

from train import engine
from train.presets import get_preset

GPU_WORLD = SimpleNamespace(device=SimpleNamespace(type="cuda"))
CPU_WORLD = SimpleNamespace(device=SimpleNamespace(type="cpu"))


def test_adam_is_fused_on_gpus_unless_the_user_says():
    generated = engine.deepspeed_config(get_preset("tiny"))
    adam = generated["optimizer"]["params"]
    assert engine._with_fused_adam(generated, GPU_WORLD)["optimizer"]["params"] == adam | {"fused": True}
    assert engine._with_fused_adam(generated, CPU_WORLD) is generated
    asked = {"optimizer": {"type": "AdamW", "params": adam | {"foreach": True}}}
    assert engine._with_fused_adam(asked, GPU_WORLD) is asked
    own = {"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}
    assert engine._with_fused_adam(own, GPU_WORLD) is own


@pytest.mark.parametrize(
    ("norm", "overflow", "broken"),
    [(None, False, False), (0.0, False, False), (3.5, False, False), (-1.0, False, True), (float("nan"), False, True)]
    + [(float("inf"), False, True), (float("inf"), True, False)],
)
def test_gradients_are_broken_where_a_step_was_done_with_them(norm, overflow, broken):
    """ZeRO says -1 for a norm that is no number; a step that DeepSpeed left out has changed no weights."""
    made_up = SimpleNamespace(get_global_grad_norm=lambda: norm, optimizer=SimpleNamespace(overflow=overflow))
    assert engine.has_broken_gradients(made_up) is broken
