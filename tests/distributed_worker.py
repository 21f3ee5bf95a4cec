"""What each rank does in the tests of several processes, and how one process does the same with the union of the batches.

Run by torchrun with a folder as its argument; each rank leaves there what it saw. Nothing in here checks anything.
"""

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torchattacks
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pml_adversarial import AdversarialError, AdversarialLoss, AdversarialMiner, Plan, distributed, hookimpl

WORLD, PER_RANK, SEED = 2, 6, 3
LABELS = torch.tensor([0, 0, 1, 1, 2, 3, 0, 1, 2, 2, 3, 3])  # each class on both ranks
REF_LABELS = torch.tensor([3, 2, 1, 0, 0, 1, 2, 3])
NOISY = partial(torchattacks.PGD, eps=0.1, alpha=0.04, steps=3)
PGD = partial(NOISY, random_start=False)


def images(count, seed):
    """Images of 1x4x4, away from the borders of [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64) * 0.6 + 0.2


def make_model(kind="plain"):
    torch.manual_seed(7)
    if kind == "plain":
        layers = [nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)]
    else:
        layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)]
    model = nn.Sequential(*layers).double()
    if kind == "frozen BatchNorm":
        model[1].eval().requires_grad_(False)
        with torch.no_grad():
            model[1](images(4, 3).expand(4, 3, 4, 4))
            model[1].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
            model[1].running_var.copy_(torch.tensor([0.5, 0.8, 1.2]))
    return model


class Spy:
    """Keeps what the last step did."""

    @hookimpl
    def pml_adversarial_record(self, batch, plan, adversarial):
        self.seen = {
            "plan": (plan.rows, plan.layout, plan.indices_tuple, plan.ref_layout),
            "own": batch.own(plan.rows),
            "inputs": adversarial.inputs,
            "embeddings": adversarial.embeddings.detach(),
            "tuples": batch.indices_tuple,
            "context": batch.context,
            "scores": torch.stack([adversarial.score_before, adversarial.score_after]),
        }


@dataclass
class Case:
    """One way to train; ``ref`` is None, "known" (embedded by the model, with gradient) or "unknown"."""

    loss: object
    miner: object = None
    perturb: object = "positive"
    options: dict = field(default_factory=dict)
    model: str = "plain"
    ref: object = None
    shared: bool = False
    ddp: dict = field(default_factory=dict)
    steps: int = 1
    tuples: object = None


ONE_SIDED = tuple(torch.tensor(m) for m in ([6, 7, 8, 10], [0, 2, 4, 5], [2, 0, 1, 3]))  # all positives on rank 0
Triplet = partial(losses.TripletMarginLoss, margin=0.3)
CASES = {
    "triplet": Case(Triplet),
    "triplet, anchor": Case(Triplet, perturb="anchor"),
    "triplet, negative": Case(Triplet, perturb="negative"),
    "triplet, all": Case(Triplet, perturb="all"),
    "triplet, positive and negative": Case(Triplet, perturb=("positive", "negative")),
    "triplet, hard": Case(Triplet, miners.BatchHardMiner),
    "triplet, hard, all": Case(Triplet, miners.BatchHardMiner, perturb="all"),
    "triplet, frozen BatchNorm": Case(Triplet, miners.BatchHardMiner, model="frozen BatchNorm", steps=2),
    "triplet, two a anchor": Case(Triplet, perturb=("anchor", "positive"), options={"tuples_per_anchor": 2}),
    "contrastive": Case(losses.ContrastiveLoss, options={"clean_weight": 0.5}),
    "contrastive, pairs": Case(losses.ContrastiveLoss, miners.PairMarginMiner, perturb="negative"),
    "multi-similarity": Case(losses.MultiSimilarityLoss, miners.MultiSimilarityMiner),
    "multi-similarity, anchor": Case(losses.MultiSimilarityLoss, perturb="anchor"),
    "multi-similarity, frozen BatchNorm, all": Case(
        losses.MultiSimilarityLoss, miners.MultiSimilarityMiner, perturb="all", model="frozen BatchNorm", steps=2
    ),
    "NT-Xent": Case(losses.NTXentLoss),
    "SupCon, all": Case(losses.SupConLoss, perturb="all"),
    "lifted structure": Case(losses.LiftedStructureLoss),
    "l2": Case(Triplet, options={"attack": partial(torchattacks.PGDL2, eps=0.5, alpha=0.2, steps=3, random_start=False)}),
    "warmup": Case(Triplet, options={"warmup": 2}, steps=4),
    "no budget": Case(Triplet, options={"attack": partial(PGD, eps=0.0)}),
    "reference": Case(Triplet, perturb="positive", ref="known"),
    "reference, anchor": Case(losses.MultiSimilarityLoss, perturb="anchor", ref="unknown"),
    "reference, hard, all": Case(Triplet, miners.BatchHardMiner, perturb="all", ref="known"),
    "reference, shared labels": Case(losses.ContrastiveLoss, ref="known", shared=True),
    "cross-batch memory": Case(lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 32), steps=4),
    "cross-batch memory, hard": Case(
        lambda: losses.CrossBatchMemory(Triplet(), 4, 32), miners.BatchHardMiner, perturb="all", steps=4
    ),
    "one rank alone has copies": Case(Triplet, tuples=ONE_SIDED),
    "one rank alone has copies, BatchNorm": Case(Triplet, tuples=ONE_SIDED, model="frozen BatchNorm", steps=2),
    "nobody has copies": Case(Triplet, tuples=tuple(torch.empty(0, dtype=torch.long) for _ in range(3))),
    "find_unused_parameters": Case(Triplet, ddp={"find_unused_parameters": True}, steps=3),
    "find_unused_parameters, all": Case(Triplet, perturb="all", ddp={"find_unused_parameters": True}, steps=3),
    "static_graph": Case(Triplet, ddp={"static_graph": True}, steps=3),
    "static_graph, all": Case(Triplet, perturb="all", ddp={"static_graph": True}, steps=3),
    "gradient_as_bucket_view": Case(Triplet, ddp={"gradient_as_bucket_view": True}, steps=3),
    "no buffers": Case(Triplet, model="frozen BatchNorm", ddp={"broadcast_buffers": False}, steps=2),
}


def train(case, model, wrap, part, first_rank=0):
    """Trains with SGD and says what the last step saw; ``part`` picks the rows that this process holds."""
    spy = Spy()
    wrap_loss, wrap_miner = wrap
    options = {"attack": PGD, "seed": SEED, "perturb": case.perturb, "plugins": [spy], **case.options}
    loss_func = AdversarialLoss(wrap_loss(case.loss()), model, **options)
    miner = case.miner and wrap_miner(case.miner())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(case.steps):
        optimizer.zero_grad()
        labels = part(LABELS)
        embeddings = model(part(images(len(LABELS), step)))
        reference = ()
        if case.ref:
            ref_images, ref_labels = images(len(REF_LABELS), 50 + step), REF_LABELS
            if case.shared:
                ref_images, ref_labels = images(len(LABELS), 50 + step), labels
            ref_emb = model(part(ref_images))
            reference = (
                ref_emb if case.ref == "known" else ref_emb.detach(),
                ref_labels if case.shared else part(ref_labels),
            )
        tuples = case.tuples if case.miner is None else miner(embeddings, labels, *reference)
        if case.tuples is not None and first_rank:
            tuples = tuple(member.flip(0) for member in case.tuples)  # not asked: those of rank 0 count
        loss = loss_func(embeddings, labels, tuples, *reference)
        loss.backward()
        optimizer.step()
    return {
        "loss": loss.detach(),
        "gradients": [p.grad for p in model.parameters() if p.requires_grad],
        "weights": [p.detach() for p in model.parameters()],
        "records": {name: getattr(loss_func, name) for name in loss_func._record_these},
        "seen": getattr(spy, "seen", None),
        "modes": [module.training for module in loss_func.modules()],
    }


def alone(case):
    """One process that holds the union; its random stream is that of rank 0."""
    model = make_model(case.model)
    case = Case(**{**vars(case), "options": {"seed": rank_0_seed(SEED), **case.options}})
    return train(case, model, (lambda loss: loss, lambda miner: miner), lambda rows: rows)


def rank_0_seed(seed):
    """What `distributed.seed_of_rank` gives on rank 0 of several."""
    return (seed + 0xC13FA9A902A6328F) % 2**63


def own_part(rows):
    return rows.chunk(WORLD)[dist.get_rank()]


def parallel(model, **options):
    return DistributedDataParallel(model, **options)


def joint(case):
    ddp = parallel(make_model(case.model), **case.ddp)
    return train(case, ddp, (DistributedLossWrapper, DistributedMinerWrapper), own_part, dist.get_rank())


def local(case):
    """Each rank with a loss of its own batch."""
    ddp = parallel(make_model(case.model), **case.ddp)
    return train(case, ddp, (lambda loss: loss, lambda miner: miner), own_part)


def setting(loss=Triplet, model="plain", **options):
    ddp = parallel(make_model(model))
    spy = Spy()
    options = {"attack": PGD, "seed": SEED, "plugins": [spy], **options}
    return ddp, AdversarialLoss(DistributedLossWrapper(loss()), ddp, **options), spy


def main(folder):
    dist.init_process_group("gloo")
    found = {"cases": {name: joint(case) for name, case in CASES.items()}}
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
