"""What gpt2.py needs around the model: download it, check it, map it into memory; run a function as a command.

Whatever goes wrong on the way (a dropped connection, a full disk, a damaged file, kill -9), nothing is left behind that
the next run would wrongly trust. ValueError and OSError carry one line that says what to do, and run() prints it.
"""

import contextlib
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np

URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # or what GPT2_MODELS_URL in the environment says
RELEASED = {"124M": 498, "355M": 1419, "774M": 3096, "1558M": 6230}  # megabytes
DATA = ".data-00000-of-00001"
FILES = ["encoder.json", "vocab.bpe", "hparams.json", "checkpoint", "model.ckpt.index", "model.ckpt" + DATA]
SHA256 = {  # the same for all sizes; fetched first, so a server that sends something else is found out at once
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# ---- Download -------------------------------------------------------------------------------------------------------


def is_whole(path):
    """Is this file there? The data file, or its part, must also have the size that follows from hparams.json."""
    if not path.name.startswith(FILES[-1]):
        return path.exists()
    shapes = tensor_shapes(load_hparams(path.parent))
    return path.exists() and path.stat().st_size >= sum(4 * math.prod(shape) for shape in shapes.values())


def download_gpt2_files(model_size, model_dir):
    """Fetch the files of a released model that model_dir lacks. Raises OSError: no network, no such file, no space."""
    url = f"{(os.environ.get('GPT2_MODELS_URL') or URL).rstrip('/')}/{model_size}"
    model_dir, paths = Path(model_dir), [Path(model_dir) / name for name in FILES]
    if all(map(is_whole, paths)):
        return
    print(f"fetching {model_size}, {RELEASED[model_size]} MB, from {url} to {model_dir}", file=sys.stderr, flush=True)
    model_dir.mkdir(parents=True, exist_ok=True)
    with open(model_dir / ".lock", "w") as lock:
        with contextlib.suppress(ImportError, OSError):  # Windows has no such lock, nor has every network disk
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # wait for another run that fetches; the lock of a killed run is lifted
        for path in itertools.filterfalse(is_whole, paths):  # hparams.json comes before the data file
            download(f"{url}/{path.name}", path)


def download(url, path):
    """Fetch url into path. A file that is not whole yet is named path.part, and the next try or run continues it."""
    import requests
    from urllib3.exceptions import MaxRetryError

    part = Path(f"{path}.part")
    if path.exists():  # the data file, of which another program has left only the beginning: go on from there
        path.replace(part)
    for tries in range(1, 6):
        try:
            fetch(url, part)
            break
        except requests.RequestException as error:
            cause = error
            while cause.__context__:  # the first cause says it in plain words: "Connection refused"
                cause = cause.__context__
            reason = getattr(cause, "strerror", None) or cause
            if tries == 5 or isinstance(error.args[0], MaxRetryError):  # that is: no connection at all
                hint = "run again to go on where it stopped (--model_size 2M works without a network)"
                raise OSError(f"cannot fetch {url}: {reason}; {hint}") from None
            print(f"{url}: {reason}; trying again ({tries + 1} of 5)", file=sys.stderr, flush=True)
            time.sleep(2**tries / 8)  # seconds
    has_sha256 = path.name not in SHA256 or hashlib.sha256(part.read_bytes()).hexdigest() == SHA256[path.name]
    if not has_sha256 or not is_whole(part):
        part.unlink()
        raise OSError(f"{url} is some other file (it is too short, or its SHA-256 is not that of OpenAI's)")
    part.replace(path)


def fetch(url, part):
    """Append the rest of url to what is in the file part. Raises requests.RequestException if that did not work."""
    import requests
    from tqdm import tqdm

    size = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={size}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 15)) as response:  # seconds to connect, to read
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        match = re.fullmatch(rf"bytes {size}-\d+/(\d+)", content_range)
        if status == 416 and content_range == f"bytes */{size}":
            return  # nothing comes after these bytes: the file is whole
        if status == 206 and match:  # what was asked for
            total = int(match[1])
        elif status == 200:  # the whole file: this server knows no ranges
            size, total = 0, int(response.headers.get("Content-Length", 0))  # 0: it does not say
        else:
            if status == 416:  # there is more than the file has: begin again
                part.unlink(missing_ok=True)
            raise requests.HTTPError(f"HTTP status {status} {content_range}".rstrip())
        bar = tqdm(desc=part.stem, total=total, initial=size, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if size else "wb") as f:
            for chunk in response.iter_content(2**14):
                bar.update(f.write(chunk))
            if total and f.tell() != total:
                raise requests.HTTPError(f"{f.tell()} bytes came, of {total}")


