import copy
import io
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torchattacks
from one_step import LOSSES
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.reducers import MeanReducer
from seed_paper import seed_paper_loss
from torch import nn

from pml_adversarial import AdversarialMiner, Batch, InputError, Plan, PlanError, hookimpl
from pml_adversarial.defenses.tride import TRIDE, weighted_mean
from pml_adversarial.defenses.triplets import sample_triplets

PGD = partial(torchattacks.PGD, eps=7.7 / 255, alpha=0.3 / 255, steps=16, random_start=False)  # 16 alpha < eps
TRIPLET = partial(losses.TripletMarginLoss, margin=0.2, reducer=MeanReducer())
TRIPLETS = torch.tensor([0, 2, 4, 1, 0]), torch.tensor([1, 3, 5, 0, 1]), torch.tensor([2, 7, 0, 4, 6])


class Spy:
    """Remembers a step."""

    @hookimpl
    def pml_adversarial_record(self, batch, plan, adversarial):
        self.batch, self.plan, self.adversarial = batch, plan, adversarial
        return {}


def apart(left, right):
    """The distance of two vectors at unit length, as torch's pairwise_distance has it: 1e-6 is added."""
    left, right = left / left.norm(), right / right.norm()
    return sum((x - y + 1e-6) ** 2 for x, y in zip(left, right, strict=True)).sqrt()


def weighted(distances, sharpness=10.0):
    top = max(distances)
    weights = [torch.exp(sharpness * (d - top)) for d in distances]
    return sum(w * d for w, d in zip(weights, distances, strict=True)) / sum(weights)


