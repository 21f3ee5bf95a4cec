"""The errors of the package.

Each error derives from `AdversarialError` and from the builtin error that fits, so that existing
``except ValueError`` clauses keep working. Each message says what was found, what was expected and what to do.
"""

__all__ = ["AdversarialError", "AttackError", "CaptureError", "InputError", "PlanError", "PluginError", "ReplayError"]


class AdversarialError(Exception):
    """Base of all errors that pml_adversarial raises on purpose."""


class CaptureError(AdversarialError, RuntimeError):
    """The inputs that gave an embedding are not known, so they cannot be perturbed."""


class InputError(AdversarialError, ValueError):
    """An argument, an option or an image has the wrong type, shape or range, or is not finite."""


class PlanError(AdversarialError, ValueError):
    """The members that are to be perturbed cannot be determined, or cannot be perturbed with this loss or batch."""


class AttackError(AdversarialError, RuntimeError):
    """An attack cannot be used, or did not return changed inputs of the same shape in [0, 1]."""


class PluginError(AdversarialError, ValueError):
    """A plugin cannot be used: it is unknown, given twice or never asked, or gives a wrong answer."""


class ReplayError(AdversarialError, RuntimeError):
    """The inputs, embedded again, give other embeddings than in the loop: the attack would be on another model."""