# ---- Check and map --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path):
    """Turn whatever goes wrong while a file is read into one error that names it and says what to do."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        mend = "if it is damaged, put a good copy in its place (a released model: delete it, the next run fetches it)"
        raise ValueError(f"cannot read {path} ({type(error).__name__}: {error}); {mend}") from None


def load_hparams(model_dir):
    """hparams.json: n_vocab, n_ctx, n_embd, n_head and n_layer. Raises ValueError."""
    with reading(model_dir / "hparams.json"):
        hparams = json.loads((model_dir / "hparams.json").read_bytes())
        sizes = [hparams[key] for key in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")]
        if not all(type(size) is int and 0 < size < 10**6 for size in sizes) or hparams["n_embd"] % hparams["n_head"]:
            raise ValueError(f"{hparams} makes no sense")
    return hparams


def tensor_shapes(hparams):
    """{name in the checkpoint: shape} for all tensors of a model, in the order in which a data file holds them."""
    n = hparams["n_embd"]
    weights = {"attn/c_attn": (n, 3 * n), "attn/c_proj": (n, n), "mlp/c_fc": (n, 4 * n), "mlp/c_proj": (4 * n, n)}
    block = {f"{name}/w": shape for name, shape in weights.items()}
    block |= {f"{name}/b": shape[1:] for name, shape in weights.items()}
    block |= {"ln_1/g": (n,), "ln_1/b": (n,), "ln_2/g": (n,), "ln_2/b": (n,)}
    shapes = {"wte": (hparams["n_vocab"], n), "wpe": (hparams["n_ctx"], n), "ln_f/g": (n,), "ln_f/b": (n,)}
    shapes |= {f"h{i}/{name}": shape for i in range(hparams["n_layer"]) for name, shape in block.items()}
    return {f"model/{name}": shapes[name] for name in sorted(shapes)}


def read_through_tensorflow(tf_ckpt_path, hparams):
    """Yield (name, tensor) for each tensor, verified by its checksum. Raises ValueError or ImportError."""
    with contextlib.ExitStack() as at_end:
        at_end.callback(os.dup2, os.dup(2), 2)  # puts standard error back
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # TensorFlow writes to standard error from C++
        try:
            import tensorflow as tf
        except ImportError as error:
            wheels = "it exists for 64-bit Linux with glibc, macOS on ARM and Windows on x86-64"
            raise ImportError(f"the first run of a model needs tensorflow ({wheels}): {error}") from None
        with reading(f"{tf_ckpt_path}.index or {DATA}"):
            reader = tf.train.load_checkpoint(tf_ckpt_path)
            found = reader.get_variable_to_shape_map()
            if f"model/h{hparams['n_layer']}/ln_1/b" in found:
                raise ValueError("it has more layers than hparams.json says")
            for name, shape in tensor_shapes(hparams).items():
                if found.get(name) not in ([*shape], [1, *shape]):  # the file may have an extra axis
                    raise ValueError(f"{name} has the shape {found.get(name)}, by hparams.json it is {[*shape]}")
                yield name, reader.get_tensor(name).astype(np.float32, copy=False).reshape(shape)


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """The weights, a nested dict of float32 arrays: params["blocks"][3]["attn"]["c_attn"]["w"].

    They are mapped into memory and not read, which takes no time. The first run verifies them through TensorFlow and
    notes the sizes and times of the files; later runs skip that. A checkpoint with more in it, or in another order, is
    read through TensorFlow every time. Raises ValueError or OSError.
    """
    data, note = Path(tf_ckpt_path + DATA), Path(tf_ckpt_path + ".checked.json")
    shapes, mapped, others = tensor_shapes(hparams), {}, {}
    stats = [os.stat(path) for path in (data, tf_ckpt_path + ".index")]
    checked = json.dumps([[(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats], [*shapes.items()]])
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    if stats[0].st_size == 4 * ends[-1]:
        floats = np.split(np.memmap(data, "<f4", "r").view(np.ndarray), ends[:-1])
        mapped = {name: part.reshape(shapes[name]) for name, part in zip(shapes, floats)}
    if not note.exists() or note.read_bytes() != checked.encode():
        print(f"checking {data.parent.name} …", file=sys.stderr, flush=True)
        found = read_through_tensorflow(tf_ckpt_path, hparams)
        others = {name: tensor for name, tensor in found if not np.array_equal(tensor, mapped.get(name))}
        try:
            note.write_text("" if others else checked)  # "": the next run reads through TensorFlow again
        except OSError as error:
            print(f"(this comes every time, because {note} cannot be written: {error.strerror})", file=sys.stderr)
    params = {"blocks": [{} for _ in range(hparams["n_layer"])]}
    for name, tensor in (mapped | others).items():
        _, *keys, last = name.split("/")  # model/h3/attn/c_attn/w
        inner = params
        for key in keys:
            inner = params["blocks"][int(key[1:])] if key[0] == "h" else inner.setdefault(key, {})
        inner[last] = tensor
    np.empty(8_000_000, np.float32)  # freeing 32 MB makes glibc reuse blocks up to that size: prefill takes 5-15 % less
    return params


def load_encoder_hparams_and_params(model_size="124M", models_dir=None):
    """The model in models_dir; a released one is downloaded first. Raises ValueError, OSError or ImportError."""
    from encoder import get_encoder

    models_dir = Path(models_dir or Path(__file__).resolve().parent / "models")  # beside this file
    model_dir = models_dir / model_size
    if model_size in RELEASED:
        download_gpt2_files(model_size, model_dir)
    elif not (model_dir / "checkpoint").exists():
        there = ", ".join(sorted(path.parent.name for path in models_dir.glob("*/checkpoint"))) or "none"
        raise ValueError(f"no model {model_size!r} in {models_dir}; there: {there}; to fetch: {', '.join(RELEASED)}")
    with reading(model_dir / "checkpoint"):  # its first line: model_checkpoint_path: "model.ckpt"
        prefix = Path((model_dir / "checkpoint").read_text("utf-8").split('"')[1]).name
    hparams = load_hparams(model_dir)
    params = load_gpt2_params_from_tf_ckpt(str(model_dir / prefix), hparams)
    with reading(model_dir / "encoder.json, vocab.bpe or hparams.json"):
        encoder = get_encoder(model_size, models_dir)
        if len(encoder.encoder) != hparams["n_vocab"]:
            raise ValueError(f"{len(encoder.encoder)} tokens, by hparams.json it should be {hparams['n_vocab']}")
    return encoder, hparams, params


# ---- Run ------------------------------------------------------------------------------------------------------------


def check_options(**options):
    """Convert options to numbers; None stays None. Raises ValueError if one is out of range."""
    ranges = {  # name: (type, lowest, highest)
        "n_tokens_to_generate": (int, 1, 10**9), "batch_size": (int, 1, 10**9), "seed": (int, 0, 10**20),
        "temperature": (float, 0, 10**9), "top_k": (int, 0, 10**9), "top_p": (float, 1e-9, 1),
    }  # fmt: skip
    for name, value in options.items():
        (kind, low, high), number = ranges[name], math.nan  # nan is in no range
        if value is not None:
            with contextlib.suppress(ValueError):
                number = kind(str(value))  # by way of text, since int(1.5) is 1 but int("1.5") is an error
            if not low <= number <= high:
                what = "a whole number" if kind is int else "a number"
                raise ValueError(f"{name} must be {what} from {low} to {high}, not {value!r}")
            options[name] = number
    return options


def read_prompts(lines):
    """Yield each of the lines, which are bytes, as text without its end. Raises ValueError for one not in UTF-8."""
    for number, data in enumerate(lines, 1):
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt {number} is not UTF-8 text: {error}") from None
        yield text.removesuffix("\n").removesuffix("\r")


def ask(answer):
    """Call answer([line], number) for each line typed, until Ctrl-D. Ctrl-C stops an answer or drops what is typed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and a history)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("Type the beginning of a text. Ctrl-C stops what follows, Ctrl-D ends.", file=sys.stderr)
    for number in itertools.count():
        try:
            answer([input("> " if sys.stdout.isatty() else "")], number)  # only text goes to a file
        except EOFError:
            return print(file=sys.stderr)
        except (KeyboardInterrupt, ValueError) as error:
            print(f"error: {error}" if str(error) else "", file=sys.stderr)


