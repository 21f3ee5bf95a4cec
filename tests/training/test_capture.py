"""A capture knows the inputs of embeddings, whatever made them; where it does not, it says what it saw."""

import contextlib
import copy
import dataclasses
import gc
import io
import pickle
import weakref
from itertools import count

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as nn_module

from pml_adversarial.errors import CaptureError, InputError, ReplayError
from pml_adversarial.training.capture import CHECK_EVERY, InputCapture, in_order, modules_of
from pml_adversarial.training.pixels import PixelSpace
from pml_adversarial.training.sources import Choice


class Normalised(nn.Module):
    """A model inside a model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return functional.normalize(self.inner(images))


class PassedThrough(nn.Module):
    """Returns its part's output as it is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images)


class TwoInputs(nn.Module):
    """Takes images and something beside them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(36, 4)

    def forward(self, images, scale):
        return self.linear(images.flatten(1)) * scale


class Switched(nn.Module):
    """Embeds through one of two modules, as an attribute says that others may set."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)) for _ in range(2))
        self.which = 0

    def forward(self, images):
        return self.parts[self.which](images)


def trunk_and_embedder():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16)), nn.Linear(16, 4)


def run_through(modules, inputs):
    for module in modules:
        inputs = module(inputs)
    return inputs


def replay_of(capture, embeddings, *others, **named):
    return capture.replay(PixelSpace(), embeddings, *others, **named)


def inputs_of(capture, embeddings):
    return replay_of(capture, embeddings).inputs


def knows(capture, embeddings):
    with contextlib.suppress(CaptureError):
        return bool(replay_of(capture, embeddings))
    return False


def hooks_of(*models):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


def global_state():
    return {name: dict(value) for name, value in vars(nn_module).items() if name.startswith("_global_") and value}


class TestWatchedModels:
    def test_module(self, model, images):
        capture = InputCapture(model)
        replay = replay_of(capture, model(images))
        assert replay.inputs.equal(images)
        assert replay.modules == (model,)

    @pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
    def test_a_container_with_a_forward_of_its_own_is_one_module(self, kind):
        class Ensemble(kind):
            def forward(self, x):
                return x

        held = [nn.Identity()] if kind is nn.ModuleList else {"trunk": nn.Identity(), "embedder": nn.Identity()}
        model = Ensemble(held)
        assert modules_of(model) == (model,)
        assert in_order(model) is model

    @pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
    def test_sequence(self, images, container):
        modules = trunk_and_embedder()
        capture = InputCapture(container(modules))
        replay = replay_of(capture, run_through(modules, images))
        assert replay.inputs.equal(images)
        assert replay.modules == modules

    @pytest.mark.parametrize("container", [dict, nn.ModuleDict])
    def test_models_of_a_trainer(self, images, container):
        trunk, embedder = trunk_and_embedder()
        capture = InputCapture(container({"embedder": embedder, "trunk": trunk}))
        replay = replay_of(capture, embedder(trunk(images)))
        assert replay.inputs.equal(images)
        assert replay.modules == (trunk, embedder)

    def test_models_without_embedder(self, model, images):
        capture = InputCapture({"trunk": model, "classifier": nn.Linear(4, 2)})
        assert inputs_of(capture, model(images)).equal(images)

    def test_identity_as_embedder(self, model, images):
        embedder = nn.Identity()
        capture = InputCapture({"trunk": model, "embedder": embedder})
        assert inputs_of(capture, embedder(model(images))).equal(images)

    def test_watch_takes_another_model(self, model, images):
        capture = InputCapture(model)
        other = copy.deepcopy(model)
        capture.watch(other)
        assert knows(capture, other(images))
        assert not knows(capture, model(images))
        assert hooks_of(model, other) == 0

    def test_a_model_in_a_module_that_was_not_named(self, model, images):
        capture = InputCapture(model)
        assert inputs_of(capture, Normalised(model)(images)).equal(images)

    def test_a_part_of_the_model(self, model, images):
        capture = InputCapture(model)
        flat = images.flatten(1)
        assert inputs_of(capture, model[1:](flat)).equal(flat)

    @pytest.mark.parametrize(
        "wrong", [{}, {"embedder": nn.Identity()}, nn.ModuleDict({"net": nn.Identity()}), [], "resnet", [1], 5, [None]]
    )
    def test_no_models(self, wrong):
        with pytest.raises(CaptureError, match="expected"):
            modules_of(wrong)
        with pytest.raises(CaptureError, match="expected"):
            InputCapture(wrong)

    def test_a_function_is_no_module(self, model, images):
        capture = InputCapture(lambda batch: functional.normalize(model(batch)))
        assert inputs_of(capture, functional.normalize(model(images))).equal(images)


