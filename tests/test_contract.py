"""One contract for every loss and miner of pytorch-metric-learning, in every way in which PML lets them be called."""

import copy
import dataclasses
import random
import re
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
import torchattacks
from contract import (
    EPS,
    LOSSES,
    MINERS,
    ROLES,
    WRAPPERS,
    CallSignature,
    Scene,
    Spy,
    accepted,
    outcome,
    seed,
    situations,
    table,
)
from notes import Notes
from pytorch_metric_learning import losses
from torch import nn

from pml_adversarial import AdversarialLoss, AdversarialMiner, InputError, PlanError
from pml_adversarial.training.objectives import ViolationScore, distance_of

PAGE = (Path(__file__).parent.parent / "docs" / "losses.md").read_text(encoding="utf-8")
NAMES = [*LOSSES, *WRAPPERS]


def place(name, situation):
    """A number by which losses and miners are dealt out to one another."""
    return NAMES.index(name) + [*MINERS].index(situation.miner)


def is_sampled(name, situation):
    """Whether a case is in the sample: each loss in each kind of call without a miner, and with one miner in 24."""
    return situation.miner == "none" or place(name, situation) % 24 == 12 * situation.reference


def refused_by_pml(name):
    return [situation for situation in situations(name) if situation not in accepted(name)]


def cases(ways=accepted, but=lambda name, situation: False):
    """All calls that PML accepts, or others; those that are not in the sample are slow."""
    return pytest.mark.parametrize(
        ("name", "situation"),
        [
            pytest.param(
                name,
                situation,
                id=f"{name}-{situation}",
                marks=[] if is_sampled(name, situation) else pytest.mark.slow,
            )
            for name in NAMES
            for situation in ways(name)
            if not but(name, situation)
        ],
    )


pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Values of Tp or Tn are too high:UserWarning"
    ),  # RankedListLoss, whatever they are
    pytest.mark.filterwarnings("ignore:DistributedLossWrapper is being used in a non-distributed setting:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning"
    ),  # Histogram
]
every_case = cases()
ROWS = re.findall(r"^\| ([\w ,]+?) \| (.*) \|$", PAGE, re.M)
COUNTS = {name: tuple(map(int, cells.split(" | "))) for name, cells in ROWS if re.fullmatch(r"[\d |]+", cells)}
EXCEPTIONS = {
    name: {*cells.split(" | ")[0].split(", ")} for name, cells in ROWS if cells.split(",")[0].split(" |")[0] in ROLES
}
ONE_LINE = PAGE.replace("\n", " ")
AUTOCAST = [("cpu", torch.bfloat16), *[("cuda", torch.float16)] * torch.cuda.is_available()]
every_loss = pytest.mark.parametrize("name", NAMES)


def a_situation(name):
    """The first way in which PML lets the loss be called."""
    return accepted(name)[0]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-12)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_nothing_was_missed():
    from_here = {name for name in vars(losses) if name.endswith("Loss")} - {"GenericPairLoss", "SelfSupervisedLoss"}
    assert set(LOSSES) == from_here
    assert len(LOSSES) == (35 if hasattr(losses, "SmoothAPLoss") else 34)  # which came with 2.9
    assert len(MINERS) == 1 + 10


class TestIsTheWrappedLoss:
    @every_case
    def test_in_eval_mode(self, name, situation):
        scene = Scene(name, situation)
        loss_func = scene.adversarial("positive").eval()
        loss_func.loss.train()
        assert_same(scene.value(loss_func), scene.plain())

    @every_case
    def test_at_eps_0_for_every_role(self, name, situation):
        scenes = Scene(name, situation), Scene(name, situation, uneven=True)
        for perturb in ROLES:
            plain, loss_func = copy.deepcopy(scenes[0].loss), scenes[0].adversarial(perturb, eps=0.0)
            for scene in scenes:  # what was found out about the loss on one batch holds on the next
                loss_func.watch(scene.model)
                expected = scene.tried(plain)
                if isinstance(expected, Exception):
                    assert scene is scenes[1]  # of sizes that SmoothAP does not take; DynamicSoftMargin keeps a graph
                    continue
                assert_same(scene.value(loss_func), expected)
                assert loss_func.num_perturbed > 0 or situation.miner != "none"

    @every_loss
    def test_pml_refuses_what_is_said_here_and_nothing_else(self, name):
        found = [way for way in situations(name) if not isinstance(Scene(name, way).plain(), Exception)]
        assert found == accepted(name)

    # Without labels, DynamicSoftMarginLoss has a value, and fails in the backward pass.
    @cases(ways=refused_by_pml, but=lambda name, situation: name == "DynamicSoftMarginLoss")
    def test_refuses_what_the_loss_refuses_before_anything_is_spent(self, name, situation):
        scene, passes = Scene(name, situation), Notes()
        loss_func = scene.adversarial("all")
        scene.model.register_forward_pre_hook(
            lambda module, args: passes.append((len(args[0]), torch.is_grad_enabled(), module.training))
        )
        arguments = scene.arguments()
        own = passes.taken()
        # the clean rows, embedded again; then half of them, twice, and before that all where several calls gave them
        check = [(12, False, True)] * len(own) + [(12, True, False)] * (1 if len(own) == 1 else 2 * len(own))
        refusal, found = error_of(copy.deepcopy(scene.loss), arguments), error_of(loss_func, arguments)
        if isinstance(refusal, TypeError):  # it has no such argument, of which the wrapper says more than Python
            assert isinstance(found, InputError | PlanError)
            assert re.search("ref_emb|enqueue_mask", str(found))
        else:
            assert refusal is not None
            assert (type(found), str(found)) == (type(refusal), str(refusal))
        assert own == [(12, True, True)] * (2 if situation.reference else 1)
        assert passes == ([] if isinstance(found, InputError) else check)


