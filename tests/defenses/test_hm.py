"""Hardness manipulation, against the formulas of its paper in plain loops."""

import copy
import io
import math
from functools import partial

import pytest
import torch
import torchattacks
from one_step import LOSSES
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.reducers import MeanReducer
from seed_paper import seed_paper_loss

from pml_adversarial import AdversarialMiner, Batch, InputError, PlanError, hookimpl
from pml_adversarial.defenses.hm import HM
from pml_adversarial.training.plan import plan_roles, replace_rows

PGD = partial(torchattacks.PGD, eps=0.1, alpha=0.02, steps=10, random_start=False)
MARGIN = 0.2


def euclidean(left, right):
    left, right = left / left.square().sum().sqrt(), right / right.square().sum().sqrt()
    return (left - right).square().sum().sqrt()


def hardness_of(a, p, n):
    return euclidean(a, p) - euclidean(a, n)


def triplet_loss():
    return losses.TripletMarginLoss(margin=MARGIN, reducer=MeanReducer())


def build(model, *plugins, loss=None, attack=PGD, **options):
    return seed_paper_loss(loss or triplet_loss(), model, attack=attack, plugins=plugins, seed=0, **options)


def triplets_of(labels, count=6, seed=0):
    """Random triplets, rows of which play several roles."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    while len(found) < count:
        a, p, n = torch.randint(len(labels), (3,), generator=draw).tolist()
        if a != p and labels[a] == labels[p] != labels[n]:
            found.append((a, p, n))
    return tuple(torch.tensor(m) for m in zip(*found, strict=True))


class Watches:
    """Remembers what other plugins are told, without an opinion."""

    @hookimpl(wrapper=True)
    def pml_adversarial_plan(self):
        self.plan = yield
        return self.plan

    @hookimpl(wrapper=True)
    def pml_adversarial_score(self, batch):
        score = yield
        if not hasattr(self, "score"):
            self.score, self.batch = score, batch
        return score

    @hookimpl
    def pml_adversarial_record(self, adversarial):
        self.adversarial = adversarial


class TestPlanAndLoss:
    def test_each_member_is_a_copy_and_the_loss_is_of_them_alone(self, model, images, labels):
        triplets, watch = triplets_of(labels), Watches()
        loss_func = build(model, watch, HM())
        loss = loss_func(model(images), labels, triplets)
        assert watch.plan.rows.tolist() == torch.cat(triplets).tolist()
        moved = model(watch.adversarial.inputs).reshape(3, 6, -1)
        expected = sum((hardness_of(*moved[:, t]) + MARGIN).clamp(min=0) for t in range(6)) / 6
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        found = torch.autograd.grad(loss, model.parameters())
        for one, other in zip(found, torch.autograd.grad(expected, model.parameters()), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)

    def test_pairs_are_joined(self, model, images, labels):
        pairs = tuple(torch.tensor(m) for m in ([0, 0, 4], [1, 1, 5], [0, 4, 4, 6], [3, 0, 7, 1]))
        watch = Watches()
        build(model, watch, HM())(model(images), labels, pairs)
        joined = {(0, 1, 3), (4, 5, 0), (4, 5, 7)}
        assert {*zip(*watch.plan.rows.reshape(3, -1).tolist(), strict=True)} == joined
        assert len(watch.plan) == 3 * 4  # the pair (0, 1) was given twice

    def test_without_tuples_one_triplet_is_drawn_per_row(self, model, images, labels):
        watch = Watches()
        loss_func = build(model, watch, HM())
        plans = []
        for _ in range(2):
            loss_func(model(images), labels)
            plans.append(watch.plan.rows.reshape(3, -1))
        for anchors, positives, negatives in plans:
            assert anchors.tolist() == list(range(8))
            assert torch.equal(labels[positives], labels)
            assert (positives != anchors).all()
            assert (labels[negatives] != labels).all()
        assert not torch.equal(*plans)

    def test_one_anchor_per_class_as_published(self, model, images, labels):
        watch = Watches()
        build(model, watch, HM(anchors_per_class=1))(model(images), labels)
        assert len(watch.plan) == 3 * 4
        assert labels[watch.plan.rows[:4]].unique().tolist() == [0, 1, 2, 3]

    def test_semihard_source_is_within_the_margin(self, model, images, labels):
        watch, drawn = Watches(), {}
        loss_func = build(model, watch, HM(source="semihard", margin=0.4), attack=partial(torchattacks.PGD, eps=0))
        for _ in range(60):
            loss_func(model(images), labels)
            for a, p, n in zip(*watch.plan.rows.reshape(3, -1).tolist(), strict=True):
                drawn.setdefault(a, set()).add((p, n))
        embedded = model(images)
        d = [[euclidean(embedded[a], embedded[n]).item() for n in range(8)] for a in range(8)]
        beyond_the_default = 0
        for a in range(8):
            others = [n for n in range(8) if labels[n] != labels[a]]
            found = [n for n in others if d[a][a ^ 1] < d[a][n] < d[a][a ^ 1] + 0.4]
            beyond_the_default += sum(d[a][n] > d[a][a ^ 1] + 0.2 for n in found)
            assert drawn[a] == {(a ^ 1, n) for n in found or others}
        assert beyond_the_default

    def test_a_batch_without_triplets_is_a_plain_step(self, model, images):
        labels, hm = torch.zeros(8, dtype=torch.long), HM()
        loss_func = build(model, hm, loss=losses.ContrastiveLoss())
        assert loss_func(model(images), labels) == losses.ContrastiveLoss()(model(images), labels)
        assert loss_func.num_perturbed == 0
        assert hm.last_loss == math.inf

    def test_with_reference(self, model, images, labels):
        watch = Watches()
        loss_func = build(model, watch, HM())
        queries, reference = model(images[:4]), model(images.flip(0))
        loss_func(queries, labels[:4], None, reference, labels.flip(0)).backward()
        anchors, *others = watch.plan.rows.reshape(3, -1)
        assert anchors.tolist() == [0, 1, 2, 3]
        assert all((member >= 4).all() for member in others)

    def test_a_reference_without_inputs_is_refused(self, model, images, labels):
        with pytest.raises(PlanError, match="members in ref_emb"):
            build(model, HM())(model(images), labels, None, torch.rand(8, 4), labels.clone())

    def test_without_labels_and_tuples_is_refused(self, model, images):
        with pytest.raises(PlanError, match="no labels to draw"):
            build(model, HM())(model(images))

    def test_triplets_without_labels(self, model, images, labels):
        build(model, HM())(model(images), None, triplets_of(labels)).backward()
        with pytest.raises(PlanError, match="no labels to draw"):
            build(model, HM(destination="semihard"))(model(images), None, triplets_of(labels))


class TestScore:
    """Asked directly, on a batch by hand."""

    def batch(self, labels, seed=0):
        context = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        return Batch(torch.rand(8, 1), context, context, labels, triplets_of(labels), 8)

    @pytest.mark.parametrize(
        ("last", "margin", "cap", "expected"),
        [
            (None, 0.2, None, -0.2),
            (2.0, 0.2, None, -0.2),
            (0.2, 0.2, None, -0.2),
            (0.05, 0.2, None, -0.05),
            (0.0, 0.2, None, 0.0),
            (0.25, 0.4, 0.5, -0.2),
            (0.05, 0.4, 0.1, -0.2),
            (0.3, 0.4, 0.1, -0.4),
        ],
    )
    def test_gradual(self, labels, last, margin, cap, expected):
        hm, batch = HM(margin=margin, cap=cap), self.batch(labels)
        if last is not None:
            hm.load_state_dict({"last_loss": last})
        plan = hm.pml_adversarial_plan(None, batch)
        copies = torch.randn(18, 4, requires_grad=True)
        found = hm.pml_adversarial_score(batch, plan)(copies)
        a, p, n = copies.reshape(3, 6, 4)
        wanted = []
        for t in range(6):
            lack = min(0.0, hardness_of(a[t], p[t], n[t]).item() - expected)
            wanted.append(-(lack**2))
        assert found.tolist() == pytest.approx(wanted * 3, abs=1e-5)
        assert any(wanted)

    def test_gradient_is_that_of_the_mean_square(self, labels):
        hm, batch = HM(), self.batch(labels)
        hm.load_state_dict({"last_loss": 0.1})
        plan = hm.pml_adversarial_plan(None, batch)
        copies = torch.randn(18, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(hm.pml_adversarial_score(batch, plan)(copies).mean(), copies)
        a, p, n = copies.reshape(3, 6, 4)
        lacks = [hardness_of(a[t], p[t], n[t]) + 0.1 for t in range(6)]
        lacks = [lack for lack in lacks if lack < 0]
        objective = sum(lack.square() for lack in lacks) / 6
        assert 0 < len(lacks) < 6
        (expected,) = torch.autograd.grad(-objective, copies)
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("destination", ["semihard", "softhard"])
    def test_of_a_harder_benign_triplet(self, labels, destination):
        """Copies with H' = -2, as easy as can be, tell the destination: the score is -(2 + H_D) ** 2."""
        hm, batch = HM(destination=destination, margin=0.6), self.batch(labels)
        plan, context = hm.pml_adversarial_plan(None, batch), batch.context
        d = [[euclidean(context[i], context[j]).item() for j in range(8)] for i in range(8)]
        easiest = torch.eye(4)[0] * torch.tensor([1.0, 1.0, -1.0])[:, None]
        asked = [set() for _ in range(6)]
        for _ in range(100):
            score = hm.pml_adversarial_score(batch, plan)(easiest.repeat_interleave(6, 0)).reshape(3, 6)
            assert torch.equal(score, score[:1].expand(3, -1))
            for seen, value in zip(asked, score[0].tolist(), strict=True):
                seen.add(round((-value) ** 0.5 - 2, 3))
        for seen, a, p, _ in zip(asked, *(m.tolist() for m in batch.indices_tuple), strict=True):
            others = [row for row in range(8) if labels[row] != labels[a]]
            if destination == "semihard":
                found = [o for o in others if d[a][p] < d[a][o] < d[a][p] + 0.6]
            else:
                found = [o for o in others if d[a][o] < d[a][p]]
            assert sorted(seen) == pytest.approx(sorted(d[a][p] - d[a][o] for o in found or others), abs=2e-3)

    def test_is_in_single_precision_and_finite_where_all_coincide(self, labels):
        hm, batch = HM(), self.batch(labels)
        plan = hm.pml_adversarial_plan(None, batch)
        copies = torch.ones(18, 4, dtype=torch.bfloat16, requires_grad=True)
        hm.load_state_dict({"last_loss": -1.0})
        found = hm.pml_adversarial_score(batch, plan)(copies)
        assert found.dtype == torch.float32
        found.sum().backward()
        assert copies.grad.isfinite().all()


