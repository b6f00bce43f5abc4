"""
Physical tokens in somebody else's Wan pipeline: diffusers', with nothing in it changed (needs `pip install diffusers`).

    python data/in_your_pipeline.py                # nano's tokens and a small random DiT, to see that it listens

With a DiT that Stage I has taught to listen (sft.py --preset=wan5b, then data/to_diffusers.py --dit=...) the same call
of `listen`, on pipe.transformer, serves all of a WanImageToVideoPipeline with expand_timesteps=True, as Wan2.2-TI2V-5B
is: there every token has its own time, and the first frame's, 0, is the physical tokens' as well.
"""
import os
import sys

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import common
import encoder as E
import model as M


def listen(dit, tokens, grid, patches):
    """Let a WanTransformer3DModel attend to physical tokens (1 or B, P, D), type embedding added, that lie in a grid of
    (gh, gw) over a frame of (h, w) patches. -> hooks; remove() of each ends it."""
    P, head_dim = tokens.shape[1], dit.config.attention_head_dim
    place = M.rotary_table(head_dim, 0, *patches, 1, tuple(grid), tokens.device)[-P:]               # in frame 0
    place = [part.repeat_interleave(2, -1)[None] for part in (place.real, place.imag)]              # 2 x (1, P, 1, d)

    def join(block, args):
        x, text, time, rotary = args                                                   # (B, L, D), ..., (B, L, 6, D)
        x = torch.cat([x, tokens.to(x).expand(len(x), -1, -1)], 1) if block is dit.blocks[0] else x
        time = torch.cat([time, time[:, :P]], 1)                                       # the first frame's comes first
        return x, text, time, tuple(torch.cat([a, b.to(a)], 1) for a, b in zip(rotary, place))

    hooks = [block.register_forward_pre_hook(join) for block in dit.blocks]
    return [*hooks, dit.blocks[-1].register_forward_hook(lambda block, args, out: out[:, :-P])]


@torch.no_grad()
def main():
    try:
        from diffusers import WanTransformer3DModel
    except ImportError:
        raise common.InputError("this needs the package diffusers: pip install diffusers") from None
    torch.manual_seed(0)
    dit = WanTransformer3DModel(in_channels=32, out_channels=32, num_attention_heads=4, attention_head_dim=64,
                                ffn_dim=960, num_layers=2, text_dim=16)
    latent, text = torch.randn(1, 32, 7, 8, 8), torch.randn(1, 12, 16)                 # frame 0 is the picture's
    time = torch.full((1, 7 * 4 * 4), 900.0)                                           # of each patch of 2 x 2 pixels
    time[:, :4 * 4] = 0
    alone = dit(latent, time, text).sample

    encoder = E.load_phys_encoder(f"{HERE}/backbone.safetensors", f"{HERE}/head1.safetensors")
    kind = common.read_weights(f"{HERE}/dit.safetensors")[0]["phys_type"]              # marks what is a physical token
    image, _ = common.read_image(f"{HERE}/drop.png", 112)
    grid = encoder.head.grid(latent)                                                   # (4, 4), as the patches here
    listen(dit, encoder(image[None], grid) + kind, grid, patches=(4, 4))
    told = dit(latent, time, text).sample
    print(f"{grid[0]} x {grid[1]} physical tokens of drop.png change what the DiT says by "
          f"{((told - alone).norm() / alone.norm()).item():.1%}")


if __name__ == "__main__":
    common.run(main)
