"""Loops that are refused, each with the cures that its error names, to be followed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy
import torch
from pytorch_metric_learning import losses, miners
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as nn_module
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from written_loops import LABELS, images, net, quietly

from pml_adversarial.errors import CaptureError, InputError, ReplayError


@dataclass
class Case:
    """A loop that is refused.

    Attributes:
        loop: ``(wrap, cure) -> (value, modules)``: one step, as it is refused, or with a cure. ``wrap(loss, model,
            **options)`` makes the loss adversarial, or leaves it as it is.
        error: the class of the error.
        found: words of the error that say what was found.
        cures: words of the error that say what to do, each of them a cure that the loop knows.
        changes: cures with which the plain loop has another value, such as other inputs.
        idle: cures with which nothing is perturbed.
    """

    loop: Callable[..., tuple[torch.Tensor, list[nn.Module]]]
    error: type[Exception]
    found: str
    cures: tuple[str, ...]
    changes: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


CASES: dict[str, Case] = {}


def case(error, found, *cures, changes=(), idle=()):
    def add(loop):
        CASES[loop.__name__] = Case(loop, error, found, cures, changes, idle)
        return loop

    return add


def loss_of_pml():
    return losses.MultiSimilarityLoss()


class Head(nn.Module):
    """Frozen features inside, and layers that learn."""

    def __init__(self, without_gradient=False):
        super().__init__()
        self.frozen, self.head, self.without_gradient = net(), nn.Linear(8, 8), without_gradient

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.without_gradient):
            features = self.frozen(x)
        return self.head(features)


# The model


@case(CaptureError, "gave these embeddings", "Name the module that the loop calls", "or none", "inputs=x")
def another_model_is_named(wrap, cure):
    model, other, x = net(), net(), images()
    named = {"Name the module that the loop calls": model, "or none": None, "inputs=x": model}.get(cure, other)
    loss_func = wrap(loss_of_pml(), named)
    return loss_func(model(x), LABELS, **{"inputs": x} if cure == "inputs=x" else {}), [model]


@case(CaptureError, "gave these embeddings", "Name the module that the loop calls", "or none", "inputs=x")
def another_model_is_named_where_a_second_loss_watches(wrap, cure):
    model, other, x = net(), net(), images()
    named = {"Name the module that the loop calls": model, "or none": None, "inputs=x": model}.get(cure, other)
    first, second = wrap(loss_of_pml(), model), wrap(losses.ContrastiveLoss(), named)
    e = model(x)
    return first(e, LABELS) + second(e, LABELS, **{"inputs": x} if cure == "inputs=x" else {}), [model]


@case(CaptureError, "not known what makes embeddings", "expected a model", "any function of inputs")
def inputs_are_passed_and_no_model(wrap, cure):
    model, x = net(), images()
    embed = {"expected a model": model, "any function of inputs": lambda x: model(x)}.get(cure)
    return wrap(loss_of_pml(), embed)(model(x), LABELS, inputs=x), [model]


@case(InputError, "inputs is of shape", "one row for each of 8 embeddings")
def inputs_are_passed_of_some_rows(wrap, cure):
    model, x = net(), images()
    return wrap(loss_of_pml(), model)(model(x), LABELS, inputs=x if cure else x[:4]), [model]


@case(InputError, "inputs is a list", "expected a tensor")
def inputs_are_passed_as_a_list(wrap, cure):
    model, x = net(), images()
    return wrap(loss_of_pml(), model)(model(x), LABELS, inputs=x if cure else list(x)), [model]


@case(CaptureError, r"keys \['backbone'\]", "'trunk'", "in forward order")
def dict_of_a_trainer_without_a_trunk(wrap, cure):
    model, x = net(), images()
    named = {"'trunk'": {"trunk": model}, "in forward order": [model]}.get(cure, {"backbone": model})
    return wrap(loss_of_pml(), named)(model(x), LABELS), [model]


@case(CaptureError, r"list of \['Sequential', 'builtin_", "torch.nn.Module", "modules in forward order", "models dict")
def list_of_what_is_no_module(wrap, cure):
    model, x = nn.Sequential(net(), nn.Tanh()), images()
    named = {
        "torch.nn.Module": model,
        "modules in forward order": list(model),
        "models dict": {"trunk": model[0], "embedder": model[1]},
    }.get(cure, [model[0], torch.tanh])
    return wrap(loss_of_pml(), named)(model(x), LABELS), [model]


# What is known of the embeddings


@case(
    CaptureError,
    "computed without gradient",
    "Compute them with gradient",
    "call .eval",
    "inputs=x",
    idle=("call .eval",),
)
def embeddings_for_the_miner_without_gradient(wrap, cure):
    model, x = net(), images()
    miner = wrap(miners.TripletMarginMiner(margin=1.0), model)
    if cure == "call .eval":
        miner.eval()
    with torch.set_grad_enabled(cure == "Compute them with gradient"):
        e = model(x)
        tuples = miner(e, LABELS, **{"inputs": x} if cure == "inputs=x" else {})
    return loss_of_pml()(model(x), LABELS, tuples), [model]


@case(CaptureError, "a leaf", "without detach", "inputs=", "before loss.backward()")
def gradient_in_two_stages(wrap, cure):
    model, x = net(), images()
    loss_func = wrap(loss_of_pml(), model)
    if cure == "without detach":
        return loss_func(model(x), LABELS), [model]
    with torch.no_grad():
        e = torch.cat([model(part) for part in x.split(4)])
    for parameter in model.parameters():  # what is left of the step before
        parameter.grad = torch.ones_like(parameter)
    model.zero_grad()
    value = loss_func(e.requires_grad_(), LABELS, **{"inputs": x} if cure else {})
    value.backward()
    if e.grad is not None:
        for part, gradient in zip(x.split(4), e.grad.split(4), strict=True):
            model(part).backward(gradient)
    return value.detach(), [model]


@case(CaptureError, "a leaf", "inputs=", "function.x. makes the embeddings")
def gradient_in_two_stages_of_a_model_that_takes_a_dict(wrap, cure):
    class TakesDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, batch):
            return self.body(batch["images"])

    model, batch = TakesDict(), {"images": images()}
    loss_func = wrap(loss_of_pml(), (lambda x: model({"images": x})) if cure else model)
    with torch.no_grad():
        e = model(batch)
    value = loss_func(e.requires_grad_(), LABELS, **{"inputs": batch["images"]} if cure else {})
    value.backward()
    if e.grad is not None:
        model(batch).backward(e.grad)
    return value.detach(), [model]


@case(CaptureError, "ran under no_grad", r"requires_grad_\(False\)", "inputs=x")
def model_under_no_grad_and_a_scale_that_learns(wrap, cure):
    model, scale, x = net(), nn.ParameterList([torch.rand(8)]), images()
    loss_func = wrap(loss_of_pml(), (lambda x: model(x) * scale[0]) if cure == "inputs=x" else None)
    if cure == r"requires_grad_\(False\)":
        model.requires_grad_(False)
    with torch.set_grad_enabled(cure == r"requires_grad_\(False\)"):
        e = model(x)
    return loss_func(e * scale[0], LABELS, **{"inputs": x} if cure == "inputs=x" else {}), [scale]


@case(CaptureError, "changed in place, through a view", "makes a new tensor", "inputs=x")
def changed_in_place_through_a_view(wrap, cure):
    model, x, twice = net(), images(), torch.tensor([2.0] + [1.0] * 7)
    loss_func = wrap(loss_of_pml(), (lambda x: model(x) * twice) if cure == "inputs=x" else model)
    e = model(x) * 1
    if cure == "makes a new tensor":
        e = e * twice
    else:
        e[:, 0].mul_(2)
    return loss_func(e, LABELS, **{"inputs": x} if cure == "inputs=x" else {}), [model]


class ByNumpy(torch.autograd.Function):
    """Computes outside of torch."""

    @staticmethod
    def forward(ctx, x):
        found = torch.from_numpy(numpy.tanh(x.detach().numpy()))
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx, gradient):
        (found,) = ctx.saved_tensors
        return gradient * (1 - found * found)


class AsLayer(nn.Module):
    def forward(self, x):
        return ByNumpy.apply(x)


@case(CaptureError, "went through ByNumpy", "inside of a module, as a last layer", "inputs=x")
def own_function_of_autograd(wrap, cure):
    model, x = net(), images()
    if cure == "inside of a module, as a last layer":
        whole = nn.Sequential(model, AsLayer())
        return wrap(loss_of_pml(), whole)(whole(x), LABELS), [model]
    loss_func = wrap(loss_of_pml(), (lambda x: ByNumpy.apply(model(x))) if cure else model)
    return loss_func(ByNumpy.apply(model(x)), LABELS, **{"inputs": x} if cure else {}), [model]


class Slowed(torch.autograd.Function):
    """Makes the gradient smaller."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 0.1 * gradient


