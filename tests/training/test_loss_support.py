"""The table of losses, held to experiments with the losses themselves, and losses that it does not know."""

import logging
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torchattacks
from contract import LOSSES, WRAPPERS, make_loss, seed
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn

from pml_adversarial import AdversarialLoss
from pml_adversarial.errors import PlanError
from pml_adversarial.plugins.fixed_context import FixedContext
from pml_adversarial.training.batch import Batch
from pml_adversarial.training.loss_support import SUPPORT, support_of
from pml_adversarial.training.loss_trials import LossTrials
from pml_adversarial.training.tuples import ROLES

LABELS = torch.arange(8) // 2
WITH_LABELS = [name for name in (*LOSSES, *WRAPPERS) if name not in ("ManifoldLoss", "VICRegLoss")]
WITH_LABELS = [name for name in WITH_LABELS if not name.startswith("SelfSupervised")]
WAYS = [(members, reference) for reference in (False, True) for members in (None, 3, 4)]
SOME_ROLES = [("anchor",), ("positive",), ("negative",), ("anchor", "negative")]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning"),
    pytest.mark.filterwarnings("ignore:DistributedLossWrapper is being used in a non-distributed setting:UserWarning"),
    pytest.mark.filterwarnings("ignore:Values of Tp or Tn are too high:UserWarning"),
]


def batch_of(labels=LABELS, tuples=None, num_queries=8):
    embeddings = torch.randn(8, 4)
    return Batch(torch.rand(8, 1), embeddings, embeddings, labels, tuples, num_queries)


def asked(loss, members=None, reference=False):
    """The experiments with a loss that is called so; None where it refuses the call."""
    tuples = None if members is None else tuple(torch.tensor([i]) for i in range(members))
    trials = LossTrials(loss, batch_of(LABELS % 4, tuples, 4 if reference else 8))
    return None if trials.batch is None else trials


def made_with(name, **options):
    seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what their constructors say of numpy is not for us
        return LOSSES[name](**options).double()


