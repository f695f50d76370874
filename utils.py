"""Getting a model: its files are downloaded, checked, and handed back as encoder, hparams and params. Running a command.

A fault on the way (a dropped connection, a full disk, a damaged file, an end by force) leaves nothing behind that the
next run would believe. ValueError and OSError carry one line that says what to do; run() prints it.
"""

import contextlib
import gc
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
FILES = ["encoder.json", "vocab.bpe", "hparams.json", "checkpoint", "model.ckpt.index", "model.ckpt" + DATA]
SHA256 = {  # the same for all released sizes, and fetched first: a server that answers with something else fails here
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
MEND = "put a good copy in its place (a released model: delete it, the next run fetches it)"

# ---- Download -------------------------------------------------------------------------------------------------------


class Fault(OSError):
    """The server sent something wrong, or not all; another try may help."""


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def lacks(model_dir, name):
    """Whether a file is missing, or is a data file too short for its tensors: another program's broken download."""
    path = os.path.join(model_dir, name)
    if not os.path.exists(path):
        return True
    return name.endswith(DATA) and size_of(path) < n_bytes(tensor_shapes(load_hparams(model_dir)))


@contextlib.contextmanager
def locked(folder):
    """Keep other runs out of a folder. The system lifts the lock of a run that is killed."""
    try:
        import fcntl
    except ImportError:  # Windows: there two downloads at once are not kept apart
        return (yield)
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another run, which fetches {folder} …", file=sys.stderr)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


def download_gpt2_files(model_size, model_dir):
    """Fetch those files of a released model that model_dir lacks. OSError: no network, no such file, no space."""
    import requests
    from urllib3.util import Retry

    retry = Retry(4, connect=0, backoff_factor=0.5, status_forcelist=[500, 502, 503, 504])
    url = (os.environ.get("GPT2_MODELS_URL") or URL).rstrip("/") + f"/{model_size}/"
    os.makedirs(model_dir, exist_ok=True)
    with locked(model_dir), requests.Session() as session:
        session.mount(url, requests.adapters.HTTPAdapter(max_retries=retry))
        for name in FILES:
            path = os.path.join(model_dir, name)
            if lacks(model_dir, name):
                if os.path.exists(path):
                    os.replace(path, path + ".part")
                download(session, retry, url + name, path)


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
        except Fault as fault:  # requests retries until the body begins; from there the same Retry counts and waits
            try:
                tries = (retry if size_of(part) > size else tries).increment(error=fault)
            except MaxRetryError:
                raise OSError(f"{url} {fault}; run again to go on from there") from None
            tries.sleep()
        except requests.RequestException as error:
            hint = "; without a network, --model_size 2M works" * isinstance(error, requests.ConnectionError)
            raise OSError(f"cannot fetch {url} ({error}){hint}") from None
        except OSError as error:
            raise OSError(f"{part}: {error.strerror}; what has arrived is kept, run again to go on") from None
    os.replace(part, path)


def fetch(session, url, part, size):
    """One request for the bytes of url from `size` on, into part. Fault: they are fewer, more or others than said."""
    import requests
    from tqdm import tqdm

    name = os.path.basename(url)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {})
    with session.get(url, headers=headers, stream=True, timeout=(10, 15)) as response:  # seconds to connect, to read
        start, total = extent(response, part, size)
        bar = tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "r+b" if size else "wb") as f:
            f.seek(start)
            try:
                for chunk in response.iter_content(2**14) if start != total else ():
                    f.write(chunk)
                    bar.update(len(chunk))
            except requests.RequestException as error:
                raise Fault(f"broke off ({error})") from None
            f.truncate()
    size, total = size_of(part), size_of(part) if total is None else total
    if size < total:
        raise Fault(f"broke off after {size} of {total} bytes")
    if size > total or name in SHA256 and sha256(part) != SHA256[name]:
        os.remove(part)
        raise Fault("is not the file it should be: too long, or its SHA-256 is another")


def extent(response, part, size):
    """Where in the file the body begins, and how long the file is (None: the server does not say)."""
    import requests

    said = response.headers.get("Content-Range", "")
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", said)
        if not match or int(match[1]) != size:
            raise Fault(f"was asked for from byte {size} on, but came as '{said}'")
        return size, int(match[2])
    if response.status_code == 200:  # the whole file, asked for or not
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    if response.status_code == 416 and said == f"bytes */{size}":  # all of it was there
        return size, size
    if response.status_code == 416:
        os.remove(part)
        raise Fault(f"has no byte {size}: what was there of it is dropped")
    raise requests.HTTPError(f"HTTP status {response.status_code}")


def sha256(path):
    import hashlib

    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


# ---- Load -----------------------------------------------------------------------------------------------------------


def read_text(path):
    """What a text file holds; "" where there is none, or it is no text."""
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as f:
        return f.read()
    return ""


