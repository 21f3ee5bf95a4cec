"""Inputs are embedded as the loop embedded them: against the loop itself, run by hand with one input exchanged."""

import math
from queue import SimpleQueue

import pytest
import torch
from torch import nn
from torch.nn import functional

from pml_adversarial.errors import CaptureError, InputError, ReplayError
from pml_adversarial.training.pixels import PixelSpace
from pml_adversarial.training.replay import ALL, Replay, difference, tolerance
from pml_adversarial.training.sources import Choice
from pml_adversarial.training.trace import Fixed
from pml_adversarial.training.tracing import Traced, paused, ref_of
from pml_adversarial.training.watch import Watch


class Multi(nn.Module):
    """Gives its embeddings in a container, beside other things."""

    def __init__(self, inner, wrap):
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, images):
        return self.wrap(self.inner(images))


class Masked(nn.Module):
    """Takes a mask and a number for each row, by name."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(36, 4)

    def forward(self, images, mask=None, scale=1.0):
        features = self.linear(images.flatten(1))
        return (features if mask is None else features * mask) * scale


class Tower(nn.Module):
    """Takes two batches, and gives two batches of embeddings."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(36, 4), nn.Linear(36, 4)

    def forward(self, left, right):
        return self.left(left.flatten(1)), self.right(right.flatten(1))


@pytest.fixture(autouse=True)
def watch():
    return Watch()


@pytest.fixture
def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4)).double()


@pytest.fixture
def images(images):
    return images.double()


def other_model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Sigmoid()).double()


def replay_of(embeddings, order=None, choice=Choice(), pixels=None, **options):  # noqa: B008
    results = (
        [ref_of(embeddings)] if isinstance(embeddings, torch.Tensor) else [ref_of(e) or Fixed(e) for e in embeddings]
    )
    return Replay(results, pixels or PixelSpace(), order, choice, **options)


def changed_in_place(embeddings):
    embeddings[:, 0] = 0.5
    embeddings.clamp_(-0.4, 0.4)
    return embeddings


def table_of(model, images):
    table = torch.zeros(8, 4, dtype=images.dtype)
    table[:4] = model(images[:4])
    table[[5, 4, 7, 6]] = model(images[4:])
    return table


def listed(model, images):
    """One image after the other."""
    return torch.stack([model(image[None])[0] for image in images])


def padded(model, images):
    first, second = other_model(), nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double()
    torch.manual_seed(7)
    nn.init.normal_(second[1].weight)
    nn.init.zeros_(second[1].bias)
    return torch.cat([first(images[:5]), second(images[5:, :, :4, :4])])


def empty_call(images):
    torch.manual_seed(8)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double()(images[8:, :, :4, :4])


def norm_without_gradient(embeddings):
    with torch.no_grad():
        norm = embeddings.norm(dim=1, keepdim=True)
    return embeddings / norm


def frozen():
    """A trunk whose weights are not trained, and whose output needs no gradient."""
    torch.manual_seed(6)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16)).double().requires_grad_(False)