def mean_hardness(embeddings):
    return torch.stack([hardness_of(*row) for row in embeddings.reshape(3, -1, embeddings.shape[1]).unbind(1)])


class TestAttack:
    def step(self, model, images, labels, hm, **options):
        watch = Watches()
        loss_func = build(model, watch, hm, **options)
        loss_func(model(images), labels, triplets_of(labels))
        before = mean_hardness(model(images)[watch.plan.rows])
        after = mean_hardness(model(watch.adversarial.inputs))
        return loss_func, before, after

    @pytest.mark.parametrize("last", [0.0, 0.1])
    def test_raises_the_hardness_up_to_the_destination(self, model, images, labels, last):
        hm = HM()
        hm.load_state_dict({"last_loss": last})
        loss_func, before, after = self.step(model, images, labels, hm)
        easy = before < -last
        assert 0 < easy.sum() < 6
        assert (after[easy] > before[easy] + 0.01).all()
        assert torch.allclose(after[~easy], before[~easy], atol=1e-5)  # hard enough: left as they were
        assert loss_func.share_score_rose == pytest.approx(easy.float().mean().item())
        assert loss_func.perturbation_linf <= 0.1001

    def test_goes_not_beyond(self, model, images, labels):
        """The steps are too small to leap over the destination by much."""
        fine = partial(torchattacks.PGD, eps=0.1, alpha=0.001, steps=100, random_start=False)
        hm = HM()
        hm.load_state_dict({"last_loss": 0.1})
        _, before, after = self.step(model, images, labels, hm, attack=fine)
        easy = before < -0.1
        reached = after[easy] > -0.11
        assert reached.any()
        assert (after[easy] < -0.07).all()

    def test_where_all_are_hard_enough_nothing_is_perturbed(self, model, images, labels):
        watch = Watches()
        triplets = triplets_of(labels)
        hard = mean_hardness(model(images)[torch.cat(triplets)]) > -0.2
        triplets = tuple(member[hard] for member in triplets)
        loss_func = build(model, watch, HM())  # the first step asks for -0.2
        loss = loss_func(model(images), labels, triplets)
        assert len(watch.plan) == 3 * int(hard.sum()) > 0
        assert loss_func.perturbation_linf == 0
        assert torch.equal(watch.adversarial.inputs, images[torch.cat(triplets)])
        assert loss.item() == pytest.approx(triplet_loss()(model(images), labels, triplets).item(), rel=1e-5)
        loss.backward()

    def test_another_plugins_score_is_raised_all_the_same(self, model, images, labels):
        class FromZero:
            @hookimpl
            def pml_adversarial_score(self, batch, plan):
                origin = batch.context[plan.rows]
                return lambda embeddings: (embeddings - origin)[:, 0]

        loss_func = build(model, FromZero(), HM())
        loss_func(model(images), labels)
        assert loss_func.perturbation_linf == pytest.approx(0.1)
        assert loss_func.share_score_rose == 1

    def test_leaves_no_trace(self, moody_model, images, labels):
        modes = [m.training for m in moody_model.modules()]
        loss_func = build(moody_model, HM("random", "softhard"))
        loss_func(moody_model(images), labels)
        assert [m.training for m in moody_model.modules()] == modes
        assert all(p.grad is None and p.requires_grad for p in moody_model.parameters())
        assert loss_func.perturbation_linf > 0
        assert moody_model[1].num_batches_tracked == 2  # the batch, and the copies
        moody_model.eval()
        embeddings, random_state = moody_model(images), torch.get_rng_state()
        loss_func(embeddings, labels)
        assert torch.equal(torch.get_rng_state(), random_state)