class TestInOrder:
    def test_one_module_is_itself(self, model):
        assert in_order(model) is model
        assert in_order([model]) is model
        assert in_order({"trunk": model}) is model

    def test_several_run_one_after_the_other(self, images):
        trunk, embedder = trunk_and_embedder()
        expected = embedder(trunk(images))
        assert torch.equal(in_order([trunk, embedder])(images), expected)
        assert torch.equal(in_order({"embedder": embedder, "trunk": trunk})(images), expected)

    def test_a_function_is_called(self, model, images):
        function = in_order(lambda batch: 2 * model(batch))
        assert torch.equal(function(images), 2 * model(images))

    def test_an_object_without_a_hash_gets_one(self, model, images):
        @dataclasses.dataclass
        class Encoder:
            net: nn.Module

            def __call__(self, batch):
                return self.net(batch)

        assert {in_order(Encoder(model)): 1}
        for _ in range(2):
            replay = replay_of(InputCapture(Encoder(model)), model(images), inputs=images)
            assert torch.equal(replay.embed(images), model(images))


@pytest.fixture(params=["named", "found"])
def capture(request, model):
    return InputCapture(model if request.param == "named" else None)


class TestSelfFinding:
    def test_plain_model(self, model, images):
        capture = InputCapture()
        replay = replay_of(capture, model(images))
        assert replay.inputs.equal(images)
        assert replay.modules == (model,)

    @pytest.mark.parametrize("identity", [True, False])
    def test_trunk_and_embedder(self, images, identity):
        modules = (*trunk_and_embedder(), nn.Identity()) if identity else trunk_and_embedder()
        capture = InputCapture()
        replay = replay_of(capture, run_through(modules, images))
        assert replay.inputs.equal(images)
        assert replay.modules == modules[:2]  # Identity hands through what it gets

    @pytest.mark.parametrize("outer", [Normalised, PassedThrough, nn.Sequential])
    def test_model_inside_model(self, model, images, outer):
        nested = outer(outer(model))
        capture = InputCapture()
        replay = replay_of(capture, nested(images))
        assert replay.inputs.equal(images)
        assert replay.modules == (nested,)

    def test_model_that_ends_in_place(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(inplace=True))
        capture = InputCapture()
        assert inputs_of(capture, model(images)).equal(images)

    def test_output_of_the_trunk_changed_in_place_by_the_embedder(self, images):
        trunk, embedder = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), nn.ReLU(inplace=True)
        capture = InputCapture([trunk, embedder])
        embeddings = embedder(trunk(images))
        torch.testing.assert_close(replay_of(capture, embeddings).embed(images), embeddings)

    def test_model_that_calls_itself(self, images):
        class Halved(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))

            def forward(self, x, halved=False):
                return self.net(x) if halved else self(x * 0.5, True)

        model = Halved()
        for named in (model, None):
            capture = InputCapture(named)
            replay = replay_of(capture, model(images))
            assert replay.inputs.equal(images)
            torch.testing.assert_close(replay.embed(1 - images), model(1 - images))

    def test_module_that_gets_the_model_later(self, model, images):
        capture, outer = InputCapture(model), nn.Sequential()
        outer(images)
        outer.append(model)
        gc.collect()
        assert inputs_of(capture, outer(images)).equal(images)

    def test_steps_after_the_first(self, capture, model, images):
        for batch in images.split(2):
            assert inputs_of(capture, model(batch)).equal(batch)

    def test_another_model_in_another_step(self, images):
        capture = InputCapture()
        for _ in range(3):
            model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
            replay = replay_of(capture, model(images))
            assert replay.modules == (model,)

    def test_modules_that_run_beside_it_do_no_harm(self, capture, model, images):
        embeddings = model(images)
        nn.Linear(4, 2)(embeddings)
        replay = replay_of(capture, embeddings)
        assert replay.inputs.equal(images)
        assert replay.modules == (model,)

    def test_two_captures_at_once(self, model, images):
        one, other = InputCapture(), InputCapture(model)
        embeddings = model(images)
        assert inputs_of(one, embeddings).equal(images)
        assert inputs_of(other, embeddings).equal(images)

    def test_a_failed_question_leaves_it_watching(self, capture, model, images):
        with pytest.raises(CaptureError):
            replay_of(capture, torch.rand(8, 4))
        assert inputs_of(capture, model(images)).equal(images)

    def test_a_failed_embed_leaves_it_watching(self, capture, model, images):
        replay = replay_of(capture, model(images))
        with pytest.raises(RuntimeError):
            replay.embed(torch.rand(2, 3))
        assert knows(capture, model(images))

    def test_what_is_embedded_again_is_not_watched(self, capture, model, images):
        again = replay_of(capture, model(images)).embed(images)
        assert type(again) is torch.Tensor
        assert not knows(capture, again)


