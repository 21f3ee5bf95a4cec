"""FARE against the paper's formula, written out row by row."""

import copy
import math

import pytest
import torch
from one_step import ALPHA, EPS, PEERS_PGD, STEPS, Spy
from pytorch_metric_learning import losses
from torch import nn

from pml_adversarial import AdversarialLoss, InputError, PlanError
from pml_adversarial.defenses.fare import FARE


def shift(row, target, normalize):
    row, target = row.tolist(), target.tolist()
    if normalize:
        row, target = ([x / math.sqrt(sum(y * y for y in v)) for x in v] for v in (row, target))
    return sum((x - y) ** 2 for x, y in zip(row, target, strict=True))


@pytest.fixture
def original(model):
    """What the model was, before training moved it a little."""
    before = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return before


def step(model, original, images, method, labels=None, loss=None, attack=PEERS_PGD):
    spy = Spy()
    loss_func = AdversarialLoss(
        loss or losses.ContrastiveLoss(), model, attack=attack, plugins=[method, spy], warmup=0, seed=0
    )
    with torch.no_grad():
        targets = original(images)
    loss_func(model(images), labels, ref_emb=targets, ref_labels=labels)
    return loss_func, spy


class TestTheFormula:
    @pytest.mark.parametrize("normalize", [True, False])
    def test_the_mean_squared_distance_from_the_original(self, normalize, model, original, images):
        _, spy = step(model, original, images, FARE(normalize=normalize))
        pairs = zip(model(spy.adversarial.inputs), original(images), strict=True)
        expected = [shift(*pair, normalize) for pair in pairs]
        assert spy.loss.item() == pytest.approx(sum(expected) / 8, rel=1e-5)
        assert len(spy.plan.rows) == 8

    def test_the_attack_is_the_papers(self, model, original, images, monkeypatch):
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
        _, spy = step(model, original, images, FARE(normalize=False))
        moved, targets = images.clone(), original(images).detach()
        for _ in range(STEPS):
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((model(moved) - targets).square().sum(), moved)
            change = (moved.detach() + ALPHA * gradient.sign() - images).clamp(-EPS, EPS)
            moved = (images + change).clamp(0, 1)
        torch.testing.assert_close(spy.adversarial.inputs, moved)

    @pytest.mark.parametrize("normalize", [True, False])
    def test_at_the_original_itself_the_attack_has_a_direction(self, normalize, model, images):
        loss_func, _ = step(model, model, images, FARE(normalize=normalize))
        assert loss_func.share_score_rose == 1

    def test_the_gradient(self, model, original, images):
        _, spy = step(model, original, images, FARE(clean_weight=0.5))
        unit = nn.functional.normalize
        targets = unit(original(images)).detach()
        expected = (unit(model(spy.adversarial.inputs)) - targets).square().sum(1).mean()
        expected = expected + 0.5 * (unit(model(images)) - targets).square().sum(1).mean()
        torch.testing.assert_close(spy.loss, expected)
        found = torch.autograd.grad(spy.loss, list(model.parameters()))
        for one, other in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    def test_the_wrapped_loss_compares_with_the_originals_embeddings(self, model, original, images, labels):
        loss = losses.ContrastiveLoss()
        _, with_loss = step(model, original, images, FARE(loss_weight=2.0), labels, loss)
        _, alone = step(model, original, images, FARE(), labels, loss)
        expected = loss(model(images), labels, None, original(images), labels)
        assert with_loss.loss.item() == pytest.approx((alone.loss + 2 * expected).item(), rel=1e-5)

    def test_the_wrapped_loss_of_rows_and_copies(self, model, original, images, labels):
        loss, plugin = losses.MultiSimilarityLoss(), FARE(loss_weight=2.0, loss_with="copies")
        _, spy = step(model, original, images, plugin, labels, loss)
        unit = nn.functional.normalize
        copies = model(spy.adversarial.inputs)
        expected = (unit(copies) - unit(original(images)).detach()).square().sum(1).mean()
        expected = expected + 2 * loss(torch.cat([model(images), copies]), torch.cat([labels, labels]))
        torch.testing.assert_close(spy.loss, expected)
        found = torch.autograd.grad(spy.loss, list(model.parameters()))
        for one, other in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("with_tuples", [False, True])
    def test_what_the_copies_need(self, with_tuples, model, original, images, labels):
        plugin = FARE(loss_weight=1.0, loss_with="copies")
        loss_func = AdversarialLoss(losses.ContrastiveLoss(), model, attack=PEERS_PGD, plugins=[plugin], warmup=0)
        given = {"labels": labels}
        if with_tuples:
            triplets = torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
            given.update(ref_labels=labels, indices_tuple=triplets)
        found = "tuples, which name references" if with_tuples else "no labels of rows and references"
        with pytest.raises(PlanError, match=rf"{found}; expected both labels and no tuples: loss_func\(model"):
            loss_func(model(images), ref_emb=original(images).detach(), **given)


class TestAround:
    def test_training_brings_it_near_the_original(self, model, original, images):
        loss_func = AdversarialLoss(losses.ContrastiveLoss(), model, eps=0.02, plugins=["fare"], warmup=0)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        shifts = []
        for _ in range(60):
            with torch.no_grad():
                targets = original(images)
            loss = loss_func(model(images), ref_emb=targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shifts.append(loss_func.shift)
        assert shifts[-1] < shifts[0] / 2

    def test_an_original_that_was_not_put_under_no_grad_is_not_perturbed(self, model, original, images):
        loss_func = AdversarialLoss(losses.ContrastiveLoss(), attack=PEERS_PGD, plugins=[FARE()], warmup=0)
        loss = loss_func(model(images), ref_emb=original(images))
        loss.backward()
        assert loss_func.num_perturbed == 8
        assert all(weight.grad is None or not weight.grad.any() for weight in original.parameters())

    @pytest.mark.parametrize("rows", [0, 5])
    def test_each_embedding_needs_its_reference(self, rows, model, images):
        loss_func = AdversarialLoss(losses.ContrastiveLoss(), model, attack=PEERS_PGD, plugins=[FARE()], warmup=0)
        given = {"ref_emb": torch.rand(rows, 4)} if rows else {}
        with pytest.raises(PlanError, match=rf"8 embeddings and {rows} references.*ref_emb=original\(images\)"):
            loss_func(model(images), torch.arange(8) // 2, ref_labels=torch.arange(rows) if rows else None, **given)

    @pytest.mark.parametrize("name", ["clean_weight", "loss_weight"])
    @pytest.mark.parametrize("weight", [-1, math.inf, math.nan, "1", None, True])
    def test_what_is_no_weight(self, name, weight):
        with pytest.raises(InputError, match=rf"{name}=.*expected a number from 0 on"):
            FARE(**{name: weight})

    def test_what_the_loss_compares_with(self):
        with pytest.raises(InputError, match=r"loss_with='both'.*references"):
            FARE(loss_with="both")

    def test_copies_for_a_loss_that_does_not_count_are_refused(self):
        with pytest.raises(InputError, match=r"loss_weight is 0.*FARE\(loss_weight=0.5, loss_with='copies'\)"):
            FARE(loss_with="copies")
