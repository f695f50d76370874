"""GPT-2 in plain NumPy: the model, its cache, generation, the command line.

After "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) and https://github.com/openai/gpt-2.
"""

import itertools
import sys
from functools import partial

if __name__ == "__main__":
    from utils import run  # before NumPy: if that is missing, utils says so in one line

import numpy as np

# ---- The model ------------------------------------------------------------------------------------------------------
# A token is a piece of text, about four letters; its id is its number in the vocabulary. From ids to what comes next:
#   1. Each id becomes an embedding, n_embd numbers for what the token is. Another n_embd numbers, for where it stands,
#      are added, because attention alone ignores order. The sums are the rows of x, one row a token.
#   2. x passes through n_layer blocks, or layers. In each, attention brings a token what it needs from itself and the
#      tokens before it, then a feed-forward network works on each token alone. Both add what they find to x.
#   3. After a last layer_norm, each row is compared with all embeddings. That gives the logits: a score for each token
#      of the vocabulary, higher if it is more likely to come next. softmax turns scores into probabilities.
# The weights (w, b, g, wte, wpe) were learned by predicting the next token in 40 GB of text. No position may look
# ahead, or it would copy the answer. To train, begin with random numbers around 0, of size 0.02 (but g = 1, b = 0), and
# cut text into rows of n_ctx tokens. Of some rows (GPT-2 took 512) compute the loss, the mean of -log(probability given
# to the token that did come next). Subtract from each weight a little of the loss's gradient; repeat while it falls.
# jax.grad computes it, with jax.numpy for np and no cache: JAX arrays cannot be written into (+= makes new ones).
#
# Shapes stand at the end of a line; "..." is any leading axes, or none. OpenAI's 124M (million weights) has n_vocab =
# 50257 tokens, n_ctx = 1024 positions (the context length), n_layer = 12, n_embd = 768, n_head = 12, d_head = 64.


def gelu(x):
    """max(x, 0) with a soft bend (Hendrycks & Gimpel, 2016), in the tanh form that GPT-2 was trained with."""
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
    """A linear map: x times the weights w, plus the bias b."""
    return x @ w + b  # [n_tokens, n_in] @ [n_in, n_out] + [n_out] -> [n_tokens, n_out]


def ffn(x, c_fc, c_proj):
    """The feed-forward network: a linear map c_fc (fully connected), a bend, and c_proj, a projection back to n_embd.

    Without the bend the two could be multiplied out to one. The c_ is for convolution, OpenAI's name for such maps.
    """
    return linear(gelu(linear(x, **c_fc)), **c_proj)  # [n_tokens, n_embd] -> [n_tokens, 4 * n_embd] -> as before


def attention(q, k, v, mask):
    """Let each position take values from others ("Attention Is All You Need", Vaswani et al., 2017, section 3.2.1).

    Each has a query q (what it looks for), a key k (what it can be found by) and a value v (what it tells). The better
    a query matches a key, the more of that key's value it takes. The mask is 0 where it may look, and -inf where not.
    """
    # q and k have numbers of size about 1 and of either sign, so most of a dot product cancels: about sqrt(d_head) is
    # left. Divide by that, or the softmax, which magnifies differences, gives nearly all the weight to one key.
    scores = q / q.shape[-1] ** 0.5 @ k.swapaxes(-1, -2)  # [..., n_query, d_head] -> [..., n_query, n_key]
    scores += mask
    return softmax(scores) @ v  # [..., n_query, n_key] @ [..., n_key, d_head] -> [..., n_query, d_head]


