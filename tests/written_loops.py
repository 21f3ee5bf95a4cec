"""Training loops as people write them: each builds modules and data, and takes one step with the losses it is given."""

import copy
import itertools
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy
import torch
from pytorch_metric_learning import losses, miners
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pml_adversarial.errors import CaptureError, InputError, ReplayError

LABELS = torch.arange(8) // 2
SHUFFLED = torch.tensor([3, 0, 7, 1, 5, 4, 2, 6])
TRIPLETS = torch.arange(4), torch.arange(4), torch.arange(4).roll(1)


def images(seed=1, rows=8, shape=(1, 6, 6)):
    """Pixels that are whole 256ths, so that coarse types hold them exactly, away from 0 and 1."""
    found = torch.rand(rows, *shape, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.15
    return (found * 256).round() / 256


def net(size=36, width=16, out=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.Tanh(), nn.Linear(width, out))


@dataclass
class Loop:
    """One loop.

    Attributes:
        holds: all that has parameters or buffers.
        step: ``(loss, ..., miner) -> value``, one pass up to the value that goes backward.
        model: what is named to the loss; None: ``holds``.
        x: the images that the embeddings are made of, where it is one for each, in their order.
        losses: they make the plain losses.
        miner: makes a plain miner, or None.
        kept: the objects that the user's hooks and modules keep.
    """

    holds: nn.Module
    step: Callable[..., torch.Tensor]
    model: Any = None
    x: torch.Tensor | None = None
    losses: tuple[Callable[[], nn.Module], ...] = (losses.MultiSimilarityLoss,)
    miner: Callable[[], nn.Module] | None = None
    kept: Callable[[], list[Any]] = list


@dataclass
class Shape:
    """How to build a loop, and what is expected of it.

    Attributes:
        build: makes the loop.
        second_pass: copies pass the model in its own mode, as in a second training pass. So BatchNorm's statistics move
            twice, and dropout and the like draw again.
        varies: whether two passes of the model differ, as with dropout.
        wraps_miner: whether the miner is made adversarial as well.
        only_named: whether the loss has to be given a model.
        compiles: whether torch compiles parts of it.
        slow: whether it takes seconds.
        single: whether it needs a process group of one.
        in_order: whether one batch of images gives the embeddings, one each, in their order.
        options: of the loss.
    """

    build: Callable[[], Loop]
    second_pass: bool = False
    varies: bool = False
    wraps_miner: bool = False
    only_named: bool = False
    compiles: bool = False
    slow: bool = False
    single: bool = False
    in_order: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Refused:
    """How to build a loop that cannot be made adversarial, and words of the error that says so."""

    build: Callable[[], Loop]
    error: type[Exception]
    words: str


SHAPES: dict[str, Shape] = {}
REFUSED: dict[str, Refused] = {}


def shape(**expected):
    def add(build):
        SHAPES[build.__name__] = Shape(build, **expected)
        return build

    return add


def refused(error, words):
    def add(build):
        REFUSED[build.__name__] = Refused(build, error, words)
        return build

    return add


def tail(name, change, make=net):
    """A shape with something done to the embeddings between model and loss."""

    def build():
        model, x = make(), images()
        return Loop(model, lambda loss: loss(change(model(x)), LABELS), x=x)

    build.__name__ = name
    return shape(in_order=True)(build)


def quietly(function, *args):
    """Without the warnings that torch gives of what is old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


# What is done to the embeddings


def _setitem(e):
    bank = torch.zeros(8, 8)
    bank[:] = e
    return bank


def _setitem_by_rows(e):
    bank = torch.zeros(8, 8)
    for row in range(8):
        bank[row] = e[row]
    return bank


def _divided_in_place(e):
    length = e.norm(dim=1, keepdim=True)
    e = e * 2
    e /= length
    return e


tail("plain", lambda e: e)
tail("normalize", functional.normalize)
tail("normalize_by_keyword", lambda e: functional.normalize(input=e, p=2, dim=1))
tail("division_by_the_norm", lambda e: e / e.norm(dim=1, keepdim=True))
tail("division_in_place_of_a_result", _divided_in_place)
tail("mul_in_place_of_a_result", lambda e: (e - 0.1).mul_(2))
tail("relu_in_place_of_a_result", lambda e: functional.relu(e + 0.5, inplace=True))
tail("setitem_into_a_buffer", _setitem)
tail("setitem_row_by_row", _setitem_by_rows)
tail("split_and_cat", lambda e: torch.cat(e.split([3, 5])))
tail("chunks_by_columns", lambda e: torch.cat([functional.normalize(c) for c in e.chunk(2, dim=1)], dim=1))
tail("unbind_and_stack", lambda e: torch.stack(e.unbind()))
tail("layer_norm_in_the_loop", lambda e: functional.layer_norm(e, e.shape[1:]))
tail("einsum_with_constants", lambda e: torch.einsum("nd,dk->nk", e, torch.linspace(-1, 1, 64).reshape(8, 8)))
tail("matmul_operator", lambda e: e @ torch.linspace(-1, 1, 64).reshape(8, 8))
tail("reshape_through_three_dimensions", lambda e: functional.normalize(e.view(8, 2, 4), dim=-1).flatten(1))
tail("squeeze_of_a_map", lambda e: e[:, :, None, None].mean((2, 3)))
tail("to_float", lambda e: e.to(torch.float32).float())
tail("to_double", lambda e: e.double())
tail("leaky_relu_and_clamp", lambda e: functional.leaky_relu(e, 0.1).clamp(-5, 5))
tail("scaled_by_a_temperature", lambda e: functional.normalize(e) / 0.5)
tail("numbers_on_the_left", lambda e: 2 * e - 1 + (1 - e) ** 3)


# What the model returns

Named = namedtuple("Named", ["score", "features"])


@dataclass
class Output:
    embeddings: torch.Tensor
    logits: torch.Tensor | None = None


@dataclass(frozen=True)
class FrozenOutput:
    pooled: torch.Tensor
    hidden: tuple


class Returns(nn.Module):
    """A model that packs its embeddings."""

    def __init__(self, pack):
        super().__init__()
        self.body, self.head, self.pack = net(), nn.Linear(8, 3), pack

    def forward(self, pixel_values, **others):
        e = self.body(pixel_values)
        return self.pack(self.head(e), e)


def returns(name, pack, unpack, call=lambda model, x: model(x)):
    def build():
        model, x = Returns(pack), images()
        return Loop(model, lambda loss: loss(functional.normalize(unpack(call(model, x))), LABELS), x=x)

    build.__name__ = name
    return shape(in_order=True)(build)


returns("tuple_output", lambda s, e: (s, e), lambda out: out[1])
returns("tuple_output_with_none", lambda s, e: (None, e, 3), lambda out: out[1])
returns("list_output", lambda s, e: [e, s], lambda out: out[0])
returns("dict_output", lambda s, e: {"score": s, "feat": e}, lambda out: out["feat"])
returns("ordered_dict_output", lambda s, e: OrderedDict(s=s, e=e), lambda out: out["e"])
returns("namedtuple_output", Named, lambda out: out.features)
returns("dataclass_output", lambda s, e: Output(e, s), lambda out: out.embeddings)
returns("dataclass_output_with_none", lambda s, e: Output(e), lambda out: out.embeddings)
returns("frozen_dataclass_output", lambda s, e: FrozenOutput(e, (s,)), lambda out: out.pooled)
returns("nested_output", lambda s, e: {"a": [(s, {"b": e})], "n": 1}, lambda out: out["a"][0][1]["b"])
returns(
    "keyword_argument", lambda s, e: {"pooled": e}, lambda out: out["pooled"], lambda model, x: model(pixel_values=x)
)
returns(
    "flags_by_keyword",
    lambda s, e: Output(e, s),
    lambda out: out.embeddings,
    lambda model, x: model(pixel_values=x, return_dict=True, name="a", mask=None),
)
returns("token_of_a_sequence", lambda s, e: e[:, None].expand(-1, 3, -1), lambda out: out[:, 0])
returns("mean_over_tokens", lambda s, e: torch.stack([e, e.tanh()], 1), lambda out: out.mean(1))
returns("two_outputs_added", lambda s, e: (e.tanh(), e.sin()), lambda out: out[0] + out[1])
returns("two_outputs_side_by_side", lambda s, e: (s, e), lambda out: torch.cat(out, dim=1))


# What the model takes


class Clip(nn.Module):
    """An image tower and a text tower, called by methods of their own."""

    def __init__(self):
        super().__init__()
        self.visual, self.text = net(), nn.Linear(12, 8)
        self.projection = nn.Parameter(torch.randn(8, 8) / 3)

    def encode_image(self, x):
        return self.visual(x) @ self.projection

    def encode_text(self, features):
        return self.text(features)


@shape(in_order=True)
def encode_image():
    model, x = Clip(), images()
    return Loop(model, lambda loss: loss(functional.normalize(model.encode_image(x), dim=-1), LABELS), x=x)


@shape(options={"perturb": "anchor"})
def image_and_text_towers():
    model, x, text = Clip(), images(), torch.rand(8, 12) * 0.7 + 0.1

    def step(loss):
        return loss(model.encode_image(x), LABELS, ref_emb=model.encode_text(text), ref_labels=LABELS)

    return Loop(model, step)


@shape()
def image_and_text_towers_all_perturbed():
    model, x, text = Clip(), images(), torch.rand(8, 12) * 0.7 + 0.1

    def step(loss):
        return loss(torch.cat([model.encode_image(x), model.encode_text(text)]), LABELS.repeat(2))

    return Loop(model, step)


class WithMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x, mask):
        return self.body(x * mask)


@shape()
def image_and_mask():
    model, x, mask = WithMask(), images(), (images(2) > 0.4).float()
    return Loop(model, lambda loss: loss(model(x, mask), LABELS))


@shape()
def image_and_boolean_mask_by_keyword():
    model, x, mask = WithMask(), images(), images(2) > 0.4
    return Loop(model, lambda loss: loss(functional.normalize(model(x, mask=mask)), LABELS))


@shape()
def image_and_mask_of_permuted_rows():
    model, x, mask = WithMask(), images(), (images(2) > 0.4).float()
    return Loop(model, lambda loss: loss(functional.normalize(model(x, mask))[SHUFFLED], LABELS[SHUFFLED]))


@shape(options={"perturb": "positive"})
def image_and_mask_of_some_rows():
    model, x, mask = WithMask(), images(), (images(2) > 0.4).float()
    triplets = torch.tensor([0, 2, 4]), torch.tensor([7, 3, 1]), torch.tensor([5, 6, 0])
    step = lambda loss: loss(model(x, mask=mask), indices_tuple=triplets)  # noqa: E731
    return Loop(model, step, losses=(partial(losses.TripletMarginLoss, margin=2.0),))


class WithFlag(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x, scale, mode="a"):
        return self.body(x) * scale if mode == "b" else self.body(x)


@shape(in_order=True)
def arguments_that_are_no_tensors():
    model, x = WithFlag(), images()
    return Loop(model, lambda loss: loss(model(x, 3, mode="b"), LABELS), x=x)


class TakesNested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, batch):
        return self.body(batch["image"] if isinstance(batch, dict) else batch[0])


@shape(in_order=True)
def dict_of_tensors():
    model, x = TakesNested(), images()
    return Loop(model, lambda loss: loss(model({"image": x, "label": LABELS, "name": "a"}), LABELS), x=x)


@shape(in_order=True)
def list_of_tensors():
    model, x = TakesNested(), images()
    return Loop(model, lambda loss: loss(functional.normalize(model([x, LABELS])), LABELS), x=x)


@shape(in_order=True)
def channels_last():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 8))
    model = model.to(memory_format=torch.channels_last)
    x = images(shape=(3, 6, 6)).to(memory_format=torch.channels_last)
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape()
def preprocessing_before_the_model():
    model, x = net(), images()
    return Loop(model, lambda loss: loss(model(x.flip(-1) * 0.5 + 0.25), LABELS))


@shape(in_order=True)
def inputs_that_need_gradient():
    model, x = net(), images().requires_grad_()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


# Several modules


@shape(in_order=True)
def trunk_and_embedder():
    trunk, embedder, x = nn.Sequential(nn.Flatten(), nn.Linear(36, 16)), nn.Linear(16, 8), images()
    both = nn.ModuleList([trunk, embedder])
    return Loop(both, lambda loss: loss(embedder(trunk(x)), LABELS), x=x)


@shape(in_order=True)
def trunk_and_embedder_as_a_dict():
    trunk, embedder, x = nn.Sequential(nn.Flatten(), nn.Linear(36, 16)), nn.Linear(16, 8), images()
    both = nn.ModuleDict({"trunk": trunk, "embedder": embedder})
    return Loop(both, lambda loss: loss(functional.normalize(embedder(torch.tanh(trunk(x)))), LABELS), x=x)


@shape(in_order=True)
def frozen_trunk_inside_a_model():
    model, x = nn.Sequential(net(out=16).requires_grad_(False), nn.Linear(16, 8)), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(in_order=True)
def head_outside_of_the_named_model():
    model, head, x = net(), nn.Linear(8, 8), images()
    return Loop(nn.ModuleList([model, head]), lambda loss: loss(head(model(x)), LABELS), x=x, model=model)


@shape(in_order=True)
def sliced_sequential():
    model, x = nn.Sequential(*net(), nn.Linear(8, 3)), images()
    return Loop(model, lambda loss: loss(functional.normalize(model[:-1](x)), LABELS), x=x)


@shape(in_order=True)
def slice_by_slice():
    model, x = net(), images()
    return Loop(model, lambda loss: loss(model[2:](model[:2](x)), LABELS), x=x)


@shape(in_order=True)
def module_list_in_a_plain_function():
    layers, x = nn.ModuleList([nn.Linear(36, 16), nn.Linear(16, 16), nn.Linear(16, 8)]), images()

    def embed(found):
        found = layers[0](found.flatten(1))
        for layer in layers[1:]:
            found = layer(functional.relu(found))
        return functional.normalize(found)

    return Loop(layers, lambda loss: loss(embed(x), LABELS), x=x)


@shape(in_order=True)
def residual_in_a_plain_function():
    stem, block, x = nn.Sequential(nn.Flatten(), nn.Linear(36, 8)), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), images()

    def embed(found):
        found = stem(found)
        return found + block(found)

    return Loop(nn.ModuleList([stem, block]), lambda loss: loss(embed(x), LABELS), x=x)


@shape(in_order=True)
def parameters_between_modules():
    first, last, x = nn.Sequential(nn.Flatten(), nn.Linear(36, 16)), nn.Linear(8, 8), images()
    weights = nn.ParameterList([torch.randn(8, 16) / 4, torch.zeros(8)])

    def embed(found):
        return last(torch.tanh(functional.linear(first(found), weights[0], weights[1])))

    return Loop(nn.ModuleList([first, last, weights]), lambda loss: loss(embed(x), LABELS), x=x)


@shape(in_order=True)
def projection_matrix_after_the_model():
    model, projection, x = net(), nn.ParameterList([torch.randn(8, 8) / 3]), images()
    return Loop(
        nn.ModuleList([model, projection]), lambda loss: loss(model(x) @ projection[0], LABELS), x=x, model=model
    )


@shape()
def learned_temperature():
    model, scale, x = net(), nn.ParameterList([torch.zeros(())]), images()
    step = lambda loss: loss(functional.normalize(model(x)) * scale[0].exp(), LABELS)  # noqa: E731
    return Loop(nn.ModuleList([model, scale]), step, losses=(losses.ContrastiveLoss,))


@shape()
def ensemble_of_two_models():
    one, other, x = net(), net(), images()
    step = lambda loss: loss((functional.normalize(one(x)) + functional.normalize(other(x))) / 2, LABELS)  # noqa: E731
    return Loop(nn.ModuleList([one, other]), step)


@shape()
def concatenated_features_of_two_models():
    one, other, x = net(), net(), images()
    step = lambda loss: loss(torch.cat([one(x), other(x)], dim=1), LABELS)  # noqa: E731
    return Loop(nn.ModuleList([one, other]), step)


# Several calls


@shape()
def siamese():
    model, left, right = net(), images(), images(2)

    def step(loss):
        return loss(functional.normalize(torch.cat([model(left), model(right)])), LABELS.repeat(2))

    return Loop(model, step)


@shape()
def simclr_chunks():
    model, views = net(), torch.cat([images(), images(2)])

    def step(loss):
        one, other = functional.normalize(model(views)).chunk(2)
        return loss(one, other)

    return Loop(model, step, losses=(lambda: losses.SelfSupervisedLoss(losses.NTXentLoss(0.5)),))


@shape()
def simclr_two_calls():
    model, one, other = net(), images(), images(2)
    make = lambda: losses.SelfSupervisedLoss(losses.NTXentLoss(0.5))  # noqa: E731
    return Loop(model, lambda loss: loss(model(one), model(other)), losses=(make,))


@shape()
def triplet_net():
    model, anchor, positive, negative = net(), images(1, 4), images(2, 4), images(3, 4)

    def step(loss):
        embeddings = torch.cat([model(anchor), model(positive), model(negative)])
        a, p, n = TRIPLETS
        return loss(embeddings, indices_tuple=(a, 4 + p, 8 + n))

    return Loop(model, step, losses=(partial(losses.TripletMarginLoss, margin=2.0),))


@shape()
def query_and_gallery_of_one_model():
    model, x, gallery = net(), images(), images(2)
    step = lambda loss: loss(model(x), LABELS, ref_emb=model(gallery), ref_labels=LABELS)  # noqa: E731
    return Loop(model, step)


@shape()
def query_and_gallery_of_two_models():
    query, gallery, x, others = net(), net(), images(), images(2)

    def step(loss):
        e, ref = functional.normalize(query(x)), functional.normalize(gallery(others))
        return loss(e, LABELS, ref_emb=ref, ref_labels=LABELS)

    return Loop(nn.ModuleList([query, gallery]), step)


@shape()
def two_towers():
    left, right, x, others = net(), net(width=5), images(), images(2)
    step = lambda loss: loss(torch.cat([left(x), right(others)]), LABELS.repeat(2))  # noqa: E731
    return Loop(nn.ModuleList([left, right]), step)


@shape()
def image_and_feature_towers():
    left, right, x, features = net(), nn.Linear(12, 8), images(), torch.rand(8, 12) * 0.7 + 0.1
    step = lambda loss: loss(torch.cat([left(x), right(features)]), LABELS.repeat(2))  # noqa: E731
    return Loop(nn.ModuleList([left, right]), step)


@shape()
def sample_by_sample():
    model, x = net(), images()
    step = lambda loss: loss(torch.stack([model(one[None])[0] for one in x]), LABELS)  # noqa: E731
    return Loop(model, step)


@shape()
def views_stacked_and_flattened():
    model, one, other = net(), images(), images(2)

    def step(loss):
        return loss(torch.stack([model(one), model(other)], 1).flatten(0, 1), LABELS.repeat_interleave(2))

    return Loop(model, step)


@shape()
def micro_batches_collected_in_a_list():
    model, x = net(), images()

    def step(loss):
        found = []
        for part in x.split(3):
            found.append(functional.normalize(model(part)))  # noqa: PERF401  # as people write it
        return loss(torch.cat(found), LABELS)

    return Loop(model, step)


@shape()
def gradient_accumulation():
    model, x = net(), images()
    step = lambda loss: sum(loss(model(part), LABELS[:4]) / 2 for part in x.split(4))  # noqa: E731
    return Loop(model, step)


class ChangesItsBatch(nn.Module):
    """Takes the image out of the batch that it was given, or puts another one in its place."""

    def __init__(self, change):
        super().__init__()
        self.body, self.change = net(), change

    def forward(self, batch):
        return self.change(self.body, batch)


def _taken_out(body, batch):
    return {"embeddings": body(batch.pop("image")), **batch}["embeddings"]


def _normalised(body, batch):
    batch["image"] = batch["image"] * 2 - 1
    return body(batch["image"])


def _embedded(body, batch):
    batch["image"] = body(batch["image"])
    return batch["image"]


def _first_of_a_list(body, batch):
    return body(batch.pop(0)) + batch.pop()[0]


def changed_batch(name, change, pack=lambda x: {"image": x, "label": LABELS}, call=lambda model, batch: model(batch)):
    def build():
        model, x = ChangesItsBatch(change), images()
        return Loop(model, lambda loss: loss(call(model, pack(x)), LABELS), x=x)

    build.__name__ = f"batch_{name}"
    return shape(in_order=True)(build)


changed_batch("whose_image_is_taken_out", _taken_out)
changed_batch("whose_image_is_normalised", _normalised)
changed_batch("that_holds_the_embeddings_after", _embedded)
changed_batch("that_is_a_list_and_gets_shorter", _first_of_a_list, lambda x: [x, [0.5]])
changed_batch("by_keyword", _taken_out, call=lambda model, batch: model(batch=batch))


# Which rows


@shape()
def rows_of_a_mask():
    model, x, mask = net(), images(), torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]).bool()
    return Loop(model, lambda loss: loss(model(x)[mask], torch.tensor([0, 0, 1, 1, 2, 2])))


@shape()
def rows_by_index():
    model, x, index = net(), images(), torch.tensor([0, 1, 5, 4])
    return Loop(model, lambda loss: loss(functional.normalize(model(x))[index], LABELS[index]))


@shape()
def rows_by_index_select():
    model, x, index = net(), images(), torch.tensor([7, 6, 1, 0])
    return Loop(model, lambda loss: loss(model(x).index_select(0, index), LABELS[index]))


@shape()
def permuted_rows():
    model, x = net(), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x))[SHUFFLED], LABELS[SHUFFLED]))


@shape()
def sorted_by_label():
    model, x, labels = net(), images(), LABELS[SHUFFLED]

    def step(loss):
        order = labels.argsort(stable=True)
        return loss(model(x)[order], labels[order])

    return Loop(model, step)


@shape()
def first_rows():
    model, x = net(), images()
    return Loop(model, lambda loss: loss(model(x)[:6], LABELS[:6]))


@shape()
def every_other_row_as_reference():
    model, x = net(), images()

    def step(loss):
        e = functional.normalize(model(x))
        return loss(e[::2], LABELS[::2], ref_emb=e[1::2], ref_labels=LABELS[1::2])

    return Loop(model, step)


# Several losses


@shape()
def matryoshka():
    model, x = net(), images()

    def step(*each):
        e = model(x)
        return sum(loss(e[:, :width], LABELS) for loss, width in zip(each, (2, 4, 8), strict=True))

    return Loop(model, step, losses=(losses.MultiSimilarityLoss,) * 3)


@shape()
def matryoshka_with_one_loss():
    model, x = net(), images()

    def step(loss):
        e = model(x)
        return sum(loss(functional.normalize(e[:, :width]), LABELS) for width in (4, 8))

    return Loop(model, step)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.one, self.other = net(out=16), nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, x):
        found = self.trunk(x)
        return self.one(found), self.other(found)


@shape()
def one_loss_for_each_head():
    model, x = Heads(), images()

    def step(loss, other_loss):
        one, other = model(x)
        return loss(one, LABELS) + other_loss(functional.normalize(other), LABELS)

    return Loop(model, step, losses=(losses.MultiSimilarityLoss, losses.NTXentLoss))


@shape()
def losses_in_another_order_than_the_models():
    one_model, other_model, x = net(), net(), images()

    def step(loss, other_loss):
        one, other = one_model(x), other_model(x)
        return other_loss(other, LABELS) + loss(one, LABELS)

    both = nn.ModuleList([one_model, other_model])
    return Loop(both, step, losses=(losses.MultiSimilarityLoss, losses.NTXentLoss))


@shape()
def one_loss_twice_a_step():
    model, x, other = net(), images(), images(2)
    return Loop(model, lambda loss: loss(model(x), LABELS) + loss(model(other), LABELS))


@shape()
def one_loss_twice_for_the_same_embeddings():
    model, x = net(), images()

    def step(loss):
        e = model(x)
        return loss(e, LABELS) + loss(e, LABELS % 2)

    return Loop(model, step)


@shape()
def a_plain_loss_beside_it():
    model, classifier, x = net(), nn.Linear(8, 4), images()

    def step(loss):
        e = model(x)
        return loss(e, LABELS) + functional.cross_entropy(classifier(e), LABELS)

    return Loop(nn.ModuleList([model, classifier]), step, model=model)


@shape()
def a_classifier_that_runs_before_the_loss():
    model, classifier, x = net(), nn.Linear(8, 4), images()

    def step(loss):
        e = functional.normalize(model(x))
        logits = classifier(e)
        return functional.cross_entropy(logits, LABELS) + loss(e, LABELS)

    return Loop(nn.ModuleList([model, classifier]), step)


@shape(in_order=True)
def proxies_of_the_loss():
    model, x = net(), images()
    return Loop(model, lambda loss: loss(model(x), LABELS), x=x, losses=(partial(losses.ProxyAnchorLoss, 4, 8),))


@shape()
def a_miner_beside_the_loss():
    model, x = net(), images()

    def step(loss, miner):
        e = functional.normalize(model(x))
        return loss(e, LABELS, miner(e, LABELS))

    return Loop(model, step, miner=partial(miners.MultiSimilarityMiner, epsilon=1.0))


@shape(wraps_miner=True)
def an_adversarial_miner_beside_the_loss():
    model, x = net(), images()

    def step(loss, miner):
        e = functional.normalize(model(x))
        return loss(e, LABELS, miner(e, LABELS))

    return Loop(model, step, miner=miners.BatchHardMiner, losses=(losses.TripletMarginLoss,))


@shape(in_order=True)
def cross_batch_memory():
    model, x = net(), images()
    make = lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), 8, memory_size=32)  # noqa: E731
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x, losses=(make,))


@shape()
def cross_batch_memory_with_a_queue_of_keys():
    model, x, keys = net(), images(), images(2)
    teacher = copy.deepcopy(model).requires_grad_(False)

    def step(loss):
        with torch.no_grad():
            key = teacher(keys)
        mask = torch.arange(16) >= 8
        return loss(torch.cat([model(x), key]), LABELS.repeat(2), enqueue_mask=mask)

    make = lambda: losses.CrossBatchMemory(losses.NTXentLoss(), 8, memory_size=32)  # noqa: E731
    return Loop(model, step, losses=(make,))


# What is done to the model


@shape(options={"perturb": "anchor"})
def ema_teacher_as_reference():
    model, x = net(), images()
    teacher = copy.deepcopy(model).requires_grad_(False)

    def step(loss):
        with torch.no_grad():
            key = functional.normalize(teacher(x))
        return loss(functional.normalize(model(x)), LABELS, ref_emb=key, ref_labels=LABELS)

    return Loop(model, step)


@shape(in_order=True)
def averaged_model():
    model, x = torch.optim.swa_utils.AveragedModel(net()), images()
    return Loop(model, lambda loss: loss(model(x), LABELS), x=x)


@shape()
def averaged_model_beside_it():
    model, x = net(), images()
    average = torch.optim.swa_utils.AveragedModel(model)

    def step(loss):
        value = loss(functional.normalize(model(x)), LABELS)
        average.update_parameters(model)
        return value

    return Loop(model, step)


@shape()
def functional_call_with_adapted_weights():
    model, x = net(), images()

    def step(loss):
        weights = dict(model.named_parameters())
        inner = functional_call(model, weights, (x,)).pow(2).mean()
        gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        adapted = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
        return loss(functional.normalize(functional_call(model, adapted, (x,))), LABELS)

    return Loop(model, step)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.body, self.head, self.use_reentrant = net(), nn.Linear(8, 8), use_reentrant

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=self.use_reentrant))


@shape(in_order=True)
def checkpointing():
    model, x = Checkpointed(use_reentrant=False), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape()
def checkpointing_in_the_loop():
    model, head, x = net(), nn.Linear(8, 8), images()
    step = lambda loss: loss(head(checkpoint(model, x, use_reentrant=False)), LABELS)  # noqa: E731
    return Loop(nn.ModuleList([model, head]), step)


class Packs(nn.Module):
    """Takes sequences in the order of their lengths, the longest first, as torch wants them by default."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(self.rnn(packed)[1][0][-1])


@shape()
def sequences_in_the_order_of_their_lengths():
    model, x, lengths = Packs(), images(shape=(6, 6)), torch.tensor([6, 6, 5, 4, 4, 3, 2, 1])
    return Loop(model, lambda loss: loss(model(x, lengths), LABELS))


@shape(options={"perturb": "positive"})
def some_sequences_in_the_order_of_their_lengths():
    model, x, lengths = Packs(), images(shape=(6, 6)), torch.tensor([6, 6, 5, 4, 4, 3, 2, 1])
    order = torch.tensor([5, 1, 2, 6]), torch.tensor([4, 0, 3, 7]), torch.tensor([0, 6, 7, 1])
    return Loop(model, lambda loss: loss(model(x, lengths), LABELS, order), losses=(losses.TripletMarginLoss,))


@shape()
def numbers_of_rows_as_a_range():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.table = net(), nn.Embedding(20, 8)

        def forward(self, x, numbers):
            return self.net(x) + self.table(torch.tensor(list(numbers)))

    model, x = Looks(), images()
    return Loop(model, lambda loss: loss(model(x, range(5, 13)), LABELS))


@shape()
def rotated_as_complex_numbers():
    model, angles, x = net(), torch.rand(8, 4) * 6, images()

    def step(loss):
        turned = torch.view_as_complex(model(x).reshape(8, 4, 2)) * torch.polar(torch.ones(8, 4), angles)
        return loss(torch.view_as_real(turned).flatten(1), LABELS)

    return Loop(model, step)


@shape()
def circular_convolution_with_features():
    model, other, x = net(), torch.randn(8), images()

    def step(loss):
        return loss(torch.fft.irfft(torch.fft.rfft(model(x)) * torch.fft.rfft(other), n=8), LABELS)

    return Loop(model, step)


@shape(in_order=True)
def fake_quantisation_with_ranges_that_are_found():
    quantised = torch.ao.quantization.FakeQuantize(quant_min=0, quant_max=255)
    model, x = nn.Sequential(*net(), quantised), images()
    model(torch.cat([x, images(2)]))
    quantised.disable_observer()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


def conv_net(*after):
    return nn.Sequential(nn.Conv2d(1, 4, 3), *after, nn.Tanh(), nn.Flatten(), nn.Linear(64, 8))


@shape(second_pass=True, in_order=True)
def batchnorm_in_train_mode():
    model, x = conv_net(nn.BatchNorm2d(4)), images()
    return Loop(model, lambda loss: loss(model(x), LABELS), x=x)


@shape(second_pass=True)
def batchnorm_in_train_mode_and_a_tail():
    model, x = conv_net(nn.BatchNorm2d(4)), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x))[SHUFFLED], LABELS[SHUFFLED]))