class TestEachCallHasItsInputs:
    def test_two_calls_before_the_loss(self, capture, model, images):
        inputs_of(capture, model(images))
        first, second = model(images[:4]), model(images[4:])
        assert inputs_of(capture, first).equal(images[:4])
        assert inputs_of(capture, second).equal(images[4:])
        assert inputs_of(capture, first).equal(images[:4])

    def test_passes_without_gradient_are_ignored(self, capture, model, images):
        embeddings = model(images)
        with torch.no_grad():
            silent = model(images[:2])
        with torch.inference_mode():
            model(images[:2])
        assert inputs_of(capture, embeddings).equal(images)
        assert not knows(capture, silent)

    def test_by_keyword(self, images):
        model = nn.Linear(6, 2)
        for named in (model, None):
            capture = InputCapture(named)
            assert inputs_of(capture, model(input=images).flatten(1)).equal(images)

    def test_carry_no_gradient(self, capture, model, images):
        assert not inputs_of(capture, model(images.requires_grad_())).requires_grad

    def test_something_beside_them_is_held_fixed(self, images):
        model = TwoInputs()
        capture = InputCapture()
        for scale in (2, torch.tensor(2.0), torch.arange(8)[:, None]):
            embeddings = model(images, scale)
            replay = replay_of(capture, embeddings)
            assert replay.inputs.equal(images)
            torch.testing.assert_close(replay.embed(1 - images), model(1 - images, scale))

    def test_which_of_two_can_be_named(self, images):
        class Difference(TwoInputs):
            def forward(self, first, second):
                return self.linear(first.flatten(1)) - self.linear(second.flatten(1))

        model, others = Difference(), images.flip(0)
        for name, expected in (("first", images), ("second", others)):
            capture = InputCapture(model, Choice(name))
            assert inputs_of(capture, model(images, others)).equal(expected)
            assert inputs_of(capture, model(images, second=others)).equal(expected)

    def test_in_a_dict(self, model, images):
        class Unpacks(nn.Module):
            def forward(self, batch):
                return model(batch["images"])

        outer = Unpacks()
        for named in (outer, None):
            capture = InputCapture(named)
            assert inputs_of(capture, outer({"ids": torch.arange(8), "images": images})).equal(images)

    @pytest.mark.parametrize("sizes", [[4, 4], [3, 5], [1, 1, 6], [8]], ids=str)
    def test_of_calls_that_were_concatenated(self, capture, model, images, sizes):
        for _ in range(2):
            embeddings = torch.cat([model(batch) for batch in images.split(sizes)])
            gc.collect()
            assert inputs_of(capture, embeddings).equal(images)

    def test_of_inputs_that_nothing_else_holds(self, model, images):
        model[1].requires_grad_(False)  # it saves none of them
        capture = InputCapture(model)
        embeddings = torch.cat([model(images[:4].clone()), model(images[4:].clone())])
        gc.collect()
        assert inputs_of(capture, embeddings).equal(images)

    def test_after_a_backward_pass(self, capture, model, images):
        embeddings = model(images)
        embeddings.sum().backward(retain_graph=True)
        assert inputs_of(capture, embeddings).equal(images)

    def test_of_a_reference_follow(self, capture, model, images):
        views = images[:3].flip(3)
        replay = replay_of(capture, model(images), model(views))
        assert replay.inputs.equal(torch.cat([images, views]))
        assert replay.known_rows is None
        assert len(replay.inputs) == 11

    def test_of_a_reference_that_no_model_gave_are_not_known(self, capture, model, images):
        replay = replay_of(capture, model(images), torch.rand(3, 4))
        assert replay.inputs.equal(images)
        assert replay.known_rows is None

    def test_that_are_no_pixels_are_refused(self, capture, model, images):
        with pytest.raises(InputError, match=r"range from .* expected pixels in \[0, 1\]"):
            replay_of(capture, model(images * 255))