# (model, images) -> embeddings, of which each row depends on one image
LOOPS = {
    "plain": lambda m, x: m(x),
    "inside another": lambda m, x: nn.Sequential(m, nn.Tanh())(x),
    "a chain": lambda m, x: nn.Tanh()(m[2:](m[:2](x))),
    "a chain with an operation between": lambda m, x: m[2:](m[:2](x) * 0.5),
    "by keyword": lambda m, x: m(input=x),
    "normalised": lambda m, x: functional.normalize(m(x)),
    "divided by its norm": lambda m, x: (lambda e: e / e.norm(dim=1, keepdim=True))(m(x)),
    "multiplied": lambda m, x: m(x) @ torch.arange(8.0, dtype=x.dtype).view(4, 2),
    "cast": lambda m, x: m(x).float(),
    "columns": lambda m, x: m(x)[:, 1:3],
    "picked columns": lambda m, x: m(x)[:, [3, 0]],
    "columns from the last": lambda m, x: m(x).flip(1),
    "split columns": lambda m, x: m(x).split([1, 3], 1)[1],
    "rows": lambda m, x: m(x)[2:6],
    "every other row": lambda m, x: m(x)[::2],
    "one row": lambda m, x: m(x)[3:4],
    "picked rows": lambda m, x: m(x)[[6, 1, 0]],
    "rows from the last": lambda m, x: m(x).flip(0),
    "a mask of rows": lambda m, x: m(x)[torch.arange(8) % 3 > 0],
    "index_select": lambda m, x: m(x).index_select(0, torch.tensor([7, 2])),
    "chunks exchanged": lambda m, x: torch.cat(m(x).chunk(2)[::-1]),
    "chunks interleaved": lambda m, x: torch.stack(m(x).chunk(2), 1).flatten(0, 1),
    "one of two chunks": lambda m, x: m(x).chunk(2)[1],
    "transposed twice": lambda m, x: m(x).T.contiguous().T,
    "one more dimension and back": lambda m, x: m(x)[:, None].expand(-1, 2, -1).flatten(1),
    "in place": lambda m, x: changed_in_place(m[:2](x)),
    "added to itself": lambda m, x: (lambda e: e + e.tanh())(m(x)),
    "a constant for each row": lambda m, x: m(x) * torch.linspace(0.5, 2, 8, dtype=x.dtype)[:, None],
    "maximum of a row": lambda m, x: (lambda e: torch.cat([e, e.max(1, keepdim=True).values], 1))(m(x)),
    "two calls": lambda m, x: torch.cat([m(x[:4]), m(x[4:])]),
    "two calls exchanged": lambda m, x: torch.cat([m(x[4:]), m(x[:4])]),
    "three calls of several sizes": lambda m, x: torch.cat([m(x[:1]), m(x[1:6]), m(x[6:])]),
    "part of two calls": lambda m, x: torch.cat([m(x[:4])[1:], m(x[4:])[:2]]),
    "calls interleaved": lambda m, x: torch.stack([m(x[:4]), m(x[4:])], 1).flatten(0, 1),
    "each call normalised": lambda m, x: torch.cat([functional.normalize(m(x[:4])), 2 * m(x[4:])]),
    "one after the other": listed,
    "two modules": lambda m, x: torch.cat([m(x[:5]), other_model()(x[5:])]),
    "two modules of the same images": lambda m, x: torch.cat([m(x), other_model()(x)], 1),
    "a sum of two modules": lambda m, x: m(x) + other_model()(x),
    "a residue": lambda m, x: (lambda e: e + nn.Tanh()(e))(m(x)),
    "a dict": lambda m, x: Multi(m, lambda e: {"ids": e.argmax(1), "pooled": e})(x)["pooled"],
    "the second of a tuple": lambda m, x: Multi(m, lambda e: (e.sum(), e * 2))(x)[1],
    "both of a tuple side by side": lambda m, x: torch.cat(Multi(m, lambda e: [e, e * 2])(x), 1),
    "written into a table": table_of,
    "shapes of several kinds": padded,
    "an empty call of another shape": lambda m, x: torch.cat([m(x), empty_call(x)]),
    "three dimensions between": lambda m, x: m(x).view(8, 2, 2).softmax(1).flatten(1),
    "unbound": lambda m, x: torch.stack([row * 2 for row in m(x)]),
    "sorted within rows": lambda m, x: m(x).sort(1).values,
    "einsum": lambda m, x: torch.einsum("nd,de->ne", m(x), torch.ones(4, 3, dtype=x.dtype)),
    "a parameter of the loop": lambda m, x: functional.linear(m(x), nn.Parameter(torch.ones(3, 4, dtype=x.dtype))),
    "padded": lambda m, x: functional.pad(m(x), (0, 2)),
    "a row of padding after": lambda m, x: torch.cat([m(x), torch.zeros(2, 4, dtype=x.dtype)]),
    "padding by rows": lambda m, x: functional.pad(m(x), (0, 0, 0, 2)),
    "padding before": lambda m, x: torch.cat([torch.zeros(2, 4, dtype=x.dtype), m(x)]),
    "padding between": lambda m, x: functional.pad(m(x)[:, None], (0, 0, 1, 0)).flatten(0, 1),
    "the same images in two calls": lambda m, x: torch.cat([m(x), other_model()(x)]),
    "the same call twice": lambda m, x: (lambda e: torch.cat([e, 2 * e]))(m(x)),
    "repeated": lambda m, x: m(x).repeat(2, 1),
    "picked twice": lambda m, x: m(x)[[6, 1, 1, 0]],
    "a batch of two": lambda m, x: torch.stack([row * 2 for row in m(x[:2])]),
    "multiplied by zeros": lambda m, x: m(x) * torch.tensor([1.0, 0, 1, 0], dtype=x.dtype),
    "without nan": lambda m, x: torch.nan_to_num(m(x)),
    "without nan, mixed with zeros": lambda m, x: torch.eye(8, dtype=x.dtype)[[5, 3, 3, 0]] @ m(x).nan_to_num(),
    "a detached norm": lambda m, x: (lambda e: e / e.detach().norm(dim=1, keepdim=True))(m(x)),
    "a condition": lambda m, x: (lambda e: torch.where(e > 0, e, 0.1 * e))(m(x)),
    "a mask of values": lambda m, x: (lambda e: e * ((e > 0) + 0.5))(m(x)),
    "the largest alone": lambda m, x: (lambda e: e * functional.one_hot(e.argmax(1), 4))(m(x)),
    "rounded straight through": lambda m, x: (lambda e: e + (e.mul(64).round() / 64 - e).detach())(m(x)),
    "a frozen trunk": lambda m, x: m[2:](frozen()(x)),
    "a frozen trunk, normalised": lambda m, x: m[2:](functional.normalize(frozen()(x))),
    "a frozen teacher beside it": lambda m, x: torch.cat([m(x), frozen()(x)], 1),
    "detached after": lambda m, x: (lambda e: torch.cat([e, e.detach()]))(m(x)),
    "images that need gradient": lambda m, x: m(x.clone().requires_grad_()),
    "images made of others": lambda m, x: m(x.flip(3)).flip(0),
    "images that stand twice": lambda m, x: m(torch.cat([x, x.flip(3)])),
}

in_all_loops = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)


def rows_by_hand(loop, model, images):
    """For each embedding, the images on which it depends: one after the other is exchanged."""
    with torch.no_grad():
        clean = loop(model, images)
        moved = []
        for row in range(len(images)):
            others = images.clone()
            others[row] = 1 - others[row]
            moved.append((loop(model, others) != clean).any(1))
    return [column.nonzero().flatten().tolist() for column in torch.stack(moved).T]


def embedded_by_hand(loop, model, images, inputs, rows, map_row):
    """Runs the loop once for each copy, with its input in the place of the image that it stands for."""
    found = []
    with torch.no_grad():
        for image, row in zip(inputs, rows.tolist(), strict=True):
            others = images.clone()
            others[map_row[row]] = image
            found.append(loop(model, others)[row])
    return torch.stack(found) if found else loop(model, images)[:0]


def known_rows_of(replay):
    return torch.arange(len(replay.inputs)) if replay.known_rows is None else replay.known_rows


