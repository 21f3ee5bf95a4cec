"""What a loss was called with becomes one batch; whatever has the wrong form is refused."""

from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning import losses
from seed_paper import seed_paper_loss
from torch import nn

from pml_adversarial import InputError, PlanError

NO_BUDGET = partial(torchattacks.PGD, eps=0.0)


class Sum(nn.Module):
    def forward(self, x):
        return x.sum()


class TestWrongForms:
    def test_labels_of_another_length(self, model, images, labels):
        with pytest.raises(InputError, match="labels of shape"):
            seed_paper_loss(losses.TripletMarginLoss(), model)(model(images), labels[:-1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [(lambda y: y.tolist(), "labels are list"), (lambda y: y[:, None], r"\(8, 1\)"), (lambda y: y[0], r"\(\)")],
    )
    def test_labels_of_another_form(self, change, message, model, images, labels):
        with pytest.raises(InputError, match=message):
            seed_paper_loss(losses.TripletMarginLoss(), model)(model(images), change(labels))

    @pytest.mark.parametrize(
        ("change", "shape"), [(nn.Flatten(0), r"\(32,\)"), (nn.Unflatten(1, (1, 4)), r"\(8, 1, 4\)")]
    )
    def test_embeddings_of_another_form(self, change, shape, model, images, labels):
        whole = nn.Sequential(*model, change)
        with pytest.raises(InputError, match=rf"embeddings of shape {shape}; expected .* \(N, D\)"):
            seed_paper_loss(losses.TripletMarginLoss(), whole)(whole(images), labels)

    def test_embeddings_without_rows_or_dimensions(self, labels):
        model = nn.Sequential(nn.Linear(8, 1), Sum())
        with pytest.raises(InputError, match=r"embeddings of shape \(\)"):
            seed_paper_loss(losses.TripletMarginLoss(), model)(model(torch.rand(8, 8)), labels)

    @pytest.mark.parametrize(("ref_emb", "found"), [([[0.0] * 4], "are list"), (torch.zeros(4), r"of shape \(4,\)")])
    def test_a_reference_of_another_form(self, ref_emb, found, model, images, labels):
        with pytest.raises(InputError, match=f"ref_emb {found}"):
            seed_paper_loss(losses.ContrastiveLoss(), model)(model(images), labels, ref_emb=ref_emb, ref_labels=labels)

    def test_a_model_that_changes_the_number_of_rows(self, images, labels):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(0, 1))
        with pytest.raises(InputError, match="8 inputs gave 16 embeddings"):
            seed_paper_loss(losses.TripletMarginLoss(), model)(model(images), labels.repeat(2))

    def test_tuples_are_counted_in_the_reference(self, model, images, labels):
        loss_func = seed_paper_loss(losses.ContrastiveLoss(), model, perturb="anchor")
        reference = {"ref_emb": torch.randn(9, 4), "ref_labels": torch.arange(9) // 2}
        row, last = torch.tensor([0]), torch.tensor([8])
        loss_func(model(images), labels, (row, row, row, last), **reference)
        with pytest.raises(PlanError, match="anchors below 8, positives and negatives below 9"):
            loss_func(model(images), labels, (last, row, row, row), **reference)


class TestReference:
    @pytest.mark.parametrize(
        ("dtype", "ref_labels"),
        [(torch.uint8, torch.tensor([256, 257, 0])), (torch.long, torch.tensor([0.5, 1.5, 0.0]))],
    )
    def test_labels_of_a_reference_keep_their_values(self, dtype, ref_labels, model, images, labels):
        loss_func = seed_paper_loss(losses.ContrastiveLoss(), model, attack=NO_BUDGET, perturb="anchor")
        reference = {"ref_emb": torch.randn(3, 4), "ref_labels": ref_labels}
        embeddings = model(images)
        plain = losses.ContrastiveLoss()(embeddings, labels.to(dtype), **reference)
        assert plain > 0
        torch.testing.assert_close(loss_func(embeddings, labels.to(dtype), **reference), plain)
