"""A real Kubernetes cluster on a bare machine, for tests and the demo.

`ensure_up()` gives a running cluster, the one that is there or a new one; see `client.Cluster` for what it can do.
On the command line: `python -m tests.cluster up|down|status|kubeconfig|env|images`.
"""

from tests.cluster.client import Cluster, NotInTimeError
from tests.cluster.lifecycle import down, ensure_up

__all__ = ["Cluster", "NotInTimeError", "down", "ensure_up"]
