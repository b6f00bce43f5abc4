"""
The few things that turn into a silent bug when two copies of them disagree: config, device and DDP set-up,
seeds, checkpoints, media files. Nothing here knows about physics or networks.
"""
import atexit
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import imageio
import imageio_ffmpeg
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class InputError(ValueError):
    """The user's input is wrong; the message is one line that says what is wrong and what would be right."""


def out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


CODE = [0]                                         # the exit code, see run and in_background


def run(main):
    """Call main(); an InputError becomes one line on stderr and exit code 2, never a traceback."""
    def end(code):
        CODE[0] = code
        sys.exit(code)
    CODE[0] = 1                                    # of a traceback
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        end(2)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"error: out of memory: {(str(error) or 'no more is left').splitlines()[0][:200]} Fewer frames, smaller "
              "sides, fewer clips at a time (--n, --batch, --chunk) need less; in training --accumulate and "
              "--checkpointing=True do, and in dpo.py --in_turn=True", file=sys.stderr)
        end(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        end(130)
    CODE[0] = 0
    if dist.is_initialized():
        dist.destroy_process_group()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:   # all is written; a thread that NCCL or gloo leaves behind can still
        sys.stdout.flush(), sys.stderr.flush()     # crash Python at its end
        os._exit(0)


# ----------------------------------------------------------------------------------------------------------------------
# config: a flat dataclass, its trailing comments are the help text, its fields are the flags

def _help(config_class):
    """{field: trailing comment}, read from the source so that help and code cannot drift apart."""
    lines = inspect.getsource(config_class).splitlines()
    return {m[1]: m[2] for m in (re.match(r"\s*(\w+)\s*:.*?=.*?\s#\s*(.*)", line) for line in lines) if m}


def _convert(name, text, default):
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = kind(text)
    except (KeyError, ValueError):
        want = {"bool": "True or False", "int": "an integer", "float": "a number"}.get(kind.__name__, kind.__name__)
        raise InputError(f"--{name}={text}: expected {want}, for example --{name}={default}") from None
    if kind is float and not math.isfinite(value):
        raise InputError(f"--{name}={text}: expected a finite number, for example --{name}={default}")
    return value


def parse_config(config_class, argv, presets=None, positional=None):
    """argv (list of str) -> config_class instance. Defaults < --preset=NAME < command line.

    positional: the field that takes the one argument without dashes, if any.
    Raises InputError on an unknown flag, a wrong type or an unknown preset; prints help and exits on -h."""
    fields = {f.name: f.default for f in dataclasses.fields(config_class)}
    texts, presets, given = _help(config_class), presets or {}, {}
    for i, arg in enumerate(argv):
        if arg in ("-h", "--help"):
            print((sys.modules[config_class.__module__].__doc__ or "").strip() + "\n\nflags (--name=value):")
            for name, default in fields.items():
                print(f"  --{name}={default}".ljust(35), texts.get(name, ""))
            if presets:
                print("  --preset=NAME".ljust(35), "a named set of overrides:", ", ".join(presets))
            sys.exit(0)
        if not arg.startswith("--") and positional and positional not in given:
            given[positional] = arg
            continue
        name, equals, text = arg.removeprefix("--").partition("=")
        if not (arg.startswith("--") and (name in fields or name == "preset" and presets)):
            raise InputError(f"unknown argument {arg!r}; the flags are "
                             + ", ".join(f"--{f}" for f in [*fields, *(["preset"] if presets else [])]))
        if not equals and isinstance(fields.get(name), bool):
            text = equals = "True"
        if not equals:
            meant = [text for text in argv[i + 1:i + 2] if not text.startswith("--")]                # --steps 3
            meant += [fields.get(name, next(iter(presets), ""))]
            raise InputError(f"--{name} needs a value: write --{name}={meant[0]}")
        given[name] = text
    preset = given.pop("preset", None)
    if preset is not None and preset not in presets:
        raise InputError(f"unknown preset {preset!r}; there are: {', '.join(presets)}")
    overrides = presets.get(preset, {})
    config = config_class(**overrides | {k: _convert(k, v, fields[k]) for k, v in given.items()})
    if "seed" in fields:
        check_range(config, seed=(-2**63, 2**63 - 1))
    return config


def check_range(config, **ranges):
    """check_range(cfg, steps=(1, 1000)) raises InputError unless low <= value <= high for each named field."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise InputError(f"--{name}={value} is out of range: expected {low} to {high}")


def check_names(flag, text, known):
    """"a,b" -> ["a", "b"]; raises InputError unless each is one of `known`."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise InputError(f"--{flag}={text}: {name!r} is unknown; expected names out of {', '.join(known)}")
    return names


def check_choice(config, **choices):
    """check_choice(cfg, split=("val", "test")) raises InputError unless each named field is one of those."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise InputError(f"--{name}={getattr(config, name)}: expected one of {', '.join(known)}")


def check_frames(cfg):
    """Raises InputError unless cfg.frames = 1 + 4k."""
    if cfg.frames % 4 != 1:
        k = cfg.frames // 4
        raise InputError(f"--frames={cfg.frames}: expected 1 + 4k, for example {max(5, 4 * k + 1)} or {4 * k + 5}")


def check_sides(cfg, names, step):
    """Raises InputError, with the nearest that would do, unless the sides in pixels are multiples of `step`."""
    if any(getattr(cfg, k) % step for k in names):
        near = [f"--{k}={max(step, round(getattr(cfg, k) / step) * step)}" for k in names]
        raise InputError(f"{' '.join(f'--{k}={getattr(cfg, k)}' for k in names)}: expected multiples of {step}; the "
                         f"nearest are {' '.join(near)}")


def clip_size(cfg):
    """cfg's height and width as the simulator takes them: pixels a side, or [height, width] (a list, because stamps of
    files are compared with it, and JSON has no tuples)."""
    return cfg.height if cfg.height == cfg.width else [cfg.height, cfg.width]


# ----------------------------------------------------------------------------------------------------------------------
# device, ranks, precision

def keep_memory():
    """glibc gives every freed activation back to the system and faults it in again a moment later.

    M_MMAP_MAX (-4) and M_TRIM_THRESHOLD (-1) make it keep them, for work that is the same again and again: where sizes
    vary, as in eval.py, what is kept falls to pieces and adds up to gigabytes."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0), mallopt(-1, 2**31 - 1)


