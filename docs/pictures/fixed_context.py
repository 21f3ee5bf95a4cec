"""A batch of digits on the unit circle: attacked all at once, and each row within the clean rest of the batch."""

from functools import partial

import matplotlib.pyplot as plt
import torch
import torchattacks
from pytorch_metric_learning.losses import TripletMarginLoss
from torch.nn.functional import normalize

from pml_adversarial import AdversarialLoss, hookimpl
from pml_adversarial.cli.images import digits

EPS, ALPHA, STEPS = 0.1, 0.0125, 20
CLASSES, ROWS, BATCHES = 4, 6, 20

torch.manual_seed(0)
torch.set_num_threads(1)
data = digits(train_classes=range(CLASSES))
images, labels = data.train_images, data.train_labels
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
loss_func = TripletMarginLoss(margin=0.3)
for _ in range(150):
    rows = torch.randint(len(images), (64,))
    optimizer.zero_grad()
    loss_func(model(images[rows]), labels[rows]).backward()
    optimizer.step()


def draw(seed):
    """A batch of some rows of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([order[labels[order] == label][:ROWS] for label in range(CLASSES)])
    return images[rows], labels[rows]


def unmoved(images, labels):
    """No attack."""
    return images


def all_at_once(images, labels):
    """Every row climbs the loss of the batch, in which all the others move as well."""
    moved = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        moved.requires_grad_()
        (slope,) = torch.autograd.grad(loss_func(model(moved), labels), moved)
        moved = images + (moved.detach() + ALPHA * slope.sign() - images).clamp(-EPS, EPS)
        moved = moved.clamp(0, 1)
    return moved


class Keep:
    """Keeps what the attack of a step found."""

    @hookimpl
    def pml_adversarial_record(self, adversarial):
        """Nothing is worth a record."""
        self.inputs = adversarial.inputs


def within_the_clean_rest(images, labels):
    """What `AdversarialLoss` does."""
    keep = Keep()
    attack = partial(torchattacks.PGD, eps=EPS, alpha=ALPHA, steps=STEPS)
    wrapped = AdversarialLoss(loss_func, model, attack=attack, plugins=[keep], keep_clean=False, warmup=0)
    wrapped(model(images), labels)
    return keep.inputs


@torch.no_grad()
def recall_at_1(images, labels, moved):
    """Share of rows whose nearest clean other row is of their class."""
    similar = normalize(model(moved)) @ normalize(model(images)).T
    return (labels[similar.fill_diagonal_(-2).argmax(1)] == labels).float().mean().item()


figure, panels = plt.subplots(1, 3, figsize=(10.5, 4.1), layout="constrained")
ways = {"clean": unmoved, "all rows at once": all_at_once, "each row, the others held fixed": within_the_clean_rest}
for axes, (name, attack) in zip(panels, ways.items(), strict=True):
    recall = sum(recall_at_1(*batch, attack(*batch)) for batch in map(draw, range(BATCHES))) / BATCHES
    batch = draw(0)
    moved = attack(*batch)
    with torch.no_grad():
        clean, found = normalize(model(batch[0])), 1.35 * normalize(model(moved))
    axes.add_artist(plt.Circle((0, 0), 1, fill=False, color="0.8"))
    for label in range(CLASSES):
        own, colour = batch[1] == label, f"C{label}"
        axes.plot(clean[own, 0], clean[own, 1], "o", color=colour, markersize=6)
        if attack is not unmoved:
            axes.plot(found[own, 0], found[own, 1], "x", color=colour, markersize=6)
            for start, end in zip(clean[own], found[own], strict=True):
                axes.plot([start[0], end[0]], [start[1], end[1]], color=colour, linewidth=0.6, alpha=0.6)
    axes.set_title(f"{name}\nR@1 in {BATCHES} batches: {100 * recall:.0f} %", fontsize=11)
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    axes.set_axis_off()
