"""GPT-2 in NumPy, to be read from top to bottom: the model, sampling and generation, the command line.

The model is that of "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), as OpenAI published
it: src/model.py of https://github.com/openai/gpt-2. The names of arguments are the names in its checkpoints.

Shapes stand at the ends of lines; "..." is any axes before, mostly none or [n_batch]. In the released 124M model
n_vocab = 50257, n_ctx = 1024 (the context length), n_embd = 768, n_head = 12, d_head = n_embd / n_head = 64.
"""

import codecs
import contextlib
import itertools
import math
import os
import re
import sys
from json import dumps

import numpy as np

# ---- The model ------------------------------------------------------------------------------------------------------
# Array functions only, so that JAX's NumPy can take NumPy's place. The KV cache alone is assigned to by index.


def gelu(x):
    """Gaussian error linear unit, a ReLU with a soft bend (Hendrycks & Gimpel, 2016), by its tanh approximation.

    The argument of tanh is sqrt(2 / pi) * (x + 0.044715 x**3) in the paper; x**3 is far slower than products.
    """
    c = math.sqrt(2 / math.pi)
    return 0.5 * x * (1 + np.tanh(x * (c + c * 0.044715 * (x * x))))


def softmax(x):
    """Probabilities from logits, along the last axis. Subtracting the maximum only prevents overflow."""
    exp_x = np.exp(x - x.max(-1, keepdims=True))
    exp_x /= exp_x.sum(-1, keepdims=True)  # in place: the matrices of attention are large
    return exp_x


def layer_norm(x, g, b, eps=1e-5):
    """Mean 0 and variance 1 along the last axis, then a learned scale g and offset b (Ba et al., 2016)."""
    x = x - x.sum(-1, keepdims=True) / x.shape[-1]  # for a single row twice as fast as mean()
    variance = (x * x).sum(-1, keepdims=True) / x.shape[-1]  # [..., 1]
    return x / np.sqrt(variance + eps) * g + b


def linear(x, w, b):
    """x w + b. All axes but the last are made one: else NumPy would read w anew for each sequence of a batch."""
    rows = x.reshape(-1, w.shape[0])  # [n_rows, n_in]
    return (rows @ w + b).reshape(*x.shape[:-1], w.shape[1])  # [..., n_in] @ [n_in, n_out] -> [..., n_out]


def ffn(x, c_fc, c_proj):
    """The feed-forward network: each position is worked on by itself ("Attention Is All You Need", section 3.3)."""
    return linear(gelu(linear(x, **c_fc)), **c_proj)  # [..., n_seq, n_embd] -> [..., n_seq, 4*n_embd] -> back


def attention(q, k, v, mask):
    """For each query the mean of the values, weighted by how well their keys match it (the same paper, section 3.2.1).

    A sum of d_head random products has a standard deviation of sqrt(d_head); divided by that, it does not saturate the
    softmax, whatever the size of the model.
    """
    weights = softmax(q / math.sqrt(q.shape[-1]) @ k.swapaxes(-1, -2) + mask)  # [..., n_query, n_key]
    return weights @ v  # [..., n_query, n_key] @ [..., n_key, d_head] -> [..., n_query, d_head]


