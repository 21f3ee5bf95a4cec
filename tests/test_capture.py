import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as nn_module

from pml_adversarial import CaptureError
from pml_adversarial.capture import _WITH_KWARGS, InputCapture, chain_of


class Normalised(nn.Module):
    """A model inside a model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return functional.normalize(self.inner(images))


class TwoInputs(nn.Module):
    def forward(self, images, scale):
        return images.flatten(1) * scale


class PassedThrough(nn.Module):
    """Returns its part's output as it is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images)


def trunk_and_embedder():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16)), nn.Linear(16, 4)


def hooks_of(*models):
    return sum(len(m._forward_hooks) for model in models for m in model.modules())


def num_global_hooks():
    gc.collect()
    return len(nn_module._global_forward_hooks)


def in_order(modules, inputs):
    for module in modules:
        inputs = module(inputs)
    return inputs


class TestWatchedModels:
    def test_module(self, model, images):
        capture = InputCapture(model)
        assert capture.inputs_of(model(images)).equal(images)
        assert capture.modules == (model,)

    @pytest.mark.parametrize("container", [list, tuple, iter, nn.ModuleList])
    def test_sequence(self, images, container):
        modules = trunk_and_embedder()
        capture = InputCapture(container(modules))
        assert capture.inputs_of(in_order(modules, images)).equal(images)
        assert capture.modules == modules

    @pytest.mark.parametrize("container", [dict, nn.ModuleDict])
    def test_models_of_a_trainer(self, images, container):
        trunk, embedder = trunk_and_embedder()
        capture = InputCapture(container({"embedder": embedder, "trunk": trunk}))
        assert capture.inputs_of(embedder(trunk(images))).equal(images)
        assert capture.modules == (trunk, embedder)

    def test_models_without_embedder(self, model, images):
        capture = InputCapture({"trunk": model, "classifier": nn.Linear(4, 2)})
        assert capture.inputs_of(model(images)).equal(images)

    def test_identity_as_embedder(self, model, images):
        embedder = nn.Identity()
        capture = InputCapture({"trunk": model, "embedder": embedder})
        assert capture.inputs_of(embedder(model(images))).equal(images)

    def test_keyword_argument(self, images):
        model = nn.Linear(6, 2)
        assert InputCapture(model).inputs_of(model(input=images)).equal(images)

    def test_embed_runs_the_chain_unseen(self, images):
        modules = trunk_and_embedder()
        capture = InputCapture(modules)
        embeddings = in_order(modules, images)
        again = capture.embed(images)
        assert again.equal(embeddings)
        assert capture.knows(embeddings)
        assert not capture.knows(again)

    def test_watches_again_after_a_failed_embed(self, model, images):
        capture = InputCapture(model)
        with pytest.raises(RuntimeError):
            capture.embed(torch.rand(2, 3))
        assert capture.knows(model(images))

    def test_watch_takes_another_model(self, model, images):
        capture = InputCapture(model)
        other = copy.deepcopy(model)
        capture.watch(other)
        assert capture.knows(other(images))
        assert not capture.knows(model(images))
        assert hooks_of(model) == 0

    def test_inputs_carry_no_gradient(self, model, images):
        capture = InputCapture(model)
        assert not capture.inputs_of(model(images.requires_grad_())).requires_grad

    @pytest.mark.parametrize(
        "wrong", [{}, {"embedder": nn.Identity()}, nn.ModuleDict({"net": nn.Identity()}), [], "resnet", [1], 5]
    )
    def test_no_models(self, wrong):
        with pytest.raises(CaptureError, match="expected"):
            chain_of(wrong)


