"""What gpt2.py needs around the model: download it, check it, map it into memory; run a function as a command.

Whatever goes wrong on the way (a dropped connection, a full disk, a damaged file, kill -9), nothing is left behind that
the next run would wrongly trust. ValueError and OSError carry one line that says what is wrong; run() prints it.
"""

import contextlib
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import operator
import os
import re
import signal
import sys
import time
from pathlib import Path

PACKAGES = "numpy regex requests tqdm fire"  # all that 2M and 124M need
try:
    import numpy as np
except ImportError as error:
    sys.exit(f"error: {error}; pip install {PACKAGES}")

URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # or what GPT2_MODELS_URL in the environment says
SUFFIX = ".data-00000-of-00001"
INDEX, DATA = "model.ckpt.index", "model.ckpt" + SUFFIX
FILES = ["encoder.json", "vocab.bpe", "hparams.json", "checkpoint", INDEX, DATA]
HPARAMS = {  # 2M comes with this repository, the others were released by OpenAI
    "2M": {"n_vocab": 2048, "n_ctx": 256, "n_embd": 144, "n_head": 4, "n_layer": 6},
    "124M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "355M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24},
    "774M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1280, "n_head": 20, "n_layer": 36},
    "1558M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48},
}
RELEASED = [*HPARAMS][1:]
SIZES = {"encoder.json": 1_042_301, "vocab.bpe": 456_318, "checkpoint": 77}  # bytes
SHA256 = {  # a name alone holds for all released models
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    f"124M/{INDEX}": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    f"124M/{DATA}": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
    "2M/encoder.json": "9f7a2a3ccc86e905d2eb22854d9e8339f2adcecc89415466372c443c06be356e",
    "2M/vocab.bpe": "213b1c318a4ba986d2a6c0f4cf10e35712c34d5cf297a965709f578206ce8e43",
    f"2M/{INDEX}": "ef9a0e5ef43ca381db7fc49b7125e2926cc8643a5d187a43ac1c00f7feebf4db",
    f"2M/{DATA}": "50ecec854c37892224624513065e7c3e8fe98c60fe698879207e9da94f2796f7",
}

# ---- Download -------------------------------------------------------------------------------------------------------


def download_gpt2_files(model_size, model_dir):
    """Fetch the files of a released model that model_dir lacks. Raises ValueError, or OSError if they cannot be had."""
    if model_size not in RELEASED:
        raise ValueError(f"{model_size!r} is no released model; these are: {', '.join(RELEASED)}")
    model_dir, n_bytes = Path(os.path.expanduser(model_dir)), data_size(HPARAMS[model_size])

    def is_whole(path):  # another program may have saved an error page as checkpoint, or half of the data file
        if path.name == "checkpoint":
            return path.exists() and b"model_checkpoint_path" in path.read_bytes()
        return size_of(path) >= (n_bytes if path.name == DATA else 1)

    paths = [model_dir / name for name in FILES]
    if all(map(is_whole, paths)):
        return
    url = f"{(os.environ.get('GPT2_MODELS_URL') or URL).rstrip('/')}/{model_size}"
    print(f"fetching {model_size}, {n_bytes / 1e6:.0f} MB, from {url} to {model_dir}", file=sys.stderr, flush=True)
    model_dir.mkdir(parents=True, exist_ok=True)
    with open(model_dir / ".lock", "w") as lock:
        with contextlib.suppress(ImportError, OSError):  # Windows has no such lock, nor has every network disk
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("waiting for another run that fetches it", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)  # the lock of a run that is killed is lifted
        for path in itertools.filterfalse(is_whole, paths):
            download(f"{url}/{path.name}", path, model_size)