def load_hparams(model_dir):
    """hparams.json: n_vocab, n_ctx, n_embd, n_head and n_layer. ValueError: it is damaged."""
    path = os.path.join(model_dir, "hparams.json")
    try:
        hparams = json.loads(read_text(path))
        for key in "n_vocab", "n_ctx", "n_embd", "n_head", "n_layer":
            if type(hparams[key]) is not int or not 0 < hparams[key] < 10**6:
                raise ValueError(f"{key} is {hparams[key]!r}")
        if hparams["n_embd"] % hparams["n_head"]:
            raise ValueError("n_embd is no multiple of n_head")
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {MEND}") from None
    return hparams


def tensor_shapes(hparams):
    """{name in the checkpoint: shape} of all tensors."""
    n_embd = hparams["n_embd"]
    block = {f"{norm}/{key}": (n_embd,) for norm in ("ln_1", "ln_2") for key in "gb"}
    for name, n_in, n_out in ("attn/c_attn", 1, 3), ("attn/c_proj", 1, 1), ("mlp/c_fc", 1, 4), ("mlp/c_proj", 4, 1):
        block |= {f"{name}/w": (n_in * n_embd, n_out * n_embd), f"{name}/b": (n_out * n_embd,)}
    shapes = {"model/wte": (hparams["n_vocab"], n_embd), "model/wpe": (hparams["n_ctx"], n_embd)}
    shapes |= {"model/ln_f/g": (n_embd,), "model/ln_f/b": (n_embd,)}
    return shapes | {f"model/h{i}/{name}": shape for i in range(hparams["n_layer"]) for name, shape in block.items()}


def n_bytes(shapes):
    return 4 * sum(map(math.prod, shapes.values()))


