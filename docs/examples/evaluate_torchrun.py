"""An evaluation that several processes share.

torchrun --standalone --nproc_per_node 2 evaluate_torchrun.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from pml_adversarial import evaluate_robustness


def images(size=160, classes=8):
    """Noisy images of 1x8x8, in [0, 1], around one pattern per class; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(classes, 1, 8, 8, generator=generator)
    labels = torch.arange(size) % classes
    noise = torch.randn(size, 1, 8, 8, generator=generator)
    return (0.5 + 0.5 * (patterns[labels] - 0.5) + 0.2 * noise).clamp(0, 1), labels


def network():
    """Stands for a trained model, which is loaded from a file in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))


def main():
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    report = evaluate_robustness(  # in every process, with the same arguments
        network().to(device),
        images(),
        eps=(0.01, 0.02),
        attacks="quick",
        batch_size=16,  # ten batches of queries, which the processes take in turn
        resume="evaluate_torchrun_run",  # the first process keeps finished batches here
    )
    if dist.get_rank() == 0:  # all have the same report
        print(report)
        report.save_json("evaluate_torchrun_run/robustness.json")
        report.save_html("evaluate_torchrun_run/robustness.html")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
