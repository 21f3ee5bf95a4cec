"""Whatever comes in: the right result or an error of the package, and a model that is as it was found.

Batches, tuples, types and memory layouts are drawn by Hypothesis; faults are put into every pass, hook and call.
"""

import copy
import random
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy
import pytest
import torch
import torchattacks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from seed_paper import seed_paper_loss
from torch import nn

from pml_adversarial import AdversarialError, AdversarialMiner, AttackError, hookimpl
from pml_adversarial.errors import ReplayError

EPS, STEPS = 0.05, 2
PGD = partial(torchattacks.PGD, eps=EPS, alpha=0.03, steps=STEPS)
NO_BUDGET = partial(PGD, eps=0.0)
ROLES = ("anchor", "positive", "negative")
CLASSES, MEMORY = 12, 24
LOSSES = {
    "triplet": lambda d: losses.TripletMarginLoss(margin=0.2),
    "contrastive": lambda d: losses.ContrastiveLoss(),
    "multi-similarity": lambda d: losses.MultiSimilarityLoss(),
    "NT-Xent": lambda d: losses.NTXentLoss(),
    "SupCon": lambda d: losses.SupConLoss(),
    "lifted structure": lambda d: losses.LiftedStructureLoss(),
    "proxy anchor": lambda d: losses.ProxyAnchorLoss(CLASSES, d),
    "ArcFace": lambda d: losses.ArcFaceLoss(CLASSES, d),
    "cross-batch memory": lambda d: losses.CrossBatchMemory(losses.ContrastiveLoss(), d, MEMORY),
}
MINERS = {
    "batch hard": miners.BatchHardMiner,
    "multi-similarity": miners.MultiSimilarityMiner,
    "triplet margin": partial(miners.TripletMarginMiner, margin=0.5),
}

quick = settings(deadline=None, derandomize=True, database=None, max_examples=150)
deep = settings(quick, max_examples=200)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def dead(linear):
    nn.init.constant_(linear.bias, -100)
    return nn.ReLU()


MODELS = {
    "linear": lambda linear: nn.Identity(),
    "tanh": lambda linear: nn.Tanh(),
    "BatchNorm": lambda linear: nn.BatchNorm1d(linear.out_features),
    "frozen BatchNorm": lambda linear: nn.BatchNorm1d(linear.out_features).eval(),
    "Dropout": lambda linear: nn.Dropout(0.5),
    "dead": dead,
    "saturated": lambda linear: Apply(lambda x: (1e4 * x).tanh()),
    "huge": lambda linear: Apply(lambda x: x * torch.finfo(x.dtype).max / 100),
    "NaN": lambda linear: Apply(lambda x: x * torch.nan),
}
VALUES = {
    "uniform": lambda x: x,
    "two images": lambda x: x[:2].repeat(len(x), *[1] * (x.ndim - 1))[: len(x)],
    "constant": lambda x: torch.full_like(x, 0.5),
    "0 and 1": torch.round,
    "denormal": lambda x: x * 1e-40,
    "slightly outside": lambda x: x * 1.0001 - 0.00005,
    "outside": lambda x: x * 1.5 - 0.2,
    "NaN": lambda x: x.masked_fill(x > 0.8, torch.nan),
    "infinite": lambda x: x.masked_fill(x > 0.8, torch.inf),
    "1e30": lambda x: x * 1e30,
    "bytes": lambda x: (x * 255).byte(),
    "bool": lambda x: x > 0.5,
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand_as(x) if len(x) else x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "requires gradient": lambda x: x.requires_grad_() if x.is_floating_point() else x,
}
LABELS = {
    "random": lambda n, classes: torch.randint(classes, (n,)),
    "pairs": lambda n, classes: torch.arange(n) // 2,
    "single class": lambda n, classes: torch.zeros(n, dtype=torch.long),
    "singletons": lambda n, classes: torch.arange(n),
}
TUPLES = {
    "the loss's": lambda n: None,
    "triplets": lambda n: drawn(n, 5, 5, 5),
    "pairs": lambda n: drawn(n, 4, 4, 6, 6),
    "one triplet": lambda n: drawn(n, 1, 1, 1),
    "no triplets": lambda n: drawn(n, 0, 0, 0),
    "no pairs": lambda n: drawn(n, 0, 0, 0, 0),
    "no positive pairs": lambda n: drawn(n, 0, 0, 3, 3),
    "one triplet, repeated": lambda n: tuple(member.repeat(4) for member in drawn(n, 1, 1, 1)),
    "one row thrice": lambda n: drawn(n, 2)[:1] * 3,
    "out of range": lambda n: (*drawn(n, 1, 1), torch.tensor([n])),
    "negative": lambda n: (*drawn(n, 1, 1), torch.tensor([-1])),
    "int32": lambda n: tuple(member.int() for member in drawn(n, 2, 2, 2)),
    "two members": lambda n: drawn(n, 2, 2),
    "of two lengths": lambda n: drawn(n, 2, 2, 3),
    "matrices": lambda n: tuple(member[None] for member in drawn(n, 2, 2, 2)),
    "a list": lambda n: [[0], [1], [2]],
}


