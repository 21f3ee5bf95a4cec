"""The table of losses, held to experiments with the losses themselves."""

import warnings
from functools import partial

import pytest
import torch
import torchattacks
from contract import LOSSES, WRAPPERS, make_loss, seed
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from small_batch import LABELS, batch_of, said_aloud, steps
from torch import nn

from pml_adversarial.errors import PlanError
from pml_adversarial.plugins.fixed_context import FixedContext
from pml_adversarial.training.loss_support import SUPPORT, support_of
from pml_adversarial.training.loss_trials import LossTrials
from pml_adversarial.training.tuples import ROLES

WITH_LABELS = [name for name in (*LOSSES, *WRAPPERS) if name not in ("ManifoldLoss", "VICRegLoss")]
WITH_LABELS = [name for name in WITH_LABELS if not name.startswith("SelfSupervised")]
WAYS = [(members, reference) for reference in (False, True) for members in (None, 3, 4)]
SOME_ROLES = [("anchor",), ("positive",), ("negative",), ("anchor", "negative")]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning"),
    pytest.mark.filterwarnings("ignore:DistributedLossWrapper is being used in a non-distributed setting:UserWarning"),
    pytest.mark.filterwarnings("ignore:Values of Tp or Tn are too high:UserWarning"),
]


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
