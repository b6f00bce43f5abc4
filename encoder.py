"""
PhysEncoder: what the first frame tells about the physics of the scene. A frozen DINOv2 looks at the image, a small
trainable "physical head" (the trunk of Depth Anything's DPT) turns its features into the DiT's physical tokens.

    python encoder.py                     # pretrain the nano backbone on the simulator's truth, two CPU cores
    python encoder.py --resume=True       # go on after a stop, bit-exactly
    python encoder.py --backbone=out/dino/backbone.safetensors --scenes=6400    # only a readout, to data/fetch.py's
    torchrun --nproc_per_node=8 encoder.py --batch=256 --steps=20000 --scenes=100000

writes out/encoder/backbone.safetensors (config inside), readout.safetensors, depth_head.safetensors, metrics.jsonl and
val.png: pictures of validation scenes with true and foretold paths, depth and normals. To use the encoder alone, in
somebody's pipeline:

    small = CONFIGS["depth_anything_v2_vits"]
    encoder = load_phys_encoder("data/backbone.safetensors", config={"out_dim": 768})      # nano; the head is random
    encoder = load_phys_encoder("depth_anything_v2_vits.pth", config=small | {"out_dim": 768})        # random as well
    encoder.start_head("depth_anything_v2_vits.pth")                   # or from that file's own head, but for its end
    tokens = encoder(image, grid=(8, 8))  # (B, 3, H, W) in [-1, 1] of any size -> (B, 64, 768)

Networks and parameter names: DINOv2 (arXiv 2304.07193), registers (2309.16588), Depth Anything V2 (2406.09414).
"""
import math
import os
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
import simdata
from common import InputError

# image_size: the grid of pos_embed in pixels, which is resized for others. input_size: what PhysEncoder resizes the
# image's shorter side to; any multiple of the patch will do. registers: how many extra tokens there are, without a
# place in the picture. layers: the blocks that the DPT reads. features, out_channels: widths of the DPT.
CONFIGS = {
    "nano": dict(image_size=112, input_size=112, patch_size=14, dim=192, depth=6, heads=3, registers=0,
                 layers=[1, 2, 4, 5], features=32, out_channels=[24, 48, 96, 96]),
    "dinov2_vits14": dict(image_size=518, input_size=518, patch_size=14, dim=384, depth=12, heads=6, registers=0,
                          layers=[2, 5, 8, 11], features=64, out_channels=[48, 96, 192, 384]),
    "dinov2_vitb14": dict(image_size=518, input_size=518, patch_size=14, dim=768, depth=12, heads=12, registers=0,
                          layers=[2, 5, 8, 11], features=128, out_channels=[96, 192, 384, 768]),
    "dinov2_vitl14": dict(image_size=518, input_size=518, patch_size=14, dim=1024, depth=24, heads=16, registers=0,
                          layers=[4, 11, 17, 23], features=256, out_channels=[256, 512, 1024, 1024]),
}
CONFIGS |= {f"dinov2_vit{s}14_reg4": CONFIGS[f"dinov2_vit{s}14"] | {"registers": 4} for s in "sbl"}
CONFIGS |= {f"depth_anything_v2_vit{s}": CONFIGS[f"dinov2_vit{s}14"] for s in "sbl"}
FUTURE = 24                                        # frames at 16 fps whose positions are foretold, 1.5 s


# ----------------------------------------------------------------------------------------------------------------------
# the backbone

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                                              # (B, L, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # (B, heads, L, D/heads)
        return self.proj(common.attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.ls2 = LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """The ViT of DINOv2, with the parameter names of facebookresearch/dinov2.

    forward(image (B, 3, H, W) in [-1, 1]) -> (features, cls): for each block of config["layers"] its patch tokens after
    the final norm (B, H/14 * W/14, D), row by row and without registers, as in get_intermediate_layers, and the class
    token of the last block (B, D). Raises InputError unless H and W are multiples of the patch size."""
    RENAMES = [                                                                        # transformers -> official
        (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"), (r"encoder\.layer\.", "blocks."),
        *((rf"attention\.attention\.{part}\.(\w+)", rf"attn.qkv.\1#{i}")                 # three there, one here
          for i, part in enumerate(("query", "key", "value"))), (r"attention\.output\.dense", "attn.proj"),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"), (r"layernorm\.", "norm."),
    ]
    OPTIONAL = "mask_token"                        # only DINOv2's own pretraining masks patches

    def __init__(self, config):
        super().__init__()
        D, self.patch, self.layers = config["dim"], config["patch_size"], config["layers"]
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (config["image_size"] // self.patch) ** 2, D))
        self.register_tokens = nn.Parameter(torch.empty(1, config["registers"], D)) if config["registers"] else None
        # never used here; a parameter without a gradient would stop DDP
        self.mask_token = nn.Parameter(torch.zeros(1, D), requires_grad=False)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, D, self.patch, stride=self.patch)))
        self.blocks = nn.ModuleList(Block(D, config["heads"]) for _ in range(config["depth"]))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        for tokens in (t for t in (self.cls_token, self.pos_embed, self.register_tokens) if t is not None):
            nn.init.trunc_normal_(tokens, std=0.02)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def positions(self, gh, gw):
        """pos_embed for a grid of gh x gw patches: (1, 1 + gh * gw, D). Each family has its own way to resize it."""
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        M = math.isqrt(grid.shape[1])
        if (gh, gw) == (M, M):
            return self.pos_embed
        grid = grid.float().unflatten(1, (M, M)).permute(0, 3, 1, 2)                   # (1, D, M, M)
        if self.register_tokens is None:
            # the first release nudged the scale by 0.1 patches to get round a rounding error, and its weights expect it
            grid = F.interpolate(grid, scale_factor=((gh + 0.1) / M, (gw + 0.1) / M), mode="bicubic")
        else:
            grid = F.interpolate(grid, size=(gh, gw), mode="bicubic", antialias=True)
        return torch.cat([cls, grid.flatten(2).mT.to(cls.dtype)], dim=1)

    def forward(self, image):
        B, C, H, W = image.shape
        if C != 3 or H % self.patch or W % self.patch:
            raise InputError(f"image is {C}x{H}x{W}; expected 3 channels and sides that are multiples of {self.patch}")
        mean, std = image.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # ImageNet's
        x = self.patch_embed(((image + 1) / 2 - mean) / std).flatten(2).mT             # (B, L, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1) + self.positions(H // self.patch, W // self.patch)
        first = 1
        if self.register_tokens is not None:                                           # they have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)
            first += self.register_tokens.shape[1]
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.layers:
                features.append(self.norm(x)[:, first:])                               # (B, L, D)
        return features, self.norm(x[:, 0])


# ----------------------------------------------------------------------------------------------------------------------
# the DPT trunk and its two heads

