"""GPT-2 in plain NumPy, after "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019)."""

import itertools
import os
import sys

if __name__ == "__main__":
    from utils import run  # before NumPy, because utils reports a missing NumPy in one line

import numpy as np

# ---- The model ------------------------------------------------------------------------------------------------------
# A token is a piece of text, about four letters; its id is its number in the vocabulary. From ids to the next token:
#   1. Each id becomes its embedding, n_embd numbers for what the token is, plus n_embd for its position: a row of x.
#   2. x passes through n_layer blocks. In each, attention lets a token fetch from itself and those before it, then a
#      feed-forward network works on each token alone. Both add what they find to x.
#   3. After a last layer_norm each row is compared with all embeddings. This gives the logits: a score for each token
#      of the vocabulary, higher if it is more likely to come next. softmax turns scores into probabilities.
# The weights (w, b, g, wte, wpe) were learned by predicting the next token all through 40 GB of text. That is why no
# position may look ahead: it would copy the answer. Comments at line ends give shapes ("...": any leading axes).


def gelu(x):
    """max(x, 0) with a soft bend (Hendrycks & Gimpel, 2016), by their formula with tanh, as in GPT-2's training."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * (x * x * x))))  # x**3 would be far slower


def softmax(x):
    """Turn scores into probabilities that add up to 1, along the last axis."""
    exp_x = np.exp(x - x.max(-1, keepdims=True))  # subtracting the maximum changes no result, but prevents overflow
    exp_x /= exp_x.sum(-1, keepdims=True)
    return exp_x


def layer_norm(x, g, b, eps=1e-5):
    """Bring the numbers of each row to mean 0 and variance 1, scale them by g (gain) and shift them by b (bias)."""
    x = x - x.sum(-1, keepdims=True) / x.shape[-1]  # sum() / n takes half the time of mean()
    variance = (x * x).sum(-1, keepdims=True) / x.shape[-1]  # [..., 1]
    return x / np.sqrt(variance + eps) * g + b


def linear(x, w, b):
    """A linear map: each row of x times the weights w, plus the bias b."""
    rows = x.reshape(-1, x.shape[-1])  # one matrix, so that NumPy reads w once and not once for each sequence
    return (rows @ w + b).reshape(*x.shape[:-1], w.shape[-1])  # [..., n_in] -> [..., n_out]


def ffn(x, c_fc, c_proj):
    """The feed-forward network: a linear map c_fc (fully connected) to 4 * n_embd, a bend, and a map c_proj back."""
    # Without the bend the two would collapse into one. c_ is short for convolution, OpenAI's name for a map {w, b}.
    return linear(gelu(linear(x, **c_fc)), **c_proj)  # [..., n_embd] -> [..., 4 * n_embd] -> [..., n_embd]


def attention(q, k, v, mask):
    """Let each position take values from others ("Attention Is All You Need", Vaswani et al., 2017, section 3.2.1).

    Each has a query q (what it looks for), a key k (what it can be found by) and a value v (what it tells). The better
    a query matches a key, the more of that key's value it takes. The mask is 0 where it may look and -inf where not.
    """
    # Dot products grow with sqrt(d_head); divide by it, or the softmax gives nearly all the weight to one key.
    scores = (q / q.shape[-1] ** 0.5) @ k.swapaxes(-1, -2)  # [..., n_query, d_head] -> [..., n_query, n_key]
    scores += mask
    return softmax(scores) @ v  # [..., n_query, n_key] @ [..., n_key, d_head] -> [..., n_query, d_head]


def mha(x, c_attn, c_proj, n_head, positions=None, cache=None):
    """Multi-head attention: n_head times attention, each head on its own slice of d_head numbers of q, k and v."""
    # One head takes one blend of values; several let a token fetch different things from different places at once.
    if positions is None:
        positions = np.arange(x.shape[-2])  # [n_seq]; those that come with a cache are [n_batch, n_seq]
    # Make the queries, keys and values of all heads. The first n_embd columns of c_attn (for attention) make queries,
    # the next keys, the last values; within each, head 0 has the first d_head columns, head 1 the next, and so on.
    qkv = linear(x, **c_attn)  # [..., n_seq, n_embd] -> [..., n_seq, 3 * n_embd]
    qkv = qkv.reshape(*x.shape[:-1], 3, n_head, -1)  # cut apart: [..., n_seq, 3, n_head, d_head]
    q, k, v = (qkv[..., i, :, :].swapaxes(-2, -3) for i in range(3))  # each [..., n_head, n_seq, d_head]
    if cache is not None:  # skip these two lines for now; the cache is explained below
        k, v = extend(cache, positions, k, v)  # the keys and values of all positions so far
    # The one rule: a query at position p sees the keys at positions <= p.
    query_positions = np.expand_dims(positions, (-3, -1))  # [..., 1, n_seq, 1]; the first 1 is for all heads
    key_positions = np.arange(k.shape[-2])  # [n_key]
    mask = np.where(key_positions <= query_positions, np.float32(0), np.float32(-np.inf))  # [..., 1, n_seq, n_key]
    # Let each head attend, put the heads side by side again, and let c_proj mix what they have found.
    heads = attention(q, k, v, mask).swapaxes(-2, -3)  # [..., n_seq, n_head, d_head]
    return linear(heads.reshape(x.shape), **c_proj)  # [..., n_seq, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, positions=None, cache=None):
    """Attention moves information between tokens, then ffn (mlp: multilayer perceptron) works on each of them."""
    # Both add to x, so nothing found before is lost, and a block need only learn what to add. They read a normalised
    # copy, since x grows and weights suit numbers of one size; normalising x itself would shrink what was found before.
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, positions=positions, cache=cache)
    return x + ffn(layer_norm(x, **ln_2), **mlp)  # [..., n_seq, n_embd]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, positions=None, cache=None):
    """The logits of the next token at every position: ids [..., n_seq] -> [..., n_seq, n_vocab].

    wte, wpe: word token and word position embeddings. ln_f: final layer_norm. blocks[3]["mlp"]["c_fc"]: {"w", "b"}.
    With a cache (below), positions may begin anywhere, and only the last token gets logits: [n_batch, n_vocab].
    OpenAI's 124M: n_vocab 50257, n_ctx 1024 (the context length), n_layer 12, n_embd 768, n_head 12, d_head 64.
    """
    inputs = np.asarray(inputs)
    if positions is None:
        positions = np.arange(inputs.shape[-1])  # [n_seq]
    # The two may be added: training makes them point in different directions, so that blocks can tell them apart.
    # wpe says where a token stands: swap two rows, and these tokens claim each other's place, so another text follows.
    x = wte[inputs] + wpe[positions]  # [..., n_seq, n_embd]
    layer_caches = [None] * len(blocks) if cache is None else cache
    for block, layer_cache in zip(blocks, layer_caches):
        x = transformer_block(x, **block, n_head=n_head, positions=positions, cache=layer_cache)
    x = layer_norm(x, **ln_f)
    if cache is not None:
        x = x[:, -1]  # the other logits would be up to a third of the work
    # The matrix that reads tokens in also scores them: a token is likely where x has come to resemble its embedding.
    return x @ wte.T


# ---- The cache ------------------------------------------------------------------------------------------------------
# You have now read all of GPT-2. To generate text, one can run it on the whole text again for each new token:
#     for _ in range(n_tokens_to_generate):
#         logits = gpt2(ids, **params, n_head=n_head)
#         ids = [*ids, int(logits[-1].argmax())]
# But no position sees those after it, so its keys and values stay the same as the text grows. The KV cache keeps them
# (but no queries, because each is used once, in its own step). After n tokens, one more costs the 124M model
#   without a cache: 124 million multiplications for each of the n tokens, and those of attention; both grow with n
#   with a cache: each of the 124 million weights is read and used once, however long the text; and the cache is read:
#     12 layers * 2 * 768 = 18,432 numbers (73,728 bytes) for each of the n tokens, which is all that grows with n


def extend(cache, positions, k, v):
    """Write new keys and values at their positions into a layer's cache. Returns all, up to the longest text's end."""
    rows = np.arange(len(k))[:, None]  # [n_batch, 1], goes with positions [n_batch, n_seq]
    for kept, new in zip(cache, (k, v)):  # kept: [n_batch, n_head, n_positions, d_head]; swapaxes gives a view of it
        kept.swapaxes(1, 2)[rows, positions] = new.swapaxes(1, 2)  # [n_batch, n_seq, n_head, d_head]
    return cache[:, :, :, : positions.max() + 1]  # [2, n_batch, n_head, n_key, d_head]; the mask hides what is still 0


# ---- Sampling and generation ----------------------------------------------------------------------------------------
def sample_probs(logits, temperature=None, top_k=None, top_p=None):
    """The probabilities to draw the next token from, in float64: [..., n_vocab] -> [..., n_vocab].

    A temperature T turns each probability p into p ** (1 / T) and divides by the sum: below 1 it favours probable
    tokens more, above 1 less. Then top_k keeps the k most probable tokens, and top_p the fewest that together reach
    probability p (nucleus sampling, Holtzman et al., 2020). Tokens as probable as the last one kept are kept, too.
    """
    temperature = 1 if temperature is None else max(temperature, 1e-300)  # at 0 the highest logit gets everything
    logits = np.asarray(logits, np.float64)
    logits = (logits - logits.max(-1, keepdims=True)) / temperature  # exp(l / T) is exp(l) ** (1 / T)
    if top_k and top_k < logits.shape[-1]:
        kth_highest = np.partition(logits, -top_k)[..., [-top_k]]  # [..., 1]
        logits = np.where(logits < kth_highest, -np.inf, logits)
    probs = softmax(logits)
    if top_p and top_p < 1:
        falling = np.sort(probs)[..., ::-1]  # [..., n_vocab]
        sum_before = falling.cumsum(-1) - falling  # of the more probable tokens
        n_kept = (sum_before < top_p).sum(-1, keepdims=True)
        least = np.take_along_axis(falling, n_kept - 1, -1)  # the lowest probability that is kept: [..., 1]
        probs = np.where(probs < least, 0, probs)
        probs /= probs.sum(-1, keepdims=True)
    return probs


def generators(numbers, temperature=None, top_k=None, top_p=None, seed=None):
    """A random generator for each prompt, from the seed and the prompt's number; [] if the options mean greedy."""
    if temperature == 0 or {temperature, top_k, top_p, seed} == {None}:
        return []
    return [np.random.default_rng(None if seed is None else [number, seed]) for number in numbers]


