"""What each process does in the tests of a shared evaluation. Nothing in here checks anything.

python sharing_worker.py FOLDER WORLD CASE ...

forks WORLD processes, which share a group if they are several. Each leaves what it saw in FOLDER/CASE/RANK.pkl. The
processes are forked, which is fast, before anything has run in this one.
"""

import logging
import multiprocessing
import os
import pickle
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from notes import Notes
from query_batches import Made, images_of, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pml_adversarial.evaluation import evaluate_robustness
from pml_adversarial.evaluation.runs import sharing
from pml_adversarial.evaluation.suites import quick, standard

COUNT = 24  # queries, in batches of 7: four batches, the last one smaller


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def everything(report):
    """All of a report that can be compared."""
    found = report.to_dict()
    examples = [(one.query, one.attack, one.perturbed.tolist(), [n.item for n in one.after]) for one in report.examples]
    attacked = report.attacked and {eps: images.tolist() for eps, images in report.attacked.items()}
    return {**found, "examples": examples, "attacked": attacked}


def evaluated(model=None, queries=None, gallery=None, **options):
    few = {"eps": (0.02, 0.05), "attacks": quick(4, 2), "batch_size": 7, "checks": False, "keep_attacked": True}
    options = {**few, **options}
    return evaluate_robustness(model or Counted(), queries or images_of(COUNT), gallery, **options)


def outcome(work):
    """What a function returns, or the error that it raises."""
    try:
        return work()
    except Exception as error:
        return type(error).__name__, str(error)


class Counted(nn.Module):
    """A network that counts the images that it embeds, and fails, or ends its process, when it has embedded enough."""

    def __init__(self, enough=None, end=False):
        super().__init__()
        self.network, self.seen, self.enough, self.end = network(), Notes(), enough, end

    def forward(self, images):
        self.seen.append(len(images))
        if self.enough is not None and sum(self.seen) > self.enough:
            if self.end:
                os._exit(9)
            raise OSError("out of luck")
        return self.network(images)


def plain(folder):
    return everything(evaluated())


def checked(folder):
    return everything(evaluated(checks=True, keep_attacked=False))


def one_batch(folder):
    """Fewer batches than processes."""
    return everything(evaluated(batch_size=COUNT))


def suite(folder):
    return everything(evaluated(eps=0.05, attacks=standard(2, 1, 3, 2), nmi=True, keep_attacked=False))


def gallery(folder):
    model = Counted()
    found = everything(evaluated(model, images_of(10), images_of(31, seed=1), attacks=quick(1, 1)))
    return {**found, "embedded": sum(model.seen)}


def random_model(folder):
    """It draws random numbers, in eval mode too."""
    inner = network()
    return everything(evaluated(Made(lambda images: inner(images) + 0.01 * torch.randn(1))))


def in_parallel(folder):
    model = network()
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    found = everything(evaluated(wrapped))
    return {**found, "came back": wrapped.training}


def in_parallel_within(folder):
    wrapped = DistributedDataParallel(network())
    return outcome(lambda: evaluated(lambda images: wrapped(images)))


def fails_at(where, folder):
    """The last process fails once it has embedded so many images; then all call again."""
    enough = where if rank() == dist.get_world_size() - 1 else None
    return outcome(lambda: evaluated(Counted(enough), checks=where == 1000)), everything(evaluated())


def fails_before(folder):
    return outcome(lambda: evaluated(queries=images_of(COUNT) if rank() else (torch.zeros(3), torch.zeros(3))))


def resumed(folder):
    """The first process fails in its second batch; then all go on."""
    first = outcome(lambda: evaluated(Counted(None if rank() else 300), resume=folder / "parts"))
    kept = sorted(path.name for path in (folder / "parts").iterdir())
    dist.barrier()
    model = Counted()
    report = evaluated(model, resume=folder / "parts" if rank() == 0 else folder / f"not there {rank()}")
    again = Counted()
    evaluated(again, resume=folder / "parts")
    return {
        "first": first,
        "kept": kept,
        "report": everything(report),
        "images": sum(model.seen),
        "again": sum(again.seen),
        "folders": sorted(path.name for path in folder.iterdir() if path.is_dir()),
    }


def differ(folder):
    """Each process evaluates something else than the first."""
    others = {
        "seed": {"seed": rank()},
        "model": {"model": network(rank())},
        "queries": {"queries": images_of(24, seed=rank())},
    }
    return {name: outcome(lambda options=options: evaluated(**options)) for name, options in others.items()}


def alone(folder):
    """One process evaluates by itself, then all do."""
    first = everything(evaluated(share=False)) if rank() == 0 else None
    return first, everything(evaluated())


def does_not_come(folder):
    """The first process waits in vain for the others; then all come."""
    sharing.PATIENCE, sharing._WARN_AFTER = 0.3, 0.05
    first = outcome(evaluated) if rank() == 0 else None
    dist.barrier()
    sharing.PATIENCE = 600.0
    return first, everything(evaluated())


def dies(folder):
    """The first process is gone in the middle of its second batch, as after a kill."""
    return outcome(lambda: evaluated(Counted(None if rank() else 300, end=True), resume=folder / "parts"))


def goes_on(folder):
    """After `dies` left the folder ``parts`` here."""
    return everything(evaluated(Counted(), resume=folder / "parts"))


def shows(folder):
    """What is written to the terminal and to the log."""
    return everything(evaluated(progress=True, checks=True))


SAME = (plain, checked, one_batch, suite, gallery, random_model, in_parallel, shows)  # as one process has it
FAIL_AT = (3, 20, 150, 1000)  # in the gallery's embeddings, with those of the queries, in a batch, in the checks
OTHERS = (in_parallel_within, fails_before, resumed, differ, alone, does_not_come)
CASES = {case.__name__: case for case in (*SAME, *OTHERS, dies, goes_on)}
CASES |= {f"fails at {images}": partial(fails_at, images) for images in FAIL_AT}


class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def process(folder, number, world, names):
    torch.set_num_threads(1)
    logging.getLogger("pml_adversarial").setLevel(logging.INFO)
    if world > 1:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=number, world_size=world, timeout=timedelta(seconds=120))
    for name in names:
        own, kept = folder / name, Kept()
        own.mkdir(exist_ok=True)
        logging.getLogger("pml_adversarial").addHandler(kept)
        try:
            found = CASES[name](own)
        except Exception:
            found = traceback.format_exc()
        logging.getLogger("pml_adversarial").removeHandler(kept)
        (own / f"{number}.pkl").write_bytes(pickle.dumps((found, kept.lines)))


def run(folder, world, names, seconds=60):
    """Forks the processes; who has not ended after a while is ended."""
    (folder / "store").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=process, args=(folder, number, world, names)) for number in range(world)]
    for one in started:
        one.start()
    for one in started:
        one.join(seconds)
        one.kill()


def seen(folder, world, name):
    """What each process returned, and the lines that it logged; None of one that ended early."""
    files = [folder / name / f"{number}.pkl" for number in range(world)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:], 240)