def mha(x, c_attn, c_proj, n_head, cache=None, positions=None, wanted=slice(None)):
    """Multi-head attention: n_head attentions side by side, each in d_head of the n_embd dimensions.

    The one rule of the mask: a query at position p sees the keys at positions <= p. Where the mask is -inf the softmax
    is exactly 0. This layer's cache, [2, n_batch, n_head, n_positions, d_head], has the keys and values so far. All of
    x give keys and values; x[..., wanted, :] alone make queries.
    """
    positions = np.arange(x.shape[-2]) if positions is None else positions  # [n_seq], or [n_batch or 1, n_seq]
    qkv = linear(x, **c_attn).reshape(*x.shape[:-1], 3, n_head, -1)  # [..., n_seq, 3, n_head, d_head]
    q, k, v = (qkv[..., i, :, :].swapaxes(-3, -2) for i in range(3))  # 3 times [..., n_head, n_seq, d_head]
    if cache is not None:
        # Row b is written at its own positions. (The axes of the two index arrays come first: [n_batch, n_seq, ...].)
        cache[:, np.arange(len(x))[:, None], :, positions] = qkv[..., 1:, :, :]
        k, v = cache[..., : positions.max() + 1, :]  # twice [n_batch, n_head, n_key, d_head]
    q, positions = q[..., wanted, :], positions[..., wanted]  # n_query of the n_seq
    seen = np.arange(k.shape[-2]) <= positions[..., None, :, None]  # [..., 1, n_query, n_key]
    mask = np.where(seen, np.float32(0), np.float32(-np.inf))
    if cache is None or q.shape[-2] == 1:
        heads = attention(q, k, v, mask)  # [..., n_head, n_query, d_head]
    else:  # prefill is up to a tenth faster head by head: the scores of one stay in the processor's own cache
        each = [slice(i, i + 1) for i in range(n_head)]
        heads = np.concatenate([attention(q[:, i], k[:, i], v[:, i], mask) for i in each], axis=1)
    heads = heads.swapaxes(-2, -3)  # [..., n_query, n_head, d_head]
    heads = heads.reshape(*heads.shape[:-2], x.shape[-1])  # side by side: [..., n_query, n_embd]
    return linear(heads, **c_proj)  # and mixed: [..., n_query, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, cache=None, positions=None, wanted=slice(None)):
    """Attention moves information between positions, ffn works at each. Both add to x instead of replacing it.

    The norms come before them (pre-norm), not after as in the first transformer: so x itself passes through untouched,
    which lets deep models train.
    """
    mixed = mha(layer_norm(x, **ln_1), **attn, n_head=n_head, cache=cache, positions=positions, wanted=wanted)
    x = x[..., wanted, :] + mixed  # [..., n_query, n_embd]
    return x + ffn(layer_norm(x, **ln_2), **mlp)  # [..., n_query, n_embd]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None, positions=None, wanted=slice(None)):
    """The logits of the token that follows each input: [..., n_seq] ids -> [..., n_seq, n_vocab].

    With a cache [n_layer, 2, n_batch, n_head, n_positions, d_head], which is written to, inputs is [n_batch, n_seq], at
    positions [n_batch or 1, n_seq]. Only the wanted ones of the n_seq get their logits, slice(-1, None) the last: the
    final block is spared the others, whose keys and values are all that it needs of them.
    """
    inputs = np.asarray(inputs)
    positions = np.arange(inputs.shape[-1]) if positions is None else positions
    x = wte[inputs] + wpe[positions]  # what the token is, and where it is: [..., n_seq, n_embd]
    for i, block in enumerate(blocks):
        kv = None if cache is None else cache[i]
        here = wanted if i == len(blocks) - 1 else slice(None)  # each block needs the whole of the one before
        x = transformer_block(x, **block, n_head=n_head, cache=kv, positions=positions, wanted=here)
    return linear(layer_norm(x, **ln_f), wte.T, 0)  # tied embeddings: a token is likely where x resembles it


# ---- Sampling and generation ----------------------------------------------------------------------------------------

OPTIONS = {  # how to read it, what it must be, how to say that
    "n_tokens_to_generate": (int, lambda n: n >= 1, "a whole number from 1 up"),
    "batch_size": (int, lambda n: n >= 1, "a whole number from 1 up"),
    "temperature": (float, lambda t: 0 <= t < math.inf, "a number from 0 up"),
    "top_k": (int, lambda k: k >= 0, "a whole number from 0 up"),
    "top_p": (float, lambda p: 0 < p <= 1, "a number above 0 and up to 1"),
    "seed": (int, lambda s: s >= 0, "a whole number from 0 up"),
}


def checked(**options):
    """The options as a list of numbers; those from the command line are text. ValueError: one makes no sense."""
    for name, value in options.items():
        if value is None and name in ("temperature", "top_k", "top_p", "seed"):
            continue  # not given
        kind, valid, wanted = OPTIONS[name]
        try:
            options[name] = kind(value)
            if not valid(options[name]) or (not isinstance(value, str) and options[name] != value):  # int(2.5) != 2.5
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name} must be {wanted}, not {value!r}") from None
    return list(options.values())


