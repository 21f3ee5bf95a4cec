"""Inputs that are no images, and batches that do not fit into memory: small trainings, against the plain loss."""

import math

import pytest
import torch
from pytorch_metric_learning import losses, miners, reducers
from torch import nn
from torch.nn import functional

from pml_adversarial import AdversarialLoss, AdversarialMiner, InputError, hookimpl

LABELS = torch.arange(12) // 3


def contrastive():
    """With a mean over all pairs: one over those that are not 0 may fall when one more pair counts."""
    return losses.ContrastiveLoss(reducer=reducers.MeanReducer())


class Seen:
    """Keeps the inputs of the last step, as the attack sees them, clean and perturbed."""

    @hookimpl
    def pml_adversarial_record(self, batch, adversarial):
        self.batch, self.clean, self.found = batch, adversarial.clean_inputs, adversarial.inputs


class Waves(nn.Module):
    """Embeds waveforms ``(N, 1, T)`` in [-1, 1]."""

    low, high = -1.0, 1.0

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 4, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten())
        self.head = nn.Linear(16, 4)

    def forward(self, waves):
        return self.head(self.net(waves))


def waves():
    time, pitch = torch.linspace(0, 1, 64), 3 + LABELS[:, None]
    return (0.8 * torch.sin(2 * math.pi * pitch * time + torch.rand(12, 1)))[:, None]


def rows():
    """Standardised columns, each with a range of its own."""
    table = torch.randn(12, 6) * torch.tensor([1, 1, 2, 2, 3, 3.0]) + LABELS[:, None]
    return (table - table.mean(0)) / table.std(0)


def bounds_of(table):
    return table.min(0).values.tolist(), table.max(0).values.tolist()


def features():
    return functional.normalize(torch.randn(12, 20) + functional.one_hot(LABELS, 20))


