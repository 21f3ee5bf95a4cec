"""What a loss was called with becomes one batch; whatever has the wrong form is refused."""

from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning import losses
from seed_paper import seed_paper_loss
from torch import nn
from torch.nn import functional

from pml_adversarial import CaptureError, InputError, PlanError
from pml_adversarial.training.capture import InputCapture
from pml_adversarial.training.collate import Collator
from pml_adversarial.training.pixels import PixelSpace

NO_BUDGET = partial(torchattacks.PGD, eps=0.0)


def collator_of(model, normalization=None):
    return Collator(InputCapture(model), PixelSpace(normalization), joint=False)


class TestCollate:
    """Against the arguments, row by row."""

    def collated(self, collator, embeddings, labels=None, tuples=None, ref_emb=None, ref_labels=None, mask=None):
        asked = []
        given = embeddings, labels, tuples, ref_emb, ref_labels
        batch, told = collator.collate(*given, lambda: asked.append("state"), mask)
        assert told is None  # this process has the batch for itself,
        assert not asked  # so that nobody needs its state
        return batch

    def test_queries_alone(self, model, images, labels):
        collator, embeddings = collator_of(model), model(images)
        batch = self.collated(collator, embeddings, labels)
        assert torch.equal(batch.inputs, images)
        assert batch.embeddings is embeddings
        assert torch.equal(batch.context, embeddings)
        assert not batch.context.requires_grad
        assert torch.equal(batch.labels, labels)
        assert (batch.indices_tuple, batch.num_queries, batch.strength) == (None, 8, 1)
        assert not batch.shared_labels
        assert torch.equal(batch.replay.embed(batch.inputs), embeddings)

    @pytest.mark.parametrize(
        "names", [("anchor", "positive", "negative"), ("anchor", "positive", "anchor", "negative")]
    )
    def test_a_reference_follows_and_its_rows_are_counted_on(self, names, model, images, labels):
        tuples = tuple(torch.tensor(rows) for rows in ([0, 3], [4, 0], [7, 1], [2, 2]))
        tuples = tuples if len(names) == 4 else (tuples[2], tuples[1], tuples[3])
        collator, queries, views = collator_of(model), model(images), images[:5].flip(3)
        reference = model(views)
        batch = self.collated(collator, queries, labels, tuples, reference, labels[3:])
        assert torch.equal(batch.inputs, torch.cat([images, views]))
        assert torch.equal(batch.embeddings, torch.cat([queries, reference]))
        assert batch.labels.tolist() == [*labels.tolist(), *labels[3:].tolist()]
        assert (batch.num_queries, len(batch), batch.num_attackable) == (8, 13, 13)
        for name, before, after in zip(names, tuples, batch.indices_tuple, strict=True):
            assert after.tolist() == [row + (0 if name == "anchor" else 8) for row in before.tolist()]

    def test_tuples_without_a_reference_stay_as_they_are(self, model, images, labels):
        collator, tuples = collator_of(model), tuple(torch.tensor([row, 7]) for row in (0, 1, 2))
        batch = self.collated(collator, model(images), labels, tuples)
        assert [member.tolist() for member in batch.indices_tuple] == [[0, 7], [1, 7], [2, 7]]

    def test_inputs_of_a_reference_may_be_unknown(self, model, images, labels):
        batch = self.collated(collator_of(model), model(images), labels, None, torch.randn(3, 4), labels[:3])
        assert torch.equal(batch.inputs, images)
        assert (batch.num_queries, len(batch), batch.num_attackable) == (8, 11, 8)

    def test_the_queries_themselves_are_no_reference(self, model, images, labels):
        collator, embeddings = collator_of(model), model(images)
        batch = self.collated(collator, embeddings, labels, None, embeddings, labels)
        assert (len(batch), batch.num_queries, batch.shared_labels) == (8, 8, False)

    @pytest.mark.parametrize("shared", [True, False])
    def test_tells_two_views_from_others(self, shared, model, images, labels):
        collator, first, second = collator_of(model), model(images), model(images.flip(3))
        batch = self.collated(collator, first, labels, None, second, labels if shared else labels.clone())
        assert batch.shared_labels == shared

    def test_without_labels(self, model, images):
        collator, first, second = collator_of(model), model(images), model(images.flip(3))
        for reference in (None, second):
            batch = self.collated(collator, first, ref_emb=reference)
            assert batch.labels is None
            assert not batch.shared_labels

    def test_inputs_are_pixels(self, model, images, labels):
        collator = collator_of(model, ((0.2,), (0.5,)))
        batch = self.collated(collator, model((images - 0.2) / 0.5), labels)
        torch.testing.assert_close(batch.inputs, images)

    def test_what_was_done_to_the_output_is_done_again(self, model, images, labels):
        for change in (lambda e: e[:, 1:3], functional.normalize, lambda e: e.flip(0)):
            collator = collator_of(model)
            embeddings = change(model(images))
            batch = self.collated(collator, embeddings, labels)
            assert torch.equal(batch.embeddings, embeddings)
            torch.testing.assert_close(batch.replay.embed(batch.inputs), embeddings)

    def test_inputs_that_are_told_are_taken(self, model, images, labels):
        collator = collator_of(lambda given: 2 * model(given))
        embeddings = (2 * model(images)).detach().requires_grad_()
        batch, _ = collator.collate(embeddings, labels, None, None, None, dict, inputs=images)
        assert torch.equal(batch.inputs, images)
        assert torch.equal(batch.replay.embed(images), embeddings)

    @pytest.mark.parametrize("mask", [[0, 1, 0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 0, 0], [0] * 8])
    def test_rows_to_enqueue_become_the_reference_in_their_order(self, mask, model, images, labels):
        queries, keys = ([row for row in range(8) if mask[row] == joins] for joins in (0, 1))
        collator, embeddings = collator_of(model), model(images)
        batch = self.collated(collator, embeddings, labels, mask=torch.tensor(mask, dtype=torch.bool))
        assert torch.equal(batch.inputs, images[queries])  # what is enqueued is never perturbed
        assert torch.equal(batch.embeddings, embeddings[queries + keys])
        assert torch.equal(batch.labels, labels[queries + keys])
        assert batch.num_queries == len(queries)

    def test_rows_of_no_watched_model_are_refused_with_the_way_out(self, model, images, labels):
        with pytest.raises(CaptureError, match=r"inputs=x"):
            self.collated(collator_of(model), torch.rand(8, 4, requires_grad=True) * 2, labels)


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

    def test_another_view_in_place_of_labels_is_told_how_it_is_recognised(self, model, images):
        embeddings = model(images)
        with pytest.raises(InputError, match=r"labels of shape .* forward\(embeddings, ref_emb\)"):
            seed_paper_loss(losses.TripletMarginLoss(), model)(embeddings, embeddings.detach())

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
        with pytest.raises(CaptureError, match=r"\(16, 4\) for inputs \(8, 1, 6, 6\)"):
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
