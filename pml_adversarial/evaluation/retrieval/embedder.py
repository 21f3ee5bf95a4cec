"""A model as a function from pixels to embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ...errors import CaptureError, InputError
from ...training.capture import holds_alone, in_order
from ...training.isolation import depends_on_mode, random_kept, random_stream, seed_all
from ...training.modules import is_compiled, modules_reached_by, modules_run_by
from ...training.pixels import Bounds, Normalization, PixelSpace
from ...training.rerun import checkpoints_take_gradients
from ..runs.sharing import Ranks
from .images import ImageSet
from .modes import as_deployed, left_in_train_mode
from .seeds import generators_kept, seeded, states_of_generators

Embed = Callable[[Tensor], Tensor]
"""Pixels ``(n, C, H, W)`` in [0, 1] -> embeddings ``(n, D)``."""

_SAME_GRADIENT = 0.1  # share of its norm by which a gradient may differ from one run to the next, in half precision


class Embedder:
    """A model that takes pixels, checks its embeddings, and counts the images that it embeds, also with gradient.

    Args:
        model: a module, modules in forward order, a PML trainer's ``models``, or any function of images.
        normalization: see `PixelSpace`.
        bounds: see `PixelSpace`.

    Attributes:
        modules: the modules that the model runs. Those of a function, and those that a module holds without
            registering them, are found by `probe`.
        device: of the modules' parameters or buffers.
        space: converts pixels to the model's inputs.
        dtype: of the inputs: single precision, or that of the images if it is higher; if the model does not take it,
            that of the first parameter, or that of the images; known after `probe`.
        embedding_dtype: of the embeddings; known after `probe`.
        has_gradient: whether embeddings have a gradient with respect to the images; see `probe_gradient`.
        gradient: of the probed images, 0 where there is none; see `probe_gradient`.
        why_none: the error that asking for a gradient gave, in words; None: there was none.
        takes_gradient: whether images that ask for a gradient can be given to the model; see `probe_gradient`.
        is_random: whether the model gives another answer each time; see `probe_randomness`.
        seeds: names of the global random number generators that each call of the model seeds; known after `probe`.
        notes: what a reader of a report has to know of the model; known after `probe`.
        on_passes: is told how many image passes each call takes, forward and backward.
    """

    def __init__(self, model: Any, normalization: Normalization | None = None, bounds: Bounds | None = None) -> None:
        self._call = _callable(model)
        self._joined = self._call if type(self._call) is nn.Sequential and self._call is not _inside(model) else None
        self.modules: tuple[nn.Module, ...] = _known_modules(self._call)
        self._find_place()
        self.dtype = self._stored_in or torch.float32
        self.embedding_dtype = torch.float32
        self.has_gradient = self.takes_gradient = True
        self.gradient = torch.zeros(())
        self.why_none: str | None = None
        self.is_random = False
        self.seeds: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.forward_passes = self.backward_passes = 0
        self._not_finite = torch.zeros((), dtype=torch.long)
        self.on_passes: Callable[[int], object] = lambda passes: None
        self.space = PixelSpace(normalization, bounds)
        self._autocast = _Autocast()

    def _find_place(self) -> None:
        tensors = [t for module in self.modules for t in (*module.parameters(), *module.buffers())]
        if any(is_lazy(tensor) for tensor in tensors):
            raise InputError("The model has weights without a shape (lazy modules); expected one that was called once.")
        self.device = next((t.device for t in tensors), torch.device("cpu"))
        self._stored_in = next((t.dtype for t in tensors if t.is_floating_point()), None)

    @property
    def not_finite(self) -> int:
        """How many embeddings so far held NaN or infinite values."""
        return int(self._not_finite)

    @property
    def pixel_dtype(self) -> torch.dtype:
        """Of the pixels that attacks change: single precision, or double if the model computes in it."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def precision(self) -> str:
        """Types of the inputs, of the embeddings, and of the autocast that the model runs under."""
        types = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.embedding_dtype)]
        return f"{types[0]} -> {types[1]}, autocast {self._autocast}"

    @contextmanager
    def isolated(self, learns: bool = False) -> Iterator[None]:
        """Puts the modules into eval mode and freezes them, see `modes.as_deployed`, in plain surroundings.

        The model itself runs under the autocast that surrounded the making of this object. Gradients pass reentrant
        activation checkpoints too.

        Args:
            learns: see `training.isolation.preserved`.
        """
        with plain_surroundings(), as_deployed(*self._outermost(), learns=learns), checkpoints_take_gradients():
            yield

    def _outermost(self) -> list[nn.Module]:
        """The modules whose modes the user sets: not the one that was made here of several."""
        return [part for module in self.modules for part in (module if module is self._joined else (module,))]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Embeddings ``(n, D)`` of pixels ``(n, C, H, W)`` in [0, 1]; refuses what is not one per image."""
        with_gradient = pixels.requires_grad and torch.is_grad_enabled()
        self.forward_passes += len(pixels)
        self.backward_passes += len(pixels) * with_gradient
        self.on_passes(len(pixels) * (1 + with_gradient))
        embeddings = self._embed(pixels if self.takes_gradient else pixels.detach())
        not_finite = (~embeddings.detach().isfinite()).any(1).sum()
        self._not_finite = self._not_finite.to(not_finite.device) + not_finite  # stays on the device
        if with_gradient:  # where the model gives no gradient, it is 0
            embeddings = embeddings + 0 * pixels.flatten(1).sum(1, keepdim=True)
        return embeddings

    def probe(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Embeds pixels ``(n, C, H, W)`` and notes what kind of model this is. It counts as no pass.

        Args:
            pixels: some images.
            dtype: of the images as they were given.

        Raises:
            InputError: the model fails on the images, or does not return one embedding per image.
        """
        given, modules = dtype if dtype.is_floating_point else torch.float32, self.modules
        types = (torch.promote_types(given, torch.float32), given, self._stored_in or given)
        for self.dtype in dict.fromkeys(types[:-1]):
            with suppress(InputError):
                return self._probe(pixels)
            self.modules = modules
        self.dtype = types[-1]
        self._probe(pixels)

    def _probe(self, pixels: Tensor) -> None:
        """Embeds pixels in the present type."""
        found: list[Tensor] = []
        states: list[dict[str, Any]] = []

        def run(images: Tensor) -> Tensor:
            seed_all(len(states))
            found.append(self.tried(images))
            states.append(states_of_generators())
            return found[-1]

        with plain_surroundings(), checkpoints_take_gradients():
            if self.modules:
                self.modules = (*self.modules, *self._hidden(run, pixels.detach()))
            else:
                self.modules = modules_run_by(run, pixels.detach(), as_deployed)
                self._find_place()
        with self.isolated(learns=True), torch.no_grad(), random_kept():
            while len(states) < 2:
                run(pixels)
            self.seeds = tuple(dict.fromkeys((*self.seeds, *seeded(*states[:2]))))
            self.embedding_dtype = found[-1].dtype
            self.notes = tuple(self._notes())

    def _hidden(self, run: Embed, pixels: Tensor) -> list[nn.Module]:
        """What the modules run without having registered it, such as a backbone in a tuple."""
        compiled = is_compiled(*self.modules)
        found = modules_reached_by(self._call) if compiled else modules_run_by(run, pixels, as_deployed)
        known = {id(inner) for module in self.modules for inner in module.modules()}
        return [module for module in found if id(module) not in known and _matters(module)]

    def _notes(self) -> Iterator[str]:
        training = left_in_train_mode(*self._outermost())
        if training:
            shown = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
            yield f"in eval mode, parts of the model are in train mode, and are evaluated so: {shown}"
        if self.seeds:
            yield (
                f"the model seeds the global random numbers of {' and '.join(self.seeds)} in each call; what attacks "
                "draw does not depend on it, as these are restored after each call"
            )

    def probe_gradient(self, pixels: Tensor) -> list[str]:
        """Finds out whether the embeddings of pixels ``(n, C, H, W)`` have a gradient. It counts as no pass.

        Returns:
            What a reader of a report has to know of it.
        """
        with self.isolated(learns=True):
            self._note_gradient(pixels.detach().clone().requires_grad_())
        if self.why_none is not None:
            return [f"asking for gradients fails, so attacks find none ({self.why_none})"]
        if not self.has_gradient:
            return ["embeddings have no gradient with respect to the images, so attacks that need one find nothing"]
        return []

    def probe_randomness(self, pixels: Tensor) -> None:
        """Notes whether pixels ``(n, C, H, W)`` have other embeddings in a second call. It counts as no pass.

        Differences of one hundredth of the embeddings' spread, and those that rounding makes, are not counted.
        """
        with self.isolated(), torch.no_grad():
            first, again = (self.tried(pixels).double() for _ in range(2))
        spread = (first - first.mean(0)).square().sum(1).mean().sqrt()
        rounding = 8 * torch.finfo(self.embedding_dtype).eps * first.square().sum(1).mean().sqrt()
        self.is_random = bool((again - first).norm(dim=1).amax() > 0.01 * spread + rounding)

    def _note_gradient(self, pixels: Tensor) -> None:
        if any(parameter.is_inference() for module in self.modules for parameter in module.parameters()):
            raise InputError(
                "The model's weights were made under torch.inference_mode(), so no gradient can pass through them. "
                "Expected weights made outside of it; make or load the model there."
            )
        try:
            embeddings = self._embed(pixels)
            asked = embeddings.requires_grad
            (found,) = torch.autograd.grad(embeddings.sum(), pixels, allow_unused=True) if asked else (None,)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # such as of numpy, which takes no images that ask for a gradient
            self.has_gradient = self.takes_gradient = False
            self.gradient = torch.zeros_like(pixels)
            self.why_none = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            self.has_gradient = found is not None
            self.gradient = torch.zeros_like(pixels) if found is None else found

    def tried(self, pixels: Tensor) -> Tensor:
        """Embeddings ``(n, D)`` of pixels ``(n, C, H, W)``; errors say what was given. It counts as no pass."""
        try:
            return self._embed(pixels)
        except (InputError, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise InputError(
                f"The model fails on {len(pixels)} image(s) of shape {tuple(pixels.shape[1:])} and {self.dtype}, with "
                f"{type(error).__name__}: {error}. Expected a model that takes batches of any number of these images."
            ) from error

    def _embed(self, pixels: Tensor) -> Tensor:
        inputs = self.space.to_inputs(pixels).to(self.dtype)
        if inputs is pixels:
            inputs = pixels.clone()  # the model may change them in place
        with self._autocast.on(), generators_kept(self.seeds):
            found = self._call(inputs)
        embeddings = torch.as_tensor(found) if type(found).__module__ == "numpy" else found
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or len(embeddings) != len(pixels):
            shown = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise InputError(
                f"The model returned {shown} for {len(pixels)} images; expected embeddings ({len(pixels)}, D). Pass a "
                "function that returns them, such as lambda images: model(images).pooler_output, or .flatten(1)."
            )
        if embeddings.is_complex() or not embeddings.shape[1]:
            raise InputError(
                f"The model returned {embeddings.dtype} of shape {tuple(embeddings.shape)}; expected real embeddings "
                "of one dimension or more."
            )
        if embeddings.layout != torch.strided:
            embeddings = embeddings.to_dense()
        if embeddings.is_quantized:
            embeddings = embeddings.dequantize()
        embeddings = embeddings if embeddings.is_floating_point() else embeddings.float()
        embeddings = embeddings.to(pixels.device)
        return embeddings if embeddings.requires_grad else embeddings.clone()  # the next call may overwrite them

    def check_kept_gradient(self, kept: Tensor) -> None:
        """Refuses a gradient from an earlier run that is not the one of `probe_gradient`, apart from rounding."""
        now = self.gradient.to(kept)
        if not self.is_random and (kept - now).norm() > _SAME_GRADIENT * max(kept.norm(), now.norm()):
            raise InputError(
                f"The kept attacks are those of a model with other gradients: of one query, the gradient had norm "
                f"{float(kept.norm()):.3g}, and it has {float(now.norm()):.3g} now. Use another folder for resume, or "
                "delete this one."
            )

    def check_gradient(self, pixels: Tensor) -> None:
        """Refuses a model whose embeddings of pixels ``(n, C, H, W)`` have no gradient."""
        self.probe_gradient(pixels)
        if not self.has_gradient:
            raise InputError(
                "The embeddings have no gradient with respect to the images, and the attacks need gradients"
                + (f" ({self.why_none})" if self.why_none else "")
                + ". Use a model that computes embeddings with torch, without torch.no_grad() and detach()."
            )


@contextmanager
def plain_surroundings() -> Iterator[None]:
    """Inside, neither inference mode nor autocast is on."""
    with torch.inference_mode(False), ExitStack() as stack:
        for kind in _kinds():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class _Autocast:
    """The autocast that surrounds the making of it: for each type of device, whether it is on, and its type."""

    def __init__(self) -> None:
        self._found = {kind: _state(kind) for kind in _kinds()}

    @contextmanager
    def on(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self._found.items():
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield

    def __str__(self) -> str:
        return ", ".join(f"{kind} {dtype}" for kind, (enabled, dtype) in self._found.items() if enabled) or "off"


def _kinds() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _state(kind: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _callable(model: Any) -> Callable[..., Any]:
    if isinstance(model, str | PathLike):
        raise InputError(f"model is {model!r}; expected the model itself. Load it first, such as with torch.jit.load.")
    try:
        return in_order(_inside(model))
    except CaptureError as error:
        raise InputError(str(error)) from error


def _inside(model: Any) -> Any:
    """The same without `DistributedDataParallel`, which sends buffers to other processes in each call."""
    if isinstance(model, DistributedDataParallel):
        return model.module
    if isinstance(model, nn.Module) and not holds_alone(model):
        return model
    if isinstance(model, Mapping | nn.ModuleDict):
        return {name: _inside(model[name]) for name in model}
    return [_inside(part) for part in model] if isinstance(model, list | tuple | nn.ModuleList) else model


def _known_modules(call: Any) -> tuple[nn.Module, ...]:
    """The module itself, or the one whose method it is; none of another function."""
    if isinstance(call, nn.Module):
        return (call,)
    owner = getattr(getattr(call, "func", call), "__self__", None)
    return (owner,) if isinstance(owner, nn.Module) else ()


def _matters(module: nn.Module) -> bool:
    """Whether a module has tensors or a mode; one that is made anew in each call may have neither."""
    return any(True for _ in (*module.parameters(), *module.buffers())) or depends_on_mode(module)


def embed_all(
    embed: Embed,
    images: Tensor | ImageSet,
    batch_size: int,
    rows: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Embeddings ``(N, D)`` of the images ``rows`` ``(N,)``, or of all, without gradient.

    Processes may share the batches. A model that draws random numbers draws them from a stream of each batch.
    """
    parts = (torch.arange(len(images)) if rows is None else rows.cpu()).split(batch_size)

    def make(number: int) -> Tensor:
        with torch.no_grad(), random_stream(0, number):
            return embed(images[parts[number]])

    return torch.cat(list((Ranks() if ranks is None else ranks).share(range(len(parts)), make)))


def check_finite(embeddings: Tensor) -> Tensor:
    """The same embeddings ``(N, D)``; refuses those that are not finite."""
    bad = int((~embeddings.isfinite()).any(1).sum())
    if bad:
        raise InputError(
            f"The model returned NaN or infinite embeddings for {bad} of {len(embeddings)} images without attack; "
            "expected finite ones."
        )
    return embeddings


def batches(total: int, size: int) -> Iterator[slice]:
    """Slices that cover ``range(total)``, each of at most ``size``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