# name -> (model, inputs, options)
CASES = {
    "waveforms": lambda: (Waves(), waves(), {"bounds": (-1, 1)}),
    "waveforms, bounds as lists of one": lambda: (Waves(), waves(), {"bounds": ([-1.0], [1.0])}),
    "tabular rows": lambda: (lambda t: (nn.Linear(6, 4), t, {"bounds": bounds_of(t)}))(rows()),
    "feature vectors": lambda: (
        nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4)),
        features(),
        {"bounds": (-1, 1)},
    ),
    "images after normalisation": lambda: (
        nn.Sequential(nn.Flatten(), nn.Linear(75, 4)),
        (torch.rand(12, 3, 5, 5) - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.25,
        {"normalization": ((0.5, 0.4, 0.3), (0.25, 0.25, 0.25))},
    ),
    "signed images, normalised": lambda: (
        nn.Sequential(nn.Flatten(), nn.Linear(75, 4)),
        (torch.rand(12, 3, 5, 5) * 2 - 1 - 0.1) / 0.5,
        {"normalization": ((0.1,) * 3, (0.5,) * 3), "bounds": (-1, 1)},
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param()


def range_of(model, inputs, options):
    """The range of each value of the inputs as the model takes them, by hand."""
    low, high = (torch.tensor(b, dtype=inputs.dtype) for b in options.get("bounds", (0.0, 1.0)))
    if "normalization" in options:
        mean, std = (torch.tensor(part)[:, None, None] for part in options["normalization"])
        low, high = (low - mean) / std, (high - mean) / std
    return low, high


class TestBounds:
    def test_a_training_in_which_the_loss_rises(self, case):
        model, inputs, options = case
        loss_func = AdversarialLoss(contrastive(), model, eps=0.1, warmup=0, **options)
        optimizer, before = torch.optim.SGD(model.parameters(), 0.05), [p.detach().clone() for p in model.parameters()]
        for _ in range(4):
            optimizer.zero_grad()
            loss_func(model(inputs), LABELS).backward()
            optimizer.step()
            assert loss_func.records.loss_after > loss_func.records.loss_before
            assert loss_func.records.num_perturbed == 12
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))

    @pytest.mark.parametrize("eps", [0.02, 0.1])
    def test_eps_is_a_share_of_the_range(self, case, eps):
        model, inputs, options = case
        given = []
        model.register_forward_pre_hook(lambda module, args: given.append(args[0].detach().clone()))
        seen = Seen()
        loss_func = AdversarialLoss(
            contrastive(), model, eps=eps, warmup=0, keep_clean=False, plugins=[seen], **options
        )
        loss_func(model(inputs), LABELS)
        low, high = range_of(model, inputs, options)
        undone = (inputs - low) / (high - low)
        torch.testing.assert_close(seen.clean, undone, rtol=1e-4, atol=1e-5)
        moved = (seen.found - seen.clean).abs()
        assert moved.max() == pytest.approx(eps, rel=1e-3)
        assert loss_func.records.perturbation_linf == pytest.approx(eps, rel=1e-3)
        # in the units of the inputs, for each channel by its own range
        in_units = (seen.found * (high - low) + low - inputs).abs()
        assert (in_units <= eps * (high - low) * 1.001 + 1e-5).all()
        assert (in_units / (high - low)).max() == pytest.approx(eps, rel=1e-2)
        found = seen.found * (high - low) + low
        assert (found >= low - 1e-5).all()
        assert (found <= high + 1e-5).all()

    def test_the_model_gets_inputs_in_its_own_units(self, case):
        model, inputs, options = case
        seen, loss_func_options = Seen(), {"eps": 0.1, "warmup": 0, "keep_clean": False}
        loss_func = AdversarialLoss(contrastive(), model, plugins=[seen], **loss_func_options, **options)
        value = loss_func(model(inputs), LABELS)
        low, high = range_of(model, inputs, options)
        expected = contrastive()(model(seen.found * (high - low) + low), LABELS)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)

    def test_the_plain_loss_at_next_to_no_budget(self, case):
        model, inputs, options = case
        plain = contrastive()(model(inputs), LABELS)
        loss_func = AdversarialLoss(contrastive(), model, eps=1e-6, warmup=0, keep_clean=False, **options)
        value = loss_func(model(inputs), LABELS)
        torch.testing.assert_close(value, plain, rtol=1e-3, atol=1e-5)
        for one, other in zip(*(torch.autograd.grad(v, list(model.parameters())) for v in (value, plain)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_a_miner_finds_other_triplets_by_them(self, case):
        model, inputs, options = case
        inner, seen = miners.TripletMarginMiner(margin=0.1, type_of_triplets="all"), Seen()
        miner = AdversarialMiner(inner, model, eps=0.1, plugins=[seen], **options)
        found, plain = miner(model(inputs), LABELS), inner(model(inputs), LABELS)
        assert (seen.found - seen.clean).abs().max() == pytest.approx(0.1, rel=1e-3)
        assert [member.tolist() for member in found] != [member.tolist() for member in plain]
        low, high = range_of(model, inputs, options)
        expected = inner(model(seen.found * (high - low) + low), LABELS)
        assert [member.tolist() for member in found] == [member.tolist() for member in expected]
        told = AdversarialMiner(inner, model, eps=0.1, **options)(model(inputs), LABELS, inputs=inputs)
        assert len(told) == 3

    def test_inputs_beyond_them_are_refused(self):
        model, inputs = Waves(), waves() * 1.5
        with pytest.raises(InputError, match=r"range from -1\.\d+ to 1\.\d+, beyond bounds=\(-1, 1\)"):
            AdversarialLoss(contrastive(), model, bounds=(-1, 1))(model(inputs), LABELS)
        clamped = inputs.clamp(-1, 1)  # the cure
        AdversarialLoss(contrastive(), model, bounds=(-1, 1))(model(clamped), LABELS)

    def test_without_them_the_cure_is_told(self):
        model, inputs = Waves(), waves()
        with pytest.raises(InputError, match=r"no images.*bounds=\(low, high\)"):
            AdversarialLoss(contrastive(), model)(model(inputs), LABELS)

    @pytest.mark.parametrize("wrong", [(1, -1), (0, 0), (0,), "ab", ([0, 0], [1]), ([0, 1], [1, 1]), (0, math.nan), 1])
    def test_that_cannot_be_used(self, wrong):
        with pytest.raises(InputError, match="bounds="):
            AdversarialLoss(contrastive(), Waves(), bounds=wrong)


class Clips(nn.Module):
    """Embeds clips ``(N, T, C, H, W)``, frame by frame."""

    def __init__(self, frames=4, channels=3, last=False):
        super().__init__()
        self.net, self.last = nn.Linear(channels * 16, 4), last

    def forward(self, clips):
        clips = clips.movedim(-1, 2) if self.last else clips
        return self.net(clips.flatten(2)).mean(1)


NORMALIZATION = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def clips(frames=4, last=False):
    pixels = torch.rand(12, frames, 3, 4, 4)
    mean, std = (torch.tensor(part)[:, None, None] for part in NORMALIZATION)
    normalised = (pixels - mean) / std
    return (pixels.movedim(2, -1), normalised.movedim(2, -1)) if last else (pixels, normalised)


class TestChannels:
    @pytest.mark.parametrize(
        ("frames", "last", "options"),
        [
            (4, False, {}),  # no other dimension is of size 3
            (4, False, {"channel_dim": 2}),
            (4, False, {"channel_dim": -3}),
            (3, False, {"channel_dim": -3}),
            (4, True, {"channel_dim": -1}),
        ],
    )
    def test_clips_are_normalised_by_channel(self, frames, last, options):
        model, seen = Clips(frames, last=last), Seen()
        pixels, inputs = clips(frames, last)
        loss_func = AdversarialLoss(
            contrastive(), model, eps=0.1, warmup=0, normalization=NORMALIZATION, plugins=[seen], **options
        )
        loss_func(model(inputs), LABELS).backward()
        torch.testing.assert_close(seen.clean, pixels, rtol=1e-4, atol=1e-5)
        assert loss_func.records.loss_after > loss_func.records.loss_before
        assert (seen.found - pixels).abs().max() == pytest.approx(0.1, rel=1e-3)

    def test_a_wrong_guess_is_not_made(self):
        model, (_, inputs) = Clips(3), clips(3)
        loss_func = AdversarialLoss(contrastive(), model, normalization=NORMALIZATION)
        with pytest.raises(InputError, match=r"more than one dimension.*channel_dim"):
            loss_func(model(inputs), LABELS)

    @pytest.mark.parametrize("channel_dim", [1, -1, 7])
    def test_a_dimension_of_another_size_is_refused(self, channel_dim):
        model, (_, inputs) = Clips(), clips()
        loss_func = AdversarialLoss(contrastive(), model, normalization=NORMALIZATION, channel_dim=channel_dim)
        with pytest.raises(InputError, match="no dimension"):
            loss_func(model(inputs), LABELS)

    def test_columns_of_sequences(self):
        sequences, model, seen = torch.rand(12, 6, 6), nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), Seen()
        low, high = [-0.1] * 6, [1.1 + number for number in range(6)]
        options = {"bounds": (low, high), "channel_dim": -1, "warmup": 0, "plugins": [seen]}
        loss_func = AdversarialLoss(contrastive(), model, **options)
        loss_func(model(sequences), LABELS)
        assert loss_func.records.loss_after > loss_func.records.loss_before
        torch.testing.assert_close(seen.clean, (sequences + 0.1) / (torch.tensor(high) + 0.1))


class Text(nn.Module):
    """Embeds token ids ``(N, T)``."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 6, padding_idx=0), nn.Linear(6, 4)

    def forward(self, input_ids, attention_mask=None):
        vectors = self.embedding(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.head((vectors * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class TestTokenEmbeddings:
    @pytest.fixture
    def ids(self):
        return torch.randint(1, 30, (12, 5))

    @pytest.fixture
    def text(self):
        return Text()

    def loss_func(self, text, **options):
        options = {"eps": 0.05, "warmup": 0, "keep_clean": False, **options}
        return AdversarialLoss(contrastive(), text, at=text.embedding, bounds=(-5, 5), **options)

    def test_a_training_in_which_the_loss_rises_and_ids_stay(self, text, ids):
        before, mask = ids.clone(), (torch.rand(12, 5) > 0.3).long().index_fill_(1, torch.tensor([0]), 1)
        loss_func, optimizer = self.loss_func(text), torch.optim.SGD(text.parameters(), 0.1)
        given = []
        text.register_forward_pre_hook(lambda module, args, kwargs: given.append(args[0]), with_kwargs=True)
        for _ in range(4):
            optimizer.zero_grad()
            loss_func(text(ids, attention_mask=mask), LABELS).backward()
            optimizer.step()
            assert loss_func.records.loss_after > loss_func.records.loss_before
            assert loss_func.records.num_perturbed == 12
        assert torch.equal(ids, before)
        assert all(len(one) <= 12 and one.dtype == torch.long for one in given)

    def test_the_table_learns_through_the_perturbed_rows(self, text, ids):
        self.loss_func(text)(text(ids), LABELS).backward()
        used = torch.isin(torch.arange(30), ids)
        learned = text.embedding.weight.grad.abs().sum(1) > 0
        assert torch.equal(learned, used)

    def test_gradient_is_that_of_the_plain_loss_at_next_to_no_budget(self, text, ids):
        values = self.loss_func(text, eps=1e-6)(text(ids), LABELS), contrastive()(text(ids), LABELS)
        gradients = [torch.autograd.grad(value, list(text.parameters())) for value in values]
        for one, other in zip(*gradients, strict=True):
            assert (one - other).norm() <= 1e-3 * other.norm()

    def test_eps_is_a_share_of_the_range(self, text, ids):
        seen = Seen()
        self.loss_func(text, plugins=[seen])(text(ids), LABELS)
        moved = (seen.found - seen.clean).abs() * 10
        assert seen.clean.shape == (12, 5, 6)
        torch.testing.assert_close(seen.clean * 10 - 5, text.embedding(ids).detach())
        assert moved.max() == pytest.approx(0.5, rel=1e-3)

    def test_the_model_need_not_be_named(self, text, ids):
        loss_func = AdversarialLoss(
            contrastive(), at=text.embedding, bounds=(-5, 5), eps=0.05, warmup=0, keep_clean=False, seed=1
        )
        value = loss_func(text(ids), LABELS)
        torch.testing.assert_close(value, self.loss_func(text, seed=1)(text(ids), LABELS))

    def test_without_at_the_cure_is_told(self, text, ids):
        with pytest.raises(InputError, match=r"input_ids: int64 \(12, 5\).*at=model.embedding"):
            AdversarialLoss(contrastive(), text)(text(ids), LABELS)

    @pytest.mark.parametrize(
        "options", [{}, {"bounds": (-5, 5), "perturb_input": "input_ids"}, {"bounds": (-5, 5), "at": "embedding"}]
    )
    def test_options_that_cannot_be(self, text, options):
        with pytest.raises(InputError, match="at="):
            AdversarialLoss(contrastive(), text, **{"at": text.embedding, **options})


def embedder(dropout=False, norm=False):
    layers = [nn.Flatten(), nn.Linear(36, 16)]
    layers += [nn.BatchNorm1d(16)] if norm else []
    layers += [nn.Dropout(0.3)] if dropout else []
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(16, 4))


@pytest.fixture
def pictures():
    return torch.rand(12, 1, 6, 6)


class TestChunk:
    """Some rows at a time, in the attack and in the pass that is trained on."""

    def trained(self, model, pictures, chunk, loop=lambda m, x: m(x), **options):
        seen = Seen()
        options = {"eps": 0.1, "warmup": 0, "seed": 3, "plugins": [seen], **options}
        loss_func = AdversarialLoss(contrastive(), model, chunk=chunk, **options)
        values, gradients = [], []
        for _ in range(2):
            value = loss_func(loop(model, pictures), LABELS)
            values.append(value.detach())
            gradients += torch.autograd.grad(value, list(model.parameters()))
        assert loss_func.records.loss_after > loss_func.records.loss_before
        return [seen.found, *values, *gradients]

    @pytest.mark.parametrize("chunk", [1, 5, 12, 64])
    @pytest.mark.parametrize("options", [{}, {"keep_clean": False}, {"perturb": "positive"}], ids=str)
    def test_is_as_without(self, pictures, chunk, options):
        model = embedder()
        whole, chunked = (self.trained(model, pictures, size, **options) for size in (None, chunk))
        for one, other in zip(whole, chunked, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "loop",
        [
            lambda m, x: functional.normalize(m(x)),
            lambda m, x: torch.cat([m(x[:5]), m(x[5:])]),
            lambda m, x: m(x.flip(0)).flip(0),
        ],
        ids=["normalised", "two calls", "flipped"],
    )
    def test_whatever_the_loop_does(self, pictures, loop):
        model = embedder()
        whole, chunked = (self.trained(model, pictures, size, loop) for size in (None, 5))
        for one, other in zip(whole, chunked, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_batch_norm_in_train_mode_is_refused_and_frozen_is_not(self, pictures):
        model = embedder(norm=True)
        with pytest.raises(InputError, match="chunk=5, and BatchNorm1d is in train mode"):
            self.trained(model, pictures, 5)
        model[2].eval()  # the cure
        whole, chunked = (self.trained(model, pictures, size) for size in (None, 5))
        for one, other in zip(whole, chunked, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_dropout_draws_alike_forward_and_backward(self, pictures):
        """The gradient is that of the value: it is held against differences of values."""
        torch.set_default_dtype(torch.double)
        try:
            model, pictures = embedder(dropout=True), pictures.double()
            weight, step = model[4].weight if isinstance(model[4], nn.Linear) else model[-1].weight, 1e-6
            values = []
            for sign in (1, -1, 0):
                loss_func = AdversarialLoss(contrastive(), model, eps=1e-9, warmup=0, seed=3, chunk=5, keep_clean=False)
                with torch.no_grad():
                    weight[0, 0] += sign * step
                torch.manual_seed(4)
                value = loss_func(model(pictures), LABELS)
                with torch.no_grad():
                    weight[0, 0] -= sign * step
                if not sign:
                    (gradient,) = torch.autograd.grad(value, weight)
                values.append(value.item())
            assert gradient[0, 0].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3)
        finally:
            torch.set_default_dtype(torch.float)

    def test_trains_with_dropout(self, pictures):
        model = embedder(dropout=True)
        loss_func = AdversarialLoss(contrastive(), model, eps=0.2, warmup=0, chunk=5)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_func(model(pictures), LABELS).backward()
            optimizer.step()
            assert loss_func.records.loss_after > loss_func.records.loss_before

    @pytest.mark.parametrize("wrong", [0, -1, 2.5, "8", True])
    def test_that_is_no_number_of_rows(self, wrong):
        with pytest.raises(InputError, match="chunk="):
            AdversarialLoss(contrastive(), embedder(), chunk=wrong)

    def test_token_embeddings_in_chunks(self):
        text, ids = Text(), torch.randint(1, 30, (12, 5))
        found = []
        for chunk in (None, 5):
            loss_func = AdversarialLoss(
                contrastive(), text, at=text.embedding, bounds=(-5, 5), eps=0.1, warmup=0, seed=1, chunk=chunk
            )
            value = loss_func(text(ids), LABELS)
            found.append([value, *torch.autograd.grad(value, list(text.parameters()))])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class TestCachedGradients:
    """Large batches as GradCache trains them: embeddings without gradient, their gradient, then chunk by chunk."""

    def step(self, model, loss_func, pictures):
        """Puts the gradient of one step into the weights."""
        with torch.no_grad():
            embeddings = torch.cat([model(chunk) for chunk in pictures.split(5)])
        embeddings.requires_grad_()
        value = (
            loss_func(embeddings, LABELS, inputs=pictures)
            if isinstance(loss_func, AdversarialLoss)
            else (loss_func(embeddings, LABELS))
        )
        value.backward()
        cached = embeddings.grad
        if cached is not None:
            for chunk, gradient in zip(pictures.split(5), cached.split(5), strict=True):
                model(chunk).backward(gradient)
        return value.detach()

    @pytest.mark.parametrize("keep_clean", [True, False])
    @pytest.mark.parametrize("chunk", [None, 5])
    def test_gradient_is_that_of_the_whole_batch_at_next_to_no_budget(self, pictures, keep_clean, chunk):
        model = embedder()
        options = {"eps": 1e-6, "warmup": 0, "keep_clean": keep_clean, "chunk": chunk}
        whole = AdversarialLoss(contrastive(), model, **options)(model(pictures), LABELS)
        expected = torch.autograd.grad(whole, list(model.parameters()))
        if not keep_clean:
            plain = torch.autograd.grad(contrastive()(model(pictures), LABELS), list(model.parameters()))
            for one, other in zip(expected, plain, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        value = self.step(model, AdversarialLoss(contrastive(), model, **options), pictures)
        torch.testing.assert_close(value, whole, rtol=1e-3, atol=1e-5)
        for weight, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-5)

    def test_a_training_in_which_the_loss_rises(self, pictures):
        model = embedder()
        loss_func = AdversarialLoss(contrastive(), model, eps=0.1, warmup=0, chunk=5)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            self.step(model, loss_func, pictures)
            optimizer.step()
            assert loss_func.records.loss_after > loss_func.records.loss_before
            assert loss_func.records.num_perturbed == 12


class TestAccumulation:
    """As open_clip accumulates: cached features of all chunks, each in turn replaced by its live ones."""

    def gradients(self, model, loss_func, pictures):
        with torch.no_grad():
            cached = [model(chunk) for chunk in pictures.split(4)]
        total, counts = 0, []
        for number, chunk in enumerate(pictures.split(4)):
            live = model(chunk)
            embeddings = torch.cat([*cached[:number], live, *cached[number + 1 :]])
            value = loss_func(embeddings, LABELS)
            value.backward()
            total += value.item()
            if isinstance(loss_func, AdversarialLoss):
                counts.append(loss_func.records.num_perturbed)
        found = [weight.grad.clone() for weight in model.parameters()]
        model.zero_grad()
        return found, total, counts

    def test_at_next_to_no_budget_it_is_the_plain_loop(self, pictures):
        model = embedder()
        plain = self.gradients(model, contrastive(), pictures)
        whole = torch.autograd.grad(contrastive()(model(pictures), LABELS), list(model.parameters()))
        loss_func = AdversarialLoss(contrastive(), model, eps=1e-6, warmup=0, keep_clean=False)
        found = self.gradients(model, loss_func, pictures)
        assert found[1] == pytest.approx(plain[1], rel=1e-3)
        for one, other, of_whole in zip(found[0], plain[0], whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(one, of_whole, rtol=1e-3, atol=1e-5)

    def test_the_live_rows_are_attacked_and_the_cached_stay(self, pictures, caplog):
        model, seen = embedder(), Seen()
        loss_func = AdversarialLoss(contrastive(), model, eps=0.1, warmup=0, keep_clean=False, plugins=[seen])
        _, plain_total, _ = self.gradients(model, contrastive(), pictures)
        _, total, counts = self.gradients(model, loss_func, pictures)
        assert counts == [4, 4, 4]
        assert total > plain_total
        assert torch.equal(seen.clean, pictures[8:])
        assert sum("8 of 12 rows are not known" in record.getMessage() for record in caplog.records) == 1

    @pytest.mark.parametrize("options", [{}, {"keep_clean": False}, {"chunk": 3}], ids=str)
    def test_a_training_in_which_the_loss_rises(self, pictures, options):
        model = embedder()
        loss_func = AdversarialLoss(contrastive(), model, eps=0.1, warmup=0, **options)
        with torch.no_grad():
            cached = model(pictures[4:])
        for _ in range(3):
            loss_func(torch.cat([model(pictures[:4]), cached]), LABELS).backward()
            assert loss_func.records.loss_after > loss_func.records.loss_before
            assert loss_func.records.num_perturbed == 4
