"""
What was trained here, for people who use diffusers (needs `pip install diffusers`; for a LoRA neither side needs more
than its file):

    python data/to_diffusers.py --lora=out/dpo_wan5b/lora2.safetensors --out=lora.safetensors  # pipe.load_lora_weights
    python data/to_diffusers.py --dit=out/wan5b/dit.safetensors --out=transformer         # WanTransformer3DModel
    python data/to_diffusers.py --vae=out/wan5b/vae.safetensors --out=vae                 # AutoencoderKLWan
    python data/to_diffusers.py --data=out/wan5b --out=wan5b             # WanImageToVideoPipeline.from_pretrained(...)

Physical tokens do not travel: diffusers' DiT has no place for them. A DiT that was trained with them loses their type
embedding, and a LoRA acts as it does in a clip without them (both are said). A pipeline's folder gets links to the text
encoder and the tokenizer in --data, if they are diffusers'; Wan's own it could not read.
"""
import json
import os
import sys
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import model as M
import sample
import vae as V
from common import InputError


@dataclass
class Config:
    dit: str = ""                   # a DiT of ours that reads text features
    lora: str = ""                  # a LoRA of dpo.py
    vae: str = ""                   # a video VAE of ours
    data: str = ""                  # a folder with both, dit.safetensors and vae.safetensors, for a whole pipeline
    out: str = ""                   # a folder for data, dit and vae, a .safetensors file for lora


def save(theirs, ours, table, out):
    """Fill a diffusers model, built on the meta device, with our tensors; `table`: its names -> ours. Saves it."""
    names = {k: common.renamed(k, table) for k in theirs.state_dict()}
    lacking = [k for k in names.values() if k not in ours]
    if lacking:
        raise InputError(f"diffusers' {type(theirs).__name__} wants what this file lacks: {', '.join(lacking[:3])}")
    theirs.load_state_dict({k: ours[name] for k, name in names.items()}, assign=True)
    theirs.save_pretrained(out)
    return sorted(ours.keys() - set(names.values()))


def dit_to_diffusers(path, out, lora=""):
    """A DiT file, and a LoRA file that is added to it -> a folder for WanTransformer3DModel.from_pretrained; -> names
    of what had to stay behind."""
    from diffusers import WanTransformer3DModel
    tensors, c = common.read_weights(path)
    if "num_layers" not in c or c["text"] != "features":
        raise InputError(f"{path}: expected a DiT of ours that reads text features; nano's byte encoder is not in Wan")
    low, said = common.read_weights(lora) if lora else ({}, dict(rank=1))
    names = [k.removesuffix("lora_A") for k in low if k.endswith("lora_A")]
    if "rank" not in said or not {f"{name}weight" for name in names} <= tensors.keys():
        raise InputError(f"{lora} is not a LoRA of {path}; expected the lora2.safetensors of a run of dpo.py on it")
    for name in names:
        weight = tensors[f"{name}weight"]
        step = said["alpha"] / said["rank"] * low[f"{name}lora_B"].float() @ low[f"{name}lora_A"].float()
        if step.shape != weight.shape:
            raise InputError(f"{lora} is not a LoRA of {path}: {name}weight is {tuple(weight.shape)}, its step "
                             f"{tuple(step.shape)}")
        tensors[f"{name}weight"] = (weight.float() + step).to(weight.dtype)
    if lora:
        print(f"with {lora} added to it")
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=c["num_heads"], attention_head_dim=c["dim"] // c["num_heads"],
            in_channels=c["in_dim"], out_channels=c["out_dim"], text_dim=c["text_dim"], freq_dim=c["freq_dim"],
            ffn_dim=c["ffn_dim"], num_layers=c["num_layers"], cross_attn_norm=True, qk_norm="rms_norm_across_heads")
    return save(theirs, tensors, M.VideoDiT.RENAMES, out)


