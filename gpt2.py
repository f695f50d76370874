"""GPT-2 in plain NumPy: the model, generation, the command line.

The model is that of "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019); OpenAI's code is at
https://github.com/openai/gpt-2. A token is a piece of text, about four letters; its id is its number in the vocabulary.
Given ids, the model returns logits: at each position one score for every token that could come next.

Shapes stand at the end of a line; "..." is nothing or a batch axis. OpenAI's 124M (million weights) has n_vocab = 50257
tokens, n_ctx = 1024 positions (the context length), n_embd = 768 numbers a token, n_head = 12, d_head = 768 / 12 = 64.
"""

import itertools
import json
import sys

import numpy as np

# ---- The model ------------------------------------------------------------------------------------------------------
# Array functions only: with jax.numpy in place of np, JAX can compile and differentiate it (without a cache).


def gelu(x):
    """max(x, 0) with a soft bend (Hendrycks & Gimpel, 2016), in the tanh approximation GPT-2 was trained with."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * (x * x * x))))  # x**3 would be far slower


def softmax(x):
    """Turn scores into probabilities that add up to 1, along the last axis."""
    exp_x = np.exp(x - x.max(-1, keepdims=True))  # subtracting the maximum changes no result, but prevents overflow
    exp_x /= exp_x.sum(-1, keepdims=True)
    return exp_x


def layer_norm(x, g, b, eps=1e-5):
    """Bring each position's numbers to mean 0 and variance 1, scale them by g (gain) and shift them by b (bias)."""
    x = x - x.sum(-1, keepdims=True) / x.shape[-1]  # sum() / n takes half the time of mean()
    variance = (x * x).sum(-1, keepdims=True) / x.shape[-1]  # [..., 1]
    return x / np.sqrt(variance + eps) * g + b


def linear(x, w, b):
    """x times the weights w, plus the bias b."""
    rows = x.reshape(-1, w.shape[0])  # flatten to one matrix, so that NumPy reads w once and not once per sequence
    return (rows @ w + b).reshape(*x.shape[:-1], w.shape[1])  # [..., n_in] @ [n_in, n_out] -> [..., n_out]


def ffn(x, c_fc, c_proj):
    """The feed-forward network (mlp), for each position alone. c_fc: fully connected layer; c_proj: projection back."""
    return linear(gelu(linear(x, **c_fc)), **c_proj)  # {"w", "b"} each; [..., n_embd] -> 4*n_embd -> n_embd


def attention(q, k, v, mask):
    """Let each position gather information from others ("Attention Is All You Need", Vaswani et al., 2017, 3.2.1).

    Each has a query q (what it looks for), a key k (what it can be found by) and a value v (what it tells). The better
    a query matches a key, the more of that key's value it takes. The mask is 0 where it may look, and -inf where not.
    """
    q = q / q.shape[-1] ** 0.5  # dot products grow with sqrt(d_head); undivided, one key would get all the weight
    scores = q @ k.swapaxes(-1, -2)  # [..., n_query, d_head] @ [..., d_head, n_key] -> [..., n_query, n_key]
    return softmax(scores + mask) @ v  # [..., n_query, n_key] @ [..., n_key, d_head] -> [..., n_query, d_head]


def causal_mask(query_positions, key_positions):
    """The one rule: a query at position p sees the keys at positions <= p. [..., n_query] and [n_key] -> the mask."""
    queries = np.expand_dims(query_positions, (-3, -1))  # [..., 1, n_query, 1]; the first 1 stands for every head
    return np.where(key_positions <= queries, np.float32(0), np.float32(-np.inf))  # [..., 1, n_query, n_key]


