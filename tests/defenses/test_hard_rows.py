import pytest
import torch
from few_passes import (  # noqa: F401
    CHECK,
    EPS,
    ROWS,
    counted_model,
    four_labels,
    passed_in_two_steps,
    score_of,
    signs_by_hand,
    twelve_images,
    wrapped,
)
from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss

from pml_adversarial import InputError
from pml_adversarial.defenses import HardRows
from pml_adversarial.training.plan import plan_roles, replace_rows


class TestHardRows:
    @pytest.mark.parametrize("share", [0.25, 0.5, 1])
    def test_are_those_with_the_longest_gradient(self, share, model, images, labels):
        loss = MultiSimilarityLoss()
        loss_func, watch = wrapped(model, HardRows(share), loss=loss)
        embeddings = model(images)
        loss_func(embeddings, labels)
        lengths = {}
        for row in range(ROWS):
            mine = embeddings[row].detach().clone().requires_grad_()
            others = [embeddings[i].detach() if i != row else mine for i in range(ROWS)]
            (gradient,) = torch.autograd.grad(loss(torch.stack(others), labels), mine)
            lengths[row] = gradient.norm().item()
        expected = sorted(sorted(lengths, key=lengths.get)[-round(share * ROWS) :])
        assert watch.plan.rows.tolist() == expected

    def test_others_stay_unperturbed_in_their_places(self, model, images, labels):
        loss_func, watch = wrapped(model, HardRows(0.5), keep_clean=False)
        loss = loss_func(embeddings := model(images), labels)
        rows = [row.detach() for row in embeddings]
        for row, copy in zip(watch.plan.rows.tolist(), watch.adversarial.embeddings, strict=True):
            rows[row] = copy.detach()
        assert loss.item() == pytest.approx(MultiSimilarityLoss()(torch.stack(rows), labels).item(), rel=1e-5)

    def test_only_they_are_passed(self, model, images, labels):
        loss_func, _ = wrapped(model, HardRows(0.5))
        first, second = passed_in_two_steps(loss_func, model, images, labels)
        assert second == [ROWS // 2] * 4
        assert first == [*CHECK, *second]

    def test_keeps_tuples_of_copies_that_stand_beside_their_rows(self, model, images, labels):
        loss_func, watch = wrapped(model, HardRows(0.5), loss=ContrastiveLoss(), perturb="positive", keep_clean=False)
        embeddings = model(images)
        loss = loss_func(embeddings, labels)
        pool = [*embeddings.detach(), *watch.adversarial.embeddings.detach()]
        standing = [pool[address] for address in watch.plan.pool_indices.tolist()]
        a, p, b, n = watch.plan.indices_tuple
        assert any(watch.plan.pool_indices[i] < ROWS for i in p.tolist())  # some positives are clean again
        expected = ContrastiveLoss()(torch.stack(standing), None, (a, p, b, n))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("share", [0, -1, 1.5, "half", True, None])
    def test_refuses_what_is_no_share(self, share):
        with pytest.raises(InputError, match="expected a number above 0 and up to 1"):
            HardRows(share)


class TestPlanKeep:
    @pytest.mark.parametrize("copies", [[0, 2], [], [3, 1], [0, 1, 2, 3]])
    def test_of_plans_that_append(self, copies):
        tuples = torch.tensor([0, 1, 0]), torch.tensor([1, 0, 2]), torch.tensor([2, 3, 3])
        plan = plan_roles(tuples, ["positive", "negative"], num_rows=4)
        copies = torch.tensor(copies, dtype=torch.long)
        kept = plan.keep(copies, 4)
        assert kept.rows.tolist() == [plan.rows[c] for c in copies]
        for before, after in zip(plan.pool_indices.tolist(), kept.pool_indices.tolist(), strict=True):
            if before < 4:
                assert after == before
            elif before - 4 in copies.tolist():
                assert after == 4 + copies.tolist().index(before - 4)
            else:
                assert after == plan.rows[before - 4]
        assert all(torch.equal(x, y) for x, y in zip(plan.indices_tuple, kept.indices_tuple, strict=True))

    def test_of_plans_with_a_reference(self):
        plan = replace_rows(torch.arange(4), 6, None).split(3)
        kept = plan.keep(torch.tensor([0, 3]), 6)
        assert kept.pool_indices.tolist() == [6, 1, 2]
        assert kept.ref_pool_indices.tolist() == [7, 4, 5]
