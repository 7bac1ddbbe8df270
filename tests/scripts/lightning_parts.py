"""Lightning's own first example: an autoencoder whose two parts training_step calls."""

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

L.seed_everything(0)


class LitAutoEncoder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
        self.decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        z = self.encoder(x)
        loss = F.mse_loss(self.decoder(z), x)
        print(f"loss {loss.item():.9g}")
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        # one-liner: import autoprec; autoprec.apply(PLAN, self, optimizer)
        return optimizer


images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
loader = DataLoader(TensorDataset(images), batch_size=64, shuffle=True)
trainer = L.Trainer(
    max_steps=24,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(LitAutoEncoder(), loader)
