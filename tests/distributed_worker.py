"""What each rank does in the tests of several processes, and how one process does it with the union of the batches.

Run by torchrun with a folder as its argument; each rank leaves there what it saw. Nothing in here checks anything.
"""

import gc
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torchattacks
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from seed_paper import seed_paper_loss
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from pml_adversarial import AdversarialMiner, Plan, hookimpl
from pml_adversarial.training import distributed
from pml_adversarial.training.state import packed, unpacked

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
            "plan": (plan.rows, plan.pool_indices, plan.indices_tuple, plan.ref_pool_indices),
            "own": batch.own(torch.arange(len(plan)), plan.rows),
            "inputs": adversarial.inputs,
            "embeddings": adversarial.embeddings.detach(),
            "tuples": batch.indices_tuple,
            "context": batch.context,
            "scores": torch.stack([adversarial.score_before, adversarial.score_after]),
        }


def drawn(loss, *arguments):
    """A loss with parameters, the same everywhere."""
    torch.manual_seed(11)
    return loss(*arguments).double()


class Norms(losses.BaseMetricLossFunction):
    """A loss that needs no labels."""

    def compute_loss(self, embeddings, *rest):
        squared = embeddings.square().sum(1)
        return {"loss": {"losses": squared, "indices": torch.arange(len(squared)), "reduction_type": "element"}}


FORMS = {
    "normalised": lambda model, x: normalize(model(x)),
    "two calls": lambda model, x: torch.cat([model(x[:2]), model(x[2:])]),
    "in another order": lambda model, x: model(x.flip(0)).flip(0),
    "some of more rows": lambda model, x: model(torch.cat([1 - x, x]))[len(x) :],
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
    labelled: bool = True
    form: object = lambda model, x: model(x)


ONE_SIDED = tuple(torch.tensor(m) for m in ([6, 7, 8, 10], [0, 2, 4, 5], [2, 0, 1, 3]))  # all positives on rank 0
NEGATIVE_PAIRS = tuple(torch.tensor(m, dtype=torch.long) for m in ([], [], [0, 7, 3], [9, 2, 11]))
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
    "triplet, two drawn": Case(partial(Triplet, triplets_per_anchor=2)),
    "triplet, two drawn, all": Case(partial(Triplet, triplets_per_anchor=2), perturb="all"),
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
    "ArcFace": Case(lambda: drawn(losses.ArcFaceLoss, 4, 4), perturb="all"),  # attacked by its own value
    "l2": Case(
        Triplet, options={"attack": partial(torchattacks.PGDL2, eps=0.5, alpha=0.2, steps=3, random_start=False)}
    ),
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
    "no labels": Case(lambda: Norms(), labelled=False),
    "nobody is perturbed": Case(losses.ContrastiveLoss, tuples=NEGATIVE_PAIRS),
    "find_unused_parameters": Case(Triplet, ddp={"find_unused_parameters": True}, steps=3),
    "find_unused_parameters, all": Case(Triplet, perturb="all", ddp={"find_unused_parameters": True}, steps=3),
    "static_graph": Case(Triplet, ddp={"static_graph": True}, steps=3),
    "static_graph, all": Case(Triplet, perturb="all", ddp={"static_graph": True}, steps=3),
    "gradient_as_bucket_view": Case(Triplet, ddp={"gradient_as_bucket_view": True}, steps=3),
    **{name: Case(Triplet, perturb="all", form=form, steps=2) for name, form in FORMS.items()},
    "two calls, positive": Case(Triplet, miners.BatchHardMiner, form=FORMS["two calls"]),
    "in another order, reference": Case(Triplet, perturb="all", form=FORMS["in another order"], ref="known"),
    "one rank alone has copies, two calls": Case(Triplet, tuples=ONE_SIDED, form=FORMS["two calls"], steps=2),
}


LOCAL = ["triplet", "triplet, hard, all", "multi-similarity", "static_graph, all"]


