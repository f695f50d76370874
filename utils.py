"""What gpt2.py needs around the model: download it, check it, map it into memory; run a function as a command.

Whatever goes wrong on the way (a dropped connection, a full disk, a damaged file, kill -9), nothing is left behind that
the next run would wrongly trust. ValueError and OSError carry one line that says what to do, and run() prints it.
"""

import codecs
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
MODELS_DIR = Path(__file__).resolve().parent / "models"
RELEASED = {"124M": 498, "355M": 1419, "774M": 3096, "1558M": 6230}  # megabytes
DATA = ".data-00000-of-00001"
FILES = ["encoder.json", "vocab.bpe", "hparams.json", "checkpoint", "model.ckpt.index", "model.ckpt" + DATA]
SHA256 = {  # the same for all sizes; fetched first, so a server that sends something else is found out at once
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
TRIES = 5  # for one file, as long as nothing of it arrives

# ---- Download -------------------------------------------------------------------------------------------------------


def missing_files(model_dir):
    """The names of the FILES that are not there, or of the data file if it is too short."""
    names = [name for name in FILES if not (model_dir / name).exists()]
    if not names and size_of(model_dir / FILES[-1]) < n_bytes(tensor_shapes(load_hparams(model_dir))):
        names = FILES[-1:]
    return names


def download_gpt2_files(model_size, model_dir):
    """Fetch the files of a released model that model_dir lacks. Raises OSError: no network, no such file, no space."""
    model_dir, url = Path(model_dir), (os.environ.get("GPT2_MODELS_URL") or URL).rstrip("/") + f"/{model_size}"
    model_dir.mkdir(parents=True, exist_ok=True)
    with locked(model_dir):
        names = missing_files(model_dir)
        if names:
            print(f"fetching {model_size}, {RELEASED[model_size]} MB, from {url}", file=sys.stderr, flush=True)
        for name in names:
            path, part = model_dir / name, model_dir / f"{name}.part"
            if path.exists():  # it is too short: go on from there
                path.replace(part)
            download(f"{url}/{name}", part)
            if name in SHA256 and hashlib.sha256(part.read_bytes()).hexdigest() != SHA256[name]:
                part.unlink()
                raise OSError(f"{url}/{name} is some other file (its SHA-256 is not that of OpenAI's)")
            part.replace(path)


@contextlib.contextmanager
def locked(folder):
    """Let one run at a time into a folder; another one waits. The system lifts the lock of a run that is killed."""
    if os.name != "posix":
        return (yield)  # Windows has no such lock
    import fcntl

    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that fetches {folder}", file=sys.stderr, flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def download(url, part):
    """Fetch url into the file part, going on where an earlier try or run stopped."""
    import requests
    from urllib3.exceptions import MaxRetryError

    tries = furthest = 0
    while True:
        try:
            return fetch(url, part, size_of(part))
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            cause = error
            while cause.__context__:  # the first cause says it in plain words: "Connection refused"
                cause = cause.__context__
            reason = getattr(cause, "strerror", None) or cause
            if isinstance(error.args[0], MaxRetryError):
                raise OSError(f"cannot reach {url}: {reason}; --model_size 2M works without a network") from None
        except requests.RequestException:
            raise
        except OSError as error:
            raise OSError(f"{part}: {error.strerror}; what has arrived is kept, run again to go on") from None
        if size_of(part) > furthest:  # while more and more arrives there is no reason to give up
            tries, furthest = 0, size_of(part)
        tries += 1
        if tries == TRIES:
            raise OSError(f"cannot fetch {url}: {reason}; what has arrived is kept, run again to go on")
        print(f"{url}: {reason}; trying again ({tries + 1} of {TRIES})", file=sys.stderr, flush=True)
        time.sleep(2**tries / 8)  # seconds


def fetch(url, part, size):
    """Append the bytes of url from size on to part. ConnectionError means: try again, HTTPError: it is no use."""
    import requests
    from tqdm import tqdm

    headers = {"Range": f"bytes={size}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 15)) as response:  # seconds to connect, to read
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        match = re.fullmatch(rf"bytes {size}-\d+/(\d+)", content_range)
        if status == 416 and content_range == f"bytes */{size}":
            return  # nothing comes after these bytes: the file is complete
        if status == 416 and size:
            part.unlink()
        if status == 200:  # the whole file: this server knows no ranges
            size, total = 0, int(response.headers.get("Content-Length", 0))  # 0: it does not say
        elif status == 206 and match:  # what was asked for
            total = int(match[1])
        elif status in (206, 416) or status >= 500:
            raise requests.ConnectionError(f"HTTP status {status} {content_range}")
        else:
            raise requests.HTTPError(f"cannot fetch {url}: HTTP status {status}")
        bar = tqdm(desc=part.stem, total=total, initial=size, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if size else "wb") as f:
            for chunk in response.iter_content(2**14):
                bar.update(f.write(chunk))
    size = part.stat().st_size
    if total and size > total:
        part.unlink()
    if total and size != total:
        raise requests.ConnectionError(f"{size} bytes came, of {total}")


# ---- Check and map --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path):
    """Turn whatever goes wrong while a file is read into one line that names it and says what to do."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = str(error).split("\n")[0]
        mend = "put a good copy in its place (a released model: delete it, and the next run fetches it)"
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__}: {reason}); {mend}") from None


def load_hparams(model_dir):
    """hparams.json: n_vocab, n_ctx, n_embd, n_head and n_layer. Raises ValueError."""
    with reading(model_dir / "hparams.json"):
        hparams = json.loads((model_dir / "hparams.json").read_bytes())
        sizes = [hparams[key] for key in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")]
        if not all(type(size) is int and 0 < size < 10**6 for size in sizes) or hparams["n_embd"] % hparams["n_head"]:
            raise ValueError(f"{hparams} makes no sense")
    return hparams


def tensor_shapes(hparams):
    """{name in the checkpoint: shape} for all tensors of a model."""
    n_embd = hparams["n_embd"]
    block = {f"{norm}/{key}": (n_embd,) for norm in ("ln_1", "ln_2") for key in "gb"}
    for name, n_in, n_out in ("attn/c_attn", 1, 3), ("attn/c_proj", 1, 1), ("mlp/c_fc", 1, 4), ("mlp/c_proj", 4, 1):
        block |= {f"{name}/w": (n_in * n_embd, n_out * n_embd), f"{name}/b": (n_out * n_embd,)}
    shapes = {f"model/h{i}/{name}": shape for i in range(hparams["n_layer"]) for name, shape in block.items()}
    shapes |= {"model/wte": (hparams["n_vocab"], n_embd), "model/wpe": (hparams["n_ctx"], n_embd)}
    return shapes | {"model/ln_f/g": (n_embd,), "model/ln_f/b": (n_embd,)}


def n_bytes(shapes):
    return 4 * sum(math.prod(shape) for shape in shapes.values())  # float32


def map_data(path, shapes):
    """The tensors as views of a data file that holds only these, in the order of their names. Nothing is read."""
    floats, tensors, start = np.memmap(path, "<f4", "r").view(np.ndarray), {}, 0
    for name, shape in sorted(shapes.items()):
        tensors[name] = floats[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return tensors


@contextlib.contextmanager
def no_stderr():
    """Silence file descriptor 2: TensorFlow writes to it from C++."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def read_through_tensorflow(tf_ckpt_path, shapes):
    """Yield (name, tensor) for each tensor, verified by its checksum."""
    with no_stderr():
        try:
            import tensorflow as tf
        except ImportError as error:
            wheels = "it exists for 64-bit Linux with glibc, macOS on ARM and Windows on x86-64"
            raise ImportError(f"the first run of a model needs tensorflow ({wheels}): {error}") from None
        with reading(f"{tf_ckpt_path}.index or {DATA}"):
            reader = tf.train.load_checkpoint(tf_ckpt_path)
            found = reader.get_variable_to_shape_map()
            beyond = f"model/h{sum(name.endswith('/ln_1/b') for name in shapes)}/ln_1/b"
            if beyond in found:
                raise ValueError(f"{beyond} is a layer more than in hparams.json")
            for name, shape in shapes.items():
                if found.get(name) not in ([*shape], [1, *shape]):  # the file may have an extra axis
                    raise ValueError(f"{name} has the shape {found.get(name)}, by hparams.json it is {[*shape]}")
                yield name, reader.get_tensor(name).astype(np.float32, copy=False).reshape(shape)


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """The weights, a nested dict of float32 arrays: params["blocks"][3]["attn"]["c_attn"]["w"].

    They are mapped into memory and not read, which takes no time. The first run verifies them through TensorFlow and
    notes the sizes and times of the files; later runs skip that. A checkpoint with more in it, or in another order, is
    read through TensorFlow every time. Raises ValueError or OSError.
    """
    shapes, data, note = tensor_shapes(hparams), Path(tf_ckpt_path + DATA), Path(tf_ckpt_path + ".checked.json")
    with reading(data):
        stats = [os.stat(path) for path in (data, tf_ckpt_path + ".index")]
        if stats[0].st_size < n_bytes(shapes):
            raise ValueError(f"{stats[0].st_size} bytes, by hparams.json it should be {n_bytes(shapes)}")
    checked = json.dumps([[(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats], sorted(shapes.items())])
    tensors, noted = map_data(data, shapes) if stats[0].st_size == n_bytes(shapes) else {}, ""
    with contextlib.suppress(OSError, ValueError):
        noted = note.read_text("utf-8")
    if not tensors or noted != checked:
        print(f"checking {data.parent.name} …", file=sys.stderr, flush=True)
        is_mapped = bool(tensors)
        for name, tensor in read_through_tensorflow(tf_ckpt_path, shapes):
            if name not in tensors or not np.array_equal(tensor, tensors[name]):
                tensors[name], is_mapped = tensor, False
        try:
            note.write_text(checked if is_mapped else "")
        except OSError as error:
            print(f"(this comes every time, because {note} cannot be written: {error.strerror})", file=sys.stderr)
    params = {"blocks": [{} for _ in range(hparams["n_layer"])]}
    for name, tensor in tensors.items():
        _, *keys, last = name.split("/")  # model/h3/attn/c_attn/w
        inner = params
        for key in keys:
            inner = params["blocks"][int(key[1:])] if key[0] == "h" else inner.setdefault(key, {})
        inner[last] = tensor
    np.empty(8_000_000, np.float32)  # freed at once; after that glibc keeps freed arrays for reuse: prefill -5 to -15 %
    return params


def load_encoder_hparams_and_params(model_size="124M", models_dir=None):
    """The model in models_dir (by default the folder models beside this file); a released one is downloaded first.

    Raises ValueError, OSError or ImportError.
    """
    from encoder import get_encoder

    models_dir = Path(models_dir or MODELS_DIR)
    model_dir, there = models_dir / model_size, sorted(path.parent.name for path in models_dir.glob("*/checkpoint"))
    if model_size in RELEASED:
        download_gpt2_files(model_size, model_dir)
    elif model_size not in there:
        known = f"there are {', '.join(there) or 'none'}; {', '.join(RELEASED)} can be fetched"
        raise ValueError(f"no model {model_size!r} in {models_dir}: {known}")
    with reading(model_dir / "checkpoint"):
        text = (model_dir / "checkpoint").read_text("utf-8")
        tf_ckpt_path = model_dir / Path(re.search(r'^model_checkpoint_path: "(.+)"', text, re.MULTILINE)[1]).name
    hparams = load_hparams(model_dir)
    params = load_gpt2_params_from_tf_ckpt(str(tf_ckpt_path), hparams)
    with reading(model_dir / "encoder.json or vocab.bpe"):
        encoder = get_encoder(model_size, models_dir)
        if len(encoder.encoder) != hparams["n_vocab"]:
            raise ValueError(f"{len(encoder.encoder)} tokens, by hparams.json it should be {hparams['n_vocab']}")
    return encoder, hparams, params


# ---- Run ------------------------------------------------------------------------------------------------------------

OPTIONS = {  # name: (type, lowest, highest)
    "n_tokens_to_generate": (int, 1, math.inf), "batch_size": (int, 1, math.inf), "temperature": (float, 0, 1e9),
    "top_k": (int, 0, math.inf), "top_p": (float, 1e-9, 1), "seed": (int, 0, math.inf),
}  # fmt: skip


def check_options(**options):
    """Convert options to numbers; None stays None. Raises ValueError if one is out of range."""
    for name in options.keys() & OPTIONS.keys():
        (kind, low, high), value = OPTIONS[name], options[name]
        if value is None:
            continue
        try:
            options[name] = kind(str(value))  # by way of text, since int(1.5) is 1 but int("1.5") is an error
        except ValueError:
            options[name] = math.nan  # which is in no range
        if not low <= options[name] <= high:
            number = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} must be {number} from {low} to {high}, not {value!r}")
    return options


def read_prompts(path, whole=False):
    """Yield the lines of a file ("-": standard input) without their ends, or the whole of it as one prompt."""
    with open(0 if path == "-" else path, "rb") as f:
        for number, data in enumerate([f.read()] if whole else f, 1):
            try:
                text = data.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"prompt {number} is not UTF-8 text: {error}") from None
            yield text.removesuffix("\n").removesuffix("\r")


def ask(answer):
    """Call answer(number, line) for each line typed, until Ctrl-D. Ctrl-C stops an answer or drops what is typed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and a history)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("Type the beginning of a text. Ctrl-C stops what follows, Ctrl-D ends.", file=sys.stderr)
    question = "> " if sys.stdout.isatty() else ""  # only text goes to a file
    for number in itertools.count():
        try:
            answer(number, input(question))
        except EOFError:
            return print(file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def run(function):
    """Run a function as a command: fire parses the arguments, which reach it as typed; mistakes end in one line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the command by the signal, so a shell loop ends with it
    calls = []

    @functools.wraps(function)
    def note(*args, **options):  # fire calls a function before it sees an unknown flag, so what it calls is a stand-in
        calls.append((args, options))

    try:
        from fire import Fire, parser

        parser.DefaultParseValue = str  # no "1,2" that becomes a tuple
        # fire's own separator is "-", which may be a prompt. fire prints it in messages, where --help fits
        asks_for_help = {"-h", "--help"} & set(sys.argv[1:])
        Fire(note, ["--", "--help"] if asks_for_help else [*sys.argv[1:], "--", "--separator=--help"])
        [(args, options)] = calls
        for name, value in options.items():
            if value in ("True", "False") and not any(arg.endswith(value) for arg in sys.argv[1:]):
                raise ValueError(f"--{name} needs a value (fire made {value!r} of the flag alone)")
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another one
        result = function(*args, **options)
        if result is not None:
            print(result)
        sys.stdout.flush()
        gc.freeze()  # Python need not look for garbage when it ends: 40 ms
    except (ImportError, MemoryError, OSError, ValueError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be written has nowhere to go
        hint = "; pip install -r requirements.txt" if isinstance(error, ImportError) else ""
        sys.exit(141 if isinstance(error, BrokenPipeError) else f"error: {' '.join(str(error).split())}{hint}")