class TestGradualAdversary:
    def test_remembers_the_published_loss_of_the_perturbed_triplets(self, model, images, labels):
        watch, hm = Watches(), HM()
        loss_func = build(model, watch, hm, loss=losses.ContrastiveLoss(), clean_weight=1.0)
        loss_func(model(images), labels)
        expected = (mean_hardness(model(watch.adversarial.inputs)) + MARGIN).clamp(min=0).mean()
        assert float(hm.last_loss) == pytest.approx(expected.item(), rel=1e-4)

    def test_next_step_asks_by_it(self, model, images, labels):
        hm, triplets = HM(), triplets_of(labels)
        loss_func = build(model, hm)
        loss_func(model(images), labels, triplets)
        last = float(hm.last_loss)
        hm.load_state_dict({"last_loss": last})
        watch = Watches()
        second = build(model, watch, hm)
        second(model(images), labels, triplets)
        lack = (mean_hardness(model(images)[watch.plan.rows]) + min(last, 0.2)).clamp(max=0)
        assert watch.score(model(images)[watch.plan.rows])[:6].tolist() == pytest.approx(
            (-lack.square()).tolist(), abs=1e-6
        )

    def test_resumed_run_repeats_an_unbroken_one(self, model, images, labels):
        saved = build(model, HM())
        for _ in range(3):
            saved(model(images), labels)
        file = io.BytesIO()
        torch.save(saved.state_dict(), file)
        file.seek(0)
        loaded = build(model, HM())
        loaded.load_state_dict(torch.load(file, weights_only=True))
        assert loaded.adversary.hooks.plugins[0].last_loss == float(saved.adversary.hooks.plugins[0].last_loss)
        assert loaded(model(images), labels) == saved(model(images), labels)

    def test_copies_of_the_wrapper_remember_apart(self, model, images, labels):
        hm = HM()
        loss_func = build(model, hm)
        loss_func(model(images), labels)
        last, copied = float(hm.last_loss), copy.deepcopy(loss_func)
        copied.adversary.hooks.plugins[0].load_state_dict({"last_loss": 1.5})
        assert float(hm.last_loss) == last

    def test_a_fresh_state_loads(self):
        hm = HM()
        hm.load_state_dict(HM().state_dict())
        assert hm.last_loss == math.inf


