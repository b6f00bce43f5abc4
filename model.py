"""
The video diffusion transformer: Wan's architecture and parameter names, plus one extra group of tokens.

Rectified flow, t = 1 is noise (PhysMaster, arXiv 2510.13809, Eq. 1):
    x_t = (1 - t) x0 + t eps,    the network predicts v = eps - x0,    loss = mean (v_theta - v)^2
It sees one sequence, and every token attends to every other:
    [ first-frame tokens | physical tokens | video tokens ]
        clean, t = 0         t = 0             t
The first frame is the VAE latent of the image, physical tokens are what PhysEncoder says about that image, and only the
video tokens leave through the head. A block is self-attention, cross-attention to the text and an MLP; the first and
the last are modulated by the time: x + gate * f(norm(x) * (1 + scale) + shift).

    model = VideoDiT(CONFIGS["nano"])
    loss = flow_loss(model, x0, bytes_to_tokens(captions), image, phys, t, eps).mean()
    x0 = sample(model, image, bytes_to_tokens(captions), phys, noise, steps=20)
"""
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
from common import InputError

# A token is a patch of 1 x 2 x 2 latent pixels in every Wan model. `text`: "features" takes floats from an outside
# encoder (umT5), "bytes" brings its own small one. `phys`: whether the type embedding of physical tokens exists.
WAN = dict(freq_dim=256, text="features", text_dim=4096, text_len=512, phys=False)
CONFIGS = {
    "nano": dict(in_dim=32, out_dim=32, dim=256, ffn_dim=960, num_heads=4, num_layers=6,
                 freq_dim=128, text="bytes", text_dim=128, text_len=32, phys=True),
    # a fifth of it, to try things
    "tiny": dict(in_dim=32, out_dim=32, dim=128, ffn_dim=480, num_heads=2, num_layers=4,
                 freq_dim=128, text="bytes", text_dim=128, text_len=32, phys=True),
    # 129 M, for one GPU: 128 x 128 pixels, 33 frames
    "small": dict(in_dim=32, out_dim=32, dim=768, ffn_dim=3584, num_heads=12, num_layers=12,
                  freq_dim=256, text="bytes", text_dim=256, text_len=32, phys=True),
    # Wan2.1-T2V-1.3B, Wan2.2-TI2V-5B, Wan2.1-T2V-14B
    "wan1.3b": WAN | dict(in_dim=16, out_dim=16, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan5b": WAN | dict(in_dim=48, out_dim=48, dim=3072, ffn_dim=14336, num_heads=24, num_layers=30),
    "wan14b": WAN | dict(in_dim=16, out_dim=16, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}
BYTES = 128                                        # a caption for the byte encoder is cut or padded to this many
LONG = 1024                                        # bytes of a caption that pools and pairs keep
EPS = 1e-6                                         # of every norm


# ----------------------------------------------------------------------------------------------------------------------
# positions

def sinusoid(t, width):
    """Times in [0, 1], any shape -> features (..., width): [cos, sin] of 1000 t at geometric frequencies 1 .. 1e-4."""
    frequency = torch.exp(-math.log(1e4) / (width // 2) * torch.arange(width // 2, device=t.device))
    angle = 1000 * t.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


@functools.lru_cache(maxsize=32)
def rotary_table(head_dim, frames, h, w, first, grid, device):
    """Unit complex numbers (L, 1, head_dim / 2) by which query and key pairs are turned (RoPE, arXiv 2104.09864).

    Each token has coordinates (frame, row, column) in patches; a head's pairs are split over the three, the frame gets
    the most. frames: video frames; first: whether frame 0 comes before them as clean tokens; grid: (gh, gw) of the
    physical tokens or None. Those stand in frame 0, at the centres of cells that may be larger than a patch."""
    with torch.inference_mode(False):              # the cached table must also serve training later
        frame, row, column = (torch.arange(n, dtype=torch.float64) for n in (frames + first, h, w))
        position = [torch.cartesian_prod(frame[first:], row, column)]                               # (frames h w, 3)
        if grid:
            gh, gw = grid
            rows = (torch.arange(gh, dtype=torch.float64) + 0.5) * h / gh - 0.5
            columns = (torch.arange(gw, dtype=torch.float64) + 0.5) * w / gw - 0.5
            position.insert(0, torch.cartesian_prod(frame[:1], rows, columns))                      # (gh gw, 3)
        if first:
            position.insert(0, torch.cartesian_prod(frame[:1], row, column))                        # (h w, 3)
        position = torch.cat(position)                                                              # (L, 3)
        side = 2 * (head_dim // 6)
        angle = torch.cat([position[:, axis, None] * 1e4 ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
                           for axis, n in enumerate((head_dim - 2 * side, side, side))], -1)        # (L, head_dim / 2)
        return torch.polar(torch.ones_like(angle), angle)[:, None].to(torch.complex64).to(device)


def rotate(x, table):
    """x (B, L, N, head_dim) float32: channels 2i, 2i+1 are one complex number. Four times faster than real algebra,
    except under torch.compile, which knows only the real one and merges it with its neighbours."""
    x = x.unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(x) * table).flatten(-2)
    (a, b), (cos, sin) = x.unbind(-1), torch.view_as_real(table).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def physical_grid(count, h, w):
    """How `count` physical tokens cover a frame of h x w patches: the (gh, gw) of the frame's own aspect ratio."""
    gh = round(math.sqrt(count * h / w))
    if gh < 1 or count % gh or not h / w / 1.5 <= gh * gh / count <= h / w * 1.5:
        raise InputError(f"{count} physical tokens form no grid of the aspect ratio of {h}x{w} patches; expected for "
                         f"example {h}x{w} = {h * w} or half as many a side")
    return gh, count // gh


# ----------------------------------------------------------------------------------------------------------------------
# the network. Under autocast the matrix products run in bf16; norms, modulation and the residual stream stay in fp32.

class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Attention(nn.Module):
    """Multi-head attention; queries and keys are RMS-normalised over the full width before the heads are split."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, EPS), RMSNorm(dim, EPS)

    def forward(self, x, context, rotary=None):
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))                            # (B, L, N, d)
        if rotary is not None:                     # x may be the last of the context's tokens
            q, k = rotate(q, rotary[-q.shape[1]:]), rotate(k, rotary)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                                            # (B, N, L, d)
        return self.o(common.attention(q, k, v).transpose(1, 2).flatten(2))                         # (B, L, D)


class Block(nn.Module):
    def __init__(self, dim, ffn_dim, heads):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
        self.norm3 = LayerNorm(dim, EPS)           # the only norm with weights: cross-attention is not modulated
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, x, text, rows, rotary, silent=0):
        """x (B, G, g, D): all tokens, in G groups of one time each; rows (B, G, 6, D), what the time says; silent: how
        many groups, from the left, are only attended to -> (B, G - silent, g, D)."""
        flat, groups = lambda y: y.flatten(1, 2), lambda y: y.unflatten(1, x.shape[1:3])            # (B, L, D) and back
        norm = lambda y: F.layer_norm(y, y.shape[-1:], eps=EPS)
        modulation = (rows + self.modulation[:, None]).unsqueeze(3)                                 # (B, G, 6, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)                         # 6 x (B, G, 1, D)
        y = flat(torch.addcmul(shift1, norm(x), 1 + scale1))
        x, gate1, shift2, scale2, gate2 = (v[:, silent:] for v in (x, gate1, shift2, scale2, gate2))
        x = torch.addcmul(x, groups(self.self_attn(y[:, silent * x.shape[2]:], y, rotary).float()), gate1)
        x = x + groups(self.cross_attn(flat(self.norm3(x)), text))
        y = torch.addcmul(shift2, norm(x), 1 + scale2)
        return torch.addcmul(x, self.ffn(y).float(), gate2)


class Head(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.head = nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, x, time):
        """x (B, L, D), time (B, 1, D) -> (B, L, out_dim)."""
        shift, scale = (self.modulation + time).chunk(2, 1)
        return self.head(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)).float()


class ByteText(nn.Module):
    """Bytes (B, 128) -> 32 word-sized features (B, 32, width). Words are short, so a view of 13 bytes tells them apart,
    their order and meaning are the transformer's business, and cross-attention costs a quarter of that to bytes."""
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(257, width)      # 0 is "no byte", byte b is b + 1
        self.position = nn.Parameter(torch.empty(BYTES, width))
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 5, stride=2, padding=2) for _ in range(2))

    def forward(self, tokens):
        x = (self.embed(tokens) + self.position).transpose(1, 2)                                    # (B, width, 128)
        for conv in self.convs:
            x = F.avg_pool1d(x, 2) + F.gelu(conv(x))                                                # half as long
        return x.transpose(1, 2)                                                                    # (B, 32, width)


def bytes_to_tokens(texts, length=BYTES):
    """list of B strings -> LongTensor (B, length): UTF-8 byte + 1, cut or padded with 0; a DiT with text="bytes" takes
    128 of them."""
    codes = [[b + 1 for b in text.encode(errors="replace")[:length]] for text in texts]
    return torch.tensor([c + [0] * (length - len(c)) for c in codes])


def tokens_to_strings(tokens):
    """The inverse of bytes_to_tokens, but for what was cut: (B, length) -> list of B strings."""
    return [bytes(t - 1 for t in row if t).decode(errors="replace") for row in tokens.tolist()]


class VideoDiT(nn.Module):
    """config: a flat dict as in CONFIGS. Set `model.checkpointing = True` to recompute blocks in the backward pass."""
    FLOAT32 = r"time_|modulation|norm"             # small, and the stream's scale depends on it (see load_weights)
    RENAMES = [                                    # diffusers' WanTransformer3DModel -> Wan's own names
        (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"^condition_embedder\.time_proj", "time_projection.1"),
        (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"^scale_shift_table$", "head.modulation"), (r"\.scale_shift_table$", ".modulation"),
        (r"^proj_out", "head.head"),
        (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])\.", r".\1."), (r"\.to_out\.0\.", ".o."),
        (r"\.norm2\.", ".norm3."),                 # norm2 and norm3 are swapped there, and one of them has no weights
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."), (r"\.ffn\.net\.2\.", ".ffn.2."),
    ]

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = dict(config), False
        c, dim = config, config["dim"]
        self.patch_embedding = nn.Conv3d(c["in_dim"], dim, (1, 2, 2), (1, 2, 2))
        self.byte_text = ByteText(c["text_dim"]) if c["text"] == "bytes" else None
        self.text_embedding = nn.Sequential(nn.Linear(c["text_dim"], dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(c["freq_dim"], dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, c["ffn_dim"], c["num_heads"]) for _ in range(c["num_layers"]))
        self.head = Head(dim, 4 * c["out_dim"])
        self.phys_type = None
        self.init_weights()
        if c["phys"]:
            add_phys(self)

    def init_weights(self):
        """For training from scratch; loaded weights replace all of it."""
        def basic(module):
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv3d)):  # a convolution counts as a Linear on patches
                nn.init.xavier_uniform_(module.weight.flatten(1))      # keeps the variance through depth
                nn.init.zeros_(module.bias)
        self.apply(basic)
        dim = self.config["dim"]
        # The time says nothing at first: every sample sees the same network, and what t changes is learned from zero
        # (adaLN-Zero, DiT).
        nn.init.zeros_(self.time_projection[1].weight)
        # Small gates, as Wan has them: a block starts close to the identity, yet not at it, so gradients reach inside.
        for module in (*self.blocks, self.head):
            nn.init.normal_(module.modulation, std=dim ** -0.5)
        # Cross-attention has no gate; without this it begins by pouring a random text into the stream.
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.o.weight)
        # The first prediction is v = 0: the loss starts at E|eps - x0|^2, not above it.
        nn.init.zeros_(self.head.head.weight)
        if self.byte_text:
            nn.init.normal_(self.byte_text.embed.weight)               # letters start far apart,
            nn.init.normal_(self.byte_text.position, std=0.3)          # where they stand matters less

    def patchify(self, x):
        """(B, C, T, H, W) -> tokens (B, T H/2 W/2, D): a convolution whose stride is its kernel is a Linear."""
        x = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)           # (B, T, h, w, C, 2, 2)
        return F.linear(x.flatten(4).flatten(1, 3), self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def check(self, x, t, text, image, phys):
        c, B = self.config, len(x)
        if x.dim() != 5 or x.shape[1] != c["in_dim"] or x.shape[3] % 2 or x.shape[4] % 2:
            raise InputError(f"x is {tuple(x.shape)}; expected (B, {c['in_dim']}, k, H, W) with even H and W")
        if t.shape != (B,):
            raise InputError(f"t is {tuple(t.shape)}; expected ({B},), one time per clip")
        if c["text"] == "bytes" and (text.shape != (B, BYTES) or text.is_floating_point()):
            raise InputError(f"text is {text.dtype} {tuple(text.shape)}; expected bytes_to_tokens of {B} captions")
        if c["text"] != "bytes" and (text.dim() != 3 or len(text) != B or text.shape[1] > c["text_len"]
                                     or text.shape[2] != c["text_dim"]):
            raise InputError(f"text is {tuple(text.shape)}; expected ({B}, at most {c['text_len']}, {c['text_dim']})")
        if image is not None and image.shape != x[:, :, :1].shape:
            raise InputError(f"image is {tuple(image.shape)}; expected {tuple(x[:, :, :1].shape)}, latent frame 0")
        if phys is not None and (phys.dim() != 3 or len(phys) != B or phys.shape[2] != c["dim"]):
            raise InputError(f"phys is {tuple(phys.shape)}; expected ({B}, P, {c['dim']})")
        if phys is not None and self.phys_type is None:
            raise InputError("this model has no physical tokens; expected config phys=True, or add_phys(model) first")

    def forward(self, x, t, text, image=None, phys=None):
        """Predict the velocity v = eps - x0.

        x (B, C, k, H, W): noisy latent frames 1..k (all frames, if there is no image); t (B,) in [0, 1]
        text: features (B, <= text_len, text_dim), or bytes_to_tokens (B, 128)
        image (B, C, 1, H, W): clean latent frame 0
        phys (B, P, D): physical tokens of frame 0, row by row a grid with the frame's aspect ratio; or h w of them and
        then k h w that are added to the video tokens, where h, w = H / 2, W / 2
        -> v (B, out_dim, k, H, W) float32, for x only. Raises InputError when a shape does not fit."""
        self.check(x, t, text, image, phys)
        B, _, k, H, W = x.shape
        h, w = H // 2, W // 2

        # the sequence; the residual stream is fp32 from here to the head
        video = self.patchify(x).float()                                                            # (B, k h w, D)
        tokens = [] if image is None else [self.patchify(image).float()]                            # (B, h w, D)
        if phys is not None:
            if phys.shape[1] == (1 + k) * h * w:   # what is foretold of a place joins the token of that place
                phys, foretold = phys.split([h * w, k * h * w], 1)
                video = video + foretold.float()
            tokens.append(phys.float() + self.phys_type)                                            # (B, P, D)
        z = torch.cat([*tokens, video], 1)                                                          # (B, L, D)
        clean = z.shape[1] - k * h * w             # how many tokens, from the left, have t = 0
        grid = None if phys is None else physical_grid(phys.shape[1], h, w)
        rotary = rotary_table(z.shape[2] // self.config["num_heads"], k, h, w, int(image is not None), grid, z.device)

        # the text; padding is visible, as Wan was trained
        text = text if self.byte_text is None else self.byte_text(text)
        text = self.text_embedding(F.pad(text, (0, 0, 0, self.config["text_len"] - text.shape[1])))  # (B, text_len, D)

        # the time: at most two distinct ones per clip, so two rows, never one per token. In fp32 under autocast.
        times = torch.stack([torch.zeros_like(t), t], 1) if clean else t[:, None]                   # (B, R)
        with torch.autocast(z.device.type, enabled=False):
            time = self.time_embedding(sinusoid(times, self.config["freq_dim"]).to(self.time_embedding[0].weight.dtype))
            rows = self.time_projection(time).unflatten(-1, (6, -1)).float()                        # (B, R, 6, D)
        # Tokens in groups as large as can be that share a time: what the time says then broadcasts, and need not be
        # written out for every token. For 32 clean and 96 noisy tokens: four groups of 32, the first at t = 0.
        size = math.gcd(clean, z.shape[1])                                                          # g
        z = z.unflatten(1, (-1, size))                                                              # (B, G, g, D)
        if clean:
            rows = torch.cat([rows[:, :1].expand(-1, clean // size, -1, -1),
                              rows[:, 1:].expand(-1, z.shape[1] - clean // size, -1, -1)], 1)        # (B, G, 6, D)

        for i, block in enumerate(self.blocks, 1):
            silent = clean // size if i == len(self.blocks) else 0     # no one reads what clean tokens would become
            if self.checkpointing and torch.is_grad_enabled():
                z = checkpoint(block, z, text, rows, rotary, silent, use_reentrant=False)
            else:
                z = block(z, text, rows, rotary, silent)

        v = self.head(z.flatten(1, 2)[:, -k * h * w:], time[:, -1:].float())                         # (B, k h w, 4 C)
        v = v.unflatten(1, (k, h, w)).unflatten(-1, (2, 2, -1))                                  # (B, k, h, w, 2, 2, C)
        return v.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, -1, k, H, W)


def published_config(c):
    """The config.json of a Wan model, official or diffusers', as one of ours; what it does not say is as in WAN."""
    if "num_attention_heads" in c:
        c = c | dict(dim=c["num_attention_heads"] * c["attention_head_dim"], num_heads=c["num_attention_heads"],
                     in_dim=c["in_channels"], out_dim=c["out_channels"])
    return WAN | {k: c[k] for k in CONFIGS["wan5b"] if k in c}


def add_phys(model):
    """Give a model the learned embedding that marks physical tokens, after published weights were loaded; -> model.

    Small and random, so that they differ from the first frame's tokens from the start."""
    init = 0.02 * torch.randn(model.config["dim"], generator=common.generator("phys_type"), device="cpu")
    model.phys_type = nn.Parameter(init.to(model.patch_embedding.weight.device))                    # (D,)
    model.config["phys"] = True
    return model


# ----------------------------------------------------------------------------------------------------------------------
# the objective and the sampler

def shift_time(t, shift):
    """Move times in [0, 1] towards noise, ends fixed: s t / (1 + (s - 1) t). Larger latents need more (SD3, Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_t(n, generator, shift=1.0):
    """-> (n,) logit-normal times: the middle of the path is hardest and is trained most (SD3, arXiv 2403.03206)."""
    return shift_time(torch.randn(n, generator=generator).sigmoid(), shift)


def flow_loss(model, x0, text, image, phys, t, eps, weight=1.0):
    """The flow-matching error of each clip, unreduced (PhysMaster Eq. 1).

    model: VideoDiT or any callable with its forward's signature; x0, eps (B, C, k, H, W): latent frames 1..k and noise;
    t (B,); weight: of every latent's error, broadcast to x0; the rest as in VideoDiT.forward -> (B,)."""
    s = t.view(-1, 1, 1, 1, 1)
    v = model((1 - s) * x0 + s * eps, t, text, image, phys)
    return (weight * (v.float() - (eps - x0)).square()).mean((1, 2, 3, 4))


TOGETHER = 8192                                    # up to so many tokens both passes of guidance are made as one


class Euler:
    """times: [t_0 = 1, ..., t_n = 0]."""
    def __init__(self, times):
        self.times = times

    def step(self, i, x, v):
        """x at times[i] and the velocity there -> x at times[i + 1]."""
        return x + (self.times[i + 1] - self.times[i]) * v


class AB2(Euler):
    """Adams-Bashforth: the velocity extrapolated to the middle of the step from the last two calls, second order at
    Euler's price."""
    def step(self, i, x, v):
        dt = self.times[i + 1] - self.times[i]
        # one call in, there is nothing to extrapolate from
        middle = v + dt / (2 * (self.times[i] - self.times[i - 1])) * (v - self.last) if i else v
        self.last = v
        return x + dt * middle


class UniPC:
    """UniPC of order 2 (arXiv 2302.04867, with B(h) = e^h - 1, predicting x0) along x = (1 - t) x0 + t eps.

    In lambda = log((1 - t) / t) the path is a linear ODE, solved exactly but for x0(lambda), which is taken as a line.
    Every network call serves twice: it corrects the step that led there, and predicts the next one.
    times: [t_0 = 1, ..., t_n = 0]."""
    def __init__(self, times):
        self.times = [min(t, 1 - 1e-6) for t in times]                               # lambda(1) is -infinity
        self.lambdas = [math.log((1 - t) / t) if t else math.inf for t in self.times]
        self.x0, self.last = [], None              # the estimates, of which three count; where the last step began

    def step(self, i, x, v):
        """x at times[i] and the velocity there -> x at times[i + 1]."""
        self.x0.append(x - self.times[i] * v)
        if i:
            x = self.move(i - 1, self.last, self.x0[i])
        self.last = x
        if i > 1:
            self.x0[i - 2] = None                  # of a long clip each takes megabytes
        return self.move(i, x, None)

    def move(self, i, x, ahead):
        """From times[i] to times[i + 1]; ahead: the estimate of x0 made there, if there is one already."""
        now, h = self.x0[i], self.lambdas[i + 1] - self.lambdas[i]
        b_h, change = math.expm1(-h), 0.0
        # the first and the last step are of first order: no line before, none worth drawing to infinity
        behind = self.x0[i - 1] - now if 0 < i < len(self.times) - 2 else None
        r = (self.lambdas[i - 1] - self.lambdas[i]) / h if behind is not None else None
        if behind is not None and ahead is not None:
            # both weights such that lines and parabolas come out exactly
            b1 = (b_h / -h - 1) / b_h
            b2 = 2 * ((b_h / -h - 1) / -h - 0.5) / b_h
            before = (b1 - b2) / (1 - r)
            change = before * behind / r + (b1 - before) * (ahead - now)
        elif ahead is not None:
            change = 0.5 * (ahead - now)
        elif behind is not None:
            change = 0.5 * behind / r
        t, s = self.times[i + 1], self.times[i]
        return t / s * x - (1 - t) * b_h * (now + change)


SOLVERS = {"ab2": AB2, "euler": Euler, "unipc": UniPC}


@torch.no_grad()
def sample(model, image, text, phys, noise, steps=20, shift=3.0, cfg=1.0, text_null=None, solver="ab2", progress=None):
    """Integrate dx/dt = v from noise at t = 1 to a clip at t = 0, one network call a step, with guidance two (or one of
    twice as many clips, where the clips are small: see TOGETHER).

    noise (B, C, k, H, W), drawn outside (common.randn); image, text, phys as in VideoDiT.forward -> x0 (B, C, k, H, W).
    cfg: 1 is off; else v = v_null + cfg (v_text - v_null), where null has the text `text_null` and all else the same.
    solver: a name in SOLVERS; Wan is sampled with "unipc".
    progress(done, steps) is called after each step. Raises InputError."""
    if solver not in SOLVERS or steps < 1 or shift <= 0:
        raise InputError(f"solver={solver}, steps={steps}, shift={shift}: expected one of {', '.join(SOLVERS)}, "
                         "steps >= 1, shift > 0")
    if cfg != 1 and text_null is None:
        raise InputError(f"cfg={cfg} needs text_null, the tokens of the negative (or empty) prompt")
    end = 1e-3 if solver == "unipc" else 0         # Wan's grid in diffusers; its last time becomes 0 below
    times = shift_time(torch.linspace(1, end, steps + 1, dtype=torch.float64), shift).tolist()
    x, solve = noise, SOLVERS[solver]([*times[:-1], 0.0])

    def guided(x, t):
        if cfg == 1:
            return model(x, t, text, image, phys)
        if x[:, 0].numel() // 4 > TOGETHER:        # each fills the machine by itself
            v, null = (model(x, t, said, image, phys) for said in (text, text_null))
        else:
            longest = max(text.shape[1], text_null.shape[1])
            said = torch.cat([F.pad(y, (0, 0) * (y.dim() - 2) + (0, longest - y.shape[1])) for y in (text, text_null)])
            twice = lambda y: None if y is None else torch.cat([y, y])
            v, null = model(twice(x), twice(t), said, twice(image), twice(phys)).chunk(2)
        return null + cfg * (v - null)
    for i in range(steps):
        # Wan's scheduler hands its model whole thousandths
        t = int(1000 * solve.times[i]) / 1000 if solver == "unipc" else times[i]
        x = solve.step(i, x, guided(x, x.new_full((len(x),), t)))
        if progress:
            progress(i + 1, steps)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685): W + alpha / rank * B A, only A and B are trained

# Up to so many channels W + s B A is formed first: there one product costs less than more passes over the activations;
# beyond, its gradient would cost what a LoRA saves
NARROW = 1024


class LoRALinear(nn.Linear):
    """A Linear that learned a second, low-rank path. Its weight and bias keep their names and their storage."""
    def forward(self, x):
        # in bf16 the sum would round a small B A away, so there it keeps a path of its own
        if max(self.weight.shape) > NARROW or self.weight.dtype != self.lora_A.dtype \
                or torch.is_autocast_enabled(x.device.type):
            return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.lora_scale
        weight = torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.lora_scale)
        return F.linear(x, weight, self.bias)


def add_lora(model, rank, alpha, seed=0):
    """Turn the Linears of attention and MLP in all blocks into LoRALinears, in place; -> model. The output does not
    change by a bit.

    A is random from (seed, layer name), B is zero; both fp32. Everything else is frozen, A and B are trainable."""
    model.requires_grad_(False)
    for name, linear in model.blocks.named_modules():
        if isinstance(linear, nn.Linear) and name.endswith((".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")):
            if isinstance(linear, LoRALinear):
                raise InputError(f"blocks.{name} has a LoRA already; merge_lora(model) first")
            device, random = linear.weight.device, common.generator("lora", seed, name)
            a = torch.randn(rank, linear.in_features, generator=random) / linear.in_features ** 0.5
            linear.lora_A = nn.Parameter(a.to(device))                                              # (rank, in)
            linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))     # (out, rank)
            linear.lora_scale, linear.__class__ = alpha / rank, LoRALinear
    return model


def lora_state(model):
    """-> {name: tensor} of all lora_A and lora_B, to be saved with rank and alpha in the config."""
    return {k: v for k, v in model.state_dict().items() if k.endswith(("lora_A", "lora_B"))}


def load_lora(model, tensors):
    """Copy a lora_state into a model that went through add_lora with the same rank. Raises InputError."""
    own = lora_state(model)
    shapes, given = ({k: v.shape for k, v in state.items()} for state in (own, tensors))
    wrong = [k for k in own.keys() | tensors.keys() if shapes.get(k) != given.get(k)]
    if wrong:
        raise InputError(f"these LoRA weights have another rank or other targets: {sorted(wrong)[0]} does not fit")
    model.load_state_dict(tensors, strict=False)


@torch.no_grad()
def merge_lora(model):
    """Add every low-rank path into its weight and forget it: plain Linears again, no cost at sampling; -> model."""
    for linear in model.modules():
        if isinstance(linear, LoRALinear):
            linear.weight += (linear.lora_scale * linear.lora_B @ linear.lora_A).to(linear.weight.dtype)
            del linear.lora_A, linear.lora_B, linear.lora_scale
            linear.__class__ = nn.Linear
    return model