def smallest_half(distances):
    kept = sorted(distances)[: max(1, len(distances) // 2)]
    return sum(kept) / len(kept)


def hinge(value):
    return value if value > 0 else value * 0


def published(anchors, positives, negatives, clean_anchors, sharpness=10.0, margin=0.04):
    """Both objectives and the term of the loss, by loops over the triplets."""
    to_positive = [apart(a, p) for a, p in zip(anchors, positives, strict=True)]
    to_negative = [apart(a, n) for a, n in zip(anchors, negatives, strict=True)]
    shifts = [apart(a, c) for a, c in zip(anchors, clean_anchors, strict=True)]
    further, nearer = weighted(to_positive, sharpness), weighted(to_negative, sharpness)
    gamma = math.exp(-max(0.0, (nearer - further).item()))
    pull = hinge(smallest_half(to_negative) - sum(shifts) / len(shifts))
    return {
        "candidates": hinge(nearer - further),
        "anchor": hinge(further - nearer) + gamma * pull,
        "collapseness": further - nearer,
        "term": hinge(smallest_half(to_positive) - smallest_half(to_negative) + margin),
    }


def batch_of(embeddings, labels=None, tuples=None, strength=1.0):
    inputs = torch.rand(len(embeddings), 1, 2, 2)
    return Batch(inputs, embeddings, embeddings.detach(), labels, tuples, len(embeddings), strength)


def collapsed(count=8):
    """Embeddings in which positives are further than negatives."""
    torch.manual_seed(3)
    centre = torch.randn(5)
    rows = centre + 0.3 * torch.randn(count, 5)
    rows[1::2] -= 1.5 * centre  # the positives of the pairs
    return rows


def objective_of(tride, plan, batch):
    return tride.pml_adversarial_score(batch, plan)


@pytest.fixture
def images():
    """Two images around each of four patterns."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.rand(4, 1, 6, 6, generator=generator) * 0.8 + 0.1
    return (patterns[torch.arange(8) // 2] + 0.1 * torch.randn(8, 1, 6, 6, generator=generator)).clamp(0.05, 0.95)


@pytest.fixture
def network():
    """Spreads the images over the sphere, in five dimensions; the same in train and in eval mode."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 5))
    with torch.no_grad():
        network[1].weight.mul_(3)
        network[1].bias.copy_(-0.5 * network[1].weight.sum(1))
    return network


def step(model, images, labels, tride, tuples=None, loss=None, attack=PGD, warmup=0, steps=0):
    """One training step, and what it did."""
    spy = Spy()
    loss_func = seed_paper_loss(loss or TRIPLET(), model, attack=attack, plugins=[tride, spy], warmup=warmup)
    loss_func.adversary.step = steps
    value = loss_func(model(images), labels, tuples)
    return loss_func, value, spy


# Who is perturbed


def test_candidates_and_anchors_in_turn(network, images, labels):
    spy, tride = Spy(), TRIDE()
    loss_func = seed_paper_loss(TRIPLET(), network, attack=PGD, plugins=[tride, spy])
    anchors, positives, negatives = TRIPLETS
    for turn in ("candidates", "anchor", "candidates", "anchor"):
        assert tride.perturbs == turn
        loss_func(network(images), labels, TRIPLETS)
        expected = torch.cat([positives, negatives]) if turn == "candidates" else anchors
        assert spy.plan.rows.tolist() == expected.tolist()  # one copy per triplet, though anchor 0 stands in two
        assert loss_func.anchors_perturbed == (turn == "anchor")
        stand = [spy.plan.pool_indices[member].tolist() for member in spy.plan.indices_tuple]
        copies = [list(range(8, 13)), list(range(13, 18))]
        if turn == "candidates":
            assert stand == [anchors.tolist(), *copies]
        else:
            assert stand == [copies[0], positives.tolist(), negatives.tolist()]


def test_the_first_turn_is_an_option():
    tride = TRIDE(first="anchor")
    assert tride.perturbs == "anchor"
    tride.steps = 1
    assert tride.perturbs == "candidates"


# What is raised


@pytest.mark.parametrize("turn", ["candidates", "anchor"])
@pytest.mark.parametrize("make", [lambda: torch.randn(8, 5), collapsed], ids=["random", "collapsed"])
def test_score_is_the_published_objective_with_its_gradient(turn, make):
    clean = make()
    batch = batch_of(clean, tuples=TRIPLETS)
    tride = TRIDE(first=turn)
    plan = tride.pml_adversarial_plan(TRIPLET(), batch)
    copies = (clean[plan.rows] + 0.1 * torch.randn(len(plan), 5)).requires_grad_()
    score = objective_of(tride, plan, batch)(copies)
    anchors, positives, negatives = TRIPLETS
    if turn == "candidates":
        members = clean[anchors], copies[:5], copies[5:]
    else:
        members = copies, clean[positives], clean[negatives]
    expected = published(*members, clean[anchors])[turn]
    torch.testing.assert_close(score, -expected)
    (gradient,) = torch.autograd.grad(score, copies)
    if expected.item() == 0:
        assert not gradient.any()  # the hinge is dead, as published
    else:
        (of_expected,) = torch.autograd.grad(-expected, copies)
        torch.testing.assert_close(gradient, of_expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("turn", ["candidates", "anchor"])
def test_below_the_tolerance_the_score_has_its_value_and_no_gradient(turn):
    batch = batch_of(_random(), tuples=TRIPLETS)
    found = []
    for tolerance in (0, 1.9):
        tride = TRIDE(first=turn, tolerance=tolerance)
        plan = tride.pml_adversarial_plan(TRIPLET(), batch)
        copies = batch.context[plan.rows].requires_grad_()
        score = objective_of(tride, plan, batch)(copies)
        found.append((score.item(), torch.autograd.grad(score, copies)[0].any().item()))
    assert found == [(pytest.approx(found[1][0]), True), (found[0][0], False)]
    assert found[0][0] < 0


def test_the_two_batches_have_each_objective_alive_and_the_candidates_dead_once():
    anchors, positives, negatives = TRIPLETS
    found = [
        published(rows[anchors], rows[positives], rows[negatives], rows[anchors]) for rows in (_random(), collapsed())
    ]
    assert found[0]["collapseness"] < 0 < found[0]["candidates"]
    assert found[1]["collapseness"] > 0 == found[1]["candidates"]


def _random():
    torch.manual_seed(0)
    return torch.randn(8, 5)


@pytest.mark.parametrize("sharpness", [0.0, 2.0, 10.0])
def test_weighted_mean(sharpness):
    distances = torch.rand(7, requires_grad=True)
    found, expected = weighted_mean(distances, sharpness), weighted(list(distances), sharpness)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, distances)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)
    if not sharpness:
        torch.testing.assert_close(found, distances.mean())


def test_finite_at_zero_distance_and_with_one_triplet():
    rows = torch.ones(8, 5)
    for first in ("candidates", "anchor"):
        tride = TRIDE(first=first)
        batch = batch_of(rows, tuples=tuple(torch.tensor([i]) for i in (0, 1, 2)))
        plan = tride.pml_adversarial_plan(TRIPLET(), batch)
        copies = rows[plan.rows].requires_grad_()
        score = objective_of(tride, plan, batch)(copies)
        assert torch.isfinite(score)
        assert torch.isfinite(torch.autograd.grad(score, copies)[0]).all()


def test_scores_of_half_precision_are_taken_in_single(images):
    rows = torch.randn(8, 5)
    tride = TRIDE()
    batch = batch_of(rows.bfloat16(), tuples=TRIPLETS)
    plan = tride.pml_adversarial_plan(TRIPLET(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective_of(tride, plan, batch)(batch.context[plan.rows])
    wide = replace(batch, context=batch.context.float())
    expected = objective_of(tride, plan, wide)(wide.context[plan.rows])
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# What the attack does


def collapseness(spy, copies, sharpness=10.0):
    """Of the triplets of a step, with other embeddings of the copies."""
    members = spy.plan.members(spy.batch.embeddings.detach(), copies.detach())
    return published(*members, members[0], sharpness)["collapseness"].item()


def test_perturbed_candidates_raise_the_collapseness(network, images, labels):
    tuples = miners.TripletMarginMiner(margin=0.4, type_of_triplets="semihard")(network(images), labels)
    _, _, spy = step(network, images, labels, TRIDE(), tuples)
    before = collapseness(spy, spy.batch.embeddings[spy.plan.rows])
    after = collapseness(spy, spy.adversarial.embeddings)
    assert before < -0.2
    assert after > before + 0.05


def test_perturbed_anchors_lower_the_collapseness_of_a_collapsed_batch(network, images, labels):
    wrong = _wrong_triplets(network(images).detach(), labels)
    _, _, spy = step(network, images, labels, TRIDE(first="anchor", pull=0), wrong)
    before = collapseness(spy, spy.batch.embeddings[spy.plan.rows])
    after = collapseness(spy, spy.adversarial.embeddings)
    assert before > 0.1
    assert after < before - 0.05


def test_perturbed_anchors_leave_where_they_were_for_their_negatives(network, images, labels):
    tuples = miners.TripletMarginMiner(margin=0.4, type_of_triplets="semihard")(network(images), labels)
    _, _, spy = step(network, images, labels, TRIDE(first="anchor"), tuples)
    clean = spy.batch.embeddings.detach()
    before = spy.plan.members(clean, clean[spy.plan.rows])
    after = spy.plan.members(clean, spy.adversarial.embeddings.detach())

    def nearest(members):
        return smallest_half([apart(a, n) for a, n in zip(members[0], members[2], strict=True)])

    shift = sum(apart(a, c) for a, c in zip(after[0], before[0], strict=True)) / len(after[0])
    assert nearest(after) < nearest(before) - 0.05
    assert shift > 0.05


def _wrong_triplets(embeddings, labels):
    """The nearest negative of every row, and its positive."""
    negatives = []
    for a in range(8):
        others = [j for j in range(8) if labels[j] != labels[a]]
        negatives.append(min(others, key=lambda j, a=a: apart(embeddings[a], embeddings[j]).item()))
    return torch.arange(8), torch.arange(8) ^ 1, torch.tensor(negatives)


def by_hand(model, images, triplets, turn, eps, alpha):
    """The published loop: 16 sign steps within eps, left once the objective is below 1e-5."""
    anchors, positives, negatives = triplets
    origin = images[torch.cat([positives, negatives]) if turn == "candidates" else anchors]
    clean = model(images).detach()
    moved = origin.clone()
    for _ in range(16):
        moved.requires_grad_()
        copies = model(moved)
        if turn == "candidates":
            members = clean[anchors], *copies.split(len(anchors))
        else:
            members = copies, clean[positives], clean[negatives]
        objective = published(*members, clean[anchors])[turn]
        if objective < 1e-5:
            break
        (gradient,) = torch.autograd.grad(objective, moved)
        moved = moved.detach() - alpha * gradient.sign()
        moved = torch.min(torch.max(moved, origin - eps), origin + eps).clamp(0, 1).detach()
    return moved.detach()


def keeps_its_eps(model, eps=0.8 / 255, alpha=0.1 / 255):
    """An attack whose step grows with the strength, and whose eps does not."""
    return torchattacks.PGD(model, eps=0.8 / 255, alpha=alpha, steps=16, random_start=False)


SMALL = partial(torchattacks.PGD, eps=0.8 / 255, alpha=0.1 / 255, steps=16, random_start=False)


@pytest.mark.parametrize("turn", ["candidates", "anchor"])
@pytest.mark.parametrize(
    ("attack", "eps", "alpha", "epoch", "same"),
    [
        (PGD, 7.7, 0.3, 1, True),
        (PGD, 7.7, 0.3, 3, True),
        (SMALL, 0.8, 0.1, 4, True),
        (SMALL, 0.8, 0.1, 2, False),
        (keeps_its_eps, 0.8, 0.1, 2, True),
        (keeps_its_eps, 0.8, 0.1, 3, True),
    ],
)
def test_attack_is_the_published_loop_wherever_the_schedules_agree(
    turn, attack, eps, alpha, epoch, same, network, images, labels
):
    tuples = miners.TripletMarginMiner(margin=0.4, type_of_triplets="semihard")(network(images), labels)
    _, _, spy = step(network, images, labels, TRIDE(first=turn), tuples, attack=attack, warmup=4, steps=epoch)
    expected = by_hand(network, images, tuples, turn, eps / 255, alpha / 255 * epoch / 4)
    agree = ((spy.adversarial.inputs - expected).abs() < 1e-6).float().mean().item()
    if same:
        assert agree > 0.99  # a gradient of about 0 may have either sign
    else:
        assert agree < 0.9
        assert (spy.adversarial.inputs - images[spy.plan.rows]).abs().max() <= eps / 255 * epoch / 4 + 1e-6
        assert (expected - images[spy.plan.rows]).abs().max() > eps / 255 * epoch / 4 + 1e-3


def test_stays_where_the_objective_is_satisfied(network, images, labels):
    triplets = tuple(member[:1] for member in _wrong_triplets(network(images).detach(), labels))
    triplets = triplets[0], triplets[2], triplets[1]  # the near one as the positive: soon satisfied
    attack = partial(PGD, eps=77 / 255, alpha=3 / 255)
    _, _, spy = step(network, images, labels, TRIDE(), triplets, attack=attack)
    expected = by_hand(network, images, triplets, "candidates", 77 / 255, 3 / 255)
    moved = (expected - images[spy.plan.rows]).abs().max()
    assert 3 / 255 <= moved < 15.5 * 3 / 255  # left early
    torch.testing.assert_close(spy.adversarial.inputs, expected)
    assert spy.adversarial.score_after.abs().max() < 1e-5


def test_satisfied_from_the_start_trains_on_the_clean_triplets(network, images, labels):
    wrong = _wrong_triplets(network(images).detach(), labels)
    loss_func, value, spy = step(network, images, labels, TRIDE(), wrong)
    assert loss_func.perturbation_linf == 0
    assert loss_func.collapseness_before == loss_func.collapseness_after > 0
    clean = network(images)
    members = [clean[member] for member in wrong]
    expected = TRIPLET()(clean, labels, wrong) + 0.5 * published(*members, members[0])["term"]
    torch.testing.assert_close(value, expected)
    assert spy.adversarial.seconds == 0


def test_another_score_is_raised_though_ours_would_be_satisfied(network, images, labels):
    class Shift:
        @hookimpl
        def pml_adversarial_score(self, batch, plan):
            return lambda embeddings: (embeddings - batch.context[plan.rows] + 0.1).norm(dim=1)

    wrong = _wrong_triplets(network(images).detach(), labels)
    loss_func = seed_paper_loss(TRIPLET(), network, attack=PGD, plugins=[Shift(), TRIDE()])
    loss_func(network(images), labels, wrong)
    assert loss_func.perturbation_linf > 0.01


# The schedule


def test_strength_0_perturbs_nobody_and_the_last_step_almost_all(network, images, labels):
    tride = TRIDE()
    loss_func = seed_paper_loss(TRIPLET(), network, attack=PGD, plugins=[tride], warmup=4)
    found = []
    for _ in range(5):
        loss_func(network(images), labels, TRIPLETS)
        found.append(loss_func.perturbation_linf)
    assert found == pytest.approx([16 * 0.3 / 255 * share for share in (0, 0.25, 0.5, 0.75, 1)], abs=1e-6)
    assert max(found) < 7.7 / 255


@pytest.mark.parametrize(("strength", "margin"), [(0.0, 0.2), (0.5, 0.1125), (1.0, 0.05)])
def test_the_mining_margin_shrinks(strength, margin, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "pml_adversarial.defenses.triplets.sample_triplets",
        lambda kind, batch, margin, anchors: seen.append(margin) or sample_triplets(kind, batch, margin, anchors),
    )
    batch = batch_of(torch.randn(8, 5), torch.arange(8) // 2, strength=strength)
    TRIDE().pml_adversarial_plan(TRIPLET(), batch)
    TRIDE(mining_margin=1.0, mining_shrinkage=0.0).pml_adversarial_plan(TRIPLET(), batch)
    assert seen == pytest.approx([margin, 1.0])


# Mining


def eligible(embeddings, labels, anchor, positive, margin):
    """Which rows may be the negative, by loops."""
    others = [j for j in range(len(labels)) if labels[j] != labels[anchor]]
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    reach = (unit[anchor] - unit[positive]).norm()
    semi_hard = [j for j in others if reach < (unit[anchor] - unit[j]).norm() < reach + margin]
    return semi_hard or others


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("of_a_class", [None, 1])
def test_negatives_are_semi_hard_within_the_margin_of_the_strength(of_a_class, strength, labels):
    batch = batch_of(torch.randn(8, 3), labels, strength=strength)
    tride = TRIDE(first="anchor", mining_margin=0.8, anchors_per_class=of_a_class)
    drawn = {}
    for _ in range(100):
        plan = tride.pml_adversarial_plan(TRIPLET(), batch)
        members = plan.members(torch.arange(8)[:, None], plan.rows[:, None])
        assert len(plan) == (8 if of_a_class is None else 4)
        for a, p, n in zip(*(member.flatten().tolist() for member in members), strict=True):
            assert p == a ^ 1
            drawn.setdefault(a, set()).add(n)
    assert sorted(drawn) == list(range(8))
    for a, negatives in drawn.items():
        assert negatives == set(eligible(batch.context, labels, a, a ^ 1, 0.8 if strength == 0 else 0.2))


def test_a_batch_without_triplets_is_a_plain_step(network, images):
    tride = TRIDE()
    alone = torch.arange(8)
    loss_func = seed_paper_loss(losses.ContrastiveLoss(), network, attack=PGD, plugins=[tride])
    assert loss_func(network(images), alone).item() == losses.ContrastiveLoss()(network(images), alone).item()
    assert tride.steps == loss_func.num_perturbed == 0


# What is trained


@pytest.mark.parametrize("turn", ["candidates", "anchor"])
def test_training_loss_by_loops_with_its_gradient(turn, network, images, labels):
    _, value, spy = step(network, images, labels, TRIDE(first=turn, margin=1.0), TRIPLETS)
    gradient = torch.autograd.grad(value, list(network.parameters()))
    clean, copies = network(images), network(spy.adversarial.inputs)
    anchors, positives, negatives = TRIPLETS
    if turn == "candidates":
        members = clean[anchors], copies[:5], copies[5:]
    else:
        members = copies, clean[positives], clean[negatives]
    hinges = [hinge(apart(a, p) - apart(a, n) + 0.2) for a, p, n in zip(*members, strict=True)]
    term = published(*members, members[0], margin=1.0)["term"]
    assert term > 0
    expected = sum(hinges) / 5 + 0.5 * term
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
    for found, wanted in zip(gradient, torch.autograd.grad(expected, list(network.parameters())), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


def test_the_term_is_hinged_and_its_options_are_used(network, images, labels):
    def of(**options):
        _, value, spy = step(network, images, labels, TRIDE(**options), TRIPLETS)
        return value.item(), spy

    plain, spy = of(weight=0)
    members = spy.plan.members(network(images), network(spy.adversarial.inputs))
    to_positive = sorted(apart(a, p).item() for a, p in zip(members[0], members[1], strict=True))
    to_negative = sorted(apart(a, n).item() for a, n in zip(members[0], members[2], strict=True))
    gap = sum(to_positive[:4]) / 4 - sum(to_negative[:4]) / 4
    assert of(weight=2, margin=1.5, smallest=0.8)[0] == pytest.approx(plain + 2 * (gap + 1.5), abs=1e-5)
    near = torch.tensor([[1.0, 0], [1, 0.1], [-1, 0]])
    class_of = torch.tensor([0, 0, 1])
    easy = batch_of(near, class_of, tuple(torch.tensor([i]) for i in (0, 1, 2)))
    tride = TRIDE(weight=7)
    plan = tride.pml_adversarial_plan(TRIPLET(), easy)

    class Adversarial:
        embeddings = near[plan.rows]

    wrapper = tride.pml_adversarial_training_loss(easy, plan, Adversarial)
    next(wrapper)
    with pytest.raises(StopIteration) as stopped:
        wrapper.send(torch.tensor(3.0))
    assert stopped.value.value.item() == 3


def test_records_are_the_collapseness_before_and_after(network, images, labels):
    loss_func, _, spy = step(network, images, labels, TRIDE(sharpness=2.0), TRIPLETS)
    before = collapseness(spy, spy.batch.embeddings[spy.plan.rows], sharpness=2.0)
    after = collapseness(spy, spy.adversarial.embeddings, sharpness=2.0)
    assert loss_func.collapseness_before == pytest.approx(before, abs=1e-5)
    assert loss_func.collapseness_after == pytest.approx(after, abs=1e-5)
    assert before < after


# State and trace


def test_a_resumed_run_goes_on_with_the_same_turn(network, images, labels):
    def made():
        return seed_paper_loss(TRIPLET(), network, attack=PGD, plugins=[TRIDE()], warmup=6, seed=1)

    unbroken = made()
    for _ in range(3):
        unbroken(network(images), labels)
    saved = io.BytesIO()
    torch.save(unbroken.state_dict(), saved)
    saved.seek(0)
    resumed = made()
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    copied = copy.deepcopy(unbroken)
    for _ in range(2):
        expected = unbroken(network(images), labels).item()
        assert resumed(network(images), labels).item() == copied(network(images), labels).item() == expected
        assert resumed.anchors_perturbed == unbroken.anchors_perturbed


def test_a_step_that_failed_is_taken_again(network, images, labels):
    class Fails:
        fails = True

        @hookimpl(wrapper=True)
        def pml_adversarial_training_loss(self):
            loss = yield
            if self.fails:
                raise RuntimeError("out of memory")
            return loss

    tride, fails = TRIDE(), Fails()
    loss_func = seed_paper_loss(TRIPLET(), network, attack=PGD, plugins=[tride, fails])
    with pytest.raises(RuntimeError):
        loss_func(network(images), labels)
    assert tride.steps == 0
    fails.fails = False
    loss_func(network(images), labels)
    assert tride.steps == 1


@pytest.mark.parametrize("turn", ["candidates", "anchor"])
def test_leaves_no_trace_but_the_passes_that_are_trained_on(turn, moody_model, images, labels):
    loss_func = seed_paper_loss(TRIPLET(), moody_model, attack=PGD, plugins=[TRIDE(first=turn)], seed=0)
    weights = copy.deepcopy(dict(moody_model.named_parameters()))
    embeddings = moody_model(images)
    passes = moody_model[1].num_batches_tracked.item()
    loss_func(embeddings, labels)
    assert moody_model[1].num_batches_tracked == passes + 1
    assert all(m.training for m in moody_model.modules())
    for name, parameter in moody_model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert torch.equal(parameter, weights[name])


def test_the_callers_random_numbers_do_not_depend_on_the_mining(network, images, labels):
    loss_func = seed_paper_loss(TRIPLET(), network, attack=PGD, plugins=[TRIDE()], seed=0)
    embeddings = network(images)
    state = torch.get_rng_state()
    loss_func(embeddings, labels)
    assert torch.equal(torch.get_rng_state(), state)


# With others


class Penalty:
    """Adds a number to what is optimised."""

    @hookimpl(wrapper=True)
    def pml_adversarial_training_loss(self):
        loss = yield
        return loss + 10


@pytest.mark.parametrize("first", [True, False])
def test_adds_to_what_others_add(first, network, images, labels):
    alone = step(network, images, labels, TRIDE(), TRIPLETS)[1].item()
    plugins = [Penalty(), TRIDE()] if first else [TRIDE(), Penalty()]
    both = seed_paper_loss(TRIPLET(), network, attack=PGD, plugins=plugins)(network(images), labels, TRIPLETS)
    assert both.item() == pytest.approx(alone + 10, abs=1e-5)


class OwnPlan:
    def __init__(self, plan):
        self.plan = plan

    @hookimpl
    def pml_adversarial_plan(self):
        return self.plan


def test_refuses_plans_of_others_without_triplets(network, images, labels):
    rows = torch.arange(8)
    pairs = tuple(torch.tensor(member) for member in ([0], [1], [0], [2]))
    for tuples, message in ((pairs, "Name the method on triplets before"), (None, "has no tuples")):
        plan = Plan(rows, rows + 8, tuples)
        loss_func = seed_paper_loss(TRIPLET(), network, attack=PGD, plugins=[OwnPlan(plan), TRIDE()])
        with pytest.raises(PlanError, match=message):
            loss_func(network(images), labels)


def test_takes_a_plan_of_others_with_triplets(network, images, labels):
    rows = torch.arange(8)
    plan = Plan(rows, rows + 8, TRIPLETS)
    loss_func = seed_paper_loss(TRIPLET(), network, attack=PGD, plugins=[OwnPlan(plan), TRIDE()])
    loss_func(network(images), labels).backward()
    assert loss_func.num_perturbed == 8
    assert loss_func.collapseness_after > loss_func.collapseness_before


ALL = LOSSES | {"triplets": partial(losses.TripletMarginLoss, margin=1.0)}  # above 0 though images of a class are alike
TUPLES = {
    "none": lambda embeddings, labels: None,
    "triplets": lambda embeddings, labels: TRIPLETS,
    "pairs": lambda embeddings, labels: miners.MultiSimilarityMiner(epsilon=9)(embeddings, labels),  # all pairs
}


@pytest.mark.parametrize("tuples", TUPLES.values(), ids=TUPLES)
@pytest.mark.parametrize("name", ALL)
def test_trains_with_losses_and_tuples(name, tuples, model, images, labels):
    loss_func = seed_paper_loss(ALL[name](), model, attack=PGD, plugins=[TRIDE()])
    for _ in range(2):
        embeddings = model(images)
        value = loss_func(embeddings, labels, tuples(embeddings, labels))
        model.zero_grad()
        value.backward()
        assert value > 0
        assert loss_func.perturbation_linf > 0.01
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("turn", ["candidates", "anchor"])
def test_triplets_reach_into_a_reference(turn, network, images, labels):
    spy = Spy()
    loss_func = seed_paper_loss(TRIPLET(), network, attack=PGD, plugins=[TRIDE(first=turn), spy])
    others = images.flip(0)
    value = loss_func(network(images), labels, None, network(others), labels.flip(0))
    clean, copies = network(torch.cat([images, others])), network(spy.adversarial.inputs)
    anchors, positives, negatives = spy.plan.members(clean, copies)
    rows = [member.flatten() for member in spy.plan.members(torch.arange(16)[:, None], spy.plan.rows[:, None])]
    of_row = torch.cat([labels, labels.flip(0)])
    assert rows[0].tolist() == list(range(8))
    assert rows[1].min() >= 8 <= rows[2].min()
    assert torch.equal(of_row[rows[0]], of_row[rows[1]])
    assert (of_row[rows[0]] != of_row[rows[2]]).all()
    triplet = sum(hinge(apart(a, p) - apart(a, n) + 0.2) for a, p, n in zip(anchors, positives, negatives, strict=True))
    expected = triplet / 8 + 0.5 * published(anchors, positives, negatives, anchors)["term"]
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


def test_a_loss_of_two_views_refuses_it(network, images):
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss())
    loss_func = seed_paper_loss(loss, network, attack=PGD, plugins=[TRIDE()])
    with pytest.raises(PlanError, match="no plugin that plans with triplets"):
        loss_func(network(images), network(images))


def test_refuses_batches_without_labels_and_tuples():
    with pytest.raises(PlanError, match="no labels to draw triplets by"):
        TRIDE().pml_adversarial_plan(TRIPLET(), batch_of(torch.randn(8, 5)))


def test_a_miner_refuses_it(network, images, labels):
    miner = AdversarialMiner(miners.BatchHardMiner(), network, attack=PGD, plugins=[TRIDE()])
    with pytest.raises(PlanError, match="replaces rows in place"):
        miner(network(images), labels)


@pytest.mark.parametrize(
    "name",
    ["sharpness", "pull", "smallest", "weight", "margin", "mining_margin", "mining_shrinkage", "tolerance"],
)
@pytest.mark.parametrize("value", [-0.1, "1", None, True, math.nan, math.inf])
def test_options_are_checked(name, value):
    with pytest.raises(InputError, match=f"{name}=.*expected a number from 0"):
        TRIDE(**{name: value})


def test_shares_are_at_most_1_and_turns_have_names():
    for name in ("smallest", "mining_shrinkage"):
        with pytest.raises(InputError, match="from 0 to 1"):
            TRIDE(**{name: 1.5})
    with pytest.raises(InputError, match="'candidates' or 'anchor'"):
        TRIDE(first="positive")
    with pytest.raises(InputError, match="'candidates' or 'anchor'"):
        TRIDE(first=["anchor"])
    with pytest.raises(InputError, match="anchors_per_class=0"):
        TRIDE(anchors_per_class=0)


def test_the_last_digits_of_the_published_defaults():
    tride = TRIDE()
    found = (tride.sharpness, tride.smallest, tride.weight, tride.margin, tride.mining_margin, tride.tolerance)
    assert found == (10, 0.5, 0.5, 0.04, 0.2, 1e-5)
    assert (tride.pull, tride.mining_shrinkage, tride.first) == (1, 0.5, "candidates")
