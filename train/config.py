"""What a run is made of: frozen dataclasses, one docstring under each field, every rule checked on construction.

Presets are in `presets.py`, the command line in `cli.py`. A config is JSON both ways (`to_json`, `from_json`) and has a
digest over the fields that decide the losses, so that a checkpoint is continued only by the run it belongs to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.convert import build_dataclass, check_types, require, set_dotted
from train.errors import ConfigError

BACKENDS = ("stock", "ray_deepep")
DTYPES = ("fp32", "bf16")
TOKENIZERS = ("bytes", "bpe")
ON_EXISTING = ("error", "resume", "overwrite")
_LONGEST_S = 1e7  # months: a deadline has an end


def _require_at_least(section: object, prefix: str, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(math.isfinite(value) and value >= minimum, f"{prefix}.{name}", value, f"must be at least {minimum}")


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, name, value, f"must be one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    hidden: int = 128
    """Width H of a token's row, in elements."""
    num_layers: int = 2
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads; must divide `hidden` into an even head size (rotary pairs)."""
    num_experts: int = 8
    """Experts E of one MoE layer, over all ranks of an EP group."""
    num_topk: int = 2
    """Experts K chosen for each token."""
    expert_hidden: int = 256
    """Inner width of one expert (SwiGLU)."""
    moe_every: int = 1
    """Every n-th block has an MoE layer, counted from the last block back; the others one dense FFN of expert shape."""
    ep_size: int = 0
    """Ranks of one EP group. 0: the greatest common divisor of the world size and `num_experts`."""
    capacity_factor: float = 1.25
    """Rows one expert takes in training, relative to an even spread."""
    eval_capacity_factor: float = 2.0
    """The same in validation."""
    min_capacity: int = 4
    """Least rows one expert takes, whatever the factor says."""
    drop_tokens: bool = True
    """Whether rows over the capacity are dropped. False: the capacity follows the fullest expert."""
    use_residual: bool = False
    """PR-MoE: a dense expert beside the routed ones, mixed by a learned coefficient."""
    noisy_gate_policy: str = ""
    """DeepSpeed's gate noise: empty, `Jitter` or `RSample` (`num_topk` 1)."""
    aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss, summed over the layers."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; outputs of residual branches get it divided by sqrt(2 num_layers)."""
    dtype: str = "fp32"
    """Type of weights and activations: fp32 or bf16 (with fp32 master weights)."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        positive = ("hidden", "num_layers", "num_heads", "num_experts", "num_topk", "expert_hidden", "moe_every")
        _require_at_least(self, "model", 1, *positive, "rope_theta")
        _require_at_least(self, "model", 0, "ep_size", "min_capacity", "aux_loss_coef", "init_std")
        head_ok = self.hidden % self.num_heads == 0 and (self.hidden // self.num_heads) % 2 == 0
        require(head_ok, "model.num_heads", self.num_heads, f"must divide hidden={self.hidden} into an even head size")
        require(
            self.num_topk <= min(self.num_experts, 32),
            "model.num_topk",
            self.num_topk,
            f"must be at most num_experts={self.num_experts} and at most 32",
        )
        if self.ep_size:
            require(
                self.num_experts % self.ep_size == 0,
                "model.ep_size",
                self.ep_size,
                f"must divide num_experts={self.num_experts}",
            )
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"model.{name}", value, "must be positive")
        _require_one_of("model.noisy_gate_policy", self.noisy_gate_policy, ("", "Jitter", "RSample"))
        _require_one_of("model.dtype", self.dtype, DTYPES)

    def resolve_ep_size(self, world_size: int) -> int:
        """The EP degree in a job of `world_size` ranks. Raises ConfigError when a fixed degree does not fit."""
        ep_size = self.ep_size or math.gcd(world_size, self.num_experts)
        require(world_size % ep_size == 0, "model.ep_size", ep_size, f"must divide the world size {world_size}")
        return ep_size

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (from 0) has an MoE layer."""
        return (self.num_layers - 1 - layer) % self.moe_every == 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    paths: tuple[str, ...] = ()
    """Files or folders: .jsonl (field `text`), .parquet (column `text`), any other file is read as text.
    Empty: the Python sources of this interpreter's standard library."""
    seq_len: int = 128
    """Tokens S of one sequence."""
    max_bytes: int = 4 * 2**20
    """Stop reading after about this many bytes of text. 0: no limit."""
    val_fraction: float = 0.05
    """Share of the tokens, at the end of the corpus, kept for validation."""
    tokenizer: str = "bytes"
    """`bytes`: one token a byte. `bpe`: byte-level BPE through the `tokenizers` library."""
    bpe_vocab: int = 4096
    """Vocabulary learnt from the corpus when `tokenizer` is bpe and no `tokenizer_file` is given."""
    tokenizer_file: str = ""
    """A `tokenizer.json` to use instead of learning one."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        _require_at_least(self, "data", 2, "seq_len")
        _require_at_least(self, "data", 0, "max_bytes")
        _require_at_least(self, "data", 257, "bpe_vocab")
        require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "must lie between 0 and 1")
        _require_one_of("data.tokenizer", self.tokenizer, TOKENIZERS)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    micro_batch: int = 8
    """Sequences in one forward pass of one rank."""
    grad_accum: int = 1
    """Forward and backward passes for one optimizer step."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    warmup_steps: int = 20
    """Steps of linear warm-up (DeepSpeed's WarmupCosineLR needs at least 2)."""
    weight_decay: float = 0.1
    """Decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """First AdamW coefficient."""
    beta2: float = 0.95
    """Second AdamW coefficient."""
    grad_clip: float = 1.0
    """Largest gradient norm. 0: no clipping."""
    zero_stage: int = 0
    """ZeRO stage 0, 1 or 2 (DeepSpeed's MoE layer does not support 3). bf16 needs 1 or 2."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        _require_at_least(self, "optim", 1, "micro_batch", "grad_accum")
        _require_at_least(self, "optim", 2, "warmup_steps")
        _require_at_least(self, "optim", 0, "weight_decay", "grad_clip")
        require(math.isfinite(self.lr) and self.lr > 0, "optim.lr", self.lr, "must be positive")
        for name in ("min_lr_ratio", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "must be at least 0 and less than 1")
        require(self.zero_stage in (0, 1, 2), "optim.zero_stage", self.zero_stage, "must be 0, 1 or 2")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    out_dir: str = "runs/default"
    """Where checkpoints, metrics, plots and the token cache go. All ranks must see the same folder."""
    backend: str = "stock"
    """Who moves tokens between experts: `stock` DeepSpeed or `ray_deepep`."""
    steps: int = 200
    """Optimizer steps, those before a resume included."""
    num_shares: int = 0
    """Shares of a step's batch, one for each rank of an elastic run at its full size: any smaller number of ranks does
    the same steps, and reads its checkpoints. 0: as many as there are ranks, and their number is fixed."""
    seed: int = 1234
    """Decides initial weights, batches and gate noise."""
    eval_every: int = 50
    """Validate after every n-th step, and after the last. 0: only after the last."""
    eval_batches: int = 4
    """Micro-batches of one validation, on each rank."""
    checkpoint_every: int = 50
    """Save after every n-th step, and after the last. 0: only after the last."""
    load_every: int = 0
    """Write the tokens of every expert (MoE layers × experts numbers) with every n-th step, and the last.
    0: with about a hundred steps of the run."""
    split: bool = False
    """Time attention, gates and experts of each step by themselves too: hooks around them, forward and backward."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    on_existing: str = "error"
    """When `out_dir` already holds checkpoints: `error`, `resume` from the newest good one, or `overwrite`."""
    resume_from: str = ""
    """Continue from this checkpoint folder (or this run's folder) instead of one in `out_dir`."""
    sample_tokens: int = 160
    """Tokens of sample text written after the last step. 0: none."""
    device: str = "auto"
    """`cpu` (gloo), `cuda` (NCCL) or `auto`: cuda where torch sees a GPU."""
    num_threads: int = 1
    """Torch threads of one rank on the CPU. A fixed number keeps sums in one order. 0: leave torch's own."""
    dist_timeout_s: float = 300.0
    """Deadline of a torch.distributed operation, in seconds."""
    deepspeed_config: str = ""
    """A DeepSpeed JSON file; its keys replace the generated ones."""
    telemetry: bool = True
    """Write the numbers of every step and rank to `telemetry/`, and to Ray's metrics where the run is on Ray."""
    tensorboard: bool = False
    """Write them for TensorBoard too (`telemetry/tensorboard/`); needs the package `tensorboard`."""
    progress: bool = True
    """Show progress bars (rank 0)."""

    def __post_init__(self) -> None:
        check_types(self, "run.")
        _require_at_least(self, "run", 1, "steps", "eval_batches", "keep_checkpoints")
        _require_at_least(self, "run", 0, "seed", "eval_every", "checkpoint_every", "load_every")
        _require_at_least(self, "run", 0, "sample_tokens", "num_threads", "num_shares")
        timeout_ok = 0 < self.dist_timeout_s <= _LONGEST_S
        require(timeout_ok, "run.dist_timeout_s", self.dist_timeout_s, f"must be positive and at most {_LONGEST_S:g}")
        require(bool(self.out_dir), "run.out_dir", self.out_dir, "must name a folder")
        _require_one_of("run.backend", self.backend, BACKENDS)
        _require_one_of("run.on_existing", self.on_existing, ON_EXISTING)
        _require_one_of("run.device", self.device, ("auto", "cpu", "cuda"))

    @property
    def is_elastic(self) -> bool:
        """Whether the number of ranks may change between two starts."""
        return self.num_shares > 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    name: str = "custom"
    """Name of the preset this came from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Batch size, optimizer, schedule."""
    run: RunConfig = field(default_factory=RunConfig)
    """Steps, places, devices."""

    def __post_init__(self) -> None:
        check_types(self, "")
        bf16_ok = self.model.dtype != "bf16" or self.optim.zero_stage in (1, 2)
        require(bf16_ok, "optim.zero_stage", self.optim.zero_stage, "must be 1 or 2 when model.dtype is bf16")
        num_tokens = self.optim.micro_batch * self.data.seq_len
        require(
            num_tokens >= self.model.min_capacity,
            "model.min_capacity",
            self.model.min_capacity,
            f"must be at most micro_batch * seq_len = {num_tokens}",
        )

    def resolve_ep_size(self, world_size: int) -> int:
        """The EP degree in a job of `world_size` ranks.

        In an elastic run the largest that divides both the number of ranks and that of the experts, and is no larger
        than the model's. Raises ConfigError when a fixed degree does not fit, or there are more ranks than shares.
        """
        if not self.run.is_elastic:
            return self.model.resolve_ep_size(world_size)
        shares = self.run.num_shares
        require(world_size <= shares, "run.num_shares", shares, f"must be at least the world size {world_size}")
        both = math.gcd(world_size, self.model.num_experts)
        most = self.model.ep_size or both
        return max(size for size in range(1, min(both, most) + 1) if both % size == 0)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TrainConfig:
        """Build from `to_dict` output; missing fields keep their defaults, unknown ones raise ConfigError."""
        return build_dataclass(cls, raw)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_file(cls, path: str | Path) -> TrainConfig:
        """Read a config file. Raises ConfigError if it cannot be read, is not JSON, or breaks a rule."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError("--config", str(path), f"must be a readable JSON file ({error})") from error
        return cls.from_dict(raw)

    def identity(self) -> dict[str, Any]:
        """The fields that decide the losses, flat: those a checkpoint and the run that continues it must share.

        Steps may change (the schedule stretches), and so may the backend: both write the same checkpoint.
        """
        flat = {f"model.{k}": v for k, v in dataclasses.asdict(self.model).items()}
        flat |= {f"optim.{k}": v for k, v in dataclasses.asdict(self.optim).items()}
        flat |= {"data.seq_len": self.data.seq_len, "run.seed": self.run.seed}
        return flat

    def digest(self) -> str:
        """SHA-256 of `identity`, as hex."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def replace(self, **values: Any) -> TrainConfig:
        """A copy with dotted fields replaced, e.g. `replace(**{"model.hidden": 64})`. Strings are converted."""
        raw = self.to_dict()
        for name, value in values.items():
            set_dotted(raw, name, value)
        return type(self).from_dict(raw)
