"""Losses that are called in another way than PML calls its own, against the plain loss."""

import copy
from functools import partial

import pytest
import torch
import torchattacks
from pytorch_metric_learning import losses, miners, reducers
from torch import nn

from pml_adversarial import AdversarialLoss, CaptureError, InputError, PlanError, hookimpl

NO_BUDGET = partial(torchattacks.PGD, eps=0.0)
PGD = partial(torchattacks.PGD, eps=0.05, alpha=0.02, steps=3)


class Own(nn.Module):
    """A loss of one's own, as in supervised contrastive learning."""

    def forward(self, embeddings, labels):
        unit = nn.functional.normalize(embeddings)
        similarity, same = unit @ unit.T, labels[:, None] == labels
        return (1 - similarity[same]).mean() + similarity[~same].clamp(min=0).mean()


class Bare(losses.BaseMetricLossFunction):
    """The least that PML asks of a loss."""

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        return {"loss": {"losses": Own()(embeddings, labels), "indices": None, "reduction_type": "already_reduced"}}


class TestLabelsAlone:
    @pytest.mark.parametrize("make", [Own, Bare])
    def test_is_the_loss_at_eps_0_and_in_eval_mode(self, make, model, images, labels):
        loss_func = AdversarialLoss(make(), model, attack=NO_BUDGET, keep_clean=False)
        expected = Own()(model(images), labels)
        torch.testing.assert_close(loss_func(model(images), labels), expected)
        torch.testing.assert_close(loss_func.eval()(model(images), labels), expected)

    @pytest.mark.parametrize("make", [Own, Bare])
    @pytest.mark.parametrize("keep_clean", [True, False])
    def test_is_attacked(self, make, keep_clean, model, images, labels):
        loss_func = AdversarialLoss(make(), model, attack=PGD, keep_clean=keep_clean, warmup=0)
        loss_func(model(images), labels).backward()
        assert loss_func.records.loss_after > loss_func.records.loss_before
        assert loss_func.records.num_perturbed == 8
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())

    def test_takes_no_tuples_and_no_reference(self, model, images, labels):
        loss_func, embeddings = AdversarialLoss(Own(), model), model(images)
        with pytest.raises(PlanError, match="Own takes 2 arguments, and there are embeddings, labels, indices_tuple"):
            loss_func(embeddings, labels, miners.BatchHardMiner()(embeddings, labels))
        with pytest.raises(PlanError, match="there are embeddings, labels, ref_emb, ref_labels"):
            loss_func(embeddings, labels, ref_emb=embeddings.detach(), ref_labels=labels)
        with pytest.raises(PlanError, match="or the plugin that brings them"):
            AdversarialLoss(Own(), model, plugins=["hm"])(model(images), labels)


class Vector(nn.Module):
    def forward(self, embeddings, labels):
        return (embeddings - embeddings.mean(0)).norm(dim=1)


class Pair(nn.Module):
    def forward(self, embeddings, labels):
        return Own()(embeddings, labels), {}


class PerRow(reducers.BaseReducer):
    def element_reduction(self, losses, *rest):
        return losses

    def triplet_reduction(self, losses, *rest):
        return losses


class TestScalar:
    @pytest.mark.parametrize("options", [{}, {"perturb": "positive"}, {"keep_clean": False}], ids=str)
    @pytest.mark.parametrize(
        ("make", "found"),
        [
            (Vector, r"Vector returned a tensor of shape \(8,\)"),
            (Pair, "Pair returned a tuple"),
            (lambda: losses.TripletMarginLoss(reducer=PerRow()), "TripletMarginLoss returned a tensor"),
            (lambda: losses.ArcFaceLoss(4, 4, reducer=PerRow()), "ArcFaceLoss returned a tensor"),
        ],
    )
    def test_anything_else_is_refused(self, make, found, options, model, images, labels):
        with pytest.raises(InputError, match=f"{found}.*reducer=MeanReducer"):
            AdversarialLoss(make(), model, warmup=0, **options)(model(images), labels)

    def test_where_a_plugin_plans(self, model, images, labels):
        wrapped = losses.TripletMarginLoss(reducer=PerRow())
        with pytest.raises(InputError, match=r"TripletMarginLoss returned a tensor of shape \(\d+,\)"):
            AdversarialLoss(wrapped, model, warmup=0, plugins=["hm"])(model(images), labels)

    def test_the_cure(self, model, images, labels):
        wrapped = losses.TripletMarginLoss(reducer=reducers.MeanReducer())
        assert AdversarialLoss(wrapped, model)(model(images), labels).ndim == 0

    def test_a_mean_over_anchors_is_a_scalar(self, model, images, labels):
        wrapped = losses.ContrastiveLoss(reducer=reducers.PerAnchorReducer())
        loss_func = AdversarialLoss(wrapped, model, attack=NO_BUDGET, keep_clean=False)
        torch.testing.assert_close(loss_func(model(images), labels), wrapped(model(images), labels))