def drawn(rows, *lengths):
    return tuple(torch.randint(max(rows, 1), (length if rows else 0,)) for length in lengths)


def some(options, *first):
    """One of the options by name; the first, which are drawn as often as all others together, are ordinary ones."""
    return st.one_of(st.sampled_from(first), st.sampled_from(sorted(options)))


@dataclass
class Scene:
    """What is drawn; a failing example prints it."""

    seed: int
    rows: int
    shape: tuple[int, ...]
    dimensions: int
    loss: str
    model: str
    values: str
    layout: str
    labels: str
    classes: int
    label_type: torch.dtype
    tuples: str
    dtype: torch.dtype
    perturb: str | tuple[str, ...]
    tuples_per_anchor: int | None

    def build(self):
        torch.manual_seed(self.seed)
        images = LAYOUTS[self.layout](VALUES[self.values](torch.rand(self.rows, *self.shape).to(self.dtype)))
        labels = LABELS[self.labels](self.rows, self.classes).to(self.label_type)
        linear = nn.Linear(max(1, images[:1].numel() or numpy.prod(self.shape)), self.dimensions)
        model = nn.Sequential(Apply(lambda x: x.to(self.dtype)), nn.Flatten(), linear, MODELS[self.model](linear))
        loss = LOSSES[self.loss](self.dimensions)
        return model.to(self.dtype), loss.to(self.dtype), images, labels, TUPLES[self.tuples](self.rows)

    @property
    def rounding(self):
        return torch.finfo(self.dtype).eps


sides = st.integers(1, 3)
roles = st.sampled_from(["anchor", "positive", "negative", "all", ("anchor", "positive"), ("positive", "negative")])
scenes = st.builds(
    Scene,
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 12),
    shape=st.one_of(
        st.tuples(st.integers(1, 6)), st.tuples(sides, sides, sides), st.tuples(sides, sides, sides, st.just(2))
    ),
    dimensions=st.integers(1, 8),
    loss=st.sampled_from(sorted(LOSSES)),
    model=some(MODELS, "linear", "tanh", "BatchNorm"),
    values=some(VALUES, "uniform"),
    layout=some(LAYOUTS, "contiguous"),
    labels=some(LABELS, "random"),
    classes=st.integers(1, CLASSES),
    label_type=st.sampled_from([torch.int64, torch.int64, torch.int32, torch.uint8, torch.float32]),
    tuples=some(TUPLES, "the loss's", "triplets", "pairs"),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    perturb=roles,
    tuples_per_anchor=st.sampled_from([None, None, 1, 2]),
)


in_one_dimension = Scene(  # unit embeddings are 1 and -1, and one that Dropout made 0 is neither
    seed=1,
    rows=8,
    shape=(1, 2, 2),
    dimensions=1,
    loss="cross-batch memory",
    model="Dropout",
    values="uniform",
    layout="contiguous",
    labels="random",
    classes=8,
    label_type=torch.int32,
    tuples="triplets",
    dtype=torch.float64,
    perturb="negative",
    tuples_per_anchor=None,
)


class Spy:
    """Keeps what the last step did."""

    plan = adversarial = batch = None

    @hookimpl
    def pml_adversarial_record(self, batch, plan, adversarial):
        self.batch, self.plan, self.adversarial = batch, plan, adversarial


