"""Outputs of outermost modules know how they were made, and so does what is made of them; nothing else is changed."""

import copy
import gc
import io
import pickle
import sys
import threading
import types
import warnings
import weakref

import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

from pml_adversarial import AdversarialLoss
from pml_adversarial.training.nested import tensors_in
from pml_adversarial.training.rerun import steps_to
from pml_adversarial.training.trace import Fixed, Ref, Step, version_of
from pml_adversarial.training.tracing import Traced, lost_of, note, paused, plain, ref_of
from pml_adversarial.training.watch import Watch


class Own(torch.Tensor):
    """A class of tensors of the user's."""


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Returns(nn.Module):
    """Returns its part's output in a container."""

    def __init__(self, inner, wrap):
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, images):
        return self.wrap(self.inner(images))


class Raises(nn.Module):
    def __init__(self, inner, after=True):
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, images):
        if self.after:
            self.inner(images)
        raise ArithmeticError("of the user's")


@pytest.fixture
def watch():
    return Watch()


def names_of(tensor):
    """Names of the functions and modules that made a tensor, in order."""
    steps = steps_to([ref_of(tensor)])
    return [(s.function if s.call is None else type(s.function)).__name__ for s in steps]


def hooks_of(model):
    """All hooks of all modules, which must be the same before and after."""
    return [
        {name: dict(value) for name, value in vars(module).items() if "hooks" in name} for module in model.modules()
    ]


def global_hooks():
    return {name: dict(value) for name, value in vars(nn_module).items() if name.startswith("_global") and value}


class TestOutputsOfModules:
    def test_are_traced_to_the_inputs(self, watch, model, images):
        output = model(images)
        ref = ref_of(output)
        assert type(output) is Traced
        assert ref.step.function is model
        assert ref.place == 0
        (given,) = ref.step.args
        assert given.value is images

    def test_are_what_they_were_without(self, model, images):
        expected = model(images)
        weight = model[1].weight
        (gradient,) = torch.autograd.grad(expected.sum(), weight)
        _watch = Watch()
        output = model(images)
        assert torch.equal(output, expected)
        assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], gradient)

    def test_by_keyword(self, watch):
        given = torch.rand(2, 3)
        step = ref_of(nn.Linear(3, 2)(input=given)).step
        assert step.args == ()
        assert step.kwargs["input"].value is given

    def test_a_chain_is_one_step_for_each_module(self, watch, images):
        trunk, head = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), nn.Linear(4, 2)
        features = trunk(images)
        step = ref_of(head(features)).step
        assert step.refs[0].step.function is trunk
        assert names_of(head(features)) == ["Sequential", "Linear"]

    def test_modules_inside_modules_are_one_step(self, watch, model, images):
        outer = nn.Sequential(nn.Sequential(model), nn.Tanh())
        assert names_of(outer(images)) == ["Sequential"]
        assert type(model(images)) is Traced

    def test_modules_inside_modules_cost_nothing(self, watch, model, images):
        inside = []
        model[1].register_forward_hook(lambda *_: inside.append(global_hooks()))
        before = global_hooks()
        model(images)
        assert inside == [{}]
        assert global_hooks() == before

    def test_nothing_inside_is_traced(self, watch, model, images):
        kinds = []
        for module in model:
            module.register_forward_hook(lambda module, args, output: kinds.append((type(args[0]), type(output))))
        model(images)
        assert kinds == [(torch.Tensor, torch.Tensor)] * 4

    def test_a_module_gets_plain_tensors_of_traced_ones(self, watch, model, images):
        kinds = []
        head = Returns(nn.Identity(), lambda tensor: kinds.append(type(tensor)) or tensor * 2)
        output = model(images)
        head(output)
        assert kinds == [torch.Tensor]
        assert type(output) is Traced

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda e: (e, e * 2),
            lambda e: [e, e * 2],
            lambda e: {"a": e, "b": e * 2},
            lambda e: {"a": (e,), "b": [{"c": e * 2}]},
        ],
        ids=["tuple", "list", "dict", "nested"],
    )
    def test_in_containers_are_all_traced(self, watch, model, images, wrap):
        outer = Returns(model, wrap)
        first, second = tensors_in(outer(images))
        assert (ref_of(first).place, ref_of(second).place) == (0, 1)
        assert ref_of(first).step is ref_of(second).step
        kept = ref_of(first).step.call.outputs
        assert torch.equal(kept[0], first)
        assert torch.equal(kept[1], second)

    def test_that_need_no_gradient_are_traced_where_they_are_of_floating_point(self, watch, model, images):
        outer = Returns(model, lambda e: (e, e.argmax(1), e.detach()))
        live, number, detached = outer(images)
        assert [type(live), type(number), type(detached)] == [Traced, torch.Tensor, Traced]
        assert (ref_of(live).place, ref_of(detached).place) == (0, 2)
        assert ref_of(live).step is ref_of(detached).step

    def test_that_are_scalars_are_plain(self, watch, model, images, labels):
        loss_func = nn.CrossEntropyLoss()
        assert type(loss_func(model(images), labels)) is torch.Tensor

    @pytest.mark.parametrize("output", [None, "text", 3, ()])
    def test_that_are_no_tensors_come_through(self, watch, images, output):
        assert Returns(nn.Identity(), lambda _: output)(images) == output
        assert not watch.seen["without gradient"]

    def test_that_are_parameters_are_left_alone(self, watch):
        table = nn.Parameter(torch.rand(3, 4))
        output = Returns(nn.Identity(), lambda _: table)(torch.rand(2))
        assert output is table
        assert type(table) is nn.Parameter

    def test_that_are_leaves_are_not_lost(self, watch):
        given = torch.rand(2, 3, requires_grad=True)
        output = nn.Identity()(given)
        output.sum().backward()
        assert given.grad.tolist() == [[1] * 3] * 2

    def test_of_a_users_class_of_tensors_are_left_alone(self, watch, model, images):
        outer = Returns(model, lambda e: e.as_subclass(Own))
        output = outer(images)
        assert type(output) is Own
        assert type(output * 2) is Own
        assert ref_of(output) is None

    def test_the_modes_are_kept(self, watch, moody_model, images):
        moody_model[3].eval()
        step = ref_of(moody_model(images)).step
        assert step.call.modes == (True, True, True, True, False, True, True)

    def test_replaced_parameters_are_kept(self, watch, model, images):
        weights = {name: value * 2 for name, value in model.named_parameters()}
        step = ref_of(torch.func.functional_call(model, weights, (images,))).step
        assert step.call.swapped.keys() == weights.keys()
        assert ref_of(model(images)).step.call.swapped == {}

    def test_an_input_that_is_changed_in_place_is_told(self, watch, model, images):
        outer = Returns(model, lambda e: e)
        outer.register_forward_pre_hook(lambda module, args: (args[0].sub_(0.1), None)[1])
        given = images.clone()
        assert ref_of(outer(given)).step.call.changed
        assert not ref_of(model(images)).step.call.changed

    @pytest.mark.parametrize("wanted", [True, False])
    def test_random_numbers_are_told_if_they_are_wanted(self, watch, images, wanted):
        watch.wants_state = wanted
        module = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(36, 2))
        output = module(images)
        dropped = functional.dropout(output)
        for made, again in ((output, lambda: module(images)), (dropped, lambda: functional.dropout(output))):
            state = ref_of(made).step.random_state
            assert (state is not None) == wanted
            if wanted:
                torch.set_rng_state(state.on_cpu)
                assert torch.equal(again(), made)

    def test_buffers_are_told_if_random_numbers_are(self, watch, moody_model, images):
        watch.wants_state = True
        before = [buffer.clone() for buffer in moody_model.buffers()]
        told = ref_of(moody_model(images)).step.call.buffers
        assert [(module, name) for module, name, _ in told] == [
            (moody_model[1], name) for name in moody_model[1]._buffers
        ]
        assert all(torch.equal(value, other) for (*_, value), other in zip(told, before, strict=True))
        assert not torch.equal(moody_model[1].running_mean, told[0][2])

    def test_autocast_is_told(self, watch, model, images):
        with torch.autocast("cpu", torch.bfloat16):
            inside = ref_of(model(images)).step
        assert inside.autocast == {"cpu": torch.bfloat16}
        assert ref_of(model(images)).step.autocast == {}

    def test_two_calls_are_two_steps(self, watch, model, images):
        first, second = model(images[:4]), model(images[4:])
        assert ref_of(first).step.number < ref_of(second).step.number
        assert ref_of(first).step.args[0].value.equal(images[:4])


