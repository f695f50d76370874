"""Getting a model: its files are downloaded, checked, and handed back as encoder, hparams and params.

A fault on the way (a dropped connection, a full disk, a damaged file, an end by force) leaves nothing behind that the
next run would believe. ValueError and OSError carry one line that says what to do; run() prints it.
"""

import contextlib
import hashlib
import inspect
import json
import math
import os
import re
import sys

import numpy as np

from encoder import get_encoder

URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # GPT2_MODELS_URL in the environment names a mirror
RELEASED = ["124M", "355M", "774M", "1558M"]
DATA = ".data-00000-of-00001"
FILES = ["checkpoint", "hparams.json", "encoder.json", "vocab.bpe", "model.ckpt.index", "model.ckpt" + DATA]
SHA256 = {  # the same for all released sizes
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


# ---- download ------------------------------------------------------------------------------------------------------


class Fault(OSError):
    """What arrived is not right; the next try may be."""


@contextlib.contextmanager
def locked(folder):
    """Keep other runs out of a folder; the system lifts the lock even from a run that is killed."""
    try:
        import fcntl
    except ImportError:  # Windows: two downloads at once are not kept apart
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that fetches {folder} …", file=sys.stderr)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def download_gpt2_files(model_size, model_dir):
    """Fetch those files of a released model that model_dir lacks. OSError: no network, no such file, no space."""
    import requests
    from urllib3.util import Retry

    retry = Retry(4, connect=0, backoff_factor=0.5, status_forcelist=[500, 502, 503, 504])
    base = os.environ.get("GPT2_MODELS_URL") or URL
    os.makedirs(model_dir, exist_ok=True)
    with locked(model_dir), requests.Session() as session:
        for scheme in "http://", "https://":
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        for name in FILES:
            path = os.path.join(model_dir, name)
            if lacks(model_dir, name):
                if os.path.exists(path):
                    os.replace(path, path + ".part")
                download(session, retry, f"{base.rstrip('/')}/{model_size}/{name}", path)


def download(session, retry, url, path):
    """Fetch url into path + ".part", which the next try or the next run resumes, and move it into place when whole."""
    import requests
    from urllib3.exceptions import MaxRetryError

    part, tries = path + ".part", retry
    while True:
        size = size_of(part)
        try:
            fetch(session, url, part, size)
            break
        except Fault as fault:  # requests retries until a body begins; from there on the same Retry counts and waits here
            try:
                tries = (retry if size_of(part) > size else tries).increment(error=fault)
            except MaxRetryError:
                raise OSError(f"{url}: {fault}; run again to go on from there") from None
            tries.sleep()
        except requests.RequestException as error:
            raise OSError(f"cannot fetch {url} ({error}); without a network, --model_size 2M works") from None
        except OSError as error:
            raise OSError(f"{part}: {error.strerror}; what has arrived is kept, run again to go on") from None
    os.replace(part, path)


def fetch(session, url, part, size):
    """One request for what part, of that size, lacks of url. Fault: what came is less, more or other than was said."""
    import requests
    from tqdm import tqdm

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {})
    with session.get(url, headers=headers, stream=True, timeout=(10, 15)) as response:  # seconds to connect, to read
        start, total = extent(response, part, size)
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc="/".join(url.split("/")[-2:]), disable=None)
        with bar, open(part, "r+b" if size else "wb") as f:
            f.seek(start)
            try:
                for chunk in response.iter_content(2**18) if start != total else ():
                    f.write(chunk)
                    bar.update(len(chunk))
            except requests.RequestException as error:
                raise Fault(f"broke off ({error})") from None
            f.truncate()
    if total is not None and size_of(part) < total:
        raise Fault(f"ended after {size_of(part)} of {total} bytes")
    with open(part, "rb") as f:
        name = os.path.basename(url)
        if size_of(part) != (total or size_of(part)) or name in SHA256 and hashlib.sha256(f.read()).hexdigest() != SHA256[name]:
            os.remove(part)
            raise Fault("longer than the server said, or its SHA-256 is wrong")


def extent(response, part, size):
    """Where in the file the body begins, and the length of the whole file (None: the server does not say)."""
    import requests

    said = response.headers.get("Content-Range", "")
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", said)
        if not match or int(match[1]) != size:
            raise Fault(f"asked for the bytes from {size} on, the server sent '{said}'")
        return size, int(match[2])
    if response.status_code == 200:  # the whole file, asked for or not
        return 0, int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
    if response.status_code != 416:
        raise requests.HTTPError(f"{response.status_code} {response.reason}")
    if said == f"bytes */{size}":  # all of it was there
        return size, size
    os.remove(part)
    raise Fault(f"the {size} bytes that were there are no part of it")


def lacks(model_dir, name):
    """Whether a file is not there, or is a data file too short for its tensors: some other program's broken download."""
    path = os.path.join(model_dir, name)
    return not os.path.exists(path) or name == FILES[-1] and size_of(path) < n_bytes(tensor_shapes(load_hparams(model_dir)))