class TestInputsThatAreTold:
    """The open door: nothing has to be found."""

    def test_with_a_function(self, model, images):
        capture = InputCapture(lambda batch: functional.normalize(model(batch)))
        with torch.no_grad():
            embeddings = functional.normalize(model(images))
        replay = replay_of(capture, embeddings.requires_grad_(), inputs=images)
        assert replay.inputs.equal(images)
        torch.testing.assert_close(replay.embed(images[[3, 3, 0]], torch.tensor([3, 3, 0])), embeddings[[3, 3, 0]])

    def test_with_modules(self, images):
        modules = trunk_and_embedder()
        for given in (modules, {"trunk": modules[0], "embedder": modules[1]}):
            capture = InputCapture(given)
            embeddings = run_through(modules, images).detach().requires_grad_()
            replay = replay_of(capture, embeddings, inputs=images)
            torch.testing.assert_close(replay.embed(1 - images), run_through(modules, 1 - images))

    def test_without_a_model(self, model, images):
        with pytest.raises(CaptureError, match="model"):
            replay_of(InputCapture(), model(images), inputs=images)

    def test_that_are_others(self, model, images):
        capture = InputCapture(model)
        with pytest.raises(ReplayError):
            replay_of(capture, model(images), inputs=images.flip(0))


def _step(model):
    with torch.no_grad():
        model[0].parts[0][1].weight.mul_(2)


def _other_data(model):
    weight = model[0].parts[0][1].weight
    weight.data = 2 * weight.data


