"""Counts the ready replicas of each model, and reads what each can do."""

from collections.abc import Collection

from deployments import runtime
from deployments.models.capabilities import Known, of_application
from deployments.router.model_revisions import digest_of

READY_STATES = ("RUNNING", "RECOVERING")  # of a replica


class ReplicaCounter:
    """Asks Serve's controller for the number of ready replicas of models.

    Attributes:
        digests: digest of each deployed model, as of the last call (model_revisions.py).
        counts: ready replicas of each model, as of the last call.
        targets: replicas that each deployed model should have, as of the last call; 0 if it is scaled to zero.
        capabilities: what is known of each model's, as of the last call (models/capabilities.py).
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.targets: dict[str, int] = {}
        self.capabilities: dict[str, Known] = {}

    def __call__(self, models: Collection[str]) -> dict[str, int]:
        """Count the ready replicas of these models; blocking. The count of a model that is not deployed is 0.

        `serve.status()` would pickle the classes of every deployment at each call, so the controller is asked directly.
        A controller that has just restarted first reports no applications; the last counts are then returned. Next it
        reports RECOVERING replicas, which serve requests as before.
        """
        applications = runtime.serve_applications()
        if not applications:
            return self.counts
        counts = dict.fromkeys(models, 0)
        targets = {}
        capabilities = {}
        for name in models:
            application = applications.get(name)
            if application is None:
                continue
            counts[name] = sum(
                state in READY_STATES for state in application.replica_states
            )
            targets[name] = application.target_replicas
            if application.args:
                self.digests[name] = digest_of(application.args)
            capabilities[name] = of_application(application.args)
        self.counts = counts
        self.targets = targets
        self.capabilities = capabilities
        return counts