class TestTable:
    """Each row of the table is what the loss says when it is asked."""

    def test_has_every_loss(self):
        assert {kind.__name__ for kind in SUPPORT} == {
            *LOSSES,
            "CrossBatchMemory",
            "MultipleLosses",
            "SelfSupervisedLoss",
        }

    @pytest.mark.parametrize("name", WITH_LABELS)
    def test_rows_that_do_not_meet(self, name):
        loss = make_loss(name)
        for members in (None, 3, 4):
            trials = asked(loss, members)
            assert trials is None or trials.is_row_separable() == support_of(loss).is_row_separable

    @pytest.mark.parametrize("name", WITH_LABELS)
    def test_tuples(self, name):
        loss = make_loss(name)
        assert asked(loss).takes_tuples() == support_of(loss).takes_tuples
        for members in (3, 4):
            assert (asked(loss, members) is not None) == support_of(loss).takes_tuples

    @pytest.mark.parametrize("name", WITH_LABELS)
    def test_copies_beside_their_rows(self, name):
        loss = make_loss(name)
        assert asked(loss).takes_copies_beside_clean() == support_of(loss).beside_clean

    @pytest.mark.parametrize(("members", "reference"), WAYS)
    @pytest.mark.parametrize("name", WITH_LABELS)
    def test_copies_of_roles(self, name, members, reference):
        loss = make_loss(name)
        trials, support = asked(loss, members, reference), support_of(loss)
        if trials is None:
            return
        for roles in SOME_ROLES:
            copies = support.copies_for(roles, reference)
            if copies != "replace":
                assert trials.keeps_value(copies, roles, None)
                assert trials.keeps_value(copies, roles, 1)
                assert members or trials.counts(copies, roles, None)
        finer = [role for role in ROLES if trials.copies((role,), None) != "replace"]
        told = [role for role in ROLES if support.copies_for((role,), reference) != "replace"]
        assert len(finer) <= max(len(told), 1)  # of HistogramLoss positives could be told apart, by chance

    @pytest.mark.parametrize("name", WITH_LABELS)
    def test_append_only_if_the_reference_is_not_needed(self, name):
        """A loss that averages over rows, with some reducer, has to have copies in a reference."""
        loss, found = make_loss(name), set()
        if name in WRAPPERS or support_of(loss).copies == "replace":
            return
        reducer_of = {"MarginLoss": [], "NPairsLoss": [reducers.MeanReducer]}
        for reducer in reducer_of.get(name, [reducers.MeanReducer, reducers.SumReducer, reducers.AvgNonZeroReducer]):
            trials = asked(made_with(name, reducer=reducer()), 3)
            role = support_of(loss).roles[0]
            found.add(trials.keeps_value("append", (role,), None))
        if name != "LiftedStructureLoss":  # whose positives are compared with anchors, by row number
            assert (False in found) == (support_of(loss).copies == "reference")

    @pytest.mark.parametrize("name", WITH_LABELS)
    def test_copies_per_tuple(self, name):
        loss = make_loss(name)
        support = support_of(loss)
        for members in (3, 4):
            trials = asked(loss, members)
            if trials is None or support.copies == "replace":
                continue
            for role in support.roles:
                copies = support.copies_for((role,), False)
                if support.may_copy_per_tuple((role,), members):
                    assert trials.keeps_value(copies, (role,), 2)
                elif role != "negative":  # of which no pair is named by two of the trial's triplets
                    assert not trials.keeps_value(copies, (role,), 2)

    @pytest.mark.parametrize(
        "reducer",
        [
            reducers.MeanReducer,
            reducers.SumReducer,
            reducers.AvgNonZeroReducer,
            partial(reducers.ThresholdReducer, low=0.01),
            partial(reducers.ClassWeightedReducer, torch.tensor([1.0, 2, 3, 4])),
            None,
        ],
        ids=["mean", "sum", "non-zero", "threshold", "weighted", "regularized"],
    )
    @pytest.mark.parametrize("name", [name for name in LOSSES if name in WITH_LABELS])
    def test_holds_for_other_reducers_and_regularizers(self, name, reducer):
        options = {"embedding_regularizer": regularizers.LpRegularizer()} if reducer is None else {"reducer": reducer()}
        loss = made_with(name, **options)
        support = support_of(loss)
        for members in (None, 3, 4):
            trials = asked(loss, members)
            for role in support.roles if trials else ():
                copies = support.copies_for((role,), False)
                assert copies == "replace" or trials.keeps_value(copies, (role,), None)
        assert asked(loss).is_row_separable() == support.is_row_separable or reducer is not reducers.MeanReducer

    def test_of_a_swapped_triplet_loss(self):
        loss = losses.TripletMarginLoss(swap=True).double()
        assert support_of(loss).copies_for(("positive",), False) == "append"
        assert asked(loss).keeps_value("append", ("positive",), None)
        assert support_of(loss).copies_for(("positive",), True) == "replace"
        assert not asked(loss, reference=True).keeps_value("reference", ("positive",), None)


