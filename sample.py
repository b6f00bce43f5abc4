"""
An image in, a physical video out.

    python sample.py data/drop.png
    python sample.py photo.jpg --prompt="a red rubber ball falls" --n=4 --out=out/photo.gif
    python sample.py data/roll.png --stage=1 --steps=30 --seed=7
    python sample.py photo.jpg --preset=wan5b --weights=Wan2.2-TI2V-5B --prompt="a ball falls onto the floor"

Any PNG, JPEG or WebP with sides of 16 to 8192 pixels; its centre is used. The video's format follows the name
of --out: mp4, gif or webp. The same seed gives the same bytes. Without --prompt the text that the image itself carries
(a PNG "Description") is used. In Python:

    models = load_models("data", stage=2)          # or load_published("Wan2.2-TI2V-5B")
    video = generate(models, image, ["a red rubber ball falls"], keys=[0])      # (1, 3, 25, 64, 64) in [-1, 1]
"""
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass

import torch
from PIL import Image
from tqdm import tqdm

import common
import encoder as E
import model as M
import vae as V
from common import InputError

DEFAULT_TEMPERATURE = 0.45                         # chosen on the val split, data/RESULTS_drop.md
PUBLISHED = {"wan5b": "Wan2.2-TI2V-5B", "wan1.3b": "Wan2.1-T2V-1.3B"}
SIDES = {"wan5b": 32, "wan1.3b": 16}               # their videos' sides are multiples of this many pixels
SMALL = 128                                        # pixels a side; larger clips are made one by one, decoded in parts
UMT5 = "models_t5_umt5-xxl-enc-bf16.pth"           # in Wan's own folders, with its tokenizer in google/umt5-xxl/
TEXT_ENCODER = ("text_encoder", "tokenizer", UMT5, "google")                         # diffusers' and Wan's own


@dataclass
class Models:
    """What it takes to make a video; encoder is None for a DiT that was trained without one.

    text: {caption: features (L, width)} for a DiT that reads those of an outside text encoder, see text_features."""
    vae: torch.nn.Module
    encoder: torch.nn.Module
    dit: torch.nn.Module
    text: dict = None

    def read(self, captions):
        """B strings -> what the DiT takes: bytes (B, 128), or features (B, longest, width), padded with zeros."""
        if self.text is None:
            return M.bytes_to_tokens(captions)
        return torch.nn.utils.rnn.pad_sequence([self.text[c].float() for c in captions], batch_first=True)


def load_models(data="data", stage=1, ckpt="", head="", device="cpu"):
    """The shipped components, up to a stage: 1 is dit + head1, 2 adds lora2, 3 swaps in head3. -> Models, frozen.
    "head" is 1 with head3 (row 6 of PhysMaster's Table 1).

    ckpt, head: other files for the DiT and the physical head, for stage 1 alone: the deltas of 2 and 3 fit data's.
    Raises InputError if a file is missing or foreign."""
    if stage != 1 and (ckpt or head):
        raise InputError(f"stage {stage} changes the DiT and the head in {data}; other ones go with stage 1")
    ckpt = ckpt or f"{data}/dit.safetensors"
    config = common.read_config(ckpt)
    if "num_layers" not in config:
        raise InputError(f"{ckpt} is not a DiT of ours: its metadata has no DiT config; expected a dit.safetensors")
    large = config["text"] == "features"           # Wan's size: never in memory twice, nor in fp32 where bf16 will do
    dtype = common.precision(torch.device(device)) if large else None
    with torch.device("meta" if large else "cpu"):
        dit = M.VideoDiT(config)
    if large:
        check_memory(data, dit, common.read_config(f"{data}/vae.safetensors"), dtype, device)
    common.load_weights(dit, ckpt, dtype, device)
    dit.eval().requires_grad_(False)
    if not dit.config["phys"] and (head or stage in (3, "head")):
        raise InputError(f"{ckpt} was trained without physical tokens; expected neither a head nor stage 3")
    dit.base = common.fingerprint(dit.blocks[0])   # which DiT a LoRA belongs to: any training changes the first block
    if stage in (2, 3):
        tensors, lora = common.read_weights(f"{data}/lora2.safetensors")
        if "rank" not in lora:
            raise InputError(f"{data}/lora2.safetensors is not a LoRA of ours: its metadata has no rank")
        M.add_lora(dit, lora["rank"], lora["alpha"])
        if lora.get("base", dit.base) != dit.base:
            raise InputError(f"{data}/lora2.safetensors was trained on another dit.safetensors than {ckpt}; expected "
                             "stage 1, or a run of dpo.py on this one")
        M.load_lora(dit, tensors)
        dit.requires_grad_(False)
        if not large:                              # in bf16 half of so small a step would be rounded off
            M.merge_lora(dit)
    encoder = None
    if dit.config["phys"]:
        head = head or f"{data}/{'head3' if stage in (3, 'head') else 'head1'}.safetensors"
        encoder = E.load_phys_encoder(f"{data}/backbone.safetensors", head).to(device).eval().requires_grad_(False)
    vae = V.load_vae(f"{data}/vae.safetensors", device=device)
    return Models(vae, encoder, dit)


