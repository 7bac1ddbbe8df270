"""A denoising U-Net as diffusers has them, with an EMA of its weights beside it."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)


class ResnetBlock(nn.Module):
    def __init__(self, channels_in, channels, time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, channels_in), nn.Conv2d(channels_in, channels, 3, 1, 1)
        self.time = nn.Linear(time, channels)
        self.norm2, self.conv2 = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, 1, 1)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(4, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def forward(self, x):
        b, c, h, w = x.shape
        y = self.group_norm(x).view(b, c, h * w).transpose(1, 2)
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y).transpose(1, 2).reshape(b, c, h, w)


class UNet(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.width = width
        self.time1, self.time2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        self.conv_in = nn.Conv2d(3, width, 3, 1, 1)
        self.down1, self.pool = ResnetBlock(width, width, 4 * width), nn.Conv2d(width, width, 3, 2, 1)
        self.down2 = ResnetBlock(width, 2 * width, 4 * width)
        self.attention, self.middle = Attention(2 * width), ResnetBlock(2 * width, 2 * width, 4 * width)
        self.up = ResnetBlock(3 * width, width, 4 * width)
        self.norm_out, self.conv_out = nn.GroupNorm(4, width), nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, sample, timestep):
        half = self.width // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=sample.device) / half)
        angles = timestep[:, None].float() * rates[None]
        t = self.time2(F.silu(self.time1(torch.cat([angles.sin(), angles.cos()], -1))))
        x = self.conv_in(sample)
        skip = self.down1(x, t)
        x = self.middle(self.attention(self.down2(self.pool(skip), t)), t)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = self.up(torch.cat([x, skip], 1), t)
        return self.conv_out(F.silu(self.norm_out(x)))


class EMAModel:
    """As diffusers' EMAModel: shadow copies of the parameters, stepped in no_grad."""

    def __init__(self, parameters, decay):
        self.shadow_params = [p.clone().detach() for p in parameters]
        self.decay = decay

    @torch.no_grad()
    def step(self, parameters):
        for shadow, param in zip(self.shadow_params, parameters):
            shadow.sub_((1 - self.decay) * (shadow - param))

    def copy_to(self, parameters):
        for shadow, param in zip(self.shadow_params, parameters):
            param.data.copy_(shadow.to(param.device).data)


model = UNet().to(memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
ema = EMAModel(model.parameters(), decay=0.9)
# one-liner: import autoprec; autoprec.apply(PLAN, model, optimizer)
betas = torch.linspace(1e-4, 0.02, 100)
alphas = (1 - betas).cumprod(0)
images = torch.randn(64, 3, 1, 1).expand(-1, -1, 16, 16)
for step in range(20):
    clean = images[torch.randint(64, (4,))].contiguous(memory_format=torch.channels_last)
    noise, timesteps = torch.randn_like(clean), torch.randint(0, 100, (4,))
    a = alphas[timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    loss = F.mse_loss(model(noisy, timesteps), noise)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    ema.step(model.parameters())
    print("loss", loss.item())
average = UNet()
ema.copy_to(average.parameters())
with torch.no_grad():
    print("evaluated", F.mse_loss(average(noisy, timesteps), noise).item())
