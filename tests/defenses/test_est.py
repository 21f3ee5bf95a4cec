"""EST against the paper's formula, written out row by row."""

from functools import partial

import pytest
import torch
import torchattacks
from one_step import ALPHA, EPS, LOSSES, MINERS, PEERS_PGD, STEPS, WITH_MEMORY, Spy, distance
from one_step import step as step_with
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.reducers import MeanReducer
from seed_paper import seed_paper_loss

from pml_adversarial import AdversarialMiner
from pml_adversarial.defenses.est import EST

TRIPLETS = torch.tensor([0, 2, 3, 5, 6]), torch.tensor([1, 3, 2, 4, 7]), torch.tensor([4, 0, 6, 1, 2])
BESIDE = 1e-4
ALL = LOSSES | WITH_MEMORY

step = partial(step_with, loss=losses.TripletMarginLoss(margin=0.2, reducer=MeanReducer()))


class TestTheFormula:
    def test_every_row_is_replaced(self, model, images, labels):
        _, spy = step(model, images, labels, EST(), tuples=TRIPLETS)
        assert spy.plan.rows.tolist() == list(range(8))
        assert spy.plan.pool_indices.tolist() == list(range(8, 16))
        assert all(torch.equal(one, other) for one, other in zip(spy.plan.indices_tuple, TRIPLETS, strict=True))

    def test_the_score_is_the_distance_of_each_row_from_itself(self, model, images, labels):
        _, spy = step(model, images, labels, EST())
        copies = 3 * torch.randn(8, 4)
        expected = [distance(one, other) for one, other in zip(copies, model(images), strict=True)]
        assert spy.score(copies).tolist() == pytest.approx(expected, abs=BESIDE + 1e-5)

    def test_its_gradient(self, model, images, labels):
        _, spy = step(model, images, labels, EST())
        copies = torch.randn(8, 4, requires_grad=True)
        (found,) = torch.autograd.grad(spy.score(copies).sum(), copies)
        clean = model(images).detach()
        shifts = (copies / copies.norm(dim=1, keepdim=True) - clean / clean.norm(dim=1, keepdim=True)).norm(dim=1)
        (expected,) = torch.autograd.grad(shifts.sum(), copies)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)

    def test_it_has_a_direction_at_the_clean_row(self, model, images, labels):
        _, spy = step(model, images, labels, EST())
        clean = model(images).detach().requires_grad_()
        score = spy.score(clean)
        assert (score < 2 * BESIDE).all()
        (gradient,) = torch.autograd.grad(score.sum(), clean)
        lengths = gradient.norm(dim=1) * clean.norm(dim=1)
        assert lengths.min() > 0.1  # of at most 1: what the sphere leaves of a random direction
        directions = torch.nn.functional.normalize(gradient)
        assert (directions @ directions.T).fill_diagonal_(0).abs().max() < 0.999

    def test_the_attack_is_the_papers(self, model, images, labels, monkeypatch):
        noise = torch.randn(8, 4)
        monkeypatch.setattr(torch, "randn_like", lambda _: noise)
        _, spy = step(model, images, labels, EST())
        clean = model(images).detach()
        origin = clean / clean.norm(dim=1, keepdim=True) + BESIDE * noise / noise.norm(dim=1, keepdim=True)
        moved = images.clone()
        for _ in range(STEPS):
            moved = moved.detach().requires_grad_()
            embeddings = model(moved)
            shifts = (embeddings / embeddings.norm(dim=1, keepdim=True) - origin).norm(dim=1)
            (gradient,) = torch.autograd.grad(shifts.sum(), moved)
            change = (moved.detach() + ALPHA * gradient.sign() - images).clamp(-EPS, EPS)
            moved = (images + change).clamp(0, 1)
        torch.testing.assert_close(spy.adversarial.inputs, moved, atol=1e-6, rtol=0)

    def test_the_loss_is_that_of_the_perturbed_batch(self, model, images, labels):
        _, spy = step(model, images, labels, EST(), tuples=TRIPLETS)
        found = torch.autograd.grad(spy.loss, list(model.parameters()))
        embeddings = model(spy.adversarial.inputs)
        a, p, n = (embeddings[member] / embeddings[member].norm(dim=1, keepdim=True) for member in TRIPLETS)
        loss = ((a - p).norm(dim=1) - (a - n).norm(dim=1) + 0.2).relu().mean()
        torch.testing.assert_close(spy.loss, loss, atol=1e-5, rtol=1e-5)
        for one, other in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mined", MINERS)
