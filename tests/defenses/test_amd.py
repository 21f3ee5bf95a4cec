"""AMD and RAMD against the paper's formulas, written out triplet by triplet."""

import copy
from functools import partial

import pytest
import torch
import torchattacks
from one_step import ALPHA, EPS, LOSSES, MINERS, PEERS_PGD, STEPS, WITH_MEMORY, Spy, distance
from one_step import step as step_with
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.reducers import MeanReducer
from seed_paper import seed_paper_loss
from torch import nn

from pml_adversarial import AdversarialMiner, AttackError, InputError, PlanError, hookimpl
from pml_adversarial.defenses.amd import AMD, RAMD
from pml_adversarial.defenses.ses import SES

ONE_PER_ANCHOR = (
    torch.tensor([0, 2, 3, 5, 6]),
    torch.tensor([1, 3, 2, 4, 7]),
    torch.tensor([4, 0, 6, 1, 2]),
)  # rows play several roles
MARGIN = 0.1
ALL = LOSSES | WITH_MEMORY


def hinge_loss():
    return losses.TripletMarginLoss(margin=MARGIN, reducer=MeanReducer())


step = partial(step_with, loss=hinge_loss())


def mean_over_triplets(anchors, positives, negatives, hinge):
    found = [distance(a, p) - distance(a, n) for a, p, n in zip(anchors, positives, negatives, strict=True)]
    return sum(max(0, h + MARGIN) if hinge else h for h in found) / len(found)


def in_torch(anchors, positives, negatives, hinge):
    a, p, n = (v / v.norm(dim=1, keepdim=True) for v in (anchors, positives, negatives))
    hardness = (a - p).norm(dim=1) - (a - n).norm(dim=1)
    return (hardness + MARGIN).relu().mean() if hinge else hardness.mean()


def by_hand(model, images, triplets, hinge, anchors_move):
    """Projected steps of sign gradient on images of their own for each member of each triplet."""
    clean = [images[member] for member in triplets]
    moved = [member.clone() for member in clean]
    for _ in range(STEPS):
        moved = [member.detach().requires_grad_() for member in moved]
        raised = in_torch(*(model(member) for member in moved), hinge)
        gradients = torch.autograd.grad(raised, moved)
        for i in range(3):
            if i > 0 or anchors_move:
                change = (moved[i].detach() + ALPHA * gradients[i].sign() - clean[i]).clamp(-EPS, EPS)
                moved[i] = (clean[i] + change).clamp(0, 1)
    return [member.detach() for member in moved]


