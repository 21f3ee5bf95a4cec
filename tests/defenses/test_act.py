"""Anti-collapse triplets, against their formula in plain loops."""

from functools import partial

import pytest
import torch
import torchattacks
from one_step import LOSSES
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.reducers import MeanReducer
from seed_paper import seed_paper_loss

from pml_adversarial import AdversarialMiner, Batch, InputError, PlanError, hookimpl
from pml_adversarial.defenses.act import ACT

PGD = partial(torchattacks.PGD, eps=0.1, alpha=0.02, steps=10, random_start=False)
TRIPLETS = tuple(torch.tensor(m) for m in ([0, 0, 2, 5, 7], [1, 1, 3, 4, 6], [2, 7, 0, 1, 3]))


def euclidean(left, right):
    left, right = left / left.square().sum().sqrt(), right / right.square().sum().sqrt()
    return (left - right).square().sum().sqrt()


def build(model, *plugins, loss=None, attack=PGD, **options):
    loss = losses.TripletMarginLoss(margin=0.2, reducer=MeanReducer()) if loss is None else loss
    return seed_paper_loss(loss, model, attack=attack, plugins=plugins, seed=0, **options)


class Watches:
    @hookimpl(wrapper=True)
    def pml_adversarial_plan(self):
        self.plan = yield
        return self.plan

    @hookimpl
    def pml_adversarial_record(self, adversarial):
        self.inputs = adversarial.inputs


class TestStep:
    def test_trains_clean_anchors_with_perturbed_candidates(self, model, images, labels):
        watch = Watches()
        loss = build(model, watch, ACT())(model(images), labels, TRIPLETS)
        assert watch.plan.rows.tolist() == torch.cat(TRIPLETS[1:]).tolist()
        anchors, moved = model(images)[TRIPLETS[0]], model(watch.inputs).reshape(2, 5, -1)
        gaps = [euclidean(anchors[t], moved[0, t]) - euclidean(anchors[t], moved[1, t]) for t in range(5)]
        expected = sum((gap + 0.2).clamp(min=0) for gap in gaps) / 5
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        found = torch.autograd.grad(loss, model.parameters())
        for one, other in zip(found, torch.autograd.grad(expected, model.parameters()), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)

    def test_the_adversary_draws_positive_and_negative_together(self, model, images, labels):
        watch = Watches()
        loss_func = build(model, watch, ACT())
        loss_func(model(images), labels, TRIPLETS)
        clean, moved = model(images)[watch.plan.rows].reshape(2, 5, -1), model(watch.inputs).reshape(2, 5, -1)
        for t in range(5):
            assert euclidean(*moved[:, t]) < euclidean(*clean[:, t]) - 0.02
        assert loss_func.share_score_rose == 1
        assert loss_func.share_zero_gradient == 0
        assert loss_func.perturbation_linf == pytest.approx(0.1, abs=1e-5)

    def test_pairs_are_joined(self, model, images, labels):
        pairs = tuple(torch.tensor(m) for m in ([0, 4], [1, 5], [0, 4, 4, 6], [3, 0, 7, 1]))
        watch = Watches()
        build(model, watch, ACT())(model(images), labels, pairs)
        assert {*zip(*watch.plan.rows.reshape(2, -1).tolist(), strict=True)} == {(1, 3), (5, 0), (5, 7)}

    @pytest.mark.parametrize("per_class", [None, 1])
    def test_without_tuples_triplets_are_drawn(self, model, images, labels, per_class):
        watch = Watches()
        still = partial(torchattacks.PGD, eps=0)
        loss_func, negatives_of = build(model, watch, ACT(anchors_per_class=per_class), attack=still), {}
        for _ in range(100):
            loss_func(model(images), labels)
            positives, negatives = watch.plan.rows.reshape(2, -1)
            assert len(positives) == (8 if per_class is None else 4)
            for p, n in zip(positives.tolist(), negatives.tolist(), strict=True):
                negatives_of.setdefault(p ^ 1, set()).add(n)
        assert negatives_of == {a: {n for n in range(8) if n // 2 != a // 2} for a in range(8)}

    def test_with_reference(self, model, images, labels):
        watch = Watches()
        loss_func = build(model, watch, ACT())
        loss_func(model(images[:4]), labels[:4], None, model(images.flip(0)), labels.flip(0)).backward()
        assert (watch.plan.rows >= 4).all()
        assert len(watch.plan) == 8

    def test_a_reference_without_inputs_is_refused(self, model, images, labels):
        with pytest.raises(PlanError, match=r"members in ref_emb.*positive, negative"):
            build(model, ACT)(model(images), labels, None, torch.rand(8, 4), labels.clone())

    def test_leaves_no_trace(self, moody_model, images, labels):
        modes = [m.training for m in moody_model.modules()]
        loss_func = build(moody_model, ACT)
        loss_func(moody_model(images), labels)
        assert [m.training for m in moody_model.modules()] == modes
        assert all(p.grad is None and p.requires_grad for p in moody_model.parameters())
        assert moody_model[1].num_batches_tracked == 2  # the batch, and the copies
        moody_model.eval()
        embeddings, random_state = moody_model(images), torch.get_rng_state()
        loss_func(embeddings, labels)
        assert torch.equal(torch.get_rng_state(), random_state)


class TestScore:
    def score(self, labels, copies):
        context = torch.randn(8, 4)
        batch = Batch(torch.rand(8, 1), context, context, labels, TRIPLETS, 8)
        act = ACT()
        return act.pml_adversarial_score(batch, act.pml_adversarial_plan(None, batch))(copies)

    def test_value_and_gradient(self, labels):
        copies = torch.randn(10, 4, requires_grad=True)
        found = self.score(labels, copies)
        distances = [euclidean(copies[t], copies[5 + t]) for t in range(5)]
        assert found.tolist() == pytest.approx([-d.item() for d in distances] * 2, abs=1e-5)
        (gradient,) = torch.autograd.grad(found.mean(), copies)
        (expected,) = torch.autograd.grad(-sum(distances) / 5, copies)
        assert torch.allclose(gradient, expected, atol=1e-5)

    def test_is_in_single_precision_and_finite_where_both_coincide(self, labels):
        copies = torch.ones(10, 4, dtype=torch.bfloat16, requires_grad=True)
        found = self.score(labels, copies)
        assert found.dtype == torch.float32
        found.sum().backward()
        assert copies.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_trains_what_is_wrapped(model, images, labels, name):
    loss_func = build(model, ACT, loss=LOSSES[name]())
    loss_func(model(images), labels, miners.BatchHardMiner()(model(images), labels)).backward()
    assert loss_func.num_perturbed == 16
    assert any(p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_miner_refuses(model, images, labels):
    miner = AdversarialMiner(miners.BatchHardMiner(), model, attack=PGD, plugins=[ACT])
    with pytest.raises(PlanError, match=r"24 rows in places of their own.*AdversarialLoss"):
        miner(model(images), labels)


@pytest.mark.parametrize("options", [{"source": "distance"}, {"anchors_per_class": 1.5}])
def test_options(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}="):
        ACT(**options)
