"""
Speed, ours beside a peer's in the same run: medians of several repetitions, the ratio, and a check that both compute
the same thing.

    python bench.py                       # all that needs neither a compiler, PyBullet nor many minutes
    python bench.py --only=dit --repeat=9 # and dit_compiled: the same under torch.compile
    python bench.py --only=memory         # of training the published sizes, counted without owning that much
    python bench.py --only=peers          # the world beside PyBullet with TinyRenderer, and MuJoCo
    python bench.py --only=pybullet       # the simulator's outcomes beside PyBullet's, no times; five minutes
    python bench.py --only=compiled       # whether torch.compile pays in the world
    python bench.py --only=profile        # where the world's time goes
    python bench.py --only=wan --profile  # the published sizes with random weights, on a GPU (or wan1.3b, wan5b)
    python bench.py --only=solvers        # the world's contact solver beside small-step XPBD; eight minutes

The peers are diffusers' classes with the same random weights; without diffusers only our times are shown, and without
PyBullet and MuJoCo (pip install pybullet mujoco) nothing is compared with them.
"""
import contextlib
import math
import re
import statistics
import sys
import time
import weakref
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile as profiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import common
import dpo
import encoder as E
import model as M
import sample
import sft
import simdata
import vae as V


@dataclass
class Config:
    only: str = "all"               # a part; all: those that need neither a compiler, PyBullet nor many minutes
    repeat: int = 5                 # timed repetitions, after one warm-up
    batch: int = 32                 # clips
    data: str = "data"              # folder with the shipped weights
    profile: bool = False           # of wan: which kernels take the time
    device: str = "auto"            # auto, cuda, mps or cpu


def once(f, device):
    """-> wall time of f() in seconds, and what it returns."""
    begin = time.perf_counter()
    value = f()
    if device.type != "cpu":
        (torch.cuda if device.type == "cuda" else torch.mps).synchronize()
    return time.perf_counter() - begin, value


def median(f, repeat, device):
    """Median wall time of f() in seconds after one warm-up call, and the value that f returned last."""
    once(f, device)
    results = [once(f, device) for _ in range(repeat)]
    return statistics.median(t for t, _ in results), results[-1][1]


def versus(name, ours, peer, cfg, device, tolerance=1e-4):
    """Print ours and the peer's time, the ratio, and the largest difference of what they return."""
    once(ours, device), once(peer, device)         # then in turn, for the machine may be busy for a while
    times = [[once(f, device) for f in (ours, peer)] for _ in range(cfg.repeat)]
    (a, x), (b, y) = ((statistics.median(t for t, _ in runs), runs[-1][1]) for runs in zip(*times))
    difference = (x - y).abs().max().item()
    assert difference <= tolerance, f"{name}: results differ by {difference}"
    print(f"{name}: ours {a * 1e3:.1f} ms, peer {b * 1e3:.1f} ms, {b / a:.2f}x as fast, "
          f"max difference {difference:.1e}")


def world(cfg, device):
    for name in simdata.SCENARIOS:                 # how right it is, before how fast
        scene, _ = simdata.make_scene(name, 1000, 0, device=device)
        t, path = median(lambda: simdata.simulate(scene, 25, 16), 1, device)
        total = simdata.energy(scene, path)
        gain = ((total.amax(1) - total[:, 0]) / total[:, 0]).max().item()
        reach = (simdata.quat_to_matrix(path["rotation"])[..., 2, :].abs() * scene["half_extents"][:, None]).sum(-1)
        low = (path["position"][..., 2] - reach).masked_fill(~(scene["dynamic"] & (scene["shape"] == 1))[:, None], 1)
        print(f"{name}, 1,000 scenes x 25 frames: {1000 / t:.0f} scenes/s, worst energy gain {100 * gain:.2f} %, "
              f"deepest corner of a box {-1e3 * low.min():.1f} mm, at the end {-1e3 * low[:, -1].min():.1f} mm")
    for B in (128, 1024):                          # small tensors: the more at once, the better
        scene, _ = simdata.make_scene("drop", B, 0, device=device)
        t, _ = median(lambda: simdata.simulate(scene, 25, 16), 3, device)
        print(f"simulate {B} scenes x 25 frames, 240 Hz: {B / t:.0f} scenes/s")
    t, _ = median(lambda: simdata.make_batch("drop", 128, 0, device=device, truth=False), 3, device)
    print(f"simulate and film, 64 px, anti-aliased: {128 / t:.0f} clips/s")
    t, _ = median(lambda: simdata.make_batch("drop", 128, 0, device=device), 3, device)
    print(f"the same with masks, depth and flow: {128 / t:.0f} clips/s")


