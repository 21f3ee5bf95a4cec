"""AdversarialLoss against plain loops, hand-written attacks and hand-built batches; nothing here reuses its code."""

import copy
import gc
import pickle
import random
from functools import partial
from itertools import count
from typing import ClassVar

import numpy
import pytest
import torch
import torchattacks
from notes import Notes
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from seed_paper import seed_paper_loss
from torch import nn
from torch.nn.functional import normalize

from pml_adversarial import (
    AdversarialLoss,
    AdversarialMiner,
    AttackError,
    CaptureError,
    FixedContext,
    InputError,
    PlanError,
    PluginError,
    ReplayError,
    hookimpl,
)
from pml_adversarial.attacks import adapter
from pml_adversarial.defenses import FreeAT

EPS, ALPHA, STEPS = 0.05, 0.02, 3
PGD = partial(torchattacks.PGD, eps=EPS, alpha=ALPHA, steps=STEPS)
STILL = partial(PGD, random_start=False)
NO_BUDGET = partial(PGD, eps=0.0)
SEVERAL_ROLES = [("positive", "negative"), ("anchor", "positive"), ("anchor", "positive", "negative")]
LOSSES = {
    "triplet": partial(losses.TripletMarginLoss, margin=0.2),
    "triplet with swap": partial(losses.TripletMarginLoss, swap=True),
    "triplet, cosine": lambda: losses.TripletMarginLoss(distance=CosineSimilarity()),
    "contrastive": losses.ContrastiveLoss,
    "multi-similarity": losses.MultiSimilarityLoss,
    "lifted structure": losses.LiftedStructureLoss,
    "n-pairs": losses.NPairsLoss,
    "NT-Xent": losses.NTXentLoss,
    "proxy anchor": lambda: losses.ProxyAnchorLoss(4, 4),
    "cross-batch memory": lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 64),
    "ArcFace": lambda: losses.ArcFaceLoss(4, 4),
}
if hasattr(losses, "SmoothAPLoss"):  # since 2.9
    LOSSES["SmoothAP"] = losses.SmoothAPLoss


class Spy:
    """Keeps what the last step did."""

    @hookimpl
    def pml_adversarial_record(self, batch, plan, adversarial):
        self.batch, self.plan, self.adversarial = batch, plan, adversarial


class Grab(Spy):
    """Keeps the score as well."""

    @hookimpl(wrapper=True)
    def pml_adversarial_score(self, batch, plan):
        self.score = yield
        return self.score


def counting(model):
    """Rows, gradient and mode of every forward pass."""
    passes = Notes()
    model.register_forward_pre_hook(
        lambda module, args: passes.append((len(args[0]), torch.is_grad_enabled(), module.training))
    )
    return passes


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def tuples_of(kind, labels, embeddings):
    return None if kind == "none" else getattr(miners, kind)()(embeddings, labels)


class TestIsTheWrappedLoss:
    @pytest.mark.parametrize("perturb", SEVERAL_ROLES, ids=str)
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("kind", ["none", "BatchHardMiner", "MultiSimilarityMiner"])
    def test_with_its_gradients_when_eps_is_0(self, name, kind, perturb, model, images, labels):
        wrapped = LOSSES[name]()
        embeddings = model(images)
        mined = tuples_of(kind, labels, embeddings)
        plain = copy.deepcopy(wrapped)(embeddings, labels, mined)
        expected = gradients(model, plain)
        loss = seed_paper_loss(wrapped, model, attack=NO_BUDGET, perturb=perturb)(model(images), labels, mined)
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradients(model, loss), expected, rtol=1e-4, atol=1e-6)

    def test_with_batchnorm_and_dropout_when_eps_is_0(self, moody_model, images, labels):
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), moody_model, attack=NO_BUDGET)
        embeddings = moody_model(images)
        assert torch.equal(loss_func(embeddings, labels), losses.TripletMarginLoss()(embeddings, labels))

    def test_on_the_tuples_that_it_keeps(self, model, images, labels):
        spy = Spy()
        loss_func = seed_paper_loss(
            losses.ContrastiveLoss(), model, attack=NO_BUDGET, tuples_per_anchor=1, plugins=[spy]
        )
        embeddings = model(images)
        loss = loss_func(embeddings, labels, triplets := miners.TripletMarginMiner(margin=2)(embeddings, labels))
        assert len(triplets[0]) > 8
        kept = [torch.cat([torch.arange(8), spy.plan.rows])[member] for member in spy.plan.indices_tuple]
        assert sorted(kept[0].tolist()) == list(range(8))
        assert {*zip(*(m.tolist() for m in kept), strict=True)} <= {*zip(*(m.tolist() for m in triplets), strict=True)}
        torch.testing.assert_close(loss, losses.ContrastiveLoss()(embeddings, labels, tuple(kept)))

    @pytest.mark.parametrize("shared", [True, False], ids=["shared labels", "own labels"])
    @pytest.mark.parametrize("perturb", ["positive", "all"])
    @pytest.mark.parametrize("name", ["multi-similarity", "contrastive"])
    def test_with_itself_as_reference_when_eps_is_0(self, name, perturb, shared, model, images, labels):
        wrapped = LOSSES[name]()
        loss_func = seed_paper_loss(wrapped, model, attack=NO_BUDGET, perturb=perturb)
        embeddings, ref_labels = model(images), labels if shared else labels.clone()
        loss = loss_func(embeddings, labels, ref_emb=embeddings, ref_labels=ref_labels)
        plain = wrapped(embeddings, labels, ref_emb=embeddings, ref_labels=ref_labels)
        torch.testing.assert_close(loss, plain)

    @pytest.mark.parametrize("shared", [True, False], ids=["shared labels", "own labels"])
    @pytest.mark.parametrize("perturb", ["anchor", "positive", "negative", "all"])
    @pytest.mark.parametrize("name", ["multi-similarity", "triplet", "contrastive", "NT-Xent", "lifted structure"])
    def test_with_a_reference_of_the_same_model_when_eps_is_0(self, name, perturb, shared, model, images, labels):
        wrapped = LOSSES[name]()
        loss_func = seed_paper_loss(wrapped, model, attack=NO_BUDGET, perturb=perturb)
        embeddings, reference = model(images), model(images.flip(3))
        ref_labels = labels if shared else labels.clone()  # PML leaves pairs (i, i) out where both are one tensor
        loss = loss_func(embeddings, labels, ref_emb=reference, ref_labels=ref_labels)
        torch.testing.assert_close(loss, wrapped(embeddings, labels, ref_emb=reference, ref_labels=ref_labels))
        assert loss_func.num_perturbed > 0


def score_by_loop(embedding, partners, context):
    """Furthest partner of the row's own label minus nearest of the others; distances of unit-norm embeddings."""
    distances = {j: (normalize(embedding, dim=0) - normalize(context[j], dim=0)).norm() for _, j in partners}
    own = [distances[j] for same, j in partners if same]
    other = [distances[j] for same, j in partners if not same]
    return (max(own) if own else 0) - (min(other) if other else 0)


def partners_by_loop(triplets, role, row):
    partners = []
    for a, p, n in zip(*(member.tolist() for member in triplets), strict=True):
        if role == "anchor" and a == row:
            partners += [(True, p), (False, n)]
        if role == "positive" and p == row:
            partners.append((True, a))
        if role == "negative" and n == row:
            partners.append((False, a))
    return partners