def mha(x, c_attn, c_proj, n_head, positions=None, remember=None):
    """Multi-head attention: n_head times attention, each head on its own slice of d_head numbers of every q, k and v.

    One head takes one blend of values; several let a token fetch different things from different places at once.
    x has the tokens of all sequences, n_seq of each, one below the other. positions [..., n_seq] has each token's place
    in its own sequence; its shape tells how to cut x into sequences.
    """
    positions = np.arange(len(x)) if positions is None else positions  # None: x is one sequence
    qkv = linear(x, **c_attn)  # c_attn (for attention) makes the q, k and v of all heads: [n_tokens, 3 * n_embd]
    qkv = qkv.reshape(*positions.shape, 3, n_head, -1)  # [..., n_seq, 3, n_head, d_head]
    q, k, v = (qkv[..., i, :, :].swapaxes(-2, -3) for i in range(3))  # 3 times [..., n_head, n_seq, d_head]
    if remember:  # this is extend(), below: it keeps k and v, and returns those of all positions so far
        k, v = remember(positions, k, v)  # 2 times [..., n_head, n_key, d_head]
    # The one rule: a query at position p sees the keys at positions <= p.
    query_positions = np.expand_dims(positions, (-3, -1))  # [..., 1, n_seq, 1]; the first 1 is for all heads
    key_positions = np.arange(k.shape[-2])  # [n_key]
    mask = np.where(key_positions <= query_positions, np.float32(0), np.float32(-np.inf))  # [..., 1, n_seq, n_key]
    heads = attention(q, k, v, mask).swapaxes(-2, -3)  # [..., n_seq, n_head, d_head]
    return linear(heads.reshape(x.shape), **c_proj)  # mixes what the heads have found: [n_tokens, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, positions=None, remember=None):
    """Attention moves information between tokens, then ffn (mlp: multilayer perceptron) works on it.

    Both add to x instead of replacing it: nothing found before is lost, and a block need only learn what to add. They
    read a normalised copy, since x grows from block to block but weights fit numbers of one size. To normalise x
    itself, after adding, would shrink what the blocks before have found.
    """
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, positions=positions, remember=remember)
    return x + ffn(layer_norm(x, **ln_2), **mlp)  # [n_tokens, n_embd]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, positions=None, cache=None):
    """The logits of the next token at every position: ids [..., n_seq] -> [..., n_seq, n_vocab].

    wte, wpe: word token and word position embeddings. ln_f: final layer_norm. blocks[3]["mlp"]["c_fc"]: {"w", "b"}.
    With a cache (below) positions may begin anywhere, and only the last column gets logits: [n_batch, n_vocab].
    """
    inputs = np.asarray(inputs)
    if positions is None:
        positions = np.broadcast_to(np.arange(inputs.shape[-1]), inputs.shape)
    x = wte[inputs] + wpe[positions]  # training makes them point in different directions, so blocks can tell them apart
    x = x.reshape(-1, x.shape[-1])  # all sequences in one matrix, for which NumPy reads w only once: [n_tokens, n_embd]
    for i, block in enumerate(blocks):
        remember = None if cache is None else partial(extend, cache[i])
        x = transformer_block(x, **block, n_head=n_head, positions=positions, remember=remember)
    x = layer_norm(x, **ln_f).reshape(*inputs.shape, -1)  # [..., n_seq, n_embd]
    if cache is not None:
        x = x[:, -1]  # the other logits would be up to a third of the work
    # The matrix that reads tokens in also scores them: a token is likely where x has come to resemble its embedding.
    return x @ wte.T  # a second matrix would be 39 million weights more


# ---- The cache ------------------------------------------------------------------------------------------------------
# You have now read all of GPT-2. To generate, one could run gpt2() on the whole text again for each new token. But no
# position sees those after it, so its keys and values stay the same as the text grows. The KV cache keeps them, and a
# new token costs one query instead of one for each token of the text. Queries are not kept: only a token's own step
# needs its query. cache: [n_layer, 2 (keys, values), n_batch, n_head, n_positions, d_head], where n_positions is the
# longest prompt with its new tokens. For 124M each position of each prompt takes 12 * 2 * 768 numbers, 73,728 bytes.


def extend(layer_cache, positions, k, v):
    """Write the k and v of new positions into the cache of one layer. Returns all keys and all values so far.

    positions [n_batch, n_seq] may differ from sequence to sequence; k and v: [n_batch, n_head, n_seq, d_head].
    """
    for i, at in enumerate(positions):
        layer_cache[:, i, :, at[0] : at[-1] + 1] = k[i], v[i]
    return layer_cache[:, :, :, : positions.max() + 1]  # up to the longest: [2, n_batch, n_head, n_key, d_head]


