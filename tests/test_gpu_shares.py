"""Training with more workers than GPUs: each asks for a share of one, and they meet over gloo. Needs no GPU."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

pytest.importorskip("ray", reason="the options are those of runs on Ray")
pytest.importorskip("deepspeed", reason="train/ needs DeepSpeed")

import torch
import torch.distributed as dist

from train import demo, distributed, engine, ray_main
from train.errors import ConfigError
from train.presets import get_preset
from train.ray_main import RayOptions, check_resources


def test_workers_may_share_a_gpu(caplog):
    """Whole GPUs are too few: they train on CPUs, and are told. Shares of one are enough, and NCCL is not asked."""
    config, cluster = get_preset("tiny").replace(**{"run.backend": "ray_deepep"}), {"CPU": 2.0, "GPU": 1.0}
    assert not check_resources(config, RayOptions(num_workers=2), cluster)
    assert "training on CPUs: 2 workers want 2 GPUs of 1; --gpus-per-worker lets" in caplog.text
    half = RayOptions(num_workers=2, gpus_per_worker=0.5)
    assert check_resources(config, half, cluster)
    assert not check_resources(config, dataclasses.replace(half, num_workers=3), cluster | {"CPU": 3.0})
    assert ray_main._scaling_config(half, use_gpu=True).resources_per_worker == {"CPU": 1.0, "GPU": 0.5}
    assert "GPU" not in ray_main._scaling_config(half, use_gpu=False).resources_per_worker
    for options, shared, backend in ((half, True, "gloo"), (RayOptions(num_workers=2), False, None)):
        torch_config = ray_main._torch_config(config, options)
        assert (torch_config.comm.allow_shared_gpus, torch_config.backend) == (shared, backend)
        stock = config.replace(**{"run.backend": "stock"})
        assert ray_main._torch_config(stock, options).backend == backend


@pytest.mark.parametrize(
    ("device", "ranks", "gpus", "backend"),
    [("cpu", 2, 0, "gloo"), ("cuda", 1, 1, "nccl"), ("cuda", 2, 2, "nccl"), ("cuda", 2, 1, "gloo")],
)
def test_ranks_that_share_a_gpu_meet_over_gloo(monkeypatch, device, ranks, gpus, backend):
    """NCCL refuses them."""
    chosen = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    distributed._init_process_group(device, 10.0)
    assert chosen == [backend]


def test_deepspeed_takes_the_gpu_of_the_process(monkeypatch):
    """Left alone it takes the one of LOCAL_RANK, and rank 1 of two on one GPU would ask for a second."""
    asked, model = [], torch.nn.Linear(2, 2)
    monkeypatch.setattr(engine, "MoELanguageModel", lambda *_, **__: model)  # this torch may be one without CUDA
    monkeypatch.setattr(engine, "init_weights", lambda *_, **__: None)
    monkeypatch.setattr(engine.deepspeed, "initialize", lambda args, **_: asked.append(args) or [None])
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        world = distributed.World(rank=1, world_size=2, device=device)
        with contextlib.suppress(AttributeError):  # of the engine that is None
            engine.build_engine(get_preset("tiny"), vocab_size=256, world=world, num_micro_steps=1)
    assert [getattr(args, "device_rank", None) for args in asked] == [0, None]


def test_the_demo_passes_the_share_on(tmp_path):
    options = demo.options_from_args(["--gpus-per-worker", "0.5", "--out", str(tmp_path / "demo")])
    assert " --gpus-per-worker 0.5 " in options.entrypoint("ray_deepep", here=True)
    with pytest.raises(ConfigError, match=r"--gpus-per-worker = 2\.0: must be more than 0 and at most 1"):
        demo.options_from_args(["--gpus-per-worker", "2"])