def error_of(loss, arguments):
    """The exception that a loss raises, if any."""
    seed(3)
    try:
        loss(*arguments)
    except Exception as error:
        return error
    return None


def score_by_loops(loss, batch, plan, embeddings):
    """For each copy: of the rows that it shares a pair with, the furthest of its label minus the nearest of another."""
    distance, rows = distance_of(loss), [*range(len(batch)), *plan.rows.tolist()]
    reference = plan.pool_indices if plan.ref_pool_indices is None else plan.ref_pool_indices

    def between(left, right):
        apart = distance(left[None], right[None]).item()
        return -apart if distance.is_inverted else apart

    positive, negative = [], []
    if plan.indices_tuple is None:
        anchors = range(batch.num_queries)
        partners = range(len(batch)) if plan.ref_pool_indices is None else range(batch.num_queries, len(batch))
        for a in anchors:
            for p in partners:
                if a != p:
                    (positive if batch.labels[a] == batch.labels[p] else negative).append(
                        (
                            int(plan.pool_indices[a]),
                            int(reference[p] if plan.ref_pool_indices is None else reference[p - batch.num_queries]),
                        )
                    )
    else:
        members = [m.tolist() for m in plan.indices_tuple]
        a, p, *other, n = members
        positive = [(int(plan.pool_indices[i]), int(reference[j])) for i, j in zip(a, p, strict=True)]
        negative = [
            (int(plan.pool_indices[i]), int(reference[j])) for i, j in zip(other[0] if other else a, n, strict=True)
        ]
    scores = []
    for copied in range(len(plan.rows)):
        address = len(batch) + copied
        own, others = (
            {rows[j] for i, j in pairs if i == address} | {rows[i] for i, j in pairs if j == address}
            for pairs in (positive, negative)
        )
        furthest = max((between(embeddings[copied], batch.context[j]) for j in own), default=0)
        nearest = min((between(embeddings[copied], batch.context[j]) for j in others), default=0)
        scores.append(furthest - nearest)
    return torch.tensor(scores, dtype=embeddings.dtype)


class TestFixedContext:
    @every_case
    def test_a_copy_moves_no_other_copys_score_and_all_are_those_of_plain_loops(self, name, situation):
        for perturb in ROLES:
            scene, spy = Scene(name, situation), Spy()
            scene.call(scene.adversarial(perturb, plugins=[spy]))
            if spy.score is None:
                assert situation.miner != "none"  # it found no tuples
                continue
            copies = spy.adversarial.embeddings.detach()
            if isinstance(spy.score, ViolationScore):
                torch.testing.assert_close(spy.score(copies), score_by_loops(scene.loss, spy.batch, spy.plan, copies))
                self.check_alone(spy.score, copies)
            else:
                self.check_own_loss(scene, spy, copies)

    def check_alone(self, score, copies):
        before = score(copies)
        for moved in range(len(copies)):
            changed = copies.clone()
            changed[moved] += 1
            others = torch.arange(len(copies)) != moved
            assert torch.equal(score(changed)[others], before[others])

    def check_own_loss(self, scene, spy, copies):
        """Where rows do not meet: what the loss changes when one copy moves. Without labels all move together."""
        held = dataclasses.replace(spy.batch, embeddings=spy.batch.context)
        clean = held.embeddings[spy.plan.rows]

        def value(embeddings):
            seed(6)
            return spy.plan.evaluate(copy.deepcopy(scene.loss), held, embeddings)

        def score(embeddings):
            seed(6)
            return spy.score(embeddings)

        if spy.batch.labels is None:
            assert score(copies) == value(copies)
            return
        one = torch.eye(len(clean)).bool()
        alone = torch.stack([value(torch.where(one[m][:, None], copies, clean)) for m in range(len(clean))]) - value(
            clean
        )
        change = score(copies) - score(clean)
        if change.ndim:
            torch.testing.assert_close(change, len(held) * alone)  # the loss is their mean
            self.check_alone(spy.score, copies)
        else:
            torch.testing.assert_close(change, alone.sum())