def train(case, model, wrap, part, first_rank=0):
    """Trains with SGD and says what the last step saw; ``part`` picks the rows that this process holds."""
    spy = Spy()
    wrap_loss, wrap_miner = wrap
    options = {"attack": PGD, "seed": SEED, "perturb": case.perturb, "plugins": [spy], **case.options}
    loss_func = seed_paper_loss(wrap_loss(case.loss()), model, **options)
    miner = case.miner and wrap_miner(case.miner())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(case.steps):
        optimizer.zero_grad()
        labels = part(LABELS)
        embeddings = case.form(model, part(images(len(LABELS), step)))
        reference = ()
        if case.ref:
            ref_images, ref_labels = images(len(REF_LABELS), 50 + step), REF_LABELS
            if case.shared:
                ref_images, ref_labels = images(len(LABELS), 50 + step), labels
            ref_emb = case.form(model, part(ref_images))
            reference = (
                ref_emb if case.ref == "known" else ref_emb.detach(),
                ref_labels if case.shared else part(ref_labels),
            )
        tuples = case.tuples if case.miner is None else miner(embeddings, labels, *reference)
        if case.tuples is not None and first_rank:
            tuples = tuple(member.flip(0) for member in case.tuples)  # not asked: those of rank 0 count
        loss = loss_func(embeddings, labels if case.labelled else None, tuples, *reference)
        loss.backward()
        optimizer.step()
    return {
        "loss": loss.detach(),
        "gradients": [p.grad for p in model.parameters() if p.requires_grad],
        "weights": [p.detach() for p in model.parameters()],
        "records": {name: getattr(loss_func, name) for name in loss_func._record_these},
        "seen": getattr(spy, "seen", None),
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
    """A model, a loss of all ranks, and what it saw."""
    ddp = parallel(make_model(model))
    spy = Spy()
    options = {"attack": PGD, "seed": SEED, "plugins": [spy], **options}
    return ddp, seed_paper_loss(DistributedLossWrapper(loss()), ddp, **options), spy


def message(work):
    """Type and words of the error that ``work`` raises."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def collectives():
    """Names of the collectives in one step, forward and backward apart, by loss, mode and number of attack steps."""
    found = {}
    for kind in ("frozen BatchNorm", "BatchNorm"):
        for perturb in ("positive", "all"):
            for steps in (1, 4, 9):
                ddp, loss_func, _ = setting(model=kind, perturb=perturb, attack=partial(PGD, steps=steps))
                embeddings = ddp(own_part(images(12, 0)))
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    loss_func(embeddings, own_part(LABELS)).backward()
                names = [event.name for event in profile.events() if event.name.startswith("c10d::")]
                found[kind, perturb, steps] = sorted(names)
    return found


def failing_attack(objective):
    def attack(inputs, labels):
        return inputs + 3

    return attack if dist.get_rank() == 1 else PGD(objective)


class Unhappy:
    """Fails on one rank, with an error that does not survive a pickle."""

    def __init__(self, question, at):
        self.question, self.at = question, at

    def fail(self, question):
        class LocalError(Exception):
            pass

        if question == self.question and dist.get_rank() == self.at:
            raise LocalError(f"no {question}")

    @hookimpl
    def pml_adversarial_plan(self):
        self.fail("plan")

    @hookimpl
    def pml_adversarial_score(self):
        self.fail("score")


def errors():
    """What each rank raises where something is wrong on one of them."""
    ddp, loss_func, _ = setting()
    rank, x, y = dist.get_rank(), own_part(images(12, 0)), own_part(LABELS)
    fewer = slice(0, 6 - rank)
    other_tuples = tuple(torch.tensor([11 + 2 * rank]) for _ in range(3))

    def with_options(**options):
        ddp, loss_func, _ = setting(**options)
        return lambda: loss_func(ddp(x), y)

    return {
        "sizes": message(lambda: loss_func(ddp(x[fewer]), y[fewer])),
        "no labels": message(lambda: loss_func(ddp(x), None if rank else y)),
        "unknown": message(lambda: loss_func(torch.rand(6, 4).double().requires_grad_() if rank else ddp(x), y)),
        "rows without inputs first": message(lambda: loss_func(torch.cat([torch.rand(2, 4).double(), ddp(x[2:])]), y)),
        "range": message(lambda: loss_func(ddp(x * (1 + 9 * rank)), y)),
        "tuples": message(lambda: loss_func(ddp(x), y, other_tuples)),
        "attack": message(with_options(attack=failing_attack)),
        "plan": message(with_options(plugins=[Unhappy("plan", 0)])),
        "plan elsewhere": message(with_options(plugins=[Unhappy("plan", 1)])),
        "score": message(with_options(plugins=[Unhappy("score", 1)])),
        "mode": message(one_mode_apart),
        "mode since": message(one_mode_changed),
        "after all": message(lambda: loss_func(ddp(x), y).backward()),
    }


def one_mode_apart():
    ddp, loss_func, _ = setting(model="BatchNorm")
    if dist.get_rank():
        ddp.eval()
    loss_func(ddp(own_part(images(12, 0))), own_part(LABELS))


def one_mode_changed():
    ddp, loss_func, _ = setting(model="BatchNorm")
    embeddings = ddp(own_part(images(12, 0)))
    if dist.get_rank():
        ddp.eval()
    loss_func(embeddings, own_part(LABELS))


def noise(seed, steps=1, loaded=None, wrap=DistributedLossWrapper):
    """What was added to one and the same image on each rank; seed and step count afterwards."""
    ddp = parallel(make_model())
    spy = Spy()
    loss_func = seed_paper_loss(wrap(Triplet()), ddp, attack=NOISY, perturb="all", seed=seed, plugins=[spy])
    if loaded is not None:
        loss_func.load_state_dict(loaded)
    for _ in range(steps):
        loss_func(ddp(images(6, 0)), own_part(LABELS))
    return spy.seen["inputs"] - images(6, 0), loss_func.state_dict()


def noises():
    rank = dist.get_rank()
    second, state = noise(5, 2)
    _, one_step = noise(5, 1)
    remembered = unpacked(one_step["_extra_state"])
    remembered["monitor"]["share"] = 0.5
    weaker = {**one_step, "_extra_state": packed(remembered)}
    _, held_back = noise(6, 1, None if rank else weaker)
    return {
        "seed 5": noise(5)[0],
        "seed 5 again": noise(5)[0],
        "seeds of their own": noise(5 + 90 * rank)[0],
        "second step": second,
        "second step, loaded": noise(6, 1, one_step)[0],
        "second step, loaded by rank 0": noise(6, 1, None if rank else one_step)[0],
        "each its own loss": noise(5, wrap=lambda loss: loss)[0],
        "state": unpacked(state["_extra_state"]),
        "share, loaded by rank 0": unpacked(held_back["_extra_state"])["monitor"]["share"],
    }


def proxies(wrap_loss, attack):
    """A loss with parameters: DistributedDataParallel stands around it. Its gradients and the model's."""
    torch.manual_seed(11)
    ddp = parallel(make_model())
    loss_func = parallel(wrap_loss(losses.ProxyAnchorLoss(4, 4).double(), ddp, attack))
    values = []
    optimizer = torch.optim.SGD([*ddp.parameters(), *loss_func.parameters()], lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        loss = loss_func(ddp(own_part(images(12, step))), own_part(LABELS))
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    return {
        "losses": torch.stack(values),
        "proxies": next(loss_func.parameters()).grad,
        "model": [p.grad for p in ddp.parameters()],
    }


def adversarial_proxies(loss, ddp, attack):
    return seed_paper_loss(DistributedLossWrapper(loss), ddp, attack=attack, perturb="all", seed=SEED)


MINERS = {
    "batch hard": miners.BatchHardMiner,
    "multi-similarity": miners.MultiSimilarityMiner,
    "triplet margin": partial(miners.TripletMarginMiner, margin=0.5),
}


def told_inputs(model, wrap_loss, wrap_miner, part):
    """A loss and a miner that are told pixels, of which a function of ours makes what the model takes."""
    embed, x, y = lambda pixels: model(3 * pixels - 1), part(images(12, 0)), part(LABELS)
    options = {
        "attack": PGD,
        "perturb": "all",
        "seed": SEED if wrap_loss is DistributedLossWrapper else rank_0_seed(SEED),
    }
    miner = AdversarialMiner(wrap_miner(miners.BatchHardMiner()), embed, **options)
    loss_func = seed_paper_loss(wrap_loss(Triplet()), embed, **options)
    embeddings = embed(x)
    mined = miner(embeddings, y, inputs=x)
    loss = loss_func(embeddings, y, inputs=x)
    loss.backward()
    return {
        "mined": mined,
        "loss": loss.detach(),
        "gradients": [p.grad for p in model.parameters()],
        "perturbed": (miner.num_perturbed, loss_func.num_perturbed),
    }


def mine(name, perturb, model, wrap, part, ref=False, attack=PGD):
    """Tuples of an adversarial miner, and a plain loss on them."""
    miner = AdversarialMiner(wrap(MINERS[name]()), model, attack=attack, perturb=perturb, seed=SEED)
    embeddings, labels = model(part(images(12, 0))), part(LABELS)
    reference = (model(part(images(8, 1))), part(REF_LABELS)) if ref else ()
    return miner(embeddings, labels, *reference), (embeddings, labels, *reference), miner.num_perturbed


def joint_mining():
    found = {}
    for name in MINERS:
        for perturb in ("all", "positive"):
            for ref in (False, True):
                ddp = parallel(make_model())
                mined, (embeddings, labels, *reference), count = mine(
                    name, perturb, ddp, DistributedMinerWrapper, own_part, ref
                )
                loss = DistributedLossWrapper(losses.ContrastiveLoss())(embeddings, labels, mined, *reference)
                loss.backward()
                gradients = [p.grad for p in ddp.parameters()]
                found[name, perturb, ref] = (mined, loss.detach(), gradients, count)
    still = mine("batch hard", "all", ddp, DistributedMinerWrapper, own_part, attack=partial(PGD, eps=0.0))[0]
    plain = DistributedMinerWrapper(MINERS["batch hard"]())(ddp(own_part(images(12, 0))), own_part(LABELS))
    return {"found": found, "no budget": (still, plain)}


def batchnorm_in_train_mode():
    """BatchNorm of each rank normalises its own rows."""
    ddp, loss_func, spy = setting(perturb="all", model="BatchNorm")
    loss = loss_func(ddp(own_part(images(12, 0))), own_part(LABELS))
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": [p.grad for p in ddp.parameters()],
        "inputs": spy.seen["inputs"],
        "buffers": {name: buffer.clone() for name, buffer in ddp.module.named_buffers()},
    }


def gathering():
    rank = dist.get_rank()
    rows = torch.arange(3.0 * (rank + 1)).reshape(rank + 1, 3).requires_grad_()
    unequal = distributed.gather_rows(rows, [1, 2])
    unequal.sum().backward()
    ids = torch.arange(4) + 4 * rank
    theirs = torch.empty(0, dtype=torch.long) if rank else ids
    told = distributed.agree(lambda: rank, lambda result: f"from {result}")
    by_pml = DistributedLossWrapper(Recorder())
    by_pml(ids.reshape(-1, 1).double(), ids)
    return {
        "unequal": unequal.detach(),
        "gradient": rows.grad,
        "parts": distributed.gather_parts(torch.tensor([10 * rank, 10 * rank + 1, 10 * rank + 5]), (2, 1)),
        "nothing of rank 1": distributed.gather_rows(theirs, [4, 0]),
        "own first": distributed.own_first(torch.arange(8), 4),
        "as PML numbers": by_pml.loss.labels,
        "told": told,
        "decided": distributed.decide(lambda: f"rank {rank}"),
    }


class Recorder(losses.BaseMetricLossFunction):
    """Keeps the labels in the order in which PML's wrapper hands them over."""

    def forward(self, embeddings, labels, *rest):
        self.labels = labels
        return embeddings.sum()


class AllPulled:
    """A scalar score."""

    @hookimpl
    def pml_adversarial_score(self):
        return lambda embeddings: embeddings.sum()


class PulledTogether:
    """A scalar score to which all copies matter at once."""

    @hookimpl
    def pml_adversarial_score(self):
        return lambda embeddings: embeddings.sum(0).square().sum()


class RepeatsRowsOfRank0:
    """As many copies as there are rows, none of them of rank 1."""

    @hookimpl
    def pml_adversarial_plan(self, batch):
        rows = torch.arange(len(batch)) % 6
        return Plan(rows, torch.arange(len(batch)) + len(batch), None)


def others():
    ddp, loss_func, _ = setting()
    x, y = own_part(images(12, 0)), own_part(LABELS)
    unbound = seed_paper_loss(DistributedLossWrapper(Triplet()), attack=PGD, seed=SEED)
    found = {
        "named": loss_func(ddp(x), y).detach(),
        "found by itself": unbound(ddp(x), y).detach(),
        "eval": loss_func.eval()(ddp(x), y).detach(),
        "PML": DistributedLossWrapper(Triplet())(ddp(x), y).detach(),
        "wrong order": message(
            lambda: DistributedMinerWrapper(AdversarialMiner(MINERS["batch hard"](), ddp))(ddp(x), y)
        ),
    }
    spy = Spy()
    ddp, loss_func, _ = setting(plugins=[PulledTogether(), spy])
    loss_func(ddp(x), y)
    found["pulled together"] = spy.seen["inputs"]
    ddp, loss_func, _ = setting()
    with ddp.no_sync():
        loss_func(ddp(x), y).backward()
    loss_func(ddp(own_part(images(12, 1))), y).backward()
    found["accumulated"] = [p.grad for p in ddp.parameters()]
    for name, plugin in {"scalar score": AllPulled(), "copies of rank 0": RepeatsRowsOfRank0()}.items():
        spy = Spy()
        ddp, loss_func, _ = setting(plugins=[plugin, spy])
        loss = loss_func(ddp(x), y)
        loss.backward()
        found[name] = spy.seen["inputs"], loss.detach(), [p.grad for p in ddp.parameters()]
    return found


def main(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # who waits in vain fails
    plainly = (lambda loss, ddp, attack: DistributedLossWrapper(loss)), None
    found = {
        "cases": {name: joint(case) for name, case in CASES.items()},
        "local": {name: local(CASES[name]) for name in LOCAL},
        "collectives": collectives(),
        "errors": errors(),
        "noise": noises(),
        "proxies": proxies(adversarial_proxies, PGD),
        "proxies, no budget": proxies(adversarial_proxies, partial(PGD, eps=0.0)),
        "proxies, PML": proxies(*plainly),
        "miners": joint_mining(),
        "told inputs": told_inputs(parallel(make_model()), DistributedLossWrapper, DistributedMinerWrapper, own_part),
        "BatchNorm": batchnorm_in_train_mode(),
        "gathering": gathering(),
        "others": others(),
    }
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    gc.collect()  # models of DistributedDataParallel keep gloo's threads running, which may break the exit
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
