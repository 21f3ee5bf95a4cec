"""The seed paper's method, for tests of mechanisms."""

from functools import partial

from pml_adversarial import AdversarialLoss, attacks

seed_paper_loss = partial(
    AdversarialLoss, attack=attacks.SEED_PAPER, perturb="positive", keep_clean=False, guard=False, warmup=0
)
"""The method of arXiv 2102.07265 and nothing else, so that what is tested does not depend on the package's defaults."""
