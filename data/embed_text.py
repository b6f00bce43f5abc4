"""
A prompt's embeddings for Wan: umT5-XXL's features, computed once and kept, so that sampling and training need no text
encoder. Needs `pip install transformers`; the encoder is the folder text_encoder/ (and tokenizer/) of diffusers'
version of any Wan model, or its name on the Hub.

    python data/embed_text.py --prompt="a red ball falls onto a wooden floor" --out=prompt.safetensors
    python data/embed_text.py --encoder=Wan2.2-TI2V-5B-Diffusers --prompt="..." --negative="blurry, static"

The file holds text and negative, (length, 4096) each, without padding: the DiT pads with zeros, as Wan was trained.
"""
import os
import sys
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
from common import InputError


HUB = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


@dataclass
class Config:
    prompt: str = ""                # what shall happen
    negative: str = ""              # what shall not
    encoder: str = HUB              # a folder with text_encoder/ and tokenizer/, or a name on the Hub
    out: str = "prompt.safetensors"  # the file to write
    length: int = 512               # tokens at most; longer prompts are cut
    device: str = "auto"            # auto, cuda, mps or cpu


@torch.no_grad()
def embed(prompts, encoder, length=512, device="cpu"):
    """Strings -> a list of features (L_i, width), float32 on the CPU, L_i <= length with the end token.

    Raises InputError without transformers, or without an encoder and its tokenizer at that place."""
    try:
        from transformers import AutoTokenizer, UMT5EncoderModel
    except ImportError:
        raise InputError("a prompt for Wan needs umT5, and that the package transformers: pip install transformers; or "
                         "--text_emb=FILE, embeddings that data/embed_text.py made elsewhere") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, subfolder="tokenizer")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = UMT5EncoderModel.from_pretrained(encoder, subfolder="text_encoder", torch_dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"--encoder={encoder}: no umT5 in text_encoder/ and tokenizer/ there: "
                         f"{str(error).splitlines()[0]}") from None
    out = []
    for prompt in prompts:
        tokens = tokenizer(" ".join(prompt.split()), truncation=True, max_length=length, return_tensors="pt").to(device)
        out.append(model(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state[0].float().cpu())
    return out


def main():
    cfg = common.parse_config(Config, sys.argv[1:])
    common.check_range(cfg, length=(1, 512))
    if not cfg.prompt:
        raise InputError('--prompt is missing; for example --prompt="a red ball falls"')
    common.check_writable(cfg.out)
    device, _, _ = common.setup(cfg.device)
    text, negative = embed([cfg.prompt, cfg.negative], cfg.encoder, cfg.length, device)
    common.save_weights(cfg.out, dict(text=text, negative=negative), dict(prompt=cfg.prompt, negative=cfg.negative))
    print(f"wrote {cfg.out}: text {tuple(text.shape)}, negative {tuple(negative.shape)}")


if __name__ == "__main__":
    common.run(main)
