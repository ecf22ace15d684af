"""From a spec, what inspection found and the cluster's nodes to a plan, and from there to advice. Pure."""

from qlora_operator.planner.cures import advice, after_out_of_memory
from qlora_operator.planner.demands import GPU_TOLERATIONS, Installation, contradiction, demands_of, wishes
from qlora_operator.planner.hosts import Host, largest_host, needed_mib, too_large
from qlora_operator.planner.placing import plan
from qlora_operator.planner.recipe import CPU, Unfit, recipes, sharded
from qlora_operator.planner.smaller import Smaller, resized, with_less_memory

__all__ = [
    "CPU",
    "GPU_TOLERATIONS",
    "Host",
    "Installation",
    "Smaller",
    "Unfit",
    "advice",
    "after_out_of_memory",
    "contradiction",
    "demands_of",
    "largest_host",
    "needed_mib",
    "plan",
    "recipes",
    "resized",
    "sharded",
    "too_large",
    "wishes",
    "with_less_memory",
]