class ResidualConvUnit(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class FeatureFusion(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.resConfUnit1 = ResidualConvUnit(dim)
        self.resConfUnit2 = ResidualConvUnit(dim)
        self.out_conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x, size, skip=None):
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        # officially the 1x1 convolution comes last; the two commute (bilinear weights sum to 1), this costs a quarter
        return F.interpolate(self.out_conv(self.resConfUnit2(x)), size, mode="bilinear", align_corners=True)


class DPT(nn.Module):
    """Depth Anything V2's DPT up to the output convolutions, under the official names.

    trunk(features: 4 x (B, gh * gw, D), patch_grid=(gh, gw)) -> (B, config["features"], 8 gh, 8 gw)."""
    def __init__(self, config):
        super().__init__()
        D, width, channels = config["dim"], config["features"], config["out_channels"]
        self.projects = nn.ModuleList(nn.Conv2d(D, c, 1) for c in channels)
        # the ViT has one resolution; a convolutional pyramid of x4, x2, x1 and x1/2 is made of it
        a, b, _, d = channels
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(a, a, 4, stride=4), nn.ConvTranspose2d(b, b, 2, stride=2),
            nn.Identity(), nn.Conv2d(d, d, 3, stride=2, padding=1)])
        self.scratch = nn.ModuleDict({f"layer{i + 1}_rn": nn.Conv2d(c, width, 3, padding=1, bias=False)
                                      for i, c in enumerate(channels)})
        self.scratch.update({f"refinenet{i}": FeatureFusion(width) for i in (1, 2, 3, 4)})
        self.scratch.refinenet4.resConfUnit1.requires_grad_(False)                     # in every file, but never used
        # PyTorch's default shrinks a ReLU network's signal and lets the biases win: all tokens would start out alike
        for conv in (m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))):
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="linear")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def trunk(self, features, patch_grid):
        pyramid = [resize(project(x.mT.unflatten(2, patch_grid)))                      # (B, channels[i], h_i, w_i)
                   for x, project, resize in zip(features, self.projects, self.resize_layers)]
        one, two, three, four = (self.scratch[f"layer{i + 1}_rn"](x) for i, x in enumerate(pyramid))
        x = self.scratch.refinenet4(four, three.shape[2:])
        x = self.scratch.refinenet3(x, two.shape[2:], three)
        x = self.scratch.refinenet2(x, one.shape[2:], two)
        return self.scratch.refinenet1(x, [2 * n for n in one.shape[2:]], one)


class DepthHead(DPT):
    """forward(features, patch_grid) -> inverse depth (B, 14 gh, 14 gw), >= 0, up to an unknown scale and shift."""
    def __init__(self, config):
        super().__init__(config)
        width, self.patch = config["features"], config["patch_size"]
        self.scratch["output_conv1"] = nn.Conv2d(width, width // 2, 3, padding=1)
        self.scratch["output_conv2"] = nn.Sequential(nn.Conv2d(width // 2, 32, 3, padding=1), nn.ReLU(),
                                                     nn.Conv2d(32, 1, 1), nn.ReLU())
        nn.init.ones_(self.scratch.output_conv2[2].bias)                               # a dead ReLU cannot learn

    def forward(self, features, patch_grid):
        x = self.scratch.output_conv1(self.trunk(features, patch_grid))
        x = F.interpolate(x, [self.patch * n for n in patch_grid], mode="bilinear", align_corners=True)
        return self.scratch.output_conv2(x)[:, 0]


class PhysicalHead(DPT):
    """forward(features, patch_grid, told, grid, frames=0) -> physical tokens (B, P, config["out_dim"]), P = grid[0] *
    grid[1], and where the config says foretell, as many again for each of so many latent frames to come.
    told: the readout's answers and the colour of each cell (B, cells, 3), or None.

    A token is made of the trunk's map, averaged over its part of the picture, and of the last layer's 2 x 2 patches
    there: what the backbone knows of a body need not fit into a few channels, averaged with the background. Those of
    later frames are made of what the readout foretells: each cell of a body moves along its body's path, and takes
    along what it is and how far from the token's middle the body's centre will be."""
    WHAT = 24                                      # numbers that a cell takes along

    def __init__(self, config):
        super().__init__(config)
        # The tokens join the DiT's own patch tokens. Much larger ones would take the attention over before they mean
        # anything, much smaller ones would hardly be seen: norm and weight start them at a std of 0.5, any backbone.
        width = config["features"] + 4 * config["dim"]
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config["out_dim"])
        nn.init.normal_(self.proj.weight, std=0.5 / math.sqrt(width))
        nn.init.zeros_(self.proj.bias)
        self.foretell = config.get("foretell", False)
        if self.foretell:
            self.what = nn.Linear(config["dim"], 4 * self.WHAT)
            self.join = nn.Linear(9 * (self.WHAT + 3), config["out_dim"])              # and its colour
            for linear, std in ((self.what, 1.0), (self.join, 0.5)):
                nn.init.normal_(linear.weight, std=std / math.sqrt(linear.in_features))
                nn.init.zeros_(linear.bias)

    def grid(self, latent, most=400):
        """How the tokens lie for a clip (B, C, T, H, W) of latents -> (gh, gw): as the DiT's own patches of a frame,
        and where those are too many, each in the place of 2 x 2 of them, or 3 x 3, or so on. What is foretold of a
        place joins that place's own token, so there it is one for each."""
        h, w = (n // 2 for n in latent.shape[3:])
        factors = [n for n in range(1, math.gcd(h, w) + 1) if h % n == w % n == 0]
        n = 1 if self.foretell else next((n for n in factors if h * w <= most * n * n), factors[-1])
        return h // n, w // n

    def forward(self, features, patch_grid, told, grid, frames=0):
        x = F.adaptive_avg_pool2d(self.trunk(features, patch_grid), grid)              # (B, features, *grid)
        last = features[-1].mT.unflatten(2, patch_grid)                                # (B, D, *patch_grid)
        last = F.pixel_unshuffle(F.adaptive_avg_pool2d(last, [2 * n for n in grid]), 2)              # (B, 4 D, *grid)
        x = torch.cat([x, last.to(x.dtype)], 1)
        tokens = self.proj(self.norm(x.flatten(2).mT))
        if not self.foretell or not frames:
            return tokens
        what = self.what(features[-1]).unflatten(-1, (4, -1)).flatten(1, 2).float()    # (B, cells, WHAT)
        what = torch.cat([what, told[3]], -1)                                          # (B, cells, WHAT + 3)
        weight, middle = splat(*told[:3], grid, frames)
        terms = torch.cat([weight[..., None], weight[..., None] * middle], -1)         # (B, cells, frames, P, 9)
        # a body's own numbers times where it is: two bodies in one token do not exchange their places
        x = what.mT @ terms.flatten(2) / (1 + weight.sum(1)).repeat_interleave(9, -1).flatten(1)[:, None]
        x = x.unflatten(2, (-1, 9)).transpose(1, 2).flatten(2)                         # (B, frames P, 9 (WHAT + 3))
        return torch.cat([tokens, self.join(x).to(tokens.dtype)], 1)


class Readout(nn.Linear):
    """Linear answers for each of 2 x 2 cells a patch, from the last patch tokens: is there a body, where is its centre,
    and how far will it have moved in each of FUTURE frames? Fitted by least squares (fit_readout), then frozen.

    forward(tokens (B, L, D), patch_grid) -> occupied (B, 4 L) in [0, 1]; now, later (B, 4 L, FUTURE, 2): where the cell
    itself and its body's centre will be, x and y in [-1, 1]."""
    def __init__(self, dim):
        super().__init__(dim, 4 * (3 + 2 * FUTURE))

    def forward(self, tokens, patch_grid):
        with torch.autocast(tokens.device.type, enabled=False):
            said = super().forward(tokens.float()).unflatten(-1, (4, -1)).flatten(1, 2)              # (B, 4 L, known)
        occupied, center, path = said.split([1, 2, 2 * FUTURE], -1)
        cell = middles(patch_grid, tokens.device)[:, None]                             # (4 L, 1, 2)
        path = path.unflatten(-1, (FUTURE, 2))
        return occupied[..., 0].sigmoid(), cell + path, center[:, :, None] + path


def middles(patch_grid, device):
    """Where the 2 x 2 cells of each patch are, in the readout's order: (4 L, 2), x and y in [-1, 1]."""
    y, x = ((torch.arange(2 * n, device=device) + 0.5) / n - 1 for n in patch_grid)
    cell = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))])                        # (2, 2 gh, 2 gw)
    return F.pixel_unshuffle(cell, 2).unflatten(0, (2, 4)).permute(2, 3, 1, 0).reshape(-1, 2)