def vae_to_diffusers(path, out):
    """A VAE file -> a folder for AutoencoderKLWan.from_pretrained."""
    from diffusers import AutoencoderKLWan
    tensors, c = common.read_weights(path)
    if c.get("decoder_blocks") != c.get("blocks", 0) + 1:
        raise InputError(f"{path}: diffusers' decoder has one residual block a stage more than its encoder; this VAE "
                         "does not")
    with torch.device("meta"):
        ours = V.VideoVAE(c)
        theirs = AutoencoderKLWan(
            base_dim=c["dim"], decoder_base_dim=c["decoder_dim"], z_dim=c["z_dim"], dim_mult=c["mult"],
            num_res_blocks=c["blocks"], temperal_downsample=c["temporal"], is_residual=c["residual"],
            in_channels=3 * c["patch"]**2, out_channels=3 * c["patch"]**2,
            patch_size=c["patch"] if c["patch"] > 1 else None, scale_factor_spatial=ours.stride,
            scale_factor_temporal=ours.stride_t, latents_mean=c["latent_mean"], latents_std=c["latent_std"])
    return save(theirs, tensors, ours.RENAMES, out)


def lora_to_diffusers(path, out):
    """A LoRA file -> one that pipe.load_lora_weights reads; alpha / rank goes into B."""
    tensors, c = common.read_weights(path)
    if "rank" not in c:
        raise InputError(f"{path} is not a LoRA of ours: its metadata has no rank")
    names = (("self_attn", "attn1"), ("cross_attn", "attn2"), (r"\.([qkv])\.", r".to_\1."), (r"\.o\.", ".to_out.0."),
             (r"ffn\.0", "ffn.net.0.proj"), (r"ffn\.2", "ffn.net.2"), (r"lora_([AB])$", r"lora_\1.weight"))
    scale = c["alpha"] / c["rank"]
    common.save_weights(out, {f"transformer.{common.renamed(k, names)}": scale * v if k.endswith("B") else v
                              for k, v in tensors.items()}, c)
    return ["physical tokens, if it was trained with them"]


def pipeline_to_diffusers(data, out):
    """A folder of DiT, Stage II's LoRA if there is one, and VAE -> one for WanImageToVideoPipeline.from_pretrained; ->
    what had to stay behind."""
    import diffusers
    lora = f"{data}/lora2.safetensors"
    behind = dit_to_diffusers(f"{data}/dit.safetensors", f"{out}/transformer", lora if os.path.exists(lora) else "")
    behind += vae_to_diffusers(f"{data}/vae.safetensors", f"{out}/vae")
    with common.open_weights(f"{data}/dit.safetensors") as (_, config):
        preset = next((k for k in sample.PUBLISHED if M.CONFIGS[k]["in_dim"] == config["in_dim"]), "wan5b")
    diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True,
        flow_shift=sample.PRESETS[preset]["shift"]).save_pretrained(f"{out}/scheduler")
    for part in ("text_encoder", "tokenizer"):
        sample.link(f"{data}/{part}", f"{out}/{part}")
    index = dict(
        _class_name="WanImageToVideoPipeline", _diffusers_version=diffusers.__version__, expand_timesteps=True,
        transformer=["diffusers", "WanTransformer3DModel"], vae=["diffusers", "AutoencoderKLWan"],
        scheduler=["diffusers", "UniPCMultistepScheduler"], text_encoder=["transformers", "UMT5EncoderModel"],
        tokenizer=["transformers", "PreTrainedTokenizerFast"])                           # reads any tokenizer.json
    with common.atomic(f"{out}/model_index.json") as tmp, open(tmp, "w") as f:
        json.dump(index, f, indent=1)
    if not os.path.exists(f"{out}/text_encoder"):
        print("text_encoder/ and tokenizer/ are not there: link those of diffusers' version of the model, or give "
              "from_pretrained text_encoder=None, tokenizer=None and the pipeline prompt_embeds")
    return behind


def main():
    cfg = common.parse_config(Config, sys.argv[1:])
    given = [k for k in ("dit", "lora", "vae", "data") if getattr(cfg, k)]
    if len(given) != 1 or not cfg.out:
        raise InputError("expected one of --dit=FILE, --lora=FILE, --vae=FILE, --data=FOLDER, and --out")
    common.check_writable(f"{cfg.out.rstrip('/')}.part" if given != ["lora"] else cfg.out)
    try:
        convert = dict(dit=dit_to_diffusers, lora=lora_to_diffusers, vae=vae_to_diffusers,
                       data=pipeline_to_diffusers)[given[0]]
        behind = convert(getattr(cfg, given[0]), cfg.out)
    except ImportError:
        raise InputError("this needs the package diffusers: pip install diffusers") from None
    print(f"wrote {cfg.out}")
    if behind:
        print("what diffusers has no place for stayed behind: " + ", ".join(behind))


if __name__ == "__main__":
    common.run(main)
