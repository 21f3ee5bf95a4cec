"""Models that were saved in every way, and what does not come back as a model."""

import argparse
import sys

import pytest
import torch
from notes import Notes
from torch import nn
from torch.export import Dim

from pml_adversarial import InputError
from pml_adversarial.cli.models import check_model, load_model
from pml_adversarial.training.isolation import isolated


def export(path, model, images, **batch):
    shapes = ({0: Dim("batch", **batch)},)
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=shapes), path)
    return path


def weights(path, saved):
    torch.save(saved, path)
    return path


def blank():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 4))


class TestExported:
    def test_gives_the_same_embeddings_and_gradients(self, tmp_path, moody_model, images):
        path = export(tmp_path / "model.pt2", moody_model.eval(), images)
        loaded = load_model(path)
        found, expected = images.clone().requires_grad_(), images.clone().requires_grad_()
        for inputs, model in ((found, loaded), (expected, moody_model)):
            model(inputs).square().sum().backward()
        torch.testing.assert_close(loaded(images), moody_model(images))
        torch.testing.assert_close(found.grad, expected.grad)

    def test_is_isolated_like_any_other(self, tmp_path, moody_model, images):
        loaded = load_model(export(tmp_path / "model.pt2", moody_model.eval(), images))
        before = {name: value.clone() for name, value in loaded.state_dict().items()}
        modes = [module.training for module in loaded.modules()]
        with isolated(loaded):
            assert not any(parameter.requires_grad for parameter in loaded.parameters())
            torch.testing.assert_close(loaded(images[:3]), moody_model(images[:3]))
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        assert [module.training for module in loaded.modules()] == modes
        assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())

    def test_may_be_asked_for_a_mode(self, tmp_path, moody_model, images):
        loaded = nn.Sequential(load_model(export(tmp_path / "model.pt2", moody_model.eval(), images)))
        for mode in (False, True):
            assert loaded.train(mode)[0].training is mode
            torch.testing.assert_close(loaded(images), moody_model(images))

    @pytest.mark.parametrize("name", ["model.pt2", "model.pt"])
    def test_whatever_it_is_called(self, tmp_path, model, images, name):
        torch.testing.assert_close(load_model(export(tmp_path / name, model, images))(images), model(images))

    def test_goes_to_the_device(self, tmp_path, model, images):
        loaded = load_model(export(tmp_path / "model.pt2", model, images), device="meta")
        assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}

    def test_fixed_batch_is_refused_with_what_to_do(self, tmp_path, model, images):
        torch.export.save(torch.export.export(model, (images,)), tmp_path / "model.pt2")
        with pytest.raises(InputError, match=r"batches of exactly 8 image.*dynamic_shapes=") as refused:
            load_model(tmp_path / "model.pt2")
        advice = str(refused.value).split("`")[1]
        program = eval(advice, {"torch": torch, "model": model, "images": images})
        torch.export.save(program, tmp_path / "model.pt2")
        assert load_model(tmp_path / "model.pt2")(images[:3]).shape == (3, 4)

    @pytest.mark.parametrize("decomposed", [False, True])
    @pytest.mark.parametrize(
        ("layer", "moody"),
        [
            (nn.BatchNorm2d(1), True),
            (nn.Dropout(0.5), True),
            (nn.InstanceNorm2d(1), False),
            (nn.BatchNorm2d(1, track_running_stats=False), False),
            (nn.GroupNorm(1, 1), False),
        ],
    )
    def test_train_mode_is_refused_where_it_shows(self, tmp_path, images, layer, moody, decomposed):
        program = torch.export.export(
            nn.Sequential(layer, nn.Flatten()).train(), (images,), dynamic_shapes=({0: Dim("b")},)
        )
        torch.export.save(program.run_decompositions() if decomposed else program, tmp_path / "model.pt2")
        if moody:
            with pytest.raises(InputError, match=r"exported in train mode.*model\.eval\(\)"):
                load_model(tmp_path / "model.pt2")
        else:
            check_model(load_model(tmp_path / "model.pt2"), images)

    def test_dropout_of_attention_is_seen(self, tmp_path):
        class Attention(nn.Module):
            def forward(self, x):
                return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1 * self.training).flatten(1)

        sequences = torch.rand(4, 1, 3, 5)
        load_model(export(tmp_path / "model.pt2", Attention().eval(), sequences))
        with pytest.raises(InputError, match="exported in train mode"):
            load_model(export(tmp_path / "model.pt2", Attention().train(), sequences))

    def test_two_inputs_are_refused(self, tmp_path, images):
        class Sum(nn.Module):
            def forward(self, first, second):
                return (first + second).flatten(1)

        batch = {0: Dim("batch")}
        program = torch.export.export(Sum(), (images, images), dynamic_shapes=(batch, batch))
        torch.export.save(program, tmp_path / "model.pt2")
        with pytest.raises(InputError, match="takes the inputs first, second; expected one"):
            load_model(tmp_path / "model.pt2")

    def test_network_beside_it_is_refused(self, tmp_path, model, images):
        with pytest.raises(InputError, match="is a whole model; expected no network"):
            load_model(export(tmp_path / "model.pt2", model, images), blank)

    def test_half_a_file_is_refused(self, tmp_path, model, images):
        path = export(tmp_path / "model.pt2", model, images)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(InputError, match=r"model\.pt2 cannot be read.*Save its weights with"):
            load_model(path)