def setup(device="auto", keep=True):
    """-> (torch.device, rank, world size). Under torchrun it joins the process group and owns one GPU per rank.
    keep: freed memory, see keep_memory."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and str(device).startswith("cuda"):       # each its own from the first touch
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device={device} is not usable here; expected auto, cuda, mps or cpu, and no more ranks "
                         "than GPUs") from None
    if keep:
        keep_memory()
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # one rank may simulate for a long time while the others wait for it
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    return device, rank, world


def free_memory(device):
    """Bytes that are free on a device; of main memory what the system says is available, else all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def precision(device):
    """The one precision policy: bf16 where the device is fast at it (CUDA, CPUs with AMX, AMD's with AVX512-BF16), else
    fp32. Intel's AVX512-BF16 without AMX loses to its own fp32."""
    if device.type != "cpu":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    intel = "Intel" in getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() and not intel
    return torch.bfloat16 if fast else torch.float32


def autocast(device):
    """A context in which matrix products run in bf16 where that is fast (see precision), in fp32 elsewhere."""
    fast = precision(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for (B, heads, L, d), through PyTorch's fused kernels; bf16 on a GPU under autocast.

    On a CPU the fused kernels are slow: few tokens do better with two plain products in v's precision (bench.py times
    both), many with fp32 (bf16's backward pass loses more than bf16 saves elsewhere)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    full = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        if q.shape[2] * k.shape[2] <= 2**16:
            score = (q * q.shape[3] ** -0.5).to(v.dtype) @ k.to(v.dtype).transpose(2, 3)            # (B, N, L, L')
            return score.to(full).softmax(-1).to(v.dtype) @ v
        return F.scaled_dot_product_attention(q.to(full), k.to(full), v.to(full)).to(v.dtype)


def _begin():
    torch.set_num_threads(1)
    keep_memory()
    for told in (signal.SIGINT, signal.SIGTERM):   # they reach the whole group; the process that started it ends it
        signal.signal(told, signal.SIG_IGN)
    # one that was killed cannot: without it nobody would ever send work, or an end
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tree_map(x, convert):
    """A dict, tuple or list of tensors, such and whatever else -> the same with every tensor (or array) converted."""
    if isinstance(x, dict):
        return {k: tree_map(v, convert) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(tree_map(v, convert) for v in x)
    return convert(x) if isinstance(x, (torch.Tensor, np.ndarray)) else x


def _call(function, task):
    return tree_map(function(*task), lambda v: torch.as_tensor(v).cpu().numpy())


def scenes_at_once(device):
    """By how much the simulator's batches are larger than on a CPU: a GPU takes hardly longer for 32 times as many."""
    return 1 if device.type == "cpu" else 32


def side_by_side(function, tasks, device=torch.device("cpu"), alone=False):
    """Yield function(*task), brought to the CPU, for each task in order: as many at a time as this rank has cores (all
    of the machine's if it is alone while the others wait), at most 16, of those that work on a GPU 5, each in a process
    of its own with one thread. For what spends its time between small operations, as the simulator does: a second
    thread gains nothing there, a second process doubles the speed."""
    # macOS cannot say which cores are ours
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = 16 if device.type == "cpu" else max(1, min(5, int(free_memory(device) / 8e9)))            # as films take
    share = 1 if alone and ranks() > 1 else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    count = min(len(tasks), most, cores // share)
    if count < 2:
        yield from (tree_map(function(*task), lambda v: torch.as_tensor(v).cpu()) for task in tasks)
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin) as pool:
        try:                                       # a process that is killed, for memory, ends all with an error
            # no more than one ahead for each process: films are large
            ahead = [pool.submit(_call, function, task) for task in tasks[:count]]
            for i in range(len(tasks)):
                done = ahead.pop(0).result()
                if i + count < len(tasks):
                    ahead.append(pool.submit(_call, function, tasks[i + count]))
                yield tree_map(done, torch.from_numpy)
        except BrokenProcessPool:
            raise InputError("a process that simulates was killed, perhaps for want of memory; expected more of it, or "
                             "fewer cores (taskset)") from None
        except BaseException:                      # Ctrl-C shall not wait for what is half done
            for process in list(pool._processes.values()):
                process.kill()
            raise


def shard_plan(names, pool, total, size, first=0):
    """A pool of clips first, first + 1, ... is made in shards of at most `size`, scenarios in turn, so that small ones
    have a share of each, too -> [dict(scenario, count, start: of which clip)]. One that was begun, on another device
    perhaps, keeps its size."""
    size = max(1, min(int(size), math.ceil(total / len(names))))
    if os.path.exists(f"{pool}/0000.safetensors"):
        size = read_config(f"{pool}/0000.safetensors").get("count", size)
    return [dict(scenario=names[i % len(names)], count=min(size, total - done), start=first + done)
            for i, done in enumerate(range(0, total, size))]


def source_hash(path=os.path.join(os.path.dirname(__file__), "simdata.py")):
    """A short string that changes when a source file does, by default the world's."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:12]


def disk_cache(folder, function, *args):
    """function(*args), cached on disk in the folder. The key has the source of the function's file and of simdata.py:
    whoever edits either gets new scenes."""
    key = repr((function.__name__, args, source_hash(sys.modules[function.__module__].__file__), source_hash()))
    path = f"{folder}/{function.__name__}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if os.path.exists(path):
        return torch.load(path, "cpu", weights_only=True)
    make_dir(folder)
    made = function(*args)
    with atomic(path) as tmp:
        torch.save(made, tmp)
    return made


def kept(path, rank, stamp, make):
    """make()'s dict of tensors, kept in a file for as long as its stamp holds; rank 0 makes it, the others read it."""
    made = None
    if rank == 0 and not (os.path.exists(path) and read_config(path) == stamp):
        save_weights(path, made := make(), stamp)
    barrier()
    return made or read_weights(path)[0]


def in_background(function, *args):
    """function(*args) in a thread of its own -> a Future: for what is needed later and made by other processes. The
    thread is a daemon, which an executor's is not: nobody waits for it at the end."""
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    def leave():                                   # in the middle of torch it would crash Python's end
        if thread.is_alive():
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(CODE[0])
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    atexit.register(leave)
    return future


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


def average(value, device):
    """A number (or a tensor) averaged over all ranks; the same on each of them."""
    if not dist.is_initialized():
        return value
    tensor = torch.as_tensor(value, dtype=torch.float32, device=device).clone()
    dist.all_reduce(tensor)
    tensor /= dist.get_world_size()
    return tensor if torch.is_tensor(value) else tensor.item()


def gather(value):
    """Any (picklable) value of every rank, in order -> list; the same on each of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Stop:
    """Ctrl-C or SIGTERM sets `stop.now`; the training loop saves and ends by itself. A second Ctrl-C is immediate.

    Every rank gets its own signal, maybe a step apart, so `stop.agreed(device)` asks all of them."""
    def __init__(self):
        self.now = False
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, self._set)

    def _set(self, sig, frame):
        if self.now and sig == signal.SIGINT:
            raise KeyboardInterrupt
        self.now = True

    def agreed(self, device):
        return bool(average(float(self.now), device))


# ----------------------------------------------------------------------------------------------------------------------
# seeds: every random number is a function of what it is for, never of what was drawn before it

def seed_of(*keys):
    """Any ints and strings -> 63-bit seed, by splitmix64 over the keys (strings by their bytes)."""
    mask, h = (1 << 64) - 1, 0
    for key in keys:
        for word in (key.to_bytes(16, "little", signed=True) if isinstance(key, int) else key.encode()):
            h = (h ^ word) * 0x100000001B3 & mask                                      # FNV-1a takes the bytes in ...
        h = (h + 0x9E3779B97F4A7C15) & mask
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & mask                                  # ... splitmix64 spreads them
        h = (h ^ h >> 27) * 0x94D049BB133111EB & mask
        h ^= h >> 31
    return h >> 1


def generator(*keys, device="cpu"):
    """A torch.Generator that depends on nothing but the keys (and, in what it gives, on the kind of device)."""
    return torch.Generator(device).manual_seed(seed_of(*keys))


def noise(shape, *keys, device="cpu"):
    """The normal noise of a training step, drawn where it is used: on the CPU it would take as long as a GPU's step."""
    return torch.randn(shape, generator=generator(*keys, device=device), device=device)


def to_device_if_it_fits(pool, device):
    """A dict of tensors from which a training takes rows -> the same on the device, if half its memory holds it."""
    fits = sum(v.nbytes for v in pool.values()) < free_memory(device) / 2
    return {k: v.to(device) for k, v in pool.items()} if fits else pool


def randn(shape, keys):
    """One independent CPU noise tensor per key, (len(keys), *shape): it does not depend on batch, rank or device."""
    return torch.stack([torch.randn(shape, generator=generator(*(k if isinstance(k, tuple) else (k,)))) for k in keys])


# ----------------------------------------------------------------------------------------------------------------------
# files: written to a temporary name, then renamed, so that a kill never leaves half of one

@contextlib.contextmanager
def atomic(path):
    """with atomic("a/b.mp4") as tmp: write to tmp (same folder and extension); renamed on success, removed on error."""
    path = os.fspath(path)
    folder, name = os.path.split(path)
    tmp = os.path.join(folder, f".tmp{os.getpid()}.{name}")
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())                   # on the disk before it takes the old file's place
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)
    except FileNotFoundError as error:
        if os.path.isdir(folder or "."):           # what is missing is something else
            raise
        raise InputError(f"cannot write {path}: the folder {folder or '.'} does not exist; create it first") from error
    except (OSError, SafetensorError) as error:    # no permission, no space: safetensors has errors of its own
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose a path that can be "
                         "written, with room for it") from error
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def check_writable(path):
    """Refuse an output path at once, not after an hour of work: its folder must exist and be writable."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise InputError(f"cannot write {path}: " + (f"{folder} is not a folder" if os.path.exists(folder) else
                         f"the folder {folder} does not exist; create it first"))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {path}: it is "
                         f"{'a folder' if os.path.isdir(path) else 'in a folder without write permission'}")


def make_dir(path):
    """Create a folder of ours, with one clear line when that is impossible."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {path}: {error.strerror}") from None
    return path


