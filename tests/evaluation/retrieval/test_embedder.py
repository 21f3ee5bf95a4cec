"""A model as a function from pixels to embeddings: what it counts, what it refuses."""

import math

import pytest
import torch
from query_batches import Made, images_of, network
from some_galleries import some
from torch import nn

from pml_adversarial.errors import InputError
from pml_adversarial.evaluation import certify, evaluate_targeted, evaluate_verification
from pml_adversarial.evaluation.retrieval.embedder import Embedder, batches, check_finite, embed_all
from pml_adversarial.evaluation.retrieval.images import ImageSet


class To(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, images):
        return images.to(self.dtype)


class TestEmbedder:
    def test_gives_what_the_model_gives(self):
        model, pixels = network().eval(), images_of()[0]
        assert torch.equal(Embedder(model)(pixels), model(pixels))

    @pytest.mark.parametrize(
        ("before", "weights", "given", "expected"),
        [
            (nn.Identity(), torch.float32, torch.float32, torch.float32),
            (nn.Identity(), torch.bfloat16, torch.float32, torch.bfloat16),
            (nn.Identity(), torch.float64, torch.float32, torch.float64),
            (nn.Identity(), torch.float32, torch.float16, torch.float32),
            (To(torch.bfloat16), torch.bfloat16, torch.float32, torch.float32),
            (To(torch.float64), torch.float64, torch.float16, torch.float32),
        ],
    )
    @pytest.mark.parametrize("hidden", [True, False])
    def test_inputs_are_in_the_highest_precision_that_the_model_takes(self, before, weights, given, expected, hidden):
        """A model that casts after its own normalisation gets what it gets in use."""
        model = nn.Sequential(before, nn.Flatten(), nn.Linear(36, 4).to(weights))
        if hidden and (isinstance(before, nn.Identity) and weights != torch.float32):
            pytest.skip("nor does the function take such images")
        embed = Embedder((lambda images: model(images)) if hidden else model)
        embed.probe(images_of()[0][:1], given)
        assert embed.dtype == expected

    def test_state_that_the_model_changes_is_as_it_was(self):
        class Counting(nn.Flatten):
            def forward(self, x):
                self.passes += 1
                return super().forward(x)

        model = Counting()
        model.passes = torch.zeros(())
        embed, pixels = Embedder(model), torch.rand(5, 1, 2, 2)
        embed.probe(pixels)
        assert model.passes == 0
        with embed.isolated():
            embed(pixels)
            assert model.passes == 1
        assert model.passes == 0

    @pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
    def test_a_container_with_a_forward_of_its_own_is_called(self, kind):
        class Negated(kind):
            def forward(self, x):
                (first, second) = self.values() if isinstance(self, nn.ModuleDict) else self
                return first(x) - second(x)

        parts, pixels = [network(), network(seed=1)], images_of()[0]
        model = Negated(parts if kind is nn.ModuleList else dict(zip(("trunk", "embedder"), parts, strict=True))).eval()
        assert torch.equal(Embedder(model)(pixels), model(pixels))

    def test_pixels_are_normalised_per_channel(self):
        pixels = torch.rand(5, 3, 2, 2)
        found = Embedder(nn.Flatten(), ([0.1, 0.2, 0.3], [0.5, 0.4, 0.25]))(pixels).reshape(5, 3, 2, 2)
        for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.4), (0.3, 0.25))):
            torch.testing.assert_close(found[:, channel], (pixels[:, channel] - mean) / std)

    def test_passes_without_gradient_are_no_backward_passes(self):
        embed, pixels = Embedder(nn.Flatten()), torch.rand(5, 1, 2, 2, requires_grad=True)
        embed(pixels)
        with torch.no_grad():
            embed(pixels)
        embed(pixels.detach())
        assert (embed.forward_passes, embed.backward_passes) == (15, 5)

    def test_a_model_without_gradient_has_a_gradient_of_zero(self):
        pixels = torch.rand(5, 1, 2, 2, requires_grad=True)
        embeddings = Embedder(Made(lambda x: x.detach().flatten(1)))(pixels)
        assert torch.equal(embeddings, pixels.flatten(1))
        (gradient,) = torch.autograd.grad(embeddings.sum(), pixels)
        assert torch.equal(gradient, torch.zeros_like(pixels))

    def test_the_device_is_that_of_parameters_or_buffers_or_the_cpu(self):
        with_buffer = nn.Module()
        with_buffer.register_buffer("known", torch.zeros(3, device="meta"))
        assert Embedder(nn.Linear(2, 3, device="meta")).device.type == "meta"
        assert Embedder(with_buffer).device.type == "meta"
        assert Embedder(nn.Flatten()).device.type == "cpu"

    @pytest.mark.parametrize(
        ("made", "found"),
        [
            (lambda x: x, r"\(7, 1, 6, 6\)"),
            (lambda x: x.flatten(1)[:3], r"\(3, 36\)"),
            (lambda x: x.sum(), r"\(\)"),
            (lambda x: (x.flatten(1),), "tuple"),
            (lambda x: None, "NoneType"),
        ],
    )
    def test_what_is_not_one_embedding_per_image_is_refused(self, made, found):
        message = rf"The model returned {found} for 7 images; expected embeddings \(7, D\)\."
        with pytest.raises(InputError, match=message):
            Embedder(Made(made))(torch.rand(7, 1, 6, 6))


