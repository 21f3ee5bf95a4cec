"""TRADES on embeddings against its formula, written out row by row."""

import math
from functools import partial

import pytest
import torch
import torchattacks
from one_step import ALPHA, EPS, LOSSES, MINERS, PEERS_PGD, STEPS, Spy, step
from pytorch_metric_learning import losses, miners
from seed_paper import seed_paper_loss
from torch.nn.functional import cosine_similarity, normalize

from pml_adversarial import AdversarialMiner, InputError, PlanError
from pml_adversarial.defenses.amd import RAMD
from pml_adversarial.defenses.trades import TRADES


def cosine(left, right):
    left, right = left.tolist(), right.tolist()
    lengths = math.sqrt(sum(x * x for x in left)) * math.sqrt(sum(x * x for x in right))
    return sum(x * y for x, y in zip(left, right, strict=True)) / lengths


def neighbours(embedding, own, clean, temperature):
    """Row -> how probable it is as a neighbour; the row itself is none."""
    weights = {j: math.exp(cosine(embedding, clean[j]) / temperature) for j in range(len(clean)) if j != own}
    return {j: weight / sum(weights.values()) for j, weight in weights.items()}


def divergence(copy, own, clean, temperature=0.1):
    before, after = (neighbours(embedding, own, clean, temperature) for embedding in (clean[own], copy))
    return sum(before[j] * math.log(before[j] / after[j]) for j in before)


def divergences_in_torch(copies, origin, rows, clean, temperature=0.1):
    """With gradient, one row at a time, from a full matrix without the row."""
    found = []
    for copy, begin, own in zip(copies, origin, rows, strict=True):
        others = torch.cat([clean[:own], clean[own + 1 :]])
        before, after = (
            (cosine_similarity(embedding[None], others) / temperature).softmax(0) for embedding in (begin, copy)
        )
        found.append((before * (before / after).log()).sum())
    return torch.stack(found)


def decoupled(copy, own, clean, temperature=0.1):
    """The variance of the change of similarity among the neighbours, halved, and KL."""
    before = neighbours(clean[own], own, clean, temperature)
    change = {j: (cosine(copy, clean[j]) - cosine(clean[own], clean[j])) / temperature for j in before}
    mean = sum(before[j] * change[j] for j in before)
    variance = sum(before[j] * (change[j] - mean) ** 2 for j in before)
    return variance / 2 + divergence(copy, own, clean, temperature)


