"""Rows are found by experiment: against each input exchanged by hand, one after the other."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pml_adversarial.errors import CaptureError
from pml_adversarial.training.pixels import PixelSpace
from pml_adversarial.training.replay import Replay
from pml_adversarial.training.rerun import rerun
from pml_adversarial.training.rows import find_rows
from pml_adversarial.training.sources import Choice, Sources
from pml_adversarial.training.trace import Fixed, steps_to
from pml_adversarial.training.tracing import ref_of
from pml_adversarial.training.watch import Watch


@pytest.fixture(autouse=True)
def watch():
    return Watch()


@pytest.fixture
def images(images):
    return images.double()


class Two(nn.Module):
    """Gives the features of its input in two tensors."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double()

    def forward(self, images):
        features = self.inner(images)
        return features, features.tanh()


@pytest.fixture
def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def two():
    torch.manual_seed(4)
    return Two()


def head():
    torch.manual_seed(3)
    return nn.Linear(4, 4).double()


def rows_of(*results, is_plain=False):
    refs = [ref_of(result) or Fixed(result) for result in results]
    steps = steps_to(refs)
    return find_rows(
        steps, lambda take: torch.cat(rerun(steps, refs, take)), Sources(steps, refs, Choice()), is_plain=is_plain
    )


def by_hand(loop, model, images):
    """For each embedding, the one image on which it depends; None: on none. Each image is exchanged for two others."""
    with torch.no_grad():
        clean = loop(model, images)
        moved = []
        for row in range(len(images)):
            changed = torch.zeros(len(clean), dtype=torch.bool)
            for other in (1 - images[row], images[row] * 0.3):
                exchanged = images.clone()
                exchanged[row] = other
                changed |= (loop(model, exchanged) != clean).any(1)
            moved.append(changed)
    found = [column.nonzero().flatten().tolist() for column in torch.stack(moved).T]
    assert max(map(len, found)) <= 1
    return [rows[0] if rows else None for rows in found]


ZEROS = torch.tensor([1.0, 0, 1, 0], dtype=torch.double)
PICK = torch.eye(8, dtype=torch.double)[[5, 3, 3, 0]]

LOOPS = {
    "flipped": lambda m, x: m(x).flip(0),
    "picked": lambda m, x: m(x)[[7, 0, 0, 3]],
    "a power of two and one more": lambda m, x: m(x)[[*range(8), 0]],
    "one alone": lambda m, x: m(x)[5:6] * 1,
    "one of one": lambda m, x: m(x[:1]) * 1,
    "two": lambda m, x: m(x[:2]).flip(0),
    "columns with zeros": lambda m, x: m(x) * ZEROS,
    "rows with zeros": lambda m, x: m(x) * (torch.arange(8) != 4)[:, None],
    "a product with zeros": lambda m, x: PICK @ m(x),
    "a product with zeros and nothing": lambda m, x: torch.eye(8, dtype=torch.double)[:, :5] @ m(x)[:5] + 0.5,
    "nan taken away": lambda m, x: torch.nan_to_num(m(x)),
    "nan taken away, then flipped": lambda m, x: m(x).nan_to_num().flip(0),
    "products after nan is taken away": lambda m, x: PICK @ m(x).nan_to_num(),
    "conditions that drop nan": lambda m, x: (lambda e: torch.where(e > -100, e, 0.0))(m(x)),
    "maximum, which keeps nan": lambda m, x: torch.maximum(m(x), torch.tensor(-0.05, dtype=x.dtype)),
    "fmax, which drops nan": lambda m, x: torch.fmax(m(x), torch.tensor(-9.0, dtype=x.dtype)).roll(3, 0),
    "the largest alone": lambda m, x: (lambda e: e * functional.one_hot(e.argmax(1), 4))(m(x)).flip(0),
    "two calls": lambda m, x: torch.cat([m(x[4:]), m(x[:4])]),
    "interleaved": lambda m, x: torch.stack([m(x[:4]), m(x[4:])], 1).flatten(0, 1),
    "one call for each": lambda m, x: torch.cat([m(x[i : i + 1]) for i in (3, 1, 7, 0)]),
    "a head after": lambda m, x: head()(m(x).flip(0)),
    "a head over nan taken away": lambda m, x: head()(m(x).nan_to_num()[[4, 4, 1]]),
    "two heads": lambda m, x: torch.cat([head()(m(x)), nn.Tanh()(m(x.flip(0)))]),
    "constants between": lambda m, x: torch.cat([x.new_zeros(2, 4), m(x), x.new_ones(1, 4)])[[2, 0, 9, 10]],
    "both outputs": lambda m, x: torch.cat(two()(x)),
    "both outputs in another order": lambda m, x: torch.cat(two()(x)[::-1]).flip(0),
    "divided by itself": lambda m, x: (lambda e: e / e.norm(dim=1, keepdim=True))(m(x)).roll(1, 0),
    "nothing is left": lambda m, x: torch.cat([m(x)[:0], m(x)[3:4]]),
}