class TestFixedContext:
    @pytest.mark.parametrize("role", ["anchor", "positive", "negative"])
    def test_each_member_is_perturbed_as_if_it_were_alone(self, role, model, images, labels):
        spy = Spy()
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=STILL, perturb=role, plugins=[spy])
        embeddings = model(images)
        triplets = miners.TripletMarginMiner(margin=2)(embeddings, labels)
        loss_func(embeddings, labels, triplets)
        context = embeddings.detach()
        member = triplets[["anchor", "positive", "negative"].index(role)]
        assert spy.plan.rows.tolist() == sorted(set(member.tolist()))
        for copied, row in enumerate(spy.plan.rows.tolist()):
            partners = partners_by_loop(triplets, role, row)
            clean = images[row : row + 1]
            moved = clean.clone()
            for _ in range(STEPS):
                moved.requires_grad_()
                (gradient,) = torch.autograd.grad(score_by_loop(model(moved)[0], partners, context), moved)
                moved = moved.detach() + ALPHA * gradient.sign()
                moved = (clean + (moved - clean).clamp(-EPS, EPS)).clamp(0, 1)
            torch.testing.assert_close(spy.adversarial.inputs[copied], moved[0], rtol=0, atol=1e-6)

    def test_moving_one_copy_moves_no_other_score(self, model, images, labels):
        grab = Grab()
        seed_paper_loss(losses.ContrastiveLoss(), model, perturb=("anchor", "positive"), plugins=[grab])(
            model(images), labels
        )
        copies = grab.adversarial.embeddings.detach()
        before = grab.score(copies)
        moved = copies.clone()
        moved[3] += 1
        changed = grab.score(moved) != before
        assert changed.nonzero().tolist() == [[3]]

    @pytest.mark.parametrize("kind", ["TripletMarginMiner", "none"])
    def test_loss_is_that_of_the_copies_in_their_roles(self, kind, model, images, labels):
        spy, margin = Spy(), 0.2
        loss_func = seed_paper_loss(losses.TripletMarginLoss(margin), model, attack=PGD, plugins=[spy])
        embeddings = model(images)
        mined = tuples_of(kind, labels, embeddings)
        loss = loss_func(embeddings, labels, mined)
        copies = dict(zip(spy.plan.rows.tolist(), normalize(model(spy.adversarial.inputs)), strict=True))
        unit = normalize(embeddings)
        everyone = range(8)
        triplets = (
            [
                (a, p, n)
                for a in everyone
                for p in everyone
                for n in everyone
                if a != p and labels[a] == labels[p] and labels[a] != labels[n]
            ]
            if mined is None
            else zip(*(m.tolist() for m in mined), strict=True)
        )
        violations = [
            ((unit[a] - copies[p]).norm() - (unit[a] - unit[n]).norm() + margin).clamp(min=0) for a, p, n in triplets
        ]
        active = [violation for violation in violations if violation > 0]
        torch.testing.assert_close(loss, torch.stack(active).mean(), rtol=1e-5, atol=1e-6)

    def test_gradient_is_that_of_the_re_evaluation_alone(self, model, images, labels):
        spy = Spy()
        triplets = torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4]), torch.tensor([2, 7, 0])
        loss = seed_paper_loss(losses.TripletMarginLoss(2.0), model, attack=PGD, plugins=[spy])(
            model(images), labels, triplets
        )
        found = gradients(model, loss)
        rows = torch.cat([images, spy.adversarial.inputs])  # positives 1, 3, 4 are rows 8, 9, 10
        unit = normalize(model(rows))
        by_hand = torch.stack(
            [
                (unit[a] - unit[p]).norm() - (unit[a] - unit[n]).norm() + 2
                for a, p, n in [(0, 8, 2), (2, 9, 7), (5, 10, 0)]
            ]
        ).mean()
        torch.testing.assert_close(loss, by_hand)
        torch.testing.assert_close(found, gradients(model, by_hand), rtol=1e-4, atol=1e-6)

    def test_every_role_has_its_own_copy(self, model, images, labels):
        spy = Spy()
        triplets = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([2, 2])
        seed_paper_loss(losses.TripletMarginLoss(), model, perturb=("anchor", "positive", "negative"), plugins=[spy])(
            model(images), labels, triplets
        )
        assert [sorted(set(member.tolist())) for member in spy.plan.indices_tuple] == [[0, 1], [0, 1], [2]]
        spied = seed_paper_loss(
            losses.TripletMarginLoss(),
            model,
            perturb=("anchor", "positive"),
            tuples_per_anchor=1,
            plugins=[spy],
        )
        spied(model(images), labels, triplets)
        assert [member.tolist() for member in spy.plan.indices_tuple] == [[8, 9], [10, 11], [2, 2]]
        assert spy.plan.rows.tolist() == [0, 1, 1, 0]