class Slows(nn.Module):
    def forward(self, x):
        return Slowed.apply(x)


@case(CaptureError, "function of autograd in Python", "inside of a module, as a last layer", "inputs=x")
def gradient_is_made_smaller_in_the_loop(wrap, cure):
    model, x = net(), images()
    if cure == "inside of a module, as a last layer":
        whole = nn.Sequential(model, Slows())
        return wrap(loss_of_pml(), whole)(whole(x), LABELS), [model]
    loss_func = wrap(loss_of_pml(), (lambda x: Slowed.apply(model(x))) if cure else model)
    return loss_func(Slowed.apply(model(x)), LABELS, **{"inputs": x} if cure else {}), [model]


@case(
    CaptureError,
    "changed in place, through a view of them or under no_grad",
    "that makes a new tensor",
    changes=("that makes a new tensor",),
)
def changed_in_place_under_no_grad(wrap, cure):
    model, x = net(), images()
    loss_func, e = wrap(loss_of_pml(), model), model(x)
    if cure:
        return loss_func(e * 0.5, LABELS), [model]
    with torch.no_grad():
        e.mul_(0.5)
    return loss_func(e, LABELS), [model]


@case(
    CaptureError,
    "not made of what it returned",
    "make the loss before the forward pass",
    "pass what the model",
    "inputs=x",
)
def embeddings_are_older_than_the_loss(wrap, cure):
    model, x = net(), images()
    if cure == "make the loss before the forward pass":
        loss_func, e = wrap(loss_of_pml()), model(x)
    else:
        e, loss_func = model(x), wrap(loss_of_pml(), model if cure == "inputs=x" else None)
    again = model(x)
    e = again if cure == "pass what the model" else e
    return loss_func(e, LABELS, **{"inputs": x} if cure == "inputs=x" else {}), [model]


@case(CaptureError, "not made of what it returned", "inputs=x")
def sequences_are_packed(wrap, cure):
    model, x = nn.GRU(6, 8, batch_first=True), images(shape=(6, 6))

    def embed(x):
        packed = pack_padded_sequence(x, torch.full((len(x),), 6), batch_first=True)
        return pad_packed_sequence(model(packed)[0], batch_first=True)[0][:, -1]

    loss_func = wrap(loss_of_pml(), embed if cure else model)
    return loss_func(embed(x), LABELS, **{"inputs": x} if cure else {}), [model]


@case(CaptureError, "No module ran", "before the forward pass", "inputs=x")
def model_ran_before_the_loss_was_made(wrap, cure):
    model, x = net(), images()
    if cure == "before the forward pass":
        loss_func, e = wrap(loss_of_pml(), model), model(x)
    else:
        e, loss_func = model(x), wrap(loss_of_pml(), model)
    return loss_func(e, LABELS, **{"inputs": x} if cure == "inputs=x" else {}), [model]


@case(CaptureError, "No module ran", "after it was compiled", "inputs=x")
def compiled_and_not_named(wrap, cure):
    torch._dynamo.reset()  # after several models of one code, torch would no longer compile it
    model, x = net(), images()
    model.compile(backend="eager")
    loss_func = wrap(loss_of_pml(), model if cure else None)
    return loss_func(model(x), LABELS, **{"inputs": x} if cure == "inputs=x" else {}), [model]


