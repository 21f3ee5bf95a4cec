"""Models, data and surroundings as users have them: each gives the numbers of the plain form, or is refused."""

import copy
import warnings
from functools import partial

import numpy
import pytest
import torch
from query_batches import Made, images_of, network
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from pml_adversarial import InputError, evaluate_robustness
from pml_adversarial.evaluation import certify, evaluate_targeted, evaluate_verification, robrank_scores
from pml_adversarial.evaluation.suites import quick, standard

EPS = 0.05
FAST = quick(5, 1)
IMAGES, LABELS = images_of()
MEAN, STD = (0.4,), (0.3,)


def numbers(report):
    return report.clean_flags, [(w.eps, w.robust_flags) for w in report.worst]


def evaluated(model=None, queries=(IMAGES, LABELS), gallery=None, **options):
    options = {"eps": EPS, "attacks": FAST, "checks": False} | options
    return evaluate_robustness(network() if model is None else model, queries, gallery, **options)


@pytest.fixture(scope="module")
def plain():
    found = numbers(evaluated())
    assert "0" in found[1][0][1]
    assert "1" in found[1][0][1]
    return found


class Items(Dataset):
    def __init__(self, make, count=24, **attributes):
        self.make, self.count = make, count
        vars(self).update(attributes)

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        if row >= self.count:
            raise IndexError(row)
        return self.make(row)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(IMAGES, LABELS.tolist(), strict=True))


def collated(items):
    images, labels = zip(*items, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels), "paths": ["somewhere"] * len(items)}


PAIRS = Items(lambda row: (IMAGES[row], int(LABELS[row])))
BATCHED = BatchSampler(range(24), 5, False)
DATA = {
    "arrays": (IMAGES.numpy(), LABELS.numpy()),
    "lists": (list(IMAGES), LABELS.tolist()),
    "list of both": [IMAGES, LABELS.tolist()],
    "double": (IMAGES.double(), LABELS),
    "channels last": (IMAGES.to(memory_format=torch.channels_last), LABELS.int()),
    "dict": {"images": IMAGES, "labels": LABELS},
    "data set": PAIRS,
    "data set with more": Items(lambda row: (IMAGES[row], LABELS[row], "path", row)),
    "data set of arrays": Items(lambda row: (IMAGES[row].numpy(), numpy.int64(LABELS[row]))),
    "data set of dicts": Items(lambda row: {"image": IMAGES[row], "label": int(LABELS[row]), "camera": 3}),
    "data set with targets": Items(PAIRS.make, targets=LABELS.tolist()),
    "tensors with more": TensorDataset(IMAGES, LABELS, LABELS),
    "subset": Subset(Items(lambda row: (IMAGES[row % 24], int(LABELS[row % 24])), 48), range(24)),
    "loader": DataLoader(PAIRS, batch_size=7),
    "shuffled loader": DataLoader(PAIRS, batch_size=7, shuffle=True),
    "loader of dicts": DataLoader(PAIRS, batch_size=7, collate_fn=collated),
    "loader by a batch sampler": DataLoader(PAIRS, batch_sampler=BATCHED),
    "loader without batches": DataLoader(PAIRS, batch_size=None),
    "loader of a stream": DataLoader(Stream(), batch_size=5),
    "loader of a part": DataLoader(
        Items(lambda row: (IMAGES[row % 24], int(LABELS[row % 24])), 48), sampler=SubsetRandomSampler(range(24))
    ),
}