class TestAttack:
    """What rose, and the exceptions, are listed in docs/losses.md."""

    @cases(but=lambda name, situation: not is_sampled(name, situation))
    def test_raises_the_loss_or_its_score(self, name, situation):
        role = ROLES[place(name, situation) % len(ROLES)]
        perturbed, *rose = outcome(name, situation, role)
        assert any(rose) or not perturbed or role in EXCEPTIONS.get(name, ()), role

    @every_loss
    @pytest.mark.slow
    def test_raises_the_loss_or_its_score_in_all_but_the_listed_exceptions(self, name):
        tried = [(role, *outcome(name, situation, role)) for situation in accepted(name) for role in ROLES]
        found = [(role, *rose) for role, perturbed, *rose in tried if perturbed]
        assert {role for role, loss, score in found if not (loss or score)} == EXCEPTIONS.get(name, set())
        counts = len(found), sum(loss for _, loss, _ in found), sum(score for _, _, score in found)
        assert COUNTS[name] == pytest.approx(counts, abs=2)  # other versions of torch round otherwise

    def test_exceptions_are_fewer_than_one_in_a_hundred(self):
        attacked, loss, score = (sum(column) for column in zip(*COUNTS.values(), strict=True))
        in_words = re.search(
            r"A row was perturbed in (\d+) combinations. In (\d+) of them the loss itself rose, in (\d+) the score of "
            r"every copy rose, and in (\d+) neither",
            ONE_LINE,
        )
        *counts, neither = (int(number) for number in in_words.groups())
        assert counts == [attacked, loss, score]
        assert neither < 0.01 * attacked
        assert neither >= len(EXCEPTIONS)


class TestKeepsClean:
    # PML looks for members of the reference among the queries, of which there may be fewer.
    @cases(but=lambda name, situation: name == "ThresholdConsistentMarginLoss" and situation.reference)
    def test_and_trains_on_the_copies_as_well(self, name, situation):
        scene = Scene(name, situation)
        found = []
        for shift in (0.1, -0.1):
            attack = partial(_moved, shift=shift)
            loss_func = AdversarialLoss(copy.deepcopy(scene.loss), scene.model, attack=attack, seed=0)
            found.append(scene.call(loss_func).item())
        assert found[0] != found[1] or not loss_func.num_perturbed


def _moved(objective, shift):
    return lambda inputs, labels: (inputs + shift).clamp(0, 1)