def mirrored(told, patch_grid):
    """A Readout's answers about a picture -> those about the mirrored picture."""
    occupied, cell, center = (x.unflatten(1, (*patch_grid, 2, 2)).flip(2, 4).flatten(1, 4) for x in told)
    return occupied, cell * cell.new_tensor([-1, 1]), center * center.new_tensor([-1, 1])


def push_apart(told, patch_grid, least=0.7):
    """Two bodies cannot be in one place -> a Readout's answers in which they are not.

    A readout answers with the mean of what may happen. Where a body may fall off another to either side, the means of
    both meet, and a DiT that believes them paints one body and loses the other. So where two centres would come closer
    than `least` of the bodies' apparent radii together (or than they are in frame 0), both bodies give way alike."""
    occupied, cell, center = told
    start = middles(patch_grid, cell.device) + center[:, :, 0] - cell[:, :, 0]         # the body's centre in frame 0
    cell, center, counts = cell.clone(), center.clone(), (occupied > 0.1).sum(1)
    # Few cells show a body: the fullest n, of clips with about as many. One by one they stay in a CPU's cache, a GPU
    # would wait for Python.
    for part in counts.argsort().split(1 if cell.device.type == "cpu" else 64):
        said, some = occupied[part].topk(int(counts[part[-1]]), 1)                     # (b, n)
        part, mass = part[:, None], said * (said > 0.5)
        spot, path = start[part, some], center[part, some]                             # (b, n, 2), (b, n, FUTURE, 2)
        far = (spot[:, :, None] - spot[:, None]).norm(dim=-1)                          # (b, n, n)
        other = far > 0.12                         # what cells of one body say of its centre differs by less
        radius = ((~other * mass[:, None]).sum(2) / (math.pi * patch_grid[0] * patch_grid[1])).sqrt()
        reach = torch.minimum(least * (radius[:, :, None] + radius[:, None]), far)[..., None]       # (b, n, n, 1)
        share = (other * mass[:, None])[..., None]
        for _ in range(3):                         # one round for two bodies, more for heaps
            away = path[:, :, None] - path[:, None]                                    # (b, n, n, FUTURE, 2)
            near = away.norm(dim=-1).clamp_min(1e-4)                                   # (b, n, n, FUTURE)
            lack = F.threshold(reach - near, 1e-3, 0)  # just at reach they stay, however that is rounded
            push = ((share * lack / near)[..., None] * away).sum(2)
            path = path + 0.5 * push / (share * (lack > 0)).sum(2).clamp_min(1e-3)[..., None]
        move = (path - center[part, some]) * (said > 0.1)[..., None, None]
        cell[part, some] += move
        center[part, some] += move
    return occupied, cell, center


def splat(occupied, cell, center, grid, frames, stride=4):
    """Where the cells of Readout's answers will be among the tokens -> weight (B, cells, frames, P): how much of a cell
    is in a token, averaged over the `stride` frames of a latent frame; middle (B, cells, frames, P, 8): from the
    token's middle to the body's centre in each of them, in tokens. What lies beyond FUTURE is taken to rest."""
    when = torch.arange(stride * frames, device=cell.device).clamp_max(FUTURE - 1)

    def offsets(where):                            # from the middles of columns and rows, in tokens
        x, y = ((where[:, :, when, i, None] + 1) * (n / 2) - torch.arange(0.5, n, device=where.device)
                for i, n in ((0, grid[1]), (1, grid[0])))
        return x, y                                                                    # (B, cells, 4 frames, gw or gh)
    x, y = ((1 - d.abs()).clamp_min(0) for d in offsets(cell))                         # a tent, two tokens wide
    weight = (y[..., :, None] * x[..., None, :]).flatten(3).unflatten(2, (frames, stride)).mean(3)
    x, y = (d.clamp(-2, 2).unflatten(2, (frames, stride)).transpose(3, 4) for d in offsets(center))
    x, y = torch.broadcast_tensors(x[:, :, :, None], y[:, :, :, :, None])              # (B, cells, frames, gh, gw, 4)
    return weight * occupied[..., None, None], torch.stack([x, y], -1).flatten(5).flatten(3, 4)


def cells(mask, patches):
    """Which body a cell shows: mask (B, H, W), 0 nobody, -> (B, 2 * patches, 2 * patches) long."""
    return F.adaptive_max_pool2d(mask[:, None].float(), 2 * patches)[:, 0].long()


def owners(mask, patches):
    """The same in a Readout's order, patch by patch -> (B, L, 4)."""
    return F.pixel_unshuffle(cells(mask, patches)[:, None].float(), 2).flatten(2).mT.long()


def body_means(x, owner, N):
    """The mean of x (B, cells, ...) over the cells that show a body, owner (B, cells) -> (B, N, ...), 0 if none does;
    and which cells those are, (B, cells, N)."""
    mine = F.one_hot(owner.long(), N + 1)[..., 1:].float()
    return torch.einsum("bcn,bc...->bn...", mine / mine.sum(1, keepdim=True).clamp_min(1), x), mine


def true_paths(clips, size, patches):
    """A Readout's targets: clips of `size` pixels, T frames, N bodies -> owner (B, 4 L) uint8: which body a cell shows,
    0 nobody; path (B, N, FUTURE, 2): where its centre will be, x and y in [-1, 1]. patches: a number a side, or (rows,
    columns). If the clips do not know, or are not square, which no readout knows, all are 0."""
    mask = clips["photo_mask"] if "photo_mask" in clips else clips["mask"][:, 0] if "mask" in clips else None
    rows, columns = simdata.sides(patches)
    height, width = simdata.sides(size)            # by pixels: of 512 x 544 the patches may be 8 x 8
    if mask is None or not {"position", "camera"} <= clips.keys() or height != width:
        B = len(clips["video"])
        return torch.zeros(B, 4 * rows * columns, dtype=torch.uint8), torch.zeros(B, 1, FUTURE, 2)
    uv = simdata.project(clips["position"], clips["camera"])[0] * 2 / height - 1       # (B, T, N, 2)
    when = torch.arange(1, FUTURE + 1).clamp_max(uv.shape[1] - 1)
    return owners(mask, rows).flatten(1).byte(), uv[:, when].transpose(1, 2)


