"""DDP by torchrun, or alone: autocast, no_sync while gradients accumulate, a sampler of ranks."""

import contextlib
import os

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


class MLP(nn.Module):
    def __init__(self, width=48, depth=3):
        super().__init__()
        self.stem = nn.Linear(24, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width), nn.SiLU())
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 8)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def main():
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    torch.manual_seed(0)
    inputs = torch.randn(512, 24)
    data = TensorDataset(inputs, inputs[:, :8].argmax(1))
    sampler = DistributedSampler(data, shuffle=True, seed=1)
    loader = DataLoader(data, batch_size=16, sampler=sampler)
    model = MLP()
    # one-liner: import autoprec; autoprec.apply(PLAN, model)
    ddp_model = DDP(model)
    optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for step, (x, y) in enumerate(loader):
            last = step % 2 == 1
            with contextlib.nullcontext() if last else ddp_model.no_sync():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(ddp_model(x), y) / 2
                loss.backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
                if dist.get_rank() == 0:
                    print("loss", 2 * loss.item())


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
