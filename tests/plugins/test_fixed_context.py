"""Clean rows beside the perturbed ones: the loss of one batch of both, or the mean of two where rows cannot join."""

import itertools

import pytest
import torch
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    CrossBatchMemory,
    HistogramLoss,
    MultiSimilarityLoss,
    NPairsLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    SelfSupervisedLoss,
    SupConLoss,
    TripletMarginLoss,
    TupletMarginLoss,
    VICRegLoss,
)
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch import nn

from pml_adversarial import AdversarialLoss, hookimpl
from pml_adversarial.training.plan import replace_rows


def brighter(objective):
    """The same for every row, so that what a step trains on can be computed by hand."""
    return lambda inputs, labels: inputs + 0.05


def training_loss(loss, model, images, *called, **options):
    own = {} if "plugins" in options else {"perturb": "all", "keep_clean": True}
    loss_func = AdversarialLoss(loss, model, attack=brighter, **own, **options)
    return loss_func, loss_func(model(images), *called)


@pytest.mark.parametrize(
    "loss",
    [SupConLoss(), MultiSimilarityLoss(), ArcFaceLoss(4, 4), ProxyAnchorLoss(4, 4), TripletMarginLoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_it_is_the_loss_of_one_batch_of_both(loss, model, images, labels):
    _, found = training_loss(loss, model, images, labels)
    both = torch.cat([images, images + 0.05])
    expected = loss(model(both), labels.repeat(2))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # PML's HistogramLoss
@pytest.mark.parametrize("loss", [HistogramLoss(), TupletMarginLoss()], ids=lambda loss: type(loss).__name__)
def test_the_mean_of_two_where_the_loss_fails_at_equal_embeddings(loss, model, images, labels):
    hardly = AdversarialLoss(
        loss, model, attack=lambda objective: lambda x, y: x + 1e-7, perturb="all", keep_clean=True
    )
    hardly(model(images), labels).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    _, found = training_loss(loss, model, images, labels)
    clean, perturbed = (loss(model(rows), labels) for rows in (images, images + 0.05))
    assert found.item() == pytest.approx((clean + perturbed).item() / 2, rel=1e-5)


@pytest.mark.parametrize("miner", [None, MultiSimilarityMiner(epsilon=2)], ids=["no miner", "miner"])
def test_the_mean_of_two_where_the_loss_picks_only_clean_rows(miner, model, images, labels):
    loss = NPairsLoss()
    tuples = () if miner is None else (miner(model(images), labels),)
    _, found = training_loss(loss, model, images, labels, *tuples)
    clean, perturbed = (loss(model(rows), labels, *tuples) for rows in (images, images + 0.05))
    assert clean.item() != perturbed.item()
    assert found.item() == pytest.approx((clean + perturbed).item() / 2, rel=1e-5)


def test_a_memory_that_is_too_small_for_both_takes_one_after_the_other(model, images, labels):
    sizes = 2 * len(images), 2 * len(images) - 1
    large, small = (CrossBatchMemory(SupConLoss(), 4, memory_size=size) for size in sizes)
    found = [training_loss(memory, model, images, labels)[1].isfinite().item() for memory in (large, small)]
    assert found == [True, True]
    kept = [memory.embedding_memory.norm(dim=1) > 0 for memory in (large, small)]
    assert [int(rows.sum()) for rows in kept] == list(sizes)


def test_each_member_of_a_triplet_is_clean_and_perturbed(model, images, labels):
    triplets = torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([4, 7])
    loss = TripletMarginLoss(0.2, reducer=MeanReducer())
    _, found = training_loss(loss, model, images, labels, triplets)
    clean, perturbed = (nn.functional.normalize(model(rows)) for rows in (images, images + 0.05))
    values = []
    for a, p, n in zip(*(member.tolist() for member in triplets), strict=True):
        for anchors, positives, negatives in itertools.product((clean, perturbed), repeat=3):
            distance = (anchors[a] - positives[p]).norm() - (anchors[a] - negatives[n]).norm()
            values.append(max(0.0, distance.item() + 0.2))
    assert found.item() == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_where_copies_stand_for_roles_it_is_the_mean_of_both(model, images, labels):
    loss = TripletMarginLoss()
    kept = AdversarialLoss(loss, model, attack=brighter, perturb="positive", keep_clean=True)
    replaced = AdversarialLoss(loss, model, attack=brighter, perturb="positive", keep_clean=False)
    values = [func(model(images), labels).item() for func in (kept, replaced, loss)]
    assert values[0] == pytest.approx((values[1] + values[2]) / 2)


@pytest.mark.parametrize("loss", [VICRegLoss(), SelfSupervisedLoss(NTXentLoss())], ids=lambda loss: type(loss).__name__)
def test_without_labels_rows_and_copies_would_count_as_different(loss, model, images):
    def views():
        return (model(images), model(images * 0.9))

    def called(func, first, second):
        return func(first, ref_emb=second) if isinstance(loss, VICRegLoss) else func(first, second)

    loss_func = AdversarialLoss(loss, [model], attack=brighter, perturb="all", keep_clean=True)
    clean = called(loss, *views()).item()
    perturbed = called(loss, model(images + 0.05), model(images * 0.9 + 0.05)).item()
    assert called(loss_func, *views()).item() == pytest.approx((clean + perturbed) / 2, rel=1e-5)


def test_a_plan_of_a_plugin_is_trained_on_as_it_is(model, images, labels):
    class Everyone:
        @hookimpl
        def pml_adversarial_plan(self, batch):
            return replace_rows(torch.arange(len(batch)), len(batch), None)

    _, found = training_loss(SupConLoss(), model, images, labels, plugins=[Everyone])
    assert found.item() == pytest.approx(SupConLoss()(model(images + 0.05), labels).item(), rel=1e-5)


def test_records_are_of_the_batch_that_is_trained_on(model, images, labels):
    loss_func, found = training_loss(SupConLoss(), model, images, labels)
    twice = SupConLoss()(model(torch.cat([images, images])), labels.repeat(2))
    assert loss_func.loss_before == pytest.approx(twice.item(), rel=1e-5)
    assert loss_func.loss_after == pytest.approx(found.item(), rel=1e-5)