def bits(tensor):
    """A tensor's memory, by which NaN is equal to itself."""
    return tensor.detach().flatten().clone().view(torch.uint8)


class Found:
    """All that a step must leave as it found it; `check` says what it did not."""

    def __init__(self, *modules, tensors=()):
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.grad = torch.ones_like(parameter)
        self.modules, self.tensors = [m for module in modules for m in module.modules()], tensors
        self.before = self.now()
        self.buffers = [dict(m._buffers) for m in self.modules]
        self.buffer_bits = self.bits_of_buffers()
        self.rng = self.generators()

    def now(self):
        parameters = [p for m in self.modules for p in m._parameters.values() if p is not None]
        hooks = [
            len(hooks)
            for m in self.modules
            for name, hooks in sorted(vars(m).items())
            if name.endswith("_hooks") and hooks
        ]
        return {
            "modes": [m.training for m in self.modules],
            "parameters": [(id(p), p.requires_grad, bits(p).tolist()) for p in parameters],
            "gradients": [(id(p.grad), bits(p.grad).tolist()) for p in parameters],
            "hooks": hooks,
            "attributes": [sorted(vars(m)) for m in self.modules if not isinstance(m, ModuleWithRecords)],
            "the caller's tensors": [(t.requires_grad, t.grad is None, bits(t).tolist()) for t in self.tensors],
            "numpy and random": (str(numpy.random.get_state()), random.getstate()),  # noqa: NPY002
            "settings of torch": (
                torch.is_grad_enabled(),
                torch.get_default_dtype(),
                torch.is_inference_mode_enabled(),
            ),
        }

    def bits_of_buffers(self):
        return [{name: bits(b).tolist() for name, b in m._buffers.items() if b is not None} for m in self.modules]

    @staticmethod
    def generators():
        return torch.get_rng_state().tolist()

    def check(self, embedded_anew=False, drew=False, enqueued=False):
        """``embedded_anew``: one training pass was run; ``drew``: it drew; ``enqueued``: the loss's queue has moved."""
        now = self.now()
        assert [name for name, value in self.before.items() if now[name] != value] == []
        for module, buffers, before, after in zip(
            self.modules, self.buffers, self.buffer_bits, self.bits_of_buffers(), strict=True
        ):
            if isinstance(module, losses.CrossBatchMemory) and enqueued:
                continue
            assert all(module._buffers[name] is buffer for name, buffer in buffers.items())
            if isinstance(module, nn.BatchNorm1d) and module.training and embedded_anew:
                assert module.num_batches_tracked.item() == int(buffers["num_batches_tracked"])
                continue
            assert before == after
        if not drew:
            assert self.generators() == self.rng