def check_foretelling(encoder, cfg):
    """Raises InputError for an encoder that foretells, if cfg's clips are not what its readout was fitted to."""
    if encoder is not None and encoder.readout is not None and (cfg.height != cfg.width or cfg.fps != 16):
        raise InputError(f"--height={cfg.height} --width={cfg.width} --fps={cfg.fps}: what this encoder foretells is "
                         "of square clips at 16 fps; expected such, or one trained with --foretell=False")


def check_memory(folder, dit, vae_config, dtype, device):
    """Raises InputError that says what would fit, unless there is room for a DiT of that dtype and its VAE in fp32."""
    if "latent_mean" not in vae_config:
        raise InputError(f"the vae.safetensors in {folder} carries no VAE config; expected one of vae.py's or of "
                         "data/fetch.py's")
    with torch.device("meta"):
        vae = V.VideoVAE(vae_config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    size = 1e-9 * (dtype.itemsize * count(dit) + 4 * count(vae))
    free, main = (common.free_memory(torch.device(where)) / 1e9 for where in (device, "cpu"))
    if size > free:
        fits = ["a device with as much"] + ["--device=cpu"] * (free < size < main) + [
            "Wan2.1-T2V-1.3B, which takes 3.4 GB in bf16"] * (count(dit) > 4e9 and free > 3.4)
        raise InputError(f"the weights in {folder} need {size:.1f} GB, --device={device} has {free:.1f} GB free; "
                         f"expected {', or '.join(fits)}")


def small(*sides):
    """Whether clips of these sides, in pixels, are so small that many are made at a time, and whole."""
    return max(sides) <= SMALL


def at_once(cfg, count, device):
    """How many clips are made together where it would be `count` of nano's on a CPU."""
    larger = cfg.frames * cfg.height * cfg.width / (25 * 64**2)
    more = common.scenes_at_once(device) if small(cfg.height, cfg.width) else 1      # large ones take gigabytes
    return max(1, int(count * more / larger))


def link(source, target):
    """Let the target be a link to the source, if that exists and the target does not (or is one to where it was)."""
    if os.path.exists(source) and not os.path.exists(target):
        if os.path.lexists(target):
            os.remove(target)
        os.symlink(os.path.realpath(source), target)


def copy_weights(data, folder, *names, text_emb=""):
    """Copy these weights of one folder, those that it has, into another, so that that can be --data by itself, and the
    file of captions' features, text_emb or else the folder's."""
    files = {name: f"{data}/{name}.safetensors" for name in names}
    for name, file in (files | dict(captions=text_emb or f"{data}/captions.safetensors")).items():
        if os.path.exists(file):
            with common.atomic(f"{folder}/{name}.safetensors") as tmp:
                shutil.copy(file, tmp)
    for part in TEXT_ENCODER:                      # gigabytes: a link will do
        link(f"{data}/{part}", f"{folder}/{part}")


def load_published(folder, name="wan5b", device="cpu", dtype=None):
    """The files of Wan2.2-TI2V-5B or Wan2.1-T2V-1.3B as published, or as diffusers keeps them (transformer/, vae/).
    -> Models, frozen. name: wan5b or wan1.3b; dtype: of the DiT, by default what common.precision says.

    A config.json in the folder says how large the DiT is. Raises InputError if a file is missing, foreign or the other
    model's, or if the weights do not fit into the memory that is free."""
    if not os.path.isdir(folder):
        raise InputError(f"--weights={folder} is no folder; expected the published files of a Wan model, or diffusers' "
                         "version of them")
    version = "2.1" if name == "wan1.3b" else "2.2"
    dit_path, vae_path = f"{folder}/transformer", f"{folder}/vae"                     # as diffusers keeps them
    if not os.path.isdir(dit_path):
        dit_path, vae_path = folder, f"{folder}/Wan{version}_VAE.pth"

    def read(path, convert, default):
        if not os.path.exists(path):
            return default
        try:
            with open(path) as f:
                said = json.load(f)
        except ValueError as error:
            raise InputError(f"{path} is no readable config: {error}") from None
        try:
            found = convert(said)
            return {k: found[k] for k in default}
        except (KeyError, TypeError, AttributeError):
            kind = isinstance(said, dict) and (said.get("_class_name") or said.get("model_type")) or "something else"
            raise InputError(f"{path} is the config of {kind}; expected that of {PUBLISHED[name]}") from None
    wan = read(f"{dit_path}/config.json", M.published_config, M.CONFIGS[name])
    if wan["in_dim"] != M.CONFIGS[name]["in_dim"]:
        other = [k for k in PUBLISHED if M.CONFIGS[k]["in_dim"] == wan["in_dim"]]
        seems = f" and seems to be {PUBLISHED[other[0]]}: expected --model={other[0]} or" if other else "; expected"
        raise InputError(f"{folder}, whose DiT reads {wan['in_dim']} channels, is not {PUBLISHED[name]}{seems} another "
                         "folder")
    vae_config = read(f"{vae_path}/config.json", V.diffusers_config, V.CONFIGS[f"wan{version}"])
    dtype = dtype or common.precision(torch.device(device))
    for path in (dit_path, vae_path):
        common.weight_files(path)                  # they are there, before it is asked whether they fit
    with torch.device("meta"):                     # no memory before the weights come
        dit = M.VideoDiT(wan)
    check_memory(folder, dit, vae_config, dtype, device)
    common.load_weights(dit, dit_path, dtype, device)
    vae = V.load_vae(vae_path, vae_config, device)
    if vae.config["z_dim"] != wan["in_dim"]:
        raise InputError(f"{folder}: the VAE has {vae.config['z_dim']} channels, the DiT {wan['in_dim']}")
    return Models(vae, None, dit.eval().requires_grad_(False))


def text_features(path, captions, width, folder, device):
    """-> {caption: features (L, width) bf16}, "" included, out of the file at `path`. What it lacks is computed with
    the umT5 in `folder`, or from the Hub, and added to it. Under torchrun every rank calls, rank 0 computes.

    Raises InputError if the file is foreign, or lacks captions and there is no umT5 here (data/embed_text.py makes such
    a file elsewhere)."""
    if common.rank():
        common.barrier()                           # all is in the file when rank 0 gets there
    from data.embed_text import read_captions, write_captions
    wanted = {"", *captions}
    known = read_captions(path, width, wanted) if os.path.exists(path) else {}
    if lacking := sorted(wanted - known.keys()):
        known |= write_captions(path, lacking, folder, device)
    if not common.rank():
        common.barrier()
    return known


def read_text(path):
    """A file of prompt embeddings (data/embed_text.py) -> text, negative (L, width) each.

    Raises InputError if they are missing or differ in width."""
    tensors = common.read_weights(path)[0]
    both = [tensors[k] for k in ("text", "negative") if k in tensors and tensors[k].dim() == 2]
    if len(both) < 2 or both[0].shape[1] != both[1].shape[1]:
        raise InputError(f"{path}: expected text and negative, (length, width) each; got "
                         + (", ".join(f"{k} {tuple(v.shape)}" for k, v in tensors.items()) or "nothing"))
    return both[0].float(), both[1].float()


@torch.no_grad()
def generate_latent(models, image, text, phys, keys, frames=25, steps=12, shift=3.0, cfg=1.0, solver="ab2",
                    progress=None, temperature=1.0, null=None):
    """The denoising loop alone: image (B, C, 1, h, w) latent, tokens, physical tokens -> latent frames 1..k."""
    B, C, _, h, w = image.shape
    noise = temperature * common.randn((C, (frames - 1) // 4, h, w), keys).to(image)
    if cfg != 1 and null is None:
        null = models.read([""] * B).to(image.device)
    return M.sample(models.dit, image, text, phys, noise, steps, shift, cfg, null, solver, progress)


@torch.no_grad()
def generate(models, image, captions, keys, frames=25, steps=12, shift=3.0, cfg=1.0, solver="ab2", progress=None,
             temperature=1.0, photo=None, null=None, chunk=None, true=None):
    """image (B, 3, H, W) in [-1, 1], B captions, B noise keys (int or tuple) -> video (B, 3, frames, H, W) in [-1, 1].

    A DiT that reads features of an outside text encoder takes captions as those (B, L, text_dim), and for cfg those of
    the negative prompt as null. chunk: latent frames that the VAE decodes at a time; 0 is all, None 0 or 2 by size.
    photo (B, 3, S, S): the same picture for the encoder, which may be finer than the video; by default the image.
    true: what becomes of the bodies, for an encoder that foretells, as encoder.true_paths gives it; None: its answers.
    cfg guides by the text, as in model.sample. The noise of a clip depends on its key alone, not on the batch, the rank
    or the device; its scale is the temperature: 1 samples what the model was trained on, less leans towards the
    likeliest future, and seeds differ less."""
    if frames % 4 != 1:
        raise InputError(f"frames={frames}: expected 1 + 4k")
    device = image.device
    with common.autocast(device):
        first = models.vae.encode(image[:, :, None])                                                # (B, C, 1, h, w)
        phys = None
        if models.encoder is not None:
            look = image if photo is None else photo
            phys = models.encoder(look, models.encoder.head.grid(first), (frames - 1) // 4, true)
        text = (captions if torch.is_tensor(captions) else models.read(captions)).to(device)
        x0 = generate_latent(models, first, text, phys, keys, frames, steps, shift, cfg, solver, progress,
                             temperature, null)
        if chunk is None:
            chunk = 0 if small(*image.shape[-2:]) else 2
        video = models.vae.decode(torch.cat([first, x0], 2), chunk)
    return torch.cat([image[:, :, None], video[:, :, 1:]], 2)                        # frame 0 is the image, exactly


@dataclass
class Config:
    image: str = ""                 # the picture: PNG, JPEG or WebP (the argument without dashes)
    prompt: str = ""                # what is in it: colour, material, shape; empty: the text the image carries, if any
    out: str = ""                   # .mp4, .gif or .webp; empty: out/<image name>.mp4
    seed: int = 0                   # same seed, same bytes
    n: int = 1                      # how many seeds, shown as one grid
    height: int = 64                # pixels; the nano model was trained on 64 x 64
    width: int = 64                 # both multiples of 16 (wan5b: of 32)
    frames: int = 25                # 1 + 4k; the nano model was trained on 25
    fps: int = 16                   # of the file that is written
    steps: int = 12                 # sampler steps
    cfg: float = 1.0                # guidance on the text: what it names stays there; 1 is off
    temperature: float = DEFAULT_TEMPERATURE  # scale of the initial noise: 1 is all that can happen, 0 one future
    shift: float = 3.0              # > 1 spends more of the steps near noise
    solver: str = "ab2"             # ab2 (second order), euler, or unipc (Wan's own)
    stage: int = 0                  # 1 SFT, 2 + DPO on the DiT, 3 + DPO on the PhysEncoder; 0: all that is in data
    data: str = "data"              # folder with the weights
    model: str = "nano"             # nano, wan5b or wan1.3b (better: --preset=wan5b, which sets sizes and steps, too)
    weights: str = ""               # Wan: the folder of the published files
    text_emb: str = ""              # Wan: the prompt's embeddings, a file of data/embed_text.py, in place of --prompt
    negative: str = ""              # Wan: what the video should not show
    chunk: int = 0                  # latent frames that the VAE decodes at a time; 0 is all at once
    ckpt: str = ""                  # another DiT file
    head: str = ""                  # another physical head
    scale: int = 4                  # enlarge the video's pixels this many times
    device: str = "auto"            # auto, cuda, mps or cpu


PRESETS = {"nano": {},
           "small": dict(data="out/small", height=128, width=128, frames=33, temperature=1.0, scale=3),
           "wan5b": dict(model="wan5b", height=704, width=1280, frames=121, fps=24, steps=50, cfg=5.0, shift=5.0,
                         solver="unipc", temperature=1.0, chunk=2, scale=1)}
# made for text alone: it follows an image once sft.py has tuned it, --data=out/wan1.3b
PRESETS["wan1.3b"] = PRESETS["wan5b"] | dict(model="wan1.3b", height=480, width=832, frames=81, fps=16, shift=8.0)


def main():
    began = time.time()
    cfg = common.parse_config(Config, sys.argv[1:], PRESETS, positional="image")
    if not cfg.image:
        raise InputError("which image? For example: python sample.py data/drop.png")
    common.check_range(cfg, n=(1, 64), frames=(5, 1001), height=(16, 8192), width=(16, 8192), fps=(1, 240),
                       chunk=(0, 1000), steps=(1, 1000), cfg=(0, 30), temperature=(0, 2),
                       shift=(0.01, 100), stage=(0, 3), scale=(1, 16))
    common.check_frames(cfg)
    common.check_choice(cfg, solver=M.SOLVERS, model=("nano", *PUBLISHED))
    features = bool(cfg.weights)                   # of an outside text encoder; else the DiT reads bytes
    if not features and os.path.exists(path := cfg.ckpt or f"{cfg.data}/dit.safetensors"):
        features = common.read_config(path).get("text") == "features"
    if cfg.model != "nano" and not features:
        raise InputError(f"{cfg.model} needs --weights=FOLDER, with the published files of {PUBLISHED[cfg.model]}, "
                         "or --data=FOLDER, a run of sft.py on them")
    if cfg.text_emb and (cfg.prompt or cfg.negative):
        raise InputError("--text_emb holds the prompt and the negative one; expected it, or --prompt and --negative")
    if not features and (cfg.text_emb or cfg.negative):
        raise InputError("--text_emb and --negative are for Wan's DiTs; this one reads --prompt as it is")
    if cfg.weights and cfg.model not in PUBLISHED:
        raise InputError(f"--weights={cfg.weights}: published files go with --preset={' or --preset='.join(PUBLISHED)}")
    if cfg.weights and (cfg.ckpt or cfg.head or cfg.stage > 1):
        raise InputError("--weights are published files alone; expected neither --ckpt, --head nor --stage beside "
                         "them, or --data=FOLDER, a run of sft.py or dpo.py, in their place")
    if cfg.weights:                                # before gigabytes are read
        common.check_sides(cfg, ("height", "width"), SIDES[cfg.model])
    image, note = common.read_image(cfg.image, (cfg.height, cfg.width))
    out = cfg.out or f"out/{os.path.splitext(os.path.basename(cfg.image))[0]}.mp4"
    if os.path.splitext(out)[1].lower() not in common.VIDEO_EXTENSIONS:
        raise InputError(f"--out={out}: expected a name that ends in {', '.join(common.VIDEO_EXTENSIONS)}")
    if out.lower().endswith(".gif") and cfg.fps > 50:
        raise InputError(f"--fps={cfg.fps}: a GIF's frames last at least 20 ms; expected 50 or fewer, or an mp4")
    if out.lower().endswith(".webp") and (side := max(cfg.height * math.ceil(cfg.n / 4), cfg.width * min(cfg.n, 4))
                                          * cfg.scale) > 16383:
        raise InputError(f"--out={out}: {side} pixels are more than the 16383 of a WebP; expected a smaller --scale")
    if not cfg.out:
        common.make_dir("out")
    common.check_writable(out)                     # before the work, not after it
    prompt = cfg.prompt
    if not prompt:
        with Image.open(cfg.image) as picture:
            prompt = str(picture.info.get("Description", ""))
    prompt = prompt.encode(errors="replace").decode()                                # a terminal may hand on any bytes
    if note:
        print(note)

    device, _, _ = common.setup(cfg.device)
    has = lambda name: os.path.exists(f"{cfg.data}/{name}.safetensors") and not (cfg.ckpt or cfg.head)
    last = (3 if has("head3") else 2) if has("lora2") else "head" if has("head3") else 1            # what a run gave
    stage, null = cfg.stage or last, None
    if features and not cfg.text_emb:              # before the DiT takes the memory
        from data.embed_text import embed
        if not prompt.strip():
            print('no prompt: the video follows the image alone; --prompt="a ball falls" would say what should happen')
        texts = embed([prompt, cfg.negative], cfg.weights or cfg.data, device=device)
    elif features:
        texts, prompt = read_text(cfg.text_emb), cfg.text_emb
    models = load_published(cfg.weights, cfg.model, device) if cfg.weights else load_models(
        cfg.data, stage, cfg.ckpt, cfg.head, device)
    if models.encoder is not None and models.encoder.readout is not None and cfg.height != cfg.width:
        print(f"{cfg.width}x{cfg.height}: what this encoder foretells is of square pictures, and less exact in others")
    if features:
        if (width := texts[0].shape[1]) != models.dit.config["text_dim"]:
            raise InputError(f"{prompt}: its embeddings are {width} wide; expected {models.dit.config['text_dim']}")
        text, null = (x.to(device) for x in texts)
    elif len(prompt.encode()) > M.BYTES:
        print(f"the prompt is long: only its first {M.BYTES} bytes are read")
    common.check_sides(cfg, ("height", "width"), 2 * models.vae.stride)
    image, photo = image.to(device), None
    if models.encoder is not None:                 # it sees the picture as fine as it can, not as the video will be
        zoom = models.encoder.config["input_size"] / min(cfg.height, cfg.width)
        photo, _ = common.read_image(cfg.image, (round(cfg.height * zoom), round(cfg.width * zoom)))
        photo = photo.to(device)
    keys, loaded, videos = [cfg.seed + i for i in range(cfg.n)], time.time(), []
    parts = [keys] if small(cfg.height, cfg.width) else [[key] for key in keys]      # large ones take gigabytes each
    with tqdm(total=cfg.steps * len(parts), desc="sampling", unit="step") as bar:
        for part in parts:
            many = lambda x: None if x is None else x.expand(len(part), *x.shape)
            videos += generate(models, many(image), many(text) if features else [prompt] * len(part), part, cfg.frames,
                               cfg.steps, cfg.shift, cfg.cfg, cfg.solver, progress=lambda done, total: bar.update(1),
                               temperature=cfg.temperature, photo=many(photo), null=many(null), chunk=cfg.chunk)
    sampled = time.time()
    common.write_video(out, common.grid([common.to_uint8(v) for v in videos], min(cfg.n, 4)), cfg.fps, cfg.scale)
    print(f"prompt: {prompt or '(none)'}")
    print(f"wrote {out}: {cfg.frames} frames, {cfg.model if cfg.weights else f'stage {stage}'}, "
          f"seed {cfg.seed}{f' to {cfg.seed + cfg.n - 1}' if cfg.n > 1 else ''} "
          f"(loading {loaded - began:.1f} s, sampling {sampled - loaded:.1f} s, writing {time.time() - sampled:.1f} s)")


if __name__ == "__main__":
    common.run(main)
