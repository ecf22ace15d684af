"""(job, observed, now) → actions, status, when to look again. Pure."""