@case(CaptureError, r"Sequential ran.*no_grad", "inputs=x")
def student_of_parameters_alone_beside_a_teacher(wrap, cure):
    teacher, weights, x = net(), nn.ParameterList([torch.randn(36, 8) / 6]), images()
    embed = lambda x: torch.tanh(x.flatten(1) @ weights[0])  # noqa: E731
    loss_func = wrap(loss_of_pml(), embed if cure else None)
    with torch.no_grad():
        target = teacher(x)
    e = embed(x)
    return loss_func(e, LABELS, **{"inputs": x} if cure else {}) + (e - target).square().mean(), [weights]


# What the model gives now


@case(ReplayError, "differ from the embeddings", "in the order of the embeddings")
def inputs_are_passed_in_another_order(wrap, cure):
    model, x = net(), images()
    return wrap(loss_of_pml(), model)(model(x), LABELS, inputs=x if cure else x.flip(0)), [model]


@case(ReplayError, "differ from the embeddings", "makes exactly these embeddings", "in the mode that it is in")
def function_embeds_with_another_model(wrap, cure):
    model, x = nn.Sequential(*net()[:2], nn.Dropout(0.5), *net()[2:]), images()
    model.eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight.mul_(1.5)
    loss_func = wrap(loss_of_pml(), model if cure else other)
    return loss_func(model(x), LABELS, inputs=x), [model]


@case(ReplayError, "differ from the embeddings", "give a function that does it too")
def normalised_in_the_loop_alone(wrap, cure):
    model, x = net(), images()
    loss_func = wrap(loss_of_pml(), (lambda x: functional.normalize(model(x))) if cure else model)
    return loss_func(functional.normalize(model(x)), LABELS, inputs=x), [model]


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.second = net(), net(), False

    def forward(self, x, second=False):
        return self.two(x) if self.second or second else self.one(x)


@case(ReplayError, "Switched.second, which was True and is False", "as an argument of its forward", "before the switch")
def switched_by_an_attribute(wrap, cure):
    model, x = Switched(), images()
    loss_func = wrap(loss_of_pml(), model)
    if cure == "as an argument of its forward":
        return loss_func(model(x, second=True), LABELS), [model]
    model.second = True
    e = model(x)
    if cure == "before the switch":
        value = loss_func(e, LABELS)
        model.second = False
        return value, [model]
    model.second = False
    return loss_func(e, LABELS), [model]


@case(
    ReplayError,
    "Sequential .call 1 of 1. gives something else now",
    "compute the loss first",
    "inputs=x",
    changes=("compute the loss first", "inputs=x"),
)
def weights_are_changed_before_the_loss(wrap, cure):
    model, x = net(), images()
    old = copy.deepcopy(model)
    loss_func = wrap(loss_of_pml(), old if cure == "inputs=x" else model)
    e = (old if cure == "inputs=x" else model)(x)
    value = loss_func(e, LABELS, **{"inputs": x} if cure == "inputs=x" else {}) if cure else None
    with torch.no_grad():
        for parameter in model.parameters() if value is None else ():
            parameter.data.mul_(1.1)
    return loss_func(e, LABELS) if value is None else value, [old if cure == "inputs=x" else model]


class Shades(nn.Module):
    def __init__(self, on_a_copy):
        super().__init__()
        self.body, self.on_a_copy = net(), on_a_copy

    def forward(self, x):
        x = x.clone() if self.on_a_copy else x
        x.numpy()[:] *= 0.5  # of which torch knows nothing
        return self.body(x)


@case(ReplayError, "Shades .call 1 of 1. gives something else now", "work on a copy", changes=("work on a copy",))
def input_is_changed_behind_torch(wrap, cure):
    model, x = Shades(on_a_copy=bool(cure)), images()
    if cure:  # an array of numpy has no gradient
        model.forward = lambda x: model.body(x.clone().mul_(0.5))
    return wrap(loss_of_pml(), model)(model(x), LABELS), [model]


SWITCH = SimpleNamespace(scale=1.0)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x, scale=None):
        return self.body(x) * (SWITCH.scale if scale is None else scale)


@case(ReplayError, "Scaled .call 1 of 1. gives something else now", "as an argument of forward", "inputs=x")
def global_switch(wrap, cure):
    model, x = Scaled(), images()
    loss_func = wrap(loss_of_pml(), (lambda x: model(x, 2.0)) if cure == "inputs=x" else model)
    SWITCH.scale = 2.0
    e = model(x, 2.0) if cure == "as an argument of forward" else model(x)
    SWITCH.scale = 1.0
    return loss_func(e, LABELS, **{"inputs": x} if cure == "inputs=x" else {}), [model]


@case(ReplayError, "changed its mode", r"Compute the loss before")
def mode_is_changed_before_the_loss(wrap, cure):
    model, x = net(), images()
    loss_func, e = wrap(loss_of_pml(), model), model(x)
    value = loss_func(e, LABELS) if cure else None
    model.eval()
    return loss_func(e, LABELS) if value is None else value, [model]


# What the model took


@case(CaptureError, "computed under no_grad", r"requires_grad_\(False\)", "inputs=features")
def trunk_under_no_grad(wrap, cure):
    trunk, head, x = net(), nn.Linear(8, 8), images()
    of_features = cure == "inputs=features"
    loss_func = wrap(loss_of_pml(), head, bounds=(-5, 5)) if of_features else wrap(loss_of_pml())
    if cure == r"requires_grad_\(False\)":
        features = trunk.requires_grad_(False)(x)
    else:
        with torch.no_grad():
            features = trunk(x)
    return loss_func(head(features), LABELS, **{"inputs": features} if of_features else {}), [head]


@case(CaptureError, "or in an earlier step", "run it in each step", "inputs=features")
def features_of_an_earlier_step(wrap, cure):
    trunk, head, x, others = net().requires_grad_(False), nn.Linear(8, 8), images(), images(2)
    of_features = cure == "inputs=features"
    loss_func = wrap(loss_of_pml(), head, bounds=(-5, 5)) if of_features else wrap(loss_of_pml())
    kept = trunk(x)
    for _ in range(9):  # other steps
        given = trunk(others)
        loss_func(head(given), LABELS, **{"inputs": given} if of_features else {})
    features = trunk(x) if cure == "run it in each step" else kept
    return loss_func(head(features), LABELS, **{"inputs": features} if of_features else {}), [head]


