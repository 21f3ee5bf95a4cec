"""All losses and miners of pytorch-metric-learning, and the batches on which test_contract holds them to one contract.

Losses and miners are found by inspection, so that a new one cannot be missed.
"""

import copy
import inspect
import itertools
from functools import partial
from typing import NamedTuple

import torch
import torchattacks
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn

from pml_adversarial import AdversarialLoss, hookimpl

EPS, STEPS = 0.1, 5
PGD = partial(torchattacks.PGD, eps=EPS, alpha=0.04, steps=STEPS)
ROLES = ("anchor", "positive", "negative", "all")
CLASSES, SIZE = 4, 4
LABELS = torch.arange(CLASSES).repeat_interleave(3)  # in blocks of one size, as SmoothAPLoss wants it
TRIPLETS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0])  # as EmbeddingsAlreadyPackagedAsTriplets wants it
REF_LABELS = torch.tensor([1, 0, 2, 3, 0, 1, 2, 3, 0, 2, 1, 3])

# What some constructors ask for.
_ARGUMENTS = {
    "num_classes": CLASSES,
    "embedding_size": SIZE,
    "descriptors_dim": SIZE,
    "margin": 0.4,
    "Tn": 10.0,
    "l": SIZE,
}
_OPTIONS = {"ManifoldLoss": {"K": CLASSES}}  # no more proxies than rows
_NO_LOSS_OF_ITS_OWN = {losses.BaseMetricLossFunction, losses.GenericPairLoss}


def concrete(module, base, without):
    found = (kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, base))
    return sorted({kind.__name__: kind for kind in found if kind not in without}.items())


def required(kind):
    """Arguments that the constructor, or the one that it hands them on to, cannot do without."""
    found = {}
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()
        names = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        found |= {name: _ARGUMENTS[name] for name in names if name != "self"}
        if all(p.kind is not p.VAR_POSITIONAL for p in parameters):
            return found


LOSSES = {
    name: partial(kind, **required(kind), **_OPTIONS.get(name, {}))
    for name, kind in concrete(losses, losses.BaseMetricLossFunction, _NO_LOSS_OF_ITS_OWN)
}
WRAPPERS = {
    "CrossBatchMemory": lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), SIZE, 48),
    "MultipleLosses": lambda: losses.MultipleLosses([losses.TripletMarginLoss(), losses.ContrastiveLoss()]),
    "SelfSupervisedLoss": lambda: losses.SelfSupervisedLoss(losses.NTXentLoss()),
    "SelfSupervisedLoss, one way": lambda: losses.SelfSupervisedLoss(losses.TripletMarginLoss(), symmetric=False),
    "DistributedLossWrapper": lambda: DistributedLossWrapper(losses.MultiSimilarityLoss()),
}
MINERS = {"none": None, **dict(concrete(miners, miners.BaseMiner, {miners.BaseMiner}))}


class Situation(NamedTuple):
    """How a loss is called."""

    miner: str = "none"
    reference: bool = False
    labels: bool = True


def situations(name):
    """All ways in which this loss may be called, with and without labels, tuples, reference; PML may refuse some."""
    if "labels" not in inspect.signature(make_loss(name).forward).parameters:
        return [Situation(reference=True, labels=False)]
    with_labels = [Situation(miner, reference) for miner, reference in itertools.product(MINERS, (False, True))]
    return [*with_labels, Situation(labels=False), Situation(reference=True, labels=False)]


def make_loss(name):
    torch.manual_seed(1)
    return {**LOSSES, **WRAPPERS}[name]().double()


def make_miner(name):
    return MINERS[name]()


class Scene:
    """A model, a batch, and a loss that is called in one situation."""

    def __init__(self, name, situation, seed=0, model=None):
        torch.manual_seed(seed)
        self.situation = situation
        self.model = model or nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, SIZE)).double()
        self.loss = make_loss(name)
        self.labels = TRIPLETS if situation.miner == "EmbeddingsAlreadyPackagedAsTriplets" else LABELS
        of_class, of_image = torch.rand(CLASSES, 1, 6, 6), torch.rand(2, 12, 1, 6, 6)
        self.images = (0.6 * of_class[self.labels] + 0.4 * of_image[0]).double()
        self.ref_images = (0.6 * of_class[REF_LABELS] + 0.4 * of_image[1]).double()

    def arguments(self):
        embeddings = self.model(self.images)
        labels = self.labels if self.situation.labels else None
        reference = (self.model(self.ref_images), REF_LABELS if self.situation.labels else None)
        reference = reference if self.situation.reference else ()
        if "labels" not in inspect.signature(self.loss.forward).parameters:
            return embeddings, reference[0]
        tuples = None
        if self.situation.miner != "none":
            torch.manual_seed(2)
            tuples = make_miner(self.situation.miner)(embeddings, labels, *reference)
        return embeddings, labels, tuples, *reference

    def value(self, loss):
        """A loss's value and its gradients, for model and loss, by name."""
        self.model.zero_grad()
        loss.zero_grad()
        arguments = self.arguments()
        torch.manual_seed(3)
        value = torch.as_tensor(loss(*arguments))
        if value.requires_grad:
            value.backward()
        inner = loss.loss if isinstance(loss, AdversarialLoss) else loss
        named = [
            *((f"model.{n}", p) for n, p in self.model.named_parameters()),
            *((f"loss.{n}", p) for n, p in inner.named_parameters()),
        ]
        return value.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}

    def plain(self):
        """Value and gradients of the loss alone, or the exception that it raises."""
        try:
            return self.value(copy.deepcopy(self.loss))
        except Exception as error:
            return error

    def adversarial(self, perturb, eps=EPS, **options):
        attack = partial(PGD, eps=eps)
        return AdversarialLoss(copy.deepcopy(self.loss), self.model, attack=attack, perturb=perturb, **options)


class Spy:
    """Keeps what a step did, and its score."""

    @hookimpl(wrapper=True)
    def pml_adversarial_score(self, wrapped, batch, plan):
        self.score = yield
        self.batch, self.plan = batch, plan
        return self.score

    @hookimpl
    def pml_adversarial_record(self, adversarial):
        self.adversarial = adversarial
