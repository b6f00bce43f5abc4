"""
Published weights as a folder that every stage takes as --data: vae, dit and backbone, one file each, ours.

    python data/fetch.py --model=wan5b --backbone=depth_anything_v2_vits.pth        # downloads Wan and umT5
    python data/fetch.py --model=wan1.3b --weights=Wan2.1-T2V-1.3B --backbone=dinov2_vits14_pretrain.pth
    python data/fetch.py --model=nano --backbone=dinov2_vits14_pretrain.pth --input_size=112    # beside nano's VAE
    torchrun --nproc_per_node=8 sft.py --preset=wan5b --fsdp=True

--weights is a folder with the official files or diffusers' version of them; without it they come from the Hub, which
needs `pip install huggingface_hub`. The backbone is a DINOv2 or Depth Anything V2 file, official or transformers';
without one the folder gets nano's, which has only ever seen our world.
"""
import os
import shutil
import sys
from dataclasses import dataclass

import torch

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
import common
import encoder as E
import sample
from common import InputError

HUB = {"wan5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}


@dataclass
class Config:
    model: str = "wan5b"            # wan5b; wan1.3b, which Stage I teaches to start from an image; nano, without a DiT
    weights: str = ""               # a folder with the model's files; empty: they are downloaded
    backbone: str = ""              # a DINOv2 or Depth Anything V2 file or folder; empty: nano's
    encoder: str = ""               # which one it is, a name in encoder.CONFIGS; empty: the one its file is named after
    input_size: int = 0             # pixels to which the encoder resizes the image's shorter side; 0: as published
    out: str = ""                   # the folder to write; empty: out/<model>_data


def main():
    cfg = common.parse_config(Config, sys.argv[1:])
    if cfg.model not in ("nano", *HUB):
        raise InputError(f"--model={cfg.model}: expected one of nano, {', '.join(HUB)}")
    # the longest name that the file's begins with: dinov2_vits14_reg4_pretrain.pth is a dinov2_vits14_reg4
    stem = os.path.basename(cfg.backbone.rstrip("/"))
    name = cfg.encoder or max((k for k in E.CONFIGS if cfg.backbone and stem.startswith(k)), key=len, default="nano")
    if name not in E.CONFIGS or cfg.backbone and name == "nano":
        raise InputError(f"--backbone={cfg.backbone}: which one is it? Say --encoder=NAME, one of "
                         + ", ".join(k for k in E.CONFIGS if k != "nano"))
    patch = E.CONFIGS[name]["patch_size"]
    if cfg.input_size % patch:
        raise InputError(f"--input_size={cfg.input_size}: expected a multiple of {patch}, the backbone's patch")
    out, weights = cfg.out or f"out/{cfg.model}_data", cfg.weights
    common.make_dir(out)
    if not weights and cfg.model != "nano":
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
        except ImportError:
            raise InputError("downloading needs the package huggingface_hub: pip install huggingface_hub; or give "
                             "--weights=FOLDER") from None
        try:
            weights = snapshot_download(HUB[cfg.model])
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise InputError(f"{HUB[cfg.model]} cannot be downloaded: {str(error).splitlines()[0]}; give "
                             "--weights=FOLDER") from None

    if cfg.backbone:
        config = E.CONFIGS[name] | ({"input_size": cfg.input_size} if cfg.input_size else {})
        backbone = E.load_phys_encoder(cfg.backbone, config=config | {"out_dim": 8}).backbone
        common.save_weights(f"{out}/backbone.safetensors", backbone, config)
    else:
        with common.atomic(f"{out}/backbone.safetensors") as tmp:
            shutil.copy(f"{HERE}/data/backbone.safetensors", tmp)
    if cfg.model == "nano":
        with common.atomic(f"{out}/vae.safetensors") as tmp:
            shutil.copy(f"{HERE}/data/vae.safetensors", tmp)
        print(f"wrote vae and backbone ({name}) to {out}/")
        return
    models = sample.load_published(weights, cfg.model, dtype=torch.bfloat16)
    common.save_weights(f"{out}/vae.safetensors", models.vae, models.vae.config)
    common.save_weights(f"{out}/dit.safetensors", models.dit, models.dit.config)
    for part in sample.TEXT_ENCODER:               # captions are read by the umT5 that came with the model
        if os.path.exists(f"{weights}/{part}") and not os.path.exists(f"{out}/{part}"):
            os.symlink(os.path.abspath(f"{weights}/{part}"), f"{out}/{part}")
    print(f"wrote vae, dit and backbone ({name}) to {out}/")


if __name__ == "__main__":
    common.run(main)