def git_commit():
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return ""
    return out.stdout.strip()


def start_run(cfg, rank, folder):
    """Create out/<name>/ and write its config.json (with the git commit); -> folder.

    A run that does not resume removes the states of an earlier one, so that no later --resume can pick them up."""
    if rank == 0:
        make_dir(folder)
        if not cfg.resume:
            for name in os.listdir(folder):
                if re.fullmatch(r"state\w*\.safetensors", name):
                    os.remove(f"{folder}/{name}")
        with atomic(f"{folder}/config.json") as tmp, open(tmp, "w") as f:
            json.dump(dataclasses.asdict(cfg) | {"git_commit": git_commit(), "argv": sys.argv}, f, indent=1)
    barrier()
    return folder


def log_line(path, entry):
    """Append one JSON object to a .jsonl file. On resume, `trim_log` has cut what came after the checkpoint."""
    with open(path, "a") as f:
        f.write(json.dumps(entry) + "\n")


def read_lines(path, mend=False):
    """A .jsonl file -> its list of dicts. mend: drop a last line that was cut off, from the file as well.

    Raises InputError, with the line's number, for what is no JSON object."""
    with open(path, encoding="utf-8") as f:
        try:
            lines = f.readlines()
        except UnicodeDecodeError:
            raise InputError(f"{path} is no text in UTF-8") from None
    if mend and lines and not lines[-1].endswith("\n"):
        with atomic(path) as tmp, open(tmp, "w") as f:
            f.writelines(lines := lines[:-1])
    entries = []
    for i, line in enumerate(lines, 1):
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}, line {i}: expected a JSON object: {error}") from None
    return entries