def size_of(path):
    """The size of a file in bytes; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def download(url, path, model_size):
    """Fetch url into path. Until it is whole and checked it is path.part; the next try or run goes on from there."""
    import ssl

    import requests

    part, n_fruitless = Path(f"{path}.part"), 0
    total = {**SIZES, DATA: data_size(HPARAMS[model_size])}.get(path.name)  # None: not known
    if path.name == DATA and path.exists():  # half of it, as is_whole() found
        path.replace(part)
    if total and size_of(part) > total:
        part.unlink()
    while True:
        size = size_of(part)
        try:
            fetch(url, part, size, total)
            if not is_right(part, path.name, model_size):
                part.unlink(missing_ok=True)
                raise ValueError(f"it is not OpenAI's {path.name}")
            return part.replace(path)
        except (requests.RequestException, ValueError) as error:
            cause = error
            while cause.__context__:  # the first cause says it in plain words: "Connection refused"
                cause = cause.__context__
            proxy = "the proxy: " if isinstance(error, requests.exceptions.ProxyError) else ""
            failure = f"cannot fetch {url}: {proxy}{getattr(cause, 'strerror', None) or plain(cause)}"
            if isinstance(error, ValueError) or isinstance(cause, ssl.CertificateError):  # trying again cannot help
                raise OSError(failure) from None
        n_fruitless = 0 if size_of(part) > size else n_fruitless + 1
        if n_fruitless == 5:
            raise OSError(f"{failure}; run again to go on where it stopped (--model_size 2M works without a network)")
        print(f"{failure}; trying again", file=sys.stderr, flush=True)
        time.sleep(2**n_fruitless / 8)  # seconds


def fetch(url, part, size, total):
    """Append the rest of url to the file part, which has size bytes; total is the size of the whole, None if not known.

    Nothing is kept that is not of the file, as far as can be told. Raises ValueError if trying again cannot help, else
    requests.RequestException.
    """
    import requests
    from tqdm import tqdm

    headers = {"Range": f"bytes={size}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:  # seconds to connect, to read
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        came = f"HTTP status {status} {content_range}".rstrip()
        match = re.fullmatch(rf"bytes {size}-\d+/(\d+)", content_range)
        if status == 416 and content_range == f"bytes */{size}" and total in (None, size):
            return  # nothing comes after these bytes: the file is whole
        if status == 206 and match:  # what was asked for
            start, length = size, int(match[1])
        elif status == 200:  # the whole file: this server knows no ranges
            start, length = 0, int(response.headers.get("Content-Length", 0))  # 0: it does not say
        elif status in (408, 416, 429) or not 400 <= status < 500:
            raise requests.HTTPError(f"{came}, for what comes after {size} bytes")
        else:
            raise ValueError(came)
        if length and (length < size or (total and length != total)):
            raise ValueError(f"{came}, but a file of {length} bytes, not of {total or size}")
        bar = tqdm(desc=part.stem, total=length or total, initial=start, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "a+b") as file:
            file.seek(start)
            for chunk in response.iter_content(2**14):
                known = file.read(len(chunk))  # what is there of it already, if the server begins at the start
                if not chunk.startswith(known):
                    raise ValueError(f"{came}, but it does not begin as {part} does (delete that to begin again)")
                file.write(chunk[len(known) :])
                bar.update(len(chunk))
            end = file.tell()
            expected = length or total or max(end, size)
            # Too many bytes, or too few from a server that gave no length, may be of another file: drop what came now.
            if end > expected or (end < expected and not length):
                file.truncate(size)
            if end != expected:
                raise requests.HTTPError(f"{end} bytes came, of {expected}")


# ---- Check and map --------------------------------------------------------------------------------------------------

MEND = "put a good copy in its place (2M: git checkout models; a released model: delete it, the next run fetches it)"


@contextlib.contextmanager
def reading(path):
    """Turn whatever goes wrong while a file is read into one error that names it and says what to do."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"cannot read {path} ({type(error).__name__}: {error}); {MEND}") from None


def load_hparams(path, model_size):
    """n_vocab, n_ctx, n_embd, n_head, n_layer. Raises ValueError, also if they are not those of HPARAMS[model_size]."""
    with reading(path):
        hparams = json.loads(path.read_bytes())
        sizes = [hparams[key] for key in HPARAMS["2M"]]
        if not all(type(size) is int and 0 < size < 10**6 for size in sizes) or hparams["n_embd"] % hparams["n_head"]:
            raise ValueError(f"{hparams} makes no sense")
        if not HPARAMS.get(model_size, {}).items() <= hparams.items():
            raise ValueError(f"{model_size} has other numbers")
    return hparams