# ---- load ----------------------------------------------------------------------------------------------------------

MEND = "put a good copy in its place (of a released model: delete it, the next run fetches it)"


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def read_text(path):
    """What a text file holds, "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, ValueError):
        return ""


def load_hparams(model_dir):
    """hparams.json as a dict of whole numbers: n_vocab, n_ctx, n_embd, n_head, n_layer. ValueError: it is damaged."""
    path = os.path.join(model_dir, "hparams.json")
    try:
        with open(path, encoding="utf-8") as f:
            hparams = json.load(f)
        for key in "n_vocab", "n_ctx", "n_embd", "n_head", "n_layer":
            if type(hparams[key]) is not int or hparams[key] < 1:
                raise ValueError(f"{key} is {hparams[key]}")
        if hparams["n_embd"] % hparams["n_head"]:
            raise ValueError("n_embd is no multiple of n_head")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {MEND}") from None
    return hparams


def tensor_shapes(hparams):
    """{name in the checkpoint: shape} of every tensor of the model."""
    n_embd = hparams["n_embd"]
    block = {f"{ln}/{key}": (n_embd,) for ln in ("ln_1", "ln_2") for key in "gb"}
    for name, n_in, n_out in ("attn/c_attn", 1, 3), ("attn/c_proj", 1, 1), ("mlp/c_fc", 1, 4), ("mlp/c_proj", 4, 1):
        block |= {f"{name}/w": (n_in * n_embd, n_out * n_embd), f"{name}/b": (n_out * n_embd,)}
    shapes = {"model/wte": (hparams["n_vocab"], n_embd), "model/wpe": (hparams["n_ctx"], n_embd)}
    shapes |= {"model/ln_f/g": (n_embd,), "model/ln_f/b": (n_embd,)}
    return shapes | {f"model/h{i}/{name}": shape for i in range(hparams["n_layer"]) for name, shape in block.items()}


def n_bytes(shapes):
    return 4 * sum(map(math.prod, shapes.values()))


def map_data(path, shapes):
    """Views of a data file that is nothing but the tensors in the order of their names, as OpenAI's are; nothing is read."""
    floats, tensors, start = np.memmap(path, "<f4", "r").view(np.ndarray), {}, 0
    for name, shape in sorted(shapes.items()):
        tensors[name] = floats[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return tensors


def read_through_tensorflow(tf_ckpt_path, shapes, mapped):
    """All tensors, vouched for by TensorFlow's checksums: each the mapped one where that is the same, else a copy."""
    print(f"checking {os.path.basename(os.path.dirname(tf_ckpt_path))} …", file=sys.stderr, flush=True)
    tensors, path = {}, tf_ckpt_path + ".index"
    with no_stderr():  # TensorFlow talks there while it is imported, and again before it fails
        import tensorflow as tf

        try:
            reader = tf.train.load_checkpoint(tf_ckpt_path)
            found = reader.get_variable_to_shape_map()
            path = tf_ckpt_path + DATA
            for name in shapes.keys() & found.keys():
                tensor = reader.get_tensor(name).astype(np.float32, copy=False)
                tensor = tensor[0] if tensor.shape == (1, *shapes[name]) else tensor  # [1, n_in, n_out] -> [n_in, n_out]
                same = name in mapped and np.array_equal(tensor, mapped[name])
                tensors[name] = mapped[name] if same else tensor
        except Exception as error:  # of many kinds, by what is wrong with the file
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {reason}); {MEND}") from None
    for name in [*shapes, *sorted(name for name in found if re.fullmatch(r"model/h\d+/ln_1/b", name))]:
        there, needed = list(tensors[name].shape) if name in tensors else None, list(shapes.get(name, ())) or None
        if there != needed:
            raise ValueError(f"{tf_ckpt_path}: the shape of {name} is {there}, by hparams.json it should be {needed}; {MEND}")
    return tensors


