"""Get a model (what is downloaded is verified; after that the disk is trusted), and turn a function into a command."""

import contextlib
import difflib
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

PACKAGES = "numpy regex requests tqdm fire"
try:
    import numpy as np
except ImportError as error:
    sys.exit(f"error: {error}; pip install {PACKAGES}")

URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # or what GPT2_MODELS_URL in the environment says
SUFFIX = ".data-00000-of-00001"
DATA = "model.ckpt" + SUFFIX
FILES = ["encoder.json", "vocab.bpe", "hparams.json", "checkpoint", "model.ckpt.index", DATA]
RELEASED = {
    size: {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_embd // 64, "n_layer": n_layer}
    for size, n_embd, n_layer in [("124M", 768, 12), ("355M", 1024, 24), ("774M", 1280, 36), ("1558M", 1600, 48)]
}
SHA256 = {  # as far as they are public; those without a size are for all four models
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "124M/model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    f"124M/{DATA}": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
}


# ---- Download -------------------------------------------------------------------------------------------------------
def download_gpt2_files(model_size, model_dir):
    """Fetch the files of a released model that model_dir lacks. Raises ValueError, or OSError if they cannot be had."""
    model_dir, shapes = Path(os.path.expanduser(model_dir)), tensor_shapes(RELEASED[model_size])
    n_bytes = 4 * sum(map(math.prod, shapes.values()))  # of the data file, which is all weights as float32

    def is_there(name):
        path = model_dir / name
        return path.exists() and (name != DATA or path.stat().st_size == n_bytes)

    if all(map(is_there, FILES)):
        return
    url = f"{(os.environ.get('GPT2_MODELS_URL') or URL).rstrip('/')}/{model_size}"
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"GPT2_MODELS_URL must begin with http:// or https://, unlike {url.rpartition('/')[0]}")
    print(f"fetching {model_size}, {n_bytes / 1e6:.0f} MB, from {url} to {model_dir}", file=sys.stderr)
    model_dir.mkdir(parents=True, exist_ok=True)
    with open(model_dir / ".lock", "w") as lock:
        with contextlib.suppress(ImportError, OSError):  # Windows has no such lock, nor has every network disk
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # waits while another run fetches it
        for name in itertools.filterfalse(is_there, FILES):
            download(f"{url}/{name}", model_dir / name, model_size, n_bytes if name == DATA else 0)


def download(url, path, model_size, n_bytes):
    """Fetch url into path.part and rename it once it is verified. n_bytes: the data file's; 0 for the small files."""
    import requests

    part, n_fruitless, handled = Path(f"{path}.part"), 0, sys.exc_info()[1]  # handled: by a caller's except
    part.touch()
    while True:
        size = part.stat().st_size if part.stat().st_size < n_bytes else 0  # the next try or run resumes the data file
        try:
            fetch(url, part, size, n_bytes)
            if not is_right(part, path.name, model_size):
                raise ValueError(f"it is not OpenAI's {path.name}")
            return part.replace(path)
        except (requests.RequestException, ValueError) as error:
            cause = error
            while cause.__context__ not in (None, handled):  # the first cause of it says "Connection refused"
                cause = cause.__context__
            proxy = "the proxy: " if isinstance(error, requests.exceptions.ProxyError) else ""
            failure = f"cannot fetch {url}: {proxy}{getattr(cause, 'strerror', None) or plain(cause)}"
            n_fruitless = 0 if size < part.stat().st_size < n_bytes else n_fruitless + 1
            if isinstance(error, (ValueError, requests.exceptions.SSLError)):  # it is no use to try again
                raise OSError(failure) from None
        if n_fruitless == 5:
            raise OSError(f"{failure}; run again to go on where it stopped (--model_size 2M works without a network)")
        print(f"{failure}; trying again", file=sys.stderr)
        time.sleep(2**n_fruitless / 8)  # seconds