def sample_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities to sample from, in float64: [..., n_vocab] -> [..., n_vocab]. ValueError: as in checked().

    First the temperature, which sharpens below 1 and flattens above; then only the top_k most probable tokens (and
    those equal to the last of them); then only the smallest set of the most probable that together reach top_p (the
    nucleus; Holtzman et al., 2020).
    """
    temperature, top_k, top_p = checked(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = np.asarray(logits, np.float64)
    temperature = 1.0 if temperature is None else max(temperature, 1e-300)  # 0: the limit, all on the maximum
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    n_vocab = logits.shape[-1]
    if top_k and top_k < n_vocab:
        logits = np.where(logits < np.partition(logits, -top_k)[..., -top_k, None], -np.inf, logits)
    probs = softmax(logits)
    if top_p and top_p < 1:
        # All tokens below (1 - top_p) / n_vocab add up to less than 1 - top_p: only the n others need to be sorted.
        n = (probs >= (1 - top_p) / n_vocab).sum(-1).max()
        ids = np.sort(np.argpartition(-probs, n - 1)[..., :n])  # [..., n], sorted so that of equals the first stays
        ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(probs, ids, -1), kind="stable"), -1)
        nucleus = np.take_along_axis(probs, ids, -1)  # [..., n], falling
        nucleus[nucleus.cumsum(-1) - nucleus >= top_p] = 0  # the more probable ones suffice
        probs = np.zeros_like(probs)
        np.put_along_axis(probs, ids, nucleus / nucleus.sum(-1, keepdims=True), -1)
    return probs


def choose(logits, streams, temperature, top_k, top_p):
    """The next token of each row, [n_batch, n_vocab] -> [n_batch]: drawn from its stream; greedy if there is none."""
    if not streams:
        return logits.argmax(-1)
    cdf = sample_probs(logits, temperature, top_k, top_p).cumsum(-1)
    drawn = np.array([[stream.random()] for stream in streams])  # [n_batch, 1]
    return (cdf <= drawn * cdf[:, -1:]).sum(-1)  # the first token whose cumulative probability exceeds what was drawn


def prefill(prompts, params, n_head, n_positions):
    """A cache with room for n_positions, and ids and positions [n_batch, n_last] of the tokens to go on with.

    About 512 tokens go through the model at a time, which bounds the memory; more would be no faster. Prompts are
    padded on the right: a pad comes after every real token, so no real query sees it. To go on with, each row has the
    last tokens of its prompt, as many as the shortest one has (but no more than fit in a turn): of prompts of 3 and 5
    tokens the last three each, though the cache has two of the three of the first. So the next token is due in all rows
    at once.
    """
    lengths, n_embd = np.array([[len(prompt)] for prompt in prompts]), params["wpe"].shape[1]  # [n_batch, 1]
    n_batch, n_seq, step = len(prompts), lengths.max(), max(1, 512 // len(prompts))
    cache = np.zeros((len(params["blocks"]), 2, n_batch, n_head, n_positions, n_embd // n_head), np.float32)
    tokens = np.array([prompt + [0] * (n_seq - len(prompt)) for prompt in prompts])  # [n_batch, n_seq]
    np.empty(8_000_000, np.float32)  # freed at once: now glibc keeps freed arrays for reuse, which saves up to a sixth
    n_last = min(step, lengths.min())
    for start in range(0, n_seq - n_last, step):  # for the cache: no logits are wanted
        positions = np.arange(start, min(start + step, n_seq - n_last))[None]  # [1, up to step]
        gpt2(tokens[:, positions[0]], **params, n_head=n_head, cache=cache, positions=positions, wanted=slice(0))
    positions = lengths + np.arange(-n_last, 0)  # [n_batch, n_last]
    return cache, np.take_along_axis(tokens, positions, axis=1), positions


def generate(
    inputs, params, n_head, n_tokens_to_generate, temperature=None, top_k=None, top_p=None, seed=None,
    first_row=0, stop_id=None, on_token=None,
):  # fmt: skip
    """The ids that follow a prompt's ids; a list of lists for a list of prompts, which are decoded together.

    Greedy where temperature is 0 or none of temperature, top_k and top_p is given. Row b draws from its own random
    stream, made from seed and the place of its prompt, first_row + b. A row ends before stop_id; on_token(row, id) is
    called for each id.
    ValueError: an option makes no sense, an id is not in the vocabulary, a prompt is empty or over the context length.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    n_new, *sampling, seed = checked(n_tokens_to_generate=n_tokens_to_generate, **options)
    single = len(inputs) == 0 or np.ndim(inputs[0]) == 0
    prompts = [list(prompt) for prompt in ([inputs] if single else inputs)]
    lengths, n_ctx, n_vocab = [len(prompt) for prompt in prompts], len(params["wpe"]), len(params["wte"])
    if not all(prompts) or not all(0 <= id < n_vocab for prompt in prompts for id in prompt):
        raise ValueError(f"a prompt is one id or more, each from 0 to {n_vocab - 1}")
    if max(lengths) + n_new > n_ctx:
        raise ValueError(f"{max(lengths)} tokens of prompt and {n_new} to generate: the context length is {n_ctx}")
    seeds = [None if seed is None else [seed, first_row + row] for row in range(len(prompts))]
    greedy = sampling[0] == 0 or sampling == [None, None, None]  # temperature, top_k, top_p
    streams = [] if greedy else [np.random.default_rng(seed) for seed in seeds]  # (np.random is imported when used)
    cache, ids, positions = prefill(prompts, params, n_head, max(lengths) + n_new)
    new, growing = [[] for _ in prompts], range(len(prompts))
    for _ in range(n_new):
        # First the last tokens of the prompts, then (a decode step) the latest token of each row. Each row is at its
        # own positions, where it replaces in the cache what a pad may have left.
        logits = gpt2(ids, **params, n_head=n_head, cache=cache, positions=positions, wanted=slice(-1, None))
        chosen = choose(logits[:, 0], streams, *sampling)  # [n_batch, 1, n_vocab] -> [n_batch]
        growing = [row for row in growing if chosen[row] != stop_id]
        for row in growing:
            new[row].append(int(chosen[row]))
            if on_token:
                on_token(row, new[row][-1])
        if not growing:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1  # [n_batch, 1]
    return new[0] if single else new