class TestChangesSinceTheForwardPass:
    """They are seen in each step, also long after the first one."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: setattr(m[0], "which", 1),
            _step,
            _other_data,
            lambda m: m[0].parts[0].__setitem__(1, nn.Linear(36, 4)),
            lambda m: m[0].register_forward_hook(lambda module, given, output: 2 * output),
            lambda m: m.eval(),
        ],
        ids=["a switch inside", "weights in place", "their data", "a layer", "a hook", "the mode"],
    )
    def test_are_refused(self, images, change):
        model = nn.Sequential(Switched(), nn.Dropout(0.0))
        capture = InputCapture(model)
        for _ in range(3):
            replay_of(capture, model(images))
        embeddings = model(images)
        change(model)
        with pytest.raises(ReplayError):
            replay_of(capture, embeddings)

    def test_a_weight_that_was_exchanged_is_that_of_the_forward_pass(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        capture = InputCapture(model)
        replay_of(capture, model(images))
        embeddings, weight = model(images), model[1].weight
        model[1].weight = nn.Parameter(torch.rand(4, 36))
        again = replay_of(capture, embeddings).embed(images)
        torch.testing.assert_close(again, embeddings)
        assert torch.autograd.grad(again.sum(), weight)[0].abs().sum() > 0

    def test_that_change_nothing_are_let_through(self, images):
        model = nn.Sequential(Switched(), nn.Dropout(0.0))
        capture = InputCapture(model)
        for number in range(3):
            embeddings = model(images)
            model[0].number = number
            replay_of(capture, embeddings)


class TestChecks:
    """Clean inputs are embedded again in the first step, in a new form of the loop, and now and then."""

    @pytest.fixture
    def counted(self, model):
        calls = iter(range(10**6))

        class Counted(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, images):
                next(calls)
                return self.inner(images)

        return Counted(), lambda: next(calls)

    def passes(self, capture, counted, images, change=lambda e: e):
        module, ask = counted
        embeddings = change(module(images))
        before = ask()
        replay_of(capture, embeddings)
        return ask() - before - 1

    def test_in_the_first_step_alone(self, counted, images):
        capture = InputCapture()
        assert [self.passes(capture, counted, images) for _ in range(4)] == [2, 0, 0, 0]

    def test_whatever_the_size_of_the_batch(self, counted, images):
        capture = InputCapture()
        assert [self.passes(capture, counted, images[:n]) for n in (8, 6, 4, 1)] == [2, 0, 0, 0]

    def test_once_for_each_form_of_the_loop(self, counted, images):
        capture = InputCapture()
        forms = [lambda e: e, functional.normalize, lambda e: e * 2]
        assert [self.passes(capture, counted, images, form) for form in forms * 2] == [2, 2, 2, 0, 0, 0]

    def test_now_and_then(self, counted, images):
        capture = InputCapture()
        found = [self.passes(capture, counted, images[:2]) for _ in range(2 * CHECK_EVERY)]
        assert [step for step, count in enumerate(found, 1) if count] == [1, CHECK_EVERY, 2 * CHECK_EVERY]

    def test_in_another_mode(self, counted, images):
        capture = InputCapture()
        assert self.passes(capture, counted, images) == 2
        counted[0].eval()
        assert self.passes(capture, counted, images) == 2
        counted[0].train()
        assert self.passes(capture, counted, images) == 0

    def test_anew_after_watch(self, counted, images):
        capture = InputCapture()
        self.passes(capture, counted, images)
        capture.watch(counted[0])
        assert self.passes(capture, counted, images) == 2

    @pytest.mark.parametrize("told", ["modules", "function"])
    def test_of_inputs_that_are_told_once_too(self, images, told):
        trunk, embedder, calls = *trunk_and_embedder(), count()

        def hook(*_):
            next(calls)

        embedder.register_forward_pre_hook(hook)
        capture = InputCapture([trunk, embedder] if told == "modules" else lambda x: embedder(trunk(x)))
        for _ in range(4):
            with torch.no_grad():
                embeddings = embedder(trunk(images))
            replay_of(capture, embeddings.requires_grad_(), inputs=images)
        to_find_modules = told == "function"
        assert next(calls) == 4 + 2 + to_find_modules  # the loop's own, and those of the first step

    def test_a_form_that_is_new_in_a_later_step(self, images):
        model, capture = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(36, 4)), InputCapture()
        for _ in range(3):
            assert replay_of(capture, model(images)).inputs.equal(images)
            parts = torch.cat([model(images[4:]), model(images[:4])])
            assert replay_of(capture, parts).inputs.equal(images.roll(4, 0))

    def test_a_form_that_is_new_with_dropout_is_checked_in_the_next_step(self, images):
        class Other(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.scale = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(36, 4)), [1.0]

            def forward(self, batch):
                return self.net(batch) * self.scale[0]

        model, capture = Other(), InputCapture()
        replay_of(capture, model(images))
        replay_of(capture, model(images) * 1)  # of another form: it is not known from where its numbers began
        embeddings = model(images) * 1
        model.scale[0] = 3.0
        with pytest.raises(ReplayError, match="differ"):
            replay_of(capture, embeddings)

    def test_dropout_after_the_model(self, model, images):
        capture = InputCapture()
        for _ in range(3):
            assert inputs_of(capture, functional.dropout(model(images))).equal(images)

    def test_batch_norm_in_train_mode_with_momentum_one(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4, momentum=1.0))
        capture = InputCapture()
        for _ in range(3):
            assert inputs_of(capture, model(images)).equal(images)

    def test_embeddings_that_were_changed_unseen_are_told(self, capture, model, images):
        embeddings = model(images) * 1
        embeddings.data.mul_(2)
        with pytest.raises((CaptureError, ReplayError)):
            replay_of(capture, embeddings)

    def test_outputs_that_were_changed_in_place_are_no_difference(self, linear, images):
        capture = InputCapture()
        for _ in range(2):
            replay = replay_of(capture, linear(images).mul_(10))
            torch.testing.assert_close(replay.embed(1 - images), linear(1 - images) * 10)

    def test_an_attribute_that_was_switched_since_is_told(self, images):
        model = Switched()
        capture = InputCapture()
        embeddings = model(images)
        model.which = 1
        with pytest.raises(ReplayError, match="Switched"):
            replay_of(capture, embeddings)

    def test_weights_that_were_changed_since_are_told(self, capture, model, images):
        embeddings = model(images)
        with torch.no_grad():
            model[3].weight += 1
        with pytest.raises(ReplayError, match="differ"):
            replay_of(capture, embeddings)

    def test_a_failed_check_is_made_again(self, capture, model, images):
        embeddings = model(images)
        with torch.no_grad():
            model[3].weight += 1
        for _ in range(2):
            with pytest.raises(ReplayError):
                replay_of(capture, embeddings)
        assert knows(capture, model(images))

    def test_dropout_draws_the_numbers_that_it_drew(self, moody_model, images):
        capture = InputCapture()
        for _ in range(3):
            assert inputs_of(capture, moody_model(images)).equal(images)

    def test_a_check_moves_no_random_numbers(self, moody_model, images):
        capture = InputCapture()
        embeddings = moody_model(images)
        before = torch.get_rng_state()
        replay_of(capture, embeddings)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_check_leaves_statistics_as_they_were(self, moody_model, images):
        capture = InputCapture()
        embeddings = moody_model(images)
        before = {name: value.clone() for name, value in moody_model.state_dict().items()}
        replay_of(capture, embeddings)
        assert all(torch.equal(value, before[name]) for name, value in moody_model.state_dict().items())

    def test_the_mode_must_not_change_before_the_loss(self, moody_model, images):
        capture = InputCapture()
        embeddings = moody_model(images)
        moody_model.eval()
        with pytest.raises(ReplayError, match="mode"):
            replay_of(capture, embeddings)


REFUSED = {
    "detached": (lambda e: e.detach(), "detached"),
    "cut off": (lambda e: e.detach().requires_grad_(), "without detach"),
    "a view changed": (lambda e: e[:, 0].mul_(2) is not None and e, "in place"),
    "a sum over the batch": (lambda e: e - e.mean(0), r"depends on (several|\d+) inputs"),
    "a softmax over the batch": (lambda e: e.softmax(0), r"depends on (several|\d+) inputs"),
    "pairs": (lambda e: e[:4] + e[4:], r"depends on (several|\d+) inputs"),
    "similarities": (lambda e: e @ e.T, r"depends on (several|\d+) inputs"),
}


@pytest.fixture
def linear(images):
    """A model whose output may be changed in place: its gradient does not need it."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4))