class TestCost:
    AGAIN = (8, False, True)  # the clean rows, embedded again as they were
    CALM = (8, False, False)  # and in eval mode
    ASKED = (8, True, False)  # rows whose inputs get a gradient, in eval mode

    def spent(self, images, labels, *extra, frozen=False, check=(AGAIN, ASKED), **options):
        """The passes of a second step, and how many rows were perturbed. The first step checks the replay before."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), *extra, nn.Tanh(), nn.Linear(16, 4))
        model[2].train(not frozen)
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, **{"attack": PGD, **options})
        passes, of_steps = counting(model), []
        for _ in range(2):
            embeddings = model(images)
            assert passes.taken() == [(8, True, True)]
            loss_func(embeddings, labels)
            of_steps.append(passes.taken())
        first, second = of_steps
        assert first == [*check, *second]
        return second, loss_func.num_perturbed

    @pytest.mark.parametrize("perturb", ["positive", "all", ("anchor", "negative")])
    def test_steps_and_one_passes_on_the_perturbed_rows(self, perturb, images, labels):
        passes, rows = self.spent(images, labels, perturb=perturb)
        assert passes == [(rows, True, False)] * STEPS + [(rows, True, True)]

    @pytest.mark.parametrize("extra", [nn.BatchNorm1d(16), nn.Dropout(0.1)], ids=["BatchNorm", "Dropout"])
    def test_one_more_without_gradient_where_the_mode_matters(self, extra, images, labels):
        check = self.AGAIN, self.CALM, self.ASKED
        passes, rows = self.spent(images, labels, extra, check=check, perturb=("positive", "negative"))
        assert rows == 16
        assert passes == [(8, False, False)] + [(rows, True, False)] * STEPS + [(rows, True, True)]

    def test_none_more_where_batchnorm_is_frozen(self, images, labels):
        passes, _ = self.spent(images, labels, nn.BatchNorm1d(16), frozen=True)
        assert passes == [(8, True, False)] * STEPS + [(8, True, True)]

    def test_nothing_at_eps_0(self, images, labels):
        passes, _ = self.spent(images, labels, attack=NO_BUDGET)
        assert passes == []

    def test_those_of_the_check_in_each_hundredth_step(self, images, labels):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=NO_BUDGET)
        passes, spent = counting(model), {}
        for step in range(1, 202):
            embeddings = model(images)
            passes.taken()
            loss_func(embeddings, labels)
            spent[step] = passes.taken()
        checked = {step: found for step, found in spent.items() if found}
        assert checked == {step: [self.AGAIN, self.ASKED] for step in (1, 100, 200)}

    def test_the_check_is_due_again_in_the_first_step_of_each_form(self, images, labels):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=NO_BUDGET)
        passes, spent = counting(model), []
        two_calls = lambda x: torch.cat([model(x[:4]), model(x[4:])])  # noqa: E731
        for form in (model, lambda x: normalize(model(x)), two_calls, model, lambda x: normalize(model(x)), two_calls):
            embeddings = form(images)
            passes.taken()
            loss_func(embeddings, labels)
            spent.append(passes.taken())
        of_two = [(4, False, True)] * 2 + [(4, True, False)] * 4  # all rows as well, since they are not embedded apart
        assert spent == [[self.AGAIN, self.ASKED], [self.AGAIN, self.ASKED], of_two, [], [], []]

    @pytest.mark.parametrize("rows", [8, 7])
    def test_the_check_asks_for_the_gradient_of_half_of_the_inputs_twice(self, rows, images, labels):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=NO_BUDGET)
        passes = Notes()
        model.register_forward_pre_hook(
            lambda module, args: passes.append((args[0], [p.requires_grad for p in module.parameters()]))
        )
        loss_func(model(images[:rows]), labels[:rows])
        (own, _), (again, _), (asked, asks) = passes
        assert torch.equal(own, images[:rows])
        assert torch.equal(again, images[:rows])
        assert not again.requires_grad
        half = [*range(rows - 1, -1, -2)]
        assert torch.equal(asked, images[(half * 2)[:rows]])
        assert asked.requires_grad
        assert asks == [False, False]


def everything_of(*modules):
    state = {}
    for m, module in enumerate(modules):
        for name, child in module.named_modules():
            state[m, name, "training"] = child.training
            for key, value in vars(child).items():
                if isinstance(value, int | float | str | bool):
                    state[m, name, key] = value
        for name, buffer in module.named_buffers():
            state[m, name] = (id(buffer), buffer.clone())
        for name, p in module.named_parameters():
            state[m, name] = (
                p.requires_grad,
                id(p.grad),
                p.detach().clone(),
                None if p.grad is None else p.grad.clone(),
            )
    return state


def rng_states():
    return [torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()]  # noqa: NPY002


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, tuple):
            for a, b in zip(value, right[key], strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key
        else:
            assert value == right[key], key


class Raising:
    def __init__(self, objective):
        self.objective = objective

    def __call__(self, inputs, labels):
        self.objective.train()
        self.objective(inputs.requires_grad_()).sum().backward()
        torch.manual_seed(99)
        raise RuntimeError("halfway")


class TestLeavesNoTrace:
    def prepared(self, moody_model, images, labels):
        moody_model[1].eval()
        moody_model[1].weight.requires_grad_(False)
        wrapped = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 64)
        wrapped(moody_model(images), labels).backward()
        return wrapped

    def test_of_an_attack_that_raises(self, moody_model, images, labels):
        wrapped = self.prepared(moody_model, images, labels)
        loss_func = seed_paper_loss(wrapped, moody_model, attack=Raising, perturb="all")
        embeddings = moody_model(images)
        before, rng = everything_of(moody_model, wrapped), rng_states()
        with pytest.raises(RuntimeError, match="halfway"):
            loss_func(embeddings, labels)
        assert_same(everything_of(moody_model, wrapped), before)
        assert rng_states() == rng
        embeddings.sum().backward()  # the graph still stands

    def test_of_an_attack_in_the_model(self, moody_model, images, labels):
        wrapped = self.prepared(moody_model, images, labels)
        moody_model.eval()
        loss_func = seed_paper_loss(wrapped, moody_model, attack=PGD, perturb="all")
        embeddings = moody_model(images)
        before, rng = everything_of(moody_model), rng_states()
        loss = loss_func(embeddings, labels)
        assert_same(everything_of(moody_model), before)
        assert rng_states() == rng
        loss.backward()

    def test_in_the_queue_of_a_cross_batch_memory(self, model, images, labels):
        wrapped = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 64)
        loss_func = seed_paper_loss(wrapped, model, attack=PGD)
        for step in range(1, 4):
            loss_func(model(images), labels)
            assert wrapped.queue_idx == 8 * step

    def test_in_proxies(self, model, images, labels):
        wrapped = losses.ProxyAnchorLoss(4, 4)
        loss_func = seed_paper_loss(wrapped, model, attack=PGD)
        before = wrapped.proxies.detach().clone()
        loss = loss_func(model(images), labels)
        assert torch.equal(wrapped.proxies, before)
        assert wrapped.proxies.grad is None
        loss.backward()
        assert wrapped.proxies.grad.abs().sum() > 0
        assert [id(p) for p in loss_func.parameters()] == [id(wrapped.proxies)]


class TestRandomStream:
    def noise(self, loss_func, spy, model, images, labels):
        loss_func(model(images), labels)
        return spy.adversarial.inputs - images[spy.plan.rows]

    def test_moves_on_and_repeats(self, model, images, labels):
        def run(seed):
            spy = Spy()
            only_noise = partial(torchattacks.PGD, eps=EPS, alpha=0.0, steps=1)
            loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=only_noise, plugins=[spy], seed=seed)
            return [self.noise(loss_func, spy, model, images, labels) for _ in range(3)]

        first, again, other = run(1), run(1), run(2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[1], first[2])
        assert not torch.equal(first[0], other[0])


class TestCopiesAndStates:
    def test_deepcopy(self, model, images, labels):
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=PGD, seed=3)
        loss_func(model(images), labels)
        copied = copy.deepcopy(loss_func)
        embeddings = model(images)
        assert torch.equal(copied(embeddings, labels), loss_func(embeddings, labels))

    def test_deepcopy_with_the_model(self, model, images, labels):
        pair = copy.deepcopy({"loss": seed_paper_loss(losses.TripletMarginLoss(), model, attack=PGD), "model": model})
        pair["loss"](pair["model"](images), labels).backward()
        assert all(p.grad is not None for p in pair["model"].parameters())
        assert all(p.grad is None for p in model.parameters())

    def test_pickle(self, model, images, labels):
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=PGD, seed=3)
        loss_func(model(images), labels)
        written = pickle.dumps(loss_func)
        assert len(written) < 20_000  # without the model
        embeddings = model(images)
        loaded, another = pickle.loads(written), pickle.loads(written)
        expected = loss_func(embeddings, labels)
        assert torch.equal(loaded(embeddings, labels), expected)  # older than the loaded loss, which is no matter
        assert torch.equal(another(model(images), labels), expected)

    def test_the_model_is_no_submodule(self, model):
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model)
        assert list(loss_func.parameters()) == []
        assert loss_func.loss in list(loss_func.children())


class Fails(nn.Module):
    """Raises once, in its n-th pass."""

    def __init__(self, nth):
        super().__init__()
        self.passes, self.nth = count(1), nth  # a number or a list would be put back after the attack

    def forward(self, x):
        if next(self.passes) == self.nth:
            raise ZeroDivisionError
        return x


class TestAfterAFailedStep:
    LAST = 3 + STEPS + 1  # 1 is the caller's own pass, 2 and 3 are those of the check, the last one is the re-embedding

    def test_no_pass_comes_after_the_last(self, model, images, labels):
        flaky = nn.Sequential(*model, Fails(self.LAST + 1))
        seed_paper_loss(losses.TripletMarginLoss(), flaky, attack=PGD)(flaky(images), labels)
        with pytest.raises(ZeroDivisionError):
            flaky(images)

    @pytest.mark.parametrize("nth", range(2, LAST + 1))
    def test_a_retry_is_the_step(self, nth, model, images, labels):
        flaky = nn.Sequential(*model, Fails(nth))
        loss_func, unbroken = (
            seed_paper_loss(losses.TripletMarginLoss(), m, attack=PGD, seed=1, warmup=1) for m in (flaky, model)
        )
        loss_func.adversary.step = unbroken.adversary.step = 1
        with pytest.raises(ZeroDivisionError):
            loss_func(flaky(images), labels)
        assert loss_func.adversary.step == 1
        assert torch.equal(loss_func(flaky(images), labels), unbroken(model(images), labels))
        assert loss_func.adversary.step == 2

    def test_a_loss_that_fails_does_not_count(self, model, images):
        loss_func = seed_paper_loss(losses.ProxyAnchorLoss(4, 4), model, attack=PGD)
        with pytest.raises(RuntimeError):
            loss_func(model(images), torch.arange(8) // 2 + 10)  # there are four proxies
        assert loss_func.adversary.step == 0


class TestWarmup:
    def test_grows_linearly_from_0(self, model, images, labels):
        noise = partial(torchattacks.PGD, eps=0.08, alpha=0.08, steps=2)
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=noise, warmup=4)
        found = []
        for _ in range(6):
            loss_func(model(images), labels)
            found.append((loss_func.strength, loss_func.perturbation_linf))
        assert [strength for strength, _ in found] == [0, 0.25, 0.5, 0.75, 1, 1]
        assert [linf for _, linf in found] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.08], abs=1e-6)

    def test_does_not_count_in_eval_mode(self, model, images, labels):
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=PGD, warmup=4).eval()
        loss_func(model(images), labels)
        assert loss_func.adversary.step == 0


class TestOptions:
    def test_clean_weight(self, model, images, labels):
        plain = losses.TripletMarginLoss()
        loss_funcs = [seed_paper_loss(plain, model, attack=STILL, clean_weight=weight) for weight in (0, 0.5)]
        embeddings = model(images)
        values = [loss_func(embeddings, labels) for loss_func in loss_funcs]
        torch.testing.assert_close(values[1], values[0] + 0.5 * plain(embeddings, labels))

    def test_normalization_attacks_the_pixels(self, model, images, labels):
        mean, std = [0.4], [0.25]

        class Normalized(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, pixels):
                return self.model((pixels - 0.4) / 0.25)

        spies = Spy(), Spy()
        whole = Normalized()
        on_pixels = seed_paper_loss(losses.TripletMarginLoss(), whole, attack=PGD, plugins=[spies[0]], seed=1)
        on_normalized = seed_paper_loss(
            losses.TripletMarginLoss(), model, attack=PGD, plugins=[spies[1]], seed=1, normalization=(mean, std)
        )
        values = on_pixels(whole(images), labels), on_normalized(model((images - 0.4) / 0.25), labels)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(spies[0].adversarial.inputs, spies[1].adversarial.inputs, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("inside", [True, False])
    def test_autocast(self, inside, dtype, model, images, labels):
        loss_func = seed_paper_loss(losses.MultiSimilarityLoss(), model, attack=PGD)
        with torch.autocast("cpu", dtype=dtype):
            embeddings = model(images)
            assert embeddings.dtype == dtype
            if inside:
                loss = loss_func(embeddings, labels)
        if not inside:
            loss = loss_func(embeddings, labels)
        loss.backward()
        assert loss_func.share_score_rose > 0.5
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_an_attack_is_any_callable(self, model, images, labels):
        def brighter(objective):
            return lambda inputs, _: (inputs + 0.03).clamp(0, 1)

        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=brighter)
        loss_func(model(images), labels)
        assert loss_func.perturbation_linf == pytest.approx(0.03, abs=1e-6)

    def test_a_number_per_row(self, labels):
        model = nn.Sequential(nn.Unflatten(0, (8, 1)), nn.Linear(1, 4))
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=PGD)
        loss_func(model(torch.linspace(0.1, 0.9, 8)), labels).backward()
        assert loss_func.perturbation_l2 <= loss_func.perturbation_linf == pytest.approx(EPS, abs=1e-6)

    def test_model_is_found(self, model, images, labels):
        torch.manual_seed(0)
        trunk, embedder = model[:2], model[2:]
        spy = Spy()
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), attack=PGD, plugins=[spy])
        loss_func(embedder(trunk(images)), labels).backward()
        assert spy.batch.replay.modules == (trunk, embedder)

    def test_two_calls_of_the_model_each_keep_their_inputs(self, model, images, labels):
        spy = Spy()
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, plugins=[spy])
        first, second = model(images), model(images.flip(0))
        loss_func(first, labels)
        assert torch.equal(spy.batch.inputs, images)
        loss_func(second, labels)
        assert torch.equal(spy.batch.inputs, images.flip(0))

    def test_a_reference_without_inputs_lets_anchors_be_perturbed(self, model, images, labels):
        reference = torch.randn(6, 4)
        arguments = {"ref_emb": reference, "ref_labels": torch.tensor([0, 0, 1, 1, 2, 3])}
        seed_paper_loss(losses.MultiSimilarityLoss(), model, perturb="anchor")(model(images), labels, **arguments)
        with pytest.raises(PlanError, match="ref_emb"):
            seed_paper_loss(losses.MultiSimilarityLoss(), model)(model(images), labels, **arguments)

    def test_a_classifier_of_two_classes_is_attacked_by_its_own_value(self, model, images):
        spy = Spy()
        loss_func = seed_paper_loss(losses.ArcFaceLoss(2, 4, scale=4), model, attack=PGD, perturb="all", plugins=[spy])
        for labels in (torch.zeros(8, dtype=torch.long), torch.arange(8) % 2):
            loss_func(model(images), labels)
            assert loss_func.loss_after > loss_func.loss_before
            assert loss_func.share_score_rose == 1
            rows = zip(model(images).detach(), labels, strict=True)
            contributions = torch.stack([loss_func.loss(row[None], label[None]).detach() for row, label in rows])
            torch.testing.assert_close(spy.adversarial.score_before, contributions)

    @pytest.mark.parametrize("make", [lambda: losses.ArcFaceLoss(4, 4), losses.ContrastiveLoss])
    def test_scores_are_exact_in_mixed_precision(self, make, model, images, labels):
        grab = Grab()
        loss_func = seed_paper_loss(make(), model, attack=PGD, plugins=[grab])
        with torch.autocast("cpu", torch.bfloat16):
            loss_func(model(images), labels)
            found = grab.score(grab.adversarial.embeddings)
        exact = grab.score(grab.adversarial.embeddings.float())
        assert found.dtype == torch.float32
        assert torch.equal(found, exact)

    @pytest.mark.skipif(not hasattr(losses, "SmoothAPLoss"), reason="since 2.9")
    def test_a_loss_that_wants_classes_of_one_size_does_not_tell_roles_apart(self, model, images, labels, caplog):
        loss_func = seed_paper_loss(losses.SmoothAPLoss(), model, attack=PGD)
        for _ in range(2):
            loss_func(model(images), labels)
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == 1
        assert "SmoothAPLoss does not take copies of single members" in warnings[0]

    def test_of_a_loss_without_labels_its_own_value_is_raised(self, model, images):
        loss_func = seed_paper_loss(losses.VICRegLoss(), model, attack=PGD)
        loss_func(model(images), ref_emb=model(images.flip(3))).backward()
        assert loss_func.num_perturbed == 16
        assert loss_func.share_score_rose == 1
        assert loss_func.loss_after > loss_func.loss_before

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_a_loss_of_two_views(self, symmetric, model, images):
        wrapped = losses.SelfSupervisedLoss(losses.NTXentLoss(), symmetric=symmetric)
        spy = Spy()
        loss_func = seed_paper_loss(wrapped, model, attack=PGD, perturb="positive", plugins=[spy])
        first, second = model(images), model(images.flip(3))
        loss = loss_func(first, second)
        assert spy.plan.rows.tolist() == [*range(8, 16)]  # the second view
        again = model(spy.adversarial.inputs)
        torch.testing.assert_close(loss, wrapped(first, again))
        assert loss_func.loss_after > loss_func.loss_before
        assert torch.equal(loss_func.eval()(first, ref_emb=second), wrapped(first, second))

    def test_a_loss_of_two_views_takes_no_tuples(self, model, images):
        wrapped = losses.SelfSupervisedLoss(losses.NTXentLoss())
        with pytest.raises(PlanError, match="takes no tuples"):
            seed_paper_loss(wrapped, model, tuples_per_anchor=1)(model(images), model(images.flip(3)))
        for second, found in ((None, "NoneType"), (model(images)[:7], r"\(7, 4\)")):
            with pytest.raises(InputError, match=f"second view is {found}"):
                seed_paper_loss(wrapped, model)(model(images), second)

    def test_a_loss_of_ones_own_may_have_other_names_for_labels(self, model, images, labels):
        class Own(losses.ContrastiveLoss):
            def forward(self, embeddings, targets, indices_tuple=None, ref_emb=None, ref_labels=None):
                return super().forward(embeddings, targets, indices_tuple, ref_emb, ref_labels)

        found, expected = (seed_paper_loss(kind(), model) for kind in (Own, losses.ContrastiveLoss))
        assert found(model(images), labels) == expected(model(images), labels)
        assert found.num_perturbed == len(images)

    def test_clusters_in_place_of_tuples_are_passed_as_labels(self, model, images, labels):
        class Manifold(nn.Module):
            def __init__(self):
                super().__init__()
                self.loss = losses.ManifoldLoss(l=4, K=int(labels.max()) + 1)

            def forward(self, embeddings, labels):
                return self.loss(embeddings, indices_tuple=labels)

        wrapped = Manifold()
        with pytest.raises(
            PlanError, match=r"ManifoldLoss, pass them as labels, to a module whose forward\(embeddings"
        ):
            seed_paper_loss(wrapped.loss, model)(model(images), indices_tuple=labels)
        loss_func = seed_paper_loss(wrapped, model)
        assert loss_func(model(images), labels) != wrapped(model(images), labels)
        assert loss_func.num_perturbed == len(images)


CHANGES = {
    "multiplied": lambda e: 2 * e,
    "each column by its own": lambda e: e * torch.tensor([1.0, 0.5, 2.0, 3.0]),
    "put together again": lambda e: 0.5 * torch.cat([e[:4], e[4:]]),
    "at unit length": normalize,
    "divided by their length": lambda e: e / e.norm(dim=1, keepdim=True),
}


class TestWhatWasDoneToTheEmbeddings:
    """Whatever the loop did to them on their way to the loss is done to the copies too."""

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    @pytest.mark.parametrize("perturb", ["positive", "all"])
    def test_is_done_to_copies(self, change, perturb, model, images, labels):
        def make(watched, *spies):
            wrapped = losses.TripletMarginLoss(2.0, distance=LpDistance(normalize_embeddings=False))  # lengths matter
            return seed_paper_loss(wrapped, watched, attack=PGD, perturb=perturb, seed=1, plugins=spies)

        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                return change(self.model(x))

        whole, spies = Whole(), (Spy(), Spy())
        expected = make(whole, spies[0])(whole(images), labels)
        found = make(model, spies[1])(change(model(images)), labels)
        torch.testing.assert_close(spies[1].adversarial.inputs, spies[0].adversarial.inputs, rtol=0, atol=1e-6)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(model, found), gradients(model, expected), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(spies[1].adversarial.embeddings, change(model(spies[1].adversarial.inputs)))


class TestRowsWithoutInputs:
    """Some rows of a batch came from elsewhere: they are held fixed, wherever they stand."""

    MASKS = (torch.arange(8) >= 4, torch.arange(8) < 4, torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool())
    TWICE = torch.arange(4).repeat(2)

    def step(self, make, embed, images, labels, *, taken=slice(None), **arguments):
        """One step of a loop, in which the rows ``taken`` of ``images`` may be perturbed."""
        spy = Spy()
        loss_func = make(attack=PGD, perturb="anchor", seed=1, plugins=[spy])
        loss_func(embeddings := embed(images), labels, **arguments)
        assert torch.equal(spy.batch.inputs, images[taken])
        assert loss_func.num_perturbed == len(spy.plan) > 0
        assert spy.batch.can_be_perturbed(spy.plan.rows).all()
        torch.testing.assert_close(spy.adversarial.clean_inputs, spy.batch.inputs_of(spy.plan.rows))
        assert (spy.adversarial.inputs != spy.adversarial.clean_inputs).flatten(1).any(1).all()
        return spy, embeddings.detach()

    @pytest.mark.parametrize("mask", MASKS, ids=["keys last", "keys first", "mixed"])
    @pytest.mark.parametrize("form", ["model", "normalised", "two calls"])
    def test_keys_of_a_memory_are_never_perturbed(self, form, mask, model, images):
        forms = {
            "model": model,
            "normalised": lambda x: normalize(model(x)),
            "two calls": lambda x: torch.cat([model(x[:3]), model(x[3:])]),
        }
        memory = losses.CrossBatchMemory(losses.NTXentLoss(), 4, 32)
        make = partial(seed_paper_loss, memory, model)
        labels = torch.zeros(8, dtype=torch.long)
        labels[mask], labels[~mask] = torch.arange(4), torch.arange(4)
        spy, embeddings = self.step(make, forms[form], images, labels, taken=~mask, enqueue_mask=mask)
        assert torch.equal(spy.batch.embeddings[:4], embeddings[~mask])  # queries, then the keys
        assert torch.equal(spy.batch.embeddings[4:], embeddings[mask])
        again = forms[form](spy.adversarial.inputs.repeat(2, 1, 1, 1))[: len(spy.plan)]
        torch.testing.assert_close(spy.adversarial.embeddings, again)

    @pytest.mark.parametrize("keys_first", [True, False])
    def test_keys_of_a_momentum_encoder(self, keys_first, model, images):
        with torch.no_grad():
            keys = copy.deepcopy(model)(images.flip(3))
        memory = losses.CrossBatchMemory(losses.NTXentLoss(), 4, 32)
        make, mask = partial(seed_paper_loss, memory, model), (torch.arange(16) < 8) == keys_first

        def embed(x):
            return torch.cat([keys, model(x)] if keys_first else [model(x), keys])

        spy, _ = self.step(make, embed, images, torch.arange(8).repeat(2), enqueue_mask=mask)
        torch.testing.assert_close(spy.batch.embeddings[8:], keys)
        torch.testing.assert_close(spy.adversarial.embeddings, model(spy.adversarial.inputs))

    @pytest.mark.parametrize("kind", ["plain", "moody"])
    def test_before_others_and_between_them(self, kind, model, moody_model, images, labels):
        watched = moody_model if kind == "moody" else model
        others, place = torch.randn(3, 4), torch.tensor([8, 0, 1, 9, 2, 3, 4, 10, 5, 6, 7])  # rows 0, 3 and 7
        embed = lambda x: torch.cat([watched(x), others])[place]  # noqa: E731
        make = partial(seed_paper_loss, losses.TripletMarginLoss(), watched)
        spy, embeddings = self.step(make, embed, images, torch.cat([labels, torch.tensor([0, 1, 2])])[place])
        own = torch.tensor([1, 2, 4, 5, 6, 8, 9, 10])
        assert torch.equal(spy.batch.known_rows, own)
        assert {*spy.plan.rows.tolist()} <= {*own.tolist()}
        assert torch.equal(spy.batch.embeddings.detach(), embeddings)
        for row, inputs in zip(spy.plan.rows.tolist(), spy.adversarial.clean_inputs, strict=True):
            assert torch.equal(inputs, images[own.tolist().index(row)])
        if kind == "plain":
            torch.testing.assert_close(spy.adversarial.embeddings, model(spy.adversarial.inputs))

    def test_before_others_are_seen_as_they_are_in_eval_mode_too(self, moody_model, images, labels):
        class Seen:
            @hookimpl
            def pml_adversarial_plan(self, batch):
                self.context = batch.context

        others, seen = torch.randn(3, 4), Seen()
        loss_func = seed_paper_loss(
            losses.TripletMarginLoss(), moody_model, attack=PGD, perturb="anchor", plugins=[seen]
        )
        embeddings = torch.cat([others, moody_model(images)])
        expected = copy.deepcopy(moody_model).eval()(images)
        loss_func(embeddings, torch.cat([torch.tensor([0, 1, 2]), labels]))
        assert torch.equal(seen.context[:3], others)
        torch.testing.assert_close(seen.context[3:], expected.detach())


def changing(change):
    return lambda objective: lambda inputs, labels: change(inputs)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x * 255, r"range from .* expected pixels in \[0, 1\]"),
            (lambda x: x - 0.5, "pass normalization"),
            (lambda x: x.masked_fill(x > 0.8, torch.nan), "hold NaN or infinite"),
            (lambda x: x.masked_fill(x > 0.8, torch.inf), "hold NaN or infinite"),
        ],
    )
    def test_inputs(self, change, message, model, images, labels):
        with pytest.raises(InputError, match=message):
            seed_paper_loss(losses.TripletMarginLoss(), model)(model(change(images)), labels)

    def test_one_copy_and_batchnorm_that_takes_statistics_of_rows(self, images, labels):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4))
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model)
        one_triplet = tuple(torch.tensor([row]) for row in (0, 1, 2))
        with pytest.raises(InputError, match="cannot embed a single row: Expected more than 1 value"):
            loss_func(model(images), labels, one_triplet)
        model[2].eval()
        loss_func(model(images), labels, one_triplet)
        assert loss_func.num_perturbed == 1

    def test_integer_images(self, images, labels):
        class TakesBytes(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(36, 4)

            def forward(self, x):
                return self.linear(x.flatten(1).float() / 255)

        model = TakesBytes()
        with pytest.raises(InputError, match=r"uint8 \(8, 1, 6, 6\).*floating point.*images\.float\(\) / 255"):
            seed_paper_loss(losses.TripletMarginLoss(), model)(model((images * 255).byte()), labels)

    def test_embeddings_that_are_no_tensor(self, model, images, labels):
        with pytest.raises(InputError, match="embeddings are list"):
            seed_paper_loss(losses.TripletMarginLoss(), model)(model(images).tolist(), labels)

    @pytest.mark.parametrize(
        ("tuples", "message"),
        [
            (([0], [1], [2]), "list, list, list"),
            ((torch.tensor([0]),) * 2, "indices_tuple is .* as PML's miners return them"),
            ((torch.tensor([0]), torch.tensor([1]), torch.tensor([2, 3])), "of one length"),
            ((torch.tensor([0]), torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([4])), "of two"),
            ((torch.tensor([0.0]),) * 3, "torch.float32"),
            ((torch.tensor([[0]]),) * 3, r"\(1, 1\)"),
            (torch.tensor([0, 1, 2]), "torch.int64"),
            ((torch.tensor([0]), torch.tensor([1]), torch.tensor([8])), "from 0 to 8; expected anchors below 8"),
            ((torch.tensor([-1]), torch.tensor([1]), torch.tensor([2])), "from -1 to 2"),
        ],
    )
    def test_tuples(self, tuples, message, model, images, labels):
        with pytest.raises(PlanError, match=message):
            seed_paper_loss(losses.TripletMarginLoss(), model)(model(images), labels, tuples)

    def test_embeddings_that_were_cut_off_from_their_model(self, model, images, labels):
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model)
        with pytest.raises(CaptureError, match="not known which inputs gave them"):
            loss_func(model(images).detach().requires_grad_(), labels)

    def test_embeddings_of_another_model_than_the_named_one(self, model, images, labels):
        gc.collect()  # what watches any module would have the other model's embeddings known
        other = copy.deepcopy(model)
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model)
        with pytest.raises(CaptureError, match="the model that was named did not"):
            loss_func(other(images), labels)

    def test_embeddings_that_no_module_made(self, model, images, labels):
        weight = torch.rand(36, 4, requires_grad=True)
        with pytest.raises(CaptureError, match="No module ran"):
            seed_paper_loss(losses.TripletMarginLoss(), model)(images.flatten(1) @ weight, labels)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_no_gradient_while_training(self, mode, model, images, labels):
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model)
        with mode(), pytest.raises(InputError, match=r"training mode.*eval"):
            loss_func(model(images), labels)
        with mode():
            embeddings = model(images)
        with pytest.raises(InputError, match="without gradient"):
            loss_func(embeddings, labels)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x[:-1], "expected inputs of the shape"),
            (lambda x: None, "NoneType"),
            (lambda x: x, "changed none"),
            (lambda x: x * torch.nan, "NaN"),
            (lambda x: x + 1, "expected finite values in"),
        ],
    )
    def test_attacks(self, change, message, model, images, labels):
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=changing(change))
        with pytest.raises(AttackError, match=message):
            loss_func(model(images), labels)

    def test_attacks_that_take_rows_one_by_one(self, model, images, labels):
        with pytest.raises(AttackError, match="DeepFool cannot be used in training"):
            seed_paper_loss(losses.TripletMarginLoss(), model, attack=partial(torchattacks.DeepFool, steps=2))

        def one_by_one(objective):
            return lambda inputs, labels: torch.cat([objective(row) for row in inputs.split(1)])

        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=one_by_one)
        with pytest.raises(AttackError, match=r"1 of 8 perturbed rows"):
            loss_func(model(images), labels)

    @pytest.mark.parametrize("perturb", ["anchors", ("positive", "x"), (), "", 3])
    def test_roles(self, perturb, model):
        with pytest.raises(PlanError, match="expected one or several of"):
            AdversarialLoss(losses.TripletMarginLoss(), model, perturb=perturb)

    def test_options(self, model):
        with pytest.raises(PluginError, match="No plugin named 'hmm'"):
            AdversarialLoss(losses.TripletMarginLoss(), model, plugins=["hmm"])
        with pytest.raises(PluginError, match=r"expected a list, such as plugins=\['hmm'\]"):
            AdversarialLoss(losses.TripletMarginLoss(), model, plugins="hmm")
        for number in (0, 1.5, "1"):
            with pytest.raises(PlanError, match=f"tuples_per_anchor={number!r}"):
                AdversarialLoss(losses.TripletMarginLoss(), model, tuples_per_anchor=number)
        for weight in (-1, "1", torch.nan):
            with pytest.raises(InputError, match=f"clean_weight={weight!r}"):
                AdversarialLoss(losses.TripletMarginLoss(), model, clean_weight=weight)
        with pytest.raises(InputError, match="seed='x'"):
            AdversarialLoss(losses.TripletMarginLoss(), model, seed="x")
        with pytest.raises(InputError, match="warmup=-1"):
            AdversarialLoss(losses.TripletMarginLoss(), model, warmup=-1)
        with pytest.raises(AttackError, match="no eps"):
            AdversarialLoss(losses.TripletMarginLoss(), model, attack=torchattacks.CW, warmup=5)
        with pytest.raises(InputError, match="loss is the class TripletMarginLoss; expected an object"):
            AdversarialLoss(losses.TripletMarginLoss, model)
        with pytest.raises(InputError, match="loss is the miner BatchHardMiner; expected a loss"):
            AdversarialLoss(miners.BatchHardMiner(), model)
        with pytest.raises(InputError, match="holds an AdversarialLoss already"):
            AdversarialLoss(losses.MultipleLosses([AdversarialLoss(losses.TripletMarginLoss(), model)]), model)
        mining = AdversarialMiner(miners.BatchHardMiner(), model)
        memory = losses.CrossBatchMemory(losses.TripletMarginLoss(), 4, 64, miner=mining)
        for holder in (losses.MultipleLosses([losses.TripletMarginLoss()], [mining]), memory):
            with pytest.raises(InputError, match=r"holds an AdversarialMiner.*Mine in the loop"):
                AdversarialLoss(holder, model)
        with pytest.raises(CaptureError, match="'trunk'"):
            AdversarialLoss(losses.TripletMarginLoss(), {"net": model})

    @pytest.mark.parametrize("name", ["triplet", "contrastive", "multi-similarity", "NT-Xent"])
    @pytest.mark.parametrize("mined", [True, False])
    def test_a_batch_without_tuples(self, name, mined, model, images):
        nobody = torch.empty(0, dtype=torch.long)
        labels = torch.zeros(8, dtype=torch.long) if mined else torch.zeros(1, dtype=torch.long)
        images = images if mined else images[:1]
        loss_func = seed_paper_loss(LOSSES[name](), model)
        loss_func.num_perturbed = 7
        loss = loss_func(model(images), labels, (nobody,) * 3 if mined else None)
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        assert (loss_func.num_perturbed, loss_func.strength) == (0, 1)

    def test_tuples_that_a_loss_cannot_keep_apart(self, model, images, labels):
        loss_func = seed_paper_loss(losses.MultiSimilarityLoss(), model, perturb="anchor", tuples_per_anchor=2)
        with pytest.raises(PlanError, match="does not keep its value"):
            loss_func(model(images), labels)

    @pytest.mark.parametrize("name", ["PNPLoss", "InstanceLoss", "P2SGradLoss"])
    def test_tuples_of_a_loss_that_takes_none(self, name, model, images, labels):
        arguments = (4, 4) if name == "P2SGradLoss" else ()
        loss_func = seed_paper_loss(getattr(losses, name)(*arguments), model, tuples_per_anchor=1)
        with pytest.raises(PlanError, match=f"{name} takes no tuples"):
            loss_func(model(images), labels)


class TestAddressing:
    """How copies are addressed is a property of the loss, not of the batch that it happened to meet first."""

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("perturb", ["positive", ("anchor", "positive")], ids=str)
    def test_a_first_batch_of_one_tuple_does_not_decide(self, name, perturb, model, images, labels):
        loss_func = seed_paper_loss(LOSSES[name](), model, attack=NO_BUDGET, perturb=perturb)
        one = tuple(torch.tensor([row]) for row in (0, 1, 0, 2))
        mined = tuple(torch.tensor(rows) for rows in ([0, 0, 3], [1, 0, 2], [0, 1], [5, 2]))
        for tuples in (one, mined):
            embeddings = model(images)
            plain = copy.deepcopy(loss_func.loss)(embeddings, labels, tuples)
            torch.testing.assert_close(loss_func(embeddings, labels, tuples), plain)

    def test_a_first_batch_of_one_class_does_not_decide(self, model, images, labels):
        loss_func = seed_paper_loss(losses.LiftedStructureLoss(), model, attack=NO_BUDGET)
        for given in (torch.zeros(8, dtype=torch.long), labels):
            embeddings = model(images)
            plain = losses.LiftedStructureLoss()(embeddings, given)
            torch.testing.assert_close(loss_func(embeddings, given), plain)

    def test_a_batch_in_which_two_plans_have_one_value_by_chance(self, model, images):
        tuples = torch.tensor([1]), torch.tensor([0]), torch.tensor([1])
        wrapped = losses.ArcFaceLoss(4, 4)
        loss_func = seed_paper_loss(wrapped, model, attack=NO_BUDGET, perturb="negative")
        embeddings, labels = model(images[:2]), torch.tensor([0, 1])
        plain = wrapped(embeddings, labels, tuples)
        torch.testing.assert_close(loss_func(embeddings, labels, tuples), plain)

    def test_finding_it_out_moves_no_random_stream(self, model, images, labels):
        def make():
            return seed_paper_loss(losses.NPairsLoss(), model, attack=PGD, perturb="positive", seed=1)

        asked, asks = make(), make()
        asked(model(images), labels)
        asks.load_state_dict(asked.state_dict())
        embeddings = model(images)
        assert torch.equal(asked(embeddings, labels), asks(embeddings, labels))


def message_of(error, call):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


class TestKeywords:
    """Options are set by keyword, on the method, or not at all."""

    def step(self, model, images, labels, **options):
        spy = Spy()
        loss_func = AdversarialLoss(losses.TripletMarginLoss(), model, warmup=0, seed=1, plugins=[spy], **options)
        loss = loss_func(model(images), labels)
        return loss.item(), loss_func, spy

    @pytest.mark.parametrize(
        "options",
        [
            {"perturb": "positive", "eps": 0.02},
            {"perturb": ("anchor", "negative"), "tuples_per_anchor": 1},
            {"keep_clean": False},
            {"clean_weight": 0.5, "steps": 2},
            {"copies": "replace"},
            {"attack": PGD},
        ],
        ids=str,
    )
    def test_on_the_method(self, options, model, images, labels):
        value, loss_func, _ = self.step(model, images, labels, **options)
        found, by_method, _ = self.step(model, images, labels, method=FixedContext(**options))
        assert value == found
        assert repr(loss_func) == repr(by_method)
        plain, _, _ = self.step(model, images, labels)
        assert value != plain or "copies" in options  # all rows are replaced by default

    def test_on_both_is_refused(self, model):
        message = message_of(
            InputError,
            lambda: AdversarialLoss(losses.TripletMarginLoss(), model, method=FixedContext(), eps=0.1, perturb="all"),
        )
        assert "method=FixedContext(...) and eps, perturb were both given" in message
        assert "method=FixedContext(eps=..., perturb=...)" in message
        with pytest.raises(InputError, match=r"method='hm'.*plugins="):
            AdversarialLoss(losses.TripletMarginLoss(), model, method="hm")

    def test_one_method_serves_several_losses(self, model, images, labels):
        method = FixedContext(perturb="positive", eps=0.05)
        shared = [AdversarialLoss(make(), model, method=method, seed=1, warmup=0) for make in LOSSES.values()]
        own = [AdversarialLoss(s.loss, model, perturb="positive", eps=0.05, seed=1, warmup=0) for s in shared]
        embeddings = model(images)
        for one, other in zip(shared[:4], own[:4], strict=True):
            assert torch.equal(one(embeddings, labels), other(embeddings, labels))

    def test_what_is_given_is_known_by_question(self):
        assert FixedContext().given == {}
        options = {"eps": 0.1, "perturb": "all", "keep_clean": True, "clean_weight": 0.0, "tuples_per_anchor": 1}
        assert FixedContext(**options).given == {
            "plan": ("perturb", "tuples_per_anchor", "keep_clean"),
            "attack": ("eps",),
            "training_loss": ("keep_clean", "clean_weight"),
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"plugins": ["hm"], "perturb": "positive"}, "HM answers pml_adversarial_plan itself, so perturb"),
            ({"plugins": [FreeAT], "eps": 0.1}, "FreeAT answers pml_adversarial_attack itself, so eps"),
            ({"plugins": ["trades"], "clean_weight": 0.5}, "TRADES answers pml_adversarial_training_loss itself"),
        ],
    )
    def test_that_a_plugin_ignores_are_refused(self, options, message, model, images, labels):
        loss_func = AdversarialLoss(losses.TripletMarginLoss(), model, warmup=0, **options)
        with pytest.raises(PluginError, match=message):
            loss_func(model(images), labels)


class TestSeedPaper:
    def test_is_the_published_method(self, model, images, labels):
        spies = Spy(), Spy()
        short = AdversarialLoss.seed_paper(losses.TripletMarginLoss(), model, seed=1, plugins=[spies[0]])
        pgd = partial(torchattacks.PGD, eps=0.01, alpha=0.004, steps=5, random_start=True)
        options = {"perturb": "positive", "tuples_per_anchor": 1, "keep_clean": False, "guard": False, "warmup": 0}
        long = AdversarialLoss(losses.TripletMarginLoss(), model, attack=pgd, seed=1, plugins=[spies[1]], **options)
        embeddings = model(images)
        assert torch.equal(short(embeddings, labels), long(embeddings, labels))
        assert torch.equal(spies[0].adversarial.inputs, spies[1].adversarial.inputs)
        assert spies[0].plan.rows.tolist() == spies[1].plan.rows.tolist()
        assert repr(short) == repr(long)

    def test_with_another_budget(self, model, images, labels):
        loss_func = AdversarialLoss.seed_paper(losses.TripletMarginLoss(), model, eps=0.02, steps=4)
        built = adapter.budget(loss_func.adversary.hooks.own.attack)
        assert built == {"eps": 0.02, "alpha": 0.01}  # 2 eps / steps
        loss_func(model(images), labels)
        assert loss_func.records.perturbation_linf == pytest.approx(0.02, abs=1e-6)

    def test_with_other_options(self, model, images, labels):
        loss_func = AdversarialLoss.seed_paper(
            losses.TripletMarginLoss(), model, attack=torchattacks.FGSM, eps=0.03, perturb="negative", warmup=3
        )
        assert "eps=0.03, attack=FGSM, perturb=negative, tuples_per_anchor=1" in repr(loss_func)
        assert loss_func.adversary.schedule.warmup == 3

    def test_of_a_subclass_is_of_the_subclass(self, model):
        class Mine(AdversarialLoss):
            pass

        assert isinstance(Mine.seed_paper(losses.TripletMarginLoss(), model), Mine)


class Reidentifies(nn.Module):
    """Gives in each mode what a test wants of: the features, a score, features behind a neck of the same width."""

    def __init__(self, train, test, before=lambda x: x):
        super().__init__()
        torch.manual_seed(3)
        self.base = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 6)
        )
        self.neck, self.classifier = nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.train_output, self.test_output, self.before = train, test, before

    def forward(self, images):
        features = self.base(self.before(images))
        neck = self.neck(features)
        return (self.train_output if self.training else self.test_output)(features, self.classifier(neck), neck)


class TestOutputsOfEachMode:
    """The attack sees torch's layers in eval mode, and the outputs that the loop sees."""

    CASES: ClassVar = {
        "score first, features alone": (lambda f, s, n: (s, f), lambda f, s, n: f, lambda out: out[1]),
        "other order": (lambda f, s, n: [f, s], lambda f, s, n: [s, f], lambda out: out[0]),
        "the score alone": (lambda f, s, n: (f, s), lambda f, s, n: s, lambda out: out[0]),
        "another tensor of the same width": (lambda f, s, n: (f, s), lambda f, s, n: n, lambda out: out[0]),
        "fewer keys": (lambda f, s, n: {"s": s, "f": f}, lambda f, s, n: {"f": f}, lambda out: out["f"]),
        "other keys": (lambda f, s, n: {"f": f, "s": s}, lambda f, s, n: {"s": n, "f": s}, lambda out: out["f"]),
        "None in its place": (lambda f, s, n: (s, f), lambda f, s, n: (None, f), lambda out: out[1]),
    }

    def value(self, wrapped_model, model, take, images, labels, **given):
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), wrapped_model, attack=partial(STILL, eps=0.1))
        torch.manual_seed(5)
        return loss_func(take(model(images)), labels, **given).item(), loss_func.records.loss_before

    @pytest.mark.parametrize("told", [False, True])
    @pytest.mark.parametrize("case", CASES)
    def test_are_those_of_the_loop(self, case, told, images, labels):
        train, test, take = self.CASES[case]
        features = lambda f, s, n: f  # noqa: E731
        same, model = Reidentifies(features, features), Reidentifies(train, test)
        expected, before = self.value(same, same, lambda out: out, images, labels)
        assert expected > before + 0.01
        if told and case not in ("another tensor of the same width", "other keys"):  # a function tells no difference
            found = self.value(lambda x: take(model(x)), model, take, images, labels, inputs=images)
            assert found[0] > before + 0.01
        else:
            found = self.value(model, model, take, images, labels)
            assert found == pytest.approx((expected, before), rel=1e-5)

    def test_in_a_form_of_the_loop_that_is_new_later(self, images, labels):
        model = Reidentifies(lambda f, s, n: (s, f), lambda f, s, n: f)
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=partial(STILL, eps=0.1))
        for scale in (1, 1, 2, 2, 1):
            e = model(images)[1]
            loss_func(e if scale == 1 else e * scale, labels)
            assert loss_func.num_perturbed > 0
            assert loss_func.records.embedding_shift > 0

    def test_no_module_stays_in_another_mode(self, images, labels):
        model = Reidentifies(lambda f, s, n: (s, f), lambda f, s, n: f)
        model.base[2].eval()
        before = [m.training for m in model.modules()]
        self.value(model, model, lambda out: out[1], images, labels)
        assert [m.training for m in model.modules()] == before

    def test_the_attack_sees_torchs_layers_in_eval_mode(self, images, labels):
        seen = Notes()
        model = Reidentifies(lambda f, s, n: (s, f), lambda f, s, n: f)
        model.base[4].register_forward_hook(lambda m, given, out: seen.append((model.training, m.training)))
        self.value(model, model, lambda out: out[1], images, labels)
        assert seen.count((True, False)) >= STEPS
        assert (False, True) not in seen

    def test_other_outputs_that_no_module_of_ones_own_decides_on_are_refused(self, images, labels):
        class Ends(nn.Module):
            def forward(self, features):
                return (features.sum(1), features) if self.training else features

        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), Ends())
        with pytest.raises(ReplayError, match=r"output, and not as output\[0\], output\[1\]"):
            self.value(model, model, lambda out: out[1], images, labels)