def generate_steps(prompts, params, n_head, n_tokens_to_generate, rngs=(), stop_id=None, **sampling):
    """Yield the next id of every prompt, [n_batch], step by step, and end early if all have had stop_id.

    Each prompt draws with its own generator of rngs; without rngs the most probable id is taken (greedy). So a text
    does not depend on its batch, except by rounding: larger matrix products add in another order, and that can tip a
    close choice. sampling: temperature, top_k, top_p. Raises ValueError if the logits are not numbers.
    """
    (n_vocab, n_embd), n_batch, longest = params["wte"].shape, len(prompts), max(map(len, prompts))
    shape = len(params["blocks"]), 2, n_batch, n_head, longest + n_tokens_to_generate, n_embd // n_head
    cache = np.zeros(shape, np.float32)  # [n_layer, 2 (keys, values), n_batch, n_head, n_positions, d_head]
    # A short prompt repeats its last token, at that token's own position: a copy writes the same key and value to the
    # same place, which changes nothing. So the last column holds the last token of every prompt.
    ids = np.array([prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts])  # [n_batch, longest]
    positions = np.minimum(np.arange(longest), [[len(prompt) - 1] for prompt in prompts])  # [n_batch, longest]
    at_once, ended = max(1, 256 // n_batch), np.zeros(n_batch, bool)
    for _ in range(n_tokens_to_generate):
        # First all tokens of the prompts go in (prefill), in pieces to bound the memory; then one new of each (decode).
        for first in range(0, ids.shape[1], at_once):
            piece = np.s_[:, first : first + at_once]
            logits = gpt2(ids[piece], **params, n_head=n_head, positions=positions[piece], cache=cache)
        if not np.isfinite(logits.max(-1)).all():  # [n_batch]; max() takes NaN for the highest
            raise ValueError("the logits are not numbers: there must be NaN or infinity among the weights")
        new = logits.argmax(-1)  # [n_batch]
        if rngs:
            probs = sample_probs(logits, **sampling)
            noise = np.array([rng.standard_exponential(n_vocab) for rng in rngs])
            new = (probs / noise).argmax(-1)  # this is id i with probability probs[i]: the Gumbel-max trick
        yield new
        ended |= new == stop_id  # none has, if that is None
        if ended.all():  # those that have ended run on until all have; ignore their ids
            return
        ids, positions = new[:, None], positions[:, -1:] + 1  # both [n_batch, 1]


def generate(inputs, params, n_head, n_tokens_to_generate, temperature=None, top_k=None, top_p=None, seed=None):
    """The ids that follow a prompt's ids: a list; for a list of prompts a list of lists. Raises ValueError."""
    from utils import check_ids, check_options  # not at the top: the model itself needs NumPy alone

    [n_new] = check_options(n_tokens_to_generate=n_tokens_to_generate).values()
    sampling, inputs = check_options(temperature=temperature, top_k=top_k, top_p=top_p), [*inputs]
    is_batch = any(np.ndim(prompt) for prompt in inputs)
    prompts = [check_ids(prompt, params, n_head, n_new) for prompt in (inputs if is_batch else [inputs])]
    rngs = generators(range(len(prompts)), **sampling, **check_options(seed=seed))
    steps = list(generate_steps(prompts, params, n_head, n_new, rngs, **sampling))
    rows = np.reshape(steps, (-1, len(prompts))).T.tolist()  # [n_batch, n_steps]
    return rows if is_batch else rows[0]


# ---- The command line -----------------------------------------------------------------------------------------------
def complete(prompts, loaded, n_tokens_to_generate, batch_size=1, seed=None, **sampling):
    """Yield each prompt and its text (an iterator of pieces, or a ValueError in its place), batch by batch."""
    from utils import check_ids, plain

    (encoder, hparams, params), numbered = loaded, enumerate(prompts)
    n_head, end = hparams["n_head"], encoder.encoder["<|endoftext|>"]
    while batch := list(itertools.islice(numbered, batch_size)):
        ids, texts, rows = {}, {}, []  # ids and texts by the prompt's number
        for number, prompt in batch:
            try:  # an empty prompt begins with <|endoftext|>, which stands between texts
                ids[number] = check_ids(encoder.encode(prompt) or [end], params, n_head, n_tokens_to_generate)
            except (KeyError, TypeError, ValueError) as error:
                texts[number] = ValueError(f"prompt {number + 1}: {plain(error)}")
        rngs = generators(ids, **sampling, seed=seed)
        steps = generate_steps([*ids.values()], params, n_head, n_tokens_to_generate, rngs, end, **sampling)
        if len(ids) == 1:
            rows = [(id for [id] in steps)]  # each id as soon as it is there
        elif ids:  # else no prompt of the batch has a text, and steps is never started
            rows = np.reshape([*steps], (-1, len(ids))).T.tolist()  # [n_batch, n_steps]
        for number, row in zip(ids, rows):  # here a text is given its end: before its first <|endoftext|>
            texts[number] = encoder.decode_steps(itertools.takewhile(lambda id: id != end, row))
        for number, prompt in batch:
            yield prompt, texts[number]


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir=None, batch_size=32,
         temperature=None, top_k=None, top_p=None, seed=None):  # fmt: skip
    """For Python: returns the text after a prompt, or a list for a list of prompts. (cli prints instead.)"""
    from utils import check_options, load_encoder_hparams_and_params

    options = {"n_tokens_to_generate": n_tokens_to_generate, "batch_size": batch_size, "seed": seed}
    options = check_options(**options, temperature=temperature, top_k=top_k, top_p=top_p)
    is_batch = np.iterable(prompt) and not isinstance(prompt, (str, bytes))
    loaded, texts = load_encoder_hparams_and_params(model_size, models_dir), []
    for _, text in complete(prompt if is_batch else [prompt], loaded, **options):
        if isinstance(text, ValueError):
            raise text
        texts.append("".join(text))
    return texts if is_batch else texts[0]


