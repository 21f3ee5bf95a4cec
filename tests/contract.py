"""All losses and miners of pytorch-metric-learning, and the batches on which test_contract holds them to one contract.

Losses and miners are found by inspection, so that a new one cannot be missed. Run as a script, it prints the tables
of docs/losses.md.
"""

import copy
import inspect
import itertools
import logging
import random
import sys
import warnings
from functools import cache, partial
from typing import NamedTuple

import numpy
import torch
import torchattacks
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from seed_paper import seed_paper_loss
from torch import nn

from pml_adversarial import AdversarialLoss, hookimpl
from pml_adversarial.training.objectives import OwnLoss

EPS = 0.1
PGD = partial(torchattacks.PGD, alpha=0.02, steps=10)
ROLES = ("anchor", "positive", "negative", "all")
CLASSES, SIZE = 4, 4
LABELS = torch.arange(CLASSES).repeat_interleave(3)  # in blocks of one size, as SmoothAPLoss wants it
UNEVEN = torch.tensor([3, 3, 1, 1, 1, 1, 0, 2, 2, 0, 0, 2])
TRIPLETS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0])  # as EmbeddingsAlreadyPackagedAsTriplets wants it
REF_LABELS = torch.tensor([1, 0, 2, 3, 0, 1, 2, 3, 0, 2, 1, 3])

# What some constructors ask for, and what does not fit twelve rows by default.
_ARGUMENTS = {
    "num_classes": CLASSES,
    "embedding_size": SIZE,
    "descriptors_dim": SIZE,
    "margin": 0.4,
    "Tn": 10.0,
    "l": SIZE,
}
_OPTIONS = {"ManifoldLoss": {"K": CLASSES}}
_NO_LOSS_OF_ITS_OWN = {losses.BaseMetricLossFunction, losses.GenericPairLoss}


def _concrete(module, base, without):
    found = (kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, base))
    return dict(sorted((kind.__name__, kind) for kind in found if kind not in without))


def _required(kind):
    """Arguments that the constructor, or the one that it hands them on to, cannot do without."""
    found = {}
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()
        names = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        found |= {name: _ARGUMENTS[name] for name in names if name != "self"}
        if all(p.kind is not p.VAR_POSITIONAL for p in parameters):
            break
    return found


LOSSES = {
    name: partial(kind, **_required(kind), **_OPTIONS.get(name, {}))
    for name, kind in _concrete(losses, losses.BaseMetricLossFunction, _NO_LOSS_OF_ITS_OWN).items()
}
WRAPPERS = {
    "CrossBatchMemory": lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), SIZE, 48),
    "CrossBatchMemory of triplets": lambda: losses.CrossBatchMemory(losses.TripletMarginLoss(), SIZE, 48),
    "MultipleLosses": lambda: losses.MultipleLosses([losses.TripletMarginLoss(), losses.ContrastiveLoss()]),
    "SelfSupervisedLoss": lambda: losses.SelfSupervisedLoss(losses.NTXentLoss()),
    "SelfSupervisedLoss, not symmetric": lambda: losses.SelfSupervisedLoss(losses.TripletMarginLoss(), symmetric=False),
    "DistributedLossWrapper": lambda: DistributedLossWrapper(losses.MultiSimilarityLoss()),
}
MINERS = {"none": None, **_concrete(miners, miners.BaseMiner, {miners.BaseMiner})}


class CallSignature(NamedTuple):
    """How a loss is called."""

    miner: str = "none"
    reference: bool = False
    labels: bool = True

    def __str__(self):
        return f"{self.miner}{', ref' * self.reference}{', no labels' * (not self.labels)}"


# What PML refuses. `test_pml_refuses_what_is_said_here_and_nothing_else` asks each loss whether this is true.
_WITHOUT_LABELS = {"ManifoldLoss", "VICRegLoss"}  # they take no labels; all others take none but labels
_WITHOUT_TUPLES = {"InstanceLoss", "ManifoldLoss", "P2SGradLoss", "PNPLoss", "RankedListLoss", "VICRegLoss"}
_WITHOUT_REFERENCE = {
    "ArcFaceLoss",
    "CosFaceLoss",
    "CrossBatchMemory",
    "CrossBatchMemory of triplets",
    "FastAPLoss",
    "HistogramLoss",
    "InstanceLoss",
    "LargeMarginSoftmaxLoss",
    "ManifoldLoss",
    "MultipleLosses",
    "NPairsLoss",
    "NormalizedSoftmaxLoss",
    "P2SGradLoss",
    "PNPLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "RankedListLoss",
    "SmoothAPLoss",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
}


def accepted(name):
    """The ways of `situations` that PML does not refuse."""
    return [situation for situation in situations(name) if _accepts(name, situation)]


def _accepts(name, situation):
    if takes_two_views(name):
        return True
    return (
        situation.labels != (name in _WITHOUT_LABELS)
        and (situation.miner == "none" or name not in _WITHOUT_TUPLES)
        and not (situation.reference and name in _WITHOUT_REFERENCE)
    )


def situations(name):
    """All ways in which a loss may be called, with and without labels, tuples and reference."""
    if takes_two_views(name):
        return [CallSignature(reference=True, labels=False)]
    with_labels = [CallSignature(miner, reference) for miner, reference in itertools.product(MINERS, (False, True))]
    return [*with_labels, CallSignature(labels=False), CallSignature(reference=True, labels=False)]


def takes_two_views(name):
    return "labels" not in inspect.signature(make_loss(name).forward).parameters


def seed(number):
    """Of all generators that losses and miners draw from."""
    torch.manual_seed(number)
    numpy.random.seed(number)  # noqa: NPY002
    random.seed(number)