def fetch(url, part, size, n_bytes):
    """Append the rest of url to the file part, which has size bytes. ValueError: trying again cannot help."""
    import requests
    from tqdm import tqdm

    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={size}-"} if size else {})}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:  # seconds to connect, to read
        status, headers = response.status_code, response.headers
        match = re.fullmatch(rf"bytes {size}-\d+/(\d+)", headers.get("Content-Range", ""))
        if status == 200:  # it begins at byte 0, and perhaps does not tell its length (then total is 0)
            skip, total = size, 0 if "Content-Encoding" in headers else int(headers.get("Content-Length", 0))
        elif status == 206 and match:
            skip, total = 0, int(match[1])
        else:
            kind = ValueError if 400 <= status < 500 and status not in (408, 429) else requests.HTTPError
            raise kind(f"HTTP status {status}")
        if n_bytes and total not in (0, n_bytes):
            raise ValueError(f"HTTP status {status} and a file of {total} bytes, not of {n_bytes}")
        bar = tqdm(desc=part.stem, total=n_bytes or total, initial=size, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if size else "wb") as file:
            try:
                for chunk in response.iter_content(2**14):
                    new = chunk[skip:]
                    skip -= len(chunk) - len(new)
                    bar.update(file.write(new))
                    if file.tell() > (n_bytes or 2**22):
                        raise ValueError(f"HTTP status {status} and more bytes than the file has")
                if file.tell() < (n_bytes or 1):
                    raise requests.HTTPError(f"only {file.tell()} bytes came")
            finally:
                if n_bytes and (file.tell() > n_bytes or (file.tell() < n_bytes and not total)):
                    file.truncate(size)  # these bytes may belong to something else, a login page, say


def is_right(path, name, model_size):
    """Whether a file is the one that OpenAI released, by its content, SHA-256 or last bytes, if one is known."""
    if name == "hparams.json":
        return json.loads(path.read_bytes()) == RELEASED[model_size]
    known = SHA256.get(name) or SHA256.get(f"{model_size}/{name}")
    if name == "model.ckpt.index" and not known:
        return path.read_bytes().endswith(b"\x57\xfb\x80\x8b\x24\x75\x47\xdb")  # the last bytes of any index
    return known is None or known == hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


# ---- Load -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def reading(path):
    """Turn whatever goes wrong while a file is read into one error that names it and says what to do."""
    try:
        yield
    except Exception as error:
        mend = {"2M": "git checkout models", **dict.fromkeys(RELEASED, "delete it, and the next run fetches it")}
        mend = mend.get(Path(path).parent.name, "put a good copy in its place")
        raise ValueError(f"cannot read {path} ({type(error).__name__}: {error}); {mend}") from None


def tensor_shapes(hparams):
    """{name in the checkpoint: shape} for all tensors of a model, in the order in which a data file holds them."""
    n = hparams["n_embd"]
    weights = {"attn/c_attn": (n, 3 * n), "attn/c_proj": (n, n), "mlp/c_fc": (n, 4 * n), "mlp/c_proj": (4 * n, n)}
    block = {"ln_1/g": (n,), "ln_1/b": (n,), "ln_2/g": (n,), "ln_2/b": (n,)}
    for name, shape in weights.items():
        block |= {f"{name}/w": shape, f"{name}/b": shape[1:]}
    shapes = {"wte": (hparams["n_vocab"], n), "wpe": (hparams["n_ctx"], n), "ln_f/g": (n,), "ln_f/b": (n,)}
    shapes |= {f"h{i}/{name}": shape for i in range(hparams["n_layer"]) for name, shape in block.items()}
    return {f"model/{name}": shapes[name] for name in sorted(shapes)}


def is_plain(index, shapes, n_bytes):
    """Whether a data file of n_bytes is just these tensors as float32, by the places and sizes that its index tells."""

    def varint(number):  # as protobuf writes it: seven bits a byte, the lowest first; 128 is added if more bytes follow
        return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)

    found = offset = 0
    for shape in shapes.values():
        size = 4 * math.prod(shape)
        # Sorted by name, the index has for each tensor its offset (field 4, left out if 0) and its size (field 5).
        entry = (b"\x20" + varint(offset) if offset else b"") + b"\x28" + varint(size)
        found = index.find(entry, found) + 1
        if not found:
            return False
        offset += size
    return offset == n_bytes