# What is done to embeddings (8, 4), and the name under which it is noted
OPERATIONS = [
    (lambda e: e * 2, "mul"),
    (lambda e: 2 * e, "mul"),
    (lambda e: e / e.norm(dim=1, keepdim=True), "div"),
    (lambda e: -e, "neg"),
    (lambda e: e @ torch.rand(4, 2), "matmul"),
    (lambda e: torch.rand(3, 8) @ e, "matmul"),
    (lambda e: e[:4], "__getitem__"),
    (lambda e: e[:, None], "__getitem__"),
    (lambda e: e[[0, 2]], "__getitem__"),
    (lambda e: e[e[:, 0] > -100], "__getitem__"),
    (lambda e: e.T, "__get__"),
    (lambda e: e.double(), "double"),
    (lambda e: e.bfloat16(), "bfloat16"),
    (lambda e: e.to(torch.double), "to"),
    (lambda e: e.clone(), "clone"),
    (lambda e: e.contiguous().view(-1, 2), "view"),
    (lambda e: e.chunk(2)[1], "chunk"),
    (lambda e: torch.split(e, [3, 5])[0], "split"),
    (lambda e: e.unbind()[3], "unbind"),
    (lambda e: torch.cat([e, e]), "cat"),
    (lambda e: torch.cat([torch.zeros(8, 4), e]), "cat"),
    (lambda e: torch.stack((e, e)), "stack"),
    (lambda e: torch.where(e > 0, e, 0.0), "where"),
    (lambda e: torch.einsum("nd,md->nm", e, e), "einsum"),
    (lambda e: e.max(1), "max"),
    (lambda e: torch.topk(e, 2), "topk"),
    (functional.normalize, "normalize"),
    (lambda e: functional.linear(e, torch.rand(2, 4)), "linear"),
    (lambda e: functional.dropout(e, 0.5), "dropout"),
    (lambda e: functional.pad(e, (0, 1)), "pad"),
    (lambda e: torch.add(torch.zeros(8, 4), other=e), "add"),
]