def make_loss(name):
    seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what their constructors say of numpy is not for us
        return {**LOSSES, **WRAPPERS}[name]().double()


class Scene:
    """A model, a batch, and a loss that is called in one situation; ``uneven``: with another number of rows a class."""

    def __init__(self, name, situation, *, uneven=False, model=None, dtype=torch.float64):
        seed(4 if uneven else 0)
        self.situation, self.dtype, self.two_views = situation, dtype, takes_two_views(name)
        self.model = model or nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, SIZE))
        self.model.to(dtype)
        self.loss = make_loss(name).to(dtype)
        self.labels = UNEVEN if uneven else LABELS
        if situation.miner == "EmbeddingsAlreadyPackagedAsTriplets":
            self.labels = TRIPLETS
        of_class, of_image = torch.rand(CLASSES, 1, 6, 6), torch.rand(2, 12, 1, 6, 6)
        self.images = (0.6 * of_class[self.labels] + 0.4 * of_image[0]).to(dtype)
        self.ref_images = (0.6 * of_class[REF_LABELS] + 0.4 * of_image[1]).to(dtype)

    def arguments(self):
        """What the loss is called with, embedded anew."""
        embeddings, reference = self.model(self.images), ()
        labels = self.labels if self.situation.labels else None
        if self.situation.reference:
            reference = self.model(self.ref_images), REF_LABELS if self.situation.labels else None
        if self.two_views:
            return embeddings, reference[0]
        tuples = None
        if self.situation.miner != "none":
            seed(2)
            tuples = MINERS[self.situation.miner]()(embeddings, labels, *reference)
        return embeddings, labels, tuples, *reference

    def call(self, loss):
        """The loss's value."""
        self.model.zero_grad()
        loss.zero_grad()
        arguments = self.arguments()
        seed(3)
        return torch.as_tensor(loss(*arguments))

    def value(self, loss):
        """The loss's value, and its gradients by name, those of its own parameters included."""
        value = self.call(loss)
        if value.requires_grad:
            value.backward()
        inner = loss.loss if isinstance(loss, AdversarialLoss) else loss
        named = {
            f"{of}.{n}": p
            for of, module in (("model", self.model), ("loss", inner))
            for n, p in module.named_parameters()
        }
        return value.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}

    def tried(self, loss):
        """Value and gradients of a loss, or the exception that it raises."""
        try:
            return self.value(loss)
        except Exception as error:
            return error

    def plain(self):
        """The same of the loss that is not wrapped."""
        return self.tried(copy.deepcopy(self.loss))

    def adversarial(self, perturb, eps=EPS, **options):
        attack = partial(PGD, eps=eps)
        return seed_paper_loss(copy.deepcopy(self.loss), self.model, attack=attack, perturb=perturb, seed=0, **options)


class Spy:
    """Keeps what a step did, and its score."""

    score = None

    @hookimpl(wrapper=True)
    def pml_adversarial_score(self, batch, plan):
        self.score = yield
        self.batch, self.plan = batch, plan
        return self.score

    @hookimpl
    def pml_adversarial_record(self, adversarial):
        self.adversarial = adversarial


def outcome(name, situation, perturb):
    """Whether somebody was perturbed, whether the loss rose, and whether all scores did."""
    scene = Scene(name, situation)
    loss_func = scene.adversarial(perturb)
    scene.call(loss_func)
    rose = loss_func.loss_after > loss_func.loss_before
    return loss_func.num_perturbed > 0, rose, loss_func.share_score_rose == 1


class _Copies(logging.Handler):
    """Listens to how copies are said to stand."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.said = []

    def emit(self, record):
        if "copies=%r" in record.msg:
            self.said.append(record.args[1])


def copies_of(name, situation):
    """Where copies of positives stand, and what their attack raises; "refused" if PML refuses the call."""
    if situation not in accepted(name):
        return "refused", None
    scene, spy, listener = Scene(name, situation), Spy(), _Copies()
    logger = logging.getLogger("pml_adversarial")
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    try:
        scene.call(scene.adversarial("positive", plugins=[spy]))
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
    raises = "its own value" if isinstance(spy.score, OwnLoss) else "violation"
    return (listener.said or ["replace"])[-1], raises


@cache
def table():
    """The rows of the table in docs/losses.md, by loss."""
    ways = (
        CallSignature(),
        CallSignature("MultiSimilarityMiner"),
        CallSignature("BatchHardMiner"),
        CallSignature(reference=True),
    )
    without_labels = CallSignature(labels=False), CallSignature(reference=True, labels=False)
    rows = {}
    for name in [*LOSSES, *WRAPPERS]:
        found = [copies_of(name, way) for way in ways]
        unlabelled = [copies_of(name, way) for way in without_labels]
        found.append(min(unlabelled, key=lambda cell: cell[0] == "refused"))
        raises = next(what for _, what in found if what)
        rows[name] = " | ".join([name, *(where for where, _ in found), raises])
    return rows


def counts(name):
    """A row of the second table: in how many combinations somebody was perturbed, the loss rose, the score rose."""
    found = (outcome(name, situation, role) for situation in accepted(name) for role in ROLES)
    attacked = [(loss, score) for perturbed, loss, score in found if perturbed]
    return f"{name} | {len(attacked)} | {sum(loss for loss, _ in attacked)} | {sum(score for _, score in attacked)}"


if __name__ == "__main__":
    rows = [*table().values(), "", *(counts(name) for name in [*LOSSES, *WRAPPERS])]
    sys.stdout.write("".join(f"| {row} |\n" if row else "\n" for row in rows))
