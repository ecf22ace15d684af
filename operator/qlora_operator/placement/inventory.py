"""What GPUs the cluster has, kept node by node: of thousands of nodes, a few dozen groups of nodes that are alike.

Judged by what nodes can allocate, not by what is free: other tenants' pods are not ours to read, the scheduler queues.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_operator.placement.flavours import AMD, Demands, Flavour, Offers, Refused
from qlora_operator.placement.nodes import UNLABELLED, Access, Gpus, Node, Unusable, read

Raw = Mapping[str, Any]


class _Group:
    """Nodes with the same GPUs (or, where `gpus` is None, just nodes) that are open to the same pods."""

    __slots__ = ("_first", "access", "gpus", "members")

    def __init__(self, gpus: Gpus | None, access: Access) -> None:
        self.gpus, self.access = gpus, access
        self.members: dict[str, Node] = {}
        self._first: str | None = None

    def add(self, node: Node) -> None:
        self.members[node.name] = node
        self._first = None if self._first is None else min(self._first, node.name)

    def discard(self, name: str) -> None:
        self.members.pop(name, None)
        self._first = None if self._first == name else self._first

    @property
    def first(self) -> str:
        """The node that sentences name: the same one, in whatever order nodes came."""
        if self._first is None:
            self._first = min(self.members)
        return self._first


@dataclass(frozen=True)
class PodsGpus:
    """What each pod of a plan asks of its node's GPUs: an amount, labels that say which, and one with their memory."""

    resource: str
    amount: int
    labels: tuple[tuple[str, str], ...]
    memory_label: str | None
    memory_mib: int

    def are_among(self, gpus: Flavour) -> bool:
        """Whether a node with these `gpus` has as many."""
        return gpus.resource == self.resource and gpus.gpus_per_node >= self.amount

    def are_labelled_on(self, node: Node) -> bool:
        """Whether the node affinity of such a pod matches."""
        memory = node.labels.get(self.memory_label or "", "")
        enough = self.memory_label is None or (memory.isdecimal() and int(memory) >= self.memory_mib)
        return enough and all(node.labels.get(name) == value for name, value in self.labels)


