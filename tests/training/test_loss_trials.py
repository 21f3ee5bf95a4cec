"""What is found out about a loss by experiment, of losses whose answers are known."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning import losses
from small_batch import batch_of, said_aloud, steps
from torch import nn

from pml_adversarial.errors import PlanError
from pml_adversarial.training.loss_trials import LossTrials, with_copies

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning")


NAMES = ("anchor", "positive", "negative")


class Made(nn.Module):
    """A loss that is a function of embeddings and labels."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, embeddings, labels, indices_tuple=None, *reference):
        return self.function(embeddings, labels)


def one_hot_loss(embeddings, labels):
    similarity = nn.functional.normalize(embeddings) @ nn.functional.normalize(embeddings).T
    same = labels[:, None] == labels
    return (1 - similarity[same]).mean() + similarity[~same].clamp(min=0).mean()


class WithoutTuples(nn.Module):
    def forward(self, embeddings, labels):
        return one_hot_loss(embeddings, labels)


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

    def test_a_loss_that_looks_beyond_its_tuples(self):
        class Widest(losses.TripletMarginLoss):
            def forward(self, embeddings, *arguments):
                return super().forward(embeddings, *arguments) + embeddings.norm(dim=1).max()

        # copies that do not move are no wider than their rows, but one more row may be; in a reference it is not seen
        assert self.copies(Widest(), batch_of()) == "reference"

    def test_without_labels(self):
        assert self.copies(losses.VICRegLoss(), batch_of(None)) == "replace"

    def test_nothing_is_decided_by_a_failure(self):
        assert self.copies(Made(lambda e, y: e.missing), batch_of()) is None