class TestSelfFinding:
    def test_plain_model(self, model, images):
        capture = InputCapture()
        assert capture.inputs_of(model(images)).equal(images)
        assert capture.modules == (model,)

    def test_trunk_and_embedder(self, images):
        modules = trunk_and_embedder()
        capture = InputCapture()
        assert capture.inputs_of(in_order(modules, images)).equal(images)
        assert capture.modules == modules

    def test_identity_as_embedder(self, model, images):
        capture = InputCapture()
        embeddings = nn.Identity()(model(images))
        assert capture.inputs_of(embeddings).equal(images)
        assert capture.modules == (model,)

    def test_nested_sequential(self, images):
        model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(36, 4))), nn.Sequential(nn.Tanh()))
        capture = InputCapture()
        assert capture.inputs_of(model(images)).equal(images)
        assert capture.modules == (model,)

    @pytest.mark.parametrize("outer", [Normalised, PassedThrough])
    def test_model_inside_model(self, model, images, outer):
        nested = outer(outer(model))
        capture = InputCapture()
        assert capture.inputs_of(nested(images)).equal(images)
        assert capture.modules == (nested,)

    def test_model_that_ends_in_place(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(inplace=True))
        capture = InputCapture()
        assert capture.inputs_of(model(images)).equal(images)
        assert capture.modules == (model,)

    def test_keyword_argument(self, images):
        model = nn.Linear(6, 2)
        embeddings = model(input=images)
        capture = InputCapture()
        if _WITH_KWARGS:
            assert capture.inputs_of(model(input=images)).equal(images)
        else:
            with pytest.raises(CaptureError, match="by position"):
                capture.inputs_of(model(input=images))
        assert not capture.knows(embeddings)

    def test_steps_after_the_first(self, model, images):
        capture = InputCapture()
        for batch in images.split(2):
            assert capture.inputs_of(model(batch)).equal(batch)

    def test_two_calls_before_the_first_question(self, model, images):
        capture = InputCapture()
        first, second = model(images[:4]), model(images[4:])
        assert capture.inputs_of(second).equal(images[4:])
        assert capture.inputs_of(first).equal(images[:4])

    def test_modules_that_run_beside_it_do_no_harm(self, model, images):
        capture = InputCapture()
        embeddings = model(images)
        nn.Linear(4, 2)(embeddings)
        assert capture.inputs_of(embeddings).equal(images)
        assert capture.modules == (model,)

    def test_two_captures_find_their_chains_at_once(self, model, images):
        one, other = InputCapture(), InputCapture()
        embeddings = model(images)
        assert one.inputs_of(embeddings).equal(images)
        assert other.inputs_of(embeddings).equal(images)

    def test_global_hook_is_gone_after_the_first_binding(self, model, images):
        before = num_global_hooks()
        capture = InputCapture()
        assert num_global_hooks() == before + 1
        capture.inputs_of(model(images))
        assert num_global_hooks() == before
        assert hooks_of(model) == 1

    def test_a_failed_question_leaves_it_searching(self, model, images):
        capture = InputCapture()
        with pytest.raises(CaptureError, match="AdversarialLoss"):
            capture.inputs_of(torch.rand(8, 4))
        assert capture.inputs_of(model(images)).equal(images)

    def test_global_hook_is_gone_when_the_capture_dies(self):
        before = num_global_hooks()
        capture = InputCapture()
        assert num_global_hooks() == before + 1
        del capture
        assert num_global_hooks() == before


@pytest.fixture(params=["given", "found"])
def capture(request, model):
    return InputCapture(model if request.param == "given" else None)


class TestEachCallHasItsInputs:
    def test_two_calls_before_the_loss(self, capture, model, images):
        capture.inputs_of(model(images))
        first, second = model(images[:4]), model(images[4:])
        assert capture.inputs_of(first).equal(images[:4])
        assert capture.inputs_of(second).equal(images[4:])
        assert capture.inputs_of(first).equal(images[:4])

    def test_passes_without_gradient_are_ignored(self, capture, model, images):
        embeddings = model(images)
        with torch.no_grad():
            silent = model(images[:2])
        with torch.inference_mode():
            model(images[:2])
        assert capture.inputs_of(embeddings).equal(images)
        assert not capture.knows(silent)


class TestErrors:
    @pytest.mark.parametrize(
        "change",
        [
            lambda e: e.detach(),
            lambda e: e.clone(),
            lambda e: torch.cat([e, e]),
            lambda e: functional.normalize(e),
            lambda e: e.double(),
            lambda e: e[:4],
            lambda e: e.view(-1, 2),
        ],
        ids=["detached", "cloned", "concatenated", "normalised", "cast", "sliced", "viewed"],
    )
    def test_embeddings_that_are_not_the_output_itself(self, capture, model, images, change):
        with pytest.raises(CaptureError, match="not known"):
            capture.inputs_of(change(model(images)))

    def test_embeddings_of_another_model(self, capture, model, images):
        capture.inputs_of(model(images))
        with pytest.raises(CaptureError, match="not known"):
            capture.inputs_of(copy.deepcopy(model)(images))

    def test_embeddings_computed_before(self, model, images):
        embeddings = model(images)
        with pytest.raises(CaptureError, match="not known"):
            InputCapture(model).inputs_of(embeddings)

    def test_embeddings_changed_in_place(self, capture, model, images):
        embeddings = model(images)
        embeddings.mul_(2)
        with pytest.raises(CaptureError, match="in place"):
            capture.inputs_of(embeddings)

    def test_output_of_the_trunk_changed_in_place(self, images):
        trunk, embedder = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), nn.ReLU(inplace=True)
        capture = InputCapture([trunk, embedder])
        with pytest.raises(CaptureError, match="Sequential was changed in place"):
            capture.inputs_of(embedder(trunk(images)))

    @pytest.mark.parametrize("known", [True, False])
    def test_several_inputs(self, images, known):
        model = TwoInputs()
        capture = InputCapture(model if known else None)
        with pytest.raises(CaptureError, match=r"TwoInputs was called with .*'Tensor', 'int'.* one tensor"):
            capture.inputs_of(model(images.requires_grad_(), 2))

    def test_inputs_that_are_no_tensor(self, model, images):
        class Unpacks(nn.Module):
            def forward(self, batch):
                return model(batch["images"])

        outer = Unpacks()
        capture = InputCapture(outer)
        with pytest.raises(CaptureError, match="'dict'"):
            capture.inputs_of(outer({"images": images}))

    def test_modules_that_were_not_run_one_after_the_other(self, images):
        trunk, embedder = trunk_and_embedder()
        capture = InputCapture([trunk, embedder])
        with pytest.raises(CaptureError, match="Sequential -> Linear"):
            capture.inputs_of(embedder(trunk(images).relu()))

    def test_is_a_runtime_error(self, model):
        with pytest.raises(RuntimeError):
            InputCapture(model).inputs_of(torch.rand(2, 2))