@shape(second_pass=True)
def batchnorm_in_train_mode_and_two_calls():
    model, x, other = conv_net(nn.BatchNorm2d(4)), images(), images(2)
    return Loop(model, lambda loss: loss(torch.cat([model(x), model(other)]), LABELS.repeat(2)))


@shape(in_order=True)
def batchnorm_in_eval_mode():
    model, x = conv_net(nn.BatchNorm2d(4)), images()
    model(images(2))
    model[1].eval()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(second_pass=True, in_order=True)
def batchnorm_neck_between_trunk_and_loss():
    model, neck, x = net(), nn.BatchNorm1d(8), images()
    return Loop(nn.ModuleList([model, neck]), lambda loss: loss(neck(model(x)), LABELS), x=x)


@shape(in_order=True)
def other_normalising_layers():
    model, x = conv_net(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)), images()
    return Loop(model, lambda loss: loss(model(x), LABELS), x=x)


@shape(second_pass=True, varies=True, in_order=True)
def dropout():
    model, x = nn.Sequential(*net()[:3], nn.Dropout(0.05), net()[3]), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(second_pass=True, varies=True)
def dropout_and_two_calls():
    model, one, other = nn.Sequential(*net()[:3], nn.Dropout(0.05), net()[3]), images(), images(2)
    make = lambda: losses.SelfSupervisedLoss(losses.NTXentLoss(0.5))  # noqa: E731
    return Loop(model, lambda loss: loss(model(one), model(other)), losses=(make,))


class Flipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return -x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class WithOwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return Flipped.apply(self.body(x))


@shape(in_order=True)
def own_autograd_function_inside_a_module():
    model, x = WithOwnFunction(), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(in_order=True)
def weight_norm():
    model, x = net(), images()
    parametrizations.weight_norm(model[1])
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(second_pass=True, varies=True, in_order=True)
def spectral_norm():
    model, x = net(), images()
    parametrizations.spectral_norm(model[1])
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(in_order=True)
def tied_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[5].weight, x = model[3].weight, images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(in_order=True)
def frozen_bottom_layer():
    model, x = net(), images()
    model[1].requires_grad_(False)
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(in_order=True)
def recurrent():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(6, 8, batch_first=True)

        def forward(self, x):
            return self.rnn(x.squeeze(1))

    model, x = Rows(), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)[0][:, -1]), LABELS), x=x)


@shape(in_order=True)
def attention():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)

        def forward(self, x):
            return self.layer(x.squeeze(1))

    model, x = Tokens(), images()
    return Loop(model, lambda loss: loss(model(x).flatten(1), LABELS), x=x)


@shape()
def whole_loop_under_autocast():
    model, x = net(), images()

    def step(loss):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(functional.normalize(model(x)), LABELS)

    return Loop(model, step)


@shape()
def float_after_autocast():
    model, x = net(), images()

    def step(loss):
        with torch.autocast("cpu", torch.bfloat16):
            e = model(x)
        return loss(functional.normalize(e.float()), LABELS)

    return Loop(model, step)