def map_data(path, shapes):
    """Views of a data file that is nothing but tensors sorted by name, in little-endian float32; nothing is read."""
    floats, tensors, start = np.memmap(path, "<f4", "r").view(np.ndarray), {}, 0
    for name, shape in sorted(shapes.items()):
        tensors[name] = floats[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return tensors


@contextlib.contextmanager
def no_stderr():
    """Turn away what is written to file descriptor 2, from C++ too."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def read_through_tensorflow(tf_ckpt_path, shapes, mapped):
    """All tensors, each vouched for by its checksum: the mapped one where that is the same, else a copy."""
    print(f"checking {os.path.basename(os.path.dirname(tf_ckpt_path))} …", file=sys.stderr, flush=True)
    tensors, path = {}, tf_ckpt_path + ".index"
    with no_stderr():  # TensorFlow talks while it is imported, and again when it fails
        import tensorflow as tf

        try:
            reader = tf.train.load_checkpoint(tf_ckpt_path)
            found, path = reader.get_variable_to_shape_map(), tf_ckpt_path + DATA
            for name in shapes.keys() & found.keys():
                tensor = reader.get_tensor(name).astype(np.float32, copy=False)
                if tensor.shape == (1, *shapes[name]):  # [1, n_in, n_out]: it was a convolution of width 1
                    tensor = tensor[0]
                same = name in mapped and np.array_equal(tensor, mapped[name])
                tensors[name] = mapped[name] if same else tensor
        except (tf.errors.OpError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {reason}); {MEND}") from None
    beyond = [name for name in found if re.fullmatch(r"model/h\d+/ln_1/b", name) and name not in shapes]
    for name in [*shapes, *beyond]:
        there, wanted = found.get(name), shapes.get(name)
        if name not in tensors or tensors[name].shape != wanted:
            raise ValueError(f"{tf_ckpt_path}: {name} has the shape {there}, hparams.json says {wanted}; {MEND}")
    return tensors


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """The weights as a nested dict of float32 arrays: params["blocks"][3]["attn"]["c_attn"]["w"].

    They are mapped into memory, not read: that takes no time, and processes share them. TensorFlow, which knows the
    place and the checksum of each tensor, vouches for it the first time; a note beside the data file, good for these
    very files only, spares that to later runs. A checkpoint laid out otherwise is read through TensorFlow every time.
    ValueError, OSError: a file is missing or damaged, or hparams.json does not fit the tensors.
    """
    shapes, data, index = tensor_shapes(hparams), tf_ckpt_path + DATA, tf_ckpt_path + ".index"
    stats = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in map(os.stat, (data, index))]
    size, needed = stats[0][0], n_bytes(shapes)
    if size < needed:
        raise ValueError(f"{data} has {size} bytes, by hparams.json it should have {needed}; {MEND}")
    note, vouched = tf_ckpt_path + ".checked.json", json.dumps([stats, sorted(shapes.items())])
    tensors = map_data(data, shapes) if size == needed else {}
    if not tensors or read_text(note) != vouched:
        mapped, tensors = tensors, read_through_tensorflow(tf_ckpt_path, shapes, tensors)
        if all(tensors[name] is mapped.get(name) for name in shapes):
            with contextlib.suppress(OSError), open(note, "w", encoding="utf-8") as f:
                f.write(vouched)  # where the folder is read-only, the next run checks again
    params = {"blocks": [{} for _ in range(hparams["n_layer"])]}
    for name, tensor in tensors.items():
        _, *keys, last = name.split("/")  # model/h3/attn/c_attn/w
        inner = params
        for key in keys:
            inner = params["blocks"][int(key[1:])] if key[0] == "h" else inner.setdefault(key, {})
        inner[last] = tensor
    return params


def load_encoder_and_hparams(model_size, models_dir):
    """What there is to know before the weights: encoder, hparams, path of the checkpoint. Errors: as those below."""
    model_size, models_dir = str(model_size), str(models_dir)
    model_dir = os.path.join(models_dir, model_size)
    if os.path.basename(model_size) != model_size or model_size in ("", ".", ".."):
        raise ValueError(f"model_size must be the name of a folder in models_dir, not {model_size!r}")
    if os.path.exists(models_dir) and not os.path.isdir(models_dir):
        raise NotADirectoryError(f"models_dir must be a folder, {models_dir!r} is a file")
    if model_size in RELEASED:
        if any(lacks(model_dir, name) for name in FILES):
            download_gpt2_files(model_size, model_dir)
    elif not os.path.isdir(model_dir):
        there = [entry.name for entry in os.scandir(models_dir) if entry.is_dir()] if os.path.exists(models_dir) else []
        there = ", ".join(dict.fromkeys(RELEASED + sorted(there)))
        raise ValueError(f"no model {model_size!r} in {os.path.abspath(models_dir)}; there are {there}")
    checkpoint = os.path.join(model_dir, "checkpoint")
    match = re.search(r'^model_checkpoint_path: "(.+)"', read_text(checkpoint), re.MULTILINE)
    if not match:
        raise ValueError(f"{checkpoint} is missing or damaged; {MEND}")
    tf_ckpt_path = os.path.join(model_dir, os.path.basename(match[1]))
    for path in *(os.path.join(model_dir, name) for name in FILES[:3]), tf_ckpt_path + ".index", tf_ckpt_path + DATA:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is missing; {MEND}")
    hparams = load_hparams(model_dir)
    try:
        encoder = get_encoder(model_size, models_dir)
        if len(encoder.encoder) != hparams["n_vocab"]:
            raise ValueError(
                f"{model_dir}: encoder.json has {len(encoder.encoder)} tokens, hparams.json another number"
            )
    except ValueError as error:
        raise ValueError(f"{error}; {MEND}") from None
    return encoder, hparams, tf_ckpt_path


def load_encoder_hparams_and_params(model_size, models_dir):
    """All of a model in models_dir/model_size, downloaded first where a released size is not there.

    ValueError, OSError: there is no such model, it cannot be fetched, or a file is missing or damaged.
    """
    encoder, hparams, tf_ckpt_path = load_encoder_and_hparams(model_size, models_dir)
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams)


# ---- Run ------------------------------------------------------------------------------------------------------------


def arguments(args, function):
    """What a command line gives a function: its prompts and {flag: value}, as they were typed.

    A mistake is one line and status 2. fire, which writes the help, is not asked for more: it would take "1,2" for a
    tuple and "-" for itself, mind a mistyped flag only when the function has run, and cost each start 40 ms and 7 MB.
    """
    signature, prompts, options, rest = inspect.signature(function), [], {}, list(args)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
    names, switches = [p.name for p in parameters], [p.name for p in parameters if p.default is False]
    letters = [name[0] for name in names]
    flags = {name[0]: name for name in names if letters.count(name[0]) == 1} | {name: name for name in names}
    is_flag = re.compile("--|-[a-zA-Z]").match
    try:
        while rest:
            arg = rest.pop(0)
            if not is_flag(arg):
                prompts.append(arg)
                continue
            key, equals, value = arg.lstrip("-").partition("=")
            if key in ("h", "help"):
                import fire

                fire.Fire(function, ["--", "--help"])  # ends here
            name = flags.get(key.replace("-", "_"))
            if not name:
                known = " --".join(names)
                raise TypeError(f"no flag {arg}; there are --{known} (a prompt with a dash: --prompt={arg!r})")
            if name in options:
                raise TypeError(f"--{name} is there twice")
            if name in switches and not equals:
                value = "true"
                if rest and rest[0].lower() in ("true", "false"):
                    raise TypeError(f"write {arg}={rest[0]}")
            elif not equals:
                if not rest or is_flag(rest[0]):
                    raise TypeError(f"{arg} needs a value; one that begins with a dash: {arg}=…")
                value = rest.pop(0)
            options[name] = value
        signature.bind(*prompts, **options)
    except TypeError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    return prompts, options


def run(function):
    """Run a function as a command: a mistake is one line and status 1, and the end is quiet when nobody reads on."""
    while os.open(os.devnull, os.O_RDWR) < 3:  # standard streams that the shell has closed (>&-)
        pass
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another
        prompts, options = arguments(sys.argv[1:], function)
        result = function(*prompts, **options)
        if result is not None:
            print(result)
        sys.stdout.flush()
        gc.freeze()  # when Python ends, it need not look for garbage: that saves 40 ms
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        with contextlib.suppress(OSError):  # what is still to be written has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141 if isinstance(error, BrokenPipeError) else f"error: {' '.join(str(error).split())}")