class TestData:
    @pytest.mark.parametrize("form", DATA)
    def test_gives_the_numbers_of_two_tensors(self, form, plain):
        state = torch.get_rng_state()
        assert numbers(evaluated(queries=DATA[form])) == plain
        assert torch.equal(torch.get_rng_state(), state)

    def test_tensors_made_in_inference_mode(self, plain):
        with torch.inference_mode():
            queries = IMAGES.clone(), LABELS.clone()
        assert numbers(evaluated(queries=queries)) == plain

    def test_normalised_images_are_taken_back(self):
        shifted = network()
        model = nn.Sequential(Made(lambda x: x * STD[0] + MEAN[0]), shifted)
        expected = evaluated(model, ((IMAGES), LABELS), normalization=(MEAN, STD))
        normalised = (IMAGES - MEAN[0]) / STD[0]
        found = evaluated(model, (normalised, LABELS), normalization=(MEAN, STD))
        assert numbers(found) == numbers(expected)
        assert not expected.notes
        assert any("queries: normalised images" in note for note in found.notes)

    def test_a_little_beyond_is_not_taken_for_normalised(self):
        images = IMAGES.clone()
        images[3, 0, 0, 0] = -0.03
        with pytest.raises(InputError, match=r"clamp (its output|the images)"):
            evaluated(queries=(images, LABELS), normalization=(MEAN, STD))

    def test_bounds(self, plain):
        model = nn.Sequential(Made(lambda x: (x + 3) / 5), network())
        found = evaluated(model, (IMAGES * 5 - 3, LABELS), bounds=(-3, 2))
        assert numbers(found) == plain


class TestDataThatIsRefused:
    def test_random_augmentation_left_on(self):
        random = Items(lambda row: ((IMAGES[row] + 0.1 * torch.rand(1, 6, 6)).clamp(0, 1), int(LABELS[row])))
        with pytest.raises(InputError, match="queries: the same image is another one when it is read again"):
            evaluated(queries=random)
        with pytest.raises(InputError, match="gallery: the same image is another one"):
            evaluated(gallery=random)

    def test_labels_other_than_the_items_carry(self):
        wrong = Items(PAIRS.make, targets=LABELS.flip(0).tolist())
        with pytest.raises(InputError, match=r"queries: image 0 carries the label 0, but the .* list of labels says 3"):
            evaluated(queries=wrong)

    @pytest.mark.parametrize(
        ("queries", "message"),
        [
            ({"train": PAIRS, "val": PAIRS}, r"queries is a dict with the keys \['train', 'val'\].* such as 'train'"),
            (Items(lambda row: {"picture": 1, "kind": 2}), r"queries: an item is a dict .*\['kind', 'picture'\]"),
            (Items(lambda row: 3), "queries: an item is int; expected"),
            ((None, LABELS), "queries holds labels only"),
            ((IMAGES, list("abcdefghijklmnopqrstuvwx")), "queries has labels such as 'a'; expected whole numbers"),
            ((IMAGES.byte(), LABELS), "torch.uint8; expected floating point"),
            ((IMAGES[:0], LABELS[:0]), "queries holds no images"),
        ],
    )
    def test_forms(self, queries, message):
        with pytest.raises(InputError, match=message):
            evaluated(queries=queries)


class Wrapper:
    """A model of someone's own that is no module."""

    def __init__(self):
        self.net = network()

    def encode(self, images):
        return self.net(images)

    def __call__(self, images):
        return self.net(images)


class WithMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, images):
        raise AssertionError("not this way")

    def encode_image(self, images, scale=1.0):
        return scale * self.net(images)


def scripted():
    return torch.jit.script(network())


def traced():
    return torch.jit.trace(network().eval(), IMAGES)


def frozen(freeze=torch.jit.freeze):
    return freeze(torch.jit.script(network().eval()))


def checkpointed():
    net = network()
    return lambda images: checkpoint(net, images, use_reentrant=True)


MODELS = {
    "reentrant checkpoint": checkpointed,
    "function": lambda: (lambda net: lambda images: net(images))(network()),
    "object": Wrapper,
    "method": lambda: Wrapper().encode,
    "method of a module": lambda: WithMethod().encode_image,
    "partial": lambda: partial(WithMethod().encode_image, scale=2.0),
    "modules": lambda: list(network()),
    "trainer's models": lambda: {"trunk": network()[:4], "embedder": network()[4:]},
    "module dict": lambda: nn.ModuleDict({"trunk": network()[:4], "embedder": network()[4:]}),
    "script": scripted,
    "trace": traced,
    "frozen script": frozen,
    "frozen script in a module": lambda: nn.Sequential(nn.Identity(), frozen()),
    "frozen script in a function": lambda: (lambda net: lambda images: net(images))(frozen()),
}


