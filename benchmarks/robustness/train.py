"""One loop for all methods. A run that was cut off goes on where it stopped, and ends where it would have ended."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm import tqdm

from pml_adversarial import AdversarialLoss
from pml_adversarial.defenses.atta import ATTA
from pml_adversarial.training.isolation import preserved, random_stream

from .backbones import IMAGENET_WEIGHTS, Shape, build, load_weights, num_dimensions, smooth, start_as_thresholds
from .batches import Batches
from .data import Part
from .lora import merged, tune
from .methods import Method
from .protocol import Protocol

KEPT_EVERY, NOTED_EVERY = 50, 25  # steps
EMA_DECAY = 0.998
STATISTICS_STEPS = 50  # batches from which BatchNorm takes the statistics of equally averaged weights
_OWN = 1 << 41  # a stream of random numbers that neither the attack nor the batches draw from


@dataclass(slots=True)  # without a __dict__: a step puts back the attributes of what hooks of the model reach
class Passed:
    """How far training has come, and what it has cost.

    Attributes:
        steps: of the optimiser.
        forward: images that went forward with gradient, other than in a check of the replay: the clean ones, those of
            each attack step, the perturbed ones. These are the image passes that a budget counts.
        backward: images that a gradient came back to.
        seconds: wall-clock.
        losses: every `NOTED_EVERY` steps.
    """

    steps: int = 0
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


@contextmanager
def counted(model: nn.Module, passed: Passed) -> Iterator[None]:
    """Within it, images that pass the model with gradient are counted."""

    def forward(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            passed.forward += len(output)
            output.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        passed.backward += len(gradient)

    handle = model.register_forward_hook(forward)
    try:
        yield
    finally:
        handle.remove()


def build_for(protocol: Protocol, shape: Shape) -> nn.Module:
    """The network of a protocol, with random weights or torchvision's."""
    of_torchvision = protocol.pretrained if protocol.pretrained == IMAGENET_WEIGHTS else ""
    network = build(protocol.backbone, shape, of_torchvision, protocol.head)
    return smooth(network) if protocol.smooth else network


def start_for(protocol: Protocol, shape: Shape) -> nn.Module:
    """The network at the start of the training: with the weights of the protocol's file, if it has one."""
    network = build_for(protocol, shape)
    if protocol.pretrained not in ("", IMAGENET_WEIGHTS):
        load_weights(network.get_submodule("trunk") if protocol.head else network, Path(protocol.pretrained))
    return network


def original_for(protocol: Protocol, shape: Shape) -> nn.Module:
    """The network at the start as it was trained: frozen, in eval mode, and with its own activations."""
    return start_for(replace(protocol, smooth=False), shape).eval().requires_grad_(False)


def averaged(name: str, model: nn.Module) -> AveragedModel | None:
    """What averages the weights of training steps: `Protocol.average`."""
    if name == "ema":
        return AveragedModel(model, multi_avg_fn=_exponential, use_buffers=True)
    return AveragedModel(model) if name == "swa" else None


def _exponential(averages: Sequence[Tensor], now: Sequence[Tensor], count: Tensor) -> None:
    """An exponential average whose memory grows with the training, so that it forgets the first weights."""
    get_ema_multi_avg_fn(ema_decay(int(count)))(averages, now, count)


def ema_decay(count: int) -> float:
    """The weight of the average so far, of ``count`` steps."""
    return min(EMA_DECAY, (1 + count) / (10 + count))