@case(CaptureError, "features that were computed with gradient", r"\[trunk, head\]", "or none")
def head_is_named_alone(wrap, cure):
    trunk, head, x = net(), nn.Linear(8, 8), images()
    loss_func = wrap(loss_of_pml(), {r"\[trunk, head\]": [trunk, head], "or none": None}.get(cure, head))
    return loss_func(head(trunk(x)), LABELS), [trunk, head]


class Keeps(nn.Module):
    """Keeps its features as an attribute."""

    def __init__(self):
        super().__init__()
        self.first, self.second = net(), nn.Linear(8, 8)

    def forward(self, x):
        self.features = self.first(x)
        return self.second(self.features)


class GivesBoth(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x), self.model.features


@case(
    CaptureError,
    "cat took a tensor .* was made of the inputs too",
    "let a module return what the loop takes",
    "inputs=x",
)
def features_that_the_model_keeps_beside_what_it_gives(wrap, cure):
    model, x = Keeps(), images()
    both = GivesBoth(model)
    if cure == "let a module return what the loop takes":
        return wrap(loss_of_pml(), both)(torch.cat(both(x), 1), LABELS), [model]
    loss_func = wrap(loss_of_pml(), (lambda x: torch.cat(both(x), 1)) if cure else model)
    return loss_func(torch.cat([model(x), model.features], 1), LABELS, **{"inputs": x} if cure else {}), [model]


@case(CaptureError, "by a module that is not named", r"\[first, second\]", "or none")
def one_of_two_branches_is_named(wrap, cure):
    first, second, x = net(), net(), images()
    loss_func = wrap(loss_of_pml(), {r"\[first, second\]": [first, second], "or none": None}.get(cure, first))
    return loss_func(torch.cat([first(x), second(x)], 1), LABELS), [first, second]


def length(x):
    return x.norm(dim=1, keepdim=True)


@case(CaptureError, "by a function of TorchScript", "write functions in plain torch")
def scripted_function_of_the_embeddings(wrap, cure):
    model, x = net(), images()
    scripted = quietly(torch.jit.trace, length, torch.rand(8, 8))
    loss_func, embeddings = wrap(loss_of_pml(), model), model(x)
    return loss_func(embeddings * (length if cure else scripted)(embeddings), LABELS), [model]


class Length(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        length = x.norm(dim=1, keepdim=True)
        ctx.save_for_backward(x, length)
        return length

    @staticmethod
    def backward(ctx, gradient):
        x, length = ctx.saved_tensors
        return gradient * x / length


class TimesLength(nn.Module):
    def forward(self, x):
        return x * Length.apply(x)


@case(CaptureError, "by Length, a function of autograd", "inside of a module, as a last layer", "inputs=x")
def own_function_of_the_embeddings_beside_them(wrap, cure):
    model, x = net(), images()
    if cure == "inside of a module, as a last layer":
        whole = nn.Sequential(model, TimesLength())
        return wrap(loss_of_pml(), whole)(whole(x), LABELS), [model]
    loss_func = wrap(loss_of_pml(), nn.Sequential(model, TimesLength()).forward if cure else model)
    embeddings = model(x)
    return loss_func(embeddings * Length.apply(embeddings), LABELS, **{"inputs": x} if cure else {}), [model]


@case(CaptureError, "before the loss was made", "make the loss before the forward pass")
def trunk_ran_before_the_loss_was_made(wrap, cure):
    trunk, head, x = net(), nn.Linear(8, 8), images()
    loss_func = wrap(loss_of_pml()) if cure else None
    features = trunk(x)
    loss_func = loss_func or wrap(loss_of_pml())
    return loss_func(head(features), LABELS), [trunk, head]


@case(CaptureError, r"gave \(1, 8, 8\) for inputs \(8, 6, 6\)", "inputs=x")
def last_state_of_a_recurrent_model(wrap, cure):
    model, x = nn.GRU(6, 8, batch_first=True), images(shape=(6, 6))
    loss_func = wrap(loss_of_pml(), (lambda x: model(x)[1][-1]) if cure else model)
    return loss_func(model(x)[1][-1], LABELS, **{"inputs": x} if cure else {}), [model]


class Streams(nn.Module):
    """One part for each of two kinds of images."""

    def __init__(self):
        super().__init__()
        self.first, self.second = net(), net()

    def forward(self, x, y):
        return torch.cat([self.first(x), self.second(y)])


@case(CaptureError, r"gave \(16, 8\), rows of several inputs", "put their rows together there")
def rows_of_two_inputs_from_one_call(wrap, cure):
    model, x = Streams(), images()
    loss_func, y = wrap(loss_of_pml(), model), x.flip(3)
    e = torch.cat([model.first(x), model.second(y)]) if cure else model(x, y)
    return loss_func(e, torch.cat([LABELS, LABELS])), [model]


class Centred(nn.Module):
    def __init__(self, on_a_copy):
        super().__init__()
        self.body, self.on_a_copy = net(), on_a_copy

    def forward(self, x):
        mean = x.mean()
        if self.on_a_copy:
            x = x - mean
        else:
            x -= mean
        return self.body(x)


@case(CaptureError, "Centred changed its input in place", "x = x - mean")
def preprocessing_in_place(wrap, cure):
    model, x = Centred(on_a_copy=bool(cure)), images()
    return wrap(loss_of_pml(), model)(model(x), LABELS), [model]


@case(CaptureError, "Sequential changed its input in place", "inplace=False")
def first_layer_in_place(wrap, cure):
    model, x = nn.Sequential(nn.Hardtanh(0.2, 0.8, inplace=not cure), *net()), images()
    return wrap(loss_of_pml(), model)(model(x), LABELS), [model]


@case(CaptureError, "was changed in place since", "Compute the loss before", r"clone\(\)")
def buffer_of_images_is_filled_anew(wrap, cure):
    model, static = net(), torch.empty(8, 1, 6, 6)
    model[1].weight.requires_grad_(False)  # so that the plain loop does not miss what was there
    loss_func = wrap(loss_of_pml(), model)
    static.copy_(images())
    e = model(static.clone() if cure == r"clone\(\)" else static)
    value = loss_func(e, LABELS) if cure == "Compute the loss before" else None
    static.copy_(images(2))
    return loss_func(e, LABELS) if value is None else value, [model]


# What is perturbed


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(10, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, ids, other=None):
        found = self.rnn(self.embedding(ids))[0][:, -1]
        return self.head(found if other is None else found - self.rnn(self.embedding(other))[0][:, -1])


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, ids, mask):
        return self.head((self.embedding(ids) * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))