def is_right(path, name, model_size):
    """Whether a file is the real one, as far as we know its numbers, size or SHA-256."""
    if name == "hparams.json":
        with contextlib.suppress(ValueError):
            return bool(load_hparams(path, model_size))
        return False
    if size_of(path) == 0 or (name == DATA and size_of(path) != data_size(HPARAMS[model_size])):
        return False
    known = SHA256.get(f"{model_size}/{name}") or SHA256.get(name)
    return known is None or hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest() == known  # mapped, not read


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


def data_size(hparams):
    """How many bytes the data file of a model has: four for each weight."""
    return 4 * sum(math.prod(shape) for shape in tensor_shapes(hparams).values())


def read_through_tensorflow(tf_ckpt_path, hparams):
    """Yield (name, tensor) for each tensor, verified by its checksum. Raises ValueError or ImportError."""
    folder, prefix = os.path.split(os.path.abspath(tf_ckpt_path))
    with open(os.devnull, "w") as nowhere, open(os.dup(2), "w") as stderr, contextlib.ExitStack() as at_end:
        at_end.callback(os.chdir, os.getcwd())
        os.chdir(folder)  # in a path, TensorFlow takes [ for the beginning of a pattern
        at_end.callback(os.dup2, stderr.fileno(), 2)
        os.dup2(nowhere.fileno(), 2)  # TensorFlow writes to standard error from C++
        try:
            from tensorflow import train
        except Exception as error:  # noqa: BLE001
            reason = f"({type(error).__name__}: {error}); pip install -r requirements.txt"
            raise ImportError(f"all models but 2M and 124M are checked by tensorflow, which fails {reason}") from None
        with reading(f"{tf_ckpt_path}.index or {SUFFIX}"):
            reader = train.load_checkpoint(prefix)
            found = reader.get_variable_to_shape_map()
            if f"model/h{hparams['n_layer']}/ln_1/b" in found:
                raise ValueError("it has more layers than hparams.json says")
            for name, shape in tensor_shapes(hparams).items():
                if found.get(name) not in ([*shape], [1, *shape]):  # the file may have an extra axis
                    raise ValueError(f"{name} has the shape {found.get(name)}, by hparams.json it is {[*shape]}")
                yield name, reader.get_tensor(name).astype(np.float32, copy=False).reshape(shape)