@pytest.mark.parametrize(("operation", "name"), OPERATIONS, ids=range(len(OPERATIONS)))
class TestOperations:
    def test_are_noted_by_name(self, watch, model, images, operation, name):
        made = operation(model(images))
        made = made if isinstance(made, torch.Tensor) else made[0]
        assert type(made) is Traced
        assert ref_of(made).step.function.__name__.strip("_") == name.strip("_")
        assert names_of(made)[0] == "Sequential"

    def test_give_what_they_give_without(self, watch, model, images, operation, name):
        output = model(images)
        torch.manual_seed(1)
        made = operation(output)
        torch.manual_seed(1)
        expected = operation(output.detach().requires_grad_())
        pairs = [(made, expected)] if isinstance(made, torch.Tensor) else zip(made, expected, strict=True)
        for one, other in pairs:
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
        assert type(made) is Traced or type(made) is type(expected)


class TestOperationsOfSeveralResults:
    def test_each_has_its_place(self, watch, model, images):
        parts = model(images).chunk(4)
        assert [ref_of(part).place for part in parts] == [0, 1, 2, 3]
        assert len({id(ref_of(part).step) for part in parts}) == 1

    def test_those_without_gradient_have_theirs(self, watch, model, images):
        values, places = model(images).max(1)
        assert (ref_of(values).place, ref_of(places).place) == (0, 1)

    def test_pairs_have_both_sources(self, watch, model, images):
        first, second = model(images), model(images.flip(3))
        steps = ref_of(first - second).step.refs
        assert [ref.step for ref in steps] == [ref_of(first).step, ref_of(second).step]


class TestNotNoted:
    @pytest.mark.parametrize(
        "ask",
        [
            lambda e: e.shape,
            lambda e: e.size(0),
            len,
            lambda e: e.requires_grad,
            lambda e: e.grad_fn,
            lambda e: e.is_leaf,
            lambda e: e.dim(),
            lambda e: e.tolist(),
            lambda e: e.sum().item(),
            lambda e: float(e.mean().detach()),
            lambda e: torch.is_tensor(e),
            lambda e: e.data_ptr(),
            lambda e: bool((e == e).all()),
            lambda e: e.device,
            lambda e: e.dtype,
            lambda e: e.is_floating_point(),
            lambda e: hash(e) == id(e),
        ],
        ids=range(17),
    )
    def test_questions_are_answered(self, watch, model, images, ask):
        output = model(images)
        answer = ask(output)
        with plain([output]):
            assert answer == ask(output)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_modules_without_gradient_leave_their_name_alone(self, watch, model, images, mode):
        with mode():
            silent = model(images)
            after = silent * 2
        for tensor in (silent, after, after + 1):
            assert ref_of(tensor) is None
            assert lost_of(tensor) == "Sequential"
        assert watch.seen["without gradient"] == {"Sequential"}
        assert lost_of(after + model(images)) is None

    def test_a_module_that_hands_through_its_argument_under_no_grad_loses_nothing(self, watch, model, images):
        output = model(images)
        with torch.no_grad():
            assert nn.Identity()(output) is output
        assert names_of(output) == ["Sequential"]

    def test_gradients_of_weights_are_plain(self, watch, model, images):
        output = model(images)
        output.retain_grad()
        output.sum().backward()
        assert torch.equal(output.grad, torch.ones(8, 4))
        assert type(model[1].weight.grad) is torch.Tensor

    def test_hooks_of_tensors_get_plain_gradients(self, watch, model, images):
        kinds, output = [], model(images)
        output.register_hook(lambda gradient: kinds.append(type(gradient)))
        output.sum().backward()
        assert kinds == [torch.Tensor]

    def test_paused(self, watch, model, images):
        output = model(images)
        with paused():
            assert type(model(images)) is torch.Tensor
            assert type(output * 2) is torch.Tensor
            with paused():
                pass
            assert type(output * 2) is torch.Tensor
        assert type(output * 2) is Traced

    def test_paused_ends_with_an_exception(self, watch, model, images):
        with pytest.raises(ArithmeticError), paused():
            raise ArithmeticError
        assert type(model(images)) is Traced


# What is made of embeddings (8, 4) and has no gradient, and the name under which it is noted
WITHOUT_GRADIENT = [
    (lambda e: e.detach(), "detach"),
    (lambda e: e.argmax(1), "argmax"),
    (lambda e: e > 0, "gt"),
    (lambda e: e.data, "__get__"),
    (torch.zeros_like, "zeros_like"),
    (lambda e: e.sign().detach(), "detach"),
    (lambda e: e.topk(2).indices, "topk"),
]