# ---- The command line -----------------------------------------------------------------------------------------------


def encode(prompt, encoder, n_new, n_ctx):
    """text -> ids; "" -> the id of <|endoftext|>. ValueError: no valid text, or over the context length."""
    n_ids = math.ceil(len(prompt) / encoder.longest)  # at least: so megabytes need not be encoded to be refused
    number = f"at least {n_ids}"
    if n_ids <= n_ctx:
        try:
            ids = encoder.encode(prompt) or [encoder.encoder["<|endoftext|>"]]
        except UnicodeEncodeError:
            raise ValueError(f"the prompt {prompt[:40]!r} is not UTF-8 text") from None
        number = n_ids = len(ids)
    if n_ids + n_new > n_ctx:
        limit = f"{number} tokens of prompt and {n_new} to generate, but the context length is {n_ctx}"
        raise ValueError(f"the prompt {prompt[:40]!r} is too long: {limit}")
    return ids


def load(prompts, n_new, model_size, models_dir):
    """A model (encoder, params, n_head), and the ids of the prompts: they are checked before the weights are loaded."""
    import utils

    encoder, hparams, tf_ckpt_path = utils.load_encoder_and_hparams(model_size, models_dir)
    ids = [encode(prompt, encoder, n_new, hparams["n_ctx"]) for prompt in prompts]
    return (encoder, utils.load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams), hparams["n_head"]), ids


def complete(model, ids, options, batch_size=1, first_row=0, on_token=None):
    """The text that follows each prompt, batch by batch."""
    encoder, params, n_head = model
    ends = {"stop_id": encoder.encoder["<|endoftext|>"], "on_token": on_token}
    for i in range(0, len(ids), batch_size):
        new = generate(ids[i : i + batch_size], params, n_head, *options, first_row=first_row + i, **ends)
        yield from map(encoder.decode, new)


def main(
    prompt, n_tokens_to_generate=40, model_size="124M", models_dir="models",
    temperature=None, top_k=None, top_p=None, seed=None, batch_size=32,
):  # fmt: skip
    """The text that follows a prompt; a list of texts for a list of prompts.

    ValueError, OSError: an option or a prompt makes no sense, or the model cannot be had; the message says what to do.
    """
    [batch_size] = checked(batch_size=batch_size)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options = checked(n_tokens_to_generate=n_tokens_to_generate, **sampling)
    model, ids = load([prompt] if isinstance(prompt, str) else prompt, options[0], model_size, models_dir)
    texts = list(complete(model, ids, options, batch_size))
    return texts[0] if isinstance(prompt, str) else texts