@pytest.mark.parametrize("name", ALL)
def test_any_loss(name, mined, model, images, labels):
    tuples = None if mined == "none" else MINERS[mined](model(images), labels)
    loss_func, spy = step(model, images, labels, EST(), loss=ALL[name](), tuples=tuples)
    shifts = [distance(one, other) for one, other in zip(spy.adversarial.embeddings, model(images), strict=True)]
    assert min(shifts) > 0.05
    assert spy.adversarial.score_after.tolist() == pytest.approx(shifts, abs=2 * BESIDE)
    assert loss_func.share_score_rose == 1
    assert spy.loss.isfinite()


class TestAround:
    def test_moves_further_than_the_default_does(self, model, images, labels):
        _, shifted = step(model, images, labels, EST())
        _, other = step(model, images, labels, perturb="all")
        clean = model(images)
        one, two = (
            sum(distance(a, b) for a, b in zip(spy.adversarial.embeddings, clean, strict=True))
            for spy in (shifted, other)
        )
        assert one > two

    def test_without_a_budget_it_is_the_wrapped_loss(self, model, images, labels):
        _, spy = step(model, images, labels, EST(), attack=partial(torchattacks.PGD, eps=0))
        expected = losses.TripletMarginLoss(margin=0.2, reducer=MeanReducer())(model(images), labels)
        torch.testing.assert_close(spy.loss, expected)

    def test_in_mixed_precision(self, model, images, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_func, spy = step(model, images, labels, EST())
        assert spy.score(spy.batch.context).dtype == torch.float32
        assert loss_func.share_score_rose == 1

    def test_leaves_no_trace(self, moody_model, images, labels):
        loss_func = seed_paper_loss(losses.NCALoss(), moody_model, attack=PEERS_PGD, plugins=[EST()])
        embeddings = moody_model(images)
        before = {name: value.clone() for name, value in moody_model.state_dict().items()}
        state = torch.get_rng_state()
        loss_func.adversary.perturb_only(loss_func.loss, loss_func.adversary.collate(embeddings, labels, None))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], value) for name, value in moody_model.state_dict().items())
        assert all(module.training for module in moody_model.modules())

    def test_runs_repeat(self, model, images, labels):
        _, one = step(model, images, labels, EST())
        torch.manual_seed(5)
        _, other = step(model, images, labels, EST())
        assert torch.equal(one.adversarial.inputs, other.adversarial.inputs)

    def test_a_miner_mines_among_the_shifted_rows(self, model, images, labels):
        miner = AdversarialMiner(miners.BatchHardMiner(), model, attack=PEERS_PGD, plugins=[EST()])
        anchors, positives, negatives = miner(model(images), labels)
        assert miner.num_perturbed == 8
        assert miner.share_score_rose == 1
        assert (labels[anchors] == labels[positives]).all()
        assert (labels[anchors] != labels[negatives]).all()

    def test_rows_of_a_reference_with_unknown_inputs_stay_clean(self, model, images, labels):
        spy = Spy()
        loss_func = seed_paper_loss(losses.ContrastiveLoss(), model, attack=PEERS_PGD, plugins=[EST(), spy])
        loss_func(model(images), labels, None, torch.randn(6, 4), torch.arange(6) // 2)
        assert spy.plan.rows.tolist() == list(range(8))
        assert spy.plan.pool_indices.tolist() == list(range(14, 22))
        assert spy.plan.ref_pool_indices.tolist() == list(range(8, 14))

    def test_rows_of_a_reference_that_the_model_made_move(self, model, images, labels):
        loss_func = seed_paper_loss(losses.ContrastiveLoss(), model, attack=PEERS_PGD, plugins=[EST()])
        loss_func(model(images[::2]), labels[::2], None, model(images[1::2]), labels[1::2])
        assert loss_func.num_perturbed == 8

    def test_two_views_without_labels(self, model, images):
        loss_func = seed_paper_loss(losses.VICRegLoss(), model, attack=PEERS_PGD, plugins=[EST()])
        loss_func(model(images), ref_emb=model(images.flip(3)))
        assert loss_func.num_perturbed == 16
        assert loss_func.share_score_rose == 1