class TestWhatModelsDo:
    def test_change_their_input_in_place(self, plain):
        net = network()

        def scaled(images):
            return net(images.mul_(2).div_(2))

        assert numbers(evaluated(scaled)) == plain
        first_in_place = nn.Sequential(nn.ReLU(inplace=True), *network())
        assert numbers(evaluated(first_in_place)) == plain

    def test_give_one_buffer_again_and_again(self, plain):
        net, buffer = network(), torch.zeros(64, 6)

        def engine(images):
            with torch.no_grad():
                buffer[: len(images)] = net(images.detach())
            return buffer[: len(images)]

        report = evaluated(engine, batch_size=5)
        assert report.clean_flags == evaluated(network(), batch_size=5).clean_flags

    def test_a_gradient_that_fails_is_noted(self):
        def service(images):
            return torch.from_numpy(images.numpy().reshape(len(images), -1)[:, :8].copy())

        (note,) = (note for note in evaluated(service).notes if "gradients" in note)
        assert note.startswith("asking for gradients fails, so attacks find none (RuntimeError: Can't call numpy()")

    def test_embeddings_that_are_nan_under_attack_are_told(self):
        net, images = network(), IMAGES

        def fragile(pixels):
            moved = (pixels.flatten(1)[:, None] != images.flatten(1)).any(2).all(1, keepdim=True)
            return torch.where(moved, torch.nan, net(pixels))

        report = evaluated(fragile)
        assert report.worst_case(EPS) == 0
        assert "embeddings of perturbed images were NaN or infinite; such a query finds nothing" in report.notes[-1]
        targeted = evaluate_targeted(fragile, (IMAGES, LABELS), target=1, eps=EPS, steps=3, restarts=1, square=5)
        assert targeted.success(EPS) == targeted.success(0)
        assert "embeddings of perturbed images were NaN" in targeted.notes[-1]

    def test_a_function_of_torch_func(self, plain):
        net = network().eval()

        def one_by_one(images):
            return torch.func.vmap(lambda image: net(image[None])[0])(images)

        assert evaluated(one_by_one).clean_flags == plain[0]

    def test_embeddings_of_other_dimensions_in_the_gallery(self):
        images = nn.functional.interpolate(IMAGES, scale_factor=2)
        with pytest.raises(InputError, match="Queries have embeddings of 36 dimensions, items of the gallery 144"):
            evaluated(nn.Flatten(), gallery=(images, LABELS))

    def test_sparse_embeddings(self, plain):
        net = network()
        assert evaluated(lambda images: net(images).to_sparse()).clean_flags == evaluated(network()).clean_flags

    def test_weights_without_a_shape(self):
        with pytest.raises(
            InputError, match=r"weights without a shape \(lazy modules\); expected one that was called once"
        ):
            evaluated(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))


class TestOtherShapes:
    @pytest.mark.parametrize("shape", [(36,), (1, 36), (2, 1, 3, 6)])
    def test_vectors_sounds_and_clips(self, shape, tmp_path):
        images, labels = images_of()
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 6))
        suite = standard(4, 2, 6, 1)
        flat = evaluate_robustness(net, (images, labels), eps=0.05, attacks=suite, checks=False)
        found = evaluate_robustness(net, (images.reshape(-1, *shape), labels), eps=0.05, attacks=suite, checks=False)
        assert [one.attack for one in found.attacks] == [one.attack for one in flat.attacks]
        assert found.clean_flags == flat.clean_flags
        assert found.worst_case(0.05) < found.clean["recall_at_1"]
        found.save_html(tmp_path / "report.html")