def run(function):
    """Run a function as a command: fire parses the arguments, which reach it as typed; mistakes end in one line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the command by the signal, so a shell loop ends with it
    calls = []
    # fire calls a function before it sees an unknown flag, so what it calls is a stand-in
    stand_in = functools.wraps(function)(lambda *args, **options: calls.append((args, options)))
    try:
        from fire import Fire, parser

        parser.DefaultParseValue = str  # no "1,2" that becomes a tuple
        # What follows "--" is for fire itself. For fire a lone "-" ends the arguments, but it may be a prompt. So its
        # place is given to --help, which cannot be among the arguments here.
        arguments = [*sys.argv[1:], "--", "--separator=--help"]
        if {"-h", "--help"} & set(sys.argv[1:]):
            arguments, sys.stderr = ["--", "--help"], sys.stdout  # where a pager can take it
        Fire(stand_in, arguments)
        [(args, options)] = calls
        for flag, value in itertools.pairwise(arguments):
            if re.fullmatch("-[a-z]|--[a-z_-]+", flag) and re.match("-[a-z-]", value):
                raise ValueError(f"{flag} needs a value")  # fire made it "True"
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another one
        result = function(*args, **options)
        if result is not None:
            print(result)
        sys.stdout.flush()
        gc.freeze()  # Python need not look for garbage when it ends: 40 ms
    except (ImportError, MemoryError, OSError, ValueError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drop unwritten text; 141 is 128 + SIGPIPE
        hint = "; pip install -r requirements.txt" if isinstance(error, ImportError) else ""
        sys.exit(141 if isinstance(error, BrokenPipeError) else f"error: {' '.join(str(error).split())}{hint}")
