"""
Stage I: supervised fine-tuning of the DiT and the physical head on ground-truth clips, by flow matching.

    python sft.py                                    # the nano model: under an hour on two CPU cores
    python sft.py --preset=taste                     # a short run, to see things fall
    python sft.py --phys=False --name=sft_plain      # without the encoder
    python sft.py --phys=False --physics=False --name=base --pool=out/pool_base     # a base: things move, but not fall
    python sft.py --init_from=out/base/dit.safetensors --name=tuned                 # and Stage I from there
    torchrun --nproc_per_node=8 sft.py --batch=512
    torchrun --nproc_per_node=8 sft.py --preset=wan5b --fsdp=True --folder=CLIPS    # after data/fetch.py

The first run makes a pool of latents (world -> VAE, once) in out/pool/; later runs reuse it. Watch out/sft/:
metrics.jsonl has the loss by timestep bin, and the sheets show truth above sample. The results are dit.safetensors and
head1.safetensors, beside them copies of the VAE and the backbone, so that the folder serves as --data everywhere.
PhysMaster's Stage I starts from a pretrained video model: give one with --init_from; nano starts from nothing.
"""
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
import eval as judge
import model as M
import sample
import simdata
from encoder import load_phys_encoder, true_paths
from vae import load_vae, visibility


@dataclass
class Config:
    name: str = "sft"               # the run's folder under out/
    data: str = "data"              # folder with vae.safetensors and backbone.safetensors
    pool: str = "out/pool"          # folder of cached latents; made if it lacks shards
    scenarios: str = ",".join(simdata.SCENARIOS)  # which of the world's, separated by commas; they take turns
    clips: int = 7680               # simulated clips in the pool, each also mirrored
    scenes: str = "out/scenes"      # folder where val scenes are kept for other runs
    physics: bool = True            # False: bodies move along smooth random paths instead, for a base without physics
    folder: str = ""                # a folder of clips (see simdata.py) to train on instead, mirrored as well
    skip_broken: bool = False       # leave broken clips of the folder out, and say so, instead of stopping
    height: int = 64                # pixels of the clips
    width: int = 64                 # likewise
    frames: int = 25                # of a clip, 1 + 4k
    fps: int = 16                   # of the clips
    text_emb: str = ""              # captions' embeddings for a Wan DiT (data/embed_text.py); empty: made with umT5
    model: str = "nano"             # the DiT, a name in model.CONFIGS; --init_from brings its own
    init_from: str = ""             # a dit.safetensors to start from (and from its head1 beside it, unless --head_from)
    phys: bool = True               # with the PhysEncoder; False trains the plain DiT
    head_from: str = ""             # a Depth Anything V2 file: the head starts from its DPT trunk; empty: fresh
    foretell: bool = True           # physical tokens for the frames to come, too (needs readout.safetensors)
    teacher_forcing: bool = True    # in training those tokens tell the true paths, where they are known
    rank: int = 0                   # > 0: of a LoRA, in place of all of the DiT's weights; it is merged in the end
    steps: int = 3200               # optimizer steps; 0 only makes the pool
    batch: int = 32                 # clips a step, over all ranks
    accumulate: int = 1             # micro-batches a step and rank, for less memory
    lr: float = 6e-3                # peak learning rate of Muon: the matrices inside the blocks (no LoRA, no FSDP)
    adam_lr: float = 3e-3           # peak learning rate of AdamW: what enters, leaves, shifts and scales
    warmup: int = 200               # steps
    weight_decay: float = 0.02      # on matrices
    shift: float = 5.0              # > 1 trains more near pure noise, where it is decided who goes where
    moving: float = 8.0             # extra loss weight of latents that change over time
    drop_text: float = 0.1          # fraction of captions left empty, so that --cfg means something
    ema: float = 0.999              # decay of the weight average that is evaluated and shipped
    log_every: int = 25             # steps
    eval_every: int = 800           # steps between samples, checkpoints and val scores
    eval_clips: int = 80            # val clips that are sampled then
    sampler_steps: int = 12         # of those
    sampler_shift: float = 3.0      # > 1 spends more of them near noise
    solver: str = "ab2"             # ab2, euler or unipc
    temperature: float = sample.DEFAULT_TEMPERATURE  # scale of their initial noise
    seed: int = 0                   # of weights, order, noise
    checkpointing: bool = False     # compute activations again in the backward pass instead of keeping them
    fsdp: bool = False              # shard weights and optimizer over the ranks (FSDP2) instead of copying them (DDP)
    graphs: bool = False            # CUDA graphs: on one GPU a small DiT's steps else wait for Python
    resume: bool = False            # go on from out/<name>/state.safetensors
    device: str = "auto"            # auto, cuda, mps or cpu