def corrected(told, owner, path):
    """The readout's answers with every body's cells moved together, so that their mean is where it really goes (see
    true_paths): what a cell says of itself, how unsure it is and how cells differ stays, and so do cells of nobody."""
    occupied, cell, center = told
    mean, mine = body_means(center, owner, path.shape[1])                              # (B, N, FUTURE, 2)
    move = torch.einsum("bcn,bnfx->bcfx", mine, path - mean)
    return occupied, cell + move, center + move


# ----------------------------------------------------------------------------------------------------------------------
# backbone + head

def resize(image, size, patch):
    """(B, 3, H, W) -> shorter side `size`, the aspect ratio kept as well as multiples of the patch allow."""
    H, W = image.shape[-2:]
    new = [max(1, round(n * size / min(H, W) / patch)) * patch for n in (H, W)]
    return image if new == [H, W] else F.interpolate(image, new, mode="bicubic", antialias=True).clamp(-1, 1)


class DepthAnything(nn.Module):
    """Depth Anything V2: image (B, 3, H, W) in [-1, 1], sides multiples of 14 -> relative inverse depth (B, H, W)."""
    OPTIONAL = DINOv2.OPTIONAL
    RENAMES = [
        *DINOv2.RENAMES, (r"^backbone\.", "pretrained."), (r"^head\.conv1", "depth_head.scratch.output_conv1"),
        (r"^head\.conv2", "depth_head.scratch.output_conv2.0"), (r"^head\.conv3", "depth_head.scratch.output_conv2.2"),
        (r"^neck\.reassemble_stage\.layers\.(\d)\.projection", r"depth_head.projects.\1"),
        (r"^neck\.reassemble_stage\.layers\.(\d)\.resize", r"depth_head.resize_layers.\1"),
        *((rf"^neck\.convs\.{i}", f"depth_head.scratch.layer{i + 1}_rn") for i in range(4)),
        *((rf"^neck\.fusion_stage\.layers\.{i}", f"depth_head.scratch.refinenet{4 - i}") for i in range(4)),
        (r"residual_layer(\d)\.convolution", r"resConfUnit\1.conv"), (r"(refinenet\d)\.projection", r"\1.out_conv"),
    ]

    def __init__(self, config):
        super().__init__()
        self.pretrained = DINOv2(config)
        self.depth_head = DepthHead(config)

    def forward(self, image):
        features, _ = self.pretrained(image)
        return self.depth_head(features, [n // self.pretrained.patch for n in image.shape[-2:]])


class PhysEncoder(nn.Module):
    """Frozen DINOv2 (`backbone`) + trainable physical head (`head`). config: an entry of CONFIGS and `out_dim`; with
    foretell=True there is a frozen `readout`, too, and tokens for the frames to come.

    forward(image (B, 3, H, W) in [-1, 1] of any size, grid=(gh, gw), frames=0) -> (B, gh * gw, out_dim), row by row,
    and if it foretells (B, (1 + frames) * gh * gw, out_dim), for so many latent frames of 1/4 s. The image is resized
    (config's input_size), and `grid` need not be that of its patches: it is how the DiT's own patches cover a frame,
    or a coarser one. With `true`, what true_paths returns, the readout is put right first: Stage I trains so.
    `features` and `head` can be called apart, for instance to run one backbone pass for a policy and its reference."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = DINOv2(config).eval().requires_grad_(False)
        self.readout = Readout(config["dim"]).requires_grad_(False) if config.get("foretell") else None
        self.head = PhysicalHead(config)

    def trunk_state(self):
        """Of the head's state dict what Depth Anything has as well."""
        return {k: v for k, v in self.head.state_dict().items() if re.match("(projects|resize_layers|scratch)[.]", k)}

    def start_head(self, path):
        """Let the head's trunk start from Depth Anything's: a Depth Anything V2 file or folder, official or
        transformers', as wide as the config says, or a depth_head.safetensors of ours. What makes tokens of the trunk's
        map stays random; the convolutions that made depth of it are left out. Raises InputError if the file misfits."""
        trunk = self.trunk_state()
        with common.open_weights(path) as (found, _):
            named = {common.renamed(k, DepthAnything.RENAMES).removeprefix("depth_head."): v          # (shape, read)
                     for k, v in found.items()}
            wrong = [f"missing {k}" for k in trunk if k not in named] + [
                f"{k} is {tuple(named[k][0])}, expected {tuple(v.shape)}"
                for k, v in trunk.items() if k in named and named[k][0] != v.shape]
            if not wrong:                          # what else is in the file is not even read
                self.head.load_state_dict({k: named[k][1]() for k in trunk}, strict=False)
        if wrong:
            raise InputError(f"{path} holds no DPT trunk that fits this backbone's head: {'; '.join(wrong[:3])}; "
                             "expected Depth Anything V2 of the backbone's size")

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, image, true=None):
        """-> (4 x (B, h * w, D), the patch grid (h, w), what is told of cells): the head's arguments before `grid`."""
        image = resize(image, self.config["input_size"], self.backbone.patch)
        features, patch_grid = self.backbone(image)[0], [n // self.backbone.patch for n in image.shape[-2:]]
        if self.readout is None:
            return features, patch_grid, None
        colour = F.adaptive_avg_pool2d(image, [2 * n for n in patch_grid])             # (B, 3, 2 h, 2 w)
        colour = F.pixel_unshuffle(colour, 2).unflatten(1, (3, 4)).permute(0, 3, 4, 2, 1).flatten(1, 3)
        told = self.readout(features[-1], patch_grid)
        unknown = (true[0] == 0).all(1) if true is not None else image.new_ones(len(image), dtype=torch.bool)
        if unknown.any():
            # a mirrored world obeys the same laws: its picture is a second opinion, where the truth is not known
            other = self.readout(self.backbone(image[unknown].flip(-1))[0][-1], patch_grid)
            other = mirrored(other, patch_grid)
            other = push_apart([(a[unknown] + b) / 2 for a, b in zip(told, other)], patch_grid)
            for mine, better in zip(told, other):
                mine[unknown] = better
        if true is not None:
            told = corrected(told, *true)
        return features, patch_grid, (*told, colour)

    def forward(self, image, grid, frames=0, true=None):
        return self.head(*self.features(image, true), grid, frames)


def load_phys_encoder(backbone_path, head_path=None, config=None):
    """-> PhysEncoder on the CPU. Without head_path the head is random (see start_head for the other way to begin).

    The configuration is the one in the files' metadata, updated with `config`: {"out_dim": 768} is enough for files of
    ours, published ones need CONFIGS[name] | {"out_dim": 768}. Raises InputError if that is incomplete or misfits."""
    files = [common.read_config(path) for path in (backbone_path, head_path) if path]
    if head_path and not {"out_dim", "features"} <= files[-1].keys():
        raise InputError(f"{head_path} is not a physical head of ours, as its metadata says; expected a "
                         "head1.safetensors or head3.safetensors")
    merged = {k: v for part in (*files, config or {}) for k, v in part.items()}
    lacking = {*CONFIGS["nano"], "out_dim"} - merged.keys()
    if lacking:
        raise InputError(f"{backbone_path} does not say its {', '.join(sorted(lacking))}; expected a backbone of ours, "
                         "which data/fetch.py makes of published files, or config=CONFIGS[name] | "
                         '{"out_dim": width of the DiT}')
    encoder = PhysEncoder(merged)
    common.load_weights(encoder.backbone, backbone_path)
    if encoder.readout is not None:                # fitted to this backbone, so it lies beside it
        path = os.path.join(os.path.dirname(backbone_path), "readout.safetensors")
        made, mine = common.load_weights(encoder.readout, path), common.fingerprint(encoder.backbone)
        if made.get("backbone", mine) != mine:
            raise InputError(f"{path} was fitted to another backbone than {backbone_path}; python encoder.py "
                             f"--backbone={backbone_path} fits one to it")
    if head_path:
        common.load_weights(encoder.head, head_path)
    return encoder


# ----------------------------------------------------------------------------------------------------------------------
# pretraining on what the simulator knows

@dataclass
class Config:
    name: str = "encoder"           # the run's folder under out/
    out: str = ""                   # where the backbone's weights go; empty: out/<name>/backbone.safetensors
    backbone: str = ""              # fit a readout to this backbone and train nothing
    model: str = "nano"             # a name in CONFIGS; trained from scratch
    scenarios: str = ",".join(simdata.SCENARIOS)  # which of the world's, separated by commas; they take turns
    scenes: int = 36000             # training images, one per scene, spread evenly over the scenarios
    val_scenes: int = 512           # validation images, from the split "val"
    size: int = 64                  # pixels of the truth: mask, depth, normals; images have the encoder's input_size
    steps: int = 9000               # optimizer steps
    batch: int = 32                 # global batch size, a multiple of the number of ranks
    lr: float = 3e-3                # peak learning rate of Muon: the matrices inside the networks
    adam_lr: float = 1e-3           # peak learning rate of AdamW: what enters, leaves, shifts and scales
    warmup: int = 200               # steps of linear warm-up; a cosine to 1 % follows
    weight_decay: float = 0.02      # of Muon's matrices
    body_weight: float = 10.0       # extra weight of a body's pixels in the depth loss
    depth_only: bool = False        # learn depth alone, of every image, as PhysMaster's backbone (Depth Anything's) did
    ema: float = 0.998              # decay of the weight average that is evaluated and shipped
    log_every: int = 25             # steps
    eval_every: int = 1000          # steps between validations and checkpoints
    seed: int = 0                   # data order, augmentation and initial weights
    resume: bool = False            # go on from out/<name>/state.safetensors
    device: str = "auto"            # auto, cuda, mps or cpu


PRESETS = {"nano": {}, "gpu": dict(name="encoder_gpu", scenes=72000, steps=2000, batch=1024, lr=8e-3, adam_lr=2e-3,
                                   warmup=100, eval_every=1000)}
STATE = 17                                         # numbers before them, see body_facts
MIRROR = torch.ones(STATE + 2 * FUTURE)            # what changes sign in a mirror: u, the moments xy and xz, du
MIRROR[[0, 5, 6]], MIRROR[STATE::2] = -1, -1


def render_part(name, n, seed, split, size, start, photo, device="cpu"):
    """One part of what render_scenes gives."""
    clips = simdata.make_batch(name, n, seed, split, 1 + FUTURE, size, start=start, filmed=1, photo=photo,
                               antialias=1, device=device)                             # of the film only truth is used
    return dict(image=common.to_bytes(clips["photo"]), depth=clips["depth"][:, 0],
                mask=clips["mask"][:, 0], normal=(clips["normal"][:, :, 0] * 127).round().to(torch.int8),
                body=body_facts(clips, size))


def render_scenes(scenes, scenarios, seed, split, size, photo, device=torch.device("cpu")):
    """First frames of `scenes` scenes, and what becomes of them. -> dict over N scenes: image (3, photo, photo) uint8;
    depth (size, size) in metres, mask (size, size) uint8, normal (3, size, size) int8 in 1/127, body as body_facts."""
    names = scenarios.split(",")
    counts = [scenes // len(names) + (i < scenes % len(names)) for i in range(len(names))]
    most = 512 * common.scenes_at_once(device)
    tasks = [(name, min(most, n - start), seed, split, size, start, photo, str(device))
             for name, n in zip(names, counts) for start in range(0, n, most)]
    parts = list(tqdm(common.side_by_side(render_part, tasks, device, alone=True), f"rendering {split} scenes",
                      len(tasks)))
    widest = max(p["body"].shape[1] for p in parts)                                    # scenarios differ in slots
    parts = [p | {"body": F.pad(p["body"], (0, 0, 0, widest - p["body"].shape[1]))} for p in parts]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def body_facts(clips, size):
    """What the simulator knows of each body and wants to be seen at once -> (B, N, STATE + 2 * FUTURE).

    First the state: centre in the picture (in halves of it, from the middle), its z-depth and height, m; second moments
    of the box around it in camera axes, m^2 (how large, and turned which way; no axis has to be called the first); what
    shape; restitution, friction, and whether it falls. Then how far its centre will have moved, frame by frame, in
    halves of the picture: the physics to come."""
    uv, z = simdata.project(clips["position"], clips["camera"])                        # (B, T, N, 2), (B, T, N)
    uv = uv * 2 / size - 1
    R = clips["camera"]["world_to_camera"][:, None, :3, :3] @ simdata.quat_to_matrix(clips["rotation"][:, 0])
    moments = (R * clips["half_extents"][:, :, None].square()) @ R.mT                  # (B, N, 3, 3)
    row, column = torch.triu_indices(3, 3)
    state = [uv[:, 0], z[:, 0, :, None], clips["position"][:, 0, :, 2:], moments[:, :, row, column],
             F.one_hot(clips["shape"].long(), len(simdata.SHAPES)), clips["restitution"][..., None],
             clips["friction"][..., None], clips["falls"][..., None]]
    path = (uv[:, 1:] - uv[:, :1]).transpose(1, 2).flatten(2)                          # (B, N, 2 * FUTURE)
    return torch.cat([*(x.float() for x in state), path], -1) * clips["alive"][..., None]


def mirror(batch, which):
    """A mirrored world obeys the same laws: a batch of render_scenes' with the scenes `which` (B,) bool flipped."""
    flipped = {k: batch[k].flip(-1) for k in ("image", "depth", "mask", "normal")}
    flipped["normal"][:, 0] *= -1
    flipped["body"] = batch["body"] * MIRROR.to(batch["body"].device)
    return {k: torch.where(which.view(-1, *[1] * (v.dim() - 1)), v, batch[k]) for k, v in flipped.items()}


def cached(path, rank, device, **what):
    """render_scenes(**what), kept in a file for as long as its code stays."""
    stamp = what | {"world": common.source_hash(), "code": common.source_hash(__file__)}
    return common.kept(path, rank, stamp, lambda: render_scenes(**what, device=device))


class Pretraining(nn.Module):
    """The backbone and what is asked of it: depth through a DPT, all the rest linearly from its last patch tokens.

    forward(image (B, 3, 14 gh, 14 gw)) -> inverse depth (n, 14 gh, 14 gw), in training of the first n = B / share
    images alone: a DPT costs as much as all the rest, and depth is learned soon; normals (B, 3, s gh, s gw), s pixels a
    patch; of the body in each of 2 x 2 cells a patch (B, 2 gh, 2 gw, known)."""
    def __init__(self, config, s, share=8):
        super().__init__()
        self.s, self.known, self.share = s, STATE + 2 * FUTURE, share
        self.depth = DepthAnything(config)
        self.readout = nn.Linear(config["dim"], 3 * s * s + 4 * self.known)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, image):
        features, _ = self.depth.pretrained(image)
        n = math.ceil(len(image) / self.share) if self.training else len(image)
        gh, gw = (side // self.depth.pretrained.patch for side in image.shape[-2:])
        inverse = self.depth.depth_head([x[:n] for x in features], (gh, gw))
        normal, body = self.readout(features[-1]).float().split([3 * self.s**2, 4 * self.known], -1)
        normal = F.pixel_shuffle(normal.mT.unflatten(2, (gh, gw)), self.s)             # (B, 3, s gh, s gw)
        body = F.pixel_shuffle(body.mT.unflatten(2, (gh, gw)), 2).permute(0, 2, 3, 1)  # (B, 2 gh, 2 gw, known)
        return inverse.float(), normal, body


@torch.no_grad()
def fit_readout(backbone, scenes, device, most=6000):
    """The best Readout of a frozen backbone on scenes of `render_scenes`, in closed form, for any backbone.

    Least squares for where bodies are and go, reweighted by 1 / (the path's error + 0.02) so that a median is fitted,
    as the backbone was trained for; Newton's method for whether there is a body (logistic regression)."""
    tokens_a_scene = (scenes["image"].shape[-1] // backbone.patch) ** 2              # in float64 they take gigabytes
    tokens, some = [], common.evenly(len(scenes["image"]), min(most, 400_000 // tokens_a_scene))
    if len(some) < min(most, len(scenes["image"])):
        print(f"the readout is fitted to {len(some)} of {len(scenes['image'])} scenes, {tokens_a_scene} tokens each")
    exact = device if device.type == "cuda" else "cpu"                                 # where there is float64
    scenes = {k: scenes[k][some].to(exact) for k in ("image", "mask", "body")}
    for image in scenes["image"].split(64):
        with common.autocast(device):
            tokens.append(backbone(common.from_bytes(image.to(device)))[0][-1].float().to(exact))
    x = torch.cat(tokens)                                                              # (N, L, D)
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    owner = owners(scenes["mask"], math.isqrt(x.shape[1]))                             # (N, L, 4)
    ridge = 1e-3 * torch.eye(x.shape[2], dtype=torch.double, device=exact)
    weight = torch.zeros(4, 3 + 2 * FUTURE, x.shape[2], device=exact)
    for j in range(4):
        n, l = (owner[..., j] > 0).nonzero().unbind(1)
        a, body = x[n, l].double(), scenes["body"][n, owner[n, l, j] - 1].double()
        want, w = torch.cat([body[:, :2], body[:, STATE:]], 1), 1
        for _ in range(4):
            fit = torch.linalg.solve(a.T @ (w * a) + ridge, a.T @ (w * want))          # (D + 1, 2 + 2 FUTURE)
            off = (a @ fit - want)[:, 2:].unflatten(1, (FUTURE, 2)).norm(dim=2).mean(1, keepdim=True)
            w = 1 / (off + 0.02)
        a, there = x.flatten(0, 1).double(), (owner[..., j] > 0).flatten().double()
        coef = torch.zeros(a.shape[1], dtype=a.dtype, device=a.device)
        for _ in range(12):
            p = (a @ coef).sigmoid()
            step = torch.linalg.solve((a.T * (p * (1 - p) + 1e-6)) @ a + ridge, a.T @ (there - p))
            coef = coef + step
        weight[j] = torch.cat([coef[None], fit.T]).float()
    readout = Readout(x.shape[2] - 1).to(device)
    readout.weight.copy_(weight.flatten(0, 1)[:, :-1])
    readout.bias.copy_(weight.flatten(0, 1)[:, -1])
    return readout


def ssi_loss(pred, depth, weight):
    """Scale-and-shift-invariant loss on inverse depth: pred, depth in metres, weight (B, H, W) -> (B,).

    Both are brought to median 0 and mean absolute deviation 1 over the pixels with a finite depth; then L1 on values
    and, at three scales, on their differences (as in MiDaS, arXiv 1907.01341; Depth Anything trains with it)."""
    valid = depth.isfinite() & (depth > 0)
    n = valid.sum((1, 2), keepdim=True).clamp(min=1)

    def standard(d):
        median = d.masked_fill(~valid, torch.nan).flatten(1).nanmedian(1).values[:, None, None]
        d = torch.where(valid, d - median, 0)
        return d / (d.abs().sum((1, 2), keepdim=True) / n).clamp(min=1e-6)
    error = standard(pred) - standard(torch.where(valid, 1 / depth, 0))                # 0 where no depth is known
    error, n = error * weight, (valid * weight).sum((1, 2)).clamp(min=1)
    loss = error.abs().sum((1, 2)) / n
    for step in (1, 2, 4):
        e, v = error[:, ::step, ::step], valid[:, ::step, ::step]
        for axis in (1, 2):
            both = v.narrow(axis, 1, v.shape[axis] - 1) & v.narrow(axis, 0, v.shape[axis] - 1)
            loss = loss + 0.5 * (e.diff(dim=axis).abs() * both).sum((1, 2)) * step**2 / n
    return loss


def align(pred, depth):
    """Scale and shift pred to 1 / depth by least squares over each image's known pixels, (B, H, W) -> (B, H, W)."""
    valid = (depth.isfinite() & (depth > 0)).float()

    def mean(x):
        return (x * valid).sum((1, 2), keepdim=True) / valid.sum((1, 2), keepdim=True).clamp(min=1)
    true = torch.where(valid > 0, 1 / depth, 0)
    pred = pred - mean(pred)
    return pred * mean(pred * true) / mean(pred * pred).clamp(min=1e-12) + mean(true)


def abs_rel(pred, depth, mask):
    """Mean of |d - depth| / depth, d the aligned prediction, over (all pixels, body pixels): (B, 2), NaN if none."""
    error = (1 / align(pred, depth).clamp(min=0.01) - depth).abs() / depth             # nothing is farther than 100 m
    error = error.masked_fill(~(depth.isfinite() & (depth > 0)), torch.nan)
    return torch.stack([error.nanmean((1, 2)), error.masked_fill(mask == 0, torch.nan).nanmean((1, 2))], dim=1)


@torch.no_grad()
def predict(model, image, mask, device):
    """Pretraining's answers for N images, on the CPU -> inverse depth and normals at the size of the masks (N, H, W);
    for each of the M bodies that masks have the mean over its cells (N, M, known), 0 where it is not seen."""
    M, patches = int(mask.max()), image.shape[-1] // model.depth.pretrained.patch
    inverse, normals, told = [], [], []
    for part, owner in zip(image.split(64), cells(mask, patches).flatten(1).split(64)):
        with common.autocast(device):
            d, normal, body = model(common.from_bytes(part.to(device)))
        inverse.append(F.interpolate(d[:, None], mask.shape[-2:], mode="bilinear")[:, 0].cpu())
        normals.append(normal.cpu())
        told.append(body_means(body.flatten(1, 2).cpu(), owner, M)[0])
    return torch.cat(inverse), torch.cat(normals), torch.cat(told)


def path_l2(told, body):
    """Mean distance between foretold and true centres of what falls and is in view, over the picture's diagonal, per
    scene: (B,), NaN where nothing falls. What eval.py's traj_l2 is to a video; told, body (B, N, known)."""
    pred, true = (x[..., STATE:].unflatten(-1, (FUTURE, 2)) for x in (told, body))
    inside = ((body[..., None, :2] + true).abs() < 1).all(-1) & (body[..., STATE - 1, None] > 0)    # (B, N, FUTURE)
    error = (pred - true).norm(dim=-1) / math.sqrt(8)                                  # the diagonal, in halves
    return error.masked_fill(~inside, torch.nan).nanmean((1, 2))


def draw(path, val, inverse, normal, told):
    """A PNG, a scene a row: image with true (white) and foretold (red) paths; depth and normals, true | predicted."""
    size = val["image"].shape[-1]
    true = torch.where(val["depth"].isfinite() & (val["depth"] > 0), 1 / val["depth"], 0)
    high = true.flatten(1).amax(1)[:, None, None]
    maps = [(d / high).clamp(0, 1)[:, None].expand(-1, 3, -1, -1) for d in (true, align(inverse, val["depth"]))]
    seen = (val["mask"] > 0)[:, None]
    maps += [(n + 1) / 2 * seen for n in (val["normal"] / 127, normal)]
    image = val["image"].clone()
    for body, colour in ((val["body"], (255, 255, 255)), (told, (255, 0, 0))):
        spots = val["body"][:, :body.shape[1], None, :2] + body[..., STATE:].unflatten(-1, (FUTURE, 2))
        pixel = ((spots + 1) * size / 2).long()                                        # (N, M, FUTURE, 2)
        for n, m in (val["body"][..., STATE - 1] > 0).nonzero().tolist():
            x, y = pixel[n, m][((pixel[n, m] >= 0) & (pixel[n, m] < size)).all(-1)].T
            image[n, :, y, x] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    rows = torch.cat([image, *(F.interpolate(m, size).clamp(0, 1).mul(255).byte() for m in maps)], 3)
    common.write_image(path, np.ascontiguousarray(rows.permute(0, 2, 3, 1).flatten(0, 1).numpy()))


@torch.no_grad()
def save_readout(path, train, val, device):
    """Fit a Readout to the backbone in the file `path`; it goes beside it."""
    seen, beside = load_phys_encoder(path, config={"out_dim": 1}), f"{os.path.dirname(path) or '.'}/readout.safetensors"
    readout = fit_readout(backbone := seen.backbone.to(device), train, device)
    common.save_weights(beside, readout, {"dim": seen.config["dim"], "backbone": common.fingerprint(backbone)})
    encoder, error = load_phys_encoder(path, config={"out_dim": 1, "foretell": True}).to(device), []
    for image, mask, body in zip(*(val[k].split(64) for k in ("image", "mask", "body"))):
        center = encoder.features(common.from_bytes(image.to(device)))[2][2].cpu()      # (B, 4 L, FUTURE, 2)
        owner = owners(mask, image.shape[-1] // backbone.patch).flatten(1)
        center, _ = body_means(center, owner, body.shape[1])
        move = (center - body[:, :, None, :2]).flatten(2)
        error.append(path_l2(torch.cat([body[..., :STATE], move], -1), body))
    print(f"wrote {beside}: foretold centres off by {torch.cat(error).nanmean():.4f} of the diagonal on val scenes")


def losses(answers, b, patches, body_weight):
    """Pretraining's answers in training and their scenes, facts of bodies standardised -> dict of scalars."""
    inverse, normals, told = answers
    n, on, owner = len(inverse), b["mask"] > 0, cells(b["mask"], patches)
    inverse = F.interpolate(inverse[:, None], b["depth"].shape[-2:], mode="bilinear")[:, 0]
    clip, y, x = (owner > 0).nonzero().unbind(1)                                       # the cells with a body in them
    off = told[clip, y, x] - b["body"][clip, owner[clip, y, x] - 1]                    # (cells, known)
    some = lambda x: x.sum() / max(x.numel(), 1)                                       # no body in view: 0, not NaN
    return dict(path=some((off[:, STATE:].unflatten(1, (FUTURE, 2)).square().sum(2) + 1e-4).sqrt()),
                normal=some(((normals - b["normal"] / 127).square().sum(1) + 1e-4).sqrt()[on]),
                state=some(off[:, :STATE].abs()),
                depth=ssi_loss(inverse, b["depth"][:n], 1 + body_weight * on[:n]).mean())


def scores(model, val, known, blind, device):
    """How a Pretraining does on val's scenes, its paths also on `known` ones of its training, beside bodies that stand
    still and an image-blind inverse depth map -> what metrics.jsonl has of it, and its answers for val."""
    inverse, normal, told = predict(model, val["image"], val["mask"], device)
    by_heart = predict(model, known["image"], known["mask"], device)[2]
    path, static, train = (
        path_l2(x, body[:, :x.shape[1]]).nanmean().item()
        for x, body in ((told, val["body"]), (torch.zeros_like(told), val["body"]), (by_heart, known["body"])))
    cos = F.cosine_similarity(normal, val["normal"].float(), 1)[val["mask"] > 0]
    rel, rel_blind = (abs_rel(x, val["depth"], val["mask"]).nanmean(0).tolist()
                      for x in (inverse, blind.expand_as(val["depth"])))
    return {"path_l2": path, "path_l2_train": train, "path_l2_static": static,
            "normal_degrees": cos.clamp(-1, 1).acos().rad2deg().median().item(),
            "abs_rel": rel[0], "abs_rel_bodies": rel[1],
            "abs_rel_blind": rel_blind[0], "abs_rel_blind_bodies": rel_blind[1]}, (inverse, normal, told)


def main():
    cfg = common.parse_config(Config, sys.argv[1:], PRESETS)
    common.check_range(cfg, scenes=(1, 10**7), val_scenes=(1, 10**5), size=(16, 1024), steps=(1, 10**7),
                       batch=(1, 10**5), lr=(0, 1), adam_lr=(0, 1), warmup=(0, 10**6), weight_decay=(0, 1), ema=(0, 1),
                       log_every=(1, 10**6), eval_every=(1, 10**6))
    common.check_names("scenarios", cfg.scenarios, simdata.SCENARIOS)
    common.check_choice(cfg, model=CONFIGS)
    config = load_phys_encoder(cfg.backbone, config={"out_dim": 1}).config if cfg.backbone else CONFIGS[cfg.model]
    photo, patches = config["input_size"], config["input_size"] // config["patch_size"]
    if cfg.size % (2 * patches):
        raise InputError(f"--size={cfg.size}: expected a multiple of {2 * patches}, twice the "
                         f"patches of {cfg.backbone or cfg.model}")
    device, rank, world = common.setup(cfg.device)
    if cfg.batch % world:
        raise InputError(f"--batch={cfg.batch} is no multiple of the {world} ranks")
    folder = f"out/{cfg.name}"
    if cfg.backbone and cfg.out:
        raise InputError("--backbone=FILE gets its readout beside it; expected no --out")
    out = cfg.backbone or cfg.out or f"{folder}/backbone.safetensors"
    if cfg.backbone or cfg.out:
        common.check_writable(out)
    if cfg.backbone:                               # nothing is trained, so no run of that name begins
        common.make_dir(folder)
    else:
        common.start_run(cfg, rank, folder)
    clips = f"{folder}/readout_" if cfg.backbone else f"{folder}/"
    what = dict(rank=rank, device=device, scenarios=cfg.scenarios, seed=cfg.seed, size=cfg.size, photo=photo)
    few = what | dict(device=torch.device("cpu"), scenes=cfg.val_scenes, split="val")
    val = common.in_background(lambda: cached(f"{clips}val.safetensors", **few)) if world == 1 else None
    train = cached(f"{clips}train.safetensors", scenes=cfg.scenes, split="train", **what)
    val = val.result() if val else cached(f"{clips}val.safetensors", **few)
    if cfg.backbone:
        if rank == 0:
            save_readout(out, train, val, device)
        return

    torch.manual_seed(cfg.seed)
    model = Pretraining(config, cfg.size // patches, 1 if cfg.depth_only else 8).to(device)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    # Muon for the matrices inside the networks, AdamW for what enters and leaves them
    inner = {k for k, p in trained.items() if p.ndim > 1 and not re.search("embed|token|readout", k)}
    optimizers = [common.Muon([p for k, p in trained.items() if k in inner], cfg.lr, cfg.weight_decay),
                  torch.optim.AdamW([p for k, p in trained.items() if k not in inner], lr=cfg.adam_lr,
                                    betas=(0.9, 0.98), weight_decay=0.0)]
    ema = common.EMA(model, cfg.ema)
    parts, state, log = {"model": trained, "ema": ema.shadow}, f"{folder}/state.safetensors", f"{folder}/metrics.jsonl"
    start = common.load_state(state, parts, *optimizers) if cfg.resume else 0
    if rank == 0:
        common.trim_log(log, start)
    net, stop = DistributedDataParallel(model) if world > 1 else model, common.Stop()

    # all that is asked about bodies counts alike: brought to mean 0 and standard deviation 1 over the training scenes
    alive = train["body"][train["body"][..., 2] > 0]                                   # a body has a z-depth
    mean, std = alive[:, :STATE].mean(0), alive[:, :STATE].std(0).clamp(min=1e-3)
    standard = lambda body: torch.cat([(body[..., :STATE] - mean.to(body)) / std.to(body), body[..., STATE:]], -1)
    # What an image-blind guess scores under the same alignment: the mean inverse depth map of the training scenes.
    blind = torch.where(train["depth"] > 0, 1 / train["depth"], 0).mean(0)
    some = common.evenly(len(train["image"]), cfg.val_scenes)
    known = {k: v[some] for k, v in train.items()}                                     # how much is learned by heart

    def evaluate(step):
        model.eval()
        with ema.applied(model):
            score, answers = scores(model, val, known, blind, device)                  # the raw module, on every rank
        model.train()
        if rank:
            return
        common.log_line(log, {"step": step} | score)
        print("step {step}: paths off by {path_l2:.4f} of the diagonal (static {path_l2_static:.4f}), normals by "
              "{normal_degrees:.0f} degrees, AbsRel {abs_rel:.4f} (blind {abs_rel_blind:.4f}), on bodies "
              "{abs_rel_bodies:.4f} (blind {abs_rel_blind_bodies:.4f})".format(step=step, **score))
        pick = torch.linspace(0, len(val["image"]) - 1, 8).long()
        draw(f"{folder}/val.png", {k: v[pick] for k, v in val.items()}, *(x[pick] for x in answers))

    train = common.to_device_if_it_fits(train, device)
    progress = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="pretraining", disable=rank > 0)
    for step in progress:
        # every draw is a function of the step, for the global batch; each rank takes its slice of it
        g = common.generator(cfg.seed, "encoder", step)
        index = torch.randint(len(train["image"]), (cfg.batch,), generator=g)[rank::world]
        flip = torch.rand(cfg.batch, generator=g)[rank::world] < 0.5
        gain, bias = (0.2 * torch.rand(2, cfg.batch, 3, 1, 1, generator=g) - 0.1)[:, rank::world]
        b = mirror({k: v[index.to(v.device)].to(device) for k, v in train.items()}, flip.to(device))
        image = (common.from_bytes(b["image"]) * (1 + gain.to(device)) + bias.to(device)).clamp(-1, 1)

        scale = min((step + 1) / (cfg.warmup + 1), 0.01 + 0.495 * (1 + math.cos(math.pi * step / cfg.steps)))
        for optimizer, peak in zip(optimizers, (cfg.lr, cfg.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        with common.autocast(device):
            answers = net(image)
        l = losses(answers, b | {"body": standard(b["body"])}, patches, cfg.body_weight)
        rest = l["path"] + 0.5 * l["normal"] + 0.5 * l["state"]
        # 0 * rest: DDP wants a gradient for every parameter
        loss = l["depth"] + 0 * rest if cfg.depth_only else rest + 0.2 * l["depth"]
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(model, step)

        if step % cfg.log_every == 0:
            named = {"loss": loss} | l
            named = dict(zip(named, common.average(torch.stack(list(named.values())).detach(), device).tolist()))
            if rank == 0:
                common.log_line(log, {"step": step, **named, "lr": cfg.lr * scale, "grad_norm": norm.item()})
                progress.set_postfix({k: f"{v:.3f}" for k, v in named.items()})
        done, ending = step + 1, stop.agreed(device)
        if done % cfg.eval_every == 0 or done == cfg.steps or ending:
            common.save_state(state, done, parts, *optimizers)
        if done % cfg.eval_every == 0 or done == cfg.steps:
            evaluate(step)
        if ending:
            if rank == 0:
                print(f"stopped after {done} steps; go on with --resume=True")
            break
    else:
        if rank == 0:
            ema.copy_to(model)
            common.save_weights(out, model.depth.pretrained, config, torch.bfloat16)
            common.save_weights(f"{folder}/depth_head.safetensors", model.depth.depth_head, config)
            save_readout(out, train, val, device)


if __name__ == "__main__":
    common.run(main)