class Hiding(nn.Module):
    """It holds its backbone in a tuple, out of its parameters, and makes a layer anew in each call."""

    def __init__(self, backbone):
        super().__init__()
        self.held = (backbone,)

    def forward(self, images):
        return nn.Tanh()(self.held[0](images))


class TestModulesThatAreNotRegistered:
    def backbone(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))

    def test_are_in_eval_mode_and_come_back(self):
        backbone, images = self.backbone(), images_of()[0]
        model = Hiding(backbone)
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        embed = Embedder(model)
        embed.probe(images[:1])
        assert embed.modules == (model, backbone)
        with embed.isolated():
            found = embed(images)
            assert not any(parameter.requires_grad for parameter in backbone.parameters())
        assert backbone[2].training
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
        backbone.eval()
        assert torch.equal(found, model(images))

    def test_of_a_compiled_model_without_another_compilation(self):
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        backbone = self.backbone().eval()
        model = torch.compile(Hiding(backbone).eval(), backend=backend)
        embed = Embedder(model)
        embed.probe(images_of()[0][:1])
        assert embed.modules == (model, backbone)
        assert len(compiled) == 1

    def test_in_each_kind_of_evaluation(self):
        images, labels = images_of()
        backbone = self.backbone()
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        options = {"eps": 0.05, "steps": 1, "restarts": 1, "square": 0}
        evaluate_targeted(Hiding(backbone), (images, labels), target=int(labels[0]), **options)
        evaluate_verification(Hiding(backbone), (images, labels), genuine=4, impostors=4, checks=False, **options)
        certify(Hiding(backbone), (images, labels), sigma=0.1, radii=0.1, samples=100, selection_samples=10)
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


class TestRandomness:
    """Whether a second call gives something else, beyond rounding and one hundredth of the spread."""

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda e: e, False),
            (lambda e: e + 0.1 * torch.randn_like(e), True),
            (lambda e: nn.functional.dropout(e, 0.5, training=True), True),
            (lambda e: e + (torch.rand(()) < 0.9) * torch.rand(()), True),
            (lambda e: e * (1 + 1e-7 * torch.randn_like(e)), False),
            (lambda e: e - e.mean(0), False),  # depends on the batch, not on chance
            (lambda e: (e * (1 + 1e-4 * torch.rand_like(e))).bfloat16(), False),
        ],
        ids=["fixed", "noise", "dropout", "one number", "rounding", "batch", "coarse"],
    )
    def test_is_found(self, change, expected):
        images, _ = images_of()
        model = network().eval()
        embed = Embedder(lambda x: change(model(x)))
        assert not embed.is_random
        embed.probe(images[:1])
        torch.manual_seed(0)
        embed.probe_randomness(images[:16])
        assert embed.is_random is expected
        assert embed.forward_passes == 0

    def test_of_one_image(self):
        model = network().eval()
        for noise, expected in ((0.0, False), (0.1, True)):
            embed = Embedder(lambda x, noise=noise: model(x) + noise * torch.randn(1))
            embed.probe(images_of()[0][:1])
            embed.probe_randomness(images_of()[0][:1])
            assert embed.is_random is expected


class TestCheckGradient:
    def test_a_model_with_gradient_passes_also_where_gradients_are_off(self):
        pixels = torch.rand(3, 1, 6, 6)
        with torch.no_grad():
            Embedder(network()).check_gradient(pixels)
        assert not pixels.requires_grad

    @pytest.mark.parametrize("made", [lambda x: x.detach().flatten(1), lambda x: torch.zeros(len(x), 2)])
    def test_a_model_without_is_refused(self, made):
        with pytest.raises(InputError, match=r"have no gradient with respect to the images, .* without torch\.no_grad"):
            Embedder(Made(made)).check_gradient(torch.rand(3, 1, 6, 6))

    def test_is_no_pass_that_counts(self):
        embed = Embedder(network())
        embed.check_gradient(torch.rand(3, 1, 6, 6))
        assert (embed.forward_passes, embed.backward_passes) == (0, 0)


def test_batches_cover_everything_once():
    assert [list(range(10))[piece] for piece in batches(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(batches(0, 4)) == []


def test_embed_all_is_without_gradient_and_in_batches():
    asked, weight = [], torch.ones(3, requires_grad=True)

    def embed(images):
        asked.append(len(images))
        return images * weight

    found = embed_all(embed, some(7, dimension=3), 3)
    assert asked == [3, 3, 1]
    assert torch.equal(found, some(7, dimension=3))
    assert not found.requires_grad


def test_embed_all_takes_some_rows_of_an_image_set():
    images, labels = images_of(7)
    pixels = ImageSet((images, labels), torch.device("cpu"), "gallery")
    assert torch.equal(embed_all(nn.Flatten(), pixels, 4), images.flatten(1))
    rows = torch.tensor([5, 0, 6])
    assert torch.equal(embed_all(nn.Flatten(), pixels, 2, rows), images[rows].flatten(1))


class TestCheckFinite:
    def test_finite_embeddings_come_back(self):
        embeddings = some(4)
        assert check_finite(embeddings) is embeddings

    def test_the_images_are_counted_of_which_anything_is_not_finite(self):
        embeddings = some(5)
        embeddings[1, 2], embeddings[1, 3], embeddings[3, 0], embeddings[4, 4] = math.nan, 9, math.inf, -math.inf
        message = "returned NaN or infinite embeddings for 3 of 5 images without attack; expected finite ones"
        with pytest.raises(InputError, match=message):
            check_finite(embeddings)