def mha(x, c_attn, c_proj, n_head, cache=None, start=0):
    """Multi-head attention: n_head heads side by side. c_attn makes the q, k, v of each. x begins at position start."""
    qkv = linear(x, **c_attn).reshape(*x.shape[:-1], 3, n_head, -1)  # [..., n_seq, 3, n_head, d_head]
    q, k, v = (qkv[..., i, :, :].swapaxes(-2, -3) for i in range(3))  # 3 times [..., n_head, n_seq, d_head]
    positions = np.expand_dims(start, -1) + np.arange(x.shape[-2])  # [n_seq]; with a start per row [n_batch, n_seq]
    # The KV cache, for generation. A position's keys and values depend only on the tokens up to it, so they never
    # change. They are kept, and a new token costs one query instead of one for every token of the text.
    if cache is not None:  # this layer's: [2 (keys, values), n_batch, n_head, n_positions, d_head]
        for b, at in enumerate(positions):  # each row of the batch is at positions of its own
            cache[:, b, :, at[0] : at[-1] + 1] = k[b], v[b]  # 2 times [n_head, n_seq, d_head]
        k, v = cache[:, :, :, : positions.max() + 1]  # up to the longest row: 2 times [n_batch, n_head, n_key, d_head]
    mask = causal_mask(positions, np.arange(k.shape[-2]))  # [..., 1, n_seq, n_key]
    heads = attention(q, k, v, mask).swapaxes(-2, -3)  # [..., n_seq, n_head, d_head]
    return linear(heads.reshape(x.shape), **c_proj)  # mix what the heads have found: [..., n_seq, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, cache=None, start=0):
    """Attention moves information between positions, ffn works on it. Each adds to x instead of replacing it."""
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, cache=cache, start=start)  # [..., n_seq, n_embd]
    return x + ffn(layer_norm(x, **ln_2), **mlp)  # [..., n_seq, n_embd]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None, start=0):
    """The logits of the next token at every position: ids [..., n_seq] -> [..., n_seq, n_vocab].

    wte, wpe: word token and position embeddings, n_embd numbers each. blocks[3]["mlp"]["c_fc"]: weights of layer 3.
    With a cache, start is the position of each row's first id, and only its last id gets logits: [n_batch, n_vocab].
    """
    inputs = np.asarray(inputs)
    positions = np.expand_dims(start, -1) + np.arange(inputs.shape[-1])  # [n_seq], with a cache [n_batch, n_seq]
    x = wte[inputs] + wpe[positions]  # what the token is, and where it is: [..., n_seq, n_embd]
    for i, block in enumerate(blocks):
        x = transformer_block(x, **block, n_head=n_head, cache=None if cache is None else cache[i], start=start)
    if cache is not None:
        x = x[:, -1]  # only the last position gives the next token; the other logits would be up to a third of the work
    return layer_norm(x, **ln_f) @ wte.T  # the same matrix reads tokens in and scores them on the way out


# ---- Sampling and generation ----------------------------------------------------------------------------------------


def sample_probs(logits, temperature=None, top_k=None, top_p=None):
    """The probabilities to draw the next token from, in float64: [..., n_vocab] -> [..., n_vocab].

    A temperature below 1 favours probable tokens more, above 1 less. Then top_k keeps the k most probable tokens, and
    top_p the fewest that together reach probability p (Holtzman et al., 2020). Ties with the last one stay too.
    """
    temperature = 1 if temperature is None else max(temperature, 1e-300)  # at 0 the highest logit gets everything
    logits = np.asarray(logits, np.float64, order="C")  # so that reshape below gives views
    logits = (logits - logits.max(-1, keepdims=True)) / temperature  # the highest is 0, so nothing overflows
    if top_k and top_k < logits.shape[-1]:
        logits = np.where(logits < np.partition(logits, -top_k)[..., -top_k, None], -np.inf, logits)  # < k-th highest
    probs = softmax(logits)
    if top_p and top_p < 1:
        for row in probs.reshape(-1, probs.shape[-1]):  # [n_vocab]; what is set in row is set in probs
            falling = np.sort(row[row >= (1 - top_p) / len(row)])[::-1]  # sort only these; the rest sums to < 1 - top_p
            sum_before = falling.cumsum() - falling  # of the more probable tokens
            row[row < falling[sum_before < top_p][-1]] = 0  # [-1]: the last token that is needed to reach p
        probs /= probs.sum(-1, keepdims=True)
    return probs


