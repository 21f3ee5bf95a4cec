"""What is perturbed: the tensor that is named, or the first of floating point on which the embeddings depend."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pml_adversarial.errors import CaptureError, InputError
from pml_adversarial.training.pixels import PixelSpace
from pml_adversarial.training.replay import Replay
from pml_adversarial.training.sources import INNER, Choice, Sources
from pml_adversarial.training.trace import Fixed, steps_to
from pml_adversarial.training.tracing import ref_of
from pml_adversarial.training.watch import Watch


@pytest.fixture
def inner():
    """A module inside of models, whose outputs are kept."""
    return nn.Linear(36, 4)


@pytest.fixture(autouse=True)
def watch(inner):
    return Watch(inner=inner)


@pytest.fixture
def others(images):
    return images.flip(0) * 0.5


def sources_of(*embeddings, choice=Choice()):  # noqa: B008
    results = [ref_of(tensor) or Fixed(tensor) for tensor in embeddings]
    return Sources(steps_to(results), results, choice)


def values_of(*embeddings, **options):
    return [source.value for source in sources_of(*embeddings, **options).all]


class Makes(nn.Module):
    """A model with any forward. It has weights, so that what it gives has gradient."""

    def __init__(self, forward, inner=None):
        super().__init__()
        self.inner = nn.Linear(36, 4) if inner is None else inner
        self.forward = forward.__get__(self)


def embed(self, images):
    return self.inner(images.flatten(1))


def first_by_position(self, images, other):
    return embed(self, images) + embed(self, other)


def second_alone(self, images, other):
    return embed(self, other)


def second_through_rounding(self, images, other):
    return embed(self, other) + (images.flatten(1)[:, :4] > 0.5)


def mask_first(self, mask, images):
    return embed(self, images) * mask


def two_outputs(self, images, other):
    return embed(self, images), embed(self, other), embed(self, images) + embed(self, other)


def in_a_batch(self, batch, scale=1.0):
    return embed(self, batch["images"]) * scale


def any_keywords(self, ids=None, **given):
    return embed(self, given["pixels"])


def single_numbers(self, noise, images):
    return embed(self, images) * noise[:, None]


def one_number_each(self, values):
    return values[:, None] * self.inner.weight[0, :4]


class TestByItself:
    def test_the_first_by_position(self, images, others):
        assert values_of(Makes(first_by_position)(images, others)) == [images]

    def test_in_the_order_of_forward_not_of_the_call(self, images, others):
        model = Makes(first_by_position)
        assert values_of(model(other=others, images=images)) == [images]
        assert values_of(model(others, images)) == [others]

    @pytest.mark.parametrize("forward", [second_alone, second_through_rounding])
    def test_the_first_on_which_the_output_depends(self, images, others, forward):
        assert values_of(Makes(forward)(images, others)) == [others]

    def test_a_mask_that_comes_first_has_to_be_told(self, images):
        model, mask = Makes(mask_first), torch.rand(8, 4)
        assert values_of(model(mask, images)) == [mask]
        assert values_of(model(mask, images), choice=Choice("images")) == [images]
        assert values_of(model(mask > 0.5, images)) == [images]  # no floating point

    def test_batches_before_single_numbers(self, images):
        assert values_of(Makes(single_numbers)(torch.rand(8), images)) == [images]

    def test_single_numbers_where_there_is_nothing_else(self):
        values = torch.rand(8)
        assert values_of(Makes(one_number_each)(values)) == [values]

    def test_parameters_are_no_inputs(self, images):
        assert values_of(Makes(first_by_position)(nn.Parameter(torch.rand(8, 1, 6, 6)), images)) == [images]

    def test_in_a_container(self, images):
        assert values_of(Makes(in_a_batch)({"ids": torch.arange(8), "images": images}, 2.0)) == [images]

    def test_among_any_keywords(self, images):
        assert values_of(Makes(any_keywords)(torch.arange(8), pixels=images)) == [images]

    def test_that_carry_gradient_themselves(self, images):
        leaf = images.clone().requires_grad_()
        assert values_of(Makes(embed)(leaf)) == [leaf]

    def test_what_is_chosen_of_several_is_said_once(self, images, others, caplog):
        model = Makes(first_by_position)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                values_of(model(images, others))
        (message,) = [record.getMessage() for record in caplog.records]
        assert "images: float32 (8, 1, 6, 6), other: float32 (8, 1, 6, 6)" in message
        assert "perturb_input='images'" in message

    def test_nothing_is_said_where_there_is_no_choice(self, images, caplog):
        values_of(Makes(first_by_position)(images, images))
        values_of(Makes(embed)(images))
        values_of(Makes(mask_first)(torch.rand(8, 4) > 0.5, images))
        assert not caplog.records

    def test_looking_for_dependence_moves_nothing(self, moody_model, images, others):
        model = Makes(lambda self, one, other: moody_model(one) + moody_model(other))
        model.part = moody_model
        embeddings = model(images, others)
        before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        assert values_of(embeddings) == [images]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in model.parameters())


class TestByName:
    @pytest.mark.parametrize(("name", "place"), [("images", 0), ("other", 1)])
    @pytest.mark.parametrize("call", ["by position", "by keyword"])
    def test_of_forward(self, images, others, name, place, call):
        model = Makes(first_by_position)
        output = model(images, others) if call == "by position" else model(other=others, images=images)
        assert values_of(output, choice=Choice(name)) == [(images, others)[place]]

    def test_of_any_keywords(self, images):
        assert values_of(Makes(any_keywords)(pixels=images), choice=Choice("pixels")) == [images]

    def test_of_a_container(self, images):
        assert values_of(Makes(in_a_batch)({"images": images}), choice=Choice("batch")) == [images]
        assert values_of(Makes(in_a_batch)({"images": images}), choice=Choice("images")) == [images]

    def test_of_what_a_wrapper_hands_on_to(self, images, others):
        model = nn.DataParallel(Makes(first_by_position))
        assert values_of(model(images, others), choice=Choice("other")) == [others]

    def test_of_what_was_compiled(self, images, others):
        model = torch.compile(Makes(first_by_position), backend="eager")
        assert values_of(model(images, others), choice=Choice("other")) == [others]

    def test_on_which_the_output_does_not_depend_is_taken_all_the_same(self, images, others):
        assert values_of(Makes(second_alone)(images, others), choice=Choice("images")) == [images]

    @pytest.mark.parametrize("name", ["pixel_values", "scale", ""])
    def test_that_holds_no_tensor_or_is_none_is_refused(self, images, name):
        with pytest.raises(InputError, match=rf"perturb_input='{name}'.*images: float32 \(8, 1, 6, 6\)"):
            values_of(Makes(in_a_batch)({"images": images}, 2.0), choice=Choice(name))

    def test_that_holds_whole_numbers_is_refused(self, images):
        with pytest.raises(InputError, match=r"perturb_input='ids'.*ids: int64 \(8,\)"):
            values_of(Makes(any_keywords)(torch.arange(8), pixels=images), choice=Choice("ids"))


class TestSeveral:
    def test_each_output_has_its_own(self, images, others):
        left, right, both = Makes(two_outputs)(images, others)
        assert values_of(left) == [images]
        assert values_of(right) == [others]
        assert values_of(both) == [images]
        sources = sources_of(torch.cat([left, right]))
        assert [source.value for source in sources.all] == [images, others]
        step = ref_of(left).step
        assert [sources.of_output(step, place) for place in range(3)] == [0, 1, None]
        assert [sources.argument_of_output(step, place) for place in range(3)] == [0, 1, None]

    def test_each_copy_goes_through_its_own(self, images, others):
        model = Makes(two_outputs)
        model.inner = nn.Linear(36, 4).double()
        left, right, _ = model(images.double(), others.double())
        replay = Replay([ref_of(torch.cat([left, right]))], PixelSpace())
        given = torch.rand(16, 1, 6, 6).double()
        torch.testing.assert_close(replay.embed(given), model.inner(given.flatten(1)))

    def test_one_tensor_in_two_calls_is_one(self, images):
        first, second = Makes(embed), Makes(embed)
        sources = sources_of(torch.cat([first(images), second(images), first(images)]))
        (source,) = sources.all
        assert source.value is images
        assert len(source.places) == 3
        assert len(sources) == 1

    def test_one_tensor_in_two_places_of_a_call_is_one(self, images):
        model = Makes(first_by_position)
        embeddings = model(images, images)
        sources = sources_of(embeddings)
        assert [source.value for source in sources.all] == [images]
        assert [sources.holding(leaf) for leaf in ref_of(embeddings).step.leaves] == [0, 0]
        replay = Replay([ref_of(embeddings)], PixelSpace())
        torch.testing.assert_close(replay.embed(1 - images), model(1 - images, 1 - images))

    def test_equal_tensors_that_are_two_are_two(self, images):
        model = Makes(embed)
        assert len(sources_of(torch.cat([model(images), model(images.clone())]))) == 2

    def test_a_view_is_another(self, images):
        model = Makes(embed)
        assert len(sources_of(torch.cat([model(images), model(images[:])]))) == 2

    def test_modules_in_a_row_have_one(self, images):
        model, head = Makes(embed), nn.Linear(4, 2)
        sources = sources_of(head(functional.normalize(model(images))))
        assert [source.value for source in sources.all] == [images]

    def test_a_fixed_reference_has_none(self, images):
        assert values_of(Makes(embed)(images), torch.rand(3, 4)) == [images]


class TestAt:
    """The output of a module inside of the model."""

    @pytest.fixture
    def model(self, inner):
        return nn.Sequential(nn.Flatten(), inner, nn.Tanh())

    def test_inside(self, model, inner, images):
        embeddings = model(images)
        sources = sources_of(embeddings, choice=Choice(at=inner))
        assert torch.equal(sources.all[0].value, inner(images.flatten(1)))
        assert not sources.all[0].value.requires_grad
        step = ref_of(embeddings).step
        assert sources.argument_of_output(step, 0) == INNER
        assert sources.at(step, INNER) == 0

    def test_outermost(self, inner, images):
        sources = sources_of(functional.normalize(inner(images.flatten(1))), choice=Choice(at=inner))
        assert torch.equal(sources.all[0].value, inner(images.flatten(1)))

    @pytest.mark.parametrize("outermost", [True, False])
    def test_is_embedded_from_there_on(self, model, inner, images, outermost):
        embeddings = functional.normalize(inner(images.flatten(1)) if outermost else model(images))
        replay = Replay([ref_of(embeddings)], PixelSpace(bounds=(-3, 3)), choice=Choice(at=inner))
        torch.testing.assert_close(replay.embed(replay.inputs), embeddings)
        given, rows = torch.rand(3, 4), torch.tensor([5, 5, 0])
        tail = (lambda f: f) if outermost else torch.tanh
        torch.testing.assert_close(replay.embed(given, rows), functional.normalize(tail(6 * given - 3)))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_inside_of_a_checkpoint(self, inner, images, reentrant):
        class Checkpoints(nn.Sequential):
            def forward(self, features):
                return checkpoint(super().forward, features, use_reentrant=reentrant)

        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), Checkpoints(inner, nn.Tanh()))
        replay = Replay([ref_of(model(images))], PixelSpace(bounds=(-3, 3)), choice=Choice(at=inner))
        given, rows = replay.inputs.clone().requires_grad_(), torch.tensor([5, 5, 0])
        found, expected = replay.embed(given[rows], rows), torch.tanh(6 * given[rows] - 3)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*[torch.autograd.grad(some.square().sum(), given)[0] for some in (found, expected)])

    def test_with_whole_numbers_as_inputs(self, watch):
        table = nn.Embedding(9, 4)
        _other = Watch(inner=table)
        model = Makes(lambda self, ids: self.inner(table(ids).flatten(1)))
        model.table, ids = table, torch.randint(9, (8, 9))
        sources = sources_of(model(ids), choice=Choice(at=table))
        assert torch.equal(sources.all[0].value, table(ids))

    def test_of_two_calls_of_the_model(self, model, inner, images):
        values = values_of(torch.cat([model(images[:3]), model(images[3:])]), choice=Choice(at=inner))
        assert torch.equal(torch.cat(values), inner(images.flatten(1)))

    def test_that_ran_twice_in_a_call_is_refused(self, inner, images, others):
        model = Makes(first_by_position, inner)
        with pytest.raises(CaptureError, match=r"Linear.* ran 2 times in one forward pass of Makes"):
            values_of(model(images, others), choice=Choice(at=inner))

    def test_that_did_not_run_is_refused(self, inner, images):
        with pytest.raises(CaptureError, match=r"no Linear that is this one ran inside of Makes"):
            values_of(Makes(embed)(images), choice=Choice(at=inner))

    def test_behind_another_module_is_refused(self, inner, images):
        trunk, head = nn.Flatten(), nn.Sequential(inner)
        flat = trunk(images.requires_grad_())
        with pytest.raises(CaptureError, match="is inside of Sequential, which took what other modules gave"):
            values_of(head(flat * 1), choice=Choice(at=inner))

    def test_the_cure_put_both_into_one_module(self, inner, images):
        model = nn.Sequential(nn.Flatten(), nn.Sequential(inner))
        assert torch.equal(values_of(model(images), choice=Choice(at=inner))[0], inner(images.flatten(1)))

    def test_that_gives_no_tensor_is_refused(self, images):
        recurrent = nn.GRU(6, 4, batch_first=True)
        _other = Watch(inner=recurrent)
        model = Makes(lambda self, x: recurrent(x[:, 0])[0][:, -1])
        model.recurrent = recurrent
        with pytest.raises(CaptureError, match=r"GRU.* gave tuple"):
            values_of(model(images), choice=Choice(at=recurrent))

    def test_that_gives_other_rows_is_refused(self, inner, images):
        model = Makes(lambda self, x: self.inner(x.view(4, 72)[:, :36]).repeat(2, 1), inner)
        with pytest.raises(CaptureError, match=r"Makes gave \(8, 4\) for inputs \(4, 4\)"):
            values_of(model(images), choice=Choice(at=inner))


class TestRefusals:
    @pytest.mark.parametrize("between", [lambda f: f, lambda f: f * 2, lambda f: f[:, :4], torch.clone], ids=range(4))
    def test_features_that_were_computed_under_no_grad(self, images, between):
        trunk, head = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), nn.Linear(4, 4)
        with torch.no_grad():
            features = trunk(images)
        with pytest.raises(CaptureError, match="Linear took features that Sequential computed under no_grad"):
            values_of(head(between(features)))

    def test_features_of_an_earlier_step(self, watch, images):
        trunk, head = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), nn.Linear(4, 4)
        features = trunk(images).detach()
        for _ in range(3):
            watch.forget()
            trunk(images)
        with pytest.raises(CaptureError, match="earlier step"):
            values_of(head(features))

    def test_features_with_a_graph_that_nobody_traced(self, images):
        made = images.flatten(1) @ torch.rand(36, 36, requires_grad=True)
        with pytest.raises(CaptureError, match="Linear took features that were computed with gradient"):
            values_of(nn.Linear(36, 4)(made))

    def test_images_that_were_augmented_with_gradient_are_data(self, images):
        flipped = images.requires_grad_().flip(-1)
        assert values_of(nn.Sequential(nn.Flatten(), nn.Linear(36, 4))(flipped)) == [flipped]

    def test_the_cure_weights_without_gradient(self, images):
        trunk, head = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).requires_grad_(False), nn.Linear(4, 4)
        assert values_of(head(trunk(images))) == [images]

    def test_other_rows_than_inputs(self, images):
        model = Makes(lambda self, x: embed(self, x).view(16, 2))
        with pytest.raises(CaptureError, match=r"Makes gave \(16, 2\) for inputs \(8, 1, 6, 6\)"):
            values_of(model(images))

    @pytest.mark.parametrize("which", ["images", "other", "tail"])
    def test_a_tensor_that_was_changed_since(self, images, others, which):
        held = {"images": images.clone(), "other": others.clone(), "tail": torch.rand(8, 4)}
        embeddings = Makes(first_by_position)(held["images"], held["other"]) + held["tail"]
        assert len(sources_of(embeddings)) == 1
        held[which].add_(0.01)
        with pytest.raises(CaptureError, match="changed in place since"):
            sources_of(embeddings)

    def test_an_input_that_the_model_changed(self, images):
        model = Makes(lambda self, x: embed(self, x.sub_(0.01)))
        with pytest.raises(CaptureError, match="Makes changed its input in place"):
            values_of(model(images.clone()))
        assert len(values_of(Makes(lambda self, x: embed(self, x - 0.01))(images))) == 1

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (torch.arange(8), r"values: int64 \(8,\).*at=model.embedding"),
            (torch.zeros(8, 3, dtype=torch.uint8), r"values: uint8 \(8, 3\).*float\(\) / 255"),
            (torch.zeros(8, dtype=torch.bool), r"values: bool \(8,\)"),
            (torch.tensor(2.0), r"values: float32 \(\)"),
            (8, "values: -.*inputs=x"),
        ],
        ids=["numbers", "bytes", "mask", "scalar", "no tensor"],
    )
    def test_nothing_of_floating_point(self, value, words):
        model = Makes(lambda self, values: self.inner.weight[:, :4].repeat(2, 1) * 1)
        with pytest.raises(InputError, match=words):
            values_of(model(value))

    def test_the_cure_for_bytes(self, images):
        stored = (images * 255).byte()
        given = stored.float() / 255
        assert values_of(Makes(embed)(given)) == [given]