class TestErrors:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_was_done_is_told(self, linear, images, case):
        change, message = REFUSED[case]
        for named in (linear, None):
            capture = InputCapture(named)
            with pytest.raises(CaptureError, match=message):
                replay_of(capture, change(linear(images)))

    def test_rows_whose_inputs_are_unknown_may_stand_anywhere(self, capture, model, images):
        made = torch.cat([torch.rand(2, 4), model(images[:3]), torch.rand(1, 4), model(images[3:])])
        replay = replay_of(capture, made)
        assert replay.known_rows.tolist() == [2, 3, 4, 6, 7, 8, 9, 10]
        assert replay.inputs.equal(images)

    def test_a_name_that_no_argument_has(self, model, images):
        capture = InputCapture(model, Choice("pixel_values"))
        with pytest.raises(InputError, match=r"pixel_values.*input"):
            replay_of(capture, model(images))

    def test_no_module_ran(self):
        made = torch.rand(8, 4, requires_grad=True) * 2
        with pytest.raises(CaptureError, match="No module ran"):
            replay_of(InputCapture(), made)

    def test_it_ran_without_gradient(self, model, images):
        capture = InputCapture()
        with torch.no_grad():
            features = model(images)
        with pytest.raises(CaptureError, match=r"Sequential ran .*no_grad"):
            replay_of(capture, features * torch.ones(4, requires_grad=True))

    def test_another_model_ran(self, model, images):
        capture = InputCapture(model)
        with pytest.raises(CaptureError, match="the model that was named did not"):
            replay_of(capture, copy.deepcopy(model)(images))

    def test_other_embeddings_than_what_ran(self, capture, model, images):
        model(images)
        with pytest.raises(CaptureError, match="Sequential ran with gradient"):
            replay_of(capture, torch.rand(8, 4, requires_grad=True) * 2)

    def test_embeddings_computed_before(self, model, images):
        gc.collect()
        embeddings = model(images)
        with pytest.raises(CaptureError, match="Make the loss before"):
            replay_of(InputCapture(model), embeddings)

    def test_features_of_a_trunk_without_gradient_are_no_inputs(self, images):
        trunk, embedder = trunk_and_embedder()
        capture = InputCapture()
        with torch.no_grad():
            features = trunk(images)
        for taken in (features, features.flatten(1), features[:4]):
            with pytest.raises(CaptureError, match="features that Sequential computed under no_grad"):
                replay_of(capture, embedder(taken))

    def test_features_of_a_trunk_that_is_not_watched_are_no_inputs(self, images):
        trunk, embedder = trunk_and_embedder()
        capture = InputCapture(embedder)
        with pytest.raises(CaptureError, match="not watched"):
            replay_of(capture, embedder(trunk(images)))

    def test_a_model_that_changes_the_number_of_rows(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(0, 1))
        capture = InputCapture(model)
        with pytest.raises(CaptureError, match=r"\(16, 4\) for inputs \(8, 1, 6, 6\)"):
            replay_of(capture, model(images))

    def test_inputs_that_were_changed_since(self, capture, model, images):
        buffer = images.clone()
        embeddings = model(buffer)
        buffer.copy_(images.flip(0))
        with pytest.raises(CaptureError, match="changed in place since"):
            replay_of(capture, embeddings)

    def test_inputs_that_the_model_changed(self, model, images):
        class Centred(PassedThrough):
            def forward(self, batch):
                batch -= 0.1
                return self.inner(batch)

        module = Centred(model)
        capture = InputCapture()
        with pytest.raises(CaptureError, match="Centred changed its input in place"):
            replay_of(capture, module(images.clone()))

    def test_words_are_no_inputs(self):
        model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 4))
        capture = InputCapture(model)
        with pytest.raises(InputError, match=r"int64 \(8, 3\).*floating point.*at=model.embedding"):
            replay_of(capture, model(torch.randint(10, (8, 3))))

    def test_is_a_runtime_error(self, model):
        with pytest.raises(RuntimeError):
            replay_of(InputCapture(model), torch.rand(2, 2))