class TestTheFormula:
    def test_every_row_is_replaced(self, model, images, labels):
        _, spy = step(model, images, labels, TRADES())
        assert spy.plan.rows.tolist() == list(range(8))
        assert spy.plan.pool_indices.tolist() == list(range(8, 16))

    @pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
    def test_the_score(self, temperature, model, images, labels):
        _, spy = step(model, images, labels, TRADES(temperature=temperature))
        clean = model(images)
        copies = clean + 0.1 * torch.randn(8, 4)
        expected = [divergence(copies[i], i, clean, temperature) for i in range(8)]
        assert spy.score(copies).tolist() == pytest.approx(expected, rel=0.05, abs=1e-3)  # from beside the clean row

    def test_the_score_and_its_gradient_from_beside_the_clean_row(self, model, images, labels, monkeypatch):
        noise = torch.randn(8, 4)
        monkeypatch.setattr(torch, "randn_like", lambda _: noise)
        _, spy = step(model, images, labels, TRADES())
        clean = model(images).detach()
        origin = normalize(clean) + 1e-4 * normalize(noise)
        copies = torch.randn(8, 4, requires_grad=True)
        expected = divergences_in_torch(copies, origin, range(8), clean)
        torch.testing.assert_close(spy.score(copies), expected, atol=1e-5, rtol=1e-4)
        one, other = (torch.autograd.grad(score.sum(), copies)[0] for score in (spy.score(copies), expected))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

    def test_the_attack(self, model, images, labels, monkeypatch):
        noise = torch.randn(8, 4)
        monkeypatch.setattr(torch, "randn_like", lambda _: noise)
        _, spy = step(model, images, labels, TRADES())
        clean = model(images).detach()
        origin = normalize(clean) + 1e-4 * normalize(noise)
        moved = images.clone()
        for _ in range(STEPS):
            moved = moved.detach().requires_grad_()
            raised = divergences_in_torch(model(moved), origin, range(8), clean).sum()
            (gradient,) = torch.autograd.grad(raised, moved)
            change = (moved.detach() + ALPHA * gradient.sign() - images).clamp(-EPS, EPS)
            moved = (images + change).clamp(0, 1)
        same = (spy.adversarial.inputs - moved).abs() < 1e-6
        assert same.float().mean() > 0.99  # a slope of next to nothing may round to either side
        assert not (spy.adversarial.inputs == images).all()

    def test_it_has_a_direction_at_the_clean_row(self, model, images, labels):
        _, spy = step(model, images, labels, TRADES())
        clean = model(images).detach().requires_grad_()
        score = spy.score(clean)
        assert score.abs().max() < 1e-4
        (gradient,) = torch.autograd.grad(score.sum(), clean)
        assert gradient.abs().amax(1).min() > 1e-5

    def test_the_decoupled_divergence(self, model, images, labels):
        _, spy = step(model, images, labels, TRADES(divergence="decoupled", weight=2.0))
        clean = model(images)
        copies = clean + 0.1 * torch.randn(8, 4)
        expected = [decoupled(copies[i], i, clean) for i in range(8)]
        assert spy.score(copies).tolist() == pytest.approx(expected, rel=0.05, abs=1e-3)  # from beside the clean row
        moved = [decoupled(copy, i, clean) for i, copy in enumerate(spy.adversarial.embeddings)]
        loss = losses.TripletMarginLoss()(clean, labels).item()
        assert spy.loss.item() == pytest.approx(loss + 2 * sum(moved) / 8, rel=1e-4)

    def test_the_decoupled_divergence_holds_the_clean_neighbours_fixed_as_weights(self, model, images, labels):
        _, spy = step(model, images, labels, TRADES(divergence="decoupled"))
        found = torch.autograd.grad(spy.loss, list(model.parameters()))
        clean, moved = model(images), model(spy.adversarial.inputs)
        terms = []
        for i in range(8):
            others = torch.cat([clean[:i], clean[i + 1 :]])
            before, after = (cosine_similarity(row[None], others) / 0.1 for row in (clean[i], moved[i]))
            weights = before.softmax(0).detach()
            change = after - before
            variance = (weights * (change - (weights * change).sum()) ** 2).sum()
            terms.append(variance / 2 - (weights * after.log_softmax(0)).sum())
        loss = losses.TripletMarginLoss()(clean, labels) + torch.stack(terms).mean()
        for one, other in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    def test_the_squared_distance(self, model, images, labels):
        _, spy = step(model, images, labels, TRADES(divergence="distance"))
        clean, copies = model(images), torch.randn(8, 4)
        expected = [2 - 2 * cosine(*rows) for rows in zip(clean, copies, strict=True)]
        assert spy.score(copies).tolist() == pytest.approx(expected, abs=5e-4)
        moved = [2 - 2 * cosine(*rows) for rows in zip(clean, spy.adversarial.embeddings, strict=True)]
        assert spy.loss.item() == pytest.approx(losses.TripletMarginLoss()(clean, labels).item() + sum(moved) / 8)

    def test_the_gradient_goes_through_all_embeddings(self, model, images, labels):
        _, spy = step(model, images, labels, TRADES(weight=3.0))
        found = torch.autograd.grad(spy.loss, list(model.parameters()))
        clean, moved = model(images), model(spy.adversarial.inputs)
        diverged = divergences_in_torch(moved, clean, range(8), clean).mean()
        loss = losses.TripletMarginLoss()(clean, labels) + 3 * diverged
        for one, other in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    def test_what_keeps_the_neighbours_costs_nothing(self, model, images, labels):
        _, spy = step(model, images, labels, TRADES())
        assert spy.score(7 * model(images).detach()).abs().max() < 1e-4


