"""Lightning Fabric in bf16-mixed: a convolutional network, cosine rates, checkpoints."""

import tempfile
from pathlib import Path

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, 1)
        self.conv2 = nn.Conv2d(8, 16, 3, 1)
        self.dropout = nn.Dropout(0.25)
        self.fc1 = nn.Linear(16 * 6 * 6, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        return F.log_softmax(self.fc2(self.dropout(F.relu(self.fc1(x)))), dim=1)


def main():
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    fabric.seed_everything(7)
    images = torch.randn(320, 1, 16, 16)
    loader = DataLoader(
        TensorDataset(images, images.mean((1, 2, 3)).mul(80).long().clamp(-5, 4) + 5),
        batch_size=16,
        shuffle=True,
    )
    loader = fabric.setup_dataloaders(loader)
    model = Net()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=0.5)
    # one-liner: import autoprec; autoprec.apply(PLAN, model, optimizer)
    model, optimizer = fabric.setup(model, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    for epoch in range(2):
        model.train()
        for data, target in loader:
            optimizer.zero_grad()
            loss = F.nll_loss(model(data), target)
            fabric.backward(loss)
            optimizer.step()
            fabric.print("loss", loss.item())
        scheduler.step()
    with tempfile.TemporaryDirectory() as folder:
        fabric.save(Path(folder) / "net.pt", {"model": model, "optimizer": optimizer})


if __name__ == "__main__":
    main()