def read_through_tensorflow(tf_ckpt_path, shapes):
    """The tensors of a checkpoint that holds more than the model, or holds it in another form."""
    print(f"TensorFlow reads {tf_ckpt_path}: it is not float32 variables alone (save only these)", file=sys.stderr)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with reading(f"{tf_ckpt_path}.index or {SUFFIX} through TensorFlow (pip install -r requirements.txt)"):
        from tensorflow import train

        reader = train.load_checkpoint(tf_ckpt_path)
        found = reader.get_variable_to_shape_map()
        for name, shape in shapes.items():
            if found.get(name) not in ([*shape], [1, *shape]):  # OpenAI's w is [1, n_in, n_out]
                raise ValueError(f"{name} is {found.get(name, 'missing')}, by hparams.json it is {[*shape]}")
        return [reader.get_tensor(name).astype(np.float32) for name in shapes]


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """The weights, a nested dict of float32 arrays: params["blocks"][3]["attn"]["c_attn"]["w"]. Raises ValueError."""
    shapes, tf_ckpt_path = tensor_shapes(hparams), os.path.expanduser(tf_ckpt_path)
    data, index = Path(tf_ckpt_path + SUFFIX), Path(tf_ckpt_path + ".index")
    with reading(f"{index} or {data}"):
        can_be_mapped = is_plain(index.read_bytes(), shapes, data.stat().st_size)
        if can_be_mapped:  # it takes no time and no second copy; the download verified it, where a hash is public
            ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
            tensors = np.split(np.memmap(data, "<f4", "r").view(np.ndarray), ends[:-1])
    if not can_be_mapped:
        tensors = read_through_tensorflow(tf_ckpt_path, shapes)
    params = {"blocks": [{} for _ in range(hparams["n_layer"])]}
    for (name, shape), tensor in zip(shapes.items(), tensors):
        _, *keys, last = name.split("/")  # model/h3/attn/c_attn/w
        inner = params
        for key in keys:
            inner = params["blocks"][int(key[1:])] if key[0] == "h" else inner.setdefault(key, {})
        inner[last] = tensor.reshape(shape)
    np.empty(8_000_000, np.float32)  # freed at once: from then on glibc reuses blocks of up to 32 MB, which is faster
    return params


def load_encoder_hparams_and_params(model_size="124M", models_dir=None):
    """The model in models_dir; a released one is downloaded first. Raises ValueError, OSError or ImportError."""
    from encoder import get_encoder

    models_dir = Path(os.path.expanduser(models_dir or Path(__file__).resolve().parent / "models")).resolve()
    model_dir = models_dir / model_size
    if (models_dir / "hparams.json").exists() and not model_dir.exists():
        raise ValueError(f"{models_dir} is a model: --models_dir {models_dir.parent} --model_size {models_dir.name}")
    if model_size in RELEASED:
        download_gpt2_files(model_size, model_dir)
    prefixes, checkpoint = sorted(path.stem for path in model_dir.glob("*.index")), model_dir / "checkpoint"
    if not prefixes:
        there = ", ".join(sorted({path.parent.name for path in models_dir.glob("*/*.index")})) or "none"
        where = f"no model {model_size!r} with an *.index file in models_dir, {models_dir}"
        raise ValueError(f"{where}; there: {there}; to fetch: {', '.join(RELEASED)}")
    if checkpoint.exists():
        with reading(checkpoint):
            found = re.search(r"model_checkpoint_path\s*:\s*(\"|')(.+?)\1", checkpoint.read_text("utf-8-sig"))
        if found:
            prefixes = [re.split(r"[/\\]", found[2])[-1]]  # it may be a path on another machine
    if len(prefixes) > 1:
        line = f'model_checkpoint_path: "{prefixes[-1]}"'
        raise ValueError(f"{checkpoint} must say which of {', '.join(prefixes)} it is, in a line such as {line}")
    with reading(model_dir / "hparams.json"):
        hparams = json.loads((model_dir / "hparams.json").read_bytes())
        is_sound = all(type(hparams[key]) is int and hparams[key] > 0 for key in RELEASED["124M"])
        if not is_sound or hparams["n_embd"] % hparams["n_head"] or hparams != RELEASED.get(model_size, hparams):
            raise ValueError(f"{hparams} makes no sense")
    params = load_gpt2_params_from_tf_ckpt(str(model_dir / prefixes[0]), hparams)
    with reading(model_dir / "encoder.json or vocab.bpe"):
        encoder = get_encoder(model_size, models_dir)
        n_tokens, n_vocab = len(encoder.decoder), hparams["n_vocab"]
        if not max(encoder.decoder) < n_tokens <= n_vocab < 2 * n_tokens or "<|endoftext|>" not in encoder.encoder:
            raise ValueError(f"{n_tokens} tokens (with <|endoftext|>?), but n_vocab is {n_vocab} in hparams.json")
    params["wte"] = params["wte"][:n_tokens]  # n_vocab may be padded to a round number; the padding must not be drawn
    return encoder, hparams, params


