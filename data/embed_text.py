"""
A prompt's embeddings for Wan: umT5-XXL's features, computed once and kept, so that sampling and training need no text
encoder. Needs `pip install transformers`; the encoder is the folder text_encoder/ (and tokenizer/) of diffusers'
version of any Wan model, or its name on the Hub, or Wan's own models_t5_umt5-xxl-enc-bf16.pth (and google/umt5-xxl/).

    python data/embed_text.py --prompt="a red ball falls onto a wooden floor" --out=prompt.safetensors
    python data/embed_text.py --encoder=Wan2.2-TI2V-5B-Diffusers --prompt="..." --negative="blurry, static"
    python data/embed_text.py --encoder=Wan2.2-TI2V-5B --prompt="..."                    # the official folder
    python data/embed_text.py --captions=CLIPS/clips.jsonl --out=captions.safetensors     # to train with --text_emb

The first two files hold text and negative, (length, 4096) each, without padding: the DiT pads with zeros, as Wan was
trained. The last holds one such tensor a caption, and the captions; more are added to a file that is there.
"""
import os
import re
import sys
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
from common import InputError
from sample import UMT5


HUB = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


@dataclass
class Config:
    prompt: str = ""                # what shall happen
    captions: str = ""              # or many: a clips.jsonl (see simdata.py), or a text file with a caption a line
    negative: str = ""              # what shall not
    encoder: str = ""               # a folder of diffusers' or of Wan's own, or a name on the Hub; empty: HUB
    out: str = "prompt.safetensors"  # the file to write
    length: int = 512               # tokens at most; longer prompts are cut
    device: str = "auto"            # auto, cuda, mps or cpu


