"""What a sweep varies: parameters and their values from the command line, and the trials that follow. Pure.

Nothing in here imports Ray, and a mistake is found before anything starts.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from train.config import TrainConfig
from train.errors import ConfigError

PARAMETERS: Mapping[str, str] = MappingProxyType(
    {
        "backend": "run.backend",
        "ep": "model.ep_size",
        "experts": "model.num_experts",
        "topk": "model.num_topk",
        "capacity": "model.capacity_factor",
        "lr": "optim.lr",
        "sms": "",
        "workers": "",
    }
)
"""Names on the command line, and the config fields that they set; `sms` and `workers` are no fields of the model."""
METRICS: Mapping[str, str] = MappingProxyType(
    {
        "val_loss": "min",
        "last_loss": "min",
        "tokens_per_s": "max",
        "step_ms": "min",
        "dispatch_ms": "min",
        "combine_ms": "min",
        "comm_share": "min",
    }
)
"""Numbers of `train.metrics.RunStats` by which trials are ranked, and which end is best."""
SCALING_MODES = ("weak", "strong")
_INTEGERS = frozenset({"ep", "experts", "topk", "sms", "workers"})
_MAX_TRIALS = 10_000


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Values of one parameter: a list, or a range from which trials draw."""

    name: str
    values: tuple[Any, ...] = ()
    """Empty for a range."""
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Choice:
        """`NAME=V,V,...` or `NAME=LOW..HIGH`. Raises ConfigError naming what is wrong."""
        name, equals, spec = text.partition("=")
        if name not in PARAMETERS:
            raise ConfigError("--param", name, f"must be one of {', '.join(PARAMETERS)}")
        if not equals or not spec:
            raise ConfigError("--param", text, "must be NAME=VALUE,VALUE or NAME=LOW..HIGH")
        if ".." in spec:
            return cls._parse_range(name, spec)
        values = tuple(_value(name, item) for item in spec.split(","))
        if len(set(values)) != len(values):
            raise ConfigError("--param", text, "must not name a value twice")
        return cls(name=name, values=values)

    @classmethod
    def _parse_range(cls, name: str, spec: str) -> Choice:
        if name == "backend":
            raise ConfigError("--param", f"{name}={spec}", "must be a list: a backend has no range")
        low, high = (_value(name, end) for end in spec.split("..", 1))
        if not low < high:
            raise ConfigError("--param", f"{name}={spec}", "must begin below its end")
        return cls(name=name, low=low, high=high)

    def draw(self, generator: random.Random) -> Any:
        """A value: any of the list, or from the range, evenly over its logarithm for `lr`."""
        if self.values:
            return generator.choice(self.values)
        if self.name in _INTEGERS:
            return generator.randint(int(self.low), int(self.high))
        if self.name == "lr":
            return math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        return generator.uniform(self.low, self.high)


def _value(name: str, text: str) -> Any:
    if name == "backend":
        # The config's own rule, so that a backend which comes later needs nothing here.
        TrainConfig().replace(**{"run.backend": text})
        return text
    try:
        value = int(text) if name in _INTEGERS else float(text)
    except ValueError as error:
        kind = "integers" if name in _INTEGERS else "numbers"
        raise ConfigError("--param", f"{name}={text}", f"must be {kind}") from error
    if not 0 < value < math.inf:
        raise ConfigError("--param", f"{name}={text}", "must be positive and finite")
    return value


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep."""

    index: int
    """Counts from 0; names its folder."""
    values: dict[str, Any]
    """What differs between trials, by parameter name."""
    overrides: dict[str, Any]
    """Config fields that it sets, by dotted name."""
    num_workers: int
    num_sms: int | None = None
    """Of communication kernels; None: the default."""

    @property
    def name(self) -> str:
        """Folder and run name, such as `003`."""
        return f"{self.index:03d}"

    def config(self, base: TrainConfig) -> TrainConfig:
        """The trial's config. Raises ConfigError where its values do not fit together."""
        config = base.replace(**self.overrides)
        config.model.resolve_ep_size(self.num_workers)
        return config


def make_trials(choices: list[Choice], *, num_samples: int, seed: int, num_workers: int) -> list[Trial]:
    """All combinations of the lists; or, with `num_samples`, so many random ones, the same for the same seed.

    Raises ConfigError: a parameter twice, a range without samples, too many trials.
    """
    names = [choice.name for choice in choices]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("--param", name, "must be given once")
    if num_samples < 0:
        raise ConfigError("--samples", num_samples, "must be at least 0")
    ranges = [choice.name for choice in choices if not choice.values]
    if ranges and not num_samples:
        raise ConfigError("--param", ranges[0], "a range needs --samples N")
    num_trials = num_samples or math.prod(len(choice.values) for choice in choices)
    if num_trials > _MAX_TRIALS:
        raise ConfigError("--param", num_trials, f"trials are too many: at most {_MAX_TRIALS}")
    if num_samples:
        generator = random.Random(seed)
        points = [{choice.name: choice.draw(generator) for choice in choices} for _ in range(num_samples)]
    else:
        points = [dict(zip(names, point)) for point in itertools.product(*(choice.values for choice in choices))]
    return [_trial(index, values, num_workers) for index, values in enumerate(points)]


def _trial(index: int, values: dict[str, Any], num_workers: int) -> Trial:
    return Trial(
        index=index,
        values=values,
        overrides={PARAMETERS[name]: value for name, value in values.items() if PARAMETERS[name]},
        num_workers=values.get("workers", num_workers),
        num_sms=values.get("sms"),
    )


def scaling_trials(base: TrainConfig, worker_counts: list[int], modes: list[str]) -> list[Trial]:
    """A run for each mode and number of workers. *Weak*: each worker keeps its batch, so the whole grows. *Strong*: the
    whole batch is that of the fewest workers, cut into equal parts.

    Raises ConfigError: a count that is no multiple of the first, or a batch that cannot be cut.
    """
    if not worker_counts or sorted(set(worker_counts)) != worker_counts or worker_counts[0] < 1:
        raise ConfigError("--scaling", worker_counts, "must be different numbers of workers, ascending from 1")
    for mode in modes:
        if mode not in SCALING_MODES:
            raise ConfigError("--modes", mode, f"must be one of {', '.join(SCALING_MODES)}")
    trials: list[Trial] = []
    for mode in modes:
        for workers in worker_counts:
            overrides: dict[str, Any] = {}
            if mode == "strong":
                whole = base.optim.micro_batch * worker_counts[0]
                if whole % workers:
                    raise ConfigError(
                        "optim.micro_batch", base.optim.micro_batch, f"must divide among {workers} workers"
                    )
                overrides["optim.micro_batch"] = whole // workers
            values = {"mode": mode, "workers": workers}
            trials.append(Trial(index=len(trials), values=values, overrides=overrides, num_workers=workers))
    return trials


def check_trials(base: TrainConfig, trials: list[Trial]) -> None:
    """Raise the first ConfigError if no trial at all is possible; single ones that are not get a row that says why."""
    problems: list[ConfigError] = []
    for trial in trials:
        try:
            trial.config(base)
            return
        except ConfigError as error:
            problems.append(error)
    raise problems[0]


def trials_to_json(trials: list[Trial]) -> str:
    """What a sweep keeps, to know on resume what it was."""
    return json.dumps([asdict(trial) for trial in trials], indent=1)


def trials_from_json(text: str) -> list[Trial]:
    """Inverse of `trials_to_json`."""
    return [Trial(**entry) for entry in json.loads(text)]
