"""SES against the paper's formula, written out row by row."""

import math
from functools import partial

import pytest
import torch
import torchattacks
from one_step import LOSSES, MINERS, PEERS_PGD, distance, step
from pytorch_metric_learning import losses, miners
from seed_paper import seed_paper_loss
from torch.nn.functional import normalize

from pml_adversarial import AdversarialMiner, InputError, PluginError, hookimpl
from pml_adversarial.defenses.est import EST
from pml_adversarial.defenses.ses import SES
from pml_adversarial.training.plan import replace_rows


@pytest.mark.parametrize("mined", MINERS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_clean_loss_and_the_weighted_mean_shift(name, mined, model, images, labels):
    tuples = None if mined == "none" else MINERS[mined](model(images), labels)
    loss = LOSSES[name]()
    loss_func, spy = step(model, images, labels, SES(weight=0.7), loss=loss, tuples=tuples)
    shifts = [distance(one, other) for one, other in zip(spy.adversarial.embeddings, model(images), strict=True)]
    expected = loss(model(images), labels, tuples).item() + 0.7 * sum(shifts) / 8
    assert spy.loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss_func.share_score_rose == 1


class TestTheFormula:
    def test_the_weight_is_1(self):
        assert SES().weight == 1

    def test_the_gradient_goes_through_both_embeddings(self, model, images, labels):
        _, spy = step(model, images, labels, SES(weight=2.0))
        found = torch.autograd.grad(spy.loss, list(model.parameters()))
        clean, moved = model(images), model(spy.adversarial.inputs)
        shift = (normalize(clean) - normalize(moved)).norm(dim=1).mean()
        expected = torch.autograd.grad(losses.TripletMarginLoss()(clean, labels) + 2 * shift, list(model.parameters()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    def test_the_adversary_is_that_of_est(self, model, images, labels):
        _, one = step(model, images, labels, SES())
        _, other = step(model, images, labels, EST())
        assert torch.equal(one.adversarial.inputs, other.adversarial.inputs)

    def test_training_makes_the_shift_smaller(self, model, images, labels):
        loss_func = seed_paper_loss(losses.TripletMarginLoss(), model, attack=PEERS_PGD, plugins=[SES(weight=5.0)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        shifts = []
        for _ in range(15):
            clean = model(images)
            loss_func(clean, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            shifts.append(loss_func.embedding_shift / clean.norm(dim=1).mean().item())
        assert shifts[-1] < 0.7 * shifts[0]


class TestAround:
    def test_without_a_budget_it_is_the_wrapped_loss(self, model, images, labels):
        _, spy = step(model, images, labels, SES(), attack=partial(torchattacks.PGD, eps=0))
        torch.testing.assert_close(spy.loss, losses.TripletMarginLoss()(model(images), labels), atol=0, rtol=0)
        spy.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_a_clean_weight_does_not_count(self, model, images, labels):
        with pytest.raises(PluginError, match=r"SES answers pml_adversarial_training_loss itself, so clean_weight"):
            step(model, images, labels, SES(), clean_weight=3.0)

    def test_in_mixed_precision(self, model, images, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, spy = step(model, images, labels, SES())
        shifts = [distance(*rows) for rows in zip(spy.adversarial.embeddings, model(images), strict=True)]
        clean = losses.TripletMarginLoss()(model(images), labels).item()
        assert spy.loss.item() == pytest.approx(clean + sum(shifts) / 8, abs=0.02)  # bfloat16 has 3 digits

    def test_copies_of_another_method(self, model, images, labels):
        class PerturbsOnly(EST):
            @hookimpl
            def pml_adversarial_plan(self, batch):
                return replace_rows(torch.tensor([2, 5]), len(batch), batch.indices_tuple)

        _, spy = step(model, images, labels, PerturbsOnly(), SES())
        clean = model(images)
        shifts = [distance(spy.adversarial.embeddings[i], clean[row]) for i, row in enumerate([2, 5])]
        expected = losses.TripletMarginLoss()(clean, labels).item() + sum(shifts) / 2
        assert spy.loss.item() == pytest.approx(expected, rel=1e-5)

    def test_in_a_miner_it_perturbs_as_est_does(self, model, images, labels):
        found = [
            AdversarialMiner(miners.BatchHardMiner(), model, attack=PEERS_PGD, plugins=[method()], seed=0)
            for method in (SES, EST)
        ]
        one, other = (miner(model(images), labels) for miner in found)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def test_two_views_without_labels(self, model, images):
        loss_func = seed_paper_loss(losses.VICRegLoss(), model, attack=PEERS_PGD, plugins=[SES()])
        assert loss_func(model(images), ref_emb=model(images.flip(3))).isfinite()

    @pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan, "1", None, True])
    def test_what_is_no_weight(self, weight):
        with pytest.raises(InputError, match=r"weight=.*expected a finite number from 0 on"):
            SES(weight)

    def test_a_weight_of_0_is_plain_training(self, model, images, labels):
        _, spy = step(model, images, labels, SES(weight=0))
        assert spy.loss == losses.TripletMarginLoss()(model(images), labels)