@shape(in_order=True)
def double_precision():
    model, x = net().double(), images().double()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(in_order=True)
def data_parallel_on_the_cpu():
    model, x = DataParallel(net()), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(single=True, in_order=True)
def distributed_data_parallel():
    model, x = DistributedDataParallel(net()), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(compiles=True, in_order=True)
def compiled():
    torch._dynamo.reset()
    model, x = torch.compile(net(), backend="eager"), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(compiles=True, slow=True, in_order=True, only_named=True)
def compiled_in_place():
    torch._dynamo.reset()
    model, x = net(), images()
    model.compile(backend="eager")
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(compiles=True, in_order=True)
def compiled_part():
    torch._dynamo.reset()
    body, x = net(), images()
    model = nn.Sequential(torch.compile(body, backend="eager"), nn.Linear(8, 8))
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


@shape(compiles=True, in_order=True)
def compiled_function_after_the_model():
    torch._dynamo.reset()
    model, x = net(), images()
    pool = torch.compile(lambda e: functional.normalize(e), backend="eager")
    return Loop(model, lambda loss: loss(pool(model(x)), LABELS), x=x)


# What hooks and modules keep


class KeepsFeatures(nn.Module):
    """A model that leaves things on itself."""

    def __init__(self):
        super().__init__()
        self.body, self.features, self.history, self.calls = net(), None, [], {}

    def forward(self, x):
        e = self.body(x)
        self.features = e
        self.history.append(e.detach())
        self.calls[len(self.calls)] = len(x)
        self.aux_loss = e.pow(2).mean()
        return e