def trim_log(path, step):
    """Drop the lines at or after `step`, so that a resumed run's log has each step once."""
    if os.path.exists(path):
        with open(path) as f:
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] < step]
        with atomic(path) as tmp, open(tmp, "w") as f:
            f.writelines(lines)


# ----------------------------------------------------------------------------------------------------------------------
# weights: safetensors, the config as JSON in the metadata

def save_weights(path, tensors, config, dtype=None):
    """A state dict (or module) and its config dict -> one safetensors file. dtype: e.g. torch.bfloat16 on disk."""
    tensors = tensors.state_dict() if isinstance(tensors, torch.nn.Module) else tensors
    tensors = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous()
               for k, v in tensors.items()}
    with atomic(path) as tmp:
        save_file(tensors, tmp, metadata={"config": json.dumps(config)})


@contextlib.contextmanager
def _readable(file):
    """What goes wrong in here is the file's fault, and said in one line; PyTorch would advise to trust the file."""
    try:
        yield
    except Exception as error:                     # a broken pickle raises whatever it likes
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = "it is truncated or in another format"
        if isinstance(error, OSError):
            why = error.strerror or str(error)
        elif not os.path.getsize(file):
            why = "it is empty"
        elif code:
            why = f"it holds {code[1]}, and more than tensors can run any program; expected tensors alone"
        elif isinstance(error, SafetensorError):
            why += f" ({str(error).splitlines()[0]})"
        raise InputError(f"{file} is not a readable weight file: {why}") from None


def _flat(tree):
    """{"model": {"a": tensor}, "epoch": 3}, as training scripts wrap tensors -> {"model.a": tensor}."""
    flat = {}
    for k, v in tree.items() if isinstance(tree, dict) else ():
        flat |= {str(k): v} if torch.is_tensor(v) else {f"{k}.{name}": tensor for name, tensor in _flat(v).items()}
    return flat