IDS = torch.arange(32).reshape(8, 4) % 10
INNER = {"bounds": (-5, 5)}


@case(InputError, "ids: int64", "at=model.embedding")
def ids_of_words(wrap, cure):
    model = Words()
    loss_func = wrap(loss_of_pml(), model, **({"at": model.embedding, **INNER} if cure else {}))
    return loss_func(model(IDS), LABELS), [model]


@case(InputError, "mask: int64", "at=model.embedding")
def ids_of_words_with_a_mask(wrap, cure):
    model = Masked()
    loss_func = wrap(loss_of_pml(), model, **({"at": model.embedding, **INNER} if cure else {}))
    return loss_func(model(IDS, mask=torch.tensor([[1, 1, 1, 0]] * 4 + [[1, 1, 0, 0]] * 4)), LABELS), [model]


@case(InputError, "mask: float32", "at=model.embedding", "perturb_input='mask'")
def ids_of_words_with_a_mask_of_floating_point(wrap, cure):
    model = Masked()
    options = {
        "at=model.embedding": {"at": model.embedding, **INNER},
        "perturb_input='mask'": {"perturb_input": "mask"},
    }
    loss_func = wrap(loss_of_pml(), model, **options.get(cure, {}))
    return loss_func(model(IDS, mask=torch.tensor([[1, 1, 1, 0.0]] * 4 + [[1, 1, 0, 0]] * 4)), LABELS), [model]


class Located(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = net(), nn.Linear(2, 8)

    def forward(self, image, place):
        image = image if image.is_floating_point() else image.float() / 255
        return self.embed(image) + self.place(place)


@case(
    InputError,
    r"image: uint8 \(8, 1, 6, 6\), place: float32 \(8, 2\)",
    r"images.float\(\) / 255",
    "perturb_input='place'",
)
def images_of_bytes_beside_a_place(wrap, cure):
    model, x, place = Located(), (images() * 255).to(torch.uint8), images(3, 8, (2,))
    loss_func = wrap(loss_of_pml(), model, **({"perturb_input": "place"} if cure == "perturb_input='place'" else {}))
    return loss_func(model(x.float() / 255 if cure == r"images.float\(\) / 255" else x, place), LABELS), [model]


@case(CaptureError, "ran 2 times", "once for each of its inputs", "a module that runs once")
def inner_module_runs_twice(wrap, cure):
    model = Words()
    at = model.head if cure == "a module that runs once" else model.embedding
    loss_func = wrap(loss_of_pml(), model, at=at, **INNER)
    if cure == "once for each of its inputs":
        return loss_func(torch.cat([model(IDS), model(IDS.flip(0))]), LABELS.repeat(2)), [model]
    return loss_func(model(IDS, IDS.flip(0)), LABELS), [model]


CASES["inner_module_runs_twice"].changes = ("once for each of its inputs",)


@case(CaptureError, "gave tuple", "a module that runs once and gives a tensor")
def inner_module_gives_a_tuple(wrap, cure):
    model = Words()
    loss_func = wrap(loss_of_pml(), model, at=model.embedding if cure else model.rnn, **INNER)
    return loss_func(model(IDS), LABELS), [model]


@case(CaptureError, "is inside of Sequential, which took what other modules gave", r"nn.Sequential\(trunk, head\)")
def inner_module_of_the_head(wrap, cure):
    trunk, head, x = net(), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)), images()
    loss_func = wrap(loss_of_pml(), None, at=head[0], bounds=(-1, 1))
    model = nn.Sequential(trunk, head)
    return loss_func(model(x) if cure else head(trunk(x)), LABELS), [trunk, head]


@case(CaptureError, "no Embedding that is this one ran", "the one that runs")
def inner_module_of_a_copy(wrap, cure):
    model = Words()
    running = copy.deepcopy(model)
    at = running.embedding if cure else model.embedding
    return wrap(loss_of_pml(), running, at=at, **INNER)(running(IDS), LABELS), [running]


class TakesTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, pixel_values, weights):
        return self.body(pixel_values) * weights


@case(InputError, "perturb_input='images', and TakesTwo took pixel_values: ", "name of an argument of its forward")
def wrong_name_of_an_argument(wrap, cure):
    model, x = TakesTwo(), images()
    loss_func = wrap(loss_of_pml(), model, perturb_input="pixel_values" if cure else "images")
    return loss_func(model(x, weights=torch.rand(8, 1)), LABELS), [model]


class DividesBy255(nn.Module):
    def __init__(self, divides):
        super().__init__()
        self.body, self.divides = net(), divides

    def forward(self, x):
        return self.body(x.float() / 255 if self.divides else x)


@case(InputError, "x: uint8", r"images.float\(\) / 255. before they enter the model")
def images_of_whole_numbers(wrap, cure):
    model, x = DividesBy255(divides=not cure), (images() * 255).round().byte()
    return wrap(loss_of_pml(), model)(model(x.float() / 255 if cure else x), LABELS), [model]