@in_all_loops
class TestEmbed:
    """Of all rows, some, none, repeated ones, in any order."""

    @pytest.fixture
    def replay(self, loop, model, images):
        return replay_of(loop(model, images))

    @pytest.fixture
    def known(self, loop, model, images):
        """Embeddings that depend on an image -> its number."""
        if loop is LOOPS["images that stand twice"]:
            return dict.fromkeys(range(16))
        rows = rows_by_hand(loop, model, images)
        assert max(map(len, rows)) == 1
        if loop is LOOPS["detached after"]:
            rows = rows[:8] + [[]] * 8  # a constant, as it is for the gradient
        return {row: found[0] for row, found in enumerate(rows) if found}

    def test_of_the_clean_inputs_gives_the_embeddings(self, loop, model, images, replay):
        torch.testing.assert_close(replay.embed(replay.inputs), loop(model, images)[known_rows_of(replay)])

    def test_again_gives_the_embeddings(self, loop, model, images, replay):
        torch.testing.assert_close(replay.again(), loop(model, images).detach())

    def test_known_rows_are_those_that_depend_on_an_image(self, replay, known):
        assert known_rows_of(replay).tolist() == list(known)
        assert (replay.known_rows is None) == (list(known) == list(range(len(known))))

    def test_rows_are_embedded_each_on_its_own(self, loop, replay):
        replay.check_rows(replay.again())
        assert replay.picks == ALL

    def test_inputs_are_those_behind_the_embeddings(self, loop, model, images, replay, known):
        if loop is LOOPS["images that stand twice"]:
            assert torch.equal(replay.inputs, torch.cat([images, images.flip(3)]))
        elif loop is LOOPS["shapes of several kinds"]:
            assert torch.equal(replay.inputs[:5].view(5, 1, 6, 6), images[:5])
            assert torch.equal(replay.inputs[5:, :16].view(3, 1, 4, 4), images[5:, :, :4, :4])
        elif loop is LOOPS["images made of others"]:
            assert torch.equal(replay.inputs, images.flip(3).flip(0))
        else:
            assert torch.equal(replay.inputs, images[list(known.values())])

    @pytest.mark.parametrize("pick", ["all", "none", "some", "one", "repeated", "from the last", "repeated and mixed"])
    def test_of_other_inputs_gives_what_the_loop_gives(self, loop, model, images, replay, known, pick):
        count = len(known)
        picks = {
            "all": torch.arange(count),
            "none": torch.arange(0),
            "some": torch.arange(0, count, 2),
            "one": torch.tensor([count - 1]),
            "repeated": torch.tensor([0, 0, 0]),
            "from the last": torch.arange(count).flip(0),
            "repeated and mixed": torch.tensor([count - 1, 0, count // 2, 0, count - 1, 0]),
        }[pick]
        rows = torch.tensor(list(known))[picks]
        given = torch.rand(len(rows), 1, 6, 6, dtype=images.dtype)
        if loop is LOOPS["images that stand twice"]:
            expected = model(given)
        else:
            expected = embedded_by_hand(loop, model, images, given, rows, known)
        if loop is LOOPS["images made of others"]:
            given = given.flip(3)
        if loop is LOOPS["shapes of several kinds"]:
            cut = [
                functional.pad(g[:, :4, :4].flatten(), (0, 20)) if r >= 5 else g.flatten()
                for g, r in zip(given, rows, strict=True)
            ]
            given = torch.stack(cut) if cut else given.flatten(1)
        torch.testing.assert_close(replay.embed(given, rows).detach(), expected.detach())
        if pick == "all":
            torch.testing.assert_close(replay.embed(given).detach(), expected.detach())

    def test_carries_gradient_to_inputs_and_weights(self, loop, model, images, replay):
        embeddings = loop(model, images)
        weights = [p for p in model.parameters() if p.requires_grad]
        by_loop = torch.autograd.grad(
            embeddings[known_rows_of(replay)].double().pow(3).sum(), weights, allow_unused=True
        )
        given = replay.inputs.clone().requires_grad_()
        again = replay.embed(given).double().pow(3).sum()
        *by_replay, of_inputs = torch.autograd.grad(again, [*weights, given], allow_unused=True)
        for one, other in zip(by_replay, by_loop, strict=True):
            torch.testing.assert_close(one, other)
        assert of_inputs.flatten(1).abs().sum(1).all()

    def test_leaves_the_embeddings_as_they_are(self, loop, model, images):
        embeddings = loop(model, images)
        before, version = embeddings.detach().clone(), embeddings._version
        replay = replay_of(embeddings)
        replay.embed(1 - replay.inputs)
        replay.again()
        replay.check_rows(before)
        assert torch.equal(embeddings, before)
        assert embeddings._version == version
        assert type(embeddings) is Traced

    def test_form_is_the_same_in_the_next_step(self, loop, model, images, replay):
        if loop in (LOOPS[name] for name in ("plain", "normalised", "two calls", "picked rows")):
            assert hash(replay_of(loop(model, 1 - images)).form) == hash(replay.form)
            assert replay_of(loop(model, 1 - images)).form == replay.form
        assert replay.form != replay_of(loop(model, images) * 1).form


class TestWhatWasDoneUnderNoGrad:
    def test_is_done_again_for_the_copy(self, model, images):
        replay = replay_of(norm_without_gradient(model(images)))
        rows = torch.tensor([6, 6, 0])
        found = replay.embed(1 - images[rows], rows)
        torch.testing.assert_close(found, functional.normalize(model(1 - images[rows])))
        torch.testing.assert_close(replay.embed(images), functional.normalize(model(images)))


class TestOrder:
    @pytest.mark.parametrize(
        "change", [lambda e: e, functional.normalize, lambda e: e[[1, 0, *range(2, 8)]]], ids=range(3)
    )
    def test_rows_in_another_order(self, model, images, change):
        order = torch.tensor([3, 1, 7, 0, 2, 4, 6, 5])
        embeddings = change(model(images))
        replay = replay_of(embeddings, order)
        torch.testing.assert_close(replay.again(), embeddings[order].detach())
        torch.testing.assert_close(replay.embed(replay.inputs), embeddings[order])
        rows = torch.tensor([5, 0, 5])
        torch.testing.assert_close(replay.embed(replay.inputs[rows], rows), embeddings[order][rows])

    def test_with_rows_whose_inputs_are_unknown(self, model, images):
        embeddings = torch.cat([torch.rand(2, 4, dtype=torch.double), model(images)])
        order = torch.tensor([*range(2, 10), 0, 1])
        replay = replay_of(embeddings, order)
        assert torch.equal(replay.inputs, images)
        torch.testing.assert_close(replay.again(), embeddings[order].detach())

    def test_known_rows_are_counted_in_the_order(self, model, images):
        embeddings = torch.cat([torch.rand(2, 4, dtype=torch.double), model(images)])
        replay = replay_of(embeddings, torch.tensor([9, 0, 8, 1, *range(2, 8)]))
        assert replay.known_rows.tolist() == [0, 2, *range(4, 10)]
        assert torch.equal(replay.inputs, images[[7, 6, *range(6)]])
        rows = torch.tensor([2, 9, 0])
        torch.testing.assert_close(replay.embed(1 - images[:3], rows), model(1 - images[:3]))


class TestLimit:
    """Rows of a reference that are never perturbed."""

    @pytest.mark.parametrize("limit", [8, 5, 1])
    @pytest.mark.parametrize("change", [lambda e: e, lambda e: e.flip(0)], ids=["plain", "flipped"])
    def test_rows_from_there_on_are_as_if_they_were_unknown(self, model, images, change, limit):
        replay = replay_of(change(model(images)), torch.arange(8), limit=limit)
        assert torch.equal(replay.inputs, change(images)[:limit])
        assert replay.known_rows is None
        torch.testing.assert_close(replay.embed(replay.inputs), change(model(images))[:limit])
        torch.testing.assert_close(replay.again(), change(model(images)).detach())

    def test_nothing_is_left(self, model, images):
        with pytest.raises(CaptureError, match="gradient with respect to"):
            replay_of(model(images), torch.arange(8), limit=0)


class TestChunk:
    """Some rows at a time, the second time in the backward pass."""

    CASES = (
        "plain",
        "normalised",
        "rows from the last",
        "two modules",
        "padding before",
        "picked twice",
        "a frozen trunk",
    )

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("chunk", [1, 3, 8, 100])
    def test_gives_the_same_and_the_same_gradient(self, model, images, case, chunk):
        whole, chunked = (replay_of(LOOPS[case](model, images), chunk=size) for size in (None, chunk))
        found = []
        for replay in (whole, chunked):
            given = (1 - replay.inputs).requires_grad_()
            embeddings = replay.embed(given)
            weights = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(embeddings.pow(3).sum(), [given, *weights], allow_unused=True)
            found.append((embeddings, *gradients))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(chunked.again(), whole.again())

    @pytest.mark.parametrize("chunk", [1, 3, 8])
    def test_no_more_rows_are_embedded_at_once(self, model, images, chunk):
        rows, sizes = torch.tensor([7, 7, 0, 3, 4, 5, 6, 1]), SimpleQueue()  # a list would be put back
        replay, expected = replay_of(model(images), chunk=chunk), model(images[rows])
        model[1].register_forward_pre_hook(lambda module, args: sizes.put(len(args[0])))
        whole = replay.embed(images[rows].requires_grad_(), rows)
        torch.testing.assert_close(whole, expected)
        forward = [sizes.get() for _ in range(sizes.qsize())]
        whole.sum().backward()
        again = [sizes.get() for _ in range(sizes.qsize())]
        assert forward == [len(part) for part in rows.split(chunk)]
        assert sorted(again) == ([] if chunk == 8 else sorted(forward))

    def test_batch_norm_in_train_mode_is_refused(self, moody_model, images):
        moody_model.double()
        with pytest.raises(InputError, match="BatchNorm2d"):
            replay_of(moody_model(images), chunk=3)
        moody_model[1].eval()
        embeddings = moody_model(images)
        assert len(replay_of(embeddings, chunk=3).inputs) == 8
        assert len(replay_of(moody_model(images)).inputs) == 8

    def test_what_hooks_keep_is_undone_in_the_backward_pass_too(self, model, images):
        replay, seen = replay_of(model(images), chunk=3), []
        model[1].register_forward_hook(lambda module, args, output: seen.append(output))
        embeddings = replay.embed(images)
        del seen[:]
        embeddings.sum().backward()
        assert seen == []


class TestSeveralResults:
    def test_a_reference_follows(self, model, images):
        queries, views = functional.normalize(model(images)), other_model()(images[:3].flip(3))
        replay = replay_of([queries, views])
        assert torch.equal(replay.inputs, torch.cat([images, images[:3].flip(3)]))
        torch.testing.assert_close(replay.embed(replay.inputs), torch.cat([queries, views]))
        rows = torch.tensor([9, 2, 9, 10])
        torch.testing.assert_close(replay.embed(replay.inputs[rows], rows), torch.cat([queries, views])[rows])

    def test_a_reference_that_is_fixed(self, model, images):
        queries, fixed = model(images), torch.rand(3, 4, dtype=torch.double)
        replay = replay_of([queries, fixed])
        assert replay.known_rows is None
        assert torch.equal(replay.inputs, images)
        torch.testing.assert_close(replay.again(), torch.cat([queries, fixed]).detach())
        torch.testing.assert_close(replay.embed(replay.inputs), queries)

    def test_two_towers_in_one_call(self, images):
        tower, others = Tower().double(), images.flip(0) * 0.5
        left, right = tower(images, others)
        replay = replay_of(torch.cat([left, right]))
        assert torch.equal(replay.inputs, torch.cat([images, others]))
        torch.testing.assert_close(replay.embed(replay.inputs), torch.cat([left, right]))
        rows, given = torch.tensor([12, 1]), torch.rand(2, 1, 6, 6, dtype=torch.double)
        by_hand = torch.stack([tower.right(given[0].flatten()), tower.left(given[1].flatten())])
        torch.testing.assert_close(replay.embed(given, rows), by_hand)


class TestArguments:
    """What is not perturbed is held fixed, and goes with its rows."""

    def loops(self):
        mask = torch.rand(8, 4, dtype=torch.double)
        return [
            lambda m, x: m(x, mask),
            lambda m, x: m(x, mask=mask),
            lambda m, x: m(mask=mask, images=x),
            lambda m, x: m(x, scale=torch.arange(8, dtype=torch.double)[:, None]),
            lambda m, x: m(x, mask[:1], 2.0),
            lambda m, x: m(x, scale=torch.tensor(3.0, dtype=torch.double)) * 2,
        ]

    @pytest.mark.parametrize("number", range(6))
    @pytest.mark.parametrize("tail", [lambda e: e, lambda e: e.flip(0)], ids=["plain", "flipped"])
    def test_rows_of_other_arguments_go_along(self, images, number, tail):
        model, loop = Masked().double(), self.loops()[number]
        replay = replay_of(tail(loop(model, images)), choice=Choice("images"))
        assert torch.equal(replay.inputs, tail(images))
        rows, given = torch.tensor([6, 0, 6]), torch.rand(3, 1, 6, 6, dtype=torch.double)
        expected = []
        for row, image in zip(rows.tolist(), given, strict=True):
            others = tail(images).clone()
            others[row] = image
            expected.append(tail(loop(model, tail(others)))[row])
        torch.testing.assert_close(replay.embed(given, rows), torch.stack(expected))


class TestSettings:
    """What stood around the calls is set up again."""

    def test_parameters_that_were_replaced(self, model, images):
        weights = {name: value * 2 for name, value in model.named_parameters()}
        embeddings = torch.func.functional_call(model, weights, (images,))
        replay = replay_of(embeddings)
        torch.testing.assert_close(replay.again(), embeddings.detach())
        torch.testing.assert_close(replay.embed(1 - images), torch.func.functional_call(model, weights, (1 - images,)))
        assert not torch.allclose(replay.embed(images), model(images))

    def test_parameters_that_were_replaced_by_ones_with_a_history(self, model, images):
        step = torch.zeros((), dtype=torch.double, requires_grad=True)
        weights = {name: value - step * value for name, value in model.named_parameters()}
        replay = replay_of(torch.func.functional_call(model, weights, (images,)))
        (gradient,) = torch.autograd.grad(replay.embed(images).sum(), step)
        assert gradient

    @pytest.mark.parametrize("tail", [lambda e: e, lambda e: e @ e.new_ones(4, 3)], ids=["model", "and after"])
    def test_autocast(self, images, tail):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        images = images.float()
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = tail(model(images))
            expected = tail(model(1 - images))
        assert embeddings.dtype == torch.bfloat16
        replay = replay_of(embeddings)
        torch.testing.assert_close(replay.again(), embeddings.detach())
        assert torch.equal(replay.embed(1 - images), expected)
        assert not torch.is_autocast_enabled("cpu")

    def test_autocast_for_the_model_alone(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = model(images.float())
        embeddings = embeddings.float() @ torch.rand(4, 3)
        replay = replay_of(embeddings)
        assert torch.equal(replay.embed(images.float()), embeddings)
        with torch.autocast("cpu", torch.bfloat16):  # as an attack may set it, for all that it computes
            assert replay.embed(images.float()).dtype == torch.bfloat16

    def test_modules_in_eval_mode(self, moody_model, images):
        moody_model.double().eval()
        embeddings = moody_model(images)
        replay = replay_of(functional.normalize(embeddings))
        torch.testing.assert_close(replay.again(), functional.normalize(embeddings).detach())
        torch.testing.assert_close(replay.embed(images[5:6], torch.tensor([5])), functional.normalize(embeddings[5:6]))

    def test_pixels_of_normalised_inputs(self, model, images):
        space = PixelSpace(((0.3,), (0.5,)))
        replay = Replay([ref_of(functional.normalize(model((images - 0.3) / 0.5)))], space)
        torch.testing.assert_close(replay.inputs, images)
        torch.testing.assert_close(replay.embed(1 - images), functional.normalize(model((0.7 - images) / 0.5)))

    def test_nothing_is_noted(self, model, images):
        replay = replay_of(functional.normalize(model(images)))
        assert type(replay.embed(images)) is type(replay.again()) is torch.Tensor


class TestAgain:
    def test_with_the_random_numbers_of_the_first_time(self, watch, moody_model, images):
        watch.wants_state = True
        embeddings = functional.normalize(moody_model.double()(images))
        replay = replay_of(embeddings)
        before = torch.get_rng_state()
        torch.testing.assert_close(replay.again(), embeddings.detach())
        assert torch.equal(torch.get_rng_state(), before)
        assert replay.is_told

    def test_of_two_calls_each_with_its_own(self, watch, images):
        watch.wants_state = True
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 4)).double()
        embeddings = torch.cat([model(images[:4]), model(images[4:])])
        torch.testing.assert_close(replay_of(embeddings).again(), embeddings.detach())

    def test_statistics_and_gradients_stay_as_they_were(self, moody_model, images):
        replay = replay_of(moody_model.double()(images))
        before = {name: value.clone() for name, value in moody_model.state_dict().items()}
        replay.again()
        assert all(torch.equal(value, before[name]) for name, value in moody_model.state_dict().items())
        assert all(parameter.grad is None for parameter in moody_model.parameters())

    def test_with_a_seed_where_the_random_numbers_are_not_known(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 4)).double()
        embeddings = model(images)
        replay = replay_of(embeddings)
        before = torch.get_rng_state()
        assert not replay.is_told
        assert torch.equal(replay.again(seed=3), replay.again(seed=3))
        assert not torch.equal(replay.again(seed=3), replay.again(seed=4))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(3)
        assert torch.equal(model(images), replay.again(seed=3))