class TestWithoutGradient:
    """Masks, numbers and detached values are followed, as long as the step lasts."""

    @pytest.mark.parametrize(("make", "name"), WITHOUT_GRADIENT, ids=range(len(WITHOUT_GRADIENT)))
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
    def test_what_is_made_is_noted(self, watch, model, images, make, name, mode):
        output = model(images)
        with mode():
            made = make(output)
            further = made + 1
        assert not made.requires_grad
        assert names_of(made)[0] == "Sequential"
        assert names_of(made)[-1].strip("_") == name.strip("_")
        assert names_of(further)[-1].strip("_") == "add"
        assert lost_of(made) is None

    def test_it_counts_as_an_argument(self, watch, model, images):
        output = model(images)
        norm = output.detach().norm(dim=1, keepdim=True)
        assert names_of(output / norm) == ["Sequential", "detach", "norm", "truediv"] or names_of(output / norm) == [
            "Sequential",
            "detach",
            "norm",
            "div",
        ]

    def test_a_frozen_trunk_is_followed(self, watch, images):
        trunk, head = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).requires_grad_(False), nn.Linear(4, 2)
        features = trunk(images)
        assert not features.requires_grad
        assert names_of(head(functional.normalize(features))) == ["Sequential", "normalize", "Linear"]

    def test_its_trace_is_lost_after_the_losses_that_follow(self, watch, model, images):
        mask = model(images) > 0
        kept = model(images).detach()
        assert names_of(mask)[0] == names_of(kept)[0] == "Sequential"
        for _ in range(2):
            watch.forget()  # as a loss does it
            model(images)
        for tensor, name in ((mask, "gt"), (kept, "detach")):
            assert ref_of(tensor) is None
            assert lost_of(tensor).strip("_") == name
            assert lost_of(tensor * 2) == lost_of(tensor)

    def test_its_trace_is_lost_where_no_loss_is_computed_for_long(self, watch, model, images):
        mask = model(images) > 0
        for _ in range(100):
            model(images[:1])
        assert ref_of(mask) is None

    def test_what_has_gradient_keeps_its_trace(self, watch, model, images):
        normalized = (lambda e: e / e.detach().norm(dim=1, keepdim=True))(model(images))
        before = names_of(normalized)
        for _ in range(3):
            watch.forget()
            model(images)
        gc.collect()
        assert names_of(normalized) == before
        assert "detach" in before


IN_PLACE = [
    (lambda e: e.mul_(2), "mul_"),
    (lambda e: e.clamp_(-0.1, 0.1), "clamp_"),
    (lambda e: e.__imul__(2), "__imul__"),
    (lambda e: e.__setitem__(0, 0.0), "__setitem__"),
    (lambda e: e.__setitem__((slice(None), 1), torch.zeros(8)), "__setitem__"),
    (lambda e: functional.relu(e, inplace=True), "relu"),
    (torch.relu_, "relu_"),
    (lambda e: e.masked_fill_(e > 0, 0.0), "masked_fill_"),
    (lambda e: e.index_fill_(0, torch.tensor([1]), 0.0), "index_fill_"),
]