class TestOptions:
    def test_whole_numbers_of_numpy_and_one_attack_alone(self, plain):
        images = images_of()
        options = {"eps": 0.05, "checks": False}
        expected = evaluate_robustness(network(), images, attacks=quick(2, 1), seed=3, batch_size=5, **options)
        found = evaluate_robustness(
            network(), images, attacks=quick(2, 1), seed=numpy.int64(3), batch_size=numpy.int64(5), **options
        )
        assert found.worst == expected.worst
        (alone,) = evaluate_robustness(network(), images, attacks=quick(2, 1)[0], **options).attacks
        assert alone.attack == "margin"

    def test_a_generator_of_indices(self):
        report = evaluated(network(), subset=(row for row in range(3, 9)))
        assert report.settings["subset"] == [3, 4, 5, 6, 7, 8]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"seed": None}, "seed=None; expected a whole number"),
            ({"junk_label": [0, -1]}, r"junk_label=\[0, -1\]; expected a whole number, or None"),
            ({"attacks": None}, "attacks=None; expected one of standard"),
            ({"eps": [True]}, r"eps=\[True\]; expected one or more radii"),
            ({"ignore": [[True], [True, False]]}, "A mask is list, expected sequence of length 1"),
            (
                {"ignore": lambda rows: rows[:, 7]},
                "ignore fails for the indices of 24 queries, with IndexError: too many",
            ),
            ({"gallery_embeddings": "vectors.npy"}, "gallery_embeddings is str; expected a tensor or an array"),
        ],
    )
    def test_what_is_none(self, options, message):
        with pytest.raises(InputError, match=message):
            evaluate_robustness(network(), images_of(), **{"eps": 0.05, "attacks": "quick", **options})

    def test_embeddings_in_a_list(self):
        net, (images, labels) = network().eval(), images_of(30, seed=1)
        with torch.no_grad():
            known = list(net(images))
        found = evaluate_robustness(
            net, images_of(), (None, labels), eps=0.05, attacks=quick(2, 1), checks=False, gallery_embeddings=known
        )
        expected = evaluate_robustness(net, images_of(), (images, labels), eps=0.05, attacks=quick(2, 1), checks=False)
        assert found.clean_flags == expected.clean_flags

    def test_a_mask_function_of_numpy_that_is_asked_for_one_query(self):
        person = images_of()[1].numpy()

        def same(rows):
            return (person[rows][:, None] == person) & (numpy.arange(24)[rows][:, None] % 3 == numpy.arange(24) % 3)

        found = evaluate_robustness(
            network(), images_of(), eps=0.05, attacks=quick(2, 1), checks=False, ignore=same, batch_size=23
        )
        expected = evaluate_robustness(
            network(),
            images_of(),
            eps=0.05,
            attacks=quick(2, 1),
            checks=False,
            ignore=torch.tensor(same(numpy.arange(24))),
        )
        assert found.clean_flags == expected.clean_flags


class TestSizes:
    def test_a_gallery_of_other_sizes_than_the_queries(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.Flatten())
        images, labels = images_of(12)
        gallery = nn.functional.interpolate(images_of(20, seed=1)[0], scale_factor=2), images_of(20, seed=1)[1]
        report = evaluate_robustness(
            model, (images, labels), gallery, eps=0.05, attacks=standard(4, 2, 6, 1), checks=False, keep_attacked=True
        )
        assert report.attacked[0.05].shape == images.shape
        assert report.worst_case(0.05, target="gallery") < report.clean["recall_at_1"]

    def test_a_gallery_that_the_model_does_not_take(self):
        gallery = torch.rand(6, 3, 6, 6), torch.arange(6) % 4
        with pytest.raises(InputError, match=r"model fails on 1 image\(s\) of shape \(3, 6, 6\)"):
            evaluate_robustness(network(), images_of(), gallery, eps=0.05, attacks="quick")