def check_rows_of(loop, model, images):
    embeddings = loop(model, images)
    replay = Replay([ref_of(embeddings)], PixelSpace())
    expected = by_hand(loop, model, images)
    found = dict.fromkeys(range(len(embeddings)))
    known = range(len(replay.inputs)) if replay.known_rows is None else replay.known_rows.tolist()
    for row, image in zip(known, replay.inputs, strict=True):
        (found[row],) = (images == image).flatten(1).all(1).nonzero().flatten().tolist()
    for row, image in enumerate(expected):
        if image is None and found[row] is not None:  # it may take the image with a weight of 0
            exchanged = images.clone()
            exchanged[found[row]] = torch.nan
            assert not torch.equal(loop(model, exchanged)[row], embeddings[row])
        else:
            assert found[row] == image


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_each_embedding_has_the_row_that_it_depends_on(loop, model, images):
    check_rows_of(loop, model, images)


@pytest.mark.parametrize("seed", range(25))
def test_rows_of_random_loops(seed, images, model):
    """Cutting, joining, repeating, products and heads in any order."""
    torch.manual_seed(seed)
    numbers = torch.randint(0, 1000, (12,)).tolist()

    def loop(model, images):
        parts = [model(images[: 1 + numbers[0] % 7]), model(images[1 + numbers[0] % 7 :])]
        for number in numbers[1:]:
            one = parts[number % len(parts)]
            match number % 6:
                case 0:
                    parts.append(one.flip(0) * ZEROS)
                case 1:
                    parts.append(torch.cat(parts[:2]))
                case 2:
                    parts.append(one[number % len(one) :][:3])
                case 3:
                    parts.append(one.repeat_interleave(1 + number % 2, 0).nan_to_num())
                case 4:
                    parts.append(head()(functional.normalize(one)))
                case 5:
                    parts.append(torch.eye(len(one) + 1, dtype=one.dtype)[:, 1:] @ one + 0.1)
        return torch.cat(parts[-3:])

    check_rows_of(loop, model, images)


class TestFound:
    def test_sources_are_counted_each(self, images, model):
        first, second = model(images[:5]), model(images[5:])
        rows = rows_of(torch.cat([second, first]))
        assert sorted([set(rows.source[:3].tolist()), set(rows.source[3:].tolist())], key=min) == [{0}, {1}]
        assert rows.row.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
        assert not rows.in_order
        assert not rows.apart

    def test_several_results_follow_one_another(self, images, model):
        rows = rows_of(model(images).flip(0), torch.rand(2, 4).double(), model(images[:2]))
        assert (rows.source >= 0).tolist() == [True] * 8 + [False] * 2 + [True] * 2
        assert rows.row[rows.source >= 0].tolist() == [*range(7, -1, -1), 0, 1]
        assert rows.source[0] != rows.source[-1]

    @pytest.mark.parametrize(
        ("change", "in_order", "apart"),
        [
            (functional.normalize, True, True),
            (lambda e: e * torch.arange(8)[:, None], True, False),
            (lambda e: e.view(8, 2, 2).flatten(1), True, False),
            (lambda e: e.view(-1, 2, 2).flatten(1), True, True),
            (lambda e: torch.stack([row * 2 for row in e]), True, False),
            (lambda e: e[:7] * 1, False, False),
            (lambda e: e.flip(0), False, False),
        ],
        ids=range(7),
    )
    def test_rows_in_order_may_be_taken_apart_where_the_tail_allows_it(self, model, images, change, in_order, apart):
        rows = rows_of(change(model(images)))
        assert (rows.in_order, rows.apart) == (in_order, apart)

    def test_a_batch_of_two_is_tried_with_another_number_of_rows(self, model, images):
        rows = rows_of(torch.stack([row * 2 for row in model(images[:2])]))
        assert (rows.in_order, rows.apart) == (True, False)

    def test_what_was_detached_has_none(self, model, images):
        rows = rows_of((lambda e: torch.cat([e, e.detach().flip(0)]))(model(images)))
        assert rows.row[:8].tolist() == list(range(8))
        assert (rows.source >= 0).tolist() == [True] * 8 + [False] * 8

    def test_modules_do_not_run(self, model, images):
        made = functional.normalize(nn.Tanh()(model(images).flip(0)))
        ran = []
        model.register_forward_hook(lambda *_: ran.append(1))
        rows_of(made)
        assert not ran

    def test_a_function_that_draws_random_numbers(self, model, images):
        made = functional.dropout(model(images), 0.2)
        before = made.detach().clone()
        rows = rows_of(made)
        assert torch.equal(made, before)
        assert rows.row.tolist() == list(range(8))
        assert not rows.apart


