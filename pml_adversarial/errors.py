"""What can go wrong, by the question that could not be answered.

Every error of the package derives from `AdversarialError` and from the builtin that fits it, so that
existing ``except ValueError`` clauses keep working. Messages say what was found, what was expected and
what to do.
"""

__all__ = ["AdversarialError", "AttackError", "CaptureError", "InputError", "PlanError", "PluginError"]


class AdversarialError(Exception):
    """Base of all errors that pml_adversarial raises on purpose."""


class CaptureError(AdversarialError, RuntimeError):
    """The inputs behind an embedding are not known."""


class InputError(AdversarialError, ValueError):
    """The batch cannot be attacked as it is: range, type, finiteness or length."""


class PlanError(AdversarialError, ValueError):
    """It is not clear, or not possible, who is to be perturbed."""


class AttackError(AdversarialError, RuntimeError):
    """An attack broke its contract: ``(inputs, labels) -> inputs``, same shape, changed, in range."""


class PluginError(AdversarialError, ValueError):
    """A plugin is unknown, registered twice, or answers a question that nobody asks."""