class TestMemory:
    def test_may_end_while_the_model_runs(self, model, images):
        captures = []
        model.register_forward_hook(lambda *_: captures.clear())
        expected = model(images)
        for named in (model, None):
            captures.append(InputCapture(named))
            assert torch.equal(model(images), expected)

    def inputs_live(self, capture, run, images):
        """Whether the inputs of one pass live while its output does, and after two more steps."""
        batch = images.clone()
        watched = weakref.ref(batch)
        output = run(batch)
        output.sum().backward()
        del batch
        gc.collect()
        meanwhile = watched() is not None
        del output
        for _ in range(2):
            replay_of(capture, run(images))
        run(images)
        return meanwhile, watched() is not None

    def test_inputs_die_with_the_embeddings(self, capture, model, images):
        assert self.inputs_live(capture, model, images) == (True, False)
        inputs_of(capture, model(images))
        assert self.inputs_live(capture, model, images) == (True, False)

    def test_inputs_die_with_the_embeddings_of_a_chain(self, images):
        modules = trunk_and_embedder()
        capture = InputCapture(modules)
        assert self.inputs_live(capture, lambda batch: run_through(modules, batch), images) == (True, False)

    @pytest.mark.parametrize("pick", [lambda e: torch.cat([e, e]), lambda e: e[:, :2]], ids=["rows", "columns"])
    def test_inputs_die_with_what_was_made_of_the_embeddings(self, capture, model, images, pick):
        assert self.inputs_live(capture, lambda batch: pick(model(batch)), images) == (True, False)

    def test_a_capture_holds_no_inputs(self, capture, model, images):
        batch = images.clone()
        watched = weakref.ref(batch)
        replay_of(capture, model(batch))
        del batch
        for _ in range(2):
            replay_of(capture, model(images))
        model(images)
        assert watched() is None

    def test_a_replay_holds_what_it_needs(self, capture, model, images):
        replay = replay_of(capture, model(images.clone()))
        gc.collect()
        assert replay.embed(replay.inputs).equal(model(images))

    @pytest.mark.parametrize("known", [True, False])
    def test_a_chain_whose_input_is_changed_by_its_output_dies_without_backward(self, images, known):
        class Doubled(nn.Module):
            """Saves nothing for its backward pass."""

            def forward(self, features):
                return features * 2

        trunk, block = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), Doubled()
        _kept = InputCapture([trunk, block] if known else None)
        features = trunk(images)
        watched = weakref.ref(features)
        features += block(features)
        del features
        gc.collect()
        assert watched() is None

    def test_nothing_global_is_left(self, model, images):
        gc.collect()
        model(images)
        before = global_state()
        for ends in (lambda capture: inputs_of(capture, model(images)), lambda capture: capture.watch(model), id):
            capture = InputCapture()
            assert global_state() != before
            ends(capture)
            del capture
            gc.collect()
            model(images)
            assert global_state() == before
            assert hooks_of(model) == 0


class TestCopies:
    def test_a_copied_model_is_not_watched(self, model, images):
        capture = InputCapture(model)
        copied = copy.deepcopy(model)
        assert not knows(capture, copied(images))
        assert knows(capture, model(images))

    def test_a_copied_model_learns_and_is_copied_again(self, model, images):
        _capture = InputCapture(model)
        twice = copy.deepcopy(copy.deepcopy(model))
        twice(images).sum().backward()
        assert twice[1].weight.grad is not None
        assert model[1].weight.grad is None

    def test_a_capture_that_is_copied_finds_any_model(self, capture, model, images):
        inputs_of(capture, model(images))
        copied = copy.deepcopy(capture)
        embeddings = model(images)
        assert inputs_of(copied, embeddings).equal(images)
        assert inputs_of(capture, embeddings).equal(images)
        other = copy.deepcopy(model)
        assert inputs_of(copied, other(images)).equal(images)

    def test_a_capture_copied_with_its_model_watches_the_copy(self, model, images):
        for pair in (
            {"model": model, "capture": InputCapture(model)},
            {"capture": InputCapture(model), "model": model},
        ):
            copied = copy.deepcopy(pair)
            assert inputs_of(copied["capture"], copied["model"](images)).equal(images)

    def test_the_name_of_what_is_perturbed_is_copied(self, model):
        capture = InputCapture(model, Choice("pixel_values"), 16)
        for copied in (copy.deepcopy(capture), pickle.loads(pickle.dumps(capture))):
            assert copied.choice == Choice("pixel_values")
            assert copied.chunk == 16

    @pytest.mark.parametrize("way", ["pickle", "torch.save"])
    def test_a_model_that_was_saved(self, model, images, way):
        capture = InputCapture(model)
        inputs_of(capture, model(images))
        if way == "pickle":
            loaded = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(images), model(images))
        assert not knows(capture, loaded(images))

    def test_a_capture_that_was_pickled(self, model, images):
        dumped = pickle.dumps(InputCapture(model))
        assert len(dumped) < 200  # it holds no model
        loaded = pickle.loads(dumped)
        assert inputs_of(loaded, model(images)).equal(images)