def weight_files(path):
    """The files that hold the weights at a path: a file, one of several shards, their *.index.json, or a folder.

    Raises InputError if one does not exist, or if a folder holds none or several that do not belong together."""
    if os.path.isdir(path):
        names = sorted(f for f in os.listdir(path) if not f.startswith("."))
        # an index says what belongs together; safetensors, where somebody keeps both
        for ends in (".safetensors.index.json", ".safetensors", ".index.json", (".bin", ".pth", ".pt", ".ckpt")):
            if here := [f for f in names if f.endswith(ends)]:
                break
        else:
            raise InputError(f"{path} holds no weights; expected .safetensors, .bin, .pth, .pt or .ckpt files")
        if len({re.sub(r"-\d+-of-", "-of-", f) for f in here}) > 1:
            raise InputError(f"{path} holds several weight files, {', '.join(here[:3])}{', ...' * (len(here) > 3)}, "
                             "that are no shards of one; expected the path of one of them")
        return weight_files(os.path.join(path, here[0]))
    folder, name = os.path.split(path)
    names, shard = [name], re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\D.*)", name)
    if name.endswith(".index.json") and os.path.exists(path):
        try:
            with open(path) as f:
                names = sorted(map(os.fspath, set(json.load(f)["weight_map"].values())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is no index of shards; expected JSON with a weight_map") from None
    elif shard:
        names = [f"{shard[1]}{i:0{len(shard[2])}d}-of-{shard[3]}{shard[4]}" for i in range(1, int(shard[3]) + 1)]
    files = [os.path.join(folder, f) for f in names]
    missing = [f for f in files if not os.path.exists(f)]
    if missing:
        raise InputError(f"{missing[0]} does not exist"
                         + f"; missing {len(missing)} of the {len(files)} shards of {path}" * (len(files) > 1))
    return files


@contextlib.contextmanager
def open_weights(path):
    """Whatever weight_files takes, safetensors or PyTorch's own format -> ({name: (shape, read)}, config dict).

    Nothing is read before read() is called, one tensor at a time; PyTorch's format is mapped, not read, where it is a
    zip archive. Raises InputError if there is no such file, or none that can be read; read() does, too."""
    def later(file, f, key):
        with _readable(file):
            return f.get_tensor(key)

    with contextlib.ExitStack() as stack:
        found, config = {}, {}
        for file in weight_files(os.fspath(path)):
            with _readable(file):
                with open(file, "rb") as f:
                    safe = f.read(9)[8:] == b"{"   # JSON after its length in eight bytes; names say less
                if safe:
                    f = stack.enter_context(safe_open(file, "pt"))
                    part = {k: (torch.Size(f.get_slice(k).get_shape()), functools.partial(later, file, f, k))
                            for k in f.keys()}
                    config = config or json.loads((f.metadata() or {}).get("config", "{}"))
                else:
                    tree = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
                    part = {k: (v.shape, lambda v=v: v) for k, v in _flat(tree).items()}
            if twice := found.keys() & part.keys():
                raise InputError(f"{file} holds {min(twice)}, which another shard holds as well")
            found |= part
        yield found, config


def read_weights(path):
    """All of open_weights(path) -> (CPU state dict, config dict)."""
    with open_weights(path) as (found, config):
        return {k: read() for k, (_, read) in found.items()}, config


def read_config(path):
    """Of open_weights(path) the config dict alone; {} for files that are not ours."""
    with open_weights(path) as (_, config):
        return config


def evenly(n, most):
    """At most `most` indices evenly over 0 .. n - 1, so that every scenario has its share in a sample of clips."""
    return torch.linspace(0, n - 1, min(n, most)).long()


def fingerprint(*modules):
    """A short string of the sums of |w|, which changes when weights do (but not when signs alone flip): which networks
    made a file of latents or pairs."""
    tensors = [t for m in modules if m is not None for t in m.state_dict().values()]
    total = [t.detach().cpu().double().abs().sum().item() for t in tensors]
    return f"{seed_of(','.join(f'{x:.9e}' for x in total)):016x}"


# What a file seems to be: the first row whose pattern a name in it has, and which one, if that tensor's shape begins so
VITS = {384: "S", 768: "B", 1024: "L", 1536: "g"}
KINDS = [
    (r"^optimizer0/", "a training state", {}),
    (r"lora_[AB]|lora_(down|up)", "a LoRA", {}),
    (r"mlp\.gate_proj|feed_forward\.w1\.", "a language model like LLaMA or Qwen", {}),
    (r"input_blocks\.0\.|time_embedding\.linear_1\.", "a Stable Diffusion UNet", {}),
    (r"(^|\.)(text_model|vision_model|visual)\.", "a CLIP", {}),
    (r"img_attn\.qkv|single_transformer_blocks\.", "a Flux", {}),
    (r"depth_head\.projects\.0\.weight$|reassemble_stage\.layers\.0\.projection\.weight$", "a Depth Anything",
     {(48, 384): "Depth Anything V2 S", (96, 768): "Depth Anything V2 B", (256, 1024): "Depth Anything V2 L"}),
    (r"register_tokens$", "a DINOv2 with registers",
     {(1, 4, dim): f"DINOv2 ViT-{size}/14 with registers" for dim, size in VITS.items()}),
    (r"(ls1\.gamma|layer_scale1\.lambda1)$", "a DINOv2",
     {(dim,): f"DINOv2 ViT-{size}/14" for dim, size in VITS.items()}),
    (r"(^|\.)patch_embedding\.weight$", "a Wan DiT",
     {(1536, 16): "Wan T2V-1.3B", (3072, 48): "Wan TI2V-5B", (5120, 16): "Wan T2V-14B", (5120, 36): "Wan I2V-14B"}),
    (r"(^|\.)decoder\.(conv1|conv_in)\.weight$", "a VAE",
     {(384, 16): "Wan 2.1's VAE", (1024, 48): "Wan 2.2's VAE", (512, 4): "Stable Diffusion's VAE",
      (512, 16): "Flux's VAE"}),
    (r"scratch\.refinenet", "a physical head", {}),
    (r"(^|\.)(shared|token_embedding)\.weight$", "a text encoder",
     {(256384, 4096): "umT5-XXL", (32128, 4096): "T5-XXL"}),
]


def _guess(found):
    """What a file seems to be, for an error message: " (it looks like a LoRA)", or nothing."""
    for pattern, kind, known in KINDS:
        for key, (shape, _) in found.items():
            if re.search(pattern, key):
                kind = next((name for start, name in known.items() if shape[:len(start)] == start), kind)
                return f" (it looks like {kind})"
    return ""


def renamed(name, table):
    """A tensor's name in another layout; table: (regex, replacement) pairs, all applied in order."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _layouts(own, found, renames):
    """Yield (prefix, {our name: the file's names}) for every way to read a file's names: those behind any prefix, as
    they are and renamed, if there are enough of them to be `own`."""
    behind = {"": list(found)}
    if any("." in k for k in own):                 # a lone layer's names, weight and bias, are everywhere
        for key in found:
            for dot in re.finditer(r"\.", key):
                behind.setdefault(key[:dot.end()], []).append(key)
    for prefix, keys in behind.items():
        for table in ([], renames) if 2 * len(keys) >= len(own) else ():
            names = {}
            for key in keys:
                name, _, part = renamed(key.removeprefix(prefix), table).partition("#")
                names.setdefault(name, []).append((part, key))
            yield prefix, {name: [key for _, key in sorted(parts)] for name, parts in names.items()}
            if own.keys() <= names.keys():         # as they are, with nothing to rename
                break


@torch.no_grad()
def load_weights(module, path, dtype=None, device=None):
    """Load whatever weight_files takes, in the official or the diffusers/transformers layout, into the module in place;
    -> the file's config.

    The other layout goes through the module's own table `module.RENAMES`: (regex, replacement) pairs, all applied in
    order to each name; what is "a#0" and "a#1" then is one above the other in our a. All names may have a prefix in
    front, with other things beside them in the file, as long as one prefix alone has all that the module needs, and
    nothing more. What matches module.OPTIONAL may be missing and is zero then.
    dtype, device: the module takes these on (but what matches module.FLOAT32 keeps that precision), one tensor after
    the other: built on the meta device, a model is never in memory twice. Raises InputError naming the first missing,
    extra or misshapen keys, and what the file seems to be."""
    own, renames = module.state_dict(), getattr(module, "RENAMES", [])
    optional, float32 = (getattr(module, k, "^$") for k in ("OPTIONAL", "FLOAT32"))
    with open_weights(path) as (found, config):
        def shape(keys):
            shapes = [found[k][0] for k in keys]
            if len(shapes) == 1:
                return shapes[0]
            rest = {s[1:] for s in shapes}         # parts that differ in it are no parts
            return torch.Size((sum(s[0] if s else 1 for s in shapes), *(rest.pop() if len(rest) == 1 else ())))

        def lacking(names):
            return [f"missing {k}" for k in own if k not in names and not re.search(optional, k)] + [
                f"{k} is {tuple(shape(names[k]))}, expected {tuple(v.shape)}"
                for k, v in own.items() if k in names and shape(names[k]) != v.shape]

        layouts = list(_layouts(own, found, renames))
        fits = {prefix: names for prefix, names in layouts if not lacking(names)}
        if len(fits) > 1:
            raise InputError(f"{path} holds more than one {type(module).__name__}: "
                             f"{', '.join(f'{prefix}*' for prefix in fits)}; expected one alone")
        names = max(fits.values() or [names for _, names in layouts], default={},
                    key=lambda names: len(own.keys() & names.keys()))
        if wrong := lacking(names) + [f"unexpected {k}" for k in names if k not in own]:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise InputError(f"{path}{_guess(found)} does not fit {type(module).__name__}: "
                             f"{'; '.join(wrong[:3])}{more}")
        for key, old in own.items():
            parts = [found[k][1]() for k in names.get(key, ())]
            value = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.zeros(old.shape)
            if dtype is None and device is None and not old.is_meta:
                old.copy_(value)
                continue
            kind = old.dtype
            if dtype and old.is_floating_point():
                kind = torch.float32 if re.search(float32, key) else dtype
            where, _, name = key.rpartition(".")   # there alone: a large model has too many modules to visit each time
            module.get_submodule(where).load_state_dict(
                {name: value.to(device, kind, copy=True)}, strict=False, assign=True)
    return config


class Graphed:
    """A module of which a GPU replays a training pass, forward and backward, as CUDA graphs, recorded with the first
    inputs it gets: a small network's many small operations would have to wait for Python. Shapes must stay, gradients
    must not be summed over passes, and parameters change in place alone; in eval mode all is as ever."""
    def __init__(self, module):
        self.module, self.recorded = module, False

    def __call__(self, *inputs):
        inputs = [x for x in inputs if x is not None]                                # a plain DiT gets no tokens
        if self.module.training and not self.recorded:
            like = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                torch.cuda.make_graphed_callables(self.module, like, allow_unused_input=True)
            self.recorded = True
        return self.module(*inputs)


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest matrix whose singular values are all near 1 (Jordan et al. 2024), for kernels with any
    number of axes: each is a matrix to it, one row an output.

    Equal to torch.optim.Muon(adjust_lr_fn="match_rms_adamw") where bf16 is fast; matrices of one shape go together, and
    in fp32 where that is faster, which halves its time. The nano VAE reaches an error in 300 steps of it for which
    AdamW takes 1,100. Its update is scaled to AdamW's size, so both take the same learning rate and weight decay."""
    def __init__(self, kernels, lr, weight_decay, momentum=0.95):
        super().__init__(kernels, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        lr, decay, momentum = (self.param_groups[0][k] for k in ("lr", "weight_decay", "momentum"))
        alike = {}                                 # shape: [(kernel, what to make orthogonal, whether that lies down)]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                mean = self.state[p]["momentum_buffer"]
                mean.lerp_(p.grad, 1 - momentum)
                x = p.grad.lerp(mean, momentum).flatten(1)                             # Nesterov's look ahead
                tall = x.shape[0] > x.shape[1]
                x = x.mT if tall else x
                alike.setdefault(x.shape, []).append((p, x, tall))
        for (rows, columns), members in alike.items():
            x = torch.stack([x for _, x, _ in members]).to(precision(p.device))            # (K, rows, columns)
            x /= x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
            # Newton and Schulz: s -> 3.44 s - 4.78 s^3 + 2.03 s^5, five times
            poly = lambda gram: torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
            if columns < 2 * rows or x.dtype != torch.float32:
                for _ in range(5):
                    x = torch.baddbmm(x, poly(x @ x.mT), x, beta=3.4445)
            else:                                  # all steps are factors on the left that commute: small squares do
                one = torch.eye(rows, device=x.device).expand(len(x), -1, -1)         # (bf16 would be too coarse)
                gram, factor = x @ x.mT, one
                for _ in range(5):
                    f = poly(gram) + 3.4445 * one
                    gram, factor = f @ gram @ f, f @ factor
                x = factor @ x
            for (p, _, tall), y in zip(members, x):
                y = (y.mT if tall else y).reshape(p.shape)
                p.mul_(1 - lr * decay).add_(y, alpha=-0.2 * lr * math.sqrt(columns))


class EMA:
    """An exponential moving average of a module's trainable parameters; its state is `shadow`, {name: fp32 tensor}."""
    def __init__(self, module, decay=0.999):
        self.decay = decay
        self.shadow = {k: p.detach().float().clone() for k, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module, step):
        """After optimizer step number `step` (from 0). Early averages are short: they must forget the random start."""
        decay, parameters = min(self.decay, (1 + step) / (10 + step)), dict(module.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [parameters[k].float() for k in self.shadow], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module):
        parameters = dict(module.named_parameters())
        for k, value in self.shadow.items():
            parameters[k].copy_(value)

    @contextlib.contextmanager
    def applied(self, module):
        """with ema.applied(model): the module has the averaged weights; afterwards its own are back, bit by bit."""
        own = {k: p.detach().clone() for k, p in module.named_parameters() if k in self.shadow}
        try:
            self.copy_to(module)
            yield
        finally:
            with torch.no_grad():
                for k, p in module.named_parameters():
                    if k in own:
                        p.copy_(own[k])


def unshard(tensor):
    """A tensor that is sharded over the ranks (FSDP2) -> all of it on rank 0's CPU, None on the others; every rank must
    call. Other tensors stay as they are."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    whole = tensor.full_tensor()                   # of a training state eight ranks' copies would be hundreds of GB
    return None if rank() else whole.cpu()


def shard_like(tensor, value):
    """Cut a whole tensor into shards as `tensor` is, if that is sharded."""
    if not hasattr(tensor, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor                           # a second to import
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


def save_state(path, step, modules, *optimizers):
    """Everything a run needs to go on bit-exactly: {name: module or dict of tensors}, optimizers, step. No pickle.

    Every rank calls, rank 0 writes."""
    tensors = {f"{name}/{k}": unshard(v) for name, m in modules.items()
               for k, v in (m.state_dict() if isinstance(m, torch.nn.Module) else m).items()}
    for n, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{n}/{i}/{k}": unshard(v) for k, v in state.items()}
    if rank() == 0:
        save_weights(path, tensors, {"step": step})


@torch.no_grad()
def load_state(path, modules, *optimizers):
    """The inverse of save_state, in place; -> step, 0 if there is none yet. Raises InputError if it misfits."""
    if not os.path.exists(path):
        return 0
    with open_weights(path) as (found, config):    # one tensor after the other: whole, a state is three models
        if "step" not in config:
            raise InputError(f"{path} is not a training state; expected a state.safetensors of a run folder")
        read = lambda start: {k.removeprefix(start): later for k, (_, later) in found.items() if k.startswith(start)}
        try:
            for name, m in modules.items():
                part = read(f"{name}/")
                if isinstance(m, torch.nn.Module):
                    m.load_state_dict({k: later() for k, later in part.items()})
                else:
                    assert part.keys() == m.keys(), f"{name} has other keys"
                    for k, v in m.items():
                        v.copy_(shard_like(v, part[k]()))
            for n, optimizer in enumerate(optimizers):
                state, owners = {}, [p for group in optimizer.param_groups for p in group["params"]]
                for key, later in read(f"optimizer{n}/").items():
                    (i, k), value = key.split("/"), later()
                    state.setdefault(int(i), {})[k] = shard_like(owners[int(i)], value) if value.dim() else value
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        except (RuntimeError, AssertionError, ValueError, KeyError, IndexError) as error:
            raise InputError(f"{path} belongs to another configuration: {str(error).splitlines()[0]}") from None
    return config["step"]


# ----------------------------------------------------------------------------------------------------------------------
# media: uint8 (T, H, W, 3) at file boundaries, float (C, T, H, W) in [-1, 1] in memory

def to_bytes(x):
    """float in [-1, 1] -> uint8, of any shape."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def from_bytes(x):
    """uint8 -> float in [-1, 1], of any shape."""
    return x.float() / 127.5 - 1


def to_uint8(video):
    """float (3, T, H, W) in [-1, 1] -> uint8 array (T, H, W, 3)."""
    return to_bytes(video).permute(1, 2, 3, 0).cpu().numpy()


def to_float(frames):
    """uint8 array (..., T, H, W, 3) -> float (..., 3, T, H, W) in [-1, 1]."""
    return from_bytes(torch.as_tensor(frames).movedim(-1, -4))


def read_image(path, size):
    """PNG, JPEG or WebP of any mode -> (float (3, height, width) in [-1, 1], a note on what was cropped or "").

    size: pixels a side, or (height, width). EXIF orientation is applied, transparency is put on white, the largest
    centre part of that aspect ratio is taken and resized (Lanczos).
    Raises InputError if the file is missing, broken, no image, or has a side outside 16..8192."""
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; expected one PNG, JPEG or WebP image")
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; expected a PNG, JPEG or WebP image")
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            w, h = image.size
            if not (16 <= w <= 8192 and 16 <= h <= 8192):
                raise InputError(f"{path} is {w}x{h} pixels; expected sides of 16 to 8192")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":                        # 16 bits of grey to 8
                image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).round().astype(np.uint8))
            image = image.convert("RGBA")
    except InputError:
        raise
    except Exception as error:                     # a broken file, or its EXIF, raises whatever it likes
        why = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{path} is not a readable PNG, JPEG or WebP image: {why}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    (w, h), (height, width) = image.size, (size, size) if isinstance(size, int) else size
    kept = min(w, round(h * width / height)), min(h, round(w * height / width))
    note = f"centre-cropped from {w}x{h} to {kept[0]}x{kept[1]}" if kept != (w, h) else ""
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return to_float(np.array(image)[None])[:, 0], note                               # (3, height, width)


VIDEO_EXTENSIONS = (".mp4", ".gif", ".webp")


def fit(frames, size):
    """uint8 (T, H, W, 3) -> (T, height, width, 3): the centre, resized (Lanczos). size as in read_image."""
    height, width = (size, size) if isinstance(size, int) else size
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([np.asarray(ImageOps.fit(Image.fromarray(f), (width, height), Image.Resampling.LANCZOS))
                     for f in frames])


def write_video(path, frames, fps, scale=1, lossless=False):
    """uint8 (T, H, W, 3) -> mp4, gif or webp by extension. scale: integer enlargement, nearest neighbour.

    lossless: an mp4 in RGB, exact for data; browsers want the usual one."""
    frames = np.asarray(frames).repeat(scale, 1).repeat(scale, 2)
    extension = os.path.splitext(path)[1].lower()
    if extension not in VIDEO_EXTENSIONS:
        raise InputError(f"cannot write {path}: expected a name that ends in {', '.join(VIDEO_EXTENSIONS)}")
    with atomic(path) as tmp:
        if extension == ".mp4":
            if not lossless:                       # yuv420p has a colour for every 2 x 2 pixels
                frames = np.pad(frames, ((0, 0), *((0, n % 2) for n in frames.shape[1:3]), (0, 0)), mode="edge")
            with open(tmp, "wb"):
                pass                                                                   # a missing folder fails here
            # x264 with one thread: the same frames give the same bytes. Imageio would not say what ffmpeg cannot do
            codec, pixels, quality = ("libx264rgb", "rgb24", "0") if lossless else ("libx264", "yuv420p", "12")
            done = subprocess.run(
                [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
                 "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-r", str(fps), "-i", "-", "-vcodec", codec,
                 "-pix_fmt", pixels, "-crf", quality, "-threads", "1", tmp],
                input=np.ascontiguousarray(frames).tobytes(), capture_output=True)
            if done.returncode:
                why = (done.stderr.decode(errors="replace").strip() or "ffmpeg failed").splitlines()[0]
                raise InputError(f"cannot write {path}: {why}")
        else:
            images = [Image.fromarray(f) for f in frames]
            images[0].save(tmp, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0,
                           **({"lossless": True} if extension == ".webp" else {}))


def _pictures(path):
    """A GIF or WebP -> uint8 (T, H, W, 3), frames a second. A frame that lasts twice as long as the shortest is two:
    writers merge those that are alike."""
    with Image.open(path) as film:
        frames = [(np.asarray(f.convert("RGB")), f.info.get("duration") or 100) for f in ImageSequence.Iterator(film)]
    shortest = min(lasts for _, lasts in frames)                                     # ms
    times = [max(1, round(lasts / shortest)) for _, lasts in frames]
    return np.concatenate([f[None].repeat(n, 0) for (f, _), n in zip(frames, times)]), 1000 / shortest


def read_video(path, most=None):
    """A GIF, a WebP or any video that imageio reads -> uint8 (T, H, W, 3); of a long one the first `most` frames."""
    if path.lower().endswith((".gif", ".webp")):
        return _pictures(path)[0][:most]
    with imageio.get_reader(path) as reader:
        return np.stack([frame[..., :3] for frame in itertools.islice(reader, most)])


def frame_rate(path):
    """Frames a second of a video file, as it says itself. Raises InputError if it does not."""
    if path.lower().endswith((".gif", ".webp")):
        return _pictures(path)[1]
    with imageio.get_reader(path) as reader:
        fps = reader.get_meta_data().get("fps")
    if not fps:
        raise InputError(f"{path} does not say its frame rate; expected \"fps\" in its line of clips.jsonl")
    return fps


def sheet(videos, every=1):
    """Contact sheet: list of uint8 (T, H, W, 3) -> uint8 (rows, width, 3); a clip a row, every n-th frame a column."""
    rows = [np.concatenate(list(v[::every]), axis=1) for v in videos]
    return np.concatenate(rows, axis=0)


def write_image(path, image):
    """uint8 (H, W, 3) -> PNG."""
    with atomic(path) as tmp:
        Image.fromarray(image).save(tmp)


def grid(videos, columns):
    """List of uint8 (T, H, W, 3) -> one uint8 video with `columns` clips a row, black where none is left."""
    videos = list(videos) + [np.zeros_like(videos[0])] * (-len(videos) % columns)
    rows = [np.concatenate(videos[i:i + columns], axis=2) for i in range(0, len(videos), columns)]
    return np.concatenate(rows, axis=1)