class TestModels:
    @pytest.mark.parametrize("form", MODELS)
    def test_gives_the_numbers_of_a_module(self, form, plain):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            model = MODELS[form]()
        assert numbers(evaluated(model)) == plain

    def test_a_function_s_modules_are_in_eval_mode_and_come_back_in_theirs(self):
        net = network()
        modes = []

        def embed(images):
            modes.append(net[3].training)
            return net(images)

        assert net[3].training
        evaluated(embed)
        assert net[3].training
        assert set(modes[1:]) == {False}  # the first call finds the modules

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_types(self, dtype, plain):
        found = evaluated(network().to(dtype))
        assert found.settings["precision"].startswith(str(dtype).removeprefix("torch."))
        pairs = zip(numbers(found)[1][0][1], plain[1][0][1], strict=True)
        assert sum(one != other for one, other in pairs) <= (0 if dtype == torch.float64 else 4)

    def test_double_data_and_model_stay_double(self):
        seen = []
        model = network().double()
        evaluated(lambda images: (seen.append(images.dtype), model(images))[1], (IMAGES.double(), LABELS))
        assert set(seen) == {torch.float64}

    def test_another_default_type(self, plain):
        model = network()
        torch.set_default_dtype(torch.float64)
        try:
            assert numbers(evaluated(model)) == plain
        finally:
            torch.set_default_dtype(torch.float32)

    @pytest.mark.parametrize("surrounding", [torch.inference_mode, torch.no_grad])
    def test_surroundings(self, surrounding, plain):
        model = network()
        with surrounding():
            assert numbers(evaluated(model)) == plain
            assert torch.is_inference_mode_enabled() == (surrounding is torch.inference_mode)

    def test_autocast_reaches_the_model_and_not_the_search(self):
        """Similarities near 1, which bfloat16 cannot tell apart."""
        net = network()

        class Exact(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, images):
                with torch.autocast("cpu", enabled=False):
                    return nn.functional.normalize(self.net(images.float())) + 3

        expected = evaluated(Exact())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = evaluated(Exact())
            assert torch.is_autocast_enabled("cpu")
        assert numbers(found) == numbers(expected)
        seen = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            report = evaluated(lambda images: (seen.append(torch.is_autocast_enabled("cpu")), net(images))[1])
        assert all(seen)
        assert report.settings["precision"] == "float32 -> bfloat16, autocast cpu torch.bfloat16"

    def test_weights_made_in_inference_mode_are_refused(self):
        with torch.inference_mode():
            model = network()
        with pytest.raises(InputError, match=r"weights were made under torch\.inference_mode"):
            evaluated(model)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (
                lambda images: {"features": images.flatten(1)},
                r"returned dict for 1 images.*lambda images: model\(images\)",
            ),
            (lambda images: images.flatten(1)[0], r"returned \(36,\) for 1 images"),
            (lambda images: images.flatten(1).cfloat(), "returned torch.complex64"),
            (lambda images: images.flatten(1)[:, :0], r"of shape \(1, 0\)"),
            (
                lambda images: nn.functional.conv2d(images, torch.zeros(1, 3, 2, 2)),
                r"fails on 1 image.* RuntimeError: ",
            ),
            ("resnet18", "expected the model itself"),
            ({"net": nn.Flatten()}, r"model is a dict with the keys \['net'\]"),
        ],
    )
    def test_what_is_no_model_of_these_images(self, model, message):
        with pytest.raises(InputError, match=message):
            evaluated(model)

    def test_one_dimension_has_no_cosine(self):
        model = Made(lambda x: x.flatten(1)[:, :1])
        with pytest.raises(InputError, match=r"one dimension, .*distance='euclidean'"):
            evaluated(model)
        evaluated(model, distance="euclidean")

    def test_very_long_embeddings(self):
        wide = torch.randn(36, 32_768, generator=torch.Generator().manual_seed(0))
        report = evaluated(Made(lambda x: x.flatten(1) @ wide))
        assert 1 < report.collapse["effective_rank"] <= 24


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return (images * 15).round() / 15

    @staticmethod
    def backward(ctx, gradient):
        return None


PATTERNS = torch.rand(80, 1, 6, 6, generator=torch.Generator().manual_seed(2))


def without_gradient():
    weights = torch.randn(36, 16, generator=torch.Generator().manual_seed(1))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(36, 16))
    linear[1].weight.data = weights.T.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for_inference = frozen(torch.jit.optimize_for_inference)
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(linear), {nn.Linear}, dtype=torch.qint8)
    return {
        "no gradient given": lambda images: Rounded.apply(images).flatten(1) @ weights,
        "detached": lambda images: images.detach().flatten(1) @ weights,
        "quantised": quantised,
        "script for inference": for_inference,
        "numpy": lambda images: images.numpy().reshape(len(images), -1) @ weights.numpy(),
    }