# ---- The command line -----------------------------------------------------------------------------------------------
RANGES = {  # name: (type, lowest, highest)
    "n_tokens_to_generate": (int, 0, 10**9), "batch_size": (int, 1, 10**9), "seed": (int, 0, 10**20),
    "temperature": (float, 0, 10**9), "top_k": (int, 0, 10**9), "top_p": (float, 1e-9, 1),
}  # fmt: skip


def check_options(**options):
    """Convert options to numbers; None stays None. Raises ValueError if one is out of range."""
    for name, value in options.items():
        if value is None:
            continue
        (kind, low, high), number = RANGES[name], math.nan  # nan is in no range
        with contextlib.suppress(ValueError):
            number = kind(str(value))  # by way of text, since int(1.5) is 1 but int("1.5") is an error
        if not low <= number <= high:
            raise ValueError(f"{name} must be a number ({kind.__name__}) from {low} to {high}, not {value!r}")
        options[name] = number
    return options


def check_ids(prompt, params, n_head, n_tokens_to_generate):
    """The ids of a prompt as a list of integers. Raises ValueError if the model cannot continue them."""
    (n_vocab, n_embd), n_ctx, ids = params["wte"].shape, len(params["wpe"]), np.asarray(prompt)
    if n_head not in range(1, n_embd + 1) or n_embd % n_head:
        raise ValueError(f"n_head is {n_head!r}, but it has to divide n_embd, {n_embd}")
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= n_vocab:
        raise ValueError(f"a prompt must be a list of ids from 0 to {n_vocab - 1}, at least one, not {prompt!r:.80}")
    if len(ids) + n_tokens_to_generate > n_ctx:
        raise ValueError(f"{len(ids)} tokens and {n_tokens_to_generate} to be generated: at most {n_ctx} together")
    return ids.tolist()


def read_prompts(prompts, prompt, prompts_file):
    """The prompts of a command; None if they are to be asked for. Raises ValueError or OSError."""
    prompts = [*prompts] if prompt is None else [*prompts, prompt]
    with contextlib.suppress(UnicodeError):
        prompts = [os.fsencode(text).decode("utf-8") for text in prompts]  # in the C locale Python took them for ASCII
    if prompts and prompts_file is not None:
        raise ValueError("give prompts or --prompts_file, not both")
    if prompts or (prompts_file is None and os.isatty(0)):
        return prompts or None
    lines = read_lines(prompts_file)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{prompts_file or 'standard input'} is empty")
    return [first] if prompts_file is None else itertools.chain([first], lines)


def read_lines(path):
    """The lines of a file, one by one (-: standard input); without a path all of standard input as one."""
    source = 0 if path in (None, "-") else os.path.expanduser(path)
    # Bytes that are not UTF-8 become lone surrogates, which the tokenizer refuses.
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="\n", closefd=source != 0) as file:
        read = file.read if path is None else file.readline
        while text := read(2**20):  # no context holds a megabyte
            yield text.removesuffix("\n").removesuffix("\r")
            if not text.endswith("\n") and len(read(2**26)) == 2**26:  # go to the end of a line that is too long anyway
                raise ValueError(f"{path} has a line without end")


