"""Who may do what with jobs, once the product is installed: as the namespace's own roles say."""

from __future__ import annotations

import pytest

from tests.cluster.client import KubectlError
from tests.e2e.conftest import Product

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("role", "may", "may_not"),
    [
        ("edit", ("create", "patch", "delete", "get", "watch"), ()),
        ("view", ("get", "list", "watch"), ("create", "patch", "delete")),
    ],
)
def test_the_clusters_own_roles_hold_for_jobs(
    product: Product, role: str, may: tuple[str, ...], may_not: tuple[str, ...]
) -> None:
    """Somebody who may edit (view) a namespace may run (see) jobs there, and nowhere else; nobody writes a status."""
    user, cluster, namespace = f"somebody-who-may-{role}", product.cluster, product.namespace
    cluster.kubectl("create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}", namespace=namespace)

    def can(verb: str, *flags: str, where: str = namespace) -> bool:
        question = ["auth", "can-i", verb, "qlorajobs.qlora.dev", f"--as={user}", *flags]
        try:
            return cluster.kubectl(*question, namespace=where).strip() == "yes"
        except KubectlError:
            return False

    cluster.wait("the roles are aggregated", lambda: can("get"), bool)
    assert [verb for verb in may if not can(verb)] == []
    assert [verb for verb in may_not if can(verb)] == []
    assert not can("get", where="default")
    assert not can("patch", "--subresource=status")