class Moody(nn.Sequential):
    """With frozen BatchNorm, Dropout in train mode, and a layer that takes no gradient."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 4)
        )
        self[1].eval()
        self[0].requires_grad_(False)


def state_of(module):
    """All of a module that could be left changed, identities and gradients included."""
    return [
        [(name, child.training) for name, child in module.named_modules()],
        [(name, id(buffer), buffer.clone()) for name, buffer in module.named_buffers()],
        [
            (name, id(p), p.requires_grad, p.detach().clone(), None if p.grad is None else p.grad.clone())
            for name, p in module.named_parameters()
        ],
    ]


def random_states():
    return [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()]  # noqa: NPY002


def assert_equal(left, right):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_equal(a, b)
    else:
        assert left == right


class TestLeavesNoTrace:
    @every_loss
    @pytest.mark.parametrize("perturb", ["positive", "all"])
    def test_in_the_model(self, name, perturb):
        scene = Scene(name, a_situation(name), model=Moody())
        loss_func = scene.adversarial(perturb)
        scene.call(loss_func).backward()  # so that there are gradients to be lost
        arguments = scene.arguments()
        before = state_of(scene.model)
        loss_func(*arguments)
        assert_equal(state_of(scene.model), before)
        assert loss_func.num_perturbed > 0

    @every_loss
    def test_in_the_loss_which_is_as_after_one_plain_call(self, name):
        scene = Scene(name, a_situation(name))
        plain, loss_func = copy.deepcopy(scene.loss), scene.adversarial("all")
        arguments = scene.arguments()
        seed(5)
        plain(*arguments)
        drawn = random_states()
        seed(5)
        loss_func(*arguments)
        assert_equal(random_states(), drawn)
        for found, expected in zip(loss_func.loss.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)  # P2SGrad normalises its own each time
        assert [m.training for m in loss_func.loss.modules()] == [m.training for m in plain.modules()]
        for name, value in vars(plain).items():
            if isinstance(value, int | float | str | bool):  # the place in a queue, for one
                assert getattr(loss_func.loss, name) == value

    @every_loss
    def test_in_eval_mode(self, name):
        scene = Scene(name, a_situation(name), model=Moody())
        scene.model.eval()
        loss_func = scene.adversarial("all").eval()
        arguments = scene.arguments()
        before = state_of(scene.model)
        loss_func(*arguments)
        assert_equal(state_of(scene.model), before)

    @every_loss
    def test_parameters_of_the_loss_reach_the_optimizer_and_are_not_moved_by_an_attack(self, name):
        scene = Scene(name, a_situation(name))
        loss_func = scene.adversarial("all")
        mine, inner = list(loss_func.parameters()), list(loss_func.loss.parameters())
        assert [id(p) for p in mine] == [id(p) for p in inner]
        if not mine:
            return
        scene.call(loss_func)
        before = [p.detach().clone() for p in mine]
        optimizer = torch.optim.SGD(loss_func.parameters(), lr=0.1)
        value = scene.call(loss_func)
        for parameter, old in zip(mine, before, strict=True):
            torch.testing.assert_close(parameter, old, rtol=1e-12, atol=1e-14)  # P2SGrad normalises its own each time
        value.backward()
        optimizer.step()
        assert any(not torch.equal(p, old) for p, old in zip(mine, before, strict=True))


class TestPrecision:
    @every_loss
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_of_the_model(self, name, dtype):
        scene = Scene(name, a_situation(name), dtype=dtype)
        loss_func = scene.adversarial("all")
        value, gradients = scene.value(loss_func)
        assert value.dtype == scene.plain()[0].dtype
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert loss_func.perturbation_linf == pytest.approx(EPS, abs=1e-6)
        assert loss_func.share_score_rose > 0.9 or name == "ManifoldLoss"  # which draws its targets at each evaluation

    @every_loss
    @pytest.mark.parametrize(("device", "dtype"), AUTOCAST)
    def test_autocast(self, name, device, dtype):
        scene = Scene(name, a_situation(name), dtype=torch.float32)
        scene.model.to(device)
        scene.images, scene.ref_images = scene.images.to(device), scene.ref_images.to(device)
        scene.loss.to(device)
        with torch.autocast(device, dtype):
            plain = scene.plain()
            if isinstance(plain, Exception):
                assert type(scene.tried(scene.adversarial("all"))) is type(plain)
                return
            still = scene.value(scene.adversarial("all", eps=0.0))
            loss_func = scene.adversarial("all")
            value, gradients = scene.value(loss_func)
        torch.testing.assert_close(still, plain, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert value.isfinite()
        assert loss_func.perturbation_linf == pytest.approx(EPS, abs=1e-6)
        assert loss_func.share_score_rose > 0.8 or name == "ManifoldLoss"  # bfloat16 has three digits
        if all(gradient.isfinite().all() for gradient in plain[1].values()):  # TupletMargin's are not
            assert all(gradient.isfinite().all() for gradient in gradients.values())


class TestMiners:
    @pytest.mark.parametrize("reference", [False, True], ids=["batch", "reference"])
    @pytest.mark.parametrize("name", [name for name in MINERS if name != "none"])
    @pytest.mark.parametrize("perturb", ROLES)
    def test_every_miner(self, name, perturb, reference):
        scene = Scene("ContrastiveLoss", CallSignature(reference=reference))
        if name == "EmbeddingsAlreadyPackagedAsTriplets":
            scene = Scene("ContrastiveLoss", CallSignature(name))

        def mined(miner):
            embeddings, labels, _, *given = scene.arguments()
            seed(2)
            return miner(embeddings, labels, *given)

        expected = mined(MINERS[name]())
        attack = partial(torchattacks.PGD, eps=EPS, alpha=0.02, steps=10)
        still = AdversarialMiner(MINERS[name](), scene.model, attack=partial(attack, eps=0.0), perturb=perturb)
        miner = AdversarialMiner(MINERS[name](), scene.model, attack=attack, perturb=perturb)
        assert_equal(mined(still), expected)
        assert_equal(mined(miner.eval()), expected)
        before = state_of(scene.model)
        found = mined(miner.train())
        assert len(found) == len(expected)
        assert miner.num_perturbed > 0
        assert miner.share_score_rose == 1
        assert_equal(state_of(scene.model), before)


@pytest.mark.slow
def test_the_table_in_the_docs_is_the_one_that_is_generated():
    documented = dict(reversed(ROWS))  # the first table counts
    for name, row in table().items():
        assert f"{name} | {documented[name]}" == row
    if hasattr(losses, "SmoothAPLoss"):
        assert set(NAMES) <= set(documented)