def bullet(scene, frames, fps, rate, early=True, film=0):
    """What PyBullet makes of a scene of simulate()'s at `rate` Hz, one clip after the other, without damping, every
    speed bouncing -> dict of position (B, T, N, 3), rotation (B, T, N, 4) and, if film is a number of pixels, what
    its TinyRenderer sees, with shadows: mask (B, T, film, film).

    early: as it comes, it brakes what is within 2 cm so that it just touches, which takes from the bounce, and pushes
    apart what sank in, which adds to it. False: contacts happen when they do, and what sank in stays there."""
    import pybullet as p
    steps, position, rotation, masks = round(rate / fps), [], [], []
    p.connect(p.DIRECT)
    if film:
        forward, focal = scene["camera"]["world_to_camera"][:, 2, :3], scene["camera"]["intrinsics"][:, 0, 0]
        half = (scene["camera"]["intrinsics"][:, 0, 2] / focal).atan() * 180 / math.pi
        views = [(p.computeViewMatrix(eye, target, (0, 0, 1)), p.computeProjectionMatrixFOV(2 * angle, 1, 0.1, 20))
                 for eye, target, angle in zip(scene["eye"].tolist(), (scene["eye"] + forward).tolist(), half.tolist())]
    for i in range(len(scene["shape"])):
        p.resetSimulation()
        p.setGravity(*scene["gravity"][i].tolist())
        p.setPhysicsEngineParameter(fixedTimeStep=1 / (fps * steps), restitutionVelocityThreshold=0,
                                    numSolverIterations=50, **({} if early else dict(contactERP=0)))
        only = {} if early else dict(contactProcessingThreshold=0)
        p.changeDynamics(p.createMultiBody(0, p.createCollisionShape(p.GEOM_PLANE)), -1, restitution=1,
                         lateralFriction=1, **only)                                  # two bodies' are multiplied
        inertia = simdata.principal_inertia(scene["shape"][i], scene["half_extents"][i], scene["mass"][i])
        ids = {}
        for k in scene["alive"][i].nonzero()[:, 0].tolist():
            h, (w, x, y, z) = scene["half_extents"][i, k].tolist(), scene["rotation"][i, k].tolist()
            kind, size = [(p.GEOM_SPHERE, dict(radius=h[0])), (p.GEOM_BOX, dict(halfExtents=h)),
                          (p.GEOM_CYLINDER, dict(radius=h[0], height=2 * h[2])),
                          (p.GEOM_CAPSULE, dict(radius=h[0], height=2 * (h[2] - h[0])))][scene["shape"][i, k]]
            moves = scene["dynamic"][i, k].item()
            ids[k] = p.createMultiBody(scene["mass"][i, k].item() * moves, p.createCollisionShape(kind, **size),
                                       basePosition=scene["position"][i, k].tolist(), baseOrientation=(x, y, z, w))
            p.changeDynamics(ids[k], -1, restitution=scene["restitution"][i, k].item(), linearDamping=0,
                             lateralFriction=scene["friction"][i, k].item(), angularDamping=0,
                             **(dict(localInertiaDiagonal=inertia[k].tolist()) if moves else {}), **only)
        at, turned = [], []
        for t in range(frames):
            for _ in range(steps if t else 0):
                p.stepSimulation()
            at.append([[0.0] * 3] * scene["shape"].shape[1])
            turned.append([[0.0] * 4] * scene["shape"].shape[1])
            for k, body in ids.items():
                at[-1][k], (x, y, z, w) = p.getBasePositionAndOrientation(body)
                turned[-1][k] = w, x, y, z
            if film:
                *_, seen = p.getCameraImage(film, film, *views[i], shadow=1, renderer=p.ER_TINY_RENDERER)
                masks.append(sum((k + 1) * (np.asarray(seen) == body) for k, body in ids.items()))
        position.append(torch.tensor(at))
        rotation.append(torch.tensor(turned))
    p.disconnect()
    seen = dict(mask=torch.from_numpy(np.stack(masks)).view(len(position), frames, film, film)) if film else {}
    return dict(position=torch.stack(position), rotation=torch.stack(rotation)) | seen


def outcome(name, scene, path):
    """What one looks at in a scenario, a number or nan per body, (B, N) each."""
    z, moves = path["position"][..., 2], scene["dynamic"] & scene["alive"]
    gone = (path["position"][:, -1, :, :2] - path["position"][:, 0, :, :2]).norm(dim=-1)
    seen = {"moved sideways, m": gone, "height at the end, m": z[:, -1]}
    if name == "drop":
        low = (z[:, 1:] > z[:, :-1] + 1e-4).int().argmax(1, keepdim=True)            # the last frame before it rises
        after = torch.arange(z.shape[1], device=z.device)[None, :, None] >= low
        rise = z.masked_fill(~after, -9).amax(1) - z.gather(1, low)[:, 0]
        for shape, word in ((simdata.SPHERE, "balls"), (simdata.BOX, "boxes")):
            seen[f"bounce of {word}, m"] = rise.masked_fill(~scene["falls"] | (scene["shape"] != shape), torch.nan)
    if name in ("support", "dominoes"):            # the share that is not upright, or not where it was put
        up = simdata.quat_to_matrix(path["rotation"][:, -1])[..., 2, 2]
        seen["toppled"] = ((up.abs() < 0.7) | (z[:, -1] < z[:, 0] - 0.05)).float()
    return {k: v.masked_fill(~moves, torch.nan) for k, v in seen.items()}


def pybullet(cfg, device):
    """The same scenes in PyBullet, as it comes and as right as it can be set: until the first contact body by body,
    after it in distribution, for contacts are chaotic. Intervals of the ratios: 95 %, bootstrap over scenes."""
    try:
        import pybullet as _
    except ImportError:
        print("pybullet is not installed: pip install pybullet")
        return
    fps, frames = 48, 97                           # two seconds
    peers = {"PyBullet at 240 Hz": (240, True), "PyBullet at 1920 Hz, no early contacts": (1920, False)}
    one, two = torch.ones(2, 1), torch.tensor([[simdata.SPHERE], [simdata.BOX]])
    place = [torch.tensor(x).expand(2, 1, -1) for x in ([0.15] * 3, [0.0, 0.0, 1.15], [1.0, 0.0, 0.0, 0.0])]
    scene = simdata.bodies(two, place[0], 0 * two, *place[1:], one > 0, one, torch.ones(2, 1, 2), one > 0)
    scene |= dict(restitution=0.75 * one, gravity=torch.tensor([[0.0, 0.0, -simdata.EARTH]] * 2))
    for name, path in [("ours", simdata.simulate(scene, frames, fps)),
                       *((k, bullet(scene, frames, fps, *how)) for k, how in peers.items())]:
        top = path["position"][:, 22:, 0, 2].amax(1) - 0.15                          # they land after 0.4515 s
        print(f"a ball and a flat box fall 1 m, restitution 0.75: {name} {top[0]:.4f} and {top[1]:.4f} m, "
              f"closed form {0.75**2:.4f}")
    for name in simdata.SCENARIOS:
        scene, _ = simdata.make_scene(name, 200, 0, "val")
        path = simdata.simulate(scene, frames, fps)
        size, moves = 2 * scene["half_extents"].amax(-1), scene["dynamic"] & scene["alive"]
        touched = (path["impulse"].sum(-1) > 0).cumsum(1) > 0                                       # (B, T, N)
        for peer, how in peers.items():
            theirs = bullet(scene, frames, fps, *how)
            off = (theirs["position"] - path["position"]).norm(dim=-1) / size[:, None]
            free = off[~touched & moves[:, None] & (torch.arange(frames)[:, None] > 0)]
            print(f"{name}, {peer}, n = {len(size)}:", "until the first contact at most "
                  f"{100 * free.max():.2f} % of the size apart" if len(free) else "all touch from the start")
            ours, theirs = outcome(name, scene, path), outcome(name, scene, theirs)
            for k in ours:
                a, b = ours[k], theirs[k]
                draws = torch.randint(len(a), (1000, len(a)), generator=common.generator("bullet"))
                ratio = (a[draws].flatten(1).nanmean(1) / b[draws].flatten(1).nanmean(1)).quantile(
                    torch.tensor([0.025, 0.975]))
                print(f"    {k}: ours {a.nanmean():.4f}, PyBullet {b.nanmean():.4f}, "
                      f"ratio {a.nanmean() / b.nanmean():.3f} [{ratio[0]:.3f}, {ratio[1]:.3f}], "
                      f"body by body {(a - b).abs().nanmean():.4f} apart")


