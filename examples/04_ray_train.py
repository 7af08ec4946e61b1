"""A DeepSpeed MoE model under Ray Train: one argument makes it expert-parallel over ray_deepep.

    python examples/04_ray_train.py

The training function is plain DeepSpeed. `torch_config=ExpertParallelConfig()` brings up the communicator in every
worker, swaps DeepSpeed's MoE layers, and names the culprit when a worker dies: here worker 1 kills itself in its first
attempt, the log gets one RAY_DEEPEP_FAULT line, and Ray starts the workers again, which continue from the checkpoint.
"""

import os
import signal
import tempfile
from pathlib import Path

import ray
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ray_deepep.cluster import ExpertParallelConfig

NUM_STEPS, HIDDEN, NUM_TOKENS = 6, 64, 256


def train(config: dict) -> None:
    # Inside, so that only the workers import DeepSpeed.
    import deepspeed
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    context = ray.train.get_context()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes a minute
    torch.manual_seed(7)
    expert = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN))
    moe = MoE(hidden_size=HIDDEN, expert=expert, num_experts=8, ep_size=context.get_world_size(), k=2)
    # DeepSpeed's checkpoints want the MoE layer to have a name in the model.
    model = torch.nn.ModuleDict({"moe": moe})
    model.forward = moe.forward
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=3e-3),
        config={"train_micro_batch_size_per_gpu": NUM_TOKENS, "steps_per_print": 1_000_000},
    )
    first = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            engine.load_checkpoint(folder)
        first = engine.global_steps
    for step in range(first, NUM_STEPS):
        torch.manual_seed(1000 * step + context.get_world_rank())
        x = torch.randn(NUM_TOKENS, HIDDEN)
        y, l_aux, _ = engine(x)
        loss = torch.nn.functional.mse_loss(y, x.roll(1, dims=1)) + 0.01 * l_aux
        engine.backward(loss)
        engine.step()
        if context.get_world_rank() == 0:
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
        # All ranks write into one folder, which rank 0 reports.
        engine.save_checkpoint(config["folder"], tag="newest")
        checkpoint = Checkpoint.from_directory(config["folder"]) if context.get_world_rank() == 0 else None
        ray.train.report({"loss": loss.item()}, checkpoint=checkpoint)
        if step == 2 and context.get_world_rank() == 1 and first == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    engine.destroy()


def main() -> None:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # Ray's default of 2 s is for long runs
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RAY_ADDRESS" in os.environ:
        ray.init()  # a cluster that runs
    else:
        ray.init(address="local", num_cpus=4)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "deepspeed").mkdir()
        result = TorchTrainer(
            train,
            train_loop_config={"folder": f"{folder}/deepspeed"},
            torch_config=ExpertParallelConfig(),  # the one line
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=folder, name="moe", failure_config=FailureConfig(max_failures=1)),
        ).fit()
    print(f"last loss {result.metrics['loss']:.6f}")
    ray.shutdown()


if __name__ == "__main__":
    main()