def inputs_live(run, images):
    """Whether the inputs of one pass live while its output does, and after it."""
    batch = images.clone()
    watched = weakref.ref(batch)
    output = run(batch)
    output.sum().backward()
    del batch
    gc.collect()
    meanwhile = watched() is not None
    del output
    gc.collect()
    return meanwhile, watched() is not None


RELEASED = (True, False)
NEVER_HELD = (False, False)


class TestMemory:
    def test_inputs_die_with_the_output(self, capture, model, images):
        assert inputs_live(model, images) == RELEASED
        capture.inputs_of(model(images))
        assert inputs_live(model, images) == RELEASED

    def test_inputs_die_with_the_output_of_a_chain(self, images):
        modules = trunk_and_embedder()
        capture = InputCapture(modules)
        assert inputs_live(lambda batch: in_order(modules, batch), images) == RELEASED
        assert capture.modules == modules

    def test_inputs_die_with_the_output_of_an_identity(self, model, images):
        modules = model, nn.Identity()
        capture = InputCapture({"trunk": modules[0], "embedder": modules[1]})
        assert inputs_live(lambda batch: in_order(modules, batch), images) == RELEASED
        assert capture.modules == modules

    def test_inputs_die_with_the_output_of_a_module_in_place(self, images):
        modules = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), nn.ReLU(inplace=True)
        capture = InputCapture(modules)
        assert inputs_live(lambda batch: in_order(modules, batch), images) == RELEASED
        assert capture.modules == modules

    def test_hooks_are_removed_when_the_capture_dies(self, model):
        capture = InputCapture([model, nn.Identity()])
        assert hooks_of(model) == 1
        del capture
        gc.collect()
        assert hooks_of(model) == 0

    def test_a_model_does_not_live_by_its_capture(self, model, images):
        capture = InputCapture()
        capture.inputs_of(model(images))
        capture.watch(nn.Identity())
        assert hooks_of(model) == 0


class TestCopies:
    def test_a_copied_model_is_not_watched(self, model, images):
        capture = InputCapture(model)
        copied = copy.deepcopy(model)
        embeddings = copied(images)
        assert not capture.knows(embeddings)
        assert capture.knows(model(images))
        assert inputs_live(copied, images) == NEVER_HELD

    def test_a_copied_model_learns_and_is_copied_again(self, model, images):
        capture = InputCapture(model)
        twice = copy.deepcopy(copy.deepcopy(model))
        twice(images).sum().backward()
        assert twice[1].weight.grad is not None
        assert model[1].weight.grad is None
        assert capture.modules == (model,)

    def test_a_capture_copied_alone_finds_the_same_model(self, capture, model, images):
        capture.inputs_of(model(images))
        copied = copy.deepcopy(capture)
        embeddings = model(images)
        assert copied.inputs_of(embeddings).equal(images)
        assert copied.modules == (model,)
        assert capture.inputs_of(embeddings).equal(images)

    def test_a_capture_copied_with_its_model_watches_the_copy(self, model, images):
        pair = {"model": model, "capture": InputCapture(model)}
        copied = copy.deepcopy(pair)
        embeddings = copied["model"](images)
        assert copied["capture"].inputs_of(embeddings).equal(images)
        assert not pair["capture"].knows(embeddings)
        assert not copied["capture"].knows(model(images))

    def test_a_capture_copied_before_its_model_watches_the_copy(self, model, images):
        copied = copy.deepcopy({"capture": InputCapture(model), "model": model})
        assert copied["capture"].inputs_of(copied["model"](images)).equal(images)

    def test_a_copy_that_still_searches(self, model, images):
        copied = copy.deepcopy(InputCapture())
        assert copied.inputs_of(model(images)).equal(images)

    def test_pickled_model(self, model, images):
        capture = InputCapture(model)
        capture.inputs_of(model(images))
        loaded = pickle.loads(pickle.dumps(model))
        assert torch.equal(loaded(images), model(images))
        assert not capture.knows(loaded(images))
        assert inputs_live(loaded, images) == NEVER_HELD

    def test_saved_model(self, model, images):
        capture = InputCapture(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert not capture.knows(loaded(images))

    def test_pickled_capture_finds_its_chain_anew(self, model, images):
        dumped = pickle.dumps(InputCapture(model))
        assert len(dumped) < 200  # it holds no model
        loaded = pickle.loads(dumped)
        assert loaded.modules == ()
        assert loaded.inputs_of(model(images)).equal(images)