class TestSupportOf:
    def test_a_subclass_that_computes_as_pml_does(self):
        class Named(losses.TripletMarginLoss):
            def __init__(self):
                super().__init__(margin=0.3)

            def get_default_distance(self):
                return distances.CosineSimilarity()

            def describe(self):
                return "named"

        assert support_of(Named()) == support_of(losses.TripletMarginLoss())

    @pytest.mark.parametrize("method", ["forward", "compute_loss", "zero_loss"])
    def test_a_subclass_that_computes_in_its_own_way(self, method):
        kind = type("Changed", (losses.TripletMarginLoss,), {method: lambda self, *arguments: None})
        assert support_of(kind()) is None

    def test_parts_of_ones_own(self):
        class Mean(reducers.MeanReducer):
            pass

        class Distance(distances.LpDistance):
            pass

        assert support_of(losses.TripletMarginLoss(reducer=Mean())) is None
        assert support_of(losses.TripletMarginLoss(distance=Distance())) is None
        assert support_of(losses.ContrastiveLoss(reducer=reducers.PerAnchorReducer())) is None
        assert support_of(nn.Linear(2, 2)) is None

    def test_several_losses_can_what_all_of_them_can(self):
        triplets, pairs, rows = losses.TripletMarginLoss(), losses.NTXentLoss(), losses.ArcFaceLoss(4, 4)
        both = support_of(losses.MultipleLosses([triplets, losses.MultipleLosses({"one": pairs})], weights=[1, 0.5]))
        assert (both.copies, both.adds_up, both.takes_triplets) == ("append", "anchors", True)
        assert not both.is_row_separable
        several = support_of(losses.MultipleLosses([triplets, rows]))
        assert (several.copies, several.is_row_separable) == ("replace", False)
        assert support_of(losses.MultipleLosses([rows, losses.CosFaceLoss(4, 4)])).is_row_separable
        mined = losses.MultipleLosses([triplets, pairs], miners=[miners.MultiSimilarityMiner(), None])
        assert (support_of(mined).copies, support_of(mined).takes_tuples) == ("replace", False)
        assert support_of(losses.MultipleLosses([triplets, nn.Linear(2, 2)])) is None
        apart = losses.MultipleLosses([triplets, losses.NPairsLoss()])
        assert not support_of(apart).beside_clean
        assert support_of(apart).roles == ("anchor", "positive")

    def test_a_memory(self):
        memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, memory_size=20)
        assert support_of(memory).holds(20)
        assert not support_of(memory).holds(21)
        assert not support_of(losses.CrossBatchMemory(losses.TupletMarginLoss(), 4)).beside_clean
        assert support_of(losses.MultipleLosses([memory])).memory_size == 20

    def test_a_distributed_loss(self):
        loss = losses.MultiSimilarityLoss()
        assert support_of(DistributedLossWrapper(loss)) == support_of(loss)


class Sixteen(losses.TripletMarginLoss):
    """A triplet loss that insists on 16 rows."""

    def compute_loss(self, embeddings, *arguments):
        if len(embeddings) < 16:
            raise ValueError(f"{len(embeddings)} rows are too few")
        return super().compute_loss(embeddings, *arguments)


class Never(losses.TripletMarginLoss):
    """A loss that takes only what a model gave."""

    def forward(self, embeddings, *arguments):
        if embeddings.dtype == torch.float64:
            raise ValueError("double precision is not for me")
        return super().forward(embeddings, *arguments)


def one_hot_loss(embeddings, labels):
    similarity = nn.functional.normalize(embeddings) @ nn.functional.normalize(embeddings).T
    same = labels[:, None] == labels
    return (1 - similarity[same]).mean() + similarity[~same].clamp(min=0).mean()


class WithoutTuples(nn.Module):
    def forward(self, embeddings, labels):
        return one_hot_loss(embeddings, labels)