@pytest.mark.parametrize("destination", ["lga", "semihard", "softhard"])
@pytest.mark.parametrize("name", LOSSES)
def test_trains_what_is_wrapped(model, images, labels, name, destination):
    hm = HM(destination=destination)
    hm.load_state_dict({"last_loss": 0.0})
    loss_func = build(model, hm, loss=LOSSES[name]())
    value = loss_func(model(images), labels, miners.BatchHardMiner()(model(images), labels))
    value.backward()
    assert loss_func.num_perturbed == 24
    assert any(p.grad.abs().sum() > 0 for p in model.parameters())


def test_hardness_falls_when_it_trains(model, images, labels):
    loss_func = build(model, HM(anchors_per_class=1))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    found = []
    for _ in range(40):
        loss = loss_func(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


@pytest.mark.parametrize("plugins", [[HM], [HM(destination="semihard")]])
def test_a_miner_refuses(model, images, labels, plugins):
    miner = AdversarialMiner(miners.BatchHardMiner(), model, attack=PGD, plugins=plugins)
    with pytest.raises(PlanError, match=r"24 rows in places of their own.*AdversarialLoss"):
        miner(model(images), labels)


@pytest.mark.parametrize("other", ["rows", "roles of pairs"])
def test_a_plan_of_another_plugin_that_has_no_triplets_is_refused(model, images, labels, other):
    class Plans:
        @hookimpl
        def pml_adversarial_plan(self, batch):
            if other == "rows":
                return replace_rows(torch.arange(8), 8, None)
            pairs = tuple(torch.tensor(m) for m in ([0, 2], [1, 3], [0, 2], [3, 1]))
            return plan_roles(pairs, ["positive"], 8)

    with pytest.raises(PlanError, match=r"no tuples|has pairs"):
        build(model, Plans(), HM(), loss=losses.ContrastiveLoss())(model(images), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "hard"}, r"source='hard'; expected 'random', 'semihard' or 'softhard'"),
        ({"destination": "random"}, r"destination='random'; expected 'lga', 'semihard' or 'softhard'"),
        ({"margin": 0}, r"margin=0; expected a number above 0"),
        ({"margin": True}, r"margin=True"),
        ({"margin": math.nan}, r"margin=nan"),
        ({"cap": -1}, r"cap=-1"),
        ({"cap": math.inf}, r"cap=inf"),
        ({"cap": "u"}, r"cap='u'"),
        ({"anchors_per_class": 0}, r"anchors_per_class=0"),
    ],
)
def test_options(options, message):
    with pytest.raises(InputError, match=message):
        HM(**options)