class Inventory:
    """The cluster's nodes, as far as plans depend on them."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._groups: dict[tuple[Gpus | None, Access], _Group] = {}

    @classmethod
    def of(cls, nodes: Iterable[Raw]) -> Inventory:
        """The inventory of raw Node objects."""
        inventory = cls()
        inventory.replace(nodes)
        return inventory

    @property
    def names(self) -> frozenset[str]:
        """Of all nodes."""
        return frozenset(self._nodes)

    def put(self, node: Raw) -> bool:
        """Take up a node, new or changed; whether what jobs can get has changed. A heartbeat changes nothing."""
        old = self._nodes.get(node["metadata"]["name"])
        new = read(node, old)
        if old == new:
            return False
        if old:
            self._leave(old)
        self._nodes[new.name] = new
        for gpus in (None, *new.gpus):
            group = self._groups.get((gpus, new.access))
            if group is None:
                group = self._groups[gpus, new.access] = _Group(gpus, new.access)
            group.add(new)
        return True

    def remove(self, name: str) -> bool:
        """Forget a node; whether it was there."""
        old = self._nodes.pop(name, None)
        if old:
            self._leave(old)
        return old is not None

    def replace(self, nodes: Iterable[Raw]) -> bool:
        """Make `nodes` all there are; whether what jobs can get has changed."""
        names, changed = set[str](), False
        for node in nodes:
            names.add(node["metadata"]["name"])
            changed |= self.put(node)
        for name in self.names - names:
            changed |= self.remove(name)
        return changed

    def _leave(self, node: Node) -> None:
        for gpus in (None, *node.gpus):
            group = self._groups[gpus, node.access]
            group.discard(node.name)
            if not group.members:
                del self._groups[gpus, node.access]

    def offers(self, demands: Demands) -> Offers:
        """What a job with `demands` may use, and what it may not.

        A product is refused only if none of its nodes will do; the reason is then the one of its first node by name.
        A product that the job names and no node has is refused, too.
        """
        usable: dict[Flavour, int] = {}
        refused: dict[str, tuple[str, str]] = {}
        unwanted: dict[str, str] = {}
        for group in self._groups.values():
            if group.gpus is None:
                continue
            if said := _not_asked_for(group.gpus, demands):
                unwanted[group.gpus.product] = said
                continue
            judged = _unusable(group) or self._open(group, demands)
            if isinstance(judged, str):
                found = (group.first, judged)
                refused[group.gpus.product] = min(refused.get(group.gpus.product, found), found)
            elif isinstance(group.gpus, Flavour):
                usable[group.gpus] = usable.get(group.gpus, 0) + judged
        flavours = sorted((replace(flavour, nodes=nodes) for flavour, nodes in usable.items()), key=_order)
        offered = {flavour.product for flavour in flavours}
        for product in set(demands.products) - offered - refused.keys() - unwanted.keys():
            refused[product] = ("", "no node of the cluster has it")
        reasons = {name: Refused(name, reason, by_its_own_wish=True) for name, reason in unwanted.items()}
        reasons |= {name: Refused(name, reason) for name, (_, reason) in refused.items()}
        return Offers(tuple(flavours), tuple(reasons[name] for name in sorted(reasons.keys() - offered)))

    def open_to(
        self, demands: Demands, gpus: PodsGpus | None = None, *, sooner_or_later: bool = False
    ) -> Iterator[Node]:
        """The nodes that pods of the job may run on, if they ask for `gpus`.

        `sooner_or_later`: those, too, that are away, or kept free by Kubernetes itself, at the moment.
        """
        for group in self._groups.values():
            if gpus is None:
                fits = group.gpus is None
            else:
                fits = isinstance(group.gpus, Flavour) and gpus.are_among(group.gpus)
            if fits and isinstance(self._open(group, demands, sooner_or_later=sooner_or_later), int):
                yield from (node for node in _selected(group, demands) if gpus is None or gpus.are_labelled_on(node))

    def largest_memory_bytes(self, demands: Demands) -> int:
        """Allocatable memory of the largest node that is open to the job; 0 where none is."""
        return max((node.memory_bytes for node in self.open_to(demands)), default=0)

    def _open(self, group: _Group, demands: Demands, *, sooner_or_later: bool = False) -> int | str:
        """On how many of the group's nodes pods of the job may run, or why on none."""
        selected = len(_selected(group, demands))
        if not selected:
            labels = group.members[group.first].labels
            wanted = {k: v for k, v in (demands.node_selector or {}).items() if labels.get(k) != v}
            return "spec.podTemplate.nodeSelector asks for " + ", ".join(f"{k}={v}" for k, v in sorted(wanted.items()))
        access = group.access.at_best if sooner_or_later else group.access
        return access.closed(group.first, demands.tolerations) or selected


def _selected(group: _Group, demands: Demands) -> Collection[Node]:
    """Those of the group's nodes that the job's node selector asks for."""
    nodes: Collection[Node] = group.members.values()
    for name, value in (demands.node_selector or {}).items():
        nodes = [node for node in nodes if node.labels.get(name) == value]
    return nodes


def _not_asked_for(gpus: Gpus, demands: Demands) -> str | None:
    """By what the job asks for others than these GPUs, or None."""
    if gpus.accelerator != demands.accelerator:
        whose = "AMD's" if gpus.accelerator == AMD else "NVIDIA's"
        return f"spec.hardware.accelerator is {demands.accelerator}, and it is {whose}"
    if demands.products and gpus.product not in demands.products and gpus.product != UNLABELLED:
        return "not among spec.hardware.gpuProducts"
    return None


def _unusable(group: _Group) -> str | None:
    """Why no job can use these GPUs, or None."""
    return group.gpus.reason.replace("{node}", group.first) if isinstance(group.gpus, Unusable) else None


def _order(flavour: Flavour) -> tuple[Any, ...]:
    return flavour.product, flavour.memory_bytes, flavour.resource, flavour.gpus_per_node, flavour.labels