@contextlib.contextmanager
def no_stderr():
    """Turn away what is written to file descriptor 2, by C++ too."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """The weights as a nested dict of float32 arrays: params["blocks"][3]["attn"]["c_attn"]["w"].

    They are not read but mapped into memory, which takes no time and is shared between processes. TensorFlow, which knows
    place and checksum of each tensor, vouches for that the first time; a note beside the data file, good for these very
    files only, spares it to the next runs. A checkpoint that is laid out otherwise is read through TensorFlow every time.
    ValueError, OSError: a file is missing or damaged, or hparams.json does not fit the tensors.
    """
    shapes, files = tensor_shapes(hparams), [tf_ckpt_path + DATA, tf_ckpt_path + ".index"]
    stats = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in map(os.stat, files)]
    size, needed = stats[0][0], n_bytes(shapes)
    if size < needed:
        raise ValueError(f"{files[0]} has {size} bytes, by hparams.json it should have {needed}; {MEND}")
    note, vouched = tf_ckpt_path + ".checked.json", json.dumps([stats, sorted(shapes.items())])
    tensors = map_data(files[0], shapes) if size == needed else {}
    if not tensors or read_text(note) != vouched:
        mapped, tensors = tensors, read_through_tensorflow(tf_ckpt_path, shapes, tensors)
        if all(tensors[name] is mapped.get(name) for name in shapes):
            with contextlib.suppress(OSError), open(note, "w", encoding="utf-8") as f:  # in a read-only folder: not noted
                f.write(vouched)
    params = {"blocks": [{} for _ in range(hparams["n_layer"])]}
    for name, tensor in tensors.items():
        _, *keys, last = name.split("/")  # model/h3/attn/c_attn/w
        inner = params
        for key in keys:
            inner = params["blocks"][int(key[1:])] if key[0] == "h" else inner.setdefault(key, {})
        inner[last] = tensor
    return params


def load_encoder_and_hparams(model_size, models_dir):
    """What can be had before the weights: the encoder, hparams, and the path of the checkpoint. Errors: as below."""
    model_size, models_dir = str(model_size), str(models_dir)
    model_dir = os.path.join(models_dir, model_size)
    if os.path.basename(model_size) != model_size or model_size in ("", ".", ".."):
        raise ValueError(f"model_size is the name of a folder in models_dir, not a path: {model_size!r}")
    if os.path.exists(models_dir) and not os.path.isdir(models_dir):
        raise NotADirectoryError(f"models_dir is not a folder: {models_dir!r}")
    if model_size in RELEASED:
        if any(lacks(model_dir, name) for name in FILES):
            download_gpt2_files(model_size, model_dir)
    elif not os.path.isdir(model_dir):
        there = sorted(entry.name for entry in os.scandir(models_dir) if entry.is_dir()) if os.path.exists(models_dir) else []
        raise ValueError(f"no model {model_size!r}; there are {', '.join(dict.fromkeys(RELEASED + there))}")
    path = os.path.join(model_dir, "checkpoint")
    match = re.search(r'^model_checkpoint_path: "(.+)"', read_text(path), re.MULTILINE)
    if not match:
        raise ValueError(f"{path} is missing or names no checkpoint; {MEND}")
    tf_ckpt_path = os.path.join(model_dir, os.path.basename(match[1]))
    for path in [os.path.join(model_dir, name) for name in FILES[1:4]] + [tf_ckpt_path + ".index", tf_ckpt_path + DATA]:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is missing; {MEND}")
    try:
        encoder = get_encoder(model_size, models_dir)
    except ValueError as error:
        raise ValueError(f"{error}; {MEND}") from None
    hparams = load_hparams(model_dir)
    if len(encoder.encoder) != hparams["n_vocab"]:
        raise ValueError(f"{model_dir}: encoder.json has {len(encoder.encoder)} tokens, hparams.json {hparams['n_vocab']}; {MEND}")
    return encoder, hparams, tf_ckpt_path


def load_encoder_hparams_and_params(model_size, models_dir):
    """All of a model in models_dir/model_size, downloaded first where a released size (RELEASED) is not there.

    ValueError, OSError: there is no such model, it cannot be fetched, or one of its files is damaged.
    """
    encoder, hparams, tf_ckpt_path = load_encoder_and_hparams(model_size, models_dir)
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams)


# ---- run -----------------------------------------------------------------------------------------------------------


def run(function):
    """Run a function as a command: arguments as typed, mistakes as one line, a quiet end where the reader has gone.

    fire takes arguments for Python ("1,2" for a tuple) and minds a mistyped flag only after the function has run. So
    each argument is handed over as a Python string, and the flags are looked at first.
    """
    import fire

    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    names, args = [p.name for p in parameters], sys.argv[1:]
    flags = [i for i, arg in enumerate(args) if re.match("--|-[a-zA-Z]", arg)]
    for i, arg in enumerate(args):
        name, equals, value = arg.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if i not in flags:
            args[i] = repr(arg)
        elif name in ("h", "help"):
            args = ["--", "--help"]
            break
        elif name not in names and name not in [name[0] for name in names]:
            there = " ".join(f"--{name}" for name in names)
            print(f'error: no flag {arg}; there are {there} (and --prompt="{arg}" for a prompt)', file=sys.stderr)
            sys.exit(2)
        elif equals:
            args[i] = f"--{name}={value!r}"
        elif name in [p.name for p in parameters if p.default is False]:
            args[i] = f"--{name}=True"
        elif i + 1 == len(args) or i + 1 in flags:
            print(f"error: {arg} needs a value", file=sys.stderr)
            sys.exit(2)
    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal that does not know a character shows another
        fire.Fire(function, args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        with contextlib.suppress(OSError):  # what is still to be written has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141 if isinstance(error, BrokenPipeError) else f"error: {' '.join(str(error).split())}")