class Training:
    """One model, one method, one seed.

    Args:
        method: how.
        protocol: under which conditions.
        part: images to train on.
        seed: of initial weights, batches and attacks.
        device: of model and batches.
    """

    def __init__(self, method: Method, protocol: Protocol, part: Part, seed: int, device: torch.device) -> None:
        self.method, self.protocol, self.seed, self.device = method, protocol, seed, device
        self.batches, self.passed = Batches(part, protocol, seed), Passed()
        method.check(protocol)
        self.steps = (method.steps(protocol) or self._affordable()) if method.trains else 0
        self._make(self.steps)

    def run(self, checkpoint: Path, workers: int = 0, progress: str | None = None) -> nn.Module:
        """Trains to the end.

        Args:
            checkpoint: file of what a run that is cut off needs to go on.
            workers: processes that read batches; 0: this one.
            progress: description of a bar; None: none.

        Raises:
            ArithmeticError: the loss is not finite any more.
        """
        if checkpoint.exists():
            self._restore(checkpoint)
        start, before = time.perf_counter(), self.passed.seconds
        ahead = self.batches.after(self.passed.steps, workers, self.method.replays)
        with tqdm(desc=progress, total=self._goal, initial=self._done, disable=progress is None, ncols=100) as bar:
            while self._done < self._goal:
                images, labels = next(ahead)
                loss = self._step(images.to(self.device), labels.to(self.device))
                self.passed.seconds = before + time.perf_counter() - start
                if self.passed.steps % NOTED_EVERY == 0 or self._done >= self._goal:
                    self._note(loss.item())
                    bar.set_postfix_str(f"loss {self.passed.losses[-1]:.4f}")
                bar.update(min(self._done, self._goal) - bar.n)
                if self.passed.steps % KEPT_EVERY == 0:
                    self._keep(checkpoint)
        self.passed.seconds = before + time.perf_counter() - start
        return self._final().eval()

    def _make(self, steps: int) -> None:
        with random_stream(self.seed, -1):  # all methods start from the same weights
            images, _ = self.batches[0]
            self.model = start_for(self.protocol, tuple(images.shape[1:]))
            tune(self.model, self.protocol.tuned)
            if self.protocol.thresholds:
                start_as_thresholds(self.model, images)
            self.model.to(self.device, memory_format=torch.channels_last)  # faster for pooling and convolution
            self.original = original_for(self.protocol, tuple(images.shape[1:])) if self.method.original else None
            if self.original is not None:
                self.original.to(self.device, memory_format=torch.channels_last)
            self.called = torch.compile(self.model) if self.protocol.compiled else self.model
            size = num_dimensions(self.model, images.to(self.device)) if self.method.proxies else 0
            made_for = self.batches.num_classes, size
            self.loss = self.method.wrapped(self.protocol, self.called, steps, self.seed, *made_for).to(self.device)
            self.miner = None if self.method.miner is None else self.method.miner()
        self.optimizer = torch.optim.Adam(self._groups(), weight_decay=self.protocol.weight_decay)
        self.average = averaged(self.protocol.average, self.model)
        self._set_mode()
        self._check_replay()

    def _check_replay(self) -> None:
        """Lets the loss check its replay before passes are counted, since a run that goes on checks it again."""
        if not isinstance(self.loss, AdversarialLoss):
            return
        images, labels = (part.to(self.device) for part in self.batches[0])
        with random_stream(self.seed, -1), preserved(self.model), self._precision():
            embeddings = self.called(images.contiguous(memory_format=torch.channels_last))
            self.loss.adversary.collate(embeddings, labels, None, *self._references(images, labels))

    def _references(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """The embeddings of the network at the start, and their labels, for a method that wants them."""
        if self.original is None:
            return ()
        with torch.no_grad():
            return self.original(images), labels

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.protocol.precision == "bfloat16")

    def _set_mode(self) -> None:
        self.model.train()
        for module in self.model.modules():
            if self._freezes_batchnorm and isinstance(module, nn.BatchNorm2d):
                module.eval()

    @property
    def _freezes_batchnorm(self) -> bool:
        return self.protocol.frozen_batchnorm or self.protocol.tuned != "all"

    def _affordable(self) -> int:
        """How many steps of full strength the budget pays for, by a trial of one."""
        self._make(0)
        with random_stream(self.seed + _OWN, -1):
            self._step(*(part.to(self.device) for part in self.batches[0]))
        spent, self.passed = self.passed.forward, Passed()
        return max(1, self.protocol.budget // spent)

    @property
    def _reusing(self) -> list[ATTA]:
        plugins = self.loss.adversary.hooks.plugins if isinstance(self.loss, AdversarialLoss) else ()
        return [plugin for plugin in plugins if isinstance(plugin, ATTA)]

    @property
    def _goal(self) -> int:
        return (self.protocol.budget or self.steps) if self.method.trains else 0

    @property
    def _done(self) -> int:
        return self.passed.forward if self.protocol.budget else self.passed.steps

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Everything random in it is drawn from a stream of this step's own."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self._learning_rate()
        images = images.contiguous(memory_format=torch.channels_last)
        for reuse in self._reusing:
            reuse.next(self.batches.rows(self.passed.steps // self.method.replays))
        with random_stream(self.seed + _OWN, self.passed.steps), counted(self.called, self.passed):
            with self._precision():
                embeddings = self.called(images)
                tuples = None if self.miner is None else self.miner(embeddings, labels)
                loss: Tensor = self.loss(embeddings, labels, tuples, *self._references(images, labels))
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.passed.steps += 1
        self._average()
        return loss.detach()

    def _groups(self) -> list[dict[str, Any]]:
        """The trunk, and the head with the loss's own weights; ``rate`` times the learning rate is theirs."""
        head = [*(self.model.get_submodule("head").parameters() if self.protocol.head else ()), *self.loss.parameters()]
        of_head = set(map(id, head))
        trunk = [weight for weight in self.model.parameters() if weight.requires_grad and id(weight) not in of_head]
        groups = [{"params": trunk, "rate": 1.0}, {"params": head, "rate": self.protocol.head_rate}]
        return [group for group in groups if group["params"]]

    def _average(self) -> None:
        """Adds the weights of this step; "swa" from three quarters of the training on."""
        if self.average is not None and (self.protocol.average == "ema" or 4 * self._done >= 3 * self._goal):
            self.average.update_parameters(self.model)

    def _final(self) -> nn.Module:
        """The network that training gives: the averaged one, if weights were averaged."""
        if self.average is None:
            return merged(self.model)
        if self.protocol.average == "swa" and not self._freezes_batchnorm:
            batches = (self.batches[step][0].to(self.device) for step in range(STATISTICS_STEPS))
            update_bn(batches, self.average)
        self.model.load_state_dict(self.average.module.state_dict())
        return merged(self.model)

    def _learning_rate(self) -> float:
        """Of the coming step."""
        if self.protocol.schedule == "constant":
            return self.protocol.learning_rate
        return 0.5 * self.protocol.learning_rate * (1 + math.cos(math.pi * min(1.0, self._done / self._goal)))

    def _note(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ArithmeticError(f"The loss is {loss} after {self.passed.steps} steps.")
        self.passed.losses.append(loss)

    def _keep(self, checkpoint: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in self._kept()}
        unfinished = checkpoint.with_suffix(".unfinished")
        torch.save({**parts, "passed": asdict(self.passed)}, unfinished)
        os.replace(unfinished, checkpoint)

    def _kept(self) -> tuple[str, ...]:
        return ("model", "loss", "optimizer", *(("average",) if self.average is not None else ()))

    def _restore(self, checkpoint: Path) -> None:
        kept = torch.load(checkpoint, map_location=self.device, weights_only=True)
        for name in self._kept():
            getattr(self, name).load_state_dict(kept[name])
        self.passed = Passed(**kept["passed"])