def generate_steps(prompts, params, n_head, n_tokens_to_generate, first_row=0, stop_id=None,
                   temperature=None, top_k=None, top_p=None, seed=None):  # fmt: skip
    """Yield the next id of every prompt, [n_batch], step by step. Raises ValueError for a prompt that does not fit.

    Greedy (the highest logit) if temperature is 0 or none of temperature, top_k, top_p and seed is given. Else row b
    draws with random numbers made from seed and its place among all prompts, first_row + b. Ends once all had stop_id.
    """
    (n_vocab, n_embd), n_ctx, n_batch = params["wte"].shape, len(params["wpe"]), len(prompts)
    lengths, n_new = [len(prompt) for prompt in prompts], n_tokens_to_generate
    for number, prompt in enumerate(prompts, first_row + 1):
        if not 1 <= len(prompt) <= n_ctx - n_new or min(prompt) < 0 or max(prompt) >= n_vocab:
            limit = f"at most {n_ctx} together, the context length (a prompt has 1 or more, with ids below {n_vocab})"
            raise ValueError(f"prompt {number} has {len(prompt)} tokens and {n_new} are to be generated: {limit}")
    greedy = temperature == 0 or [temperature, top_k, top_p, seed] == [None] * 4
    seeds = [None if seed is None else [seed, first_row + b] for b in range(n_batch)]
    streams = [] if greedy else [np.random.default_rng(row_seed) for row_seed in seeds]  # np.random is slow to import
    cache_shape = len(params["blocks"]), 2, n_batch, n_head, max(lengths) + n_new, n_embd // n_head
    model = {**params, "n_head": n_head, "cache": np.zeros(cache_shape, np.float32)}

    # Prefill: run the prompts through the model, about 256 tokens at a time to bound the memory. Short prompts are
    # padded on the right: pads come after a row's real tokens, so no real token sees them, and generated tokens
    # overwrite them in the cache. The last call (in the loop below) gives the logits, so it takes the last n_last
    # tokens of each row. Prompts of 2 and 9: positions 0-6 of both (5 pads), then 0-1 (again) of one, 7-8 of the other.
    piece = max(1, 256 // n_batch)
    n_last = min(piece, *lengths)  # not more than the shortest has; 1 would do, more can save a call
    n_before = max(lengths) - n_last
    padded = np.array([(list(prompt) + [0] * n_before)[:n_before] for prompt in prompts])  # [n_batch, n_before]
    for first in range(0, n_before, piece):
        gpt2(padded[:, first : first + piece], **model, start=[first] * n_batch)  # only to fill the cache
    inputs = np.array([prompt[-n_last:] for prompt in prompts])  # [n_batch, n_last]
    start = np.array(lengths) - n_last  # [n_batch]

    ended = np.zeros(n_batch, bool)
    for _ in range(n_new):
        logits = gpt2(inputs, **model, start=start)  # [n_batch, n_vocab]
        if greedy:
            ids = logits.argmax(-1)  # [n_batch]
        else:
            probs = sample_probs(logits, temperature, top_k, top_p)
            ids = np.array([stream.choice(n_vocab, p=row) for stream, row in zip(streams, probs)])
        yield ids
        ended |= ids == stop_id
        if ended.all():  # until then ended rows are still computed; ignore their further ids
            return
        start = start + inputs.shape[1]  # after prompts of 2 and 9 tokens: [2, 9], then [3, 10]
        inputs = ids[:, None]  # from now on one query for each row: [n_batch, 1]


def generate(inputs, params, n_head, n_tokens_to_generate, **options):
    """The ids that follow a prompt's ids: a list; for a list of prompts a list of lists. See generate_steps."""
    is_batch = any(np.ndim(prompt) for prompt in inputs)
    prompts = inputs if is_batch else [inputs]
    steps = list(generate_steps(prompts, params, n_head, n_tokens_to_generate, **options))
    rows = np.reshape(steps, (-1, len(prompts))).T.tolist()  # [n_batch, n_steps]
    return rows if is_batch else rows[0]


# ---- The command line -----------------------------------------------------------------------------------------------


def complete(prompts, model, batch_size, first_row=0, **options):
    """Yield each prompt with the pieces of its text, batch by batch. A prompt is read when its batch is due."""
    encoder, hparams, params = model
    prompts, end = iter(prompts), encoder.encoder["<|endoftext|>"]
    while batch := list(itertools.islice(prompts, batch_size)):
        ids = [encoder.encode(prompt) or [end] for prompt in batch]  # "" becomes the token that stands between texts
        steps = generate_steps(ids, params, hparams["n_head"], first_row=first_row, stop_id=end, **options)
        rows = zip(*steps) if len(batch) > 1 else [(id for [id] in steps)]  # one prompt: id by id
        for prompt, row in zip(batch, rows):
            yield prompt, encoder.decode_steps(itertools.takewhile(lambda id: id != end, row))
        first_row += len(batch)


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir=None, batch_size=32, **sampling):
    """The text that follows a prompt; for a list of prompts a list. Raises ValueError, OSError or ImportError."""
    from utils import check_options, load_encoder_hparams_and_params

    options = check_options(n_tokens_to_generate=n_tokens_to_generate, batch_size=batch_size, **sampling)
    model = load_encoder_hparams_and_params(model_size, models_dir)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    texts = ["".join(pieces) for _, pieces in complete(prompts, model, **options)]
    return texts[0] if isinstance(prompt, str) else texts