@pytest.fixture
def satisfied():
    """A model and images of two classes far apart: no triplet violates a margin."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2))
    images = torch.tensor([[0.9, 0.1], [0.9, 0.15], [0.1, 0.9], [0.15, 0.9]]).reshape(4, 1, 1, 2)
    return model, images, torch.tensor([0, 0, 1, 1])


class TestTheFormula:
    @pytest.mark.parametrize("raises", ["loss", "hardness"])
    def test_every_member_of_every_triplet_has_a_copy(self, raises, model, images, labels):
        _, spy = step(model, images, labels, AMD(raises, tuples_per_anchor=1), tuples=ONE_PER_ANCHOR)
        assert spy.plan.rows.tolist() == torch.cat(ONE_PER_ANCHOR).tolist()

    @pytest.mark.parametrize("raises", ["loss", "hardness"])
    def test_what_is_raised(self, raises, model, images, labels):
        _, spy = step(model, images, labels, AMD(raises, tuples_per_anchor=1), tuples=ONE_PER_ANCHOR)
        copies = torch.randn(15, 4)
        expected = mean_over_triplets(copies[:5], copies[5:10], copies[10:], raises == "loss")
        assert spy.score(copies).item() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("raises", ["loss", "hardness"])
    def test_its_gradient(self, raises, model, images, labels):
        _, spy = step(model, images, labels, AMD(raises, tuples_per_anchor=1), tuples=ONE_PER_ANCHOR)
        copies = torch.randn(15, 4, requires_grad=True)
        (found,) = torch.autograd.grad(spy.score(copies), copies)
        (expected,) = torch.autograd.grad(in_torch(*copies.split(5), raises == "loss"), copies)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("raises", ["loss", "hardness"])
    def test_of_rows_that_move_as_one(self, raises, model, images, labels):
        _, spy = step(model, images, labels, AMD(raises), tuples=ONE_PER_ANCHOR)
        assert spy.plan.rows.tolist() == list(range(8))
        copies = torch.randn(8, 4)
        expected = mean_over_triplets(*(copies[member] for member in ONE_PER_ANCHOR), raises == "loss")
        assert spy.score(copies).item() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("raises", ["loss", "hardness"])
    def test_the_attack_is_the_papers(self, raises, model, images, labels):
        _, spy = step(model, images, labels, AMD(raises, tuples_per_anchor=1), tuples=ONE_PER_ANCHOR)
        expected = by_hand(model, images, ONE_PER_ANCHOR, raises == "loss", anchors_move=True)
        torch.testing.assert_close(spy.adversarial.inputs, torch.cat(expected), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("raises", ["loss", "hardness"])
    def test_the_attack_of_the_revised_one(self, raises, model, images, labels):
        _, spy = step(model, images, labels, RAMD(raises, tuples_per_anchor=1), tuples=ONE_PER_ANCHOR)
        expected = by_hand(model, images, ONE_PER_ANCHOR, raises == "loss", anchors_move=False)
        torch.testing.assert_close(spy.adversarial.inputs, torch.cat(expected[1:]), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(("method", "anchors_move"), [(AMD, True), (RAMD, False)])
    def test_training_loss_and_its_gradient(self, method, anchors_move, model, images, labels):
        _, spy = step(model, images, labels, method("loss", tuples_per_anchor=1), tuples=ONE_PER_ANCHOR)
        found = torch.autograd.grad(spy.loss, list(model.parameters()))
        moved = by_hand(model, images, ONE_PER_ANCHOR, True, anchors_move)
        embedded = [model(member) for member in moved]
        assert spy.loss.item() == pytest.approx(mean_over_triplets(*embedded, True), abs=1e-5)
        expected = torch.autograd.grad(in_torch(*embedded, True), list(model.parameters()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    def test_of_pairs_each_kind_has_its_mean(self, model, images, labels):
        pairs = torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([0, 5, 6]), torch.tensor([2, 1, 3])
        _, spy = step(model, images, labels, AMD("hardness"), loss=losses.ContrastiveLoss(), tuples=pairs)
        assert spy.plan.rows.tolist() == [0, 1, 2, 3, 5, 6]
        copies = dict(zip(spy.plan.rows.tolist(), torch.randn(6, 4), strict=True))
        near = [distance(copies[int(i)], copies[int(j)]) for i, j in zip(*pairs[:2], strict=True)]
        far = [distance(copies[int(i)], copies[int(j)]) for i, j in zip(*pairs[2:], strict=True)]
        expected = sum(near) / 2 - sum(far) / 3
        assert spy.score(torch.stack(list(copies.values()))).item() == pytest.approx(expected, abs=1e-5)

    def test_without_tuples_all_triplets_of_the_batch(self, model, images, labels):
        _, spy = step(model, images, labels, AMD("hardness"))
        copies = torch.randn(8, 4)
        triplets = [
            (a, p, n)
            for a in range(8)
            for p in range(8)
            for n in range(8)
            if a != p and labels[a] == labels[p] and labels[a] != labels[n]
        ]
        expected = mean_over_triplets(*(copies[list(member)] for member in zip(*triplets, strict=True)), False)
        assert spy.score(copies).item() == pytest.approx(expected, abs=1e-5)

    def test_a_kind_of_pair_that_there_is_none_of_counts_nothing(self, model, images):
        _, spy = step(model, images, torch.zeros(8, dtype=torch.long), AMD("hardness"), loss=losses.ContrastiveLoss())
        copies = torch.randn(8, 4)
        found = [distance(copies[i], copies[j]) for i in range(8) for j in range(8) if i != j]
        assert spy.score(copies).item() == pytest.approx(sum(found) / 56, abs=1e-5)

    def test_a_batch_of_strangers_has_negatives_only(self, model, images):
        _, spy = step(model, images, torch.arange(8), AMD("hardness"), loss=losses.ContrastiveLoss())
        copies = torch.randn(8, 4)
        found = [distance(copies[i], copies[j]) for i in range(8) for j in range(8) if i != j]
        assert spy.score(copies).item() == pytest.approx(-sum(found) / 56, abs=1e-5)

    def test_with_a_reference_all_pairs_of_query_and_item(self, model, images, labels):
        spy = Spy()
        loss_func = seed_paper_loss(losses.ContrastiveLoss(), model, attack=PEERS_PGD, plugins=[AMD("hardness"), spy])
        loss_func(model(images[::2]), labels[::2], None, model(images[1::2]), labels[1::2])
        assert spy.plan.rows.tolist() == list(range(8))
        copies = torch.randn(8, 4)
        near = [distance(copies[i], copies[4 + i]) for i in range(4)]
        far = [distance(copies[i], copies[4 + j]) for i in range(4) for j in range(4) if i != j]
        assert spy.score(copies).item() == pytest.approx(sum(near) / 4 - sum(far) / 12, abs=1e-5)


class TestRevised:
    def test_a_row_that_is_an_anchor_as_well_stays_clean_as_one(self, model, images, labels):
        _, spy = step(model, images, labels, RAMD("hardness"), tuples=ONE_PER_ANCHOR)
        copies = torch.randn(len(spy.plan.rows), 4)
        positives = dict(zip(spy.plan.rows[:5].tolist(), copies[:5], strict=True))
        negatives = dict(zip(spy.plan.rows[5:].tolist(), copies[5:], strict=True))
        assert set(positives) == {1, 2, 3, 4, 7}
        assert set(negatives) == {0, 1, 2, 4, 6}
        clean = model(images).detach()
        anchors, others, strangers = ONE_PER_ANCHOR
        expected = mean_over_triplets(
            clean[anchors], [positives[int(i)] for i in others], [negatives[int(i)] for i in strangers], False
        )
        assert spy.score(copies).item() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize(
        "loss",
        [losses.NCALoss(), losses.ArcFaceLoss(4, 4), losses.ProxyNCALoss(4, 4), losses.FastAPLoss()],
        ids=lambda loss: type(loss).__name__,
    )
    def test_losses_that_cannot_keep_anchors_clean_are_refused(self, loss, model, images, labels):
        with pytest.raises(PlanError, match=r"does not tell a row as an anchor.*Use AMD"):
            step(model, images, labels, RAMD(), loss=loss)

    def test_in_place_where_no_anchor_is_anything_else(self, model, images, labels):
        triplets = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([4, 6])
        _, spy = step(model, images, labels, RAMD(), loss=losses.NCALoss(), tuples=triplets)
        assert spy.plan.rows.tolist() == [1, 3, 4, 6]

    def test_in_a_reference_positives_and_negatives_move(self, model, images, labels):
        spy = Spy()
        loss_func = seed_paper_loss(losses.NCALoss(), model, attack=PEERS_PGD, plugins=[RAMD(), spy])
        loss_func(model(images[::2]), labels[::2], None, model(images[1::2]), labels[1::2])
        assert spy.plan.rows.tolist() == [4, 5, 6, 7]
        assert loss_func.loss_after > loss_func.loss_before

    def test_pairs(self, model, images, labels):
        _, spy = step(model, images, labels, RAMD(), loss=losses.ContrastiveLoss())
        assert sorted(spy.plan.rows.tolist()) == sorted([*range(8), *range(8)])  # as a positive, and as a negative
        assert spy.loss > losses.ContrastiveLoss()(model(images), labels)

    def test_a_loss_without_labels_is_refused(self, model, images):
        loss_func = seed_paper_loss(losses.VICRegLoss(), model, plugins=[RAMD()])
        with pytest.raises(PlanError, match="does not tell a row as an anchor"):
            loss_func(model(images), ref_emb=model(images.flip(3)))


@pytest.mark.parametrize("mined", MINERS)
@pytest.mark.parametrize("name", ALL)
class TestAnyLoss:
    def test_rises_on_rows_that_move_as_one(self, name, mined, model, images, labels):
        tuples = None if mined == "none" else MINERS[mined](model(images), labels)
        loss_func, spy = step(model, images, labels, AMD(), loss=ALL[name](), tuples=tuples)
        assert loss_func.share_score_rose == 1
        assert loss_func.loss_after > loss_func.loss_before
        assert spy.loss.isfinite()
        assert loss_func.num_perturbed == 8


class TestASatisfiedBatch:
    def by(self, satisfied, attack, *plugins):
        model, images, labels = satisfied
        return step(model, images, labels, *plugins, loss=losses.TripletMarginLoss(margin=0.1), attack=attack)

    @pytest.mark.parametrize("method", [AMD, RAMD, partial(AMD, tuples_per_anchor=1)])
    @pytest.mark.parametrize(
        "attack",
        [
            PEERS_PGD,
            partial(torchattacks.MIFGSM, eps=EPS, steps=2),
            partial(torchattacks.FGSM, eps=EPS),
            partial(torchattacks.Square, eps=0.01, n_queries=3),
        ],
        ids=["PGD", "MIFGSM", "FGSM", "Square"],
    )
    def test_is_left_as_it_is(self, attack, method, satisfied):
        loss_func, spy = self.by(satisfied, attack, method())
        assert loss_func.num_perturbed == len(spy.plan.rows) > 0
        assert loss_func.perturbation_linf == loss_func.share_score_rose == loss_func.loss_after == 0
        spy.loss.backward()
        assert satisfied[0][1].weight.grad.eq(0).all()

    def test_a_random_start_moves_it(self, satisfied):
        loss_func, _ = self.by(satisfied, partial(torchattacks.PGD, eps=EPS, alpha=ALPHA, steps=STEPS), AMD())
        assert 0 < loss_func.perturbation_linf <= EPS + 1e-6

    def test_without_hinge_it_moves(self, satisfied):
        loss_func, _ = self.by(satisfied, PEERS_PGD, AMD("hardness"))
        assert loss_func.share_score_rose == 1
        assert loss_func.perturbation_linf == pytest.approx(EPS)

    def test_without_the_method_the_attack_is_held_to_have_failed(self, satisfied):
        class RaisesTheLoss:
            @hookimpl
            def pml_adversarial_score(self, wrapped, batch, plan):
                return lambda embeddings: plan.evaluate(wrapped, batch, embeddings)

        with pytest.raises(AttackError, match="changed none"):
            self.by(satisfied, PEERS_PGD, RaisesTheLoss())

    def test_satisfied_triplets_stay_beside_violated_ones(self, model, images, labels):
        _, spy = step(model, images, labels, AMD(tuples_per_anchor=1), tuples=ONE_PER_ANCHOR)
        clean = model(images)
        violated = [
            distance(clean[a], clean[p]) - distance(clean[a], clean[n]) + MARGIN > 0
            for a, p, n in zip(*ONE_PER_ANCHOR, strict=True)
        ]
        assert 0 < sum(violated) < 5
        moved = (spy.adversarial.inputs != images[spy.plan.rows]).flatten(1).any(1)
        assert moved.tolist() == violated * 3

    def test_a_batch_without_tuples_is_a_plain_step(self, model, images):
        loss_func, _ = step(model, images, torch.arange(8), AMD())
        assert loss_func.num_perturbed == 0


class TestAnAttackThatFails:
    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (lambda inputs: inputs, "changed none of 8"),
            (lambda inputs: inputs + 2, "values from"),
            (lambda inputs: inputs[:3], "expected inputs of the shape"),
        ],
    )
    def test_is_said_to(self, returned, message, model, images, labels):
        class Broken:
            def __init__(self, objective):
                pass

            def __call__(self, inputs, labels):
                return returned(inputs)

        with pytest.raises(AttackError, match=f"Broken.*{message}"):
            step(model, images, labels, AMD(), attack=Broken)

    def test_a_budget_of_zero_is_none(self, model, images, labels):
        loss_func, spy = step(model, images, labels, AMD(), attack=partial(torchattacks.PGD, eps=0))
        assert loss_func.perturbation_linf == 0
        assert spy.loss.item() == pytest.approx(hinge_loss()(model(images), labels).item(), abs=1e-6)


class TestAround:
    def test_leaves_no_trace(self, moody_model, images, labels):
        loss = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 16)
        loss_func = seed_paper_loss(loss, moody_model, attack=PEERS_PGD, plugins=[AMD()])
        embeddings = moody_model(images)
        before, state = copy.deepcopy(moody_model.state_dict()), torch.get_rng_state()
        loss_func.adversary.perturb_only(loss, loss_func.adversary.collate(embeddings, labels, None))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], value) for name, value in moody_model.state_dict().items())
        assert all(module.training for module in moody_model.modules())
        assert all(parameter.grad is None for parameter in moody_model.parameters())
        assert loss.queue_idx == 0

    def test_a_memory_does_not_remember_the_attack(self, model, images, labels):
        loss = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 64)
        _, spy = step(model, images, labels, AMD(), loss=loss)
        copies = torch.randn(8, 4)
        assert spy.score(copies) == spy.score(copies)
        assert loss.queue_idx == 8  # the training loss's own

    def test_in_mixed_precision(self, model, images, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_func, spy = step(model, images, labels, AMD("hardness"))
        assert spy.score(spy.batch.context).dtype == torch.float32
        assert loss_func.share_score_rose == 1

    def test_coinciding_embeddings_have_a_finite_gradient(self, model, images, labels):
        _, spy = step(model, images, labels, AMD("hardness"))
        copies = torch.ones(8, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(spy.score(copies), copies)
        assert gradient.isfinite().all()

    def test_the_clean_loss_can_be_added(self, model, images, labels):
        _, alone = step(model, images, labels, AMD())
        _, both = step(model, images, labels, AMD(), clean_weight=0.5)
        expected = alone.loss + 0.5 * hinge_loss()(model(images), labels)
        torch.testing.assert_close(both.loss, expected)

    def test_beside_another_training_loss(self, model, images, labels):
        loss_func, spy = step(model, images, labels, AMD(), SES(weight=2.0))
        shifts = [distance(one, other) for one, other in zip(spy.adversarial.embeddings, model(images), strict=True)]
        expected = hinge_loss()(model(images), labels).item() + 2 * sum(shifts) / 8
        assert spy.loss.item() == pytest.approx(expected, abs=1e-5)
        assert loss_func.loss_after > loss_func.loss_before

    def test_two_views(self, model, images):
        loss = losses.SelfSupervisedLoss(losses.TripletMarginLoss())
        loss_func = seed_paper_loss(loss, model, attack=PEERS_PGD, plugins=[AMD()])
        loss_func(model(images), model((images + 0.05).clamp(0, 1)))
        assert loss_func.num_perturbed == 16
        assert loss_func.loss_after > loss_func.loss_before

    def test_copies_and_saved_states(self, model, images, labels):
        loss_func = seed_paper_loss(hinge_loss(), model, attack=PEERS_PGD, plugins=[AMD()], seed=0)
        other = copy.deepcopy(loss_func)
        other.load_state_dict(loss_func.state_dict())
        other.watch(model)
        embeddings = model(images)
        assert other(embeddings, labels) == loss_func(embeddings, labels)


class TestRefusals:
    @pytest.mark.parametrize("method", [AMD, RAMD])
    def test_miners(self, method, model, images, labels):
        miner = AdversarialMiner(miners.TripletMarginMiner(), model, plugins=[method()])
        with pytest.raises(
            PlanError, match=rf"{method.__name__} raises.*TripletMarginMiner is a miner.*AdversarialLoss"
        ):
            miner(model(images), labels)

    @pytest.mark.parametrize("method", [AMD, RAMD])
    def test_a_reference_with_unknown_inputs(self, method, model, images, labels):
        loss_func = seed_paper_loss(losses.ContrastiveLoss(), model, plugins=[method()])
        with pytest.raises(PlanError, match=rf"{method.__name__} perturbs.*ref_emb"):
            loss_func(model(images), labels, None, torch.randn(8, 4), labels.clone())

    def test_hardness_without_labels(self, model, images):
        loss_func = seed_paper_loss(losses.VICRegLoss(), model, plugins=[AMD("hardness")])
        views = model(images), model(images.flip(3))
        with pytest.raises(PlanError, match="neither labels nor tuples"):
            loss_func(views[0], ref_emb=views[1])

    def test_copies_of_their_own_where_the_loss_cannot_have_them(self, model, images, labels):
        with pytest.raises(PlanError, match="tuples_per_anchor"):
            step(model, images, labels, AMD(tuples_per_anchor=1), loss=losses.NCALoss())

    @pytest.mark.parametrize("raises", ["hinge", None, 1])
    def test_what_to_raise(self, raises):
        with pytest.raises(InputError, match=r"raises=.*expected 'loss' or 'hardness'"):
            AMD(raises)

    @pytest.mark.parametrize("number", [0, -1, 1.5])
    def test_tuples_per_anchor(self, number):
        with pytest.raises(PlanError, match="tuples_per_anchor="):
            RAMD(tuples_per_anchor=number)
