"""Lightning's automatic optimization: bf16-mixed, accumulation, clipping, a schedule, validation."""

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(L.LightningModule):
    def __init__(self, width=64):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            nn.Linear(32, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 10)
        )
        # one-liner: import autoprec; autoprec.apply(PLAN, self)

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        print("loss", loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main():
    L.seed_everything(0)
    x = torch.randn(576, 32)
    data = TensorDataset(x, x[:, :10].argmax(1))
    trainer = L.Trainer(
        max_steps=20,
        precision="bf16-mixed",
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        num_sanity_val_steps=1,
        val_check_interval=20,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, batch_size=8, shuffle=True)
    trainer.fit(Classifier(), loader, DataLoader(data, batch_size=64))
    print("validated", float(trainer.callback_metrics["val_loss"]))


if __name__ == "__main__":
    main()