def outcome(function):
    """What a function gave and what it raised, of which one is None."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def acceptable(error, plain_error):
    """An error of the package with a message, or one that the wrapped loss raises too."""
    if isinstance(error, AdversarialError):
        return len(str(error)) > 60
    return plain_error is not None


def close(scene, found, expected):
    tolerance = {"rtol": 50 * scene.rounding, "atol": 50 * scene.rounding}
    torch.testing.assert_close(found.detach().double(), expected.detach().double(), equal_nan=True, **tolerance)


def tuples_by_loop(scene, labels, tuples):
    """The tuples that a loss gets, or takes by itself, as two lists: of triplets, or of positive and negative pairs."""
    rows = range(len(labels))
    same = [[bool(a == b) for b in labels] for a in labels]
    if tuples is not None:
        members = [member.tolist() for member in tuples]
        pairs = zip(*members[:2], strict=True), zip(*members[2:], strict=True)
        return (list(zip(*members, strict=True)), None) if len(members) == 3 else tuple(map(list, pairs))
    positive = [(a, p) for a in rows for p in rows if a != p and same[a][p]]
    negative = [(a, n) for a in rows for n in rows if not same[a][n]]
    if scene.loss == "triplet":
        return [(a, p, n) for a, p in positive for b, n in negative if a == b], None
    return positive, negative


def copies_by_loop(scene, labels, tuples):
    """How many copies an appended plan makes."""
    wanted = ROLES if scene.perturb == "all" else (scene.perturb,) if isinstance(scene.perturb, str) else scene.perturb
    first, second = tuples_by_loop(scene, labels, tuples)
    triplets = second is None
    players = {
        "anchor": [t[0] for t in first] + ([] if triplets else [t[0] for t in second]),
        "positive": [t[1] for t in first],
        "negative": [t[2] for t in first] if triplets else [t[1] for t in second],
    }
    if scene.tuples_per_anchor is None:
        return sum(len(set(players[role])) for role in wanted)
    kept = [
        {a: min(scene.tuples_per_anchor, sum(t[0] == a for t in side)) for a in {t[0] for t in side}}
        for side in (first, second or [])
    ]
    of_first, of_second = (sum(side.values()) for side in kept)
    anchors = of_first if triplets else sum(max(side.get(a, 0) for side in kept) for a in {*kept[0], *kept[1]})
    counts = {"anchor": anchors, "positive": of_first, "negative": of_first if triplets else of_second}
    return sum(counts[role] for role in wanted)


def by_hand(loss, spy, embeddings, labels):
    """The wrapped loss on the clean embeddings and the copies, as the plan addresses them."""
    plan, copies = spy.plan, spy.adversarial.embeddings
    pool, pool_labels = torch.cat([embeddings, copies]), torch.cat([labels, labels[plan.rows]])
    reference = (
        () if plan.ref_pool_indices is None else (pool[plan.ref_pool_indices], pool_labels[plan.ref_pool_indices])
    )
    return loss(pool[plan.pool_indices], pool_labels[plan.pool_indices], plan.indices_tuple, *reference)


def finite_gradients(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return all(grad is None or bool(grad.isfinite().all()) for grad in grads)


def check_unperturbed(scene):
    """With a budget of 0 the value is the wrapped loss's."""
    model, loss, images, labels, tuples = scene.build()
    loss_func = seed_paper_loss(
        copy.deepcopy(loss), model, attack=NO_BUDGET, perturb=scene.perturb, tuples_per_anchor=scene.tuples_per_anchor
    )
    embeddings, error = outcome(lambda: model(images))
    if error is not None:
        return  # the model takes no such batch
    plain, plain_error = outcome(lambda: loss(embeddings, labels, tuples))
    found = Found(model, loss_func.loss, tensors=[images, labels])
    value, error = outcome(lambda: loss_func(embeddings, labels, tuples))
    found.check(enqueued=error is None or plain_error is not None)  # which PML moves before it fails
    assert loss_func.adversary.step == (error is None)
    if error is not None:
        assert acceptable(error, plain_error), error
    elif plain_error is None and scene.tuples_per_anchor is None:
        close(scene, value, plain)


def check_perturbed(scene):
    """Perturbed pixels stay in bounds, the loss is the planned one, and only copies that were asked for are made."""
    model, loss, images, labels, tuples = scene.build()
    spy = Spy()
    loss_func = seed_paper_loss(
        copy.deepcopy(loss),
        model,
        attack=PGD,
        perturb=scene.perturb,
        tuples_per_anchor=scene.tuples_per_anchor,
        plugins=[spy],
        seed=scene.seed,
    )
    embeddings, error = outcome(lambda: model(images))
    if error is not None:
        return
    plain, plain_error = outcome(lambda: copy.deepcopy(loss)(embeddings, labels, tuples))
    found = Found(model, loss_func.loss, tensors=[images, labels])
    value, error = outcome(lambda: loss_func(embeddings, labels, tuples))
    found.check(embedded_anew=True, drew=scene.model == "Dropout", enqueued=error is None or plain_error is not None)
    assert loss_func.adversary.step == (error is None)
    if error is not None:
        assert acceptable(error, plain_error), error
        return
    if spy.plan is None:
        assert loss_func.num_perturbed == 0
        close(scene, value, plain)
        return
    pixels = images.detach().clamp(0, 1)[spy.plan.rows]
    assert spy.adversarial.inputs.dtype == torch.promote_types(images.dtype, torch.float32)  # in which it is attacked
    assert ((spy.adversarial.inputs >= 0) & (spy.adversarial.inputs <= 1)).all()
    assert ((spy.adversarial.inputs - pixels).abs() <= EPS + 2 * scene.rounding).all()
    assert loss_func.num_perturbed == len(spy.plan.rows)
    if len(spy.plan.pool_indices) > len(images) and spy.plan.ref_pool_indices is None:
        assert loss_func.num_perturbed == copies_by_loop(scene, labels, tuples)
    close(scene, value, by_hand(copy.deepcopy(loss), spy, embeddings, labels))
    if scene.dtype in (torch.float32, torch.float64) and plain_error is None and plain.isfinite():
        assert value.isfinite()
        if plain.requires_grad and finite_gradients(model, plain):
            assert finite_gradients(model, value)


