import copy
import gc
import io
import pickle
import re
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as nn_module

from pml_adversarial import CaptureError
from pml_adversarial.training.replay import _WITH_KWARGS, InputCapture, _concatenation, _ranges, chain_of


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


class AnyOf(nn.Module):
    """Takes batches of any shape, and of the types of its parts."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, images):
        parts = {next(part.parameters()).dtype: part for part in self.parts}
        return parts.get(images.dtype, self.parts[0])(images.to(images.dtype if len(parts) > 1 else torch.float))


class PassedThrough(nn.Module):
    """Returns its part's output as it is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images)


class Reversed(torch.autograd.Function):
    """Looks like a view of its input, and is not the same to a gradient."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def trunk_and_embedder():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16)), nn.Linear(16, 4)


def hooks_of(*models):
    return sum(len(m._forward_hooks) for model in models for m in model.modules())


def num_global_hooks():
    gc.collect()
    return len(nn_module._global_forward_hooks)


def global_state():
    gc.collect()
    return {name: len(value) for name, value in vars(nn_module).items() if re.match("_global_.*hooks", name)}


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

    def test_nothing_global_is_left(self, model, images):
        before = global_state()
        for ends in (lambda capture: capture.inputs_of(model(images)), lambda capture: capture.watch(model), id):
            capture = InputCapture()
            assert global_state() != before
            ends(capture)
            del capture
            assert global_state() == before

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


class TestRowsOfSeveralCalls:
    """A concatenation of outputs has the concatenated inputs."""

    @pytest.mark.parametrize("cat", [torch.cat, torch.concat, torch.vstack, lambda parts: torch.cat(parts, dim=-2)])
    @pytest.mark.parametrize("sizes", [[4, 4], [3, 5], [1, 1, 6], [8]], ids=str)
    def test_of_outputs_that_live(self, capture, model, images, cat, sizes):
        parts = [model(batch) for batch in images.split(sizes)]
        assert capture.inputs_of(cat(parts)).equal(images)
        assert capture.modules == (model,)

    def test_of_outputs_that_are_gone(self, capture, model, images):
        for _ in range(2):  # the second time, the model is known
            embeddings = torch.cat([model(batch) for batch in images.split(2)])
            gc.collect()
            assert capture.inputs_of(embeddings).equal(images)
        assert capture.modules == (model,)

    def test_of_inputs_that_are_gone(self, capture, model, images):
        frozen = nn.Sequential(model[0], model[1].requires_grad_(False), model[2], model[3])  # saves none of them
        capture.watch(frozen)
        embeddings = torch.cat([frozen(images[:4].clone()), frozen(images[4:].clone())])
        gc.collect()
        assert capture.inputs_of(embeddings).equal(images)

    def test_in_their_order(self, capture, model, images):
        first, second = model(images[:4]), model(images[4:])
        assert capture.inputs_of(torch.cat([second, first])).equal(torch.cat([images[4:], images[:4]]))
        assert capture.inputs_of(torch.cat([first, first])).equal(torch.cat([images[:4], images[:4]]))

    @pytest.mark.parametrize("known", [True, False])
    @pytest.mark.parametrize("identity", [True, False])
    def test_of_a_chain(self, images, known, identity):
        modules = (*trunk_and_embedder(), nn.Identity()) if identity else trunk_and_embedder()
        capture = InputCapture(modules if known else None)
        for _ in range(2):
            embeddings = torch.cat([in_order(modules, images[:4]), in_order(modules, images[4:])])
            assert capture.inputs_of(embeddings).equal(images)
        assert capture.modules == (modules if known else modules[:2])

    def test_each_call_is_still_known_alone(self, capture, model, images):
        first, second = model(images[:4]), model(images[4:])
        capture.inputs_of(torch.cat([first, second]))
        assert capture.inputs_of(first).equal(images[:4])
        assert capture.inputs_of(second).equal(images[4:])

    def test_carry_no_gradient(self, capture, model, images):
        parts = [model(batch.clone().requires_grad_()) for batch in images.split(4)]
        assert not capture.inputs_of(torch.cat(parts)).requires_grad

    def test_are_those_that_the_model_embeds_to_them(self, capture, model, images):
        embeddings = torch.cat([model(images[:4]), model(images[4:])])
        source = capture.source_of(embeddings)
        assert source.columns == slice(None)
        assert capture.embed(source.inputs).allclose(embeddings)

    def test_after_a_backward_pass_while_the_outputs_live(self, capture, model, images):
        parts = [model(batch) for batch in images.split(4)]
        embeddings = torch.cat(parts)
        embeddings.sum().backward(retain_graph=True)
        assert capture.inputs_of(embeddings).equal(images)

    @pytest.mark.parametrize(
        "change",
        [
            lambda a, b: torch.cat([a, b], dim=1),
            lambda a, b: torch.cat([a, b], dim=-1),
            lambda a, b: torch.cat([a, b + 0]),
            lambda a, b: torch.cat([a, b.detach()]),
            lambda a, b: torch.cat([a, torch.rand(4, 4)]),
            lambda a, b: torch.cat([a, functional.normalize(b)]),
            lambda a, b: torch.cat([a, b[:2]]),
            lambda a, b: torch.cat([a[:, :2], b[:, :2]]),
            lambda a, b: torch.cat([a, b])[:, :2],
            lambda a, b: torch.cat([a, b])[:4],
            lambda a, b: torch.cat([torch.cat([a, b]), b]),
            lambda a, b: torch.cat([a, b]).clone(),
            lambda a, b: torch.stack([a, b]).flatten(0, 1),
            lambda a, b: torch.cat([a, b.double()]),
        ],
        ids=[
            *(
                "columns",
                "last dim",
                "copied part",
                "detached part",
                "foreign part",
                "normalised part",
                "rows of a part",
            ),
            *("columns of the parts", "columns of it", "rows of it", "nested", "cloned", "stacked", "of two dtypes"),
        ],
    )
    def test_of_anything_else_are_not_known(self, capture, model, images, change):
        first, second = model(images[:4]), model(images[4:])
        with pytest.raises(CaptureError, match="not known"):
            capture.inputs_of(change(first, second))
        assert capture.inputs_of(torch.cat([first, second])).equal(images)

    def test_cast_to_the_widest_type(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        capture = InputCapture(model)
        half = copy.deepcopy(model).bfloat16()
        capture.watch(AnyOf(model, half))
        embeddings = torch.cat([capture.modules[0](images[:4]), capture.modules[0](images[4:].bfloat16())])
        with pytest.raises(CaptureError, match="not known"):
            capture.inputs_of(embeddings)

    @pytest.mark.parametrize("lives", [True, False])
    def test_of_a_part_that_was_changed_unseen_by_autograd(self, capture, model, images, lives):
        def embed(batch, kept):
            output = model(batch)
            with torch.no_grad():
                output.clamp_(-0.01, 0.01)
            kept += [output] if lives else []
            return output

        kept = []
        embeddings = torch.cat([embed(batch, kept) for batch in images.split(4)])
        with pytest.raises(CaptureError, match="in place"):
            capture.inputs_of(embeddings)

    def test_of_a_part_that_was_changed_before(self, capture, model, images):
        first, second = model(images[:4]), model(images[4:])
        embeddings = torch.cat([first.mul_(2), second])
        with pytest.raises(CaptureError, match="in place"):
            capture.inputs_of(embeddings)

    def test_changed_afterwards(self, capture, model, images):
        embeddings = torch.cat([model(images[:4]), model(images[4:])])
        with torch.no_grad():
            embeddings.mul_(2)
        with pytest.raises(CaptureError, match="not known"):
            capture.inputs_of(embeddings)

    @pytest.mark.parametrize("other", [torch.rand(4, 36), torch.rand(4, 1, 6, 6, dtype=torch.double)])
    def test_of_inputs_that_make_no_batch(self, images, other):
        model = AnyOf(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))
        capture = InputCapture(model)
        embeddings = torch.cat([model(images[:4]), model(other)])
        found = rf"\(4, 1, 6, 6\) torch.float32 on cpu, {re.escape(str(tuple(other.shape)))} {other.dtype} on cpu"
        with pytest.raises(CaptureError, match=found):
            capture.inputs_of(embeddings)


class TestColumns:
    """A range of an output's columns has the output's inputs, and is remembered."""

    @pytest.mark.parametrize(
        ("pick", "columns"),
        [
            (lambda e: e[:, 1:3], slice(1, 3)),
            (lambda e: e[:, :2], slice(0, 2)),
            (lambda e: e[:, 2:], slice(2, 4)),
            (lambda e: e[:, -1:], slice(3, 4)),
            (lambda e: e[:, :], slice(0, 4)),
            (lambda e: e[:, 0:4], slice(0, 4)),
            (lambda e: e[..., 1:2], slice(1, 2)),
            (lambda e: e[:, 1:][:, 1:2], slice(2, 3)),
            (lambda e: e.narrow(1, 1, 3), slice(1, 4)),
            (lambda e: e.split([1, 3], 1)[1], slice(1, 4)),
            (lambda e: e.chunk(2, 1)[1], slice(2, 4)),
        ],
        ids=range(11),
    )
    def test_are_found(self, capture, model, images, pick, columns):
        for _ in range(2):
            embeddings = pick(model(images))
            gc.collect()
            source = capture.source_of(embeddings)
            assert source.inputs.equal(images)
            assert source.columns == columns
            assert capture.embed(source.inputs)[:, source.columns].equal(embeddings)

    def test_of_one_row(self, capture, model, images):
        assert capture.source_of(model(images[:1])[:, 1:3]).columns == slice(1, 3)

    @pytest.mark.parametrize("known", [True, False])
    def test_of_a_chain(self, images, known):
        modules = (*trunk_and_embedder(), nn.Identity())
        capture = InputCapture(modules if known else None)
        for _ in range(2):
            source = capture.source_of(in_order(modules, images)[:, 1:3])
            assert source.inputs.equal(images)
            assert source.columns == slice(1, 3)

    def test_of_an_output_that_is_itself_a_view(self, images):
        class LastColumns(nn.Module):
            def forward(self, batch):
                return batch.flatten(1).mul(2)[:, 30:].transpose(0, 1)

        model = LastColumns()
        capture = InputCapture(model)
        output = model(images.requires_grad_())
        embeddings = output[:, 2:5]
        assert capture.source_of(embeddings).columns == slice(2, 5)
        assert output[:, capture.source_of(embeddings).columns].equal(embeddings)

    def test_after_a_backward_pass_while_the_output_lives(self, capture, model, images):
        output = model(images)
        output[:, :2].sum().backward(retain_graph=True)
        assert capture.source_of(output[:, 2:]).columns == slice(2, 4)

    def test_changed_in_place(self, capture, model, images):
        output = model(images)
        before = output[:, :2]
        with torch.no_grad():
            output[:, 3] += 1
        with pytest.raises(CaptureError, match="not known"):
            capture.inputs_of(before)
        with pytest.raises(CaptureError, match="in place"):
            capture.inputs_of(output[:, :2])
        with pytest.raises(CaptureError, match="not known"):
            capture.inputs_of(model(images)[:, :2].mul_(2))

    def test_of_the_whole_output_are_all(self, capture, model, images):
        assert capture.source_of(model(images)).columns == slice(None)

    @pytest.mark.parametrize("change", [lambda e: e.detach()[:, :2], lambda e: e.expand(8, 4)[:, :2]])
    def test_of_something_else_are_not_known(self, capture, model, images, change):
        with pytest.raises(CaptureError, match="not known"):
            capture.inputs_of(change(model(images)))

    def test_knows_which(self, capture, model, images):
        output = model(images)
        assert capture.knows(output[:, :2], slice(0, 2))
        assert not capture.knows(output[:, 2:], slice(0, 2))
        assert capture.knows(output, slice(None))
        assert not capture.knows(output, slice(0, 2))


@pytest.mark.parametrize("names", [_concatenation, _ranges])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_names_of_operations_are_those_with_gradient(names, mode):
    with mode():
        assert names.__wrapped__() == names()
    assert names() is not type(None)
    assert type(None) not in (names() if isinstance(names(), set) else ())


class TestErrors:
    @pytest.mark.parametrize(
        "change",
        [
            lambda e: e.detach(),
            lambda e: e.detach().requires_grad_(),
            lambda e: e.clone(),
            lambda e: functional.normalize(e),
            lambda e: e.double(),
            lambda e: e[:4],
            lambda e: e[:, 1],
            lambda e: e[:, ::2],
            lambda e: e[:, [0, 1]],
            lambda e: e[torch.arange(7, -1, -1)],
            lambda e: e.flip(1),
            lambda e: e.view(-1, 2),
            lambda e: e[:4].t(),
            lambda e: Reversed.apply(e),
        ],
        ids=[
            *("detached", "cut off", "cloned", "normalised", "cast", "rows", "one column", "every other column"),
            *("copied columns", "permuted rows", "permuted columns", "viewed", "transposed", "reversed gradient"),
        ],
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

    @pytest.mark.parametrize("made_of", [lambda e: e, lambda e: torch.cat([e, e])], ids=["itself", "rows"])
    def test_search_that_ends_before_the_images(self, images, made_of):
        trunk, embedder = trunk_and_embedder()
        capture = InputCapture()
        with pytest.raises(CaptureError, match=r"Linear gave .* further back .*name the model"):
            capture.inputs_of(made_of(embedder(trunk(images).sigmoid())))
        assert capture.inputs_of(made_of(embedder(trunk(images)))).equal(made_of(images))
        assert capture.modules == (trunk, embedder)

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
    @pytest.mark.parametrize("known", [True, False])
    def test_may_end_while_the_model_runs(self, model, images, known):
        captures = []
        model.register_forward_hook(lambda *_: captures.clear())
        expected = model(images)
        captures.append(InputCapture(model if known else None))
        assert torch.equal(model(images), expected)

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

    @pytest.mark.parametrize("pick", [lambda e: torch.cat([e, e]), lambda e: e[:, :2]], ids=["rows", "columns"])
    @pytest.mark.parametrize("walked", [True, False])
    def test_inputs_die_with_what_was_made_of_the_output(self, capture, model, images, pick, walked):
        for asked in (False, True):
            batch = images.clone()
            watched = weakref.ref(batch)
            made = pick(model(batch))
            loss = made.sum()
            del batch
            if asked:
                assert capture.knows(made)
            if walked:
                loss.backward()  # from then on the loss keeps nothing
            del made
            gc.collect()
            assert (watched() is None) == walked
            del loss
            gc.collect()
            assert watched() is None

    def test_a_loss_that_is_kept_keeps_no_inputs(self, capture, model, images):
        losses, watched = [], []
        for _ in range(3):
            batch = images.clone()
            watched.append(weakref.ref(batch))
            losses.append(model(batch).sum())
            losses[-1].backward()
        del batch
        gc.collect()
        assert [batch() for batch in watched] == [None] * 3

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

    @pytest.mark.parametrize("known", [True, False])
    def test_an_output_that_its_argument_holds_dies(self, images, known):
        class Remembers(nn.Module):
            def forward(self, batch, memory):
                memory.append(batch * 2)
                return memory[-1]

        model = Remembers()
        _kept = InputCapture(model if known else None)
        memory = []
        watched = weakref.ref(model(images.requires_grad_(), memory))
        assert watched() is not None
        del memory
        gc.collect()
        assert watched() is None

    def test_inputs_that_a_graph_kept_die_with_the_capture(self, model, images):
        model[1].requires_grad_(False)  # it saves none of its inputs
        capture = InputCapture(model)
        batch = images.clone()
        watched = weakref.ref(batch)
        loss = model(batch).sum()
        del batch
        gc.collect()
        assert watched() is not None
        del capture
        gc.collect()
        assert watched() is None
        assert loss.requires_grad

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