def official(path, dtype, device):
    """Wan's own umT5 file -> transformers' UMT5EncoderModel. How large it is, the tensors say.
    Raises InputError if it is another kind of file."""
    from transformers import UMT5Config, UMT5EncoderModel
    with common.open_weights(path) as (found, _):
        shape = {k: s for k, (s, _) in found.items()}
    layers = sum(k.endswith(".attn.q.weight") for k in shape)
    try:
        (vocab, width), (buckets, heads), (inner, _), (ffn, _) = (shape[f"{k}.weight"] for k in (
            "token_embedding", "blocks.0.pos_embedding.embedding", "blocks.0.attn.q", "blocks.0.ffn.fc1"))
    except (KeyError, ValueError):
        raise InputError(f"{path} is no umT5 as Wan keeps it: it lacks blocks.0.pos_embedding and others") from None
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(
            vocab_size=vocab, d_model=width, d_kv=inner // heads, d_ff=ffn, num_layers=layers, num_heads=heads,
            relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu"))

    model.RENAMES = [
        (r"^token_embedding", "shared"), (r"^norm", "encoder.final_layer_norm"),
        (r"^blocks\.(\d+)\.(attn|pos|norm1)", r"encoder.block.\1.layer.0.\2"),
        (r"^blocks\.(\d+)\.(ffn|norm2)", r"encoder.block.\1.layer.1.\2"), (r"norm[12]", "layer_norm"),
        (r"attn", "SelfAttention"), (r"pos_embedding\.embedding", "SelfAttention.relative_attention_bias"),
        (r"ffn\.gate\.0", "DenseReluDense.wi_0"), (r"ffn\.fc1", "DenseReluDense.wi_1"),
        (r"ffn\.fc2", "DenseReluDense.wo")]
    model.encoder.embed_tokens = None              # the same tensor as shared, and large
    common.load_weights(model, path, dtype, device)
    model.encoder.embed_tokens = model.shared
    return model


@torch.no_grad()
def embed(prompts, encoder, length=512, device="cpu"):
    """Strings -> a list of features (L_i, width), float32 on the CPU, L_i <= length with the end token.

    encoder: a folder with text_encoder/ and tokenizer/, one with Wan's own file and google/umt5-xxl/, or a name on the
    Hub; "" or a folder of weights without any is HUB.
    Raises InputError without transformers, or without an encoder and its tokenizer at that place."""
    try:
        from transformers import AutoTokenizer, UMT5EncoderModel
    except ImportError:
        raise InputError("a prompt for Wan needs umT5, and that the package transformers: pip install transformers; or "
                         "--text_emb=FILE, embeddings that data/embed_text.py made elsewhere") from None
    own = os.path.exists(f"{encoder}/{UMT5}")
    bare = os.path.isdir(encoder) and not own and not os.path.isdir(f"{encoder}/text_encoder")
    encoder = HUB if bare or not encoder else encoder
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        if own:
            tokenizer = AutoTokenizer.from_pretrained(f"{encoder}/google/umt5-xxl")
            model = official(f"{encoder}/{UMT5}", dtype, device)
        else:
            tokenizer = AutoTokenizer.from_pretrained(encoder, subfolder="tokenizer")
            model = UMT5EncoderModel.from_pretrained(encoder, subfolder="text_encoder", torch_dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        where = f"{UMT5} and google/umt5-xxl/" if own else "text_encoder/ and tokenizer/"
        raise InputError(f"--encoder={encoder}: no umT5 in {where} there: {str(error).splitlines()[0]}") from None
    model.eval()
    out = []
    for prompt in prompts:
        tokens = tokenizer(" ".join(prompt.split()), truncation=True, max_length=length, return_tensors="pt").to(device)
        out.append(model(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state[0].float().cpu())
    return out


def read_captions(path, width):
    """A file of captions' features -> {caption: (L, width)}. Raises InputError if it is another kind of file."""
    tensors, config = common.read_weights(path)
    known = {caption: tensors.get(f"caption{i}") for i, caption in enumerate(config.get("captions", []))}
    if not known or any(v is None or v.dim() != 2 or v.shape[1] != width for v in known.values()):
        raise InputError(f"{path} holds no features of captions, (length, {width}) each; make it with python "
                         "data/embed_text.py --captions=clips.jsonl")
    return known


def write_captions(path, captions, encoder, device, known={}, length=512):
    """Embed captions and write them to the file, after those that are `known`. -> {caption: (L, width) bf16}."""
    found = dict(zip(captions, (x.bfloat16() for x in embed(captions, encoder, length, device))))
    both = known | found
    common.save_weights(path, {f"caption{i}": v for i, v in enumerate(both.values())}, dict(captions=list(both)))
    return found


def main():
    cfg = common.parse_config(Config, sys.argv[1:])
    common.check_range(cfg, length=(1, 512))
    if bool(cfg.prompt) == bool(cfg.captions):
        raise InputError('expected a prompt or a file of captions; for example --prompt="a red ball falls"')
    common.check_writable(cfg.out)
    device, _, _ = common.setup(cfg.device)
    if cfg.captions:
        if not os.path.isfile(cfg.captions):
            raise InputError(f"--captions={cfg.captions}: no such file; expected a clips.jsonl or a text file")
        if cfg.captions.endswith(".jsonl"):
            captions = {str(line.get("caption", "")) for line in common.read_lines(cfg.captions)}
        else:
            with open(cfg.captions, encoding="utf-8", errors="replace") as f:
                captions = {line.strip() for line in f}
        known = read_captions(cfg.out, 4096) if os.path.exists(cfg.out) else {}
        captions = sorted({"", *captions} - known.keys())
        if captions:
            write_captions(cfg.out, captions, cfg.encoder, device, known, cfg.length)
        print(f"wrote {cfg.out}: {len(known) + len(captions)} captions")
        return
    text, negative = embed([cfg.prompt, cfg.negative], cfg.encoder, cfg.length, device)
    common.save_weights(cfg.out, dict(text=text, negative=negative), dict(prompt=cfg.prompt, negative=cfg.negative))
    print(f"wrote {cfg.out}: text {tuple(text.shape)}, negative {tuple(negative.shape)}")


if __name__ == "__main__":
    common.run(main)