def check_miner(scene, name):
    """A miner leaves no trace whatever happens, and its tuples are of the batch."""
    model, _, images, labels, _ = scene.build()
    miner = AdversarialMiner(MINERS[name](), model, attack=PGD, perturb=scene.perturb)
    embeddings, error = outcome(lambda: model(images))
    if error is not None:
        return
    plain, plain_error = outcome(lambda: MINERS[name]()(embeddings, labels))
    found = Found(model, tensors=[images, labels])
    mined, error = outcome(lambda: miner(embeddings, labels))
    found.check()
    assert miner.adversary.step == (error is None)
    if error is not None:
        assert acceptable(error, plain_error), error
        return
    assert len(mined) == len(plain)
    assert all(member.dtype == torch.long and ((member >= 0) & (member < len(images))).all() for member in mined)
    if miner.num_perturbed == 0:
        assert all(map(torch.equal, mined, plain))


@given(scene=scenes)
@example(scene=in_one_dimension)
@quick
def test_unperturbed(scene):
    check_unperturbed(scene)


@given(scene=scenes)
@quick
def test_perturbed(scene):
    check_perturbed(scene)


@given(scene=scenes, name=st.sampled_from(sorted(MINERS)))
@quick
def test_miner(scene, name):
    check_miner(scene, name)


@pytest.mark.slow
@given(scene=scenes, name=st.sampled_from(sorted(MINERS)))
@deep
def test_all_of_it_deeply(scene, name):
    check_unperturbed(scene)
    check_perturbed(scene)
    check_miner(scene, name)


class Injected(Exception):
    """The fault that a test puts in."""


class Faulty(nn.Module):
    """Passes on what it gets, and does something else in its n-th pass."""

    def __init__(self, fault, nth):
        super().__init__()
        self.fault, self.nth, self.passes = fault, nth, count(1)  # a number or a list would be put back with the others

    def forward(self, x):
        return self.fault(x) if next(self.passes) == self.nth else x


def faulty_loss(nth):
    """A loss that raises in its n-th evaluation."""
    evaluations = count(1)

    def fail_in_its_turn(*_):
        if next(evaluations) == nth:
            raise Injected

    loss = losses.ContrastiveLoss()
    loss.register_forward_pre_hook(fail_in_its_turn)
    return loss


def fail(*_):
    raise Injected


def ordinary():
    """A model, a batch and labels; nothing in the model draws or counts."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    model[2].eval()
    return model, torch.rand(8, 1, 2, 2), torch.arange(8) // 2


def wrap(kind, model, name="triplet", **options):
    torch.manual_seed(2)  # of proxies
    if kind == "miner":
        return AdversarialMiner(
            miners.MultiSimilarityMiner(), model, attack=options.pop("attack", PGD), seed=1, **options
        )
    return seed_paper_loss(LOSSES[name](3), model, attack=options.pop("attack", PGD), seed=1, **options)


def equal(one, other):
    if isinstance(one, tuple):
        return all(map(torch.equal, one, other))
    return torch.equal(one, other)


def fails_and_retries(kind, make, model, unbroken_model, images, labels, expected=Injected):
    """One step of ``make(model)`` fails without a trace; a second try gives what the unbroken model's step gives."""
    wrapper, unbroken = make(model), make(unbroken_model)
    embeddings = model(images)
    found = Found(model, *([wrapper.loss] if kind == "loss" else []), tensors=[images, labels])
    value, error = outcome(lambda: wrapper(embeddings, labels))
    found.check()
    if error is None:
        return value
    assert isinstance(error, expected), error
    assert wrapper.adversary.step == 0
    assert equal(wrapper(model(images), labels), unbroken(unbroken_model(images), labels))
    assert wrapper.adversary.step == 1
    return None


