"""The seed paper's method, for tests of mechanisms."""

from pml_adversarial import AdversarialLoss, attacks
from pml_adversarial.plugins.manager import find_all

OPTIONS = {"perturb": ("plan",), "keep_clean": ("plan", "training_loss"), "attack": ("attack",)}
"""Option -> questions in which it counts."""


def seed_paper_loss(loss, model=None, *, plugins=(), **options):
    """The method of arXiv 2102.07265 and nothing else, so that what is tested does not depend on the defaults.

    Its options are left out where a plugin answers the questions in which they count.
    """
    plugins = find_all(plugins)
    own = {"attack": attacks.SEED_PAPER, "perturb": "positive", "keep_clean": False, "guard": False, "warmup": 0}
    for name, questions in OPTIONS.items():
        if any(answers(plugin, question) for plugin in plugins for question in questions):
            del own[name]
    return AdversarialLoss(loss, model, plugins=plugins, **{**own, **options})


def answers(plugin, question):
    """Whether the plugin has an answer of its own, and does not only see those of others."""
    method = getattr(plugin, f"pml_adversarial_{question}", None)
    if method is None:
        return False
    sees_others = getattr(method, "pml_adversarial_impl", {}).get("wrapper")
    return not sees_others and getattr(plugin, "has_opinions", True)
