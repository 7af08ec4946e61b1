"""``ray-deepep plan``: what a layer will cost on a cluster, before it runs. Pure functions from sizes and constants.

``workload`` checks sizes, ``traffic`` and ``moved`` count rows and bytes, ``memory`` the memory, ``costs`` and ``fit``
hold constants, ``predict`` puts them together; ``plan_step`` runs the cores' plan arithmetic for many ranks.
"""

from .command import add_plan
from .costs import Costs, OperationCosts, default_costs
from .fit import fit_costs, read_costs
from .memory import Memory
from .plan_step import PlanStep, simulate_plan_steps, uniform_routing
from .predict import OperationPlan, Prediction, predict
from .traffic import Traffic, expected_traffic, hit_probability
from .workload import Workload

__all__ = [
    "Costs",
    "Memory",
    "OperationCosts",
    "OperationPlan",
    "PlanStep",
    "Prediction",
    "Traffic",
    "Workload",
    "add_plan",
    "default_costs",
    "expected_traffic",
    "fit_costs",
    "hit_probability",
    "predict",
    "read_costs",
    "simulate_plan_steps",
    "uniform_routing",
]