class TestTrialBatch:
    """The batch on which a loss is asked: as small as it may be, and called as the real one."""

    TUPLES = tuple(torch.tensor([row]) for row in (0, 1, 2, 3))

    def test_is_small_and_has_no_more_than_the_real_one(self):
        labels = torch.tensor([5, 7, 9, 11, 5, 7, 9, 11])
        for batch in (batch_of(labels), batch_of(labels, self.TUPLES), batch_of(labels, num_queries=4)):
            trial = LossTrials(losses.ContrastiveLoss(), batch).batch
            assert trial.call_signature == batch.call_signature
            assert trial.num_queries == 8
            assert set(trial.labels.tolist()) <= {5, 7, 9}  # classes that the loss knows
            assert trial.embeddings.dtype == torch.float64
            assert trial.embeddings.shape[1] == batch.embeddings.shape[1]

    def test_has_two_classes_for_a_loss_that_wants_two(self):
        def of_two(embeddings, labels):
            assert len(labels.unique()) == 2
            return embeddings.sum()

        assert LossTrials(Made(of_two), batch_of()).batch.labels.unique().tolist() == [0, 1]

    def test_has_blocks_for_a_loss_that_wants_them(self):
        def of_blocks(embeddings, labels):
            assert labels.tolist() == sorted(labels.tolist())
            return embeddings.sum()

        assert LossTrials(Made(of_blocks), batch_of()).batch.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]

    def test_is_of_the_real_form_where_nothing_smaller_will_do(self):
        def of_five(embeddings, labels):
            assert len(labels) == 5
            return embeddings.sum()

        batch = batch_of(torch.tensor([3, 3, 4, 4, 4]))
        batch = replace(batch, embeddings=batch.embeddings[:5], num_queries=5)
        trials = LossTrials(Made(of_five), batch)
        assert trials.batch.labels.tolist() == [3, 3, 4, 4, 4]
        assert not torch.equal(trials.batch.embeddings.float(), batch.embeddings)

    def test_is_none_where_the_loss_has_no_value_and_the_last_error_is_kept(self):
        def fails(embeddings, labels):
            raise KeyError(len(embeddings))

        trials = LossTrials(Made(fails), batch_of())
        assert trials.batch is None
        assert isinstance(trials.error, KeyError)
        assert not trials.takes_tuples()
        assert not trials.takes_copies_beside_clean()
        assert trials.copies(("positive",), None) is None

    def test_nan_is_no_value(self):
        trials = LossTrials(Made(lambda e, y: e.sum() * torch.nan), batch_of())
        assert (trials.batch, trials.error) == (None, "NaN")

    def test_no_error_where_there_is_a_value_each_time(self):
        trials = LossTrials(losses.TripletMarginLoss(), batch_of())
        assert trials.takes_tuples()
        assert trials.copies(("positive",), None) == "append"
        assert trials.error is None

    def test_the_loss_itself_is_left_alone(self):
        loss = losses.ProxyAnchorLoss(4, 4)
        before = copy.deepcopy(loss.state_dict())
        LossTrials(loss, batch_of()).is_row_separable()
        assert loss.proxies.dtype == torch.float32
        assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())

    def test_a_loss_with_weights_is_asked_in_double_precision_too(self):
        class Headed(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(4, 2)

            def forward(self, embeddings, labels):
                return one_hot_loss(self.head(embeddings), labels)

        assert LossTrials(Headed(), batch_of()).batch is not None


class TestTakesTuples:
    @pytest.mark.parametrize(
        ("make", "expected"),
        [
            (losses.TripletMarginLoss, True),
            (losses.ContrastiveLoss, True),
            (losses.PNPLoss, False),
            (WithoutTuples, False),
        ],
    )
    def test_is_found_out(self, make, expected):
        assert LossTrials(make(), batch_of()).takes_tuples() == expected


class TestBesideClean:
    """A batch of rows and their copies, for losses that are made to take it or not."""

    def found(self, function):
        return LossTrials(Made(function), batch_of()).takes_copies_beside_clean()

    def test_a_loss_of_pairs(self):
        assert self.found(one_hot_loss)

    def test_copies_that_do_not_count(self):
        assert not self.found(lambda e, y: one_hot_loss(e[:8], y[:8]))

    def test_copies_that_count_only_where_a_class_has_one_row(self):
        def of_small_classes(embeddings, labels, most):
            size = (labels[:, None] == labels).sum(1)
            return embeddings[size <= most].pow(2).sum()

        assert not self.found(lambda e, y: of_small_classes(e, y, most=2))  # a row and its copy
        assert self.found(lambda e, y: of_small_classes(e, y, most=8))

    def test_an_order_that_matters(self):
        assert not self.found(lambda e, y: one_hot_loss(e, y) + (e[0] * e[-1]).sum())

    def test_a_gradient_that_is_not_finite_where_a_copy_equals_its_row(self):
        def distances(e):
            return (e[:, None] - e).pow(2).sum(2)

        assert self.found(lambda e, y: (1 + distances(e)).sqrt().mean())
        assert not self.found(lambda e, y: distances(e).sqrt().mean())


class TestWithCopies:
    """Each plan, read by plain loops."""

    def read(self, plan, num_rows):
        """The tuples of a plan, each member as the row that it is, and whether it is a copy of it."""
        pool = [(row, False) for row in range(num_rows)] + [(row, True) for row in plan.rows.tolist()]
        queries = [pool[place] for place in plan.pool_indices.tolist()]
        others = queries if plan.ref_pool_indices is None else [pool[place] for place in plan.ref_pool_indices.tolist()]
        members = [member.tolist() for member in plan.indices_tuple]
        sides = [queries if name == "anchor" else others for name in NAMES]
        return [[side[row] for row in member] for side, member in zip(sides, members, strict=True)]

    @pytest.mark.parametrize("tuples_per_anchor", [None, 1])
    @pytest.mark.parametrize("roles", [("anchor",), ("positive",), ("positive", "negative")])
    @pytest.mark.parametrize("num_queries", [8, 4])
    def test_members_of_the_roles_are_copies_of_their_rows(self, num_queries, roles, tuples_per_anchor):
        batch = batch_of(num_queries=num_queries)
        anchors, others = torch.arange(4), torch.arange(4, 8)
        tuples = anchors, others, others.flip(0)
        plans = with_copies(batch, tuples, roles, tuples_per_anchor)
        assert list(plans) == ["append", "reference"]
        expected = [
            [(row, name in roles) for row in member.tolist()] for name, member in zip(NAMES, tuples, strict=True)
        ]
        for plan in plans.values():
            assert self.read(plan, 8) == expected

    def test_an_anchor_of_several_copies_is_only_appended(self):
        tuples = tuple(torch.tensor(rows) for rows in ([0, 0], [1, 1], [2, 3]))
        assert list(with_copies(batch_of(), tuples, ("anchor",), None)) == ["append", "reference"]
        assert list(with_copies(batch_of(), tuples, ("anchor",), 2)) == ["append"]


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