def read(path):
    """The text of a file, or of standard input ("-"), unchanged. ValueError: it is not UTF-8."""
    try:
        with open(0 if path == "-" else path, encoding="utf-8", newline="", closefd=path != "-") as f:
            return f.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from None


def show(model, ids, options, first_row=0):
    """Print the text that follows a prompt as it is generated; a character of several tokens, when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def on_token(_, id):
        print(decoder.decode(model[0].decode_bytes([id])), end="", flush=True)

    try:
        list(complete(model, [ids], options, first_row=first_row, on_token=on_token))
    finally:
        print(decoder.decode(b"", final=True), flush=True)


def interact(model, options):
    """Ask for prompts until Ctrl-D, or Ctrl-C at the prompt; during a generation Ctrl-C ends that alone."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    encoder, params, _ = model
    for place in itertools.count():
        try:
            try:
                with contextlib.redirect_stdout(sys.stdout if sys.stdout.isatty() else sys.stderr):  # it is not text
                    prompt = input("> ")
            except (EOFError, KeyboardInterrupt):
                return print(file=sys.stderr)
            show(model, encode(prompt, encoder, options[0], len(params["wpe"])), options, first_row=place)
        except KeyboardInterrupt:
            continue
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def cli(
    *prompts: str, prompt: str = None, prompts_file: str = None, batch_size=32,  # noqa: RUF013
    n_tokens_to_generate=40, model_size="124M", models_dir="models",
    temperature: float = None, top_k: int = None, top_p: float = None, seed: int = None, json=False,  # noqa: RUF013
):  # fmt: skip
    """Continue a prompt with GPT-2.

    One prompt: its text, shown as it is generated. Several: "> prompt" and its text for each. None: it asks for prompts
    again and again, until Ctrl-D; from a pipe it reads one. Each time the most probable token is taken (greedy), unless
    temperature, top_k or top_p is given: then tokens are drawn at random.

    Args:
        prompts: what the text begins with
        prompt: the same, for what begins with a dash: --prompt="--like this"
        prompts_file: a file with one prompt a line; - is standard input
        batch_size: how many prompts to work on at a time
        n_tokens_to_generate: the most tokens to generate; one is about four letters
        model_size: 124M, 355M, 774M, 1558M (downloaded once) or a folder in models_dir, such as 2M
        models_dir: where the models are
        temperature: below 1 favours probable tokens, above 1 improbable ones; 0 is greedy
        top_k: draw from the k most probable tokens; 0 means all
        top_p: draw from the fewest tokens that have this probability together; 1 means all
        seed: a whole number; the same one gives the same text again
        json: print {"prompt": …, "text": …}, one a line
    """
    [batch_size] = checked(batch_size=batch_size)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options = checked(n_tokens_to_generate=n_tokens_to_generate, **sampling)
    prompts = [*prompts, *([] if prompt is None else [prompt])]
    if prompts and prompts_file is not None:
        raise ValueError("give prompts or --prompts_file, not both")
    if prompts_file is not None:
        lines = re.split("\r?\n", read(prompts_file))
        prompts = lines if lines[-1] else lines[:-1]  # a newline ends the last one too
    elif not prompts and not os.isatty(0):
        prompts = [re.sub(r"\r?\n\Z", "", read("-"))]
    as_json = str(json).lower() == "true"
    if not as_json and str(json).lower() != "false":
        raise ValueError(f"json must be true or false, not {json!r}")
    if as_json and not prompts and prompts_file is None:
        raise ValueError("--json needs a prompt")
    model, ids = load(prompts, options[0], model_size, models_dir)
    if not prompts and prompts_file is None:
        return interact(model, options)
    if len(prompts) == 1 and prompts_file is None and not as_json:
        return show(model, ids[0], options)

    from tqdm import tqdm

    texts, escape = complete(model, ids, options, batch_size), sys.stdout.encoding.lower() != "utf-8"
    for given, text in tqdm(zip(prompts, texts), total=len(prompts), disable=None if prompts_file else True):
        line = dumps({"prompt": given, "text": text}, ensure_ascii=escape) if as_json else f"> {given}\n{text}"
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


if __name__ == "__main__":
    from utils import run

    run(cli)
