"""Intra-class structure, against its formula in plain loops."""

import math
from functools import partial

import pytest
import torch
import torchattacks
from one_step import LOSSES
from pytorch_metric_learning import losses, miners
from seed_paper import seed_paper_loss

from pml_adversarial import AdversarialMiner, InputError, PlanError, PluginError, hookimpl
from pml_adversarial.defenses.act import ACT
from pml_adversarial.defenses.hm import HM
from pml_adversarial.defenses.ics import ICS

PGD = partial(torchattacks.PGD, eps=0.2, alpha=0.05, steps=6, random_start=False)
TRIPLETS = tuple(torch.tensor(m) for m in ([0, 0, 2, 5], [1, 1, 3, 4], [2, 7, 0, 1]))


def euclidean(left, right):
    left, right = left / left.square().sum().sqrt(), right / right.square().sum().sqrt()
    return (left - right).square().sum().sqrt()


class Zero:
    """Leaves nothing but what is added."""

    @hookimpl
    def pml_adversarial_training_loss(self, adversarial):
        self.inputs = adversarial.inputs
        return 0 * adversarial.embeddings.sum()


def term(model, images, pairs):
    """The term by loops: for each (anchor, positive, perturbed anchor) rows and inputs."""
    embedded = model(images)
    gaps = [
        euclidean(embedded[a], model(moved[None])[0]) - euclidean(embedded[a], embedded[p]) for a, p, moved in pairs
    ]
    return sum(gap.clamp(min=0) for gap in gaps) / len(gaps), gaps


def same_value_and_gradient(model, loss, expected):
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    found = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(expected, model.parameters()), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def build(model, *plugins, loss=None, attack=PGD, **options):
    loss = losses.TripletMarginLoss(margin=0.2) if loss is None else loss
    return seed_paper_loss(loss, model, attack=attack, plugins=plugins, seed=0, **options)