def steps(loss, count=2, attack=None, **options):
    """Values of the loss over some steps of one small model, and what was said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    images, labels = torch.rand(16, 1, 6, 6), torch.arange(16) // 4
    attack = attack or partial(torchattacks.PGD, eps=0.1, alpha=0.05, steps=2)
    loss_func = AdversarialLoss(loss, model, attack=attack, seed=0, warmup=0, guard=False, **options)
    return [loss_func(model(images), labels).item() for _ in range(count)]


def said_aloud(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


class TestUnknownLoss:
    @pytest.mark.parametrize("perturb", ["anchor", "positive", "negative", ("anchor", "negative"), "all"])
    @pytest.mark.parametrize("tuples_per_anchor", [None, 1])
    def test_that_raises_on_small_batches_is_trained_as_the_same_objective(self, perturb, tuples_per_anchor, caplog):
        options = {"perturb": perturb, "tuples_per_anchor": tuples_per_anchor}
        assert steps(Sixteen(0.2), **options) == steps(losses.TripletMarginLoss(0.2), **options)
        in_place = perturb == "all" and tuples_per_anchor is None
        said = said_aloud(caplog)
        assert len(said) == (0 if in_place else 1)
        assert in_place or "asked on 16 random embeddings" in said[0]
        assert in_place or "AdversarialLoss(..., copies='append')" in said[0]

    def test_that_was_told_is_not_asked(self, caplog):
        said = steps(Sixteen(0.2), perturb="positive", copies="append")
        assert said == steps(losses.TripletMarginLoss(0.2), perturb="positive")
        assert not said_aloud(caplog)

    def test_that_has_no_answer_is_refused_with_a_cure(self, caplog):
        with pytest.raises(PlanError, match=r"has no value on trial batches.*double precision.*copies='append'"):
            steps(Never(0.2), perturb="positive")
        cured = steps(Never(0.2), perturb="positive", copies="append", keep_clean=False)
        assert cured == steps(losses.TripletMarginLoss(0.2), perturb="positive", keep_clean=False)
        assert len(said_aloud(caplog)) == 1
        assert "has no value on trial batches of 8 to 16" in said_aloud(caplog)[0]

    def test_of_all_rows_without_an_answer_trains_in_two_batches(self, caplog):
        one, other = (steps(loss, keep_clean=False)[0] for loss in (Never(0.2), losses.TripletMarginLoss(0.2)))
        assert one == other
        assert len(said_aloud(caplog)) == 1

    @pytest.mark.parametrize("perturb", ["positive", "all"])
    def test_without_tuples(self, perturb):
        still = partial(torchattacks.PGD, eps=0.0, alpha=0.0, steps=1)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        expected = one_hot_loss(model(torch.rand(16, 1, 6, 6)), torch.arange(16) // 4).item()
        found = steps(WithoutTuples(), attack=still, perturb=perturb, keep_clean=False)
        assert found == pytest.approx([expected] * 2, rel=1e-6)
        assert steps(WithoutTuples(), perturb=perturb, keep_clean=False)[0] > expected

    def test_is_asked_once(self, monkeypatch):
        made = []
        init = LossTrials.__init__
        monkeypatch.setattr(LossTrials, "__init__", lambda self, *given: made.append(init(self, *given)))
        steps(Sixteen(), count=3)
        steps(Never(), count=3)
        assert len(made) == 2


class TestRolesThatALossDoesNotTellApart:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: losses.ArcFaceLoss(4, 4, reducer=reducers.SumReducer()),
            lambda: losses.ProxyNCALoss(4, 4, reducer=reducers.AvgNonZeroReducer()),
            lambda: losses.CosFaceLoss(4, 4, reducer=reducers.ThresholdReducer(low=1)),
            lambda: losses.MultipleLosses(
                [losses.ArcFaceLoss(4, 4, reducer=reducers.SumReducer()), losses.TripletMarginLoss()], weights=[0.3, 2]
            ),
            lambda: losses.MultipleLosses([losses.MultipleLosses([losses.CosFaceLoss(4, 4)]), losses.SupConLoss()]),
            losses.NCALoss,
        ],
    )
    @pytest.mark.parametrize("perturb", ["anchor", "positive", "negative"])
    def test_keeps_the_value_and_is_said_once(self, make, perturb, caplog):
        still = partial(torchattacks.PGD, eps=0.0, alpha=0.0, steps=1)
        torch.manual_seed(3)
        loss = make()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        expected = loss(model(torch.rand(16, 1, 6, 6)), torch.arange(16) // 4).item()
        found = steps(loss, attack=still, perturb=perturb, keep_clean=False)
        assert found == pytest.approx([expected] * 2, rel=1e-5)
        assert len(said_aloud(caplog)) == 1
        assert "does not take copies of single members" in said_aloud(caplog)[0]
        caplog.clear()
        steps(loss, perturb=perturb, copies="replace")
        steps(loss, perturb="all")
        assert not said_aloud(caplog)


class TestCopiesOption:
    def test_another_value(self):
        with pytest.raises(PlanError, match="copies='appended'; expected one of 'append', 'reference', 'replace'"):
            FixedContext(perturb="positive", copies="appended")

    def test_without_effect(self):
        with pytest.raises(PlanError, match="copies='append' has no effect where every row is perturbed"):
            FixedContext(copies="append")

    def test_against_the_table(self):
        with pytest.raises(PlanError, match="copies='append', but MultiSimilarityLoss takes copies='reference'"):
            steps(losses.MultiSimilarityLoss(), perturb="positive", copies="append")


class Made(nn.Module):
    """A loss that is a function of embeddings and labels."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, embeddings, labels, indices_tuple=None, *reference):
        return self.function(embeddings, labels)