def prefill(prompts, model):
    """Run the prompts through the model, which fills its cache. Returns the logits after each: [n_batch, n_vocab].

    model: all arguments of gpt2() but inputs and positions. Short prompts are padded on the right. A pad stands after
    all tokens of its prompt, so none of them sees it; new tokens overwrite the pads in the cache one by one.

    To bound the memory, a call takes about 256 tokens at most. It returns the logits of its last column only, where a
    short prompt has a pad. So for prompts of 3 and 600 tokens, four calls on [2, 128] ids and one on [2, 85] run all
    columns but the last 3 (n_last). Then one on [2, 3] runs each prompt's last 3, at positions 0-2 (again) and 597-599.
    """
    n_batch, lengths = len(prompts), np.array([len(prompt) for prompt in prompts])
    longest, at_once = lengths.max(), max(1, 256 // n_batch)
    n_last = min(at_once, lengths.min())  # 1 would do; with this, short prompts of one length take a single call
    padded = np.array([prompt + [0] * (longest - len(prompt)) for prompt in prompts])  # [n_batch, longest]
    for first in range(0, longest - n_last, at_once):
        positions = np.tile(np.arange(first, min(first + at_once, longest - n_last)), (n_batch, 1))  # [n_batch, n_seq]
        gpt2(padded[:, positions[0]], **model, positions=positions)
    positions = lengths[:, None] - n_last + np.arange(n_last)  # [n_batch, n_last]
    return gpt2(np.take_along_axis(padded, positions, axis=1), **model, positions=positions)


# ---- Sampling and generation ----------------------------------------------------------------------------------------


def sample_probs(logits, temperature=None, top_k=None, top_p=None):
    """The probabilities to draw the next token from, in float64: [..., n_vocab] -> [..., n_vocab].

    A temperature below 1 favours probable tokens more, above 1 less. Then top_k keeps the k most probable tokens, and
    top_p the fewest that together reach probability p (Holtzman et al., 2020). Ties with the last one stay too.
    """
    from utils import check_options

    temperature, top_k, top_p = check_options(temperature=temperature, top_k=top_k, top_p=top_p).values()
    temperature = 1 if temperature is None else max(temperature, 1e-300)  # at 0 the highest logit gets everything
    logits = np.asarray(logits, np.float64)
    logits = (logits - logits.max(-1, keepdims=True)) / temperature  # the highest is 0, so nothing overflows
    if top_k and top_k < logits.shape[-1]:
        kth_highest = np.partition(logits, -top_k)[..., [-top_k]]  # [..., 1]
        logits = np.where(logits < kth_highest, -np.inf, logits)
    probs = softmax(logits)
    if top_p and top_p < 1:
        falling = np.sort(probs)[..., ::-1]  # [..., n_vocab]
        sum_before = falling.cumsum(-1) - falling  # of the more probable tokens
        n_needed = (sum_before < top_p).sum(-1, keepdims=True)
        least = np.take_along_axis(falling, n_needed - 1, -1)  # of the last token that is needed: [..., 1]
        probs = np.where(probs < least, 0, probs)
        probs /= probs.sum(-1, keepdims=True)
    return probs


def generate_steps(prompts, params, n_head, n_tokens_to_generate, first_row=0, stop_id=None, seed=None, **sampling):
    """Yield the next id of every prompt, [n_batch], step by step, and end early if all have had stop_id.

    sampling: temperature, top_k, top_p. If neither these nor a seed are given, or temperature is 0, the highest logit
    wins (greedy). Else each prompt draws by itself, with a generator made from seed and its place among all prompts
    (first_row for the first). So its text does not depend on the batch size, but for one thing: larger matrix products
    add in another order, so logits differ in their last digits, and that can tip a close choice. Raises ValueError.
    """
    from utils import check_options, check_prompts

    if n_tokens_to_generate == 0:
        return  # check_options refuses 0, because in a command it is a mistake
    sampling = check_options(n_tokens_to_generate=n_tokens_to_generate, seed=seed, **sampling)
    n_new, seed = sampling.pop("n_tokens_to_generate"), sampling.pop("seed")  # now None only if greedy
    n_vocab, n_embd = params["wte"].shape
    n_ctx, n_batch = len(params["wpe"]), len(prompts)
    prompts = check_prompts(prompts, first_row + 1, n_new, n_vocab, n_ctx)  # lists of ids
    cache_shape = len(params["blocks"]), 2, n_batch, n_head, max(map(len, prompts)) + n_new, n_embd // n_head
    model = {**params, "n_head": n_head, "cache": np.zeros(cache_shape, np.float32)}
    if seed is not None:
        generators = [np.random.default_rng([first_row + i, seed]) for i in range(n_batch)]

    logits = prefill(prompts, model)  # [n_batch, n_vocab]
    positions = np.array([[len(prompt)] for prompt in prompts])  # of the next token of each: [n_batch, 1]
    ended = np.zeros(n_batch, bool)
    for n_left in reversed(range(n_new)):
        ids = logits.argmax(-1)  # of the highest, or of NaN if there is one: [n_batch]
        if not np.isfinite(logits[range(n_batch), ids]).all():
            raise ValueError("the logits are not numbers: there must be NaN or infinity among the weights")
        if seed is not None:
            probs = sample_probs(logits, **sampling)  # [n_batch, n_vocab]
            # noise / p are the waiting times of events with rates p, and event i is the first with probability p[i].
            # So rounding matters only if the first two nearly tie. (choice() looks a random number up in n_vocab sums,
            # and rounding shifts each of them.)
            noise = np.array([generator.standard_exponential(n_vocab) for generator in generators])
            ids = (probs / noise).argmax(-1)  # the first
        yield ids
        ended |= ids == stop_id
        if n_left == 0 or ended.all():  # those that have ended run on until all have; ignore their ids
            return
        logits = gpt2(ids[:, None], **model, positions=positions)  # decode: one query each
        positions = positions + 1


def generate(inputs, params, n_head, n_tokens_to_generate, **options):
    """The ids that follow a prompt's ids: a list; for a list of prompts a list of lists. See generate_steps()."""
    is_batch = any(np.ndim(prompt) for prompt in inputs)
    prompts = inputs if is_batch else [inputs]
    steps = list(generate_steps(prompts, params, n_head, n_tokens_to_generate, **options))
    rows = np.reshape(steps, (-1, len(prompts))).T.tolist()  # [n_batch, n_steps]
    return rows if is_batch else rows[0]


# ---- The command line -----------------------------------------------------------------------------------------------


def complete(prompts, loaded, batch_size, first_row=0, **options):
    """Yield each prompt's text as an iterator of pieces, batch by batch."""
    encoder, hparams, params = loaded
    end = encoder.encoder["<|endoftext|>"]  # stands between texts, so an empty prompt can begin with it
    for first in range(0, len(prompts), batch_size):
        batch = [encoder.encode(prompt) or [end] for prompt in prompts[first : first + batch_size]]
        steps = generate_steps(batch, params, hparams["n_head"], first_row=first_row + first, stop_id=end, **options)
        # A single prompt: each id as soon as it is there. Otherwise: [n_batch, n_steps].
        rows = [(id for [id] in steps)] if len(batch) == 1 else np.transpose(list(steps)).tolist()
        for row in rows:
            yield encoder.decode_steps(itertools.takewhile(lambda id: id != end, row))


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir=None, batch_size=32, **sampling):
    """For Python: returns the text after a prompt, or a list for a list of prompts. (cli prints instead.)"""
    from utils import check_options, load_encoder_hparams_and_params

    options = check_options(model_size, n_tokens_to_generate=n_tokens_to_generate, batch_size=batch_size, **sampling)
    loaded = load_encoder_hparams_and_params(model_size, models_dir)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    texts = ["".join(pieces) for pieces in complete(prompts, loaded, **options)]
    return texts[0] if isinstance(prompt, str) else texts