@pytest.fixture
def linear(images):
    """A model whose output may be changed in place: its gradient does not need it."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4))


class TestInPlace:
    @pytest.mark.parametrize(("change", "name"), IN_PLACE, ids=[f"{i}{n}" for i, (_, n) in enumerate(IN_PLACE)])
    def test_a_change_is_a_step(self, watch, linear, images, change, name):
        output = linear(images)
        before = ref_of(output)
        change(output)
        after = ref_of(output)
        assert type(output) is Traced
        assert after.step is not before.step
        assert after.step.in_place
        assert after.step.args[0].step is before.step

    def test_the_statement_is_noted_too(self, watch, linear, images):
        output = linear(images)
        output *= 2
        output[0] = 0.5
        assert len(names_of(output)) == 3

    def test_twice_the_steps_stand_in_a_row(self, watch, linear, images):
        output = linear(images)
        output.add_(1).mul_(2)
        assert names_of(output) == ["Sequential", "add_", "mul_"]

    def test_what_was_made_before_still_knows_its_way(self, watch, linear, images):
        output = linear(images)
        made = output + 1
        output.mul_(2)
        assert names_of(made) == ["Sequential", "add"]

    def test_of_a_view_changes_its_base_unseen(self, watch, linear, images):
        output = linear(images)
        output[:, 0].mul_(2)
        assert ref_of(output) is None

    def test_outputs_are_kept_as_they_were(self, watch, linear, images):
        expected = linear(images).detach().clone()
        output = linear(images).mul_(10)
        assert torch.equal(steps_to([ref_of(output)])[0].call.outputs[0], expected)

    def test_of_a_memory_of_detached_ones_is_not_noted(self, watch, linear, images):
        memory = torch.zeros(16, 4)
        memory[:8] = linear(images).detach()
        assert type(memory) is torch.Tensor
        assert torch.equal(memory[:8], linear(images))

    def test_of_a_tensor_of_ones_own_is_noted_with_what_it_held(self, watch, linear, images):
        table = torch.zeros(8, 4)
        table[:4] = linear(images[:4])
        (table * 2).sum().backward()
        ref = ref_of(table)
        assert ref.step.in_place
        assert torch.equal(ref.step.args[0].value, torch.zeros(8, 4))

    def test_names_with_underscores_that_change_nothing(self, watch, linear, images):
        output = linear(images)
        made = output.__add__(1)
        assert names_of(output) == ["Sequential"]
        assert names_of(made) == ["Sequential", "add"] or names_of(made) == ["Sequential", "__add__"]

    def test_requires_grad_changes_nothing(self, watch, linear, images):
        output = linear(images)
        output.requires_grad_()
        assert ref_of(output) is not None
        assert names_of(output)[0] == "Sequential"


class TestFixed:
    def test_tells_of_a_change_in_place(self):
        tensor = torch.zeros(2)
        fixed = Fixed(tensor)
        assert fixed.version == version_of(tensor)
        tensor += 1
        assert fixed.version != version_of(tensor)

    def test_of_inference_mode_have_no_version(self):
        with torch.inference_mode():
            tensor = torch.zeros(2)
        assert Fixed(tensor).version == version_of(tensor) == 0


class TestNote:
    def test_a_tensor_can_be_noted_by_hand(self):
        step = Step(torch.mul, (), {})
        for made in (torch.rand(2, requires_grad=True) * 2, torch.rand(2)):
            note(made, Ref(step, 3))
            assert type(made) is Traced
            assert ref_of(made).step is step
            assert ref_of(made).place == 3

    @pytest.mark.parametrize("tensor", [nn.Parameter(torch.rand(2)), torch.rand(2).as_subclass(Own)], ids=["p", "own"])
    def test_others_stay_as_they_are(self, tensor):
        kind, step = type(tensor), Step(torch.mul, (), {})
        note(tensor, Ref(step, 0))
        assert type(tensor) is kind
        assert ref_of(tensor) is None


class TestPlain:
    def test_they_are_tensors_like_others_inside(self, watch, model, images):
        output, other = model(images), torch.rand(2)
        with plain([output, other, None, "text"]):
            assert type(output) is torch.Tensor
            assert type(output * 2) is torch.Tensor
        assert type(output) is Traced
        assert type(other) is torch.Tensor
        assert names_of(output * 2) == ["Sequential", "mul"]

    def test_also_after_an_exception(self, watch, model, images):
        output = model(images)
        with pytest.raises(ArithmeticError), plain([output]):
            raise ArithmeticError
        assert type(output) is Traced

    def test_one_that_is_named_twice(self, watch, model, images):
        output = model(images)
        with plain([output, output]):
            with plain([output]):
                assert type(output) is torch.Tensor
            assert type(output) is torch.Tensor
        assert type(output) is Traced


@pytest.fixture
def _nobody_else_watches():
    gc.collect()  # losses of other tests may wait for it
    nn.Identity()(torch.zeros(1))


@pytest.mark.usefixtures("_nobody_else_watches")
class TestWatch:
    def test_modules_that_are_named(self, model, images):
        watch = Watch([model])
        other = copy.deepcopy(model)
        assert type(model(images)) is Traced
        assert type(other(images)) is torch.Tensor
        assert watch.seen == {"with gradient": {"Sequential"}, "without gradient": set(), "not watched": {"Sequential"}}

    def test_modules_that_hold_one_or_are_held(self, model, images):
        _watch = Watch([model])
        assert type(nn.Sequential(model, nn.Tanh())(images)) is Traced
        assert type(model[1](images.flatten(1))) is Traced

    def test_modules_that_take_what_was_noted(self, model, images):
        _watch = Watch([model])
        head = nn.Linear(4, 2)
        assert type(head(torch.rand(3, 4))) is torch.Tensor
        assert names_of(head(model(images))) == ["Sequential", "Linear"]
        assert names_of(head(input=model(images))) == ["Sequential", "Linear"]

    def test_a_module_that_another_watch_names_is_noted_for_both(self, model, images):
        other = copy.deepcopy(model)
        _first, _second = Watch([model]), Watch([other])
        assert type(model(images)) is type(other(images)) is Traced

    def test_a_watch_that_is_new_sees_modules_that_were_not_watched(self, model, images):
        _first = Watch([nn.Identity()])
        assert type(model(images)) is torch.Tensor
        _second = Watch([model])
        assert type(model(images)) is Traced

    def test_none_leaves_nothing_global(self, model, images):
        gc.collect()
        before = global_hooks()
        watch = Watch()
        during = global_hooks()
        assert during != before
        output = model(images)
        del watch
        gc.collect()
        model(images)  # the hook goes with the first call that finds nobody who watches
        assert global_hooks() == before
        assert type(model(images)) is torch.Tensor
        assert (output * 2).shape == (8, 4)

    def test_a_new_one_after_the_last_is_seen(self, model, images):
        for _ in range(3):
            watch = Watch()
            assert type(model(images)) is Traced
            del watch
            gc.collect()
            assert type(model(images)) is torch.Tensor

    def test_two_share_one_hook(self, watch):
        before = global_hooks()
        _other = Watch()
        assert global_hooks() == before

    def test_a_watch_that_dies_while_a_model_runs(self, model, images):
        watches = [Watch()]
        model[1].register_forward_hook(lambda *_: watches.clear())
        expected = model(images)
        assert torch.equal(model(images), expected)
        assert hooks_of(model)[0]["_forward_hooks"] == {}

    def test_a_watch_that_begins_while_a_model_runs(self, model, images):
        watches = []
        model[1].register_forward_hook(lambda *_: watches.append(Watch()))
        before = hooks_of(model)
        model(images)
        assert hooks_of(model) == before
        assert type(model(images)) is Traced


class TestModulesStayAsTheyWere:
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_no_hook_is_left(self, watch, moody_model, images, mode):
        before, globally = hooks_of(moody_model), global_hooks()
        with mode():
            moody_model(images)
        assert hooks_of(moody_model) == before
        assert global_hooks() == globally

    @pytest.mark.parametrize("after", [True, False])
    def test_nor_after_an_exception(self, watch, model, images, after):
        failing = Raises(model, after)
        before, globally = hooks_of(failing), global_hooks()
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="of the user's"):
                failing(images)
        assert hooks_of(failing) == before
        assert global_hooks() == globally
        assert type(model(images)) is Traced

    def test_nor_after_one_of_a_users_hook(self, watch, model, images):
        def fail(*_):
            raise ArithmeticError

        for register in (model.register_forward_pre_hook, model.register_forward_hook):
            handle = register(fail)
            before, globally = hooks_of(model), global_hooks()
            with pytest.raises(ArithmeticError):
                model(images)
            assert hooks_of(model) == before
            assert global_hooks() == globally
            handle.remove()
        assert type(model(images)) is Traced

    def test_traced_arguments_of_a_module_that_raises_are_traced_again(self, watch, model, images):
        output = model(images)
        with pytest.raises(ArithmeticError):
            Raises(nn.Identity())(output)
        assert type(output) is Traced
        assert names_of(output * 2) == ["Sequential", "mul"]

    def test_a_wrong_call_raises_what_it_raises_without(self, model, images):
        with pytest.raises(TypeError) as expected:
            model()
        _watch = Watch()
        before = hooks_of(model)
        with pytest.raises(TypeError) as found:
            model()
        assert str(found.value) == str(expected.value)
        assert hooks_of(model) == before

    def test_hooks_of_the_user_run_as_without(self, model, images):
        met = []
        model.register_forward_pre_hook(lambda module, args: met.append("before"))
        model.register_forward_hook(lambda module, args, output: met.append("after") or output + 1)
        expected = model(images)
        _watch = Watch()
        output = model(images)
        assert met == ["before", "after"] * 2
        assert torch.equal(output, expected)
        assert torch.equal(ref_of(output).step.call.outputs[0], expected)

    def test_a_hook_of_the_user_may_change_the_inputs(self, watch, model, images):
        model.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        output = model(images)
        assert torch.equal(output, model[3](model[2](model[1](model[0](images * 0.5)))))


class TestWrappersAreTransparent:
    """A model may be run inside a module that holds the loss, such as a module of Lightning."""

    def test_calls_inside_a_module_that_holds_a_wrapper_are_noted(self, model, images):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.model, self.loss_func = model, AdversarialLoss(ContrastiveLoss(), model)

            def forward(self, batch):
                return self.model(batch) * 2

        outer = Both()
        output = outer(images)
        assert names_of(output) == ["Sequential", "mul"]

    def test_the_loss_itself_is_no_step(self, model, images, labels):
        loss_func = AdversarialLoss(ContrastiveLoss(), model, warmup=0)
        embeddings = model(images)
        value = loss_func(embeddings, labels)
        assert type(value) is torch.Tensor
        assert type(embeddings) is Traced
        assert names_of(embeddings) == ["Sequential"]


class TestUsesOfATracedTensor:
    """Whatever is done with a tensor can be done with a traced one, with the same result."""

    @pytest.fixture
    def output(self, watch, model, images):
        return model(images)

    def test_its_numbers_are_shown(self, output):
        with plain([output]):
            expected = repr(output)
        assert repr(output) == expected
        assert f"{output.sum().detach():.3f}" == f"{output.sum().item():.3f}"

    def test_numpy(self, output):
        values = output.detach().numpy()
        assert values.tolist() == output.tolist()
        with pytest.raises(RuntimeError, match="requires grad"):
            output.numpy()

    def test_no_grad_numpy(self, output):
        with torch.no_grad():
            assert output.cpu().detach().numpy().shape == (8, 4)

    def test_deepcopy_raises_or_copies_as_for_a_plain_one(self, output):
        with plain([output]), pytest.raises(RuntimeError) as expected:
            copy.deepcopy(output)
        with pytest.raises(RuntimeError) as found:
            copy.deepcopy(output)
        assert str(found.value) == str(expected.value)

    def test_a_deepcopy_of_a_detached_one(self, output):
        copied = copy.deepcopy(output.detach())
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, output)

    def test_copy(self, output):
        assert torch.equal(copy.copy(output), output)

    def test_saved_and_loaded_without_gradient(self, output):
        file = io.BytesIO()
        torch.save({"embeddings": output.detach()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["embeddings"]
        assert type(loaded) is torch.Tensor
        assert torch.equal(loaded, output)

    def test_pickled(self, output):
        assert torch.equal(pickle.loads(pickle.dumps(output)), output)

    def test_what_is_saved_holds_neither_model_nor_inputs(self, model, images):
        expected = len(pickle.dumps((model(images).detach() * 1).requires_grad_()))
        _watch = Watch()
        for output in (model(images), model(images) * 1, model(images).detach()):
            assert len(pickle.dumps(output)) < expected + 200
        file = io.BytesIO()
        torch.save(model(images), file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), model(images))

    def test_backward_and_its_gradients(self, model, images):
        plain_output = model(images)
        expected = torch.autograd.grad(plain_output.square().sum(), list(model.parameters()))
        _watch = Watch()
        found = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    def test_gradient_of_itself(self, output):
        (gradient,) = torch.autograd.grad(output.square().sum(), output)
        assert torch.equal(gradient, 2 * output)

    def test_a_second_derivative(self, watch, model, images):
        given = images.clone().requires_grad_()
        output = model(given)
        (gradient,) = torch.autograd.grad(output.sum(), given, create_graph=True)
        gradient.square().sum().backward()
        assert given.grad.abs().sum() > 0

    def test_weights_that_are_made_of_it(self, output):
        for value in (output.detach(), output):
            weight = nn.Parameter(value)
            assert isinstance(weight, nn.Parameter)
            assert weight.is_leaf
            weight.sum().backward()
            assert weight.grad.tolist() == [[1] * 4] * 8

    def test_iteration_and_unpacking(self, output):
        first, *others = output
        assert len(others) == 7
        assert names_of(first)[0] == "Sequential"

    def test_as_a_key(self, output):
        assert {output: 1}[output] == 1
        assert output in {output}

    def test_data_assigned(self, output):
        output.data = torch.zeros(8, 4)
        assert output.sum() == 0

    def test_isinstance(self, output):
        assert isinstance(output, torch.Tensor)
        assert torch.is_tensor(output)
        assert not isinstance(output, nn.Parameter)

    def test_vmap_and_func(self, watch, model, images):
        jacobian = torch.func.jacrev(lambda x: model(x[None])[0])(images[0])
        assert jacobian.shape == (4, 1, 6, 6)
        per_image = torch.vmap(lambda x: model(x[None])[0])(images)
        torch.testing.assert_close(per_image, model(images))

    def test_checkpointing(self, watch, model, images):
        for reentrant in (False, True):
            given = images.clone().requires_grad_()
            checkpoint(model, given, use_reentrant=reentrant).sum().backward()
            assert given.grad.abs().sum() > 0

    def test_no_warning(self, watch, model, images):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = functional.normalize(model(images))
            output.sum().backward()

    def test_after_its_watch_is_gone(self, model, images):
        watch = Watch()
        output = model(images)
        del watch
        gc.collect()
        (output * 2).sum().backward()
        assert model[1].weight.grad is not None


class TestMemory:
    """What a trace holds dies with the tensors that were traced."""

    def inputs_live(self, run, images):
        batch = images.clone()
        watched = weakref.ref(batch)
        output = run(batch)
        del batch
        meanwhile = watched() is not None
        del output
        return meanwhile, watched() is not None  # no collection of garbage is needed

    def test_inputs_die_with_the_output(self, watch, model, images):
        assert self.inputs_live(model, images) == (True, False)

    def test_inputs_die_with_what_was_made_of_the_output(self, watch, model, images):
        assert self.inputs_live(lambda batch: functional.normalize(model(batch)), images) == (True, False)

    def test_inputs_die_with_an_output_that_was_changed_in_place(self, watch, linear, images):
        assert self.inputs_live(lambda batch: linear(batch).mul_(2), images) == (True, False)

    @pytest.mark.parametrize(
        "keep",
        [
            lambda total, loss: total + loss.detach(),
            lambda total, loss: total + loss,
            lambda total, loss: torch.stack([total, loss.detach()]).sum(),
            lambda total, loss: 0.9 * total + 0.1 * loss.data,
        ],
        ids=["detached", "with gradient", "stacked", "average"],
    )
    def test_a_running_total_over_losses_keeps_nothing(self, watch, model, images, keep):
        total, seen = torch.zeros(()), []
        for _ in range(6):
            batch = images.clone()
            seen.append(weakref.ref(batch))
            loss = functional.mse_loss(model(batch), torch.zeros(8, 4))
            loss.backward()
            total = keep(total, loss)
            watch.forget()  # as a loss that is wrapped does it
            del batch, loss
            gc.collect()
        assert [batch() for batch in seen[:4]] == [None] * 4
        for _ in range(2):
            model(images)
            watch.forget()
        model(images)
        assert [batch() for batch in seen] == [None] * 6
        assert total > 0

    def test_a_total_whose_loss_is_wrapped_by_none_keeps_few(self, watch, model, images):
        total, seen = 0, []
        for _ in range(40):
            batch = images.clone()
            seen.append(weakref.ref(batch))
            loss = functional.mse_loss(model(batch), torch.zeros(8, 4))
            loss.backward()
            total = total + loss.detach()
            del batch, loss
        assert not any(batch() is not None for batch in seen[:20])

    @pytest.mark.parametrize("keep", [lambda e: e.detach(), lambda e: e > 0, lambda e: e.argmax(1)], ids=range(3))
    def test_what_is_kept_without_gradient_keeps_no_inputs(self, watch, model, images, keep):
        kept, batch = [], images.clone()
        seen = weakref.ref(batch)
        kept.append(keep(model(batch)))
        del batch
        for _ in range(2):
            watch.forget()
            model(images)
        assert seen() is None

    def test_an_output_that_its_argument_holds(self, watch, images):
        class Remembers(nn.Module):
            def forward(self, batch, memory):
                memory.append(batch * 2)
                return memory[-1]

        memory = []
        output = weakref.ref(Remembers()(images.requires_grad_(), memory))
        assert output() is not None
        del memory
        gc.collect()
        assert output() is None

    def test_modules_die_though_they_were_called(self, watch, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        model(images)
        seen = weakref.ref(model)
        del model
        gc.collect()
        assert seen() is None


class TestArguments:
    """Whatever a module takes, it is called with it."""

    @pytest.mark.parametrize("kind", ["proxy", "own tuple", "cycle", "none"])
    def test_that_cannot_be_copied_do_not_stop_it(self, watch, images, kind):
        class OwnTuple(tuple):
            def __new__(cls, one, other):
                return super().__new__(cls, (one, other))

        class Takes(nn.Module):
            def forward(self, images, other):
                return images.flatten(1) * torch.ones(36, requires_grad=True)

        cycle = []
        cycle.append(cycle)
        other = {"proxy": types.MappingProxyType({"a": 1}), "own tuple": OwnTuple(1, 2), "cycle": cycle, "none": None}
        output = Takes()(images, other[kind])
        assert output.shape == (8, 36)
        assert ref_of(output).step.args[0].value is images


class TestThreads:
    def run_in_thread(self, function):
        found = []
        thread = threading.Thread(target=lambda: found.append(function()))
        thread.start()
        thread.join()
        return found[0]

    def test_calls_in_a_thread_are_noted(self, watch, model, images):
        output = self.run_in_thread(lambda: model(images))
        assert names_of(output) == ["Sequential"]
        assert names_of(output * 2) == ["Sequential", "mul"]

    def test_many_at_once(self, watch, images):
        models, failed = [nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(36, 4)) for _ in range(4)], []

        def work(model):
            try:
                for _ in range(200):
                    assert names_of(model(images)) == ["Sequential"]
            except Exception as error:
                failed.append(error)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=work, args=(model,)) for model in models]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert failed == []

    def test_paused_in_one_thread_is_not_paused_in_another(self, watch, model, images):
        with paused():
            assert type(self.run_in_thread(lambda: model(images))) is Traced


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
class TestCompiled:
    def test_a_compiled_module_is_one_step(self, watch, model, images):
        compiled = torch.compile(model, backend="eager")
        output = compiled(images)
        torch.testing.assert_close(output, model(images))
        (step,) = steps_to([ref_of(output)])
        assert step.call is not None
        assert names_of(output * 2)[1:] == ["mul"]

    def test_a_compiled_module_is_not_compiled_anew_in_each_step(self, watch, model, images):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model, backend=backend)
        for _ in range(4):
            compiled(images)
        assert len(graphs) == 1

    def test_a_compiled_function_of_traced_tensors(self, watch, model, images):
        compiled = torch.compile(lambda e: e / e.norm(dim=1, keepdim=True), backend="eager")
        output = model(images)
        torch.testing.assert_close(compiled(output), functional.normalize(output))

    def test_a_compiled_function_that_calls_the_model(self, watch, model, images):
        compiled = torch.compile(lambda x: functional.normalize(model(x)), backend="eager")
        torch.testing.assert_close(compiled(images), functional.normalize(model(images)))

    def test_a_model_that_is_traced_by_jit(self, watch, model, images):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            traced = torch.jit.trace(model, images)
        assert torch.equal(traced(images), model(images))
        assert len(names_of(traced(images))) == 1

    def test_a_scripted_model(self, watch, model, images):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(model)
        before = global_hooks()
        output = [scripted(images) for _ in range(3)][-1]
        assert global_hooks() == before
        assert torch.equal(output, model(images))
        assert ref_of(output).step.function is scripted
        assert not nn_module._global_forward_hooks
        assert not nn_module._global_forward_hooks_with_kwargs
        assert len(nn_module._global_forward_pre_hooks) == 1

    def test_exported(self, watch, model, images):
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), model(images))


class TestCopiesOfModels:
    def test_a_model_that_was_called_can_be_pickled(self, watch, model, images):
        model(images)
        loaded = pickle.loads(pickle.dumps(model))
        assert type(loaded(images)) is Traced
        assert hooks_of(loaded) == hooks_of(model)