@shape()
def model_that_keeps_features():
    model, x = KeepsFeatures(), images()

    def step(loss):
        e = functional.normalize(model(x))
        return loss(e, LABELS) + 0.1 * model.aux_loss

    kept = lambda: [model.features, model.aux_loss, *model.history, *model.calls]  # noqa: E731
    return Loop(model, step, kept=kept)


@shape(in_order=True)
def hooks_that_keep_features():
    model, x, found, number = net(), images(), {}, itertools.count()
    listed = []

    def keep(module, args, output):
        found["layer"] = output
        listed.append(output)
        next(number)

    model[1].register_forward_hook(keep)
    model[3].register_forward_pre_hook(lambda module, args: found.update(given=args[0]))
    kept = lambda: [*found.values(), *listed]  # noqa: E731
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x, kept=kept)


@shape()
def embeddings_taken_from_a_hook():
    model, x, found = net(), images(), {}
    model.register_forward_hook(lambda module, args, output: found.update(e=output))

    def step(loss):
        model(x)
        return loss(functional.normalize(found["e"]), LABELS)

    return Loop(model, step, kept=lambda: [*found.values()])


@shape(in_order=True)
def hook_that_changes_the_output():
    model, x = net(), images()
    model.register_forward_hook(lambda module, args, output: functional.normalize(output))
    return Loop(model, lambda loss: loss(model(x), LABELS), x=x)


@shape()
def gradient_hooks():
    model, x = net(), images()
    model[3].weight.register_hook(lambda gradient: gradient * 2)
    model[3].register_full_backward_hook(lambda module, given, out: None)

    def step(loss):
        e = functional.normalize(model(x))
        e.register_hook(lambda gradient: gradient.clamp(-10, 10))
        return loss(e, LABELS)

    return Loop(model, step)


# Stems, switches, hooks, what is detached


class TwoStems(nn.Module):
    """Takes photographs or infrared images, each through a stem of its own."""

    def __init__(self):
        super().__init__()
        self.photographs, self.infrared, self.shared = net(), net(), nn.Linear(8, 8)

    def forward(self, photographs=None, infrared=None):
        return self.shared(self.photographs(photographs) if infrared is None else self.infrared(infrared))


@shape(in_order=True)
def second_stem_by_keyword():
    model, x = TwoStems(), images()
    return Loop(model, lambda loss: loss(model(infrared=x), LABELS), x=x)


@shape()
def both_stems_in_one_batch():
    model, x, others = TwoStems(), images(), images(2)
    step = lambda loss: loss(torch.cat([model(x), model(infrared=others)]), LABELS.repeat(2))  # noqa: E731
    return Loop(model, step)


@shape()
def stem_of_each_row():
    model, x = TwoStems(), images()
    takes = ("photographs", "infrared")
    embed = lambda: torch.cat([model(**{takes[row % 2]: x[row : row + 1]}) for row in range(8)])  # noqa: E731
    return Loop(model, lambda loss: loss(embed(), LABELS))


@shape(in_order=True)
def functional_call_with_weights_and_statistics_of_their_own():
    model, x = nn.Sequential(*net()[:2], nn.BatchNorm1d(16), *net()[2:]).eval(), images()
    fast = nn.ParameterDict({name.replace(".", "_"): p.detach() * 1.5 for name, p in model.named_parameters()})
    statistics = {"2.running_mean": torch.rand(16), "2.running_var": torch.rand(16) + 0.5}

    def step(loss):
        given = {name: 1.0 * fast[name.replace(".", "_")] for name, _ in model.named_parameters()} | statistics
        return loss(functional.normalize(functional_call(model, given, (x,))), LABELS)

    return Loop(nn.ModuleList([model, fast]), step, x=x)


