"""Typed errors of the training program. Each carries its data and survives pickling between processes."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration value breaks a rule. Raised before anything is built or sent."""

    def __init__(self, field: str, value: object, rule: str):
        super().__init__(f"{field} = {value!r}: {rule}")
        self.field = field
        self.value = value
        self.rule = rule

    def __reduce__(self):
        return type(self), (self.field, self.value, self.rule)


class DataError(ValueError):
    """The training text cannot be used. `path` names the file or folder, `remedy` says what to do about it."""

    def __init__(self, path: str, problem: str, remedy: str):
        super().__init__(f"{path}: {problem}. {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self):
        return type(self), (self.path, self.problem, self.remedy)


class CheckpointError(RuntimeError):
    """A checkpoint is corrupt, incomplete or does not fit this run. `path` names the file."""

    def __init__(self, path: str, problem: str):
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem

    def __reduce__(self):
        return type(self), (self.path, self.problem)


class TrainingDivergedError(RuntimeError):
    """The loss or the gradients' norm is no longer a finite number. Raised on every rank, before the broken state is
    saved."""

    def __init__(self, step: int, value: float, what: str = "loss"):
        super().__init__(
            f"the {what} of step {step} is {value}: lower optim.lr or raise optim.warmup_steps, then resume"
        )
        self.step = step
        self.value = value
        self.what = what

    def __reduce__(self):
        return type(self), (self.step, self.value, self.what)