PRESETS = {"nano": {},
           # a short run wants higher rates, and soon
           "taste": dict(name="taste", pool="out/pool_taste", clips=1024, steps=220, lr=1.2e-2, adam_lr=4e-3,
                         warmup=40, eval_every=110),
           # everything from nothing in minutes, see data/gpu.sh
           "gpu": dict(name="gpu", pool="out/pool_gpu", clips=20480, steps=1700, batch=256, lr=1e-2, adam_lr=4e-3,
                       warmup=60, eval_every=850, eval_clips=160, graphs=True),
           # not trained yet: from scratch on one GPU, and published weights that data/fetch.py has put in order
           "small": dict(name="small", model="small", pool="out/pool_small", height=128, width=128, frames=33,
                         clips=32768, steps=20000, batch=128, lr=3e-3, adam_lr=1e-3, eval_every=2000,
                         temperature=1.0)}
PRESETS |= {name: dict(name=name, data=f"out/{name}_data", init_from=f"out/{name}_data/dit.safetensors",
                       pool=f"out/pool_{name}", height=512, width=512, frames=49, fps=fps, foretell=False, steps=3000,
                       lr=1e-5, adam_lr=1e-5, moving=1.0, checkpointing=True, eval_every=500, eval_clips=64,
                       sampler_steps=25, sampler_shift=shift, solver="unipc", temperature=1.0)
            for name, fps, shift in (("wan5b", 24, 5.0), ("wan1.3b", 16, 8.0))}
PATCH = 14                                         # pixels of the photo a side, in every DINOv2
SHARD = 512                                        # clips simulated and encoded at a time
# Of the scenes. The backbone has learned those of seed 0 by heart, a little: its tokens would seem more reliable there
# than they are on a new picture. Pairs for DPO come from seed 1.
SEED = 2


# ----------------------------------------------------------------------------------------------------------------------
# the pool: latents are made once, training then never sees a pixel but the first frame's