def test_weights_that_are_swapped_inside_of_ddp_are_those_of_the_replay(single, images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    wrapped = nn.parallel.DistributedDataParallel(model)
    weights = {name: (1.5 * value).detach().requires_grad_() for name, value in wrapped.named_parameters()}
    capture = InputCapture(wrapped)
    embeddings = torch.func.functional_call(wrapped, weights, (images,))
    torch.testing.assert_close(replay_of(capture, embeddings).embed(images), embeddings)


class TestWhatTheFirstBatchShowed:
    """It is not taken for granted where another batch may show something else."""

    class Net(nn.Module):
        def __init__(self, centred=False):
            super().__init__()
            self.linear, self.centred = nn.Linear(36, 4), centred

        def forward(self, images, centred=False):
            found = self.linear(images.flatten(1))
            return found - found.mean(0) if centred or self.centred else found

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(36, 4)

        def forward(self, images, table):
            found = self.linear(images.flatten(1))
            return found + (found @ table.T).softmax(1) @ table

    class Sorts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(36, 4)

        def forward(self, images, lengths):
            return self.linear(images.flatten(1))[lengths.argsort(stable=True)]

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_a_table_that_has_as_many_rows_as_a_later_batch(self, images, chunk):
        model, table, capture = self.Attends(), torch.randn(6, 4), InputCapture(chunk=chunk)
        for number in (8, 6, 8, 6):
            embeddings = model(images[:number], table)
            replay = replay_of(capture, embeddings)
            rows = torch.tensor([4, 1])
            torch.testing.assert_close(replay.embed(images[rows], rows), embeddings[rows])

    @pytest.mark.parametrize("switch", ["attribute", "argument", "another model"])
    def test_a_switch_with_which_rows_are_mixed(self, images, switch):
        model, capture = self.Net(), InputCapture()
        for _ in range(3):
            assert inputs_of(capture, model(images, False)).equal(images)
        model.centred = switch == "attribute"
        other = self.Net(True) if switch == "another model" else model
        with pytest.raises(ReplayError, match="embeds some rows"):
            replay_of(capture, other(images, switch == "argument"))

    def test_an_order_that_depends_on_other_arguments(self, images):
        model, capture, lengths = self.Sorts(), InputCapture(), torch.arange(8)
        assert inputs_of(capture, model(images, 0 * lengths)).equal(images)
        with pytest.raises(ReplayError, match="embeds some rows"):
            replay_of(capture, model(images, -lengths))

    def test_counters_and_rates_are_no_switches(self, images):
        model, capture, passes = self.Net(), InputCapture(), count()
        model.linear.register_forward_pre_hook(lambda *_: (next(passes), None)[1])
        for step in range(60):
            model.step, model.rate = step + 100, 0.5 / (step + 1)
            replay_of(capture, model(images))
        assert next(passes) == 60 + 2

    def test_rows_that_are_mixed_after_some_training(self, images):
        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.gate = nn.Linear(36, 4), nn.Parameter(torch.zeros(()))

            def forward(self, images):
                found = self.linear(images.flatten(1))
                return found + self.gate * found.mean(0)

        model, capture = Gated(), InputCapture()
        replay_of(capture, model(images))
        model.gate.data.fill_(1)
        for _ in range(CHECK_EVERY - 2):
            replay_of(capture, model(images))
        with pytest.raises(ReplayError, match="embeds some rows"):
            replay_of(capture, model(images))

    def test_a_flag_says_which_of_two_inputs_counts(self, images):
        class Streams(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(36, 4), nn.Linear(36, 4)

            def forward(self, one, other, which):
                return self.first(one.flatten(1)) if which == 1 else self.second(other.flatten(1))

        model, capture, others = Streams(), InputCapture(), images.flip(0)
        for which in (1, 2, 1, 2):
            assert inputs_of(capture, model(images, others, which)).equal(images if which == 1 else others)