kinds = pytest.mark.parametrize("kind", ["loss", "miner"])


@kinds
@pytest.mark.parametrize("name", ["triplet", "contrastive", "multi-similarity", "proxy anchor"])
@pytest.mark.parametrize("options", [{}, {"perturb": "all"}, {"perturb": ("anchor", "negative")}], ids=str)
def test_a_model_that_raises_in_any_pass(kind, name, options):
    for nth in range(2, 20):
        model, images, labels = ordinary()
        broken = nn.Sequential(model, Faulty(fail, nth))
        make = partial(wrap, kind, name=name, **options)
        if fails_and_retries(kind, make, broken, model, images, labels) is not None:
            break
    assert nth == 2 + 2 + STEPS + 1  # the two passes of the check, the attack's passes, and the re-embedding


@kinds
@pytest.mark.parametrize("where", ["all", "one row"])
def test_a_model_that_gives_nan_in_any_pass(kind, where):
    rows = slice(None) if where == "all" else slice(1)

    def spoiled(x):
        return torch.cat([x[rows] * torch.nan, x[rows.stop :]]) if rows.stop else x * torch.nan

    check, last = (2, 3), 4 + STEPS  # the first pass is the loop's own, the last one the re-embedding
    for nth in range(2, last + 2):
        model, images, labels = ordinary()
        broken = nn.Sequential(model, Faulty(spoiled, nth))
        make = partial(wrap, kind)
        expected = ReplayError if nth in check else AttackError
        value = fails_and_retries(kind, make, broken, model, images, labels, expected)
        assert value is None or nth not in check
        if nth > last:
            assert value is not None  # no pass was spoiled
        if value is not None and kind == "loss" and nth != last:
            assert value.isfinite()  # sign(NaN) is 0: the attack has merely lost a step


ATTACKS = {
    "raises": (fail, Injected),
    "returns nothing": (lambda x: None, AdversarialError),
    "returns NaN": (lambda x: x * torch.nan, AdversarialError),
    "returns NaN in one row": (lambda x: torch.cat([x[:1] * torch.nan, x[1:]]), AdversarialError),
    "drops a row": (lambda x: x[1:], AdversarialError),
    "flattens": (lambda x: x.flatten(), AdversarialError),
    "leaves the range": (lambda x: x + 1, AdversarialError),
    "returns bytes": (lambda x: (x * 255).byte(), AdversarialError),
    "returns complex numbers": (lambda x: x * 1j, AdversarialError),
    "changes nothing": (lambda x: x, AdversarialError),
}


@kinds
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("halfway", [False, True])
def test_attacks_that_break_their_contract(kind, name, halfway):
    fault, expected = ATTACKS[name]
    calls = []

    def once(objective):
        pgd = PGD(objective)

        def attack(inputs, labels):
            calls.append(inputs)
            if len(calls) > 1:
                return pgd(inputs, labels)
            if halfway:
                inputs.requires_grad_()
                torch.autograd.grad(objective(inputs).sum(), inputs)
            return fault(inputs.detach())

        return attack

    model, images, labels = ordinary()
    twin = copy.deepcopy(model)

    def make(of):
        return wrap(kind, of, attack=once if of is model else PGD)

    assert fails_and_retries(kind, make, model, twin, images, labels, expected) is None


def train_mode(objective, inputs):
    objective.train()
    for module in objective.modules():
        module.train()
    objective(inputs)


def parameters_backward(objective, inputs):
    for parameter in objective.parameters():
        parameter.requires_grad_(True)
    objective(inputs).sum().backward()


def reseed(objective, inputs):
    torch.manual_seed(0)
    numpy.random.seed(0)  # noqa: NPY002
    random.seed(0)


