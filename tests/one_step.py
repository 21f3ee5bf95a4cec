"""One training step with a defence, and what was said in it."""

import math
from functools import partial

import torchattacks
from pytorch_metric_learning import losses, miners
from seed_paper import seed_paper_loss

from pml_adversarial import hookimpl

EPS, ALPHA, STEPS = 0.05, 0.015, 5
PEERS_PGD = partial(torchattacks.PGD, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=False)
LOSSES = {
    "triplets": losses.TripletMarginLoss,
    "pairs": losses.ContrastiveLoss,
    "MultiSimilarity": losses.MultiSimilarityLoss,
    "NCA": losses.NCALoss,
    "SupCon": losses.SupConLoss,
    "ArcFace": partial(losses.ArcFaceLoss, 4, 4),
    "ProxyNCA": partial(losses.ProxyNCALoss, 4, 4),
}
WITH_MEMORY = {"CrossBatchMemory": partial(losses.CrossBatchMemory, losses.ContrastiveLoss(), 4, 16)}
MINERS = {
    "none": None,
    "triplets": miners.TripletMarginMiner(margin=1.0),
    "pairs": miners.MultiSimilarityMiner(epsilon=1.0),
}


class Spy:
    """Keeps the first score, and the last training loss."""

    @hookimpl(wrapper=True)
    def pml_adversarial_score(self, batch, plan):
        score = yield
        if not hasattr(self, "score"):
            self.score, self.batch, self.plan = score, batch, plan
        return score

    @hookimpl(wrapper=True)
    def pml_adversarial_training_loss(self, adversarial):
        self.adversarial = adversarial
        self.loss = yield
        return self.loss


def step(model, images, labels, *plugins, loss=None, tuples=None, attack=PEERS_PGD, **options):
    """Nothing is added to the method; ``(loss_func, spy)`` after the step."""
    spy = Spy()
    loss = losses.TripletMarginLoss() if loss is None else loss
    loss_func = seed_paper_loss(loss, model, attack=attack, plugins=[*plugins, spy], seed=0, **options)
    loss_func(model(images), labels, tuples)
    return loss_func, spy


def distance(left, right):
    """Of two embeddings at unit length."""
    left, right = left.tolist(), right.tolist()
    left_length, right_length = (math.sqrt(sum(x * x for x in v)) for v in (left, right))
    return math.sqrt(sum((x / left_length - y / right_length) ** 2 for x, y in zip(left, right, strict=True)))