class TestDifference:
    @pytest.mark.parametrize(
        ("one", "other", "expected"),
        [
            ([1.0, -4.0], [1.0, -4.0], 0),
            ([1.0, -3.0], [1.0, -4.0], 0.25),
            ([2.0, -4.0], [1.0, -4.0], 0.25),
            ([torch.inf, 2.0], [torch.inf, 2.0], 0),  # what was not finite cannot be compared
            ([7.0, 2.0], [torch.nan, 2.0], 0),
            ([torch.nan, 2.0], [1.0, 2.0], torch.inf),
            ([torch.inf, 2.0], [1.0, 2.0], torch.inf),
            ([[1.0], [2.0]], [1.0, 2.0], torch.inf),  # other shapes
            ([torch.nan], [torch.nan], 0),
            ([], [], 0),
            ([0.0], [0.0], 0),
        ],
    )
    def test_is_a_share_of_the_largest_value(self, one, other, expected):
        found = difference(torch.tensor(one), torch.tensor(other))
        assert found == expected or (expected == torch.inf and found > 1e30)

    def test_of_zeros_is_large_where_there_were_none(self):
        assert difference(torch.tensor([1e-3]), torch.tensor([0.0])) > 1

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_rounding_to_a_type_is_tolerated_and_another_batch_is_not(self, dtype):
        values, others = torch.rand(8, 4, dtype=torch.double), torch.rand(8, 4, dtype=torch.double)
        assert difference(values.to(dtype), values.to(dtype)) == 0
        assert difference(values.to(dtype) * (1 + torch.finfo(dtype).eps), values.to(dtype)) <= tolerance(
            values.to(dtype)
        )
        assert difference(others.to(dtype), values.to(dtype)) > tolerance(values.to(dtype))


