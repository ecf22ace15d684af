"""The QLoRAJob resource, `qlora.dev/v1alpha1`: what users write (`spec`) and what the operator answers (`status`).

These models are the single source of the CRD (`schema.py`), of `docs/reference.md` (`reference.py`) and of what the
command line accepts. A field that is absent and has no default means "decided for you"; what was decided stands in
`status.plan.recipe`. A rule that spans several fields is written twice, side by side, as a `Rule`: in CEL for the
API server, in Python for the command line; a test holds both against the same table of bad specs.
"""

from qlora_api.v1alpha1.fields import (
    API_VERSION,
    DURATION_PATTERN,
    GROUP,
    KIND,
    NAME_MAX,
    NAME_PATTERN,
    PLURAL,
    QUANTITY_PATTERN,
    URI_PATTERN,
    VERSION,
    ConditionStatus,
    Loss,
    Method,
    camel,
    duration_seconds,
    quantity_bytes,
)
from qlora_api.v1alpha1.resource import Metadata, QLoRAJob, problems
from qlora_api.v1alpha1.spec import MUTABLE, MUTABLE_WHILE_SUSPENDED, JobSpec, Retry
from qlora_api.v1alpha1.status import (
    Artifact,
    Attempt,
    Condition,
    ConditionType,
    EvaluationResult,
    JobStatus,
    MemoryItem,
    MemoryPlan,
    OlderAttempts,
    Phase,
    Plan,
    Progress,
    Rejected,
    Serving,
    Usage,
    WorkVolume,
)

__all__ = [
    "API_VERSION",
    "DURATION_PATTERN",
    "GROUP",
    "KIND",
    "MUTABLE",
    "MUTABLE_WHILE_SUSPENDED",
    "NAME_MAX",
    "NAME_PATTERN",
    "PLURAL",
    "QUANTITY_PATTERN",
    "URI_PATTERN",
    "VERSION",
    "Artifact",
    "Attempt",
    "Condition",
    "ConditionStatus",
    "ConditionType",
    "EvaluationResult",
    "JobSpec",
    "JobStatus",
    "Loss",
    "MemoryItem",
    "MemoryPlan",
    "Metadata",
    "Method",
    "OlderAttempts",
    "Phase",
    "Plan",
    "Progress",
    "QLoRAJob",
    "Rejected",
    "Retry",
    "Serving",
    "Usage",
    "WorkVolume",
    "camel",
    "duration_seconds",
    "problems",
    "quantity_bytes",
]