def ask():
    """The lines that are typed, until Ctrl-D; Ctrl-C drops what is typed."""
    with contextlib.suppress(ImportError):
        import readline  # gives input() line editing and a history

        readline.parse_and_bind(r'"\C-@": "\C-d"')  # NUL is what becomes of a Ctrl-D that is typed while a text runs
    print("Type the beginning of a text. Ctrl-C stops what follows, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            yield input("> " if os.isatty(1) else "")  # only text goes to a file
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return print(file=sys.stderr)


def plain(error):
    """What an error says, in one line without control characters."""
    text = "this is not UTF-8" if isinstance(error, UnicodeError) else str(error) or repr(error)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def show(answers, prompts):
    """Print each text while it is generated. A mistake costs its own text only; so does Ctrl-C if prompts is None."""
    has_failed = False
    for prompt, text in answers:
        if prompts and len(prompts) > 1:
            print(f"> {prompt}")
        try:
            if isinstance(text, ValueError):
                raise text
            for piece in itertools.chain(text, "\n"):
                print(piece, end="", flush=True)
        except ValueError as error:
            has_failed = True
            print(f"error: {plain(error)}", file=sys.stderr)
        except KeyboardInterrupt:
            if prompts:
                raise
            print(file=sys.stderr)
    if prompts and has_failed:
        sys.exit(1)


def show_json(answers):
    """Print {"prompt": ..., "text": ...} for each, or "error" in place of "text"; then ValueError at the end."""
    from tqdm import tqdm

    n_failed = 0
    for prompt, text in tqdm(answers, unit=" prompts", disable=os.isatty(1) or None):
        failed = isinstance(text, ValueError)
        answer = {"error": plain(text)} if failed else {"text": "".join(text)}
        prompt = prompt.encode(errors="surrogateescape").decode(errors="replace")
        print(json.dumps({"prompt": prompt, **answer}), flush=True)
        n_failed += failed
    if n_failed:
        raise ValueError(f"no text for {n_failed} prompts; their lines say why")


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
    # NUL, which nobody can type, hides the dashes of what follows "--" from fire. Two replace "-" as its separator.
    arguments = [*flags, *(f"\0{argument}" for argument in sys.argv[len(flags) + 2 :]), "--", "--separator=\0\0"]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # fire would not list the flags that there are
            Fire(stand_in, arguments)
    except core.FireExit as result:
        fault, usage = result.trace.elements[-1].ErrorAsStr().replace("\0", ""), helptext.UsageText(function, at_start)
        near = difflib.get_close_matches(fault.split()[-1].split("=")[0], re.findall(r"--\w+", usage), 2, 0.7)
        hint = f"did you mean {' or '.join(near)}?" if near else "after -- a prompt may begin with a dash"
        print(f"error: {fault}; {hint}\n{usage}", file=sys.stderr)
        raise
    for flag, value in zip(flags, [*flags[1:], "--"]):
        if re.fullmatch("--?[A-Za-z_]+", flag) and re.match("-[A-Za-z-]", value):
            raise ValueError(f"{flag} needs a value")  # fire would take "True" for it
    return calls[0]


def run(function):
    """Run a function as a command: fire parses the arguments; mistakes end in one line."""
    is_process = sys.stdout is sys.__stdout__ and not hasattr(sys, "ps1")  # else it is run in IPython or a notebook
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, mode))  # it may have been closed: 2>&-
    if is_process:
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another one
    try:
        args, options = parse(function)
        with np.errstate(all="ignore"):  # NaN is found in the logits
            result = function(*args, **options)
        if result is not None:
            print(result)
        sys.stdout.flush()
        gc.freeze()  # Python need not look for garbage when it ends: 40 ms
    except KeyboardInterrupt:
        if is_process:  # without a traceback Python ends by the signal, and so does a shell loop around it
            sys.excepthook = lambda *error: None
        raise
    except (ImportError, KeyError, MemoryError, OSError, ValueError) as error:
        try:
            sys.stdout.flush()
        except OSError:  # nobody takes the text: drop it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        hint = f"; pip install {PACKAGES}" if isinstance(error, ModuleNotFoundError) else ""
        sys.exit(141 if isinstance(error, BrokenPipeError) else f"error: {plain(error)}{hint}")  # 141 is 128 + SIGPIPE