def mixed(draw, unseen):
    """The scene whose speed is compared: three bodies of any shapes, which fall side by side."""
    material, hue, tone = simdata.palette(draw, 3)
    shape = simdata.any_of(range(4), draw, "shape", material, True)
    half, _, _ = simdata.lying(shape, draw.uniform("size", 0.15, 0.18, 3), draw, "aspect")
    place = torch.stack([torch.tensor([-0.55, 0.0, 0.55], device=hue.device).expand_as(hue),
                         draw.uniform("y", -0.2, 0.2, 3), draw.uniform("z", 0.5, 1.2, 3)], -1)
    alive = torch.ones_like(shape, dtype=torch.bool)
    turn = simdata.random_quat(draw("turn", 3, 3))
    return simdata.bodies(shape, half, material, place, turn, alive, hue, tone, alive)


def mujoco(scene, frames, fps, rate):
    """What MuJoCo makes of a scene of simulate()'s, one clip after the other -> dict of position (B, T, N, 3)."""
    import mujoco
    steps, position = round(rate / fps), []
    for i in range(len(scene["shape"])):
        body = '<body pos="{} {} {}" quat="{} {} {} {}"><freejoint/><geom type="{}" size="{} {} {}" mass="{}"/></body>'
        rows = zip(*(scene[k][i].tolist() for k in ("position", "rotation", "shape", "half_extents", "mass")))
        lines = [body.format(*x, *q, simdata.SHAPES[s], h[0], h[1] if s == simdata.BOX else
                             h[2] - h[0] * (s == simdata.CAPSULE), h[2], m) for x, q, s, h, m in rows]
        x, y, z = scene["gravity"][i].tolist()
        model = mujoco.MjModel.from_xml_string(
            f'<mujoco><option timestep="{1 / (fps * steps)}" gravity="{x} {y} {z}"/><worldbody>'
            f'<geom type="plane" size="0 0 1"/>{"".join(lines)}</worldbody></mujoco>')
        data, at = mujoco.MjData(model), []
        for t in range(frames):
            mujoco.mj_step(model, data, steps if t else 0)
            at.append(data.qpos.reshape(-1, 7)[:, :3].copy())
        position.append(np.stack(at))
    return dict(position=torch.from_numpy(np.stack(position)).float())


def ours(scene, frames, fps, rate, film=0):
    """The same by simdata, with all it has to tell of a film; of which, as from the peer, the masks are kept."""
    path, masks = simdata.simulate(scene, frames, fps, scene["gravity"], rate), []
    for i in range(0, len(scene["shape"]) if film else 0, 32):
        some = slice(i, i + 32)
        masks.append(simdata.render(simdata.clips(scene, some), simdata.clips(path, some), film, 1)["mask"])
    return path | (dict(mask=torch.cat(masks)) if film else {})


def lap(engine, n, film):
    """n clips of mixed() by an engine, in a process of its own -> seconds, and what the first 100 are like."""
    simdata.SCENARIOS["mixed"] = mixed
    scene, _ = simdata.make_scene("mixed", n, 0)
    engine(simdata.make_scene("mixed", 2, 1)[0], 2, 16, 240, **film)                 # a warm-up
    begin = time.perf_counter()
    path = engine(scene, 17, 16, 240, **film)
    seconds = time.perf_counter() - begin
    return {k: v[:100] for k, v in path.items() if k in ("position", "impulse", "mask")} | dict(seconds=seconds)


def peers(cfg, device):
    """The same scenes, 17 frames of 64 px and 240 Hz, by us and by each peer in two processes of one thread."""
    engines = (("ours, 1,024 at a time", ours, 1024), ("ours, 4,096 at a time", ours, 4096), ("PyBullet", bullet, 100),
               ("MuJoCo", mujoco, 100))
    size = 2 * mixed(simdata.Draws("train", 0, torch.arange(100) * 2), False)["half_extents"].amax(-1)[:, None]
    for film in ({}, dict(film=64)):
        print("three mixed bodies, 17 frames,", "with shadows, masks and depth" if film else "simulated only")
        for name, engine, n in engines:
            if film and engine is mujoco:          # it draws with OpenGL
                continue
            try:
                laps = list(common.side_by_side(lap, [(engine, n, film)] * 2))
            except ImportError:
                print(f"    {name}: not installed")
                continue
            rate = sum(n / one["seconds"] for one in laps)
            path = laps[0]
            if engine is ours:
                here, free = path | dict(rate=rate), (path["impulse"].sum(-1) > 0).cumsum(1) == 0
                print(f"    {name}: {rate:.0f} clips/s")
                continue
            off = ((path["position"] - here["position"]).norm(dim=-1) / size)[free].max()
            assert off < 0.1, f"{name} falls {off} of the size apart"
            check = f"until the first contact at most {100 * off:.1f} % of the size apart"
            if film:
                a, b = here["mask"][:, 0], path["mask"][:, 0]
                iou = ((a == b) & (a > 0)).sum() / ((a > 0) | (b > 0)).sum()
                # TinyRenderer looks through the corners of pixels, which are a twelfth of a body wide
                assert iou > 0.75, f"{name}'s masks of the first frame overlap by {iou}"
                check += f", masks of frame 0 overlap by {iou:.3f}"
            print(f"    {name}: {rate:.0f} clips/s; ours {here['rate'] / rate:.2f}x as fast; {check}")