class Adapted(nn.Module):
    """A layer with an adapter of low rank, which can be switched off."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up, self.is_on = nn.Linear(36, 8), nn.Linear(36, 2), nn.Linear(2, 8), True

    def forward(self, x):
        x = x.flatten(1)
        return self.base(x) + self.up(self.down(x)) if self.is_on else self.base(x)


@shape(in_order=True)
def adapter_that_is_switched_off():
    model, x = nn.Sequential(Adapted(), nn.Tanh()), images()
    model[0].is_on = False
    return Loop(model, lambda loss: loss(model(x), LABELS), x=x)


@shape(in_order=True)
def hook_that_puts_the_output_into_a_dict():
    model, x = net(), images()
    model.register_forward_hook(lambda module, args, output: {"embedding": output})
    return Loop(model, lambda loss: loss(model(x)["embedding"], LABELS), x=x)


@shape(in_order=True)
def hook_with_keywords_that_changes_the_input():
    model, x = net(), images()
    model.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] - 0.5,), kwargs), with_kwargs=True)
    return Loop(model, lambda loss: loss(model(x), LABELS), x=x)


@shape(in_order=True)
def hook_with_keywords_that_changes_a_keyword():
    model, x = Returns(lambda s, e: e), images()

    def scaled(module, args, kwargs):
        return args, {"pixel_values": kwargs["pixel_values"] - 0.5}

    model.register_forward_pre_hook(scaled, with_kwargs=True)
    return Loop(model, lambda loss: loss(model(pixel_values=x), LABELS), x=x)


@shape()
def rows_that_are_detached_in_part():
    model, x = net(), images()

    def step(loss):
        e = model(x)
        return loss(torch.cat([e[:4], e[4:].detach()]), LABELS)

    return Loop(model, step)


@shape(in_order=True)
def part_that_is_frozen_before_the_loss():
    model, x = net(), images()

    def step(loss):
        e = model.requires_grad_(True)(x)
        model[1].requires_grad_(False)
        return loss(e, LABELS)

    return Loop(model, step, x=x)


@shape()
def embeddings_that_go_into_one_loss_twice():
    model, x = net(), images()

    def step(loss):
        e = model(x)
        return loss(e, LABELS) + 0.5 * loss(e, LABELS.flip(0))

    return Loop(model, step)


@shape(in_order=True)
def embeddings_that_keep_their_gradient():
    model, x = net(), images()

    def step(loss):
        e = model(x)
        e.retain_grad()
        return loss(e, LABELS)

    return Loop(model, step, x=x)


@shape()
def embeddings_written_into_a_buffer():
    model, x = net(), images()
    return Loop(model, lambda loss: loss(torch.empty(8, 8).copy_(model(x)), LABELS))


@shape()
def sorted_by_what_was_detached():
    model, x = net(), images()

    def step(loss):
        e = model(x)
        order = e.detach()[:, 0].argsort()
        return loss(e[order], LABELS[order])

    return Loop(model, step)


tail("less_the_detached_mean", lambda e: functional.normalize(e) - functional.normalize(e).mean(0).detach() * 0.1)


@shape()
def divided_by_the_largest_number():
    model, x = net(), images()

    def step(loss):
        e = model(x)
        return loss(e / e.abs().max().item() + 0.2, LABELS)

    return Loop(model, step)


# The open door


@shape(only_named=True)
def open_door_with_a_function():
    model, x = net(), images()
    embed = lambda images: functional.normalize(model(images))  # noqa: E731
    return Loop(model, lambda loss: loss(embed(x), LABELS, inputs=x), model=embed)


@shape(only_named=True)
def open_door_with_a_module():
    model, x = net(), images()
    return Loop(model, lambda loss: loss(model(x), LABELS, inputs=x))


@shape(only_named=True)
def open_door_for_a_function_of_parameters_alone():
    weights, x = nn.ParameterList([torch.randn(36, 8) / 6]), images()
    embed = lambda images: torch.tanh(images.flatten(1) @ weights[0])  # noqa: E731
    return Loop(weights, lambda loss: loss(embed(x), LABELS, inputs=x), model=embed)


# Frozen parts, other modules, rows that stand twice


@shape()
def frozen_trunk():
    trunk, embedder, x = net(out=16).requires_grad_(False), nn.Linear(16, 8), images()
    return Loop(nn.ModuleList([trunk, embedder]), lambda loss: loss(embedder(trunk(x)), LABELS))


@shape()
def two_towers_of_one_class_with_the_same_input():
    left, right, x = net(), net(), images()
    step = lambda loss: loss(torch.cat([left(x), right(x)]), LABELS.repeat(2))  # noqa: E731
    return Loop(nn.ModuleList([left, right]), step)


@shape()
def rows_that_stand_twice():
    model, x, index = net(), images(), torch.tensor([0, 1, 2, 3, 0, 1])
    return Loop(model, lambda loss: loss(model(x)[index], LABELS[index]))


@shape()
def checkpointing_reentrant():
    model, x = Checkpointed(use_reentrant=True), images().requires_grad_()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS))


@shape(second_pass=True)
def fake_quantisation():
    observer = torch.ao.quantization.MovingAverageMinMaxObserver.with_args(quant_min=0, quant_max=255)
    quantised = torch.ao.quantization.FakeQuantize(observer=observer)
    model, x = nn.Sequential(*net(), quantised), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS))


@shape()
def scripted():
    model, x = quietly(torch.jit.script, net()), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS))


@shape()
def scripted_part():
    model, x = nn.Sequential(quietly(torch.jit.script, net()), nn.Linear(8, 8)), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS))


@shape()
def traced():
    model, x = quietly(torch.jit.trace, net(), images()), images()
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS))


@shape(in_order=True)
def frozen_trunk_with_features_in_0_to_1():
    trunk, embedder, x = (
        nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Sigmoid()).requires_grad_(False),
        nn.Linear(16, 8),
        images(),
    )
    with torch.no_grad():
        trunk[1].weight.mul_(4)  # so that images differ in their features
    return Loop(nn.ModuleList([trunk, embedder]), lambda loss: loss(embedder(trunk(x)), LABELS), x=x)


@shape(in_order=True)
def features_of_a_frozen_model_beside_it():
    model, frozen, x = net(), net().requires_grad_(False), images()
    step = lambda loss: loss(torch.cat([model(x), frozen(x)], dim=1), LABELS)  # noqa: E731
    return Loop(nn.ModuleList([model, frozen]), step, x=x)


@shape(in_order=True)
def inputs_that_a_second_module_takes_too():
    class Fuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(36, 8)

        def forward(self, e, x):
            return self.one(e) + self.other(x.flatten(1))

    model, fuse, x = net(), Fuses(), images()
    return Loop(nn.ModuleList([model, fuse]), lambda loss: loss(fuse(model(x), x), LABELS), x=x)


@shape()
def same_images_twice_through_dropout():
    model, x = nn.Sequential(*net()[:3], nn.Dropout(0.0), net()[3]), images()
    make = lambda: losses.SelfSupervisedLoss(losses.NTXentLoss(0.5))  # noqa: E731
    return Loop(model, lambda loss: loss(model(x), model(x)), losses=(make,))


@shape(in_order=True)
def pre_hook_that_changes_the_input():
    model, x = net(), images()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x)


tail("in_place_division_of_the_output", lambda e: e.div_(e.detach().norm(dim=1, keepdim=True)))
tail("mul_in_place", lambda e: e.mul_(1.5))
tail("where_and_clamp", lambda e: torch.where(e > 0, e, 0.1 * e).clamp(-5, 5))
tail("relu_by_a_mask", lambda e: e * (e > 0))
tail("straight_through", lambda e: e + (e.sign() - e).detach())
tail("division_by_the_detached_norm", lambda e: e / e.detach().norm(dim=1, keepdim=True) + 0.3)
tail("strongest_part", lambda e: e.view(8, 2, 4)[torch.arange(8), e.view(8, 2, 4).norm(dim=2).argmax(1)])


def _over_statistics_without_gradient(e):
    with torch.no_grad():
        norm, mean = e.norm(dim=1, keepdim=True), e.mean(0)
    return e / norm + 0.3 - 0.1 * mean


def _with_a_hook_on_the_gradient(e):
    e.register_hook(lambda gradient: 0.1 * gradient)
    normalised = functional.normalize(e)
    normalised.register_hook(lambda gradient: 5 * gradient).remove()
    return normalised


tail("statistics_under_no_grad", _over_statistics_without_gradient)
tail("hook_that_scales_the_gradient", _with_a_hook_on_the_gradient)


@shape()
def rows_picked_by_a_mask_of_the_embeddings():
    model, x = net(), images()

    def step(loss):
        e = model(x)
        norms = e.norm(dim=1)
        picked = norms > norms.sort().values[1]
        return loss(e[picked], LABELS[picked])

    return Loop(model, step)


@shape()
def rows_sorted_by_their_norm():
    model, x = net(), images()

    def step(loss):
        e = model(x)
        order = e.norm(dim=1).argsort()
        return loss(e[order], LABELS[order])

    return Loop(model, step)


# What is refused


def refused_tail(name, change, error, words):
    def build():
        model, x = net(), images()
        return Loop(model, lambda loss: loss(change(model, x), LABELS))

    build.__name__ = name
    refused(error, words)(build)


def _changed_through_a_view(model, x):
    e = model(x) * 1
    e[:, 0].mul_(2)
    return e


def _changed_mode(model, x):
    e = model(x)
    model.eval()
    return e


SEVERAL = CaptureError, "depends on several inputs"
MIXED = CaptureError, "depends on 8 inputs"
refused_tail("mean_of_two_crops", lambda model, x: (model(x) + model(x.flip(-1))) / 2, *SEVERAL)
refused_tail("embeddings_less_their_mean", lambda model, x: model(x) - model(x).mean(0), *MIXED)
refused_tail("batchnorm_as_a_function", lambda m, x: functional.batch_norm(m(x), None, None, training=True), *MIXED)
refused_tail("mixed_embeddings", lambda model, x: 0.7 * model(x) + 0.3 * model(x).flip(0), *SEVERAL)
refused_tail("similarities_within_the_batch", lambda model, x: model(x) @ model(x).T, *MIXED)
refused_tail("changed_in_place_through_a_view", _changed_through_a_view, CaptureError, "changed in place")
refused_tail("mode_changed_before_the_loss", _changed_mode, ReplayError, "mode")
refused_tail("detached_embeddings", lambda m, x: m(x).detach().requires_grad_(), CaptureError, "a leaf of autograd")
refused_tail("own_autograd_function_in_the_loop", lambda m, x: Flipped.apply(m(x)), CaptureError, "of autograd in")
refused_tail("pixels_up_to_255", lambda model, x: model(x * 255), InputError, "255")
refused_tail("embeddings_without_gradient", lambda model, x: model(x).detach(), InputError, "without gradient")


def _clone(module):
    """A module with weights of its own that can be adapted, as libraries for meta-learning make it."""
    clone = module.__new__(type(module))
    clone.__dict__ = vars(module).copy()
    clone._parameters = {name: None if p is None else p.clone() for name, p in module._parameters.items()}
    clone._modules = {name: _clone(inner) for name, inner in module._modules.items()}
    return clone


@refused(CaptureError, "model that was named did not")
def clone_of_the_model_that_was_named():
    model, x = net(), images()
    return Loop(model, lambda loss: loss(_clone(model)(x), LABELS))


@refused(CaptureError, "model that was named did not")
def model_that_is_another_since_the_loss_was_made():
    model, other, x = net(), net(), images()
    return Loop(nn.ModuleList([model, other]), lambda loss: loss(other(x), LABELS), model=model)


@refused(CaptureError, "no_grad")
def pooled_features_of_a_trunk_under_no_grad():
    trunk, head, x = nn.Conv2d(1, 4, 3), nn.Linear(4, 8), images()

    def step(loss):
        with torch.no_grad():
            features = trunk(x)
        return loss(head(features.mean((2, 3))), LABELS)

    return Loop(nn.ModuleList([trunk, head]), step)


@refused(ReplayError, "changed its mode")
def part_whose_mode_is_changed_before_the_loss():
    model, x = nn.Sequential(net(), nn.BatchNorm1d(8)), images()

    def step(loss):
        e = model(x)
        model[1].eval()
        return loss(e, LABELS)

    return Loop(model, step)


@refused(ReplayError, "differ")
def weights_that_are_swapped_for_the_forward_pass():
    model, x = net(), images()

    def step(loss):
        own = [p.data for p in model.parameters()]
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.3
        e = model(x)
        for parameter, before in zip(model.parameters(), own, strict=True):
            parameter.data = before
        return loss(e, LABELS)

    return Loop(model, step)


@refused(ReplayError, "differ")
def step_of_the_optimizer_before_the_loss():
    model, x = net(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)

    def step(loss):
        losses.ContrastiveLoss()(model(x), LABELS).backward()
        e = model(x)
        optimizer.step()
        return loss(e, LABELS)

    return Loop(model, step)


@refused(ReplayError, "differ")
def adapter_that_is_switched_off_for_the_forward_pass():
    model, x = nn.Sequential(Adapted(), nn.Tanh()), images()

    def step(loss):
        model[0].is_on = False
        e = model(x)
        model[0].is_on = True
        return loss(e, LABELS)

    return Loop(model, step)


@refused(ReplayError, "differ")
def hook_that_is_removed_before_the_loss():
    model, x = net(), images()

    def step(loss):
        handle = model[1].register_forward_hook(lambda module, args, output: output.sin() * 2)
        e = model(x)
        handle.remove()
        return loss(e, LABELS)

    return Loop(model, step)


@refused(CaptureError, "a leaf of autograd")
def embeddings_under_no_grad_that_then_get_a_gradient():
    model, x = net(), images()

    def step(loss):
        with torch.no_grad():
            e = model(x)
        return loss(e.requires_grad_(), LABELS)

    return Loop(model, step)


@refused(ReplayError, "some rows of the batch otherwise")
def recurrent_with_time_first():
    model, x = nn.LSTM(6, 8), images(shape=(5, 6))
    return Loop(model, lambda loss: loss(functional.normalize(model(x.transpose(0, 1))[0][-1]), LABELS))


@refused(CaptureError, "PackedSequence")
def packed_sequence():
    model, x = nn.GRU(6, 8, batch_first=True), images(shape=(6, 6))

    def step(loss):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((8,), 6), batch_first=True)
        padded, _ = nn.utils.rnn.pad_packed_sequence(model(packed)[0], batch_first=True)
        return loss(functional.normalize(padded[:, -1]), LABELS)

    return Loop(model, step)


@refused(CaptureError, "No module ran")
def no_module_at_all():
    weights, x = nn.ParameterList([torch.randn(8, 36)]), images()
    return Loop(weights, lambda loss: loss(functional.linear(x.flatten(1), weights[0]), LABELS))


@refused(CaptureError, "computed under no_grad")
def trunk_under_no_grad():
    trunk, head, x = net(), nn.Linear(8, 8), images()

    def step(loss):
        with torch.no_grad():
            features = trunk(x)
        return loss(head(features), LABELS)

    return Loop(nn.ModuleList([trunk, head]), step)


@refused(
    CaptureError, r"Sequential computed under no_grad, or in an earlier step, or that were detached.*perturb_input"
)
def features_that_are_detached_before_the_images():
    class Fuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.of = net(), nn.Linear(8, 8)

        def forward(self, features, x):
            return self.of(features) + self.net(x)

    trunk, head, x = net(), Fuses(), images()
    return Loop(nn.ModuleList([trunk, head]), lambda loss: loss(head(trunk(x).detach(), x), LABELS))


@refused(CaptureError, "not watched")
def head_named_without_its_trunk():
    trunk, head, x = net(), nn.Linear(8, 8), images()
    return Loop(nn.ModuleList([trunk, head]), lambda loss: loss(head(trunk(x)), LABELS), model=head)


@refused(CaptureError, "model that was named did not")
def another_model_named():
    model, other, x = net(), net(), images()
    return Loop(nn.ModuleList([model, other]), lambda loss: loss(model(x), LABELS), model=other)


@refused(InputError, "floating point")
def ids_of_words():
    model, ids = nn.Embedding(10, 8), torch.arange(8)
    return Loop(model, lambda loss: loss(model(ids), LABELS))


@refused(CaptureError, r"gave \(1, 8, 8\) for inputs \(8, 6, 6\)")
def last_hidden_state_of_layers_by_rows():
    model, x = nn.GRU(6, 8, batch_first=True), images(shape=(6, 6))
    return Loop(model, lambda loss: loss(model(x)[1][-1], LABELS))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.calls = net(), 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) / self.calls


@refused(ReplayError, "differ")
def model_that_gives_something_else_each_time():
    model, x = Counts(), images()
    return Loop(model, lambda loss: loss(model(x), LABELS))


@refused(CaptureError, "in place")
def preprocessing_in_place_inside_the_model():
    class Preprocesses(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(x.mul_(0.5))

    model, x = Preprocesses(), images()
    return Loop(model, lambda loss: loss(model(x), LABELS))


@refused(CaptureError, "in place")
def buffer_of_images_that_is_filled_anew():
    model, static = net(), torch.empty(8, 1, 6, 6)

    def step(loss):
        static.copy_(images())
        e = model(static)
        static.copy_(images(2))
        return loss(e, LABELS)

    return Loop(model, step)


@shape(in_order=True)
def layers_in_place_called_one_by_one():
    layers, x = nn.ModuleList([nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Linear(16, 8)]), images()
    convolve, relu, pool, head = layers
    return Loop(layers, lambda loss: loss(head(pool(relu(convolve(x))).flatten(1)), LABELS), x=x)


@shape(in_order=True)
def layer_in_place_whose_output_is_not_used():
    trunk, swish, head, x = net(), nn.Hardswish(inplace=True), nn.Linear(8, 8), images()

    def step(loss):
        h = trunk(x)
        swish(h)
        return loss(head(h), LABELS)

    return Loop(nn.ModuleList([trunk, swish, head]), step, x=x)


@shape(in_order=True)
def last_layer_in_place():
    model, relu, x = net(), nn.LeakyReLU(0.2, inplace=True), images()
    return Loop(nn.ModuleList([model, relu]), lambda loss: loss(relu(model(x)), LABELS), x=x)


class WithRows(nn.Module):
    """Takes something more of each image, in whatever form: a list, a tuple, or an array."""

    def __init__(self):
        super().__init__()
        self.net, self.table = net(), nn.Embedding(4, 8)

    def forward(self, x, rows):
        ids = [len(row) if isinstance(row, str) else int(row) for row in rows]
        if len(ids) != len(x):
            raise ValueError("one for each image")
        return self.net(x) + self.table(torch.tensor(ids))


def with_rows(name, rows):
    def build():
        model, x = WithRows(), images()
        return Loop(model, lambda loss: loss(model(x, rows)[SHUFFLED], LABELS[SHUFFLED]))

    build.__name__ = f"rows_in_{name}"
    return shape()(build)


with_rows("a_list", [0, 1, 2, 3, 0, 1, 2, 3])
with_rows("a_tuple", (0, 1, 2, 3, 0, 1, 2, 3))
with_rows("an_array", numpy.arange(8) % 4)
with_rows("texts", ["a" * (row % 4) for row in range(8)])


@shape(in_order=True)
def list_that_is_as_long_as_the_batch_by_chance():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, weights):
            return self.net(x) * torch.tensor(weights)

    model, x = Weighted(), images()
    return Loop(model, lambda loss: loss(model(x, [1.0, 2.0, 0.5, 1.0, 1.5, 1.0, 0.5, 1.0]), LABELS), x=x)


@shape()
def expert_that_gets_no_row():
    trunk, experts, x = net(), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), images()
    to_first = torch.zeros(8, dtype=torch.bool)

    def step(loss):
        h = trunk(x)
        return loss(torch.cat([experts[0](h[to_first]), experts[1](h[~to_first])]), LABELS)

    return Loop(nn.ModuleList([trunk, experts]), step)


@shape()
def prototypes_as_the_reference():
    model, x = net(), images()

    def step(loss):
        e = model(x)
        prototypes = e[4:].view(2, 2, 8).mean(1)
        return loss(e[:4], LABELS[:4], ref_emb=prototypes, ref_labels=torch.arange(2))

    return Loop(model, step, losses=(losses.ContrastiveLoss,))


@shape()
def proxies_of_the_loop_as_the_reference():
    model, proxies, x = net(), nn.ParameterList([torch.randn(4, 8)]), images()
    step = lambda loss: loss(model(x), LABELS, ref_emb=proxies[0], ref_labels=torch.arange(4))  # noqa: E731
    return Loop(nn.ModuleList([model, proxies]), step, model=model, losses=(losses.ContrastiveLoss,))


@shape()
def momentum_encoder_as_the_reference():
    model, keys, x = net(), net().requires_grad_(False), images()

    def step(loss):
        with torch.no_grad():
            target = keys(x)
        return loss(model(x), LABELS, ref_emb=target, ref_labels=LABELS)

    return Loop(nn.ModuleList([model, keys]), step, model=model, losses=(losses.ContrastiveLoss,))


@shape(in_order=True)
def frozen_model_under_a_loss_that_learns():
    model, x = net().requires_grad_(False), images()
    make = lambda: losses.ArcFaceLoss(4, 8)  # noqa: E731
    return Loop(model, lambda loss: loss(functional.normalize(model(x)), LABELS), x=x, losses=(make,))


@shape()
def augmentation_of_images_that_need_gradient():
    model, x = net(), images().requires_grad_()
    return Loop(model, lambda loss: loss(model(x.flip(-1)), LABELS))


@shape()
def two_losses_of_residual_adapters_on_features_of_a_frozen_model():
    frozen, adapters, x = net().requires_grad_(False), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), images()

    def step(loss, other):
        features = frozen(x)
        value = loss(features + adapters[0](features), LABELS)
        return value + other(torch.cat([features, adapters[1](features)], dim=1), LABELS)

    two = (losses.MultiSimilarityLoss, losses.MultiSimilarityLoss)
    return Loop(nn.ModuleList([frozen, adapters]), step, losses=two)


# Frozen parts, and what modules give beside embeddings


def frozen_model_and_a_layer_without_weights(name, layer):
    def build():
        trunk, head, x = net().requires_grad_(False), nn.Linear(8, 8), images()
        return Loop(nn.ModuleList([trunk, head]), lambda loss: loss(head(layer(trunk(x))), LABELS), x=x)

    build.__name__ = f"frozen_model_and_{name}"
    return shape(in_order=True)(build)


frozen_model_and_a_layer_without_weights("a_threshold", nn.ReLU())
frozen_model_and_a_layer_without_weights("normalisation", nn.BatchNorm1d(8, affine=False).eval())
frozen_model_and_a_layer_without_weights("nothing", nn.Identity())


@shape(in_order=True)
def many_frozen_blocks_called_one_by_one():
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(36, 36), nn.Tanh()) for _ in range(20)]).requires_grad_(False)
    head, x = nn.Linear(36, 8), images()

    def step(loss):
        features = x.flatten(1)
        for block in blocks:
            features = features + block(features)
        return loss(head(features), LABELS)

    return Loop(nn.ModuleList([blocks, head]), step, x=x)


@shape()
def three_losses_of_heads_on_normalised_features_of_a_frozen_model():
    trunk, heads, x = net().requires_grad_(False), nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), images()

    def step(*losses):
        features = trunk(x)
        found = [loss(head(functional.normalize(features)), LABELS) for loss, head in zip(losses, heads, strict=True)]
        return sum(found)

    return Loop(nn.ModuleList([trunk, heads]), step, losses=(losses.MultiSimilarityLoss,) * 3)


@shape()
def many_small_crops_through_a_frozen_model():
    trunk, head = net().requires_grad_(False), nn.Linear(8, 8)
    crops = [images(seed, rows=4) for seed in range(10)]

    def step(loss):
        return loss(head(torch.cat([trunk(crop) for crop in crops])), (torch.arange(4) // 2).repeat(10))

    return Loop(nn.ModuleList([trunk, head]), step)


class Beside(nn.Module):
    """Gives something that is made of the embeddings beside them."""

    def __init__(self, made):
        super().__init__()
        self.net, self.made = net(), made

    def forward(self, x):
        embeddings = self.net(x)
        return embeddings, self.made(embeddings)


def beside(name, made, use):
    def build():
        model, x = Beside(made), images()
        return Loop(model, lambda loss: loss(use(*model(x)), LABELS), x=x)

    build.__name__ = f"model_that_gives_{name}"
    return shape(in_order=True)(build)


beside("a_mask", lambda e: e > 0, lambda e, mask: e * mask)
beside("indices", lambda e: e.topk(3, 1).indices, lambda e, first: torch.cat([e, e.gather(1, first)], 1))
beside("indices_of_other_length", lambda e: torch.tensor([3, 1, 0, 2]), lambda e, order: e[:, order])
beside("complex_numbers", torch.fft.fft, lambda e, found: e + found.real)


@shape()
def order_that_the_model_gives():
    model, x = Beside(lambda e: torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])), images()

    def step(loss):
        embeddings, order = model(x)
        return loss(embeddings[order], LABELS[order])

    return Loop(model, step)


@shape()
def augmentation_by_a_module_under_no_grad():
    model, x, smaller = net(size=9), images(), nn.AvgPool2d(2)

    def step(loss):
        with torch.no_grad():
            given = smaller(x)
        return loss(model(given), LABELS)

    return Loop(model, step)


class Ensemble(nn.ModuleList):
    """A list of modules that can be called."""

    def forward(self, x):
        return sum(module(x) for module in self)


@shape(in_order=True)
def list_of_modules_with_a_forward_of_its_own():
    model, x = Ensemble([net(), net()]), images()
    return Loop(model, lambda loss: loss(model(x), LABELS), x=x)


@shape(in_order=True)
def soft_labels_of_prototypes_beside():
    model, prototypes, x = net(), nn.Parameter(torch.randn(8, 4) / 4), images()
    model.register_parameter("prototypes", prototypes)
    mixed = torch.rand(4, 8).softmax(0).T

    def step(loss):
        return loss(torch.cat([model(x), mixed @ prototypes.T], 1), LABELS)

    return Loop(model, step, x=x)


@shape(in_order=True)
def token_of_the_loop_beside():
    model, token, x = net(), nn.Parameter(torch.randn(1, 4) / 4), images()
    model.register_parameter("token", token)
    return Loop(model, lambda loss: loss(torch.cat([model(x), token.expand(8, 4)], 1), LABELS), x=x)


@shape()
def frozen_images_and_a_reference_of_texts_that_learns():
    seen, table, head, x = net().requires_grad_(False), nn.Embedding(10, 8), nn.Linear(8, 8), images()
    model = nn.ModuleList([seen, table, head])

    def step(loss):
        return loss(seen(x), LABELS, ref_emb=head(table(torch.arange(8))), ref_labels=LABELS)

    return Loop(model, step, model=[seen, table, head], losses=(losses.ContrastiveLoss,))
