"""
Write data/demo.gif, the README's moving picture: the scenes of data/examples.py, above the simulator's truth, below
what the shipped weights make of the first frame and its caption, noise seed 0.

    python data/demo.py
    python data/demo.py --rows=out/rows/0/base:1,out/rows/0/row3:1,out/rows/0/row8:2 --out=stages.gif    # a row of each
"""
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import common
import sample
import simdata
from examples import SCENES, clip


@dataclass
class Config:
    rows: str = f"{HERE}:3"     # FOLDER:STAGE,... of weights, a row each
    out: str = f"{HERE}/demo.gif"                  # .gif, .mp4 or .webp


def main():
    cfg = common.parse_config(Config, sys.argv[1:])
    rows = [row.rpartition(":")[::2] for row in cfg.rows.split(",")]                 # folders and stages
    if not all(folder and stage in ("1", "2", "3") for folder, stage in rows):
        raise common.InputError(f"--rows={cfg.rows}: expected FOLDER:STAGE,..., for example data:1,data:2")
    common.check_writable(cfg.out)
    parts = [clip(*scene, photo=simdata.PHOTO) for scene in SCENES.values()]
    truth = torch.cat([p["video"] for p in parts])
    films, photo = [*truth], torch.cat([p["photo"] for p in parts])
    for folder, stage in rows:
        models = sample.load_models(folder, int(stage))
        films += sample.generate(models, truth[:, :, 0], [p["caption"][0] for p in parts], [0] * len(parts),
                                 temperature=sample.DEFAULT_TEMPERATURE, photo=photo)
    frames = common.grid([common.to_uint8(v) for v in films], len(parts))
    frames = np.concatenate([frames, frames[-1:].repeat(12, 0)])                     # rest a moment before it restarts
    common.write_video(cfg.out, frames, fps=16, scale=2)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    common.run(main)