def cli(
    *prompts: str,  # fire shows these types in the help
    prompt: str = None,
    prompts_file: str = None,
    n_tokens_to_generate=40,
    model_size="124M",
    models_dir: str = None,
    temperature: float = None,
    top_k: int = None,
    top_p: float = None,
    seed: int = None,
    batch_size=32,
):
    """Continue a text: python gpt2.py "Once upon a time" --top_p 0.9

    One prompt: the text appears as it is generated. Several: "> prompt", and
    below it its text. None: asks for prompts until Ctrl-D, or takes what comes
    through a pipe as one prompt. Greedy (always the most probable token) unless
    temperature, top_k, top_p or seed is given: then tokens are drawn at random.

    A model is fetched when it is first used (124M: 500 MB), from OpenAI or the
    URL in GPT2_MODELS_URL. A prompt and its text have at most 1,024 tokens (2M:
    256), the context length. On a busy machine set OPENBLAS_NUM_THREADS=1.

    Args:
        prompts: beginnings of texts; after -- they may begin with a dash
        prompt: one more, which may begin with a dash: --prompt="--like this"
        prompts_file: a file, one prompt a line (-: standard input); JSON lines out
        n_tokens_to_generate: how many tokens to generate at most
        model_size: 124M, 355M, 774M or 1558M, 2M (included), or a folder's name
        models_dir: the folder of the models; by default the one beside gpt2.py
        temperature: below 1 favours probable tokens more, above 1 less; 0: greedy
        top_k: draw from the k most probable tokens; 0: from all
        top_p: draw from the fewest tokens that together have this probability
        seed: a whole number; the same one gives the same text again
        batch_size: how many prompts to work on together
    """
    from utils import ask, check_options, load_encoder_hparams_and_params, read_prompts, show, show_json

    options = check_options(n_tokens_to_generate=n_tokens_to_generate, batch_size=batch_size)
    sampling = check_options(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    prompts = read_prompts(prompts, prompt, prompts_file)  # None: they are asked for
    options["batch_size"] = options["batch_size"] if prompts else 1  # one is answered before the next is typed
    if seed is None and generators([0], **sampling) and os.isatty(2):  # sampling, and shown on a terminal
        sampling["seed"] = int(np.random.default_rng().integers(2**32))
        print(f"--seed {sampling['seed']}", file=sys.stderr)  # with it the same texts come again
    loaded = load_encoder_hparams_and_params(model_size, models_dir)
    answers = complete(prompts or ask(), loaded, **options, **sampling)
    if prompts_file is None:
        show(answers, prompts)
    else:
        show_json(answers)


if __name__ == "__main__":
    run(cli)