class Reads(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.body, self.x = net(), x

    def forward(self, names):
        return self.body(torch.stack([self.x[int(name)] for name in names]))


@case(InputError, "Reads took names: -", "inputs=x")
def model_that_takes_names(wrap, cure):
    x = images()
    model = Reads(x)
    loss_func = wrap(loss_of_pml(), model.body if cure else model)
    return loss_func(model([*map(str, range(8))]), LABELS, **{"inputs": x} if cure else {}), [model]


@case(CaptureError, "has no gradient with respect to its inputs", r"requires_grad_\(False\)", "at=model.frozen")
def part_of_the_model_under_no_grad(wrap, cure):
    model, x = Head(without_gradient=cure != r"requires_grad_\(False\)"), images()
    model.frozen.requires_grad_(False)
    loss_func = wrap(loss_of_pml(), model, **({"at": model.frozen, **INNER} if cure == "at=model.frozen" else {}))
    return loss_func(model(x), LABELS), [model]


@case(CaptureError, "has no gradient with respect to its inputs", "in place of no_grad and detach")
def features_are_detached_in_the_loop(wrap, cure):
    trunk, head, x = net().requires_grad_(False), nn.Linear(8, 8), images()
    loss_func, features = wrap(loss_of_pml()), trunk(x)
    return loss_func(head(features if cure else features.detach()), LABELS), [head]


@case(ReplayError, "Sequential, of which weights, submodules or hooks", "compute the loss before the switch")
def weights_change_between_forward_pass_and_loss(wrap, cure):
    model, x = net(), images()
    loss_func, embeddings = wrap(loss_of_pml(), model), model(x)
    if not cure:
        for parameter in model.parameters():
            parameter.data = 1.5 * parameter.data
    return loss_func(embeddings, LABELS), [model]


@case(
    InputError,
    "gave NaN or infinite values",
    "finite weights and inputs",
    changes=("finite weights and inputs",),
)
def weights_that_are_not_finite(wrap, cure):
    model, x = net(), images()
    loss_func = wrap(loss_of_pml(), model)
    if not cure:
        nn.init.constant_(model[-1].bias, torch.nan)
    return loss_func(1.5 * model(x), LABELS), [model]


# Rows


class LessMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.loss = loss_of_pml()

    def forward(self, embeddings, labels):
        return self.loss(embeddings - embeddings.mean(0), labels)


@case(CaptureError, "depends on 8 inputs", "module whose forward mixes the rows and then calls the loss")
def mean_of_the_batch_is_taken_away(wrap, cure):
    model, x = net(), images()
    loss_func = wrap(LessMean() if cure else loss_of_pml(), model)
    e = model(x)
    return loss_func(e if cure else e - e.mean(0), LABELS), [model]


@case(CaptureError, "depends on several inputs: 0, 8", r"inputs=torch.stack\(\[first, second\], 1\)")
def mean_of_two_crops(wrap, cure):
    model, first, second = net(), images(1), images(2)

    def embed(inputs):
        return (model(inputs[:, 0]) + model(inputs[:, 1])) / 2

    loss_func = wrap(loss_of_pml(), embed if cure else model)
    given = {"inputs": torch.stack([first, second], 1)} if cure else {}
    return loss_func((model(first) + model(second)) / 2, LABELS, **given), [model]


@case(ReplayError, "embeds some rows of the batch otherwise", r"inputs=x.transpose\(0, 1\)")
def recurrent_with_time_first(wrap, cure):
    model, x = nn.LSTM(6, 8), images(shape=(5, 6)).transpose(0, 1)  # (T, N, D)
    with torch.no_grad():
        model.weight_ih_l0.mul_(4)
    embed = lambda x: model(x.transpose(0, 1))[0][-1]  # noqa: E731
    loss_func = wrap(loss_of_pml(), embed if cure else model)
    given = {"inputs": x.transpose(0, 1)} if cure else {}
    return loss_func(model(x)[0][-1], LABELS, **given), [model]


class Graph(nn.Module):
    """Each row takes from its neighbours."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, x):
        return self.body(x + 0.5 * x.roll(1, 0))


class ThenLoss(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part, self.loss = part, loss_of_pml()

    def forward(self, embeddings, labels):
        return self.loss(self.part(embeddings), labels)


@case(ReplayError, "embeds some rows of the batch otherwise", "let a module of your own do that part")
def model_that_mixes_rows(wrap, cure):
    rest, part, x = net(), Graph(), images()
    if cure:
        return wrap(ThenLoss(part), rest)(rest(x), LABELS), [rest, part]
    model = nn.Sequential(rest, part)
    return wrap(loss_of_pml(), model)(model(x), LABELS), [rest, part]


@case(InputError, "chunk=4, and BatchNorm1d is in train mode", "set it to eval mode")
def chunks_with_statistics_of_the_batch(wrap, cure):
    model, x = nn.Sequential(*net()[:2], nn.BatchNorm1d(16), *net()[2:]), images()
    if cure:
        model[2].eval()
    return wrap(loss_of_pml(), model, chunk=4)(model(x), LABELS), [model]


CASES["chunks_with_statistics_of_the_batch"].changes = ("set it to eval mode",)


# Pixels


def wrapped_with(loop_x, options_of, make=None):
    """A loop whose loss is made with options that depend on the cure."""

    def loop(wrap, cure):
        model, x = (make or net)(), loop_x(cure)
        return wrap(loss_of_pml(), model, **options_of(cure))(model(x), LABELS), [model]

    return loop


def colours(cure=None):
    return images(shape=(3, 6, 6))


def net_of_colours():
    return net(size=108)


def options_case(name, error, found, cures, x, options, make=None, changes=()):
    """A case whose cures are options. ``options``: cure, or None -> options."""
    loop = wrapped_with(x, lambda cure: options.get(cure) or {}, make)
    CASES[name] = Case(loop, error, found, cures, changes)


MEANS = "the two values that you gave to torchvision.transforms.Normalize"
HALVES = (0.5,) * 3, (0.5,) * 3
options_case(
    "normalization_of_numbers",
    InputError,
    "normalization=.0.5, 0.5.",
    ("each with one number per channel",),
    lambda cure: (images() - 0.5) / 0.5,
    {None: {"normalization": (0.5, 0.5)}, "each with one number per channel": {"normalization": ([0.5], [0.5])}},
)
options_case(
    "bounds_upside_down",
    InputError,
    "bounds=.1, -1.",
    (r"bounds=\(-1, 1\)",),
    lambda cure: images() * 2 - 1,
    {None: {"bounds": (1, -1)}, r"bounds=\(-1, 1\)": {"bounds": (-1, 1)}},
)
options_case(
    "normalization_of_one_channel_too_many",
    InputError,
    "no dimension has as many",
    ("one mean and one std per channel",),
    lambda cure: (colours() - 0.5) / 0.5,
    {
        None: {"normalization": ((0.5,) * 4, (0.5,) * 4)},
        "one mean and one std per channel": {"normalization": HALVES},
    },
    net_of_colours,
)
IN_LEVELS = [127.5], [127.5]
options_case(
    "normalization_in_levels",
    InputError,
    "has the mean 127.5",
    ("divide both by 255", r"bounds=\(0, 255\)"),
    lambda cure: (images() - 0.5) / 0.5,  # as (255 images() - 127.5) / 127.5
    {
        None: {"normalization": IN_LEVELS},
        "divide both by 255": {"normalization": ([0.5], [0.5])},
        r"bounds=\(0, 255\)": {"normalization": IN_LEVELS, "bounds": (0, 255)},
    },
)
options_case(
    "clips_with_three_frames",
    InputError,
    "more than one dimension has as many",
    ("channel_dim=-3 for clips",),
    lambda cure: (images(shape=(3, 3, 4, 4)) - 0.5) / 0.5,
    {
        None: {"normalization": HALVES},
        "channel_dim=-3 for clips": {"normalization": HALVES, "channel_dim": -3},
    },
    lambda: net(size=144),
)
options_case(
    "inputs_that_are_not_in_0_to_1",
    InputError,
    "range from",
    (r"normalization=\(mean, std\)", r"bounds=\(low, high\)"),
    lambda cure: (images() - 0.5) / 0.5,
    {
        r"normalization=\(mean, std\)": {"normalization": ([0.5], [0.5])},
        r"bounds=\(low, high\)": {"bounds": (-1, 1)},
    },
)
options_case(
    "inputs_of_0_to_255",
    InputError,
    "range from",
    ("divide them by 255",),
    lambda cure: images() if cure else images() * 255,
    {},
    changes=("divide them by 255",),
)
options_case(
    "normalised_otherwise_than_said",
    InputError,
    "undone, the inputs range from",
    ("with which the inputs were normalised",),
    lambda cure: (images() - 0.5) / 0.2,
    {
        None: {"normalization": ([0.5], [0.5])},
        "with which the inputs were normalised": {"normalization": ([0.5], [0.2])},
    },
)
options_case(
    "inputs_a_little_beyond_0_and_1",
    InputError,
    "range from",
    (r"images\.clamp\(0, 1\)", r"normalization=\(mean, std\)"),
    lambda cure: _sharpened().clamp(0, 1) if cure and "clamp" in cure else _sharpened(),
    {r"normalization=\(mean, std\)": {"normalization": ([0.2], [0.7])}},
    changes=(r"images\.clamp\(0, 1\)",),
)
options_case(
    "inputs_beyond_their_bounds",
    InputError,
    "beyond bounds=",
    ("Give bounds that hold all inputs", "clamp the inputs"),
    lambda cure: (images() * 2 - 1).clamp(-0.5, 0.5) if cure == "clamp the inputs" else images() * 2 - 1,
    {
        None: {"bounds": (-0.5, 0.5)},
        "Give bounds that hold all inputs": {"bounds": (-1, 1)},
        "clamp the inputs": {"bounds": (-0.5, 0.5)},
    },
    changes=("clamp the inputs",),
)


def _sharpened():
    return (images() - 0.5) * 1.7 + 0.5


def _with_nan(cure):
    x = images()
    if not cure:
        x[2, 0, 0, 0] = torch.nan
    return x


options_case(
    "inputs_that_are_not_finite",
    InputError,
    "1 of 8 inputs hold NaN",
    ("step that made them",),
    _with_nan,
    {},
    changes=("step that made them",),
)


class Numbers(nn.Module):
    def forward(self, x):
        return (x.flatten(1) * 9).long()


class OfNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.numbers, self.embedding, self.head = Numbers(), nn.Embedding(10, 4), net(size=144)

    def forward(self, x):
        return self.head(self.embedding(self.numbers(x)))


@case(InputError, "inputs are torch.int64", "a module that gives floating point")
def inner_module_gives_whole_numbers(wrap, cure):
    model, x = OfNumbers(), images()
    loss_func = wrap(loss_of_pml(), model, at=model.embedding if cure else model.numbers, bounds=(-5, 5))
    return loss_func(model(x), LABELS), [model]


class FromSparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(36, 8) / 6)

    def forward(self, x):
        return x @ self.weight


@case(InputError, "inputs are torch.sparse_coo", "as a dense tensor")
def sparse_inputs(wrap, cure):
    model, x = FromSparse(), images().flatten(1)
    return wrap(loss_of_pml(), model)(model(x if cure else x.to_sparse()), LABELS), [model]


# Options


OPTION = {
    "name_of_an_argument_that_is_no_name": (
        "perturb_input=3",
        {"perturb_input": 3},
        {"expected the name of an argument": {"perturb_input": "input"}},
    ),
    "inner_module_by_name": (
        "at='0'",
        {"at": "0", **INNER},
        {"expected the module of the model": {"at": 0, **INNER}},
    ),
    "inner_module_and_argument": (
        "were both given",
        {"at": 0, "perturb_input": "input", **INNER},
        {"output of a module": {"at": 0, **INNER}, "an argument of the model": {"perturb_input": "input"}},
    ),
    "inner_module_without_bounds": (
        "given without bounds",
        {"at": 0},
        {r"bounds=\(low, high\)": {"at": 0, **INNER}},
    ),
    "chunk_that_is_no_number": ("chunk=0", {"chunk": 0}, {"number of rows": {"chunk": 4}}),
}


def _with_option(name):
    found, wrong, right = OPTION[name]

    def loop(wrap, cure):
        model, x = net(), images()
        options = dict(right.get(cure, wrong))
        if options.get("at") == 0:
            options["at"] = model[0]
        return wrap(loss_of_pml(), model, **options)(model(x), LABELS), [model]

    CASES[name] = Case(loop, InputError, found, tuple(right))


for _name in OPTION:
    _with_option(_name)


@case(InputError, "embeddings are tuple", "the tensor that the model returned")
def embeddings_are_a_tuple(wrap, cure):
    model, x = net(), images()
    e = model(x)
    return wrap(loss_of_pml(), model)(model(x) if cure else (e, e), LABELS), [model]


@case(
    InputError,
    "embeddings without gradient",
    "Call .eval",
    "loss with gradient",
    changes=("loss with gradient",),
    idle=("Call .eval",),
)
def detached_embeddings(wrap, cure):
    model, x = net(), images()
    loss_func = wrap(loss_of_pml(), model)
    if cure == "Call .eval":
        loss_func.eval()
    e = model(x)
    return loss_func(e if cure == "loss with gradient" else e.detach(), LABELS), [model]


@case(
    InputError,
    "a call under no_grad",
    "Call .eval",
    "loss with gradient",
    changes=("loss with gradient",),
    idle=("Call .eval",),
)
def evaluation_in_training_mode(wrap, cure):
    model, x = net(), images()
    loss_func = wrap(loss_of_pml(), model)
    if cure == "Call .eval":
        loss_func.eval()
    with torch.set_grad_enabled(cure == "loss with gradient"):
        return loss_func(model(x), LABELS), [model]


options_case(
    "bounds_of_other_channels_than_normalization",
    InputError,
    "normalization has 3 channels, and bounds have 2",
    ("expected as many", "or one"),
    lambda cure: (colours() - 0.5) / 0.5,
    {
        None: {"normalization": HALVES, "bounds": ([0, 0], [1, 1])},
        "expected as many": {"normalization": HALVES, "bounds": ([0, 0, 0], [1, 1, 1])},
        "or one": {"normalization": HALVES, "bounds": (0, 1)},
    },
    net_of_colours,
)


# Tensors that cannot be followed


class Ends(nn.Module):
    """A last layer without weights, which returns a score in train mode alone."""

    def __init__(self, in_both=False):
        super().__init__()
        self.in_both = in_both

    def forward(self, features):
        return (features.sum(1), features) if self.training or self.in_both else features


@case(ReplayError, "does not give in eval mode", "Return the same from", "call the part of the model")
def layer_that_returns_more_in_train_mode(wrap, cure):
    model, x = nn.Sequential(net(), Ends(in_both=cure == "Return the same from")), images()
    loss_func = wrap(loss_of_pml(), model)
    return loss_func(model[0](x) if cure == "call the part of the model" else model(x)[1], LABELS), [model]


class OwnTensor(torch.Tensor):
    """A class of tensors that hands itself on."""


@case(CaptureError, "are a OwnTensor", r"as_subclass\(torch.Tensor\)", "inputs=x")
def tensors_of_a_class_of_its_own(wrap, cure):
    model, x = net(), images()
    loss_func = wrap(loss_of_pml(), model)
    e = model(x if cure == r"as_subclass\(torch.Tensor\)" else x.as_subclass(OwnTensor))
    return loss_func(e, LABELS, **{"inputs": x} if cure == "inputs=x" else {}), [model]


@case(InputError, "complex64", "as pairs of real ones")
def complex_numbers(wrap, cure):
    class OfComplex(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(24)

        def forward(self, x):
            return self.net((x if x.is_complex() else torch.view_as_complex(x)).abs())

    model, x = OfComplex(), torch.fft.rfft2(images())
    loss_func = wrap(loss_of_pml(), model, bounds=(-20, 40))
    return loss_func(model(torch.view_as_real(x) if cure else x), LABELS), [model]


@case(CaptureError, "in the loop|of its own", "make a function")
def parameters_of_the_loop_before_the_model(wrap, cure):
    model, prompt, x = net(), nn.Parameter(torch.full((1, 1, 6, 6), 0.1)), images()
    loss_func = wrap(loss_of_pml(), (lambda x: model(x + prompt)) if cure else model)
    value = loss_func(model(x + prompt), LABELS, **{"inputs": x} if cure else {})
    return value, [model, nn.ParameterList([prompt])]


def with_a_backward_hook(model):
    model.register_full_backward_hook(lambda module, given, found: None)
    return model


@case(CaptureError, "went through BackwardHookFunction", "put the module that has the hook into another", "inputs=x")
def hook_of_the_backward_pass_of_the_model(wrap, cure):
    model, x = with_a_backward_hook(net()), images()
    model = model if cure in (None, "inputs=x") else nn.Sequential(model)
    return wrap(loss_of_pml(), model)(model(x), LABELS, **{"inputs": x} if cure == "inputs=x" else {}), [model]


@case(CaptureError, "went through BackwardHookFunction", "on the modules that stand inside of the model")
def hook_of_the_backward_pass_of_all_modules(wrap, cure):
    model = nn.Sequential(net())
    if cure:
        with_a_backward_hook(model[0])
        return wrap(loss_of_pml(), model)(model(images()), LABELS), [model]
    handle = nn_module.register_module_full_backward_hook(lambda module, given, found: None)
    try:
        return wrap(loss_of_pml(), model)(model(images()), LABELS), [model]
    finally:
        handle.remove()
        nn_module._global_is_full_backward_hook = None  # which torch leaves behind


@case(CaptureError, "Linear took features that went through", "put the module that has the hook into another")
def hook_of_the_backward_pass_of_the_trunk(wrap, cure):
    trunk, head, x = with_a_backward_hook(net()), nn.Linear(8, 8), images()
    trunk = nn.Sequential(trunk) if cure else trunk
    return wrap(loss_of_pml())(head(trunk(x)), LABELS), [trunk, head]


@case(CaptureError, "made by normalize, and not of", "put the module that has the hook into another", "inputs yourself")
def hook_of_the_backward_pass_of_the_head(wrap, cure):
    trunk, head, x = net(), with_a_backward_hook(nn.Linear(8, 8)), images()
    head = head if cure in (None, "inputs yourself") else nn.Sequential(head)
    embed = lambda x: functional.normalize(head(trunk(x)))  # noqa: E731
    given = {"inputs": x} if cure == "inputs yourself" else {}
    return wrap(loss_of_pml(), embed if given else None)(embed(x), LABELS, **given), [trunk, head]


class Guarded(nn.Module):
    """A wrapper that allows one backward pass, as those of frameworks that scale the loss do."""

    def __init__(self):
        super().__init__()
        self.module = net()

    def forward(self, x):
        def refuse(gradient):
            if gradient.abs().max() == 1:  # the package's own pass, which begins with ones
                raise RuntimeError("call the wrapper's backward().")

        found = self.module(x)
        if found.requires_grad:
            found.register_hook(refuse)
        return found


@case(CaptureError, "raises: call the wrapper's backward", "inputs=x")
def wrapper_that_refuses_other_backward_passes(wrap, cure):
    model, x = Guarded(), images()
    loss_func = wrap(loss_of_pml(), (lambda x: model.module(x)) if cure else model)
    return loss_func(model(x), LABELS, **{"inputs": x} if cure else {}), [model]
