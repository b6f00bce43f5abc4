"""
Published weights as a folder that every stage takes as --data: vae, dit and backbone, one file each, ours.

    python data/fetch.py --model=wan5b --backbone=depth_anything_v2_vits            # downloads both, and umT5
    python data/fetch.py --model=wan1.3b --weights=Wan2.1-T2V-1.3B --backbone=dinov2_vits14_pretrain.pth
    python data/fetch.py --model=nano --backbone=dinov2_vits14_pretrain.pth --input_size=112    # beside nano's VAE
    torchrun --nproc_per_node=8 sft.py --preset=wan5b --fsdp=True

--weights is a folder with the official files or diffusers' version of them; without it the official ones come from the
Hub, which needs `pip install huggingface_hub`. The backbone is a DINOv2 or Depth Anything V2 file, official or
transformers', or a name in encoder.CONFIGS, which comes from the Hub (of Depth Anything V2 the small one is free for
all uses, base and large are not); without one the folder gets nano's, which has only ever seen our world.
"""
import os
import re
import sys
from dataclasses import dataclass

import torch

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
import common
import encoder as E
import sample
from common import InputError


@dataclass
class Config:
    model: str = "wan5b"            # wan5b; wan1.3b, which Stage I teaches to start from an image; nano, without a DiT
    weights: str = ""               # a folder with the model's files; empty: they are downloaded
    backbone: str = ""              # a DINOv2 or Depth Anything V2 file or folder, or its name; empty: nano's
    encoder: str = ""               # which one it is, a name in encoder.CONFIGS; empty: the one its file is named after
    input_size: int = 0             # pixels to which the encoder resizes the image's shorter side; 0: as published
    out: str = ""                   # the folder to write; empty: out/<model>_data


def download(repository, *patterns):
    """The files of a repository on the Hub that match -> the folder they are in; what is there already is kept.
    Raises InputError without huggingface_hub, the network or such a repository."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"downloading {repository} needs the package huggingface_hub: pip install huggingface_hub; or "
                         "give a folder that holds it") from None
    try:
        return snapshot_download(repository, allow_patterns=list(patterns))
    except (OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise InputError(f"{repository} cannot be downloaded: {why}; or give a folder that holds it") from None


def download_backbone(name):
    """A name in encoder.CONFIGS -> the path of its weights: Depth Anything's own, DINOv2's as transformers has them,
    for the Hub has no other."""
    size = dict(s="Small", b="Base", l="Large")[re.search("_vit(.)", name)[1]]
    if name.startswith("depth_anything"):
        repository, file = f"depth-anything/Depth-Anything-V2-{size}", f"{name}.pth"
    else:
        registers = "with-registers-" if name.endswith("_reg4") else ""
        repository, file = f"facebook/dinov2-{registers}{size.lower()}", "model.safetensors"
    return f"{download(repository, file)}/{file}"


def main():
    cfg = common.parse_config(Config, sys.argv[1:])
    if cfg.model not in ("nano", *sample.PUBLISHED):
        raise InputError(f"--model={cfg.model}: expected one of nano, {', '.join(sample.PUBLISHED)}")
    # the longest name that the file's begins with: dinov2_vits14_reg4_pretrain.pth is a dinov2_vits14_reg4
    stem = os.path.basename(cfg.backbone.rstrip("/"))
    name = cfg.encoder or max((k for k in E.CONFIGS if cfg.backbone and stem.startswith(k)), key=len, default="nano")
    if name not in E.CONFIGS or cfg.backbone and name.startswith("nano"):
        raise InputError(f"--backbone={cfg.backbone}: which one is it? Say --encoder=NAME, one of "
                         + ", ".join(k for k in E.CONFIGS if not k.startswith("nano")))
    if not cfg.backbone and (cfg.encoder or cfg.input_size):
        raise InputError("--encoder and --input_size are about --backbone=NAME or FILE; expected it beside them")
    patch = E.CONFIGS[name]["patch_size"]
    if cfg.input_size % patch:
        raise InputError(f"--input_size={cfg.input_size}: expected a multiple of {patch}, the backbone's patch")
    if cfg.weights and not os.path.exists(cfg.weights):
        raise InputError(f"--weights={cfg.weights}: no such folder; expected one with the model's files")
    out, weights = cfg.out or f"out/{cfg.model}_data", cfg.weights
    common.make_dir(out)
    if cfg.backbone:
        is_name = cfg.backbone in E.CONFIGS and not os.path.exists(cfg.backbone)
        path = download_backbone(name) if is_name else cfg.backbone
        config = E.CONFIGS[name] | ({"input_size": cfg.input_size} if cfg.input_size else {})
        encoder = E.load_phys_encoder(path, config=config | {"out_dim": 8})
        common.save_weights(f"{out}/backbone.safetensors", encoder.backbone, config)
        if "depth_anything" in name:               # what sft.py --head_from may start from
            try:
                encoder.start_head(path)
                common.save_weights(f"{out}/depth_head.safetensors", encoder.trunk_state(), config)
            except InputError as error:
                print(f"without a start for the head: {error}")
    else:
        sample.copy_weights(f"{HERE}/data", out, "backbone")
    if cfg.model == "nano":
        sample.copy_weights(f"{HERE}/data", out, "vae")
        print(f"wrote vae and backbone ({name}) to {out}/")
        return
    if not weights:                                # of the official files those that are read
        weights = download(f"Wan-AI/{sample.PUBLISHED[cfg.model]}", "config.json", "diffusion_pytorch_model*",
                           "Wan2.*_VAE.pth", sample.UMT5, "google/umt5-xxl/*")
    models = sample.load_published(weights, cfg.model, dtype=torch.bfloat16)
    common.save_weights(f"{out}/vae.safetensors", models.vae, models.vae.config)
    common.save_weights(f"{out}/dit.safetensors", models.dit, models.dit.config)
    sample.copy_weights(weights, out)                # captions are read by the umT5 that came with the model
    print(f"wrote vae, dit and backbone ({name}) to {out}/")


if __name__ == "__main__":
    common.run(main)