@pytest.mark.parametrize("mined", MINERS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_clean_loss_and_the_weighted_mean_divergence(name, mined, model, images, labels):
    tuples = None if mined == "none" else MINERS[mined](model(images), labels)
    loss = LOSSES[name]()
    loss_func, spy = step(model, images, labels, TRADES(weight=0.7), loss=loss, tuples=tuples)
    clean = model(images)
    found = [divergence(copy, i, clean) for i, copy in enumerate(spy.adversarial.embeddings)]
    assert min(found) > 0.005
    expected = loss(clean, labels, tuples).item() + 0.7 * sum(found) / 8
    assert spy.loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss_func.share_score_rose == 1
    assert loss_func.divergence == pytest.approx(sum(found) / 8, rel=0.05)


class TestAround:
    def test_the_attack_moves_the_divergence_further_than_that_of_est_does(self, model, images, labels):
        clean = model(images)

        def reached(method):
            _, spy = step(model, images, labels, method)
            return sum(divergence(copy, i, clean) for i, copy in enumerate(spy.adversarial.embeddings))

        assert reached(TRADES()) > reached(TRADES(divergence="distance"))

    @pytest.mark.parametrize("kind", ["neighbours", "decoupled", "distance"])
    def test_without_a_budget_it_is_the_wrapped_loss(self, kind, model, images, labels):
        method = TRADES(divergence=kind)
        _, spy = step(model, images, labels, method, attack=partial(torchattacks.PGD, eps=0))
        expected = losses.TripletMarginLoss()(model(images), labels)
        torch.testing.assert_close(spy.loss, expected, atol=1e-6, rtol=0)
        found = torch.autograd.grad(spy.loss, list(model.parameters()))
        for one, other in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)

    def test_coinciding_rows(self, model, images, labels):
        _, spy = step(model, images, labels, TRADES())
        copies = spy.batch.context[:1].expand(8, 4).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(spy.score(copies).sum(), copies)
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("random_start", [True, False])
    def test_in_mixed_precision(self, random_start, model, images, labels):
        attack = partial(PEERS_PGD, random_start=random_start)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_func, spy = step(model, images, labels, TRADES(), attack=attack)
        assert spy.score(spy.batch.context).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = spy.score(spy.adversarial.embeddings)
        assert torch.equal(inside, spy.score(spy.adversarial.embeddings))
        assert loss_func.share_score_rose == 1

    def test_copies_of_another_method(self, model, images, labels):
        _, spy = step(model, images, labels, RAMD(), TRADES())
        clean, rows = model(images), spy.plan.rows.tolist()
        assert len(rows) == 16
        found = [divergence(copy, row, clean) for copy, row in zip(spy.adversarial.embeddings, rows, strict=True)]
        expected = losses.TripletMarginLoss()(clean, labels).item() + sum(found) / 16
        assert spy.loss.item() == pytest.approx(expected, rel=1e-5)

    def test_rows_of_a_reference_are_neighbours(self, model, images, labels):
        spy, loss = Spy(), losses.ContrastiveLoss()
        loss_func = seed_paper_loss(loss, model, attack=PEERS_PGD, plugins=[TRADES(), spy])
        reference = torch.randn(6, 4), torch.arange(6) // 2
        loss_func(model(images), labels, None, *reference)
        clean = torch.cat([model(images), reference[0]])
        found = [divergence(copy, i, clean) for i, copy in enumerate(spy.adversarial.embeddings)]
        assert len(found) == 8
        expected = loss(model(images), labels, None, *reference).item() + sum(found) / 8
        assert spy.loss.item() == pytest.approx(expected, rel=1e-5)

    def test_in_a_miner_it_perturbs(self, model, images, labels):
        miner = AdversarialMiner(miners.BatchHardMiner(), model, attack=PEERS_PGD, plugins=[TRADES()])
        miner(model(images), labels)
        assert miner.num_perturbed == 8
        assert miner.share_score_rose == 1
        assert miner.divergence > 0

    def test_two_views_without_labels(self, model, images):
        loss_func = seed_paper_loss(losses.VICRegLoss(), model, attack=PEERS_PGD, plugins=[TRADES()])
        loss_func(model(images), ref_emb=model(images.flip(3)))
        assert loss_func.num_perturbed == 16
        assert loss_func.share_score_rose == 1

    def test_leaves_no_trace(self, moody_model, images, labels):
        loss_func = seed_paper_loss(losses.NCALoss(), moody_model, attack=PEERS_PGD, plugins=[TRADES()])
        embeddings = moody_model(images)
        before = {name: value.clone() for name, value in moody_model.state_dict().items()}
        state = torch.get_rng_state()
        loss_func.adversary.perturb_only(loss_func.loss, loss_func.adversary.collate(embeddings, labels, None))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], value) for name, value in moody_model.state_dict().items())
        assert all(module.training for module in moody_model.modules())

    def test_two_rows_have_one_neighbour_each(self, model, images):
        with pytest.raises(PlanError, match=r"2 rows, a row has 1 neighbours.*'distance'"):
            step(model, images[:2], torch.tensor([0, 0]), TRADES(), loss=losses.ContrastiveLoss())
        labels = torch.tensor([0, 0])
        loss_func, _ = step(model, images[:2], labels, TRADES(divergence="distance"), loss=losses.ContrastiveLoss())
        assert loss_func.num_perturbed == 2

    @pytest.mark.parametrize("weight", [-1, math.inf, math.nan, "6", None, False])
    def test_what_is_no_weight(self, weight):
        with pytest.raises(InputError, match=r"weight=.*expected a number from 0 on"):
            TRADES(weight)

    @pytest.mark.parametrize("temperature", [0, -0.1, math.inf, math.nan, "1", None, True])
    def test_what_is_no_temperature(self, temperature):
        with pytest.raises(InputError, match=r"temperature=.*above 0"):
            TRADES(temperature=temperature)

    @pytest.mark.parametrize("kind", ["KL", None, 1])
    def test_what_is_no_divergence(self, kind):
        with pytest.raises(InputError, match=r"divergence=.*'neighbours', 'decoupled' or 'distance'"):
            TRADES(divergence=kind)