def cli(*prompts: str, prompt: str = None, prompts_file: str = None, n_tokens_to_generate=40,  # noqa: RUF013
        model_size="124M", models_dir: str = None, temperature: float = None, top_k: int = None,  # noqa: RUF013
        top_p: float = None, seed: int = None, batch_size=32):  # fmt: skip # noqa: RUF013
    """Continue a text with GPT-2.

    One prompt: the text appears as it is generated. Several: "> prompt", and below it its text. None: asks for prompts
    until Ctrl-D, or takes what comes through a pipe as one prompt. Greedy (always the most probable token) unless
    temperature, top_k, top_p or seed is given: then tokens are drawn at random.

    Args:
        prompts: beginnings of texts
        prompt: one more, which may begin with a dash: --prompt="--like this"
        prompts_file: a file with one prompt a line, or - for standard input; writes {"prompt": ..., "text": ...} lines
        n_tokens_to_generate: how many tokens to generate at most; one is about four letters
        model_size: 124M, 355M, 774M or 1558M (downloaded once), 2M (included), or any folder in models_dir
        models_dir: the folder with the models; without it, the folder "models" beside gpt2.py
        temperature: below 1 favours probable tokens more, above 1 less; 0: greedy; without it, 1
        top_k: draw from the k most probable tokens; without it (or 0), from all
        top_p: draw from the fewest tokens that together have this probability; without it (or 1), from all
        seed: a whole number; the same one gives the same text again; without it, another text each time
        batch_size: how many prompts to work on together
    """
    from utils import ask, check_options, load_encoder_hparams_and_params, read_prompts

    options = check_options(n_tokens_to_generate=n_tokens_to_generate, temperature=temperature, top_k=top_k,
                            top_p=top_p, seed=seed, batch_size=batch_size)  # fmt: skip
    prompts = prompts if prompt is None else (*prompts, prompt)
    if prompts_file is not None:
        if prompts:
            raise ValueError("give prompts or --prompts_file, not both")
        prompts = read_prompts(open(0 if prompts_file == "-" else prompts_file, "rb"))  # noqa: SIM115
    elif not prompts and not sys.stdin.isatty():
        prompts = [*read_prompts([sys.stdin.buffer.read()])]
    model = load_encoder_hparams_and_params(model_size, models_dir)

    def show(prompts, first_row=0):
        for given, pieces in complete(prompts, model, first_row=first_row, **options):
            if prompts_file is not None:
                line = {"prompt": given, "text": "".join(pieces)}
                pieces = [json.dumps(line, ensure_ascii=sys.stdout.encoding.lower() != "utf-8")]
            elif len(prompts) > 1:
                print(f"> {given}")
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)

    if prompts or prompts_file is not None:
        show(prompts)
    else:
        ask(show)  # each line typed gets a random stream of its own


if __name__ == "__main__":
    from utils import run

    run(cli)