def check(files, hparams, mapped, tf_ckpt_path):
    """Check a model's files. Returns {name: tensor} of those that differ from the mapped ones. Raises ValueError."""
    from encoder import get_encoder

    folder = files[DATA].absolute().parent
    print(f"checking {folder.name} …", file=sys.stderr, flush=True)
    for size in "2M", "124M":
        wrong = [path for name, path in files.items() if not is_right(path, name, size)]
        if files[INDEX] not in wrong or files[DATA] not in wrong:  # one of them tells that it is this model
            if not HPARAMS[size].items() <= hparams.items():
                wrong.append(folder / "hparams.json")
            if wrong:
                raise ValueError(f"{wrong[0]} is not that of {size}; {MEND}")
            return {}
    if "encoder.json" in files and "vocab.bpe" in files:
        with reading(folder / "encoder.json or vocab.bpe"):
            encoder = get_encoder(folder.name, folder.parent)
            merged = {merge.replace(" ", "") for merge in encoder.bpe_ranks}
            pieces = {*encoder.byte_decoder, *merged, "<|endoftext|>"}
            if sorted(encoder.decoder) != [*range(hparams["n_vocab"])] or pieces != encoder.encoder.keys():
                raise ValueError(f"they do not fit each other, or the {hparams['n_vocab']} tokens of hparams.json")
    tensors = read_through_tensorflow(tf_ckpt_path, hparams)
    return {name: tensor for name, tensor in tensors if not np.array_equal(tensor, mapped.get(name))}


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """The weights, a nested dict of float32 arrays: params["blocks"][3]["attn"]["c_attn"]["w"].

    They are mapped into memory and not read, which takes no time. The first run checks the files of the model and notes
    their sizes and times; later runs skip that. A checkpoint with more in it, or in another order, is read through
    TensorFlow every time. Raises ValueError, OSError or ImportError.
    """
    tf_ckpt_path = os.path.expanduser(tf_ckpt_path)
    data, note, mapped, others = Path(tf_ckpt_path + SUFFIX), Path(tf_ckpt_path + ".checked.json"), {}, {}
    files = {name: data.parent / name for name in FILES[:3] if (data.parent / name).exists()}
    files |= {INDEX: Path(tf_ckpt_path + ".index"), DATA: data}
    with reading(f"{tf_ckpt_path}.index or {SUFFIX}"):
        stats = [path.stat() for path in files.values()]
    checked = json.dumps([[[s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in stats], hparams])
    shapes = tensor_shapes(hparams)
    if size_of(data) == data_size(hparams):
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        floats = np.split(np.memmap(data, "<f4", "r").view(np.ndarray), ends[:-1])
        mapped = {name: part.reshape(shapes[name]) for name, part in zip(shapes, floats)}
    noted = ""
    with contextlib.suppress(OSError, UnicodeError):
        noted = note.read_text()
    if noted != checked:
        others = check(files, hparams, mapped, tf_ckpt_path)
        try:
            note.write_text("" if others else checked)  # "": the next run reads through TensorFlow again
        except OSError as error:
            print(f"(this is done every time, because {note} cannot be written: {error.strerror})", file=sys.stderr)
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

    models_dir = Path(os.path.expanduser(models_dir or Path(__file__).resolve().parent / "models"))  # beside this file
    model_dir = models_dir / model_size
    if model_size in RELEASED:
        download_gpt2_files(model_size, model_dir)
    prefixes, checkpoint = [path.stem for path in model_dir.glob("*.index")], model_dir / "checkpoint"
    if checkpoint.exists():
        with reading(checkpoint):  # it may name a path on another machine
            prefixes = re.findall(r'^model_checkpoint_path: "(?:[^"]*[/\\])?([^"]+)"', checkpoint.read_text("utf-8"))
    elif not prefixes:
        there = ", ".join(sorted({path.parent.name for path in models_dir.glob("*/*.index")})) or "none"
        where = f"no model {model_size!r} with an *.index file in {models_dir}"
        raise ValueError(f"{where}; there: {there}; to fetch: {', '.join(RELEASED)}")
    if len(prefixes) != 1:
        raise ValueError(f"{checkpoint} does not say which checkpoint to load; {MEND}")
    hparams = load_hparams(model_dir / "hparams.json", model_size)
    params = load_gpt2_params_from_tf_ckpt(str(model_dir / prefixes[0]), hparams)
    with reading(model_dir / "encoder.json or vocab.bpe"):
        encoder = get_encoder(model_size, models_dir)
    return encoder, hparams, params


# ---- Run ------------------------------------------------------------------------------------------------------------


def check_options(model_size=None, **options):
    """Convert options to numbers; None stays None, but if they ask for sampling without a seed, one is drawn.

    If they mean greedy, the seed becomes None. Raises ValueError if one is out of range, TypeError for an unknown one.
    """
    longest = HPARAMS[model_size]["n_ctx"] - 1 if model_size in HPARAMS else 10**9
    ranges = {  # name: (type, lowest, highest)
        "n_tokens_to_generate": (int, 1, longest), "batch_size": (int, 1, 10**9), "seed": (int, 0, 10**20),
        "temperature": (float, 0, 10**9), "top_k": (int, 0, 10**9), "top_p": (float, 1e-9, 1),
    }  # fmt: skip
    for name, value in options.items():
        if name not in ranges:
            raise TypeError(f"unexpected option {name!r}")
        (kind, low, high), number = ranges[name], math.nan  # nan is in no range
        if value is not None:
            with contextlib.suppress(ValueError):
                number = kind(str(value))  # by way of text, since int(1.5) is 1 but int("1.5") is an error
            if not low <= number <= high:
                what = "a whole number" if kind is int else "a number"
                raise ValueError(f"{name} must be {what} from {low} to {high}, not {value!r}")
            options[name] = number
    if "seed" in options:
        asked = {options.get(name) for name in ("seed", "temperature", "top_k", "top_p")} - {None}
        if not asked or options.get("temperature") == 0:
            options["seed"] = None
        elif options["seed"] is None:
            options["seed"] = int.from_bytes(os.urandom(4), "big")
    return options


def check_prompts(prompts, first_number, n_tokens_to_generate, n_vocab, n_ctx):
    """Convert prompts to lists of ids. Raises ValueError for one that is too long, empty or has an unknown id."""
    prompts = [[operator.index(id) for id in prompt] for prompt in prompts]  # from integers of any type
    for number, prompt in enumerate(prompts, first_number):
        wrong = [id for id in prompt if not 0 <= id < n_vocab]
        if wrong:
            raise ValueError(f"prompt {number} has the id {wrong[0]}, but ids go from 0 to {n_vocab - 1}")
        if not 1 <= len(prompt) <= n_ctx - n_tokens_to_generate:
            counts = f"{len(prompt)} tokens and {n_tokens_to_generate} are to be generated"
            raise ValueError(f"prompt {number} has {counts}: at most {n_ctx} together, and at least 1 in a prompt")
    return prompts


def read_prompts(prompts, prompt, prompts_file):
    """The prompts of a command; none if they are to be asked for. Raises ValueError or OSError.

    Bytes that are not UTF-8 become lone surrogates, which the tokenizer refuses.
    """
    prompts = [*prompts] if prompt is None else [*prompts, prompt]
    if prompts_file is None and (prompts or sys.stdin.isatty()):
        return prompts
    if prompts:
        raise ValueError("give prompts or --prompts_file, not both")
    path = 0 if prompts_file in (None, "-") else os.path.expanduser(prompts_file)  # 0: standard input
    file = open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n", closefd=path != 0)  # noqa: SIM115
    if re.match(rb"(?s)\xff\xfe|\xfe\xff|.\0.\0|\0.\0.", file.buffer.peek(4)):  # its byte order mark, or two letters
        raise ValueError(f"{path or 'standard input'} is UTF-16 text, not UTF-8")
    lines = [file.read()] if prompts_file is None else file
    lines = (line.removesuffix("\n").removesuffix("\r") for line in lines)
    if prompts_file is None or file.seekable():
        return list(lines)
    return lines  # from a pipe they come one by one


def plain(error):
    """What an error says, in one line."""
    if isinstance(error, UnicodeError):
        return "a prompt is not UTF-8"
    return " ".join(str(error).split()) or repr(error)


def show(prompts, texts, first_row=0):
    """Print a text while it is generated, or several, each below its prompt."""
    for prompt, pieces in zip(prompts, texts(prompts, first_row=first_row)):
        if len(prompts) > 1:
            print(f"> {prompt}")
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def write_json_lines(lines, batch_size, texts):
    """Print {"prompt": ..., "text": ...} for each line, or "error" in place of "text"; then ValueError at the end."""
    from tqdm import tqdm

    def answers(batch, first_row):
        try:
            return [{"text": "".join(pieces)} for pieces in texts(batch, first_row=first_row)]
        except ValueError as error:
            if len(batch) == 1:
                return [{"error": f"line {first_row + 1}: {plain(error)}"}]
        half = len(batch) // 2  # halve the batch until the bad line is alone
        return answers(batch[:half], first_row) + answers(batch[half:], first_row + half)

    # No bar between answers on a terminal; else (None) tqdm shows it if standard error is a terminal.
    bar = tqdm(lines, unit=" prompts", disable=sys.stdout.isatty() or None)  # it counts them, if it is a list
    lines, failed = iter(lines), []  # for each line that is done: whether it has no text
    while batch := list(itertools.islice(lines, batch_size)):
        for line, answer in zip(batch, answers(batch, len(failed))):
            line = line.encode(errors="surrogateescape").decode(errors="replace")
            print(json.dumps({"prompt": line, **answer}), flush=True)
            failed.append("error" in answer)
        bar.update(len(batch))
    bar.close()
    if any(failed):
        raise ValueError(f"no text for {sum(failed)} of {len(failed)} prompts; their lines say why")


def ask(texts):
    """Show the text after each line typed, until Ctrl-D. Ctrl-C stops a text or drops what is typed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and a history)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("Type the beginning of a text. Ctrl-C stops what follows, Ctrl-D ends.", file=sys.stderr)
    for row in itertools.count():  # each line is a row of its own to the random generators
        try:
            show([input("> " if sys.stdout.isatty() else "")], texts, row)  # only text goes to a file
        except EOFError:
            return print(file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except ValueError as error:
            print(f"error: {plain(error)}", file=sys.stderr)


def parse(function):
    """Let fire split the command line into args and options for the function; all stay strings, exactly as typed."""
    from fire import Fire, core, decorators, helptext, trace

    calls = []
    # fire calls a function before it sees an unknown flag, so what it calls is a stand-in
    stand_in = functools.wraps(function)(lambda *args, **options: calls.append((args, options)))
    decorators.SetParseFn(lambda text: text.lstrip("\0"))(stand_in)  # no "1,2" that becomes a tuple
    at_start = trace.FireTrace(function, os.path.basename(sys.argv[0]))
    flags = list(itertools.takewhile(lambda argument: argument != "--", sys.argv[1:]))
    if not {"-h", "--help"}.isdisjoint(flags):
        print(helptext.HelpText(function, at_start), flush=True)
        sys.exit()
    # NUL, which nobody can type, marks what fire would not take for an argument: "-", and all that follows "--".
    arguments = ["\0-" if argument == "-" else argument for argument in flags]
    arguments += [f"\0{argument}" for argument in sys.argv[len(flags) + 2 :]]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # fire would not list the flags that there are
            Fire(stand_in, arguments)
    except core.FireExit as result:
        fault = result.trace.elements[-1].ErrorAsStr().replace("\0", "")
        print(f"ERROR: {fault}\n{helptext.UsageText(function, at_start)}", file=sys.stderr)
        print("After -- a prompt may begin with a dash.", file=sys.stderr)
        raise
    for flag, value in zip(flags, [*flags[1:], "--"]):
        if re.fullmatch("--?[A-Za-z][A-Za-z_-]*", flag) and re.match("-[A-Za-z-]", value):
            raise ValueError(f"{flag} needs a value")  # for --seed --top_k 5, fire takes "True" as the seed
    if sum(re.match("--?prompt(=|$)", flag) is not None for flag in flags) > 1:
        raise ValueError("give --prompt once; further prompts need no flag")
    return calls[0]


def run(function):
    """Run a function as a command: fire parses the arguments; mistakes end in one line."""
    is_process = sys.stdout is sys.__stdout__ and not hasattr(sys, "ps1")  # else it is run in IPython or a notebook
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:  # it was closed: 2>&-
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if is_process:
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another one
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it by the signal, so a shell loop around it ends
    try:
        args, options = parse(function)
        with np.errstate(all="ignore"):  # NaN is found in the logits
            result = function(*args, **options)
        if result is not None:
            print(result)
        sys.stdout.flush()
        if is_process:
            gc.freeze()  # Python need not look for garbage when it ends: 40 ms
    except (ImportError, MemoryError, OSError, ValueError) as error:
        if is_process:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drop unwritten text
        hint = f"; pip install {PACKAGES}" if isinstance(error, ModuleNotFoundError) else ""
        sys.exit(141 if isinstance(error, BrokenPipeError) else f"error: {plain(error)}{hint}")  # 141 is 128 + SIGPIPE