def of_rows(embeddings, labels):
    return (embeddings.pow(2).sum(1) * (labels + 1)).mean()


def is_row_separable(loss, batch):
    return LossTrials(loss, batch).is_row_separable()


class TestIsRowSeparable:
    def test_a_sum_over_rows(self):
        assert is_row_separable(Made(of_rows), batch_of())

    @pytest.mark.parametrize(("one", "other"), [(0, 1), (0, 2), (1, 3), (0, 4), (3, 7), (2, 6)])
    def test_two_rows_that_meet_are_enough(self, one, other):
        meet = Made(lambda e, y: of_rows(e, y) + 1e-3 * (e[one] * e[other]).sum())
        assert not is_row_separable(meet, batch_of())

    def test_what_is_flat_tells_nothing(self):
        assert not is_row_separable(Made(lambda e, y: 0 * e.sum()), batch_of())

    def test_what_raises_tells_nothing(self):
        assert not is_row_separable(Made(lambda e, y: e.missing), batch_of())

    @pytest.mark.parametrize("classes", [2, 3, 8])
    def test_of_few_classes(self, classes):
        for labels in (torch.zeros(8, dtype=torch.long), torch.arange(8) % classes):
            assert is_row_separable(losses.ArcFaceLoss(classes, 4), batch_of(labels))

    def test_a_hinge_that_random_embeddings_satisfy_is_no_sum(self):
        far = batch_of(torch.arange(8))
        assert not is_row_separable(losses.ContrastiveLoss(neg_margin=0.01), far)

    def test_draws_nothing_and_leaves_the_loss_alone(self):
        loss, batch = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 32), batch_of()
        state = torch.get_rng_state()
        is_row_separable(loss, batch)
        assert loss.queue_idx == 0
        assert torch.equal(torch.get_rng_state(), state)


class TestCopies:
    def copies(self, loss, batch, roles=("positive",)):
        return LossTrials(loss, batch).copies(roles, None)

    @pytest.mark.parametrize("function", [of_rows, lambda e, y: e.pow(2).sum()], ids=["mean", "sum"])
    def test_a_loss_that_sees_all_rows(self, function):
        # a mean over rows changes with their number, and a reference is not looked at
        assert self.copies(Made(function), batch_of()) == "replace"

    @pytest.mark.parametrize("loss", [losses.TripletMarginLoss(), losses.ContrastiveLoss()])
    def test_a_loss_that_does_as_its_tuples_say(self, loss):
        assert self.copies(loss, batch_of()) == "append"
        assert self.copies(loss, batch_of(num_queries=4)) == "reference"

    @pytest.mark.parametrize("members", [3, 4])
    def test_a_loss_that_takes_both_directions_of_a_pair_for_one(self, members):
        tuples = (torch.tensor([0]), torch.tensor([1]), torch.tensor([2]), torch.tensor([3]))[:members]
        assert self.copies(losses.HistogramLoss(), batch_of(tuples=tuples)) == "replace"

    def test_without_labels(self):
        assert self.copies(losses.VICRegLoss(), batch_of(None)) == "replace"

    def test_nothing_is_decided_by_a_failure(self):
        assert self.copies(Made(lambda e, y: e.missing), batch_of()) is None


def test_signatures_differ():
    pair = (torch.tensor([0]),) * 4
    batches = [batch_of(), batch_of(tuples=pair), batch_of(tuples=pair[:3]), batch_of(None), batch_of(num_queries=4)]
    batches.append(replace(batches[-1], shared_labels=True))
    assert len({batch.call_signature for batch in batches}) == 6