def cli(*prompts: str, prompt: str = None, prompts_file: str = None, n_tokens_to_generate=40,  # noqa: RUF013
        model_size="124M", models_dir: str = None, temperature: float = None, top_k: int = None,  # noqa: RUF013
        top_p: float = None, seed: int = None, batch_size=32):  # fmt: skip # noqa: RUF013
    """Continue a text with GPT-2.

    One prompt: the text appears as it is generated. Several: "> prompt", and
    below it its text. None: asks for prompts until Ctrl-D, or takes what comes
    through a pipe as one prompt. Greedy (always the most probable token) unless
    temperature, top_k, top_p or seed is given: then tokens are drawn at random.

        python gpt2.py "Alan Turing theorized that" -n 20
        python gpt2.py "Once upon a time" --temperature 0.8 --top_p 0.9

    A model is fetched when it is first used (124M: 500 MB), from OpenAI or from
    the URL in the environment variable GPT2_MODELS_URL. A prompt and its text
    have at most 1,024 tokens together, the context length (2M: 256).

    Args:
        prompts: beginnings of texts; after -- they may begin with a dash
        prompt: one more, which may begin with a dash: --prompt="--like this"
        prompts_file: one prompt a line in (-: standard input), JSON lines out
        n_tokens_to_generate: how many tokens to generate at most
        model_size: 124M, 355M, 774M or 1558M, 2M (included), or a folder's name
        models_dir: the folder of the models; by default the one beside gpt2.py
        temperature: below 1 favours probable tokens more, above 1 less; 0: greedy
        top_k: draw from the k most probable tokens
        top_p: draw from the fewest tokens that together have this probability
        seed: a whole number; the same one gives the same text again
        batch_size: how many prompts to work on together
    """
    from utils import ask, check_options, load_encoder_hparams_and_params, read_prompts, show, write_json_lines

    options = {"n_tokens_to_generate": n_tokens_to_generate, "batch_size": batch_size, "temperature": temperature}
    options = check_options(model_size, **options, top_k=top_k, top_p=top_p, seed=seed)
    prompts = read_prompts(prompts, prompt, prompts_file)
    if seed is None and options["seed"] is not None and sys.stderr.isatty():
        print(f"--seed {options['seed']}", file=sys.stderr)  # drawn by check_options; with it the text can be had again
    texts = partial(complete, loaded=load_encoder_hparams_and_params(model_size, models_dir), **options)
    if prompts_file is not None:
        write_json_lines(prompts, options["batch_size"], texts)
    elif prompts:
        show(prompts, texts)
    else:
        ask(texts)


if __name__ == "__main__":
    run(cli)