def compiled(cfg, device):
    """The world's long formulas by torch.compile beside eager, one thread: whether it pays, and what differs."""
    long = [(simdata.Contacts, name) for name in ("nearest", "distance", "overlap", "features")] \
        + [(simdata, name) for name in ("_slabs", "_tube", "_ball", "_capsule", "_normal", "_pattern", "_may_shade",
                                        "_compose")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(simdata.SCENARIOS, mixed=mixed), contextlib.ExitStack() as stack:
        scene, _ = simdata.make_scene("mixed", 4096, 0, device=device)
        path = simdata.simulate(scene, 17, 16)
        some, reel = simdata.clips(scene, slice(32)), simdata.clips(path, slice(32))
        jobs = (("simulate 4,096 scenes x 17 frames", 4096, lambda: simdata.simulate(scene, 17, 16)["position"]),
                ("film 32 of them", 32, lambda: simdata.render(some, reel, 64, 1)["video"]))
        eager = [median(job, cfg.repeat, device) for _, _, job in jobs]
        for owner, name in long:
            stack.enter_context(mock.patch.object(owner, name, torch.compile(getattr(owner, name), dynamic=True)))
        for (name, n, job), (t, old) in zip(jobs, eager):
            u, new = median(job, cfg.repeat, device)
            off = (new - old).abs()
            print(f"{name}: eager {n / t:.0f}, compiled {n / u:.0f} clips/s, {t / u:.2f}x; of all numbers "
                  f"{100 * (off > 1e-3).float().mean():.4f} % differ by more than 0.001")
    torch.set_num_threads(threads)


def profile(cfg, device):
    """Where the time goes when 4,096 scenes of mixed() are simulated, 17 frames, one thread: shares of the whole."""
    parts = {"contacts' geometry": (simdata.Contacts, "detect"), "setting up impulses": (simdata.Impulses, "__init__"),
             "solving for them": (simdata.Impulses, "solve")}
    spent, threads = dict.fromkeys(parts, 0.0), torch.get_num_threads()

    def timed(name, f):
        def run(*given):
            begin = time.perf_counter()
            value = f(*given)
            spent[name] += time.perf_counter() - begin
            return value
        return run
    torch.set_num_threads(1)
    with mock.patch.dict(simdata.SCENARIOS, mixed=mixed), contextlib.ExitStack() as stack:
        scene, _ = simdata.make_scene("mixed", 4096, 0, device=device)
        for name, (owner, method) in parts.items():
            stack.enter_context(mock.patch.object(owner, method, timed(name, getattr(owner, method))))
        begin = time.perf_counter()
        simdata.simulate(scene, 17, 16)
        total = time.perf_counter() - begin
    torch.set_num_threads(threads)
    print(f"4,096 scenes in {total:.1f} s: " + ", ".join(f"{k} {100 * t / total:.0f} %" for k, t in spent.items())
          + f", all else {100 * (1 - sum(spent.values()) / total):.0f} %")


def xpbd(scene, frames, fps, rate, sweep):
    """The same scenes by small-step XPBD (Mueller et al. 2020, "Detailed Rigid Body Simulation with Extended Position
    Based Dynamics": one position and one velocity solve a substep, no compliance), on simdata's contacts.

    sweep: contacts of a clip one after the other, as published (Gauss-Seidel); else all at once, a body's mass split
    over its contacts, as in simdata. Of the velocity solve's orders the one that served it best: first what bounces,
    then friction. -> dict of position, rotation, velocity and angular_velocity, as from simulate()."""
    from simdata import cross, dot, quat_exp, quat_mul, quat_to_matrix, rotate
    B, N = scene["shape"].shape
    M, steps = B * N, round(rate / fps)
    h = 1 / (fps * steps)
    flat = lambda t: F.pad(t.flatten(0, 1), (0, 0) * (t.ndim - 2) + (0, 1))          # and the world, which is the last
    x, q, v, w = (flat(scene[k]) for k in ("position", "rotation", "velocity", "angular_velocity"))
    q[-1, 0] = 1
    moves = flat(scene["dynamic"] & scene["alive"])[:, None]
    g = torch.tensor([0.0, 0.0, -simdata.EARTH]) * moves
    inertia = flat(simdata.principal_inertia(scene["shape"], scene["half_extents"], scene["mass"]))
    inv_mass, inv_body = moves / flat(scene["mass"])[:, None].clamp_min(1e-12), moves / inertia.clamp_min(1e-12)
    contacts = simdata.Contacts(scene)
    cold, record = torch.zeros(contacts.slots, 3), [(x, q, v, w)]

    def turned(q, by):
        q = quat_mul(quat_exp(by), q)
        return q / q.norm(dim=-1, keepdim=True)

    for step in range((frames - 1) * steps):
        x_was, q_was, R = x, q, quat_to_matrix(q)
        spin = rotate(R, inertia * rotate(R.mT, w))
        v = v + h * g
        x, q = x + h * v, turned(q, h * w)
        R = quat_to_matrix(q)
        w = rotate(R, inv_body * rotate(R.mT, spin))
        v_was, w_was, I = v, w, R @ (inv_body[:, :, None] * R.mT)
        _, a, b, point, n, gap = contacts.detect(x[:-1], R[:-1], v[:-1], w[:-1], cold)
        a, b, point, n, gap = (t[gap < 0] for t in (a, b, point, n, gap))
        sides = [(k, rotate(R[k].mT, point - x[k])) for k in (a, b)]                 # bodies, and where on them
        mu, e, force = contacts.mu[a] * contacts.mu[b], contacts.e[a] * contacts.e[b], torch.zeros(len(a))
        share, turns = torch.ones(M + 1), [torch.arange(len(a))] if len(a) else []
        if sweep:                                  # the k-th contacts of all clips take the k-th turn
            order = (a // N).argsort(stable=True)
            number = torch.arange(len(a)) - torch.searchsorted((a // N)[order], (a // N)[order])
            turns = [order[number == k] for k in range(int(number.max()) + 1 if len(a) else 0)]
        else:
            share = torch.bincount(torch.cat([a, b]), minlength=M + 1).float()

        def ease(i, arms, d):                      # both sides' inverse masses along d (F, 3)
            return sum(share[k[i]] * (inv_mass[k[i], 0] + dot(cross(r, d), rotate(I[k[i]], cross(r, d))))
                       for (k, _), r in zip(sides, arms)).clamp_min(1e-12)

        def moved(i, arms, p):                     # by impulses p (F, 3) -> changes of all bodies (M+1, 3), two kinds
            dv, dw = torch.zeros_like(v), torch.zeros_like(w)
            for (k, _), r, p in zip(sides, arms, (p, -p)):
                dv.index_add_(0, k[i], inv_mass[k[i]] * p)
                dw.index_add_(0, k[i], rotate(I[k[i]], cross(r, p)))
            return dv, dw

        def across(u, n):                          # what of u (F, 3) is not along n, its length and direction
            u = u - dot(u, n)[:, None] * n
            length = u.norm(dim=-1)
            return length, u / length[:, None].clamp_min(1e-12)

        for i in turns:                            # positions: out of each other, and back to where they stick
            arms = [rotate(quat_to_matrix(q[k[i]]), at[i]) for k, at in sides]
            (at_a, was_a), (at_b, was_b) = ((x[k[i]] + r, x_was[k[i]] + rotate(quat_to_matrix(q_was[k[i]]), at[i]))
                                            for (k, at), r in zip(sides, arms))
            force[i] = -(gap[i] + dot(at_a - at_b, n[i])).clamp_max(0) / ease(i, arms, n[i])
            far, d = across((at_a - was_a) - (at_b - was_b), n[i])
            hold = far / ease(i, arms, d)
            dx, dq = moved(i, arms, force[i, None] * n[i] - (hold * (hold < mu[i] * force[i]))[:, None] * d)
            x, q = x + dx, turned(q, dq)
        dq = quat_mul(q, q_was * torch.tensor([1.0, -1.0, -1.0, -1.0]))
        v, w = (x - x_was) / h, 2 / h * dq[:, 1:] * torch.where(dq[:, :1] < 0, -1.0, 1.0)
        for rubs in (False, True):                 # velocities
            for i in turns:
                arms = [rotate(quat_to_matrix(q[k[i]]), at[i]) for k, at in sides]
                meet = lambda v, w: v[a[i]] + cross(w[a[i]], arms[0]) - v[b[i]] - cross(w[b[i]], arms[1])
                u, came = meet(v, w), -dot(meet(v_was, w_was), n[i])
                if rubs:
                    slides, d = across(u, n[i])
                    p = -torch.minimum(mu[i] * force[i] / h, slides / ease(i, arms, d))[:, None] * d
                else:
                    leaves = torch.where(came > 2 * simdata.EARTH * h, e[i] * came, 0.0)
                    p = ((leaves - dot(u, n[i])) / ease(i, arms, n[i]) * (force[i] > 0))[:, None] * n[i]
                dv, dw = moved(i, arms, p)
                v, w = v + dv, w + dw
        if (step + 1) % steps == 0:
            record.append((x, q, v, w))
    keys = ("position", "rotation", "velocity", "angular_velocity")
    return {k: torch.stack([r[i][:M].view(B, N, -1) for r in record], 1) for i, k in enumerate(keys)}


def solvers(cfg, device):
    """simdata's solver and XPBD on the same contacts: closed forms, towers, energy, and scenes a second."""
    def stage(half, position, ramp=None, mu=0.5, e=0.0, speed=0.0, mass=None):
        """Boxes of half extents (N, 3) m, the first one a ramp of so many degrees if that is given."""
        half, position = torch.tensor([half]), torch.tensor([position])
        zero, live = torch.zeros(half.shape[:2]), torch.ones(half.shape[:2], dtype=torch.bool)
        turn = simdata.tilt_quat(zero + math.radians(ramp or 0))
        scene = simdata.bodies((zero + simdata.BOX).long(), half, zero.long(), position, turn, live, zero,
                               torch.ones(*zero.shape, 2), live, dynamic=live & ((zero[0] + 1).cumsum(0) > bool(ramp)))
        scene["velocity"][..., 0] = speed
        return scene | dict(restitution=zero + e, friction=zero + mu**0.5 if ramp else zero + mu,
                            mass=torch.tensor([mass]) if mass else scene["mass"])

    slope = math.radians(20)
    along, up = ([math.cos(slope), 0.0, -math.sin(slope)], [math.sin(slope), 0.0, math.cos(slope)])
    on_ramp = [0.25 * u - 2.5 * d for u, d in zip(up, along)]
    on_ramp[2] += 3.0
    cube, flat = [0.15] * 3, [0.16, 0.14, 0.1]
    slide = stage([[4.0, 1.0, 0.1], cube], [[0.0, 0.0, 3.0], on_ramp], 20, mu=0.2)
    tower = stage([cube] * 5, [[0.0, 0.0, 0.15 + 0.3 * k] for k in range(5)])
    pile = stage([flat] * 3, [[0.0, 0.0, 0.1], [0.14, 0.0, 0.3], [0.14, 0.0, 0.5]], mass=[1.0, 12.0, 12.0])
    lands = (2 / simdata.EARTH) ** 0.5             # s, from 1 m
    many, _ = simdata.make_scene("collide", 500, 0)
    heap, _ = simdata.make_scene("support", 500, 0)
    inner = lambda scene, *how: simdata.simulate(scene, *how[:2], rate=how[2])
    for name, engine, rates in (("simdata", inner, (240,)),
                                ("XPBD at once", lambda *x: xpbd(*x, False), (240, 960)),
                                ("XPBD in turn", lambda *x: xpbd(*x, True), (240, 960))):
        for rate in rates:
            bounce = engine(stage([cube], [[0.0, 0.0, 1.15]], e=0.75), 49, 48, rate)["position"][0, :, 0, 2] - 0.15
            stop = engine(stage([cube], [[0.0, 0.0, 0.15]], speed=2.0), 17, 16, rate)["position"][0, -1, 0, 0]
            down = engine(slide, 17, 16, rate)["position"][0, :, 1]
            gone = (down[-1] - down[0]) @ torch.tensor(along)
            lean = [1e3 * (p[0, -1] - p[0, 0]).norm(dim=-1).max()
                    for p in (engine(s, 33, 16, rate)["position"] for s in (tower, pile))]
            print(f"{name}, {rate} Hz: a flat box rebounds to {bounce[math.ceil(48 * lands):].max() / 0.75**2:.4f}, "
                  f"stops after {stop * simdata.EARTH / 4:.4f} and slides down a ramp to "
                  f"{gone * 2 / simdata.EARTH / (math.sin(slope) - 0.2 * math.cos(slope)):.4f} of the closed form; in "
                  f"two seconds a tower of five moves by {lean[0]:.2f} mm, steel on wood by {lean[1]:.2f} mm")
            t, gain = 0, []
            for scene in (many, heap):
                begin = time.perf_counter()
                path = engine(scene, 13, 16, rate)
                t, total = t + time.perf_counter() - begin, simdata.energy(scene, path)
                gain.append((total.amax(1) - total[:, 0]) / total[:, 0])
            print(f"    {1000 / t:.0f} scenes/s of 13 frames; gain of energy, in 500 scenes each: " + ", ".join(
                f"{name} at worst {100 * x.max():.2f} %, over 1 % in {100 * (x > 0.01).float().mean():.1f} % of them"
                for name, x in zip(("collide", "support"), gain)))


def vae(cfg, device):
    config = V.CONFIGS["wan2.2"] | dict(dim=16, decoder_dim=16)
    ours = V.VideoVAE(config).to(device).eval()
    with contextlib.suppress(ImportError), torch.no_grad():
        from diffusers import AutoencoderKLWan
        peer = AutoencoderKLWan(base_dim=16, decoder_base_dim=16, z_dim=48, dim_mult=config["mult"], num_res_blocks=2,
                                temperal_downsample=config["temporal"], is_residual=True, in_channels=12,
                                out_channels=12, patch_size=2, scale_factor_spatial=16,
                                latents_mean=config["latent_mean"], latents_std=config["latent_std"]).to(device).eval()
        common.save_weights("out/bench_vae.safetensors", peer, {})
        common.load_weights(ours, "out/bench_vae.safetensors")
        video = torch.rand(1, 3, 17, 128, 128, device=device) * 2 - 1
        mean, std = ours.stats(video)
        versus("Wan 2.2 VAE, width 16, encode 17 x 128 x 128, fp32", lambda: ours.encode(video),
               lambda: (peer.encode(video).latent_dist.mean - mean) / std, cfg, device)
        z = torch.randn(1, 48, 5, 8, 8, device=device)
        versus("the same, decode", lambda: ours.decode(z), lambda: peer.decode(z * std + mean).sample, cfg, device)
    nano = V.load_vae(f"{cfg.data}/vae.safetensors", device=device)
    video = torch.rand(8, 3, 25, 64, 64, device=device) * 2 - 1
    with torch.no_grad(), common.autocast(device):
        t, latent = median(lambda: nano.encode(video), cfg.repeat, device)
        u, _ = median(lambda: nano.decode(latent), cfg.repeat, device)
    print(f"nano VAE, 25 frames of 64 px: encode {8 / t:.1f}, decode {8 / u:.1f} clips/s")


def beside_diffusers(cfg, device, compiled=False):
    """The same DiT of nano's width with the same weights, ours and diffusers': a training step, and sampling from an
    image with guidance and UniPC, as the TI2V pipeline does it."""
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
    B, config = cfg.batch, dict(in_dim=16, out_dim=16, dim=256, ffn_dim=1024, num_heads=4, num_layers=6, freq_dim=256,
                                text="features", text_dim=128, text_len=32, phys=False)
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    for dtype in dict.fromkeys((torch.float32, common.precision(device))):           # as published weights are loaded
        peer = WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64, in_channels=16,
                                     out_channels=16, text_dim=128, freq_dim=256, ffn_dim=1024, num_layers=6,
                                     cross_attn_norm=True, qk_norm="rms_norm_across_heads")
        common.save_weights("out/bench_dit.safetensors", peer, {})
        with torch.device("meta"):
            ours = M.VideoDiT(config)
        common.load_weights(ours, "out/bench_dit.safetensors", dtype, device)
        peer.to(device, dtype)
        for model in (ours, peer) if compiled else ():
            model.compile(dynamic=False)           # guidance doubles our batch, and kernels for any batch are slow
        draw = lambda *shape: torch.randn(*shape, device=device)
        x, image, t, text, null = draw(B, 16, 7, 8, 8), draw(B, 16, 1, 8, 8), torch.rand(B, device=device), *(
            draw(B, 32, 128) for _ in range(2))
        how = f"{'fp32' if dtype == torch.float32 else 'bf16'}, {'compiled' if compiled else 'eager'}, batch {B}"
        mine = lambda *inputs: ours(*inputs)
        theirs = lambda x, t, text: peer(x.to(dtype), t, text.to(dtype)).sample.float()

        def train(model, call, *inputs):
            model.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=model is ours and dtype != torch.float32):
                out = call(*inputs)
            out.square().mean().backward()
            return out.detach()
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        versus(f"DiT, forward + backward, {how}", lambda: train(ours, mine, x, t, text),
               lambda: train(peer, theirs, x, t * 1000, text), cfg, device, tolerance)

        def sampled():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return M.sample(ours, image, text, None, x[:, :, 1:], 8, 3.0, 5.0, null, "unipc")

        @torch.no_grad()
        def piped():                               # frame 0 is clean, and so every token has a time of its own
            scheduler.set_timesteps(8, device=device)
            z, clean = x.clone(), torch.ones(7, 4, 4, device=device)
            clean[0] = 0
            for t in scheduler.timesteps:
                z[:, :, :1] = image
                times = (clean.flatten() * t).expand(B, -1)
                v, w = (theirs(z, times, said) for said in (text, null))
                z = scheduler.step(w + 5 * (v - w), t, z, return_dict=False)[0]
            return z[:, :, 1:]
        versus(f"sampling, 8 steps with guidance, {how}", sampled, piped, cfg, device, 10 * tolerance)


def compiled_dit(cfg, device):
    try:
        beside_diffusers(cfg, device, compiled=True)
    except ModuleNotFoundError as error:
        raise common.InputError(f"--only=dit_compiled needs the package {error.name}") from None


def dit(cfg, device):
    with contextlib.suppress(ImportError):
        beside_diffusers(cfg, device)
    q, k, v = (torch.randn(B, 4, 128, 64, device=device, requires_grad=True) for B in [cfg.batch] * 3)
    v16 = v.detach().bfloat16().requires_grad_()

    def attend(f, value):
        out = f(q, k, value)
        out.sum().backward()
        return out.detach().float()
    fused = torch.nn.functional.scaled_dot_product_attention
    for kind, peer in (("fp32", lambda: attend(fused, v)),
                       ("bf16", lambda: attend(lambda q, k, v: fused(q.to(v), k.to(v), v), v16))):
        versus(f"attention, 128 tokens, forward + backward, ours with bf16 values, peer SDPA in {kind}",
               lambda: attend(common.attention, v16), peer, cfg, device, 0.05)
    nano = M.VideoDiT(M.CONFIGS["nano"]).to(device)
    B, C = cfg.batch, nano.config["in_dim"]
    inputs = [torch.randn(B, C, 6, 8, 8, device=device), M.bytes_to_tokens(["a red rubber ball falls"] * B).to(device),
              torch.randn(B, C, 1, 8, 8, device=device), torch.randn(B, 16, 256, device=device),
              torch.rand(B, device=device), torch.randn(B, C, 6, 8, 8, device=device)]
    for phys in (True, False):
        args = inputs if phys else [*inputs[:3], None, *inputs[4:]]

        def step():
            with common.autocast(device):
                M.flow_loss(nano, *args).mean().backward()
        t, _ = median(step, cfg.repeat, device)
        print(f"nano training step, {'with' if phys else 'without'} physical tokens: {B / t:.1f} clips/s")


def sampling(cfg, device):
    models = sample.load_models(cfg.data, 1, device=device)
    plain = sample.Models(models.vae, None, models.dit)
    # a picture of the world: of noise the encoder would foretell bodies everywhere
    image, photo = (common.read_image(f"{cfg.data}/drop.png", size)[0][None].to(device) for size in (64, 112))
    took = [], []
    for _ in range(4 * cfg.repeat + 1):            # in turn: whatever else the machine does slows both
        for row, some, look in zip(took, (models, plain), (photo, None)):
            t, _ = once(lambda: sample.generate(some, image, ["a ball"], [0], photo=look), device)
            row.append(t)
    slow, fast = (statistics.median(row[1:]) for row in took)                          # the first warms up
    print(f"sampling one clip, 12 steps: {slow:.2f} s; the encoder and its tokens cost {100 * (slow / fast - 1):.0f} %")


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors made under it that are still alive, views of one storage once: now, and peak."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.storages = 0, 0, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if torch.is_tensor(x)):
            if id(storage) not in self.storages:
                def gone(_, key=id(storage), size=storage.nbytes()):
                    self.now -= size
                    del self.storages[key]
                self.storages[id(storage)] = weakref.ref(storage, gone)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out


def count_step(stage, config, backbone, latent, ranks=1, lora=True, second_model=False, batch=1):
    """Two training steps of Stage I (all weights, or a LoRA) or II (LoRA, winner and loser in turn), bf16 as on a GPU.
    latent: (frames after frame 0, height, width); batch: of a rank; blocks are computed again in the backward pass if
    it is 1.
    second_model: Stage II's reference is a copy of DiT and head, not of what is trained.
    -> bytes kept between steps, bytes at the peak; on each of the ranks, if FSDP2 shards what is trained over them."""
    M.rotary_table.cache_clear()
    alive, (k, h, w) = Alive(), latent
    # what a GPU does: fused attention in bf16
    fused = lambda q, k, v: F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    with alive, mock.patch.object(common, "attention", fused), mock.patch.object(
            torch.nn.init, "trunc_normal_", torch.nn.init.normal_):                  # it looks at values: here are none
        dit = M.add_phys(M.VideoDiT(config))
        encoder = E.PhysEncoder(E.CONFIGS[backbone] | {"out_dim": config["dim"]})
        dit.checkpointing = batch == 1
        if lora and config["text"] == "features":
            for name, p in dit.named_parameters():
                p.data = p.data if re.search(M.VideoDiT.FLOAT32, name) else p.data.bfloat16()
        if lora:
            M.add_lora(dit, 16, 32)
        net = sft.StageOne(dit, encoder) if stage == 1 else dpo.Policy(dit, encoder.head.requires_grad_(False))
        trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
        kept_twice = dict(net.named_parameters()) if second_model else trained
        second = {n: p.detach().clone() for n, p in kept_twice.items()}              # the reference, or the average
        optimizer = torch.optim.AdamW(trained.values(), foreach=False)
        C, side = config["in_dim"], E.CONFIGS[backbone]["input_size"]
        B = batch
        first, clips = torch.randn(B, C, 1, h, w), [torch.randn(B, C, k, h, w) for _ in range(2)]
        eps, t, photo = torch.randn(B, C, k, h, w), torch.rand(B), torch.rand(B, 3, side, side)
        text = torch.randn(B, config["text_len"], config["text_dim"])
        if config["text"] == "bytes":
            text = torch.ones(B, M.BYTES, dtype=torch.long)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                if stage == 1:
                    net(torch.cat([first, clips[0]], 2), photo, text, t, eps).sum().backward()
                else:
                    with torch.no_grad():
                        seen = encoder.features(photo)
                        torch.func.functional_call(net, second, (seen, first, clips, text, t, eps))
                    for clip in clips:
                        net(seen, first, [clip], text, t, eps)[0].sum().backward()
            peak, alive.peak = alive.peak, alive.now                                 # of the last step: all exists
            optimizer.step()
            optimizer.zero_grad()
        kept, gradients = alive.now, sum(p.numel() * p.element_size() for p in trained.values())
    extra = max(peak, alive.peak) - kept - gradients
    return kept / ranks, (kept + gradients) / ranks + extra


def memory(cfg, device):
    small, latent = M.CONFIGS["wan1.3b"] | dict(num_layers=2), (12, 24, 24)
    _, real = count_step(2, small, "nano", latent)
    with FakeTensorMode():
        _, counted = count_step(2, small, "nano", latent)
    assert abs(counted - real) < 0.05 * real, (counted, real)
    print(f"two blocks of wan1.3b, Stage II: {counted / 1e9:.2f} GB without data, {real / 1e9:.2f} GB with data")
    for name, stage, lora, ranks, frames, height, width, batch in (
            ("wan1.3b", 2, True, 1, 49, 480, 832, 1), ("wan5b", 2, True, 1, 49, 480, 832, 1),
            ("wan1.3b", 1, True, 1, 49, 512, 512, 1), ("wan5b", 1, True, 1, 49, 512, 512, 1),
            ("wan1.3b", 1, False, 1, 49, 512, 512, 1), ("wan5b", 1, False, 8, 49, 512, 512, 1),
            ("small", 1, False, 1, 33, 128, 128, 128), ("small", 2, True, 1, 33, 128, 128, 16)):
        version, stride, backbone = {"wan1.3b": ("wan2.1", 8, "dinov2_vitb14"), "small": ("nano", 8, "nano"),
                                     "wan5b": ("wan2.2", 16, "dinov2_vitb14")}[name]
        latent = (frames - 1) // 4, height // stride, width // stride
        with torch.device("meta"):
            vae = 4 * sum(p.numel() for p in V.VideoVAE(V.CONFIGS[version]).parameters())
        with FakeTensorMode():
            kept, peak = count_step(stage, M.CONFIGS[name], backbone, latent, ranks, lora, batch=batch)
        what = "LoRA" if lora else "all weights"
        print(f"{name}, Stage {'I' * stage}, {what}, {frames} frames of {width} x {height}, batch {batch} on each of "
              f"{ranks}: {(kept + vae) / 1e9:.1f} GB between steps, peak {(peak + vae) / 1e9:.1f} GB")
        if stage == 2:
            with FakeTensorMode():
                _, more = count_step(stage, M.CONFIGS[name], backbone, latent, second_model=True, batch=batch)
            print(f"    with a second model as the reference: peak {(more + vae) / 1e9:.1f} GB, "
                  f"{(more + vae) / (peak + vae):.2f}x")


def wan(cfg, device):
    """The published sizes with random weights on a GPU: a DiT pass, of which a sampler step with guidance takes two,
    and a step of Stage II."""
    if device.type != "cuda":
        print("wan: needs a GPU, left out")
        return

    def build(config):                             # bf16, norms and times in fp32, as load_published has them
        with torch.device("meta"):
            dit = M.VideoDiT(config)
        for name, p in [*dit.named_parameters()]:
            kind = torch.float32 if re.search(M.VideoDiT.FLOAT32, name) else torch.bfloat16
            value = 0.02 * torch.randn(p.shape, dtype=kind, device=device)
            dit.load_state_dict({name: 1 + value if "norm" in name and "weight" in name else value}, strict=False,
                                assign=True)
        return M.add_phys(dit.requires_grad_(False).eval())

    def gigabytes():
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    # name, frames, height, width, sampler steps, its VAE's stride
    for name, frames, height, width, steps, stride in (("wan1.3b", 81, 480, 832, 50, 8),
                                                       ("wan5b", 121, 704, 1280, 50, 16)):
        if cfg.only in M.CONFIGS and cfg.only != name:
            continue
        config = M.CONFIGS[name]
        dit, C, h, w = build(config), config["in_dim"], height // stride, width // stride
        gigabytes()
        draw = lambda *shape: torch.randn(1, *shape, device=device)
        inputs = [draw(C, (frames - 1) // 4, h, w), torch.full((1,), 0.5, device=device), draw(512, 4096),
                  draw(C, 1, h, w)]
        encoder = E.PhysEncoder(E.CONFIGS["dinov2_vitb14"] | {"out_dim": config["dim"]}).to(device)
        gh, gw = encoder.head.grid(inputs[0])
        phys = draw(gh * gw, config["dim"])

        @torch.no_grad()
        def once(*more):
            with common.autocast(device):
                return dit(*inputs, *more)
        with FlopCounterMode(display=False) as count:
            plain = once()
        t, again = median(once, cfg.repeat, device)
        u, _ = median(lambda: once(phys), cfg.repeat, device)
        assert (again - plain).abs().max() <= 0.02 * plain.abs().max() and plain.isfinite().all()
        flops = count.get_total_flops()
        print(f"{name}, {frames} frames of {width} x {height}: a pass {t:.3f} s, {flops / t / 1e12:.0f} TFLOP/s, "
              f"{steps} steps with guidance {2 * steps * t:.0f} s, peak {gigabytes():.1f} GB; {phys.shape[1]} physical "
              f"tokens add {100 * (u / t - 1):.1f} %")
        if cfg.profile:
            with profiler(activities=[ProfilerActivity.CUDA]) as seen:
                once()
            print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=12, max_name_column_width=70))

        dit.checkpointing, h, w = True, 480 // stride, 832 // stride
        M.add_lora(dit, 16, 32)
        net = dpo.Policy(dit, encoder.head.requires_grad_(False))
        trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
        reference = {n: p.detach().clone() for n, p in trained.items()}
        optimizer = torch.optim.AdamW(trained.values())
        first, clips = draw(C, 1, h, w), [draw(C, 12, h, w) for _ in range(2)]
        photo, text, eps = draw(3, 518, 518), inputs[2], draw(C, 12, h, w)

        def step():
            with common.autocast(device):
                seen = encoder.features(photo)
                with torch.no_grad():
                    torch.func.functional_call(net, reference, (seen, first, clips, text, inputs[1], eps))
                for clip in clips:
                    net(seen, first, [clip], text, inputs[1], eps)[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        step(), gigabytes()
        t, _ = median(step, cfg.repeat, device)
        print(f"    Stage II, 49 frames of 832 x 480, winner and loser in turn: {t:.2f} s a pair, "
              f"peak {gigabytes():.1f} GB")
        del dit, net, encoder, optimizer, trained, reference
        torch.cuda.empty_cache()


def main():
    cfg = common.parse_config(Config, sys.argv[1:])
    common.check_range(cfg, repeat=(1, 1000), batch=(1, 4096))
    parts = {"world": world, "peers": peers, "pybullet": pybullet, "compiled": compiled,
             "profile": profile, "solvers": solvers, "vae": vae, "dit": dit, "dit_compiled": compiled_dit,
             "sample": sampling, "memory": memory, "wan": wan, "wan1.3b": wan, "wan5b": wan}
    if cfg.only not in ("all", *parts):
        raise common.InputError(f"--only={cfg.only}: expected all, {', '.join(parts)}")
    device, _, _ = common.setup(cfg.device)
    common.make_dir("out")
    torch.backends.cudnn.allow_tf32 = False        # fp32 means fp32 where results are compared
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    # what needs other packages or many minutes, or is a part of a part
    aside = {"pybullet", "compiled", "solvers", "dit_compiled", "wan1.3b", "wan5b"}
    for name, part in parts.items():
        if cfg.only == name or cfg.only == "all" and name not in aside:
            part(cfg, device)


if __name__ == "__main__":
    common.run(main)