class TestTerm:
    def test_beside_hm(self, model, images, labels):
        zero, hm = Zero(), HM()
        hm.load_state_dict({"last_loss": 0.0})
        loss = build(model, hm, ICS(0.7), zero)(model(images), labels, TRIPLETS)
        expected, gaps = term(model, images, list(zip(*TRIPLETS[:2], zero.inputs[:4], strict=True)))
        assert any(gap > 0 for gap in gaps)
        assert any(gap < 0 for gap in gaps)
        same_value_and_gradient(model, loss, 0.7 * expected)

    def test_beside_perturbed_anchors(self, model, images, labels):
        zero = Zero()
        loss = build(model, ICS, zero, perturb="anchor")(model(images), labels, TRIPLETS)
        copies = dict(zip([0, 2, 5], zero.inputs, strict=True))  # one copy per row and role
        pairs = [(a, p, copies[a]) for a, p in zip(TRIPLETS[0].tolist(), TRIPLETS[1].tolist(), strict=True)]
        same_value_and_gradient(model, loss, 0.5 * term(model, images, pairs)[0])

    @pytest.mark.parametrize("loss", [losses.ContrastiveLoss(), losses.ArcFaceLoss(4, 4), losses.NCALoss()])
    def test_where_the_loss_chooses_its_tuples(self, model, images, labels, loss):
        """Every row is replaced, and the positive pairs are all there are."""
        zero = Zero()
        loss = build(model, ICS, zero, loss=loss, perturb="all")(model(images), labels)
        pairs = [(a, a ^ 1, zero.inputs[a]) for a in range(8)]
        same_value_and_gradient(model, loss, 0.5 * term(model, images, pairs)[0])

    def test_of_the_callers_pairs(self, model, images, labels):
        zero = Zero()
        pairs = tuple(torch.tensor(m) for m in ([0, 3, 6], [1, 2, 7], [0, 3], [5, 4]))
        loss = build(model, ICS, zero, loss=losses.ContrastiveLoss(), perturb="all")(model(images), labels, pairs)
        copies = zero.inputs  # all rows play a role
        expected, _ = term(model, images, [(0, 1, copies[0]), (3, 2, copies[3]), (6, 7, copies[6])])
        same_value_and_gradient(model, loss, 0.5 * expected)

    @pytest.mark.parametrize(("given", "perturb"), [(None, "anchor"), (TRIPLETS, "anchor"), (None, "all")])
    def test_with_reference(self, model, images, labels, given, perturb):
        zero = Zero()
        queries, reference = images[:6], 0.9 * images.flip(0)
        both, all_labels = torch.cat([queries, reference]), torch.cat([labels[:6], labels.flip(0)])
        loss_func = build(model, ICS, zero, loss=losses.ContrastiveLoss(), perturb=perturb)
        loss = loss_func(model(queries), labels[:6], given, model(reference), labels.flip(0))
        if given is None:
            found = [(a, p) for a in range(6) for p in range(6, 14) if all_labels[a] == all_labels[p]]
        else:
            found = [(a, p + 6) for a, p in zip(*(m.tolist() for m in given[:2]), strict=True)]
        anchors = sorted({a for a, _ in found})
        copies = dict(zip(anchors, zero.inputs[: len(anchors)], strict=True))  # copies of the queries come first
        expected, gaps = term(model, both, [(a, p, copies[a]) for a, p in found])
        assert any(gap > 0 for gap in gaps)
        same_value_and_gradient(model, loss, 0.5 * expected)

    def test_is_added_to_what_is_optimised(self, model, images, labels):
        alone = build(model, perturb="anchor", clean_weight=0.3)(model(images), labels, TRIPLETS)
        added = build(model, ICS, Zero(), perturb="anchor")(model(images), labels, TRIPLETS)
        both = build(model, ICS, perturb="anchor", clean_weight=0.3)(model(images), labels, TRIPLETS)
        assert added > 0
        assert both.item() == pytest.approx((alone + added).item(), rel=1e-5)

    def test_order_beside_hm_changes_nothing(self, model, images, labels):
        values = []
        for order in ((0, 1), (1, 0)):
            hm = HM()
            plugins = [hm, ICS()]
            loss_func = build(model, *(plugins[i] for i in order))
            values += [(loss_func(model(images), labels).item(), float(hm.last_loss)) for _ in range(2)]
        assert values[:2] == values[2:]

    def test_is_zero_where_nothing_moved(self, model, images, labels):
        still = partial(torchattacks.PGD, eps=0)
        loss = build(model, ICS, Zero(), attack=still, perturb="all")(model(images), labels, TRIPLETS)
        assert loss == 0
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_lowers_the_gap_when_it_trains(self, model, images, labels):
        loss_func = build(model, ICS, Zero(), perturb="anchor")
        optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
        for _ in range(15):
            loss = loss_func(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert found[-1] < 0.6 * found[0]


class TestRefuses:
    @pytest.mark.parametrize("options", [{"perturb": "positive"}, {"perturb": ("positive", "negative")}])
    def test_clean_anchors(self, model, images, labels, options):
        with pytest.raises(PlanError, match=r"no anchor is perturbed.*\[HM, ICS\].*'anchor'.*'all'"):
            build(model, ICS, **options)(model(images), labels, TRIPLETS)

    def test_act(self, model, images, labels):
        with pytest.raises(PlanError, match="no anchor is perturbed"):
            build(model, ICS, ACT)(model(images), labels)

    def test_no_positives_known(self, model, images):
        with pytest.raises(PlanError, match="neither labels nor tuples, so ICS knows no positives"):
            build(model, ICS, loss=losses.VICRegLoss(), perturb="all")(model(images), ref_emb=model(images.flip(0)))

    def test_miners(self, model):
        with pytest.raises(PluginError, match=r"ICS answers nothing but training_loss.*AdversarialLoss"):
            AdversarialMiner(miners.BatchHardMiner(), model, plugins=[ICS])

    @pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan, True, "0.5", None])
    def test_no_weight(self, weight):
        with pytest.raises(InputError, match=r"weight=.*; expected a number from 0 on"):
            ICS(weight)


def test_weight_zero_changes_nothing(model, images, labels):
    alone = build(model, perturb="all")(model(images), labels)
    assert build(model, ICS(0), perturb="all")(model(images), labels) == alone


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("plugins", [[ICS], [HM, ICS]], ids=["alone", "beside HM"])
def test_trains_what_is_wrapped(model, images, labels, name, plugins):
    options = {"perturb": "anchor"} if plugins == [ICS] else {}
    build(model, *plugins, loss=LOSSES[name](), **options)(model(images), labels).backward()
    assert any(p.grad.abs().sum() > 0 for p in model.parameters())