SCALE = 1.0


class Switched(nn.Module):
    """Embeds as an attribute says that others may set."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale, self.name, self.calls = inner, 1.0, "a", []

    def forward(self, images):
        return self.inner(images) * self.scale


class TestWhatIsToldOfADifference:
    def test_the_first_call_that_gives_something_else(self, model, images):
        other = other_model()
        replay = replay_of(torch.cat([model(images), other(images)]))
        assert "What was done" in replay.first_difference(1e-3)
        with torch.no_grad():
            other[1].weight.mul_(2)
        assert "call 2 of 2" in replay.first_difference(1e-3)
        with torch.no_grad():
            model[3].weight.mul_(2)
        assert "call 1 of 2" in replay.first_difference(1e-3)

    def test_it_moves_nothing(self, moody_model, images):
        replay = replay_of(moody_model.double()(images))
        before = {name: value.clone() for name, value in moody_model.state_dict().items()}
        random_state = torch.get_rng_state()
        replay.first_difference(1e-3)
        assert all(torch.equal(value, before[name]) for name, value in moody_model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_attributes_that_were_switched(self, model, images):
        module = Switched(model)
        replay = replay_of(module(images))
        assert replay.was_switched == []
        module.eval()  # the mode is looked at when the replay is made
        assert replay.was_switched == []
        module.scale, module.name = 2.0, "b"
        assert len(replay.was_switched) == 2
        assert "Switched.scale" in replay.was_switched[0]
        assert "1.0" in replay.was_switched[0]
        assert "2.0" in replay.was_switched[0]

    @pytest.mark.parametrize(
        "held", [["a"], {"a": 1}, {"a"}, ("a", math.nan), torch.ones(3)], ids=lambda v: type(v).__name__
    )
    def test_lists_and_tensors_that_were_switched(self, model, images, held):
        module = Switched(model)
        module.calls = held
        replay = replay_of(module(images))
        assert replay.was_switched == []
        {list: list.clear, dict: dict.clear, set: set.clear}.get(type(held), lambda held: None)(held)
        if isinstance(held, torch.Tensor):
            held.mul_(2)
        elif isinstance(held, tuple):
            module.calls = ("b",)
        (found,) = replay.was_switched
        assert found.startswith("Switched.calls, which was")

    def test_buffers_classes_and_globals_that_were_switched(self, model, images, monkeypatch):
        class Own(nn.Module):
            which = "a"

            def __init__(self):
                super().__init__()
                self.inner = model
                self.register_buffer("centre", torch.zeros(()))

            def forward(self, images):
                return self.inner(images) * SCALE + self.centre

        module = Own()
        replay = replay_of(module(images))
        assert replay.was_switched == []
        module.centre.add_(1)
        Own.which = "b"
        monkeypatch.setitem(globals(), "SCALE", 2.0)
        assert replay.was_switched == [
            "Own.centre, which was changed",
            "Own.which, which was 'a' and is 'b'",
            "Own.SCALE, which was 1.0 and is 2.0",
        ]

    def test_a_hook_that_was_exchanged(self, model, images):
        handle = model[1].register_forward_hook(lambda module, args, output: output)
        embeddings = model(images)
        assert replay_of(embeddings).was_switched == []
        handle.remove()
        model[1].register_forward_hook(lambda module, args, output: 2 * output)
        (found,) = replay_of(embeddings).was_switched
        assert "hooks were changed" in found


class TakesScale(nn.Linear):
    def forward(self, batch, scale):
        return super().forward(batch * scale)


class Centred(nn.Module):
    def __init__(self, inner, on):
        super().__init__()
        self.inner, self.on = inner, on

    def forward(self, images, extra=None):
        embeddings = self.inner(images)
        if extra is not None:
            embeddings = embeddings + extra.mean(0)
        return embeddings - embeddings.mean(0) if self.on else embeddings


class TestCheckRows:
    def test_a_model_that_mixes_rows(self, model, images):
        for on in (False, True):
            replay = replay_of(Centred(model, on)(images))
            if on:
                with pytest.raises(ReplayError, match="Centred"):
                    replay.check_rows(replay.again())
            else:
                replay.check_rows(replay.again())

    def test_a_model_whose_rows_are_not_the_first_dimension(self, images):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn = nn.GRU(6, 4).double()

            def forward(self, batch):
                return self.rnn(batch)[0].transpose(0, 1)[:, -1]

        replay = replay_of(Recurrent()(torch.rand(8, 8, 6, dtype=torch.double)))
        with pytest.raises(ReplayError, match="Recurrent"):
            replay.check_rows(replay.again())

    def test_batch_norm_mixes_rows_in_train_mode_alone(self, moody_model, images):
        replay = replay_of(moody_model.double()(images))
        before = {name: value.clone() for name, value in moody_model.state_dict().items()}
        replay.check_rows(replay.again())
        assert moody_model.training
        assert all(torch.equal(value, before[name]) for name, value in moody_model.state_dict().items())

    def test_a_model_that_draws_random_numbers_cannot_be_checked(self, images):
        class Noisy(nn.Module):
            def forward(self, batch):
                return batch.flatten(1)[:, :4] * torch.rand(len(batch), 4)

        replay = replay_of(Noisy()(images.clone().requires_grad_()))
        before = torch.get_rng_state()
        replay.check_rows(replay.again())
        assert torch.equal(torch.get_rng_state(), before)

    def test_arguments_that_have_as_many_rows_by_chance_are_not_picked(self, model, images):
        table = torch.rand(8, 4, dtype=torch.double)
        for extra, picks in ((table, frozenset()), (table[:3], ALL)):
            module = Centred(model, on=False)
            replay = replay_of(module(images, extra))
            replay.check_rows(replay.again())
            assert replay.picks == picks
            rows = torch.tensor([4, 1])
            torch.testing.assert_close(replay.embed(1 - images[rows], rows), module(1 - images, extra)[rows])

    @pytest.mark.parametrize("state", [torch.rand, torch.zeros])
    def test_rows_of_another_dimension_are_picked(self, state):
        class Recurrent(nn.GRU):
            def forward(self, batch, state):
                return super().forward(batch, state)[0][:, -1]

        torch.manual_seed(0)
        module = Recurrent(6, 4, 2, batch_first=True).double()
        batch, state = torch.rand(8, 5, 6, dtype=torch.double), state(2, 8, 4, dtype=torch.double)
        replay, rows = replay_of(module(batch, state)), torch.tensor([4, 1, 4])
        replay.check_rows(replay.again())
        expected = module(1 - batch, state)[rows]
        torch.testing.assert_close(replay.embed(1 - batch[rows], rows), expected)

    @pytest.mark.parametrize("scale", [torch.rand, torch.ones])
    def test_another_dimension_that_has_the_size_by_chance_is_not_picked(self, scale):
        module = TakesScale(8, 3).double()
        batch, scale = torch.rand(8, 8, dtype=torch.double), scale(1, 8, dtype=torch.double)
        replay, rows = replay_of(module(batch, scale)), torch.tensor([4, 1, 4])
        replay.check_rows(replay.again())
        torch.testing.assert_close(replay.embed(1 - batch[rows], rows), module(1 - batch, scale)[rows])

    @pytest.mark.parametrize("cut", [torch.Tensor.detach, lambda x: (x * 4).round() / 4, lambda x: x.sign()])
    def test_a_model_without_gradient_to_its_inputs(self, model, images, cut):
        class Cut(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(4, 4).double()

            def forward(self, batch):
                return self.head(cut(batch.flatten(1)[:, :4].detach()))

        replay = replay_of(Cut()(images))
        with pytest.raises(CaptureError, match="no gradient with respect to its inputs"):
            replay.check_rows(replay.again())


class TestNoGradient:
    def test_in_a_later_step_is_told_in_words(self, model, images):
        class Cuts(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.how = model, [[False]]  # where nothing can see it

            def forward(self, batch):
                found = self.inner(batch)
                return found.detach() if self.how[0][0] else found

        module = Cuts()
        replay = replay_of(module(images))
        module.how[0][0] = True
        with pytest.raises(CaptureError, match="no gradient with respect to its inputs"):
            replay.embed(images.clone().requires_grad_())


class TestRefusals:
    def test_the_mode_of_one_submodule(self, moody_model, images):
        embeddings = moody_model.double()(images)
        moody_model[3].eval()
        with pytest.raises(ReplayError, match="mode"):
            replay_of(embeddings)

    @pytest.mark.parametrize("which", ["images", "mask", "tail"])
    def test_a_tensor_that_was_changed_since(self, images, which):
        held = {"images": images.clone(), "mask": torch.rand(8, 4).double(), "tail": torch.rand(8, 4).double()}
        embeddings = Masked().double()(held["images"], mask=held["mask"]) + held["tail"]
        assert replay_of(embeddings)
        held[which].add_(0.01)
        with pytest.raises(CaptureError, match="changed in place since"):
            replay_of(embeddings)


MIXED = {
    "centred": lambda m, x: m(x) - m(x).mean(0),
    "softmax over rows": lambda m, x: m(x).softmax(0),
    "batch norm": lambda m, x: functional.batch_norm(m(x), None, None, training=True),
    "pairs": lambda m, x: m(x)[:4] * m(x)[4:],
    "two crops": lambda m, x: m(x).view(4, 2, 4).mean(1),
    "side by side": lambda m, x: m(x).view(4, 8),
    "one row for all": lambda m, x: m(x) + m(x)[3],
    "similarities": lambda m, x: m(x) @ m(x).T,
    "sum over calls": lambda m, x: m(x[:4]) + m(x[4:]),
    "cumulative": lambda m, x: m(x).cumsum(0),
    "transposed": lambda m, x: m(x).T,
    "scaled by the largest": lambda m, x: m(x) / m(x).abs().max(),
}


class TestRowsThatMix:
    @pytest.mark.parametrize("case", MIXED)
    def test_are_refused_as_they_are_by_hand(self, model, images, case):
        assert max(map(len, rows_by_hand(MIXED[case], model, images))) > 1
        with pytest.raises(CaptureError, match=r"depends on (several|\d+) inputs"):
            replay_of(MIXED[case](model, images))


ORDERS = {
    "rows": lambda e, order: e[order],
    "index_select": lambda e, order: e.index_select(0, order),
    "gather": lambda e, order: e.gather(0, order[:, None].expand(-1, 4)),
    "take_along_dim": lambda e, order: torch.take_along_dim(e, order[:, None], 0),
    "one after the other": lambda e, order: torch.stack([e[row] for row in order]),
    "index of two dimensions": lambda e, order: e[order.view(2, 4)].flatten(0, 1),
    "product": lambda e, order: functional.one_hot(order, 8).to(e) @ e,
    "product of an order without gradient": lambda e, order: functional.one_hot(order.detach(), 8).to(e).detach() @ e,
}


class TestChoices:
    """Numbers and masks that are computed from embeddings."""

    @pytest.mark.parametrize("pick", ORDERS.values(), ids=ORDERS)
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
    def test_an_order_of_rows_stays(self, model, images, pick, mode):
        embeddings = model(images)
        with mode():
            order = embeddings.norm(dim=1).argsort()
        found = replay_of(pick(embeddings, order)).embed(1 - images[order])
        with paused():
            assert not torch.equal(model(1 - images).norm(dim=1).argsort(), order)
            torch.testing.assert_close(found, model(1 - images)[order])

    @pytest.mark.parametrize("keeps", ["all", "some", "one"])
    def test_a_mask_of_rows_stays(self, model, images, keeps):
        embeddings = model(images)
        norms = embeddings.norm(dim=1)
        mask = norms > {"all": 0.99 * norms.min(), "some": norms.median(), "one": norms.sort().values[-2]}[keeps].item()
        kept = mask.nonzero().flatten()
        with torch.no_grad():
            for layer in (model[1], model[3]):
                layer.bias.zero_()
        replay = replay_of(embeddings[mask])
        assert replay.embed(images[kept] * 1e-3).shape == (len(kept), 4)

    def test_rows_that_a_row_itself_chooses_stay(self, model, images):
        """The nearest other row of each, as the hardest negative."""
        embeddings = model(images)
        nearest = torch.cdist(embeddings, embeddings).fill_diagonal_(torch.inf).argmin(1)
        found = replay_of(torch.cat([embeddings, embeddings[nearest]])).embed(1 - images[nearest], torch.arange(8, 16))
        with paused():
            torch.testing.assert_close(found, model(1 - images)[nearest])

    def test_the_same_row_for_all_stays(self, model, images):
        embeddings = model(images)
        row = embeddings.norm(dim=1).argmin()
        found = replay_of(torch.cat([embeddings, embeddings[row][None]])).embed(
            1 - images[row][None], torch.tensor([8])
        )
        with paused():
            torch.testing.assert_close(found, model(1 - images)[row][None])

    @pytest.mark.parametrize("backwards", [False, True])
    @pytest.mark.parametrize(
        "quantised",
        [
            lambda e, codes, nearest: codes[nearest],
            lambda e, codes, nearest: functional.embedding(nearest, codes),
            lambda e, codes, nearest: functional.one_hot(nearest, 5).to(e) @ codes,
            lambda e, codes, nearest: torch.where(e > 0, e, 0.1 * e),
            lambda e, codes, nearest: e * (e.abs() > e.abs().median(1, keepdim=True).values),
            lambda e, codes, nearest: e.gather(1, e.topk(3).indices),
            lambda e, codes, nearest: e.view(8, 2, 2)[torch.arange(8), e.view(8, 2, 2).norm(dim=2).argmax(1)],
        ],
        ids=["rows", "embedding", "one-hot", "where", "mask", "largest", "strongest part"],
    )
    def test_what_each_row_chooses_of_its_own_follows_the_row(self, model, images, quantised, backwards):
        with paused(), torch.no_grad():  # the nearest codes of the first rows change
            codes = torch.cat([model(images)[:3], model(1 - images)[:2]])

        def loop(x):
            e = model(x)
            codes_of = quantised(e, codes, torch.cdist(e.detach(), codes).argmin(1))
            e = e[:, : codes_of.shape[1]] + (codes_of - e[:, : codes_of.shape[1]]).detach()
            return e.flip(0) if backwards else e

        found = replay_of(loop(images)).embed(1 - images.flip(0) if backwards else 1 - images)
        with paused():
            torch.testing.assert_close(found, loop(1 - images))

    def test_rows_that_were_drawn_stay(self, model, images):
        embeddings = model(images)
        drawn = torch.multinomial(embeddings.detach().norm(dim=1), 6, replacement=True)
        found = replay_of(embeddings[drawn]).again(seed=1)
        assert torch.equal(found, embeddings[drawn])

    def test_an_order_that_was_changed_in_place_stays(self, model, images):
        embeddings = model(images)
        order = embeddings.norm(dim=1).argsort()
        order[0] = order[1]
        order.add_(1).remainder_(8)
        found = replay_of(embeddings[order])
        assert torch.equal(found.again(), embeddings[order])
        with paused():
            torch.testing.assert_close(found.embed(1 - images[order]), model(1 - images)[order])

    def test_an_order_of_an_earlier_step_is_no_call_of_this_one(self, watch, model, images):
        order = model(images).norm(dim=1).argsort()
        watch.forget()
        replay = replay_of(model(images.flip(0))[order])
        assert [step.call is not None for step in replay._steps] == [True, False]