MIXED = {
    "two of them": (lambda e: e[:4] + e[4:], [0, 4]),
    "two of them, with zeros": (lambda e: (torch.eye(8) + torch.eye(8).roll(3, 1)).double() @ e, [0, 3]),
    "two of them without nan": (lambda e: e[:4].nan_to_num() * e[4:].nan_to_num(), [0, 4]),
    "three": (lambda e: e[:6].view(3, 2, 4).sum(0), [0, 2, 4]),
    "all": (lambda e: e - e.mean(0), None),
    "all, by their order": (lambda e: e.sort(0).values, None),
    "all, by the largest": (lambda e: e / e.abs().max(), None),
}


class TestMixed:
    @pytest.mark.parametrize("case", MIXED)
    def test_the_rows_are_told(self, model, images, case):
        change, among = MIXED[case]
        with pytest.raises(CaptureError, match="Embedding 0 depends on") as error:
            rows_of(change(model(images)))
        if among is None:
            assert "8 inputs" in str(error.value)
            assert "mixed" in str(error.value)
        else:
            assert f"several inputs: {', '.join(map(str, among))};" in str(error.value)

    def test_the_first_that_mixes_is_named_and_what_stands_between(self, model, images):
        output = model(images)
        made = functional.normalize(output)
        mixed = torch.cat([made[:6], made[6:7].add(made[7:])])
        with pytest.raises(CaptureError, match=r"Embedding 6 depends on several inputs: 6, 7;.*normalize.*add"):
            rows_of(mixed)

    def test_rows_of_several_calls_are_counted_through(self, model, images):
        with pytest.raises(CaptureError, match="several inputs: 0, 4;"):
            rows_of(model(images[:4]) + model(images[4:]))

    @pytest.mark.parametrize("cure", ["stacked inputs", "in the loss"])
    def test_the_cures_are_true(self, model, images, labels, cure):
        from pytorch_metric_learning.losses import ContrastiveLoss

        from pml_adversarial import AdversarialLoss

        class Centred(nn.Module):
            def __init__(self, loss):
                super().__init__()
                self.loss = loss

            def forward(self, embeddings, labels):
                return self.loss(embeddings - embeddings.mean(0), labels)

        if cure == "in the loss":
            loss_func = AdversarialLoss(Centred(ContrastiveLoss()), model, warmup=0, eps=0.1)
            value = loss_func(model(images), labels)
        else:
            views = torch.stack([images, images.flip(3)], 1)
            loss_func = AdversarialLoss(
                ContrastiveLoss(), lambda x: (model(x[:, 0]) + model(x[:, 1])) / 2, warmup=0, eps=0.1
            )
            value = loss_func((model(images) + model(images.flip(3))) / 2, labels, inputs=views)
        value.backward()
        assert loss_func.records.loss_after > loss_func.records.loss_before
        assert loss_func.records.num_perturbed == 8