RUDE = {
    "changes its inputs": lambda objective, inputs: inputs.mul_(0.99),
    "sets train mode": train_mode,
    "thaws parameters": lambda objective, inputs: objective.requires_grad_(True),
    "calls backward into parameters": parameters_backward,
    "reseeds": reseed,
    "switches gradients off": lambda objective, inputs: torch.set_grad_enabled(False),
    "replaces buffers": lambda objective, inputs: [
        setattr(m, "running_mean", m.running_mean + 1) for m in objective.modules() if hasattr(m, "running_mean")
    ],
}


@kinds
@pytest.mark.parametrize("name", RUDE)
@pytest.mark.parametrize("then_raises", [False, True])
def test_rude_attacks_leave_no_trace(kind, name, then_raises):
    def rude(objective):
        def attack(inputs, labels):
            RUDE[name](objective, inputs)
            return fail() if then_raises else (inputs * 0.9).detach()

        return attack

    model, images, labels = ordinary()
    model[2].train()  # so that train mode shows
    model[4].weight.requires_grad_(False)
    wrapper = wrap(kind, model, attack=rude)
    embeddings = model(images)
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = Found(model, tensors=[images, labels])
    value, error = outcome(lambda: wrapper(embeddings, labels))
    found.check(embedded_anew=kind == "loss" and not then_raises)
    assert isinstance(error, Injected) if then_raises else error is None
    if kind == "loss" and value is not None:
        torch.autograd.grad(value, trainable)  # the graph is whole


HOOKS = ["plan", "score", "attack", "training_loss", "record"]


@kinds
@pytest.mark.parametrize("question", HOOKS)
def test_hooks_that_raise_whenever_they_are_asked(kind, question):
    nothing = hookimpl(lambda self: {})  # a miner refuses a plugin that it would never ask
    for nth in range(1, 9):
        asked = []

        def answer(self, asked=asked, nth=nth):
            asked.append(question)
            if len(asked) == nth:
                raise Injected

        answers = {"pml_adversarial_record": nothing, f"pml_adversarial_{question}": hookimpl(answer)}
        plugin = type("Raises", (), {**answers, "has_opinions": False})
        model, images, labels = ordinary()
        twin = copy.deepcopy(model)

        def make(of, plugin=plugin, model=model):
            return wrap(kind, of, plugins=[plugin] if of is model else [])

        if fails_and_retries(kind, make, model, twin, images, labels) is not None:
            break
    assert len(asked) == nth - 1  # it raised each time that it was asked
    assert (len(asked) > 0) == (kind == "loss" or question != "training_loss")


@kinds
def test_a_score_that_raises_when_the_mode_has_it_asked_again(kind):
    asked = []

    class Raises:
        @hookimpl
        def pml_adversarial_score(self):
            asked.append("score")
            if len(asked) == 2:
                raise Injected

    model, images, labels = ordinary()
    model[2].train()  # its statistics are those of the batch, and another context is seen in an attack
    wrapper = wrap(kind, model, plugins=[Raises])
    embeddings = model(images)
    found = Found(model, tensors=[images, labels])
    _, error = outcome(lambda: wrapper(embeddings, labels))
    assert isinstance(error, Injected)
    found.check(embedded_anew=kind == "loss")
    assert wrapper.adversary.step == 0
    assert outcome(lambda: wrapper(model(images), labels))[1] is None


@pytest.mark.parametrize("options", [{}, {"perturb": "all"}, {"clean_weight": 0.5}, {"tuples_per_anchor": 1}], ids=str)
def test_a_loss_that_raises_in_any_evaluation(options):
    expected_evaluations = 5 if "clean_weight" in options else 3  # refused?, before the attack, and to be minimised
    for nth in range(1, 9):
        model, images, labels = ordinary()
        unbroken = seed_paper_loss(losses.ContrastiveLoss(), model, attack=PGD, seed=1, **options)
        loss_func = seed_paper_loss(faulty_loss(nth), model, attack=PGD, seed=1, **options)
        embeddings = model(images)
        found = Found(model, loss_func.loss, tensors=[images, labels])
        _, error = outcome(partial(loss_func, embeddings, labels))
        found.check()
        if error is None:
            break
        assert isinstance(error, Injected)
        assert loss_func.adversary.step == 0
        embeddings = model(images)
        assert torch.equal(loss_func(embeddings, labels), unbroken(embeddings, labels))
    assert nth == expected_evaluations + 1