class TestWeights:
    @pytest.mark.parametrize(
        "saved",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {"model": state},
            lambda state: {"model_state_dict": state, "optimizer": {}},
            lambda state: {"model": {"state_dict": state}},
            lambda state: {f"module.{name}": value for name, value in state.items()},
            lambda state: {"state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}},
            lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        ],
    )
    def test_fill_the_network(self, tmp_path, model, images, saved):
        loaded = load_model(weights(tmp_path / "weights.pth", saved(model.state_dict())), blank)
        assert torch.equal(loaded(images), model(images))

    def test_a_prefix_that_is_the_networks_own_stays(self, tmp_path, model, images):
        path = weights(tmp_path / "weights.pt", nn.ModuleDict({"module": model}).state_dict())

        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = blank()

            def forward(self, x):
                return self.module(x)

        assert torch.equal(load_model(path, Wrapper)(images), model(images))

    def test_safetensors(self, tmp_path, model, images):
        from safetensors.torch import save_file

        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        assert torch.equal(load_model(tmp_path / "weights.safetensors", blank)(images), model(images))

    def test_safetensors_without_the_package(self, tmp_path, monkeypatch):
        (tmp_path / "weights.safetensors").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(InputError, match="needs the package safetensors"):
            load_model(tmp_path / "weights.safetensors", blank)

    def test_go_to_the_device(self, tmp_path, model):
        loaded = load_model(weights(tmp_path / "weights.pt", model.state_dict()), blank, device="meta")
        assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}

    def test_need_a_network(self, tmp_path, model):
        with pytest.raises(InputError, match="holds weights only"):
            load_model(weights(tmp_path / "weights.pt", model.state_dict()))

    def test_network_that_is_none(self, tmp_path, model):
        with pytest.raises(InputError, match=r"The network is a list; expected a torch\.nn\.Module"):
            load_model(weights(tmp_path / "weights.pt", model.state_dict()), list)

    def test_misfits_are_named_a_few_of_each(self, tmp_path, model):
        state = {**model.state_dict(), **{f"head.{i}": torch.ones(1) for i in range(5)}, "1.bias": torch.ones(7)}
        del state["3.bias"]
        with pytest.raises(InputError) as refused:
            load_model(weights(tmp_path / "weights.pt", state), blank)
        message = str(refused.value)
        assert "does not fit Sequential: 1 missing (3.bias); 5 unknown to it (head.0, head.1, head.2, ...); " in message
        assert "1 of another shape (1.bias of (7,) in place of (16,))" in message

    def test_lazy_network_that_does_not_fit(self, tmp_path):
        with pytest.raises(InputError, match=r"1 unknown to it \(x\)"):
            load_model(weights(tmp_path / "weights.pt", {"x": torch.ones(1)}), lambda: nn.LazyLinear(3))

    def test_whole_module_is_refused_unread(self, tmp_path, model):
        path = weights(tmp_path / "model.pt", model)
        with pytest.raises(InputError, match=r"a pickled torch\.nn\.modules\.container\.Sequential.*model\.state_dict"):
            load_model(path, blank)

    def test_checkpoint_with_more_is_refused(self, tmp_path, model):
        path = weights(tmp_path / "last.ckpt", {"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1)})
        with pytest.raises(InputError, match=r"a pickled argparse\.Namespace"):
            load_model(path, blank)

    @pytest.mark.parametrize(
        ("saved", "found"),
        [
            ({"epoch": 3, "net": {}, "optimizer": {}, "lr": 1}, "a dict with epoch, net, optimizer, ...;"),
            ({}, "a dict with no keys;"),
            ({0: torch.ones(1)}, "a dict with 0;"),
            (torch.ones(3), "a Tensor;"),
            ([torch.ones(3)], "a list;"),
        ],
    )
    def test_no_state_dict(self, tmp_path, saved, found):
        with pytest.raises(InputError, match="expected a state dict, at the top or under state_dict") as refused:
            load_model(weights(tmp_path / "weights.pt", saved), blank)
        assert f"holds {found}" in str(refused.value)

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02."])
    @pytest.mark.parametrize("name", ["a.pt", "a.pt2", "a.safetensors"])
    def test_junk(self, tmp_path, content, name):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as weights") as refused:
            load_model(tmp_path / name, blank)
        assert "\n" not in str(refused.value)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match=r"There is no file .*model\.pt"):
            load_model(tmp_path / "model.pt")


class Gives(nn.Module):
    """Whatever a function makes of the flat inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function(inputs.flatten(1))


class TestCheckModel:
    def test_takes_what_fits(self, moody_model, images):
        moody_model.train()
        before = {name: value.clone() for name, value in moody_model.state_dict().items()}
        check_model(moody_model, images)
        assert moody_model.training
        assert all(torch.equal(before[name], value) for name, value in moody_model.state_dict().items())

    def test_normalises(self, images):
        seen = Notes()
        check_model(Gives(lambda x: seen.append(x) or x), images, ([0.5], [0.25]))
        assert [len(inputs) for inputs in seen] == [1, 8]
        torch.testing.assert_close(seen[1], (images.flatten(1) - 0.5) / 0.25)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: (x,), r"gives a tuple for 1 image.*expected embeddings, \(1, D\)"),
            (lambda x: x[..., None], r"gives shape \(1, 36, 1\)"),
            (lambda x: x.squeeze(0), r"gives shape \(36,\)"),  # as many models do with one image
            (lambda x: x[:3], r"gives shape \(3, 36\) for 8 image"),
            (lambda x: x[:, :0], r"gives shape \(1, 0\)"),
            (lambda x: x.argmax(1, keepdim=True), r"gives torch\.int64"),
            (lambda x: x / 0, "gives NaN or infinite"),
            (
                nn.Linear(7, 2),
                r"does not take 1 image\(s\) of \(1, 6, 6\), channels first: RuntimeError: .*mat1 and mat2",
            ),
            (lambda x: x if len(x) < 5 else x.reshape(2, 3), r"does not take 8 image.*use smaller batches"),
        ],
    )
    def test_says_what_was_found(self, images, function, message):
        with pytest.raises(InputError, match=message) as refused:
            check_model(Gives(function), images)
        assert "\n" not in str(refused.value)

    def test_shapes_that_an_export_does_not_take(self, tmp_path, model, images):
        loaded = load_model(export(tmp_path / "model.pt2", model, images))
        with pytest.raises(InputError, match=r"does not take 1 image\(s\) of \(3, 6, 6\).*1"):
            check_model(loaded, torch.rand(4, 3, 6, 6))

    def test_largest_batch_of_an_export(self, tmp_path, model, images):
        loaded = load_model(export(tmp_path / "model.pt2", model, images[:2], max=4))
        check_model(loaded, images[:4])
        with pytest.raises(InputError, match=r"does not take 5 image.*4.*use smaller batches"):
            check_model(loaded, images[:5])