def prepare(batch, size, photo):
    """A make_batch dict -> what the pool needs of B clips; text and what a readout should say also of their mirror
    images, which obey the same laws."""
    turned = batch | {k: batch[k].flip(-1) for k in ("mask", "photo_mask") if k in batch}
    patches = [n // PATCH for n in simdata.sides(photo)]
    owner, path = (torch.cat(x) for x in zip(*(true_paths(b, size, patches) for b in (batch, turned))))
    path[len(path) // 2:, ..., 0] *= -1
    video, photo = (common.to_bytes(batch[k]) for k in ("video", "photo"))           # as in a file
    return dict(video=video, photo=photo, text=M.bytes_to_tokens(batch["caption"] * 2, M.LONG).short(), owner=owner,
                path=path)


def simulate(scenario, count, start, form, device):
    batch = simdata.make_batch(scenario, count, SEED, "train", start=start, truth=False, device=device, **form)
    return prepare(batch, form["size"], form["photo"])


def shard_plan(cfg, total, device):
    """The parts in which a pool is made, see common.shard_plan."""
    if cfg.folder:                                 # what is read and not simulated gains nothing from large parts
        return common.shard_plan([cfg.folder], cfg.pool, total, sample.at_once(cfg, SHARD, torch.device("cpu")))
    return common.shard_plan(cfg.scenarios.split(","), cfg.pool, total, sample.at_once(cfg, SHARD, device))


def captions(cfg):
    """Of all clips that a run trains on, whatever makes them (a GPU makes more at once, and so others), and of the val
    clips; data/embed_text.py asks."""
    held_out = judge.val_captions(common.check_names("scenarios", cfg.scenarios, simdata.SCENARIOS), cfg.eval_clips)
    if cfg.folder:
        said = simdata.Clips(cfg.folder, common.clip_size(cfg), cfg.frames, cfg.fps, cfg.skip_broken).captions
        return held_out + M.tokens_to_strings(M.bytes_to_tokens(said, M.LONG))       # as the pool keeps them
    return held_out + [c for kind in ("cpu", "cuda") for part in shard_plan(cfg, cfg.clips, torch.device(kind))
                       for c in simdata.captions(simdata.make_scene(part["scenario"], part["count"], SEED, "train",
                                                                    start=part["start"])[0])]


def content(folder, start, count):
    """What some clips of a simdata.Clips are, as far as their lines and files' sizes tell."""
    lines = folder.lines[start:start + count]
    files = [f"{folder.folder}/{line['clip']}{end}" for line in lines for end in (
        ".npz", ".png", *common.VIDEO_EXTENSIONS)]
    sizes = [os.path.getsize(file) for file in files if os.path.exists(file)]
    return f"{common.seed_of(json.dumps([lines, sizes])):016x}"


def check_pool(cfg, vae, form):
    """-> the pool's shards, [(path, what they hold)], and cfg.folder's clips. Raises InputError if a shard that lies
    there holds something else: latents of another VAE would train as well, and then sample noise."""
    common.make_dir(cfg.pool)
    folder, shards = simdata.Clips(cfg.folder, skip=cfg.skip_broken, **form) if cfg.folder else None, []
    # of the decoder nothing: it may be tuned alone, and latents stay as they are
    stamp = dict(vae=common.fingerprint(vae.encoder, vae.conv1), statistics=[vae.config[k] for k in (
        "latent_mean", "latent_std")], paths=True) | form
    device = next(vae.parameters()).device
    for s, part in enumerate(shard_plan(cfg, len(folder) if cfg.folder else cfg.clips, device)):
        source = dict(seed=SEED, physics=cfg.physics)
        if cfg.folder:
            part["scenario"] = os.path.abspath(cfg.folder)
            source = dict(content=content(folder, part["start"], part["count"]))
        shards.append((f"{cfg.pool}/{s:04d}.safetensors", stamp | source | part))
    for path, what in (shard for shard in shards if os.path.exists(shard[0])):
        made = common.read_config(path)
        if different := [k for k in what if made.get(k) != what[k]]:
            raise common.InputError(f"{path} was made with another {different[0]}; delete {cfg.pool} or choose another "
                                    "--pool")
    return shards, folder


@torch.no_grad()
def make_pool(cfg, vae, form, shards, folder, device, rank, world):
    """Fill cfg.pool with what is missing of check_pool's shards -> dict(latent (N, C, 1+k, h, w) bf16, photo
    (N, 3, S, S) uint8, text (N, 1024) int16, bytes; owner (N, cells) uint8 and path (N, bodies, FUTURE, 2), what the
    readout should say: see encoder.true_paths).

    form: dict(size, frames, fps, photo: S, the pixels a side of the encoder's picture, or its height and width)."""
    small = sample.small(cfg.height, cfg.width)
    part, chunk = (sample.at_once(cfg, 16, device), 0) if small else (1, 2)          # clips, latent frames at a time
    missing = [shard for shard in shards[rank::world] if not os.path.exists(shard[0])]
    world_now = common.source_hash()

    def read():
        for _, what in missing:
            batch = folder.read(what["start"], what["count"])
            yield prepare(batch, form["size"], form["photo"]) if batch else None     # all of them broken
    clips = read() if cfg.folder else common.side_by_side(
        simulate, [(what["scenario"], what["count"], what["start"], form | dict(physics=cfg.physics), str(device))
                   for _, what in missing], device)
    encode = lambda v: vae.encode(common.from_bytes(v.to(device)), chunk).to("cpu", torch.bfloat16)
    for path, what in tqdm(missing, desc=f"pool, shards of {shards[0][1]['count']}", disable=rank > 0 or not missing):
        made = next(clips)
        if made is None:
            continue
        with common.autocast(device):              # as they are, then their mirror images
            video = made.pop("video").split(part)
            latent = torch.cat([encode(v) for v in video] + [encode(v.flip(-1)) for v in video])
        photos = torch.cat([made["photo"], made["photo"].flip(-1)])
        common.save_weights(path, made | dict(latent=latent, photo=photos), what | dict(world=world_now))
    if cfg.folder and folder.broken:
        print(f"left out {len(folder.broken)} broken clips: " + "; ".join(folder.broken))
    common.barrier()
    there = [path for path, _ in shards if os.path.exists(path)]
    if not there:
        raise common.InputError(f"{cfg.folder}: none of its {len(folder)} clips can be read"
                                + "".join(f": {why}" for why in folder.broken[-1:]))
    if any(other != there for other in common.gather(there)):
        raise common.InputError(f"{cfg.pool} is not the same folder on all machines; expected one that they share")
    worlds = {common.read_config(path).get("world", world_now) for path in there}
    if not cfg.folder and rank == 0 and worlds != {world_now}:
        print(f"note: simdata.py has changed since {cfg.pool} was made; another --pool would be of the world as it is "
              "now")
    shapes = []
    for path in there:
        with common.open_weights(path) as (found, _):
            shapes.append({k: shape for k, (shape, _) in found.items()})
    pool, first = {}, 0
    for path in there:                             # each to its place: all parts and a whole would be two pools
        for k, v in common.read_weights(path)[0].items():
            if k not in pool:
                widest = [max(n) for n in zip(*(s[k][1:] for s in shapes))]           # scenarios differ in bodies
                pool[k] = v.new_zeros(sum(s[k][0] for s in shapes), *widest)
            pool[k][(slice(first, first + len(v)), *map(slice, v.shape[1:]))] = v
        first += len(v)
    return pool


def get_batch(cfg, pool, step, device):
    """The global batch of a step, a function of (seed, step) -> clips' indices, on the pool's device; a mask of the
    captions that are kept, t and the noise, on the device."""
    g = common.generator(cfg.seed, "sft", step)
    index = torch.randint(len(pool["latent"]), (cfg.batch,), generator=g).to(pool["latent"].device)
    keep = torch.rand(cfg.batch, 1, generator=g) >= cfg.drop_text
    t = M.sample_t(cfg.batch, g, cfg.shift)
    C, k, h, w = pool["latent"].shape[1:]
    return index, keep.to(device), t.to(device), common.noise(
        (cfg.batch, C, k - 1, h, w), cfg.seed, "sft noise", step, device=device)


def networks(cfg, device):
    """-> the DiT and the PhysEncoder (None without one), from where the run starts; the config of that DiT."""
    config = M.CONFIGS.get(cfg.model, {}) | {"phys": cfg.phys}
    if cfg.init_from:
        config = common.read_config(cfg.init_from)
        if "num_layers" not in config:
            raise common.InputError(f"--init_from={cfg.init_from} is not a DiT of ours; expected a dit.safetensors")
        if config["phys"] and not cfg.phys:
            raise common.InputError(f"--phys=False: {cfg.init_from} was trained with physical tokens; expected one "
                                    "without, or --phys=True")
    torch.manual_seed(cfg.seed)
    # Wan's size, which is loaded below: without random weights first, they take a minute
    with torch.device("meta" if cfg.init_from and config["text"] == "features" else "cpu"):
        dit, encoder = M.VideoDiT(config), None
    if cfg.phys:                                   # the head starts fresh, as in the paper; the backbone stays as is
        encoder = load_phys_encoder(f"{cfg.data}/backbone.safetensors", config={
            "out_dim": config["dim"], "foretell": cfg.foretell})
        sample.check_foretelling(encoder, cfg)
        if cfg.head_from:
            encoder.start_head(cfg.head_from)
    if cfg.init_from:
        # under a LoRA they stay as they are, and need no more than the products' precision
        common.load_weights(dit, cfg.init_from, common.precision(device) if cfg.rank else None)
        head = os.path.join(os.path.dirname(cfg.init_from), "head1.safetensors")
        # beside a plain DiT a head may lie that an earlier run of that name has left
        if cfg.phys and config["phys"] and os.path.exists(head) and not cfg.head_from:
            common.load_weights(encoder.head, head)
        if cfg.phys and not config["phys"]:        # a plain model learns to listen to the encoder
            M.add_phys(dit)
    dit.checkpointing = cfg.checkpointing
    if cfg.rank:
        M.add_lora(dit, cfg.rank, cfg.rank, cfg.seed)
        if cfg.phys:
            dit.phys_type = nn.Parameter(dit.phys_type.float())
    return dit, encoder, config


class StageOne(nn.Module):
    """DiT and encoder under one roof, so that DDP sees every trained parameter in one forward.

    visible (C, 1, 1, 1), moving: loss weights of channels and of what changes over time. Weights of channels change
    nothing about the optimum; those of motion lean towards the futures in which something happens."""
    def __init__(self, dit, encoder, visible=1.0, moving=0.0):
        super().__init__()
        self.dit, self.encoder, self.visible, self.moving = dit, encoder, visible, moving
        self.run = None                            # the DiT as CUDA graphs

    def forward(self, latent, photo, text, t, eps, true=None):
        phys = None
        if self.encoder is not None:
            phys = self.encoder(photo, self.encoder.head.grid(latent), latent.shape[2] - 1, true)
        x0 = latent[:, :, 1:]
        moves = (x0 - x0.mean(2, keepdim=True)).square().mean(1, keepdim=True).clamp_max(1)         # (B, 1, k, h, w)
        weight = self.visible * (1 + self.moving * moves)
        return M.flow_loss(self.run or self.dit, x0, text, latent[:, :, :1], phys, t, eps, weight)              # (B,)


def shard(raw, device, world):
    """FSDP2: weights, gradients and optimizer state of a StageOne lie in parts on all ranks, and those of a block come
    together only while it runs. -> the modules that do so, to be told when to reduce gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard                                   # a second to import
    mesh = init_device_mesh(device.type, (world,))
    parts = [*raw.dit.blocks, raw.dit, *([raw.encoder.head] if raw.encoder is not None else [])]
    for part in parts:
        fully_shard(part, mesh=mesh)
    return parts


# ----------------------------------------------------------------------------------------------------------------------

def main():
    cfg = common.parse_config(Config, sys.argv[1:], PRESETS)
    common.check_range(cfg, clips=(1, 10**8), steps=(0, 10**8), batch=(1, 10**6), accumulate=(1, 10**4), lr=(0, 1),
                       adam_lr=(0, 1), warmup=(0, 10**8), weight_decay=(0, 1), shift=(0.01, 100), moving=(0, 1000),
                       drop_text=(0, 1), ema=(0, 1), log_every=(1, 10**8), eval_every=(1, 10**8),
                       eval_clips=(1, 10**4), sampler_steps=(1, 1000), sampler_shift=(0.01, 100),
                       temperature=(0, 2), rank=(0, 1024), height=(16, 2048), width=(16, 2048), frames=(5, 1001),
                       fps=(1, 240))
    names = common.check_names("scenarios", cfg.scenarios, simdata.SCENARIOS)
    common.check_choice(cfg, solver=M.SOLVERS)
    device, rank, world = common.setup(cfg.device)
    if cfg.rank and (cfg.fsdp or not cfg.init_from):
        raise common.InputError(f"--rank={cfg.rank}: a LoRA is small and tunes what has been trained; expected "
                                "--init_from=FILE, and no --fsdp")
    if M.CONFIGS.get(cfg.model, {}).get("text") != "bytes" and not cfg.init_from:
        raise common.InputError(f"--model={cfg.model}: expected nano, small or tiny; other ones come with --init_from")
    if cfg.head_from and not cfg.phys:
        raise common.InputError("--head_from starts the physical head, and --phys=False has none; expected one of them")
    most = 1 if not sample.small(cfg.height, cfg.width) else 8 if cfg.fsdp else 32   # val clips at a time
    if cfg.fsdp and (world == 1 or len(judge.val_parts(names, cfg.eval_clips, most)) % world):
        raise common.InputError(f"--fsdp=True shards over the ranks of torchrun, here {world}, and all must sample "
                                f"alike; expected 2 or more, and for example --eval_clips={8 * len(names) * world}")
    if cfg.graphs and (world > 1 or cfg.accumulate > 1 or device.type != "cuda"):
        raise common.InputError(f"--graphs=True with {world} ranks and --accumulate={cfg.accumulate} on {device.type}: "
                                "expected 1 and 1 on a GPU")
    if cfg.folder and not cfg.physics:
        raise common.InputError("--physics=False is about simulated clips; expected it without --folder")
    if cfg.batch % (world * cfg.accumulate):
        raise common.InputError(f"--batch={cfg.batch} must be a multiple of ranks x accumulate "
                                f"= {world * cfg.accumulate}")
    vae = load_vae(f"{cfg.data}/vae.safetensors", device=device)
    common.check_frames(cfg), common.check_sides(cfg, ("height", "width"), 2 * vae.stride)
    dit, encoder, config = networks(cfg, device)
    size = common.clip_size(cfg)
    form = dict(size=size, frames=cfg.frames, fps=cfg.fps, photo=judge.photo_size(size, encoder))
    if cfg.graphs and config["text"] == "features":
        raise common.InputError("--graphs=True needs captions of one length; expected a DiT that reads bytes")
    pool_parts = check_pool(cfg, vae, form)        # before hours of work
    common.make_dir(cfg.scenes)
    held_out = common.in_background(common.disk_cache, cfg.scenes, judge.val_scenes, names, cfg.eval_clips, most, rank,
                                world, form) if cfg.steps else None
    pool = make_pool(cfg, vae, form, *pool_parts, device, rank, world)
    if not cfg.steps:
        return
    folder = common.start_run(cfg, rank, f"out/{cfg.name}")                          # all it reads is there
    log, state = f"{folder}/metrics.jsonl", f"{folder}/state.safetensors"
    text = None                                    # bytes, or what an outside text encoder says, computed once
    if config["text"] == "features":
        said = M.tokens_to_strings(pool["text"]) + judge.val_captions(names, cfg.eval_clips)
        text = sample.text_features(cfg.text_emb or f"{cfg.data}/captions.safetensors", said, config["text_dim"],
                                    cfg.data, device)

    visible = visibility(vae, pool["latent"][common.evenly(len(pool["latent"]), 16), :, :2].to(device))
    raw = StageOne(dit, encoder, visible, cfg.moving)
    fsdp_modules = shard(raw, device, world) if cfg.fsdp else []
    raw.to(device)
    if cfg.graphs:
        raw.run = common.Graphed(dit)
    model = DistributedDataParallel(raw) if world > 1 and not cfg.fsdp else raw
    ema = common.EMA(raw, cfg.ema)
    trained = {k: p for k, p in raw.named_parameters() if p.requires_grad}
    # Muon for the matrices inside the blocks, AdamW for what enters, leaves, shifts and scales, for a LoRA, and for all
    # that is sharded: Muon needs whole matrices
    inner = {k for k, p in trained.items() if ".blocks." in k and p.ndim == 2 and not cfg.fsdp and not cfg.rank}
    rest = [p for k, p in trained.items() if k not in inner]
    adam = torch.optim.AdamW([dict(params=[p for p in rest if p.ndim > 1], weight_decay=cfg.weight_decay),
                              dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0)], betas=(0.9, 0.98))
    optimizers = {adam: cfg.adam_lr}               # with their peak learning rates
    if inner:
        optimizers = {common.Muon([trained[k] for k in sorted(inner)], cfg.lr, cfg.weight_decay): cfg.lr} | optimizers
    peak_lr = next(iter(optimizers.values()))      # Muon's where there is one; this one is logged
    parts = {"model": trained, "ema": ema.shadow}
    first = common.load_state(state, parts, *optimizers) if cfg.resume else 0
    if rank == 0:
        common.trim_log(log, first)
        print(f"{sum(p.numel() for p in trained.values()):,} trained parameters, {len(pool['latent'])} clips, "
              f"from step {first}")

    def validate(step):
        """Sample val clips with the averaged weights, every rank its share; a sheet in the folder. -> {metric: mean}"""
        raw.eval()
        with ema.applied(raw):
            scores, shown = judge.outcome(models, held_out.result(), device, steps=cfg.sampler_steps,
                                          shift=cfg.sampler_shift, solver=cfg.solver, temperature=cfg.temperature)
            for part in fsdp_modules:              # without a backward pass they would stay whole, with these weights
                part.reshard()
        raw.train()
        shown = sum(common.gather([v[::2] for v in shown]), [])                      # the scenarios are on all ranks
        if rank == 0:
            common.write_image(f"{folder}/{step:06d}.png", common.sheet(shown))
        return scores

    # training
    models = sample.Models(vae, encoder, dit, text=text)
    if sample.small(cfg.height, cfg.width):        # a large model will need that memory
        pool = common.to_device_if_it_fits(pool, device)
    stop, began, bins, done = common.Stop(), time.time(), torch.zeros(2, 4, device=device), first
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, disable=rank > 0)
    micro = cfg.batch // world // cfg.accumulate
    for step in bar:
        # warm up, then a cosine to 2 %: a function of the step alone, so that a resumed run takes the same path
        scale = min((step + 1) / (cfg.warmup + 1), 0.02 + 0.49 * (1 + math.cos(math.pi * step / cfg.steps)))
        for optimizer, peak in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        index, keep, t, eps = get_batch(cfg, pool, step, device)
        raw.zero_grad(set_to_none=True)
        for i in range(cfg.accumulate):
            mine = slice((rank * cfg.accumulate + i) * micro, (rank * cfg.accumulate + i + 1) * micro)
            last = i == cfg.accumulate - 1         # before the forward: DDP decides there whether to reduce
            for part in fsdp_modules:
                part.set_requires_gradient_sync(last)
            if model is not raw:
                model.require_backward_grad_sync = last
            latent = pool["latent"][index[mine]].to(device).float()
            photo = common.from_bytes(pool["photo"][index[mine]].to(device))
            # a DiT that is trained on wrong forecasts learns to distrust them, and paints faint bodies
            true = [pool[k][index[mine]].to(device) for k in ("owner", "path")] if cfg.teacher_forcing else None
            said = pool["text"][index[mine]].to(device).long() * keep[mine]
            said = models.read(M.tokens_to_strings(said)).to(device) if text else said[:, :M.BYTES]
            with common.autocast(device):
                loss = model(latent, photo, said, t[mine], eps[mine], true)                        # (micro,)
            (loss.mean() / cfg.accumulate).backward()
            # the average over all t hides what matters: see which part of the path is being learned
            bins.index_add_(1, (t[mine] * 4).long().clamp_max(3), torch.stack([loss.detach(), torch.ones_like(loss)]))
        norm = common.unshard(nn.utils.clip_grad_norm_(trained.values(), 1.0))
        for optimizer in optimizers:
            optimizer.step()
        ema.update(raw, step)

        done = step + 1
        if done % cfg.log_every == 0:
            total = common.average(bins, device).cpu()
            mean = (total[0].sum() / total[1].sum()).item()
            if rank == 0:
                common.log_line(log, {"step": step, "loss": mean, "grad_norm": norm.item(), "lr": peak_lr * scale,
                                      "seconds": round(time.time() - began, 1),
                                      **{f"loss_t{i}/4": (s / n).item() if n else None
                                         for i, (s, n) in enumerate(total.T, 1)}})
                bar.set_postfix(loss=f"{mean:.4f}", norm=f"{norm.item():.2f}")
            bins.zero_()
        ending = stop.agreed(device)
        if done % cfg.eval_every == 0 or done == cfg.steps or ending:
            common.save_state(state, done, parts, *optimizers)
        if done % cfg.eval_every == 0 or done == cfg.steps:
            scores = validate(done)
            if rank == 0:
                common.log_line(log, {"step": step} | scores)
                bar.write(f"step {done}: val traj_l2 {scores['val_traj_l2']:.4f}, IoU {scores['val_iou']:.3f}")
        if ending:
            break

    if done >= cfg.steps:
        ema.copy_to(raw)
        M.merge_lora(dit)
        if rank == 0:                              # the DiT last: with it the folder is whole
            sample.copy_weights(cfg.data, folder, "vae", "backbone", "readout", text_emb=cfg.text_emb)
        files = ({"head1": (encoder.head, encoder.config)} if cfg.phys else {}) | {"dit": (dit, dit.config)}
        for name, (module, config) in files.items():
            tensors = {k: common.unshard(v) for k, v in module.state_dict().items()}
            if rank == 0:
                common.save_weights(f"{folder}/{name}.safetensors", tensors, config, torch.bfloat16)
        if rank == 0:
            print(f"wrote {' and '.join(f'{folder}/{name}.safetensors' for name in files)}")
    elif rank == 0:
        print(f"stopped after {done} steps; go on with --resume=True")


if __name__ == "__main__":
    common.run(main)
