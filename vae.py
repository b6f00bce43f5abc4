"""
Video to latent and back: one causal 3D VAE that builds Wan 2.1's, Wan 2.2's and our nano model from a flat config.

Train the nano VAE on simulated clips (half an hour on two cores), look at out/vae/, go on, improve the decoder alone:
    python vae.py
    python vae.py --resume=True
    python vae.py --name=decoder --init_from=data/vae.safetensors --decoder_only=True --body_weight=12
    torchrun --nproc_per_node=8 vae.py --batch=32 --clips=20000
Use it, or published weights (official or diffusers layout):
    model = load_vae("data/vae.safetensors")
    model = load_vae("Wan2.1_VAE.pth", CONFIGS["wan2.1"])
    latent = model.encode(video)         # (B, 3, 1+4k, H, W) in [-1, 1] -> (B, z, 1+k, h, w), normalised
    video = model.decode(latent)

Causal means that a frame's latent depends on no later frame, so one image is a clip of length one and its latent
is frame 0 of any clip that starts with it. Parameter names are those of Wan's wan/modules/vae.py and vae2_2.py.
"""
import math
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
import simdata

# dim, decoder_dim: channels at full resolution; mult: their multiple per stage (all stages but the last halve H and W);
# temporal: which of those halvings also halve T; residual: nested stages with parameter-free shortcuts (Wan 2.2).
CONFIGS = {
    "nano": dict(
        dim=16, decoder_dim=32, z_dim=32, mult=[1, 2, 4], temporal=[True, True], blocks=1, decoder_blocks=1,
        patch=2, residual=True, latent_mean=[0.0] * 32, latent_std=[1.0] * 32),            # measured after training
    "wan2.1": dict(
        dim=96, decoder_dim=96, z_dim=16, mult=[1, 2, 4, 4], temporal=[False, True, True], blocks=2, decoder_blocks=3,
        patch=1, residual=False,
        latent_mean=[-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        latent_std=[2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]),
    "wan2.2": dict(
        dim=160, decoder_dim=256, z_dim=48, mult=[1, 2, 4, 4], temporal=[False, True, True], blocks=2, decoder_blocks=3,
        patch=2, residual=True,
        latent_mean=[-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
                     0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
                     -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
                     -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
                     0.3573, -0.0548, -0.1681, -0.0667],
        latent_std=[0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
                    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
                    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
                    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744]),
}


# ----------------------------------------------------------------------------------------------------------------------
# the parts

# `past` is None for whole clips. While a clip is streamed (VideoVAE.stream), it is a list of what a module must know of
# the chunks before: empty at the start, then the last frames it saw, or only that there were some. Frames are copied: a
# view of them would keep all of their chunk in memory.

class CausalConv3d(nn.Conv3d):
    """A convolution that sees the present and the past: zero frames in front, "same" padding in space."""
    past = None

    def __init__(self, d_in, d_out, kernel=(3, 3, 3)):
        super().__init__(d_in, d_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.history = kernel[0] - 1

    def forward(self, x):
        if self.history:
            seen = torch.cat([*self.past, x], 2) if self.past else x
            if self.past is not None:
                self.past = [seen[:, :, -self.history:].clone()]
            x = F.pad(seen, (0, 0, 0, 0, self.history + x.shape[2] - seen.shape[2], 0))
        return super().forward(x)


class RMSNorm(nn.Module):
    """Each pixel's channel vector on the sphere of radius sqrt(C), times gamma."""
    def __init__(self, dim, axes=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        return x * (x.shape[1] ** 0.5 / norm).to(x.dtype) * self.gamma.to(x.dtype)


class ResidualBlock(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(d_in), nn.SiLU(), CausalConv3d(d_in, d_out),
            RMSNorm(d_out), nn.SiLU(), nn.Identity(), CausalConv3d(d_out, d_out))      # Identity: their dropout of 0
        self.shortcut = CausalConv3d(d_in, d_out, (1, 1, 1)) if d_in != d_out else nn.Identity()

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head attention inside each frame: all of the space, none of the time."""
    def __init__(self, dim):
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        B, C, T, H, W = x.shape
        h = x.transpose(1, 2).flatten(0, 1)                                            # (B*T, C, H, W)
        q, k, v = self.to_qkv(self.norm(h)).flatten(2).mT.unsqueeze(1).chunk(3, -1)    # (B*T, 1, H*W, C) each
        h = common.attention(q, k, v)
        h = self.proj(h.squeeze(1).mT.unflatten(2, (H, W)))
        return x + h.unflatten(0, (B, T)).transpose(1, 2)


class Resample(nn.Module):
    """Halve or double H and W and, if `temporal`, T: frame 0 stays one frame, and every later frame has one partner."""
    past = None

    def __init__(self, dim, d_out, up, temporal):
        super().__init__()
        self.up, self.temporal = up, temporal
        if up:
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                          nn.Conv2d(dim, d_out, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, d_out, 3, stride=2))
        if temporal:
            self.time_conv = (CausalConv3d(dim, 2 * dim, (3, 1, 1)) if up else
                              nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)))        # its history is real frames

    def forward(self, x):                                                              # (B, C, 1+t, H, W)
        begins = not self.past                     # this is no later chunk of a stream, so it starts with frame 0
        if self.past is not None and self.up:
            self.past = [True]
        if self.temporal and self.up and x.shape[2] > begins:
            # Each frame after the first becomes two, and never looks back at frame 0: the published weights were
            # trained with a chunk cache that starts empty after the first frame.
            pair = self.time_conv(x[:, :, int(begins):]).unflatten(1, (2, -1))         # (B, 2, C, t, H, W)
            x = torch.cat([x[:, :, :int(begins)], pair.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
        B = x.shape[0]
        x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, -1)).transpose(1, 2)
        if self.temporal and not self.up:
            seen = torch.cat([*self.past, x], 2) if self.past else x
            if self.past is not None:
                self.past = [x[:, :, -1:].clone()]
            if seen.shape[2] > 1:
                x = torch.cat([x[:, :, :int(begins)], self.time_conv(seen)], dim=2)    # windows 0-2, 2-4, ...
        return x


class DownStage(nn.Module):
    """Wan 2.2's stage: the layers, plus a shortcut that averages groups of neighbouring pixels, frames and channels."""
    def __init__(self, layers, d_out, ft, fs):
        super().__init__()
        self.downsamples = nn.Sequential(*layers)
        self.d_out, self.ft, self.fs = d_out, ft, fs

    def forward(self, x):
        s = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.ft, 0))
        B, C, T, H, W = s.shape
        s = s.reshape(B, C, T // self.ft, self.ft, H // self.fs, self.fs, W // self.fs, self.fs)
        s = s.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)                            # (B, C*ft*fs*fs, t, h, w)
        if s.shape[1] < self.d_out:                                                    # nano's last stage widens only
            s = s.repeat_interleave(self.d_out // s.shape[1], dim=1)
        return self.downsamples(x) + s.unflatten(1, (self.d_out, -1)).mean(2)


class UpStage(nn.Module):
    """The mirror image: the shortcut deals channels out to new pixels and frames. The last stage has none."""
    past = None

    def __init__(self, layers, d_out, ft, fs):
        super().__init__()
        self.upsamples = nn.Sequential(*layers)
        self.d_out, self.ft, self.fs = d_out, ft, fs

    def forward(self, x):
        if self.fs == 1:
            return self.upsamples(x)
        s = x.repeat_interleave(self.d_out * self.ft * self.fs ** 2 // x.shape[1], dim=1)
        s = s.unflatten(1, (self.d_out, self.ft, self.fs, self.fs)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        s = s.flatten(6, 7).flatten(4, 5).flatten(2, 3)                                # (B, d_out, T*ft, H*fs, W*fs)
        begins = not self.past
        if self.past is not None:
            self.past = [True]
        return self.upsamples(x) + s[:, :, (self.ft - 1) * begins:]                    # frame 0 gives one frame


def middle(dim):
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def head(d_in, d_out):
    return nn.Sequential(RMSNorm(d_in), nn.SiLU(), CausalConv3d(d_in, d_out))


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        dims = [c["dim"] * m for m in [1, *c["mult"]]]
        self.conv1 = CausalConv3d(3 * c["patch"] ** 2, dims[0])
        stages = []
        for i, (d_in, d_out) in enumerate(zip(dims, dims[1:])):
            shrinks = i < len(c["temporal"])                                           # all stages but the last
            layers = [ResidualBlock(d_in if j == 0 else d_out, d_out) for j in range(c["blocks"])]
            if shrinks:
                layers.append(Resample(d_out, d_out, up=False, temporal=c["temporal"][i]))
            ft, fs = 1 + (shrinks and c["temporal"][i]), 1 + shrinks
            stages += [DownStage(layers, d_out, ft, fs)] if c["residual"] else layers
        self.downsamples = nn.Sequential(*stages)
        self.middle = middle(dims[-1])
        self.head = head(dims[-1], 2 * c["z_dim"])

    def forward(self, x):
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        dims = [c["decoder_dim"] * m for m in [c["mult"][-1], *reversed(c["mult"])]]
        self.conv1 = CausalConv3d(c["z_dim"], dims[0])
        self.middle = middle(dims[0])
        stages = []
        for i, (d_in, d_out) in enumerate(zip(dims, dims[1:])):
            grows = i < len(c["temporal"])
            if i > 0 and not c["residual"]:
                d_in //= 2                                                             # 2.1's upsampler halves channels
            layers = [ResidualBlock(d_in if j == 0 else d_out, d_out) for j in range(c["decoder_blocks"])]
            temporal = grows and c["temporal"][::-1][i]
            if grows:
                layers.append(Resample(d_out, d_out if c["residual"] else d_out // 2, up=True, temporal=temporal))
            stages += [UpStage(layers, d_out, 1 + temporal, 1 + grows)] if c["residual"] else layers
        self.upsamples = nn.Sequential(*stages)
        self.head = head(dims[-1], 3 * c["patch"] ** 2)

    def forward(self, x):
        return self.head(self.upsamples(self.middle(self.conv1(x))))


# ----------------------------------------------------------------------------------------------------------------------
# the model

class VideoVAE(nn.Module):
    """Wan's causal video VAE (arXiv 2503.20314) from one flat config, e.g. CONFIGS["nano"].

    The whole clip goes through at once, which equals the published chunk cache, and memory grows with the length; or
    it is streamed, `chunk` latent frames at a time after the first, in memory that does not depend on the length."""
    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        z, n, m = config["z_dim"], config["blocks"], config["decoder_blocks"]
        self.stride_t = 2 ** sum(config["temporal"])
        self.stride = config["patch"] * 2 ** len(config["temporal"])
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * z, 2 * z, (1, 1, 1))
        self.conv2 = CausalConv3d(z, z, (1, 1, 1))
        self.decoder = Decoder(config)
        self.init_weights()

        # diffusers' names -> ours. 2.2 nests its stages; 2.1 numbers the decoder's layers in one row.
        self.RENAMES = [
            (r"(\d\.)norm1\.", r"\1residual.0."), (r"(\d\.)conv1\.", r"\1residual.2."),
            (r"(\d\.)norm2\.", r"\1residual.3."), (r"(\d\.)conv2\.", r"\1residual.6."), (r"conv_shortcut", "shortcut"),
            (r"mid_block\.resnets\.0", "middle.0"), (r"mid_block\.attentions\.0", "middle.1"),
            (r"mid_block\.resnets\.1", "middle.2"), (r"conv_in", "conv1"), (r"norm_out", "head.0"),
            (r"conv_out", "head.2"), (r"^post_quant_conv", "conv2"), (r"^quant_conv", "conv1")]
        if config["residual"]:
            self.RENAMES += [
                (r"(down|up)_blocks\.(\d+)\.resnets", r"\1samples.\2.\1samples"),
                (r"down_blocks\.(\d+)\.downsampler", rf"downsamples.\1.downsamples.{n}"),
                (r"up_blocks\.(\d+)\.upsampler", rf"upsamples.\1.upsamples.{m}")]
        else:
            self.RENAMES += [(r"down_blocks", "downsamples")]
            for i in range(len(config["mult"])):
                k = i * (m + 1)
                self.RENAMES += [(rf"up_blocks\.{i}\.resnets\.{j}\.", f"upsamples.{k + j}.") for j in range(m)]
                self.RENAMES += [(rf"up_blocks\.{i}\.upsamplers\.0", f"upsamples.{k + m}")]

    @torch.no_grad()
    def init_weights(self):
        """What matters when training from scratch; everything else keeps PyTorch's default."""
        for module in self.modules():
            if isinstance(module, ResidualBlock):                                      # blocks start as their shortcut
                nn.init.zeros_(module.residual[6].weight), nn.init.zeros_(module.residual[6].bias)
            if isinstance(module, AttentionBlock):
                nn.init.zeros_(module.proj.weight), nn.init.zeros_(module.proj.bias)
            if isinstance(module, Resample) and module.temporal:                       # and time starts as a copy:
                weight, eye = module.time_conv.weight, torch.eye(module.time_conv.in_channels)
                nn.init.zeros_(weight), nn.init.zeros_(module.time_conv.bias)
                weight[:, :, -1, 0, 0] = eye.repeat(2, 1) if module.up else eye        # of the newest frame
        self.conv1.bias[self.config["z_dim"]:] = -6.0                                  # little noise at the start

    def stream(self, x, chunk):
        """Yield x whole, or (chunk > 0) its frame 0, then `chunk` frames at a time, while all modules remember."""
        if not chunk:
            yield x
            return
        modules = [m for m in self.modules() if hasattr(m, "past")]
        try:
            for m in modules:
                m.past = []
            yield x[:, :, :1]
            yield from x[:, :, 1:].split(chunk, 2) if x.shape[2] > 1 else ()
        finally:
            for m in modules:
                m.past = None

    def moments(self, video, chunk=0):
        """(B, 3, 1+4k, H, W) in [-1, 1] -> mean and log variance of the raw latent, (B, z, 1+k, h, w) each, fp32.

        Raises InputError unless T = 1+4k and H, W are multiples of the spatial stride."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise common.InputError(f"video has shape {tuple(video.shape)}; expected (B, 3, T, H, W)")
        T, H, W = video.shape[2:]
        if T % self.stride_t != 1:
            raise common.InputError(f"{T} frames do not fit: T must be 1 + {self.stride_t}k, for example "
                                    f"{1 + max(T - 1, 0) // self.stride_t * self.stride_t} "
                                    f"or {1 + -(-(T - 1) // self.stride_t) * self.stride_t}")
        if H % self.stride or W % self.stride or H == 0 or W == 0:
            raise common.InputError(f"{H}x{W} pixels do not fit: both sides must be multiples of {self.stride}")
        p = self.config["patch"]
        out = []
        for x in self.stream(video, chunk * self.stride_t):
            x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))                          # (B, 3, T, h, p, w, p)
            x = x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)                           # channel order c, w, h
            x = x.contiguous(memory_format=torch.channels_last_3d)
            out.append(self.conv1(self.encoder(x)).float())
        return (out[0] if len(out) == 1 else torch.cat(out, 2)).chunk(2, dim=1)

    def reconstruct(self, z, chunk=0):
        """Raw latent (B, z, 1+k, h, w) -> video (B, 3, 1+4k, H, W), fp32, not clamped."""
        p, out = self.config["patch"], []
        for part in self.stream(z, chunk):
            x = self.decoder(self.conv2(part.contiguous(memory_format=torch.channels_last_3d))).float()
            x = x.unflatten(1, (3, p, p)).permute(0, 1, 4, 5, 3, 6, 2)                 # (B, 3, T, h, p, w, p)
            out.append(x.flatten(5, 6).flatten(3, 4))
        return out[0] if len(out) == 1 else torch.cat(out, 2)

    def stats(self, like):
        """The latent's mean and standard deviation per channel, (1, z, 1, 1, 1) each."""
        return (torch.tensor(self.config[k], dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
                for k in ("latent_mean", "latent_std"))

    def encode(self, video, chunk=0):
        """(B, 3, 1+4k, H, W) in [-1, 1] -> normalised latent (B, z, 1+k, h, w), the posterior's mean.

        chunk > 0 streams. Raises InputError as `moments` does."""
        mu, _ = self.moments(video, chunk)
        mean, std = self.stats(mu)
        return (mu - mean) / std

    def decode(self, latent, chunk=0):
        """Normalised latent (B, z, 1+k, h, w) -> video (B, 3, 1+4k, H, W) in [-1, 1].

        chunk > 0 streams. Raises InputError unless the latent has five axes and z channels."""
        if latent.ndim != 5 or latent.shape[1] != self.config["z_dim"]:
            raise common.InputError(f"latent has shape {tuple(latent.shape)}; "
                                    f"expected (B, {self.config['z_dim']}, t, h, w)")
        mean, std = self.stats(latent)
        return self.reconstruct(latent * std + mean, chunk).clamp(-1, 1)

    def forward(self, video, noise):
        """The training pass: video, noise (B, z, 1+k, h, w) -> reconstruction, mu, log variance."""
        mu, logvar = self.moments(video)
        return self.reconstruct(mu + (0.5 * logvar).exp() * noise), mu, logvar


def diffusers_config(c):
    """AutoencoderKLWan's config.json as one of ours."""
    return dict(dim=c["base_dim"], decoder_dim=c.get("decoder_base_dim") or c["base_dim"], z_dim=c["z_dim"],
                mult=c["dim_mult"], temporal=c["temperal_downsample"], blocks=c["num_res_blocks"],
                decoder_blocks=c["num_res_blocks"] + 1, patch=c.get("patch_size") or 1,
                residual=c.get("is_residual", False), latent_mean=c["latents_mean"], latent_std=c["latents_std"])


def load_vae(path, config=None, device="cpu"):
    """A weight file -> frozen VideoVAE in eval mode. config: for published files, which carry none of ours."""
    config = config or common.read_config(path)
    if "latent_mean" not in config:
        raise common.InputError(f"{path} carries no VAE config; pass one of CONFIGS: {', '.join(CONFIGS)}")
    # a large one without random weights first; a small one has them sooner than PyTorch has imported what that takes
    with torch.device("meta" if config["dim"] >= 96 else "cpu"):
        model = VideoVAE(config)
    common.load_weights(model, path, device=device)
    return model.eval().requires_grad_(False)


def visibility(vae, latent):
    """How much of each latent channel a picture shows: E |d video / d channel|^2, mean 1 -> (C, 1, 1, 1).

    latent (B, C, 1+k, h, w), k > 0: a few clips to measure it on; their first two frames tell as much as all. All
    channels have variance one, and those that hardly show are the hardest to predict: a model that is trained in
    latents without this weight works mostly for them. One random projection of the video gives all channels in one
    backward pass."""
    g, power = common.generator("visibility"), 0
    # of large pictures the middle 16 x 16, two clips at a time: whole, the gradient takes gigabytes
    top, left = (max(0, (n - 16) // 2) for n in latent.shape[3:])
    latent = latent[..., top:top + 16, left:left + 16].float()
    for part in latent.split(max(1, 2**17 // latent[0, 0, 0].numel()**2)):
        video = vae.decode(part.requires_grad_())
        gradient, = torch.autograd.grad(video, part, torch.randn(video.shape, generator=g).to(video))
        power = power + gradient[:, :, 1:].square().sum((0, 2, 3, 4))
    return (power / power.mean()).view(-1, 1, 1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# training the nano VAE

@dataclass
class Config:
    name: str = "vae"               # the run's folder under out/
    out: str = ""                   # where the weights go; empty: out/<name>/vae.safetensors
    scenarios: str = ",".join(simdata.SCENARIOS)  # which of the world's, separated by commas; they take turns
    clips: int = 2560               # training clips, simulated once and kept in memory (0.4 MB each)
    val_clips: int = 64             # held-out clips
    steps: int = 6750               # optimizer steps; the learning rate follows a cosine over them
    batch: int = 2                  # whole clips a step, over all ranks, or as many pixels a frame in pieces
    crop: int = 32                  # side of the pieces around bodies that are seen first, a multiple of 8
    whole: float = 0.2              # share of the steps, at the end, that see whole clips, all of their frames
    window: int = 13                # frames of a piece, 1 + 4k
    lr: float = 1e-3                # peak learning rate
    warmup: int = 100               # steps of linear warm-up
    l1: float = 0.05                # weight of the absolute error beside the squared error
    body_weight: float = 6.0        # loss weight of pixels at or next to a body, against 1 for the background
    kl: float = 1e-5                # weight of the KL divergence per latent number
    eval_every: int = 500           # steps between validations (and checkpoints)
    seed: int = 0                   # of everything
    init_from: str = ""             # start from this vae.safetensors
    decoder_only: bool = False      # with --init_from: the encoder stays, so every latent and every DiT stays valid
    resume: bool = False            # go on from out/<name>/state.safetensors
    device: str = "auto"            # auto, cuda, mps or cpu


PRESETS = {"nano": {}, "gpu": dict(name="vae_gpu", clips=4096, steps=800, batch=64, lr=2e-3, warmup=50, eval_every=400)}
SIZE, FRAMES = 64, 25


def clips(scenario, split, count, seed, start, device="cpu"):
    """-> uint8 video (N, 3, T, H, W) and body mask (N, T, H, W)."""
    batch = simdata.make_batch(scenario, count, seed, split=split, frames=FRAMES, size=SIZE, start=start, device=device)
    return dict(video=common.to_bytes(batch["video"]), mask=batch["mask"])


def simulate(scenarios, split, count, seed, device, chunk=256):
    """Clips as a dict of two tensors; the scenarios take turns, chunk by chunk."""
    names = scenarios.split(",")
    chunk = min(chunk * common.scenes_at_once(device), math.ceil(count / len(names)))
    tasks = [(names[i // chunk % len(names)], split, min(chunk, count - i), seed, i, str(device))
             for i in range(0, count, chunk)]
    parts = list(tqdm(common.side_by_side(clips, tasks, device, alone=True), total=len(tasks),
                      desc=f"simulating {split} clips"))
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def load_clips(cfg, rank, folder, device):
    """The clips as a dict of uint8 tensors, from the run folder if they are there; rank 0 simulates them once."""
    stamp = {k: getattr(cfg, k) for k in ("scenarios", "clips", "val_clips", "seed")} | {
        "world": common.source_hash(), "code": common.source_hash(__file__)}

    def make():
        train = simulate(cfg.scenarios, "train", cfg.clips, cfg.seed, device)
        val = simulate(cfg.scenarios, "val", cfg.val_clips, cfg.seed, torch.device("cpu"))     # few
        return train | {f"val_{k}": v for k, v in val.items()}
    return common.kept(f"{folder}/clips.safetensors", rank, stamp, make)


def get_batch(cfg, data, step, rank, world):
    """This rank's slice of the step's global batch: video, weight (B, 1, T, S, S), noise. From (seed, step); on the
    device where the data is.

    Most of a picture is a still wall and floor. So pieces around bodies come first, as many as have the pixels of the
    whole clips that come at the end. Those show all frames: what has only seen short clips drifts in longer ones."""
    g = common.generator(cfg.seed, "vae", step)
    side, window = (SIZE, FRAMES) if step >= (1 - cfg.whole) * cfg.steps else (cfg.crop, cfg.window)
    n = cfg.batch * (SIZE // side) ** 2
    index = torch.randint(len(data["video"]), (n,), generator=g)
    first = torch.randint(FRAMES - window + 1, (n,), generator=g)
    flip = torch.rand(n, generator=g) < 0.5
    which, *shift = torch.rand(3, n, generator=g)
    device, mine = data["video"].device, slice(rank * n // world, (rank + 1) * n // world)
    noise = common.noise((n, CONFIGS["nano"]["z_dim"], 1 + window // 4, side // 8, side // 8), cfg.seed, "vae noise",
                         step, device=device)[mine]
    index, first, flip, which, up, left = (x[mine].to(device) for x in (index, first, flip, which, *shift))
    # one of the pixels of bodies, half-way through; the middle if none is in view
    spots = (data["mask"][index, first + window // 2] > 0).flatten(1).cumsum(1)      # (B, H W), the count so far
    spot = (spots > (which * spots[:, -1]).long()[:, None]).int().argmax(1)
    spot = torch.where(spots[:, -1] > 0, spot, SIZE // 2 * (SIZE + 1))
    y, x = ((at - side * s).long().clamp(0, SIZE - side)[:, None] + torch.arange(side, device=device)
            for at, s in ((spot // SIZE, up), (spot % SIZE, left)))                  # (B, side)
    x = torch.where(flip[:, None], x.flip(1), x)
    time = first[:, None] + torch.arange(window, device=device)                      # (B, T)
    where = (index[:, None, None, None], time[:, :, None, None], y[:, None, :, None], x[:, None, None, :])
    video, body = data["video"].transpose(1, 2)[where[0], where[1], :, where[2], where[3]], data["mask"][where] > 0
    # Dilated by one pixel and one frame: edges, and where a body just was or is about to be, are where ghosts appear.
    body = F.max_pool3d(body.float()[:, None], 3, stride=1, padding=1)               # (B, 1, T, S, S)
    return common.from_bytes(video.movedim(-1, 1)).contiguous(), 1 + (cfg.body_weight - 1) * body, noise


@torch.no_grad()
def evaluate(model, data, device, rank, world):
    """Mean PSNR in dB over held-out clips, of whole frames and inside bodies; and the first four reconstructions."""
    total, shown = torch.zeros(3), None
    for i in range(rank * 4, len(data["val_video"]), world * 4):
        video = common.from_bytes(data["val_video"][i:i + 4]).to(device)
        with common.autocast(device):
            recon = model.decode(model.encode(video))
        error = (recon - video).square().mean(1) / 4                                   # (B, T, H, W), for a range of 1
        body = data["val_mask"][i:i + 4].to(device) > 0
        inside = (error * body).sum((1, 2, 3)) / body.sum((1, 2, 3)).clamp_min(1)
        psnr = [-10 * e.clamp_min(1e-10).log10().sum() for e in (error.mean((1, 2, 3)), inside)]
        total += torch.tensor([*psnr, float(len(video))])
        shown = recon if shown is None else shown
    whole, inside, count = common.average(total, device).tolist()
    return whole / count, inside / count, shown


@torch.no_grad()
def latent_stats(model, data, device, rank, world, clips=512):
    """Per-channel mean and standard deviation of the raw latent over training clips, as lists."""
    total = torch.zeros(3, model.config["z_dim"])
    some = common.evenly(len(data["video"]), clips)
    for index in some.split(8)[rank::world]:
        with common.autocast(device):
            mu = model.moments(common.from_bytes(data["video"][index]).to(device))[0].cpu()
        total += torch.stack([mu.sum((0, 2, 3, 4)), mu.square().sum((0, 2, 3, 4)),
                              torch.full(mu.shape[1:2], mu[:, 0].numel())])
    s, s2, n = common.average(total, device).cpu()
    return (s / n).tolist(), (s2 / n - (s / n) ** 2).sqrt().tolist()


def main():
    cfg = common.parse_config(Config, sys.argv[1:], PRESETS)
    common.check_range(cfg, clips=(1, 10**6), val_clips=(1, 10**5), steps=(1, 10**8), batch=(1, 10**5), lr=(0, 1),
                       window=(5, FRAMES), crop=(8, SIZE), whole=(0, 1), eval_every=(1, 10**8), warmup=(0, 10**8))
    common.check_names("scenarios", cfg.scenarios, simdata.SCENARIOS)
    device, rank, world = common.setup(cfg.device)
    if cfg.decoder_only and not cfg.init_from:
        raise common.InputError("--decoder_only=True keeps the encoder of --init_from=FILE; give that file")
    for wrong, what in ((cfg.batch % world, f"--batch={cfg.batch}: expected a multiple of the {world} ranks"),
                        (cfg.window % 4 != 1, f"--window={cfg.window}: expected 1 + 4k"),
                        (cfg.crop % 8, f"--crop={cfg.crop}: expected a multiple of 8")):
        if wrong:
            raise common.InputError(what)
    if cfg.out:
        common.check_writable(cfg.out)
    torch.manual_seed(cfg.seed)
    raw = VideoVAE(CONFIGS["nano"])
    if cfg.init_from:
        raw.config |= common.load_weights(raw, cfg.init_from)                          # its latent statistics, too
    folder = common.start_run(cfg, rank, f"out/{cfg.name}")
    out, log, state = cfg.out or f"{folder}/vae.safetensors", f"{folder}/metrics.jsonl", f"{folder}/state.safetensors"
    data = common.to_device_if_it_fits(load_clips(cfg, rank, folder, device), device)

    if cfg.decoder_only:
        raw.encoder.requires_grad_(False), raw.conv1.requires_grad_(False)
    raw.to(device)
    model = DistributedDataParallel(raw) if world > 1 else raw
    trained = [p for p in raw.parameters() if p.requires_grad]
    # the norms' gains, (C, 1, 1, 1), are among Muon's: so the shipped weights were trained
    optimizers = [common.Muon([p for p in trained if p.ndim > 1], cfg.lr, 0.01),
                  torch.optim.AdamW([p for p in trained if p.ndim < 2], cfg.lr, betas=(0.9, 0.99), weight_decay=0.01)]
    start = common.load_state(state, {"model": raw}, *optimizers) if cfg.resume else 0
    if rank == 0:
        common.trim_log(log, start)
        print(f"{sum(p.numel() for p in raw.parameters()):,} parameters, {len(data['video'])} clips, from step {start}")

    stop, begin, seen = common.Stop(), time.time(), start
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, disable=rank > 0)
    for step in bar:
        # The learning rate is a function of the step alone, so a resumed run takes the same path.
        lr = cfg.lr * min((step + 1) / max(cfg.warmup, 1), 0.01 + 0.495 * (1 + math.cos(math.pi * step / cfg.steps)))
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr
        video, weight, noise = (v.to(device) for v in get_batch(cfg, data, step, rank, world))
        with common.autocast(device):
            recon, mu, logvar = model(video, noise)
        error = recon - video
        # Not divided by the mean weight: so the mean over ranks is exactly the mean over the global batch.
        mse = (weight * error.square()).mean()
        l1 = (weight * error.abs()).mean()
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()
        loss = mse + cfg.l1 * l1 + cfg.kl * kl
        raw.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen = step + 1

        if step % 20 == 0:
            entry = {"step": step, "loss": loss.item(), "mse": error.square().mean().item(), "l1": l1.item(),
                     "kl": kl.item(), "grad_norm": norm.item(), "lr": lr, "seconds": time.time() - begin}
            if rank == 0:
                common.log_line(log, entry)
                bar.set_postfix(psnr=f"{-10 * math.log10(max(entry['mse'], 1e-9) / 4):.2f}")
        ending = stop.agreed(device)
        if seen % cfg.eval_every == 0 or seen == cfg.steps or ending:
            common.save_state(state, seen, {"model": raw}, *optimizers)
        if seen % cfg.eval_every == 0 or seen == cfg.steps:
            whole, inside, shown = evaluate(raw, data, device, rank, world)
            if rank == 0:
                common.log_line(log, {"step": step, "val_psnr": whole, "val_psnr_body": inside})
                bar.write(f"step {seen}: validation PSNR {whole:.2f} dB, inside bodies {inside:.2f} dB")
                pairs = [v for i, r in enumerate(shown) for v in (common.from_bytes(data["val_video"][i]), r)]
                common.write_image(f"{folder}/{seen:06d}.png", common.sheet(list(map(common.to_uint8, pairs)), every=2))
        if ending:
            break

    if seen < cfg.steps:
        if rank == 0:
            print(f"stopped after {seen} steps; go on with --resume=True")
    else:
        if not cfg.decoder_only:
            raw.config["latent_mean"], raw.config["latent_std"] = latent_stats(raw, data, device, rank, world)
        if rank == 0:
            common.save_weights(out, raw, raw.config, torch.bfloat16)
            print(f"wrote {out} after {seen} steps")


if __name__ == "__main__":
    common.run(main)