def memory():
    return losses.CrossBatchMemory(losses.NTXentLoss(), 4, 32)


MASKS = {"keys last": torch.arange(8) >= 4, "keys first": torch.arange(8) < 4, "mixed": torch.arange(8) % 2 == 0}
TWICE = torch.arange(4).repeat(2)


class TestEnqueueMask:
    """PML's way to keep a memory of keys, as in MoCo: rows of the mask are enqueued, the others are the queries."""

    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    @pytest.mark.parametrize("labels", [TWICE, torch.arange(8) // 2, torch.arange(8) % 2], ids=["twice", "4", "2"])
    @pytest.mark.parametrize("by_position", [True, False])
    def test_is_the_memory_at_eps_0(self, mask, labels, by_position, model, images):
        plain, wrapped = memory(), memory()
        loss_func = AdversarialLoss(wrapped, model, attack=NO_BUDGET, keep_clean=False)
        for step in range(6):  # the memory is filled and begun anew
            rows = (images + 0.01 * step).clamp(0, 1)
            arguments = ((None, mask), {}) if by_position else ((), {"enqueue_mask": mask})
            expected = plain(model(rows), labels, enqueue_mask=mask)
            found = loss_func(model(rows), labels, *arguments[0], **arguments[1])
            torch.testing.assert_close(found, expected)
            assert torch.equal(wrapped.embedding_memory, plain.embedding_memory)
            assert torch.equal(wrapped.label_memory, plain.label_memory)
            assert (wrapped.queue_idx, wrapped.has_been_filled) == (plain.queue_idx, plain.has_been_filled)

    @pytest.mark.parametrize("options", [{}, {"keep_clean": False}, {"perturb": "anchor"}], ids=str)
    def test_is_attacked(self, options, model, images):
        loss_func = AdversarialLoss(memory(), model, attack=PGD, warmup=0, **options)
        for _ in range(2):
            loss_func(model(images), TWICE, enqueue_mask=MASKS["keys last"]).backward()
            assert loss_func.records.loss_after > loss_func.records.loss_before
            assert loss_func.records.num_perturbed == 4
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())

    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    @pytest.mark.parametrize("options", [{}, {"keep_clean": False}], ids=str)
    def test_keys_join_the_memory_once_and_as_they_are(self, mask, options, model, images):
        plain, wrapped = memory(), memory()
        loss_func = AdversarialLoss(wrapped, model, attack=PGD, warmup=0, **options)
        for step in range(6):
            embeddings, labels = model((images + 0.01 * step).clamp(0, 1)), torch.arange(8) // 2
            clean = plain(embeddings, labels, enqueue_mask=mask)
            loss_func(embeddings, labels, enqueue_mask=mask)
            assert loss_func.records.loss_before == pytest.approx(clean.item())
            assert torch.equal(wrapped.embedding_memory, plain.embedding_memory)
            assert torch.equal(wrapped.label_memory, plain.label_memory)

    @pytest.mark.parametrize("keys_first", [True, False])
    @pytest.mark.parametrize("moody", [True, False])
    def test_keys_of_a_momentum_encoder(self, keys_first, moody, model, moody_model, images):
        """As in MoCo: keys come without gradient from a copy of the model that follows it slowly."""
        encoder = moody_model if moody else model
        slow, wrapped, plain = copy.deepcopy(encoder), memory(), memory()
        loss_func = AdversarialLoss(wrapped, encoder, attack=PGD, warmup=0, keep_clean=False)
        views = images[:4], images[4:]
        for _ in range(3):
            queries = encoder(views[0])
            with torch.no_grad():
                keys = slow(views[1])
            rows = torch.cat([keys, queries] if keys_first else [queries, keys])
            mask = (torch.arange(8) < 4) == keys_first
            clean = plain(rows, TWICE, enqueue_mask=mask)
            loss = loss_func(rows, TWICE, enqueue_mask=mask)
            loss.backward()
            assert torch.equal(wrapped.embedding_memory, plain.embedding_memory)
            assert loss_func.records.num_perturbed == 4
            assert loss_func.records.loss_before == pytest.approx(clean.item())
            assert moody or loss > clean
        assert all(parameter.grad is None for parameter in slow.parameters())

    @pytest.mark.parametrize(
        "mask",
        [torch.arange(8) >= 4, torch.arange(8) >= 5, torch.arange(8) // 2 == 2],
        ids=["none", "one", "two"],
    )
    def test_queries_without_inputs_stay_as_they_are_and_the_others_are_attacked(self, mask, model, images, caplog):
        plain, seen = memory(), {}

        class Sees:
            @hookimpl
            def pml_adversarial_record(self, plan, adversarial):
                seen["plan"], seen["adversarial"] = plan, adversarial

        loss_func = AdversarialLoss(memory(), model, attack=PGD, warmup=0, keep_clean=False, plugins=[Sees()])
        queries = model(images[:4])
        with torch.no_grad():
            keys = model(images[4:])
        rows = torch.cat([queries, keys])
        clean = plain(rows, TWICE, enqueue_mask=mask)
        loss = loss_func(rows, TWICE, enqueue_mask=mask)
        assert torch.equal(loss_func.loss.embedding_memory, plain.embedding_memory)
        unknown = int((~mask[4:]).sum())
        told = [record.getMessage() for record in caplog.records if "not known" in record.getMessage()]
        assert len(told) == bool(unknown)
        assert loss_func.records.num_perturbed == 4
        assert loss_func.records.loss_before == pytest.approx(clean.item())
        assert loss > clean
        assert len(seen["adversarial"].inputs) == 4
        for _ in range(2):  # it is said once
            loss_func(torch.cat([model(images[:4]), keys]), TWICE, enqueue_mask=mask)
        assert len([r for r in caplog.records if "not known" in r.getMessage()]) == bool(unknown)

    def test_queries_of_which_none_has_inputs_are_refused(self, model, images):
        loss_func = AdversarialLoss(memory(), model)
        keys = model(images[4:])
        with torch.no_grad():
            queries = model(images[:4])
        with pytest.raises(CaptureError, match="gradient with respect to"):
            loss_func(torch.cat([queries, keys]), TWICE, enqueue_mask=MASKS["keys last"])

    def test_queries_and_keys_may_be_put_together_in_any_way(self, model, images):
        options = {"attack": PGD, "warmup": 0, "seed": 1, "keep_clean": False}
        loss_funcs = [AdversarialLoss(memory(), model, **options) for _ in range(2)]
        queries, mask = model(images[:4]), torch.tensor([True, True, False, False, False, False, True, True])
        with torch.no_grad():
            keys = model(images[4:])
        ways, values = ([queries, keys], [queries[:1], queries[1:], keys[:2], keys[2:]]), []
        for loss_func, parts in zip(loss_funcs, ways, strict=True):
            rows = torch.cat(parts)[[4, 5, 0, 1, 2, 3, 6, 7]]
            values.append(loss_func(rows, TWICE, enqueue_mask=mask))
            assert loss_func.records.num_perturbed == 4
            assert loss_func.records.loss_before == pytest.approx(memory()(rows, TWICE, enqueue_mask=mask).item())
            assert loss_func.records.loss_after > loss_func.records.loss_before
        assert torch.equal(*values)

    def test_queries_are_attacked_against_their_keys(self, model, images):
        """With one label for a query and its key, the key is the positive of the query, and no other row is."""
        seen = {}

        class Sees:
            @hookimpl
            def pml_adversarial_record(self, batch, plan):
                seen["batch"], seen["plan"] = batch, plan

        loss_func = AdversarialLoss(memory(), model, attack=PGD, perturb="anchor", plugins=[Sees()])
        mask = MASKS["keys first"]
        embeddings = model(images)
        loss_func(embeddings, TWICE, enqueue_mask=mask)
        assert torch.equal(seen["batch"].embeddings, embeddings[[4, 5, 6, 7, 0, 1, 2, 3]])
        assert seen["batch"].num_queries == 4
        assert seen["plan"].rows.tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("by_position", [True, False])
    def test_in_eval_mode(self, by_position, model, images):
        loss_func, plain = AdversarialLoss(memory(), model).eval(), memory()
        mask = MASKS["mixed"]
        arguments = ((None, mask), {}) if by_position else ((), {"enqueue_mask": mask})
        found = loss_func(model(images), TWICE, *arguments[0], **arguments[1])
        assert torch.equal(found, plain(model(images), TWICE, enqueue_mask=mask))

    def test_a_mask_that_cannot_be_used(self, model, images):
        loss_func, mask = AdversarialLoss(memory(), model), MASKS["mixed"]
        without = AdversarialLoss(losses.NTXentLoss(), model)
        embeddings = model(images)
        for wrong in (mask.long(), mask[:7], [True] * 8):
            with pytest.raises(InputError, match=r"enqueue_mask is .*expected torch.bool of shape \(8,\)"):
                loss_func(embeddings, TWICE, enqueue_mask=wrong)
        with pytest.raises(PlanError, match="both given"):
            loss_func(embeddings, TWICE, miners.BatchHardMiner()(embeddings, TWICE), mask)
        with pytest.raises(InputError, match="NTXentLoss has no memory"):
            without(embeddings, TWICE, enqueue_mask=mask)

    def test_a_copy_of_the_loss_does_the_same(self, model, images):
        loss_func = AdversarialLoss(memory(), model, attack=PGD, seed=1)
        loss_func(model(images), TWICE, enqueue_mask=MASKS["mixed"])
        other = copy.deepcopy(loss_func)
        other.watch(model)
        embeddings = model(images)
        values = [each(embeddings, TWICE, enqueue_mask=MASKS["mixed"]) for each in (loss_func, other)]
        assert torch.equal(*values)
