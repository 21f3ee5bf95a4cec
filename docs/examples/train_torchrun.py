"""Adversarial metric learning in several processes.

torchrun --standalone --nproc_per_node 2 train_torchrun.py
"""

import gc
import os
from functools import partial

import torch
import torch.distributed as dist
import torchattacks
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pml_adversarial import AdversarialLoss


def data_set(size=256, classes=8):
    """Noisy images of 1x8x8, in [0, 1], around one pattern per class; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(classes, 1, 8, 8, generator=generator)
    labels = torch.arange(size) % classes
    noise = torch.randn(size, 1, 8, 8, generator=generator)
    return TensorDataset((0.5 + 0.5 * (patterns[labels] - 0.5) + 0.2 * noise).clamp(0, 1), labels)


def train(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).to(device)
    model = DistributedDataParallel(model)
    miner = DistributedMinerWrapper(MultiSimilarityMiner())
    attack = partial(torchattacks.PGD, eps=0.05, alpha=0.02, steps=5)
    loss_func = DistributedLossWrapper(MultiSimilarityLoss(alpha=2, beta=40, base=0.5))
    loss_func = AdversarialLoss(
        loss_func, model, attack=attack, perturb="all", keep_clean=False, warmup=16, guard=False
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    images = data_set()
    sampler = DistributedSampler(images, seed=0)
    loader = DataLoader(images, batch_size=32, sampler=sampler, drop_last=True)  # batches of one size on all ranks
    for epoch in range(8):
        sampler.set_epoch(epoch)
        for inputs, labels in loader:
            embeddings = model(inputs.to(device))
            labels = labels.to(device)
            loss = loss_func(embeddings, labels, miner(embeddings, labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if dist.get_rank() == 0:
            before, after = loss_func.loss_before, loss_func.loss_after
            print(f"epoch {epoch}: loss {before:.3f}, under attack {after:.3f}, strength {loss_func.strength:.2f}")


def main():
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(device)
    gc.collect()  # frees the model, and so ends gloo's threads, which could break the exit of the process
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