@pytest.mark.filterwarnings("ignore:quantized.*autograd kernel was not registered")
class TestWithoutGradient:
    QUERIES = images_of(80, 4, spread=0.1)

    @pytest.mark.parametrize("form", without_gradient())
    def test_is_flagged(self, form):
        report = evaluated(without_gradient()[form], self.QUERIES, attacks=quick(5, 1), checks=True)
        assert "gradients are there" in {check.name for check in report.flagged}

    @pytest.mark.parametrize("form", without_gradient())
    def test_is_said_without_checks(self, form):
        model, labels = without_gradient()[form], self.QUERIES[1]
        few = {"steps": 1, "restarts": 1, "square": 0, "eps": EPS}
        reports = [
            evaluated(model, self.QUERIES, attacks=quick(1, 1), checks=False),
            evaluate_targeted(model, self.QUERIES, target=int(labels[0]), **few),
            evaluate_verification(model, self.QUERIES, genuine=4, impostors=4, checks=False, **few),
        ]
        for report in reports:
            (note,) = (note for note in report.notes if "gradient" in note)
            assert "embeddings have no gradient" in note or "asking for gradients fails" in note
            assert f"note: {note}" in str(report)

    @pytest.mark.parametrize("model", [network(), lambda images: images.flatten(1)], ids=["module", "function"])
    def test_of_others_nothing_is_said(self, model):
        report = evaluated(model, attacks=quick(1, 1))
        assert not any("gradient" in note for note in report.notes)

    def test_a_black_box_is_not_asked_for_what_it_cannot_give(self):
        square = [attack for attack in standard(queries=20) if attack.name == "square"]
        report = evaluated(without_gradient()["numpy"], self.QUERIES, attacks=square, checks=True)
        asked = {check.name: check.passed for check in report.checks}
        assert asked["gradients are there"] is None
        assert asked["same answer twice"]
        assert [check for check in report.checks if "not asked: the model cannot be asked" in check.message]

    def test_a_model_of_torch_is_asked_also_if_no_attack_needs_it(self):
        square = [attack for attack in standard(queries=20) if attack.name == "square"]
        report = evaluated(without_gradient()["detached"], self.QUERIES, attacks=square, checks=True)
        assert "gradients are there" in {check.name for check in report.flagged}


class TestOthersTakeThemToo:
    @pytest.mark.parametrize("form", ["arrays", "loader", "data set of dicts"])
    def test_robrank(self, form):
        options = {"eps": EPS, "steps": 2, "alpha": 0.02}
        expected = robrank_scores(network(), (IMAGES, LABELS), **options)
        model = MODELS["function"]()
        with torch.inference_mode():
            assert robrank_scores(model, DATA[form], **options).scores == expected.scores

    @pytest.mark.parametrize("form", ["arrays", "loader", "data set of dicts"])
    def test_certify(self, form):
        options = {
            "sigma": 0.1,
            "radii": 0.05,
            "samples": 60,
            "selection_samples": 20,
            "alpha": 0.05,
            "gallery_samples": 3,
        }
        expected = certify(network(), (IMAGES, LABELS), **options)
        with torch.inference_mode():
            found = certify(MODELS["function"](), DATA[form], **options, subset=[3, 0])
        assert found.queries.tolist() == [3, 0]
        assert torch.equal(found.radius, expected.radius[[3, 0]])
        assert torch.equal(found.right, expected.right[[3, 0]])

    @pytest.mark.parametrize("distance", ["euclidean", "inner_product"])
    def test_distances_that_they_are_not_defined_for(self, distance):
        with pytest.raises(InputError, match="expected 'cosine' or 'normalized_euclidean'"):
            robrank_scores(network(), (IMAGES, LABELS), eps=EPS, distance=distance)
        with pytest.raises(InputError, match="expected 'cosine' or 'normalized_euclidean'"):
            certify(network(), (IMAGES, LABELS), sigma=0.1, radii=0.1, distance=distance)
