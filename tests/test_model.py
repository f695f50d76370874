"""Both forms of the model: held to what HF transformers computed, and each function to its formula, written out."""

import math
import operator
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, nested, random_tensors

import gpt2
import gpt2_pico

HPARAMS = {"n_vocab": 31, "n_ctx": 600, "n_embd": 12, "n_head": 3, "n_layer": 2}


@pytest.fixture(params=[gpt2, gpt2_pico], ids=lambda module: module.__name__)
def module(request):
    return request.param


def random_params():
    """The weights of a small model, large enough to bend every curve."""
    return nested({name: 7 * tensor for name, tensor in random_tensors(HPARAMS).items()})


def random_ids(*shape, n_vocab=HPARAMS["n_vocab"], seed=0):
    return np.random.default_rng(seed).integers(n_vocab, size=shape).tolist()


# ---- Each function, from its formula, number by number in float64 ----------------------------------------------------
# Vectors are lists of floats, matrices lists of rows.


def plain_gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_softmax(xs):
    return [1 / math.fsum(math.exp(other - x) for other in xs) for x in xs]


def plain_layer_norm(xs, g, b, eps=1e-5):
    mean = math.fsum(xs) / len(xs)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in xs) / len(xs) + eps)
    return [(x - mean) / deviation * g[i] + b[i] for i, x in enumerate(xs)]


def plain_linear(xs, w, b):
    return [math.fsum(x * row[j] for x, row in zip(xs, w)) + b[j] for j in range(len(w[0]))]


def plain_ffn(xs, c_fc, c_proj):
    return plain_linear([plain_gelu(x) for x in plain_linear(xs, **c_fc)], **c_proj)


def plain_attention(queries, keys, values):
    """Causal: query number i sees the first i + 1 keys."""
    result = []
    for i, query in enumerate(queries):
        scores = [math.fsum(map(operator.mul, query, key)) / math.sqrt(len(query)) for key in keys[: i + 1]]
        weights = plain_softmax(scores)
        result.append([math.fsum(w * value[d] for w, value in zip(weights, values)) for d in range(len(values[0]))])
    return result


def plain_mha(rows, c_attn, c_proj, n_head):
    n_embd, qkv = len(rows[0]), [plain_linear(row, **c_attn) for row in rows]
    joined = [[] for _ in rows]
    for start in range(0, n_embd, n_embd // n_head):
        q, k, v = ([row[i + start : i + start + n_embd // n_head] for row in qkv] for i in (0, n_embd, 2 * n_embd))
        for row, part in zip(joined, plain_attention(q, k, v)):
            row.extend(part)
    return [plain_linear(row, **c_proj) for row in joined]


def plain_transformer_block(rows, mlp, attn, ln_1, ln_2, n_head):
    moved = plain_mha([plain_layer_norm(row, **ln_1) for row in rows], **attn, n_head=n_head)
    rows = [[x + y for x, y in zip(*pair)] for pair in zip(rows, moved)]
    return [[x + y for x, y in zip(row, plain_ffn(plain_layer_norm(row, **ln_2), **mlp))] for row in rows]


def plain_gpt2(inputs, wte, wpe, blocks, ln_f, n_head):
    rows = [[x + y for x, y in zip(wte[id], wpe[place])] for place, id in enumerate(inputs)]
    for block in blocks:
        rows = plain_transformer_block(rows, **block, n_head=n_head)
    rows = [plain_layer_norm(row, **ln_f) for row in rows]
    return [[math.fsum(x * y for x, y in zip(row, embedding)) for embedding in wte] for row in rows]


def plain(tree):
    """Arrays, also inside dicts and lists, as lists of floats."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list) else tree.tolist()


BLOCK, N_HEAD = random_params()["blocks"][0], HPARAMS["n_head"]
X = np.random.default_rng(1).normal(0, 2, (2, 3, HPARAMS["n_embd"])).astype(np.float32)  # [n_batch, n_seq, n_embd]
CASES = {  # name of the function: (the formula, how many axes of x it takes, other arguments)
    "gelu": (plain_gelu, 0, {}),
    "softmax": (plain_softmax, 1, {}),
    "layer_norm": (plain_layer_norm, 1, BLOCK["ln_1"]),
    "linear": (plain_linear, 1, BLOCK["attn"]["c_attn"]),
    "ffn": (plain_ffn, 1, BLOCK["mlp"]),
    "mha": (plain_mha, 2, {**BLOCK["attn"], "n_head": N_HEAD}),
    "transformer_block": (plain_transformer_block, 2, {**BLOCK, "n_head": N_HEAD}),
}


def on_rows(formula, n_axes, x):
    """A formula for n_axes axes, on each such part of x."""
    return formula(x.tolist()) if x.ndim == n_axes else [on_rows(formula, n_axes, part) for part in x]


@pytest.mark.parametrize("x", [X, X[0], X[:1, :1]], ids=["batch", "sequence", "token"])
@pytest.mark.parametrize("name", CASES)
def test_function_is_its_formula(module, name, x):
    """With and without a batch axis (for mha a matrix and positions); float32 in, float32 out."""
    formula, n_axes, kwargs = CASES[name]
    others = {key: value if key == "n_head" else plain(value) for key, value in kwargs.items()}
    rows, positions = x.copy(), {}
    if n_axes == 2 and x.ndim == 3:
        rows, positions = rows.reshape(-1, x.shape[-1]), {"positions": np.array([range(x.shape[1])] * len(x))}
    result = getattr(module, name)(rows, **kwargs, **positions)
    assert (result.dtype, result.shape[:-1]) == (np.float32, rows.shape[:-1])
    assert np.array_equal(rows.ravel(), x.ravel())  # as it was
    expected = on_rows(lambda part: formula(part, **others), n_axes, x)
    np.testing.assert_allclose(result, np.reshape(expected, result.shape), rtol=1e-4, atol=1e-4)


def test_no_position_sees_a_later_one(module):
    """However large its score would be."""
    for i, row in enumerate(module.mha(X[0] * 1000, **CASES["mha"][2])):
        alone = module.mha(X[0, : i + 1] * 1000, **CASES["mha"][2])[-1]
        np.testing.assert_allclose(row, alone, rtol=1e-3, atol=1e-2)


def test_gelu_to_the_last_digits(module):
    """Also far from 0, where it is 0 or x."""
    x = np.array([*np.linspace(-8, 8, 1001), -1e4, 1e4], np.float32)
    np.testing.assert_allclose(module.gelu(x), [plain_gelu(value) for value in x.tolist()], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kwargs", [{}, {"eps": 1e-3}], ids=str)
def test_layer_norm_eps(module, kwargs):
    """eps keeps a row without variance finite, and counts where variance is small."""
    x, ones = np.array([[3, 3, 3], [0.01, 0, -0.01]], np.float32), np.ones(3, np.float32)
    expected = [plain_layer_norm(row, [1, 1, 1], [0, 0, 0], **kwargs) for row in x.tolist()]
    np.testing.assert_allclose(module.layer_norm(x, ones, 0 * ones, **kwargs), expected, rtol=1e-4, atol=1e-6)


def test_softmax_of_large_numbers(module):
    """No overflow, and -inf is a probability of exactly 0."""
    x = np.array([[1000, 1000, -np.inf], [-1e30, -np.inf, -1e30]], np.float32)
    assert module.softmax(x).tolist() == [[0.5, 0.5, 0], [0.5, 0, 0.5]]


def test_gpt2_is_its_formula(module):
    """The whole model, on a list, on an array, on a batch."""
    params, ids = random_params(), random_ids(2, 6)
    expected = [plain_gpt2(row, **plain(params), n_head=N_HEAD) for row in ids]
    for inputs, logits in (
        (ids, expected),
        (np.array(ids), expected),
        (ids[0], expected[0]),
        (ids[1][:1], expected[1][:1]),
    ):
        result = module.gpt2(inputs, **params, n_head=N_HEAD)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, logits, rtol=1e-3, atol=1e-3)


# ---- The bundled model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["prompt"][:12])
def test_golden(module, model, golden):
    """Ids, logits, 40 tokens and their text are those of HF transformers' GPT2LMHeadModel."""
    encoder, hparams, params = model
    ids = encoder.encode(golden["prompt"])
    assert ids == golden["ids"]
    logits = module.gpt2(ids, **params, n_head=hparams["n_head"])[-1]
    np.testing.assert_allclose(logits[:16], golden["logits16"], rtol=0, atol=1e-3)
    assert abs(np.log(np.exp(logits.astype(np.float64)).sum()) - golden["logsumexp"]) < 1e-3
    assert logits.argmax() == golden["argmax"]
    assert module.generate(ids, params, hparams["n_head"], 40) == golden["greedy"]
    assert module.main(golden["prompt"], model_size="2M", models_dir=ROOT / "models") == golden["text"]


def test_endoftext(module, model):
    """An empty prompt starts from <|endoftext|>; a text ends before the first one that is generated, if at once."""
    encoder, hparams, params = model
    end = encoder.encoder["<|endoftext|>"]
    ids = module.generate([end], params, hparams["n_head"], 60)
    assert end in ids[1:]  # or the next line shows nothing
    texts = module.main(["", "and they lived happily ever after."], 60, "2M", ROOT / "models")
    assert texts == [encoder.decode(ids[: ids.index(end)]), ""]
    assert module.main("", 60, "2M", ROOT / "models") == texts[0]
    assert (module.main(["Once"], model_size="2M"), module.main([], 5, "2M")) == ([GOLDEN[1]["text"]], [])


def test_nothing_is_computed_after_the_end(monkeypatch):
    """A prompt, or two, after which <|endoftext|> comes at once take a single pass of the model."""
    calls = recorded(gpt2, monkeypatch)
    for n in 1, 2:
        assert gpt2.main(["and they lived happily ever after."] * n, 40, "2M") == [""] * n and len(calls) == n


# ---- The mask, the cache, the batch ---------------------------------------------------------------------------------


def recorded(module, monkeypatch):
    """The list to which each call of the module's gpt2() from now on adds (ids, logits, cache)."""
    calls, original = [], module.gpt2

    def gpt2(ids, **kwargs):
        calls.append((ids, original(ids, **kwargs), kwargs["cache"]))
        return calls[-1][1]

    monkeypatch.setattr(module, "gpt2", gpt2)
    return calls


def uncached(module, prompt, params, n_head, n_new):
    """The same for one prompt, by asking for the whole sequence again and again."""
    ids, rows = list(prompt), []
    for _ in range(n_new):
        rows.append(module.gpt2(ids, **params, n_head=n_head)[-1])
        ids.append(int(rows[-1].argmax()))
    return ids[len(prompt) :], np.array(rows)


def test_call_with_a_cache(module):
    """Several tokens, then one, each row from its own start. Behind the longest row the cache is not even read."""
    params, ids, rows = random_params(), np.array(random_ids(2, 8)), np.arange(2)
    cache = np.full((HPARAMS["n_layer"], 2, 2, N_HEAD, 9, HPARAMS["n_embd"] // N_HEAD), 7, np.float32)
    cache[..., 8, :] = np.nan
    expected = module.gpt2(ids, **params, n_head=N_HEAD)
    for n, start in [(3, [0, 0]), (2, [3, 3]), (2, [3, 5]), (1, [5, 7]), (1, [6, 6])]:
        positions = np.array(start)[:, None] + np.arange(n)
        logits = module.gpt2(ids[rows[:, None], positions], **params, n_head=N_HEAD, positions=positions, cache=cache)
        np.testing.assert_allclose(logits, expected[rows, positions[:, -1]], rtol=0, atol=1e-3, strict=True)


@pytest.mark.parametrize("lengths", [[2, 200, 1, 7], [257], [595], [3, 400, 290], [2] * 300 + [4]], ids=len)
def test_in_a_batch_as_alone(module, monkeypatch, lengths):
    """Also prompts that take several passes give what each gives alone and without a cache, logits and all."""
    params, prompts = random_params(), [random_ids(n, seed=i) for i, n in enumerate(lengths)]
    with monkeypatch.context() as patch:
        calls = recorded(module, patch)
        rows = module.generate(prompts, params, N_HEAD, 5)
    assert {array.dtype for _, *arrays in calls for array in arrays} == {np.dtype(np.float32)}
    for i in sorted({0, 1, 2, len(prompts) - 1} & {*range(len(prompts))}):
        expected, expected_logits = uncached(module, prompts[i], params, N_HEAD, 5)
        assert rows[i] == expected
        np.testing.assert_allclose([logits[i] for _, logits, _ in calls[-5:]], expected_logits, rtol=0, atol=1e-3)


def test_prefill(monkeypatch):
    """About 256 tokens at a time go through gpt2.py's model, whatever the batch; the last pass gives the first id."""
    calls = recorded(gpt2, monkeypatch)
    gpt2.generate(random_ids(5, 300), random_params(), N_HEAD, 1)
    sizes = [ids.size for ids, *_ in calls]
    assert max(sizes) <= 256 and sum(sizes) == 5 * 300
    gpt2.generate(random_ids(9), random_params(), N_HEAD, 3)
    assert [ids.size for ids, *_ in calls[len(sizes) :]] == [9, 1, 1]


@pytest.mark.parametrize("kind", [list, tuple, "uint8", "int16", "uint32", "int64", "uint64"])
def test_what_generate_takes(module, kind):
    """Lists, tuples, arrays, in a batch or not; the caller's are unchanged, the new ids are Python's integers."""
    convert = kind if isinstance(kind, type) else lambda ids: np.array(ids, kind)
    prompts, args = [convert(ids) for ids in ([1, 2, 30], [5, 6], [7])], (random_params(), N_HEAD)
    new = module.generate(prompts[0], *args, 6)
    assert new == uncached(module, [1, 2, 30], *args, 6)[0] and {type(id) for id in new} == {int}
    ragged = np.empty(3, object)
    ragged[:] = prompts
    for batch in prompts[:1], tuple(prompts), ragged:
        rows = module.generate(batch, *args, 6)
        assert len(rows) == len(batch) and rows[0] == new and {type(id) for row in rows for id in row} == {int}
        assert module.generate(batch, *args, 0) == [[] for _ in batch]
    assert module.generate(prompts[0], *args, 0) == [] and list(prompts[0]) == [1, 2, 30]


def test_context_length(module, model):
    """A prompt and its new tokens may fill the context length to the last token; with one more, any is refused."""
    encoder, hparams, _ = model
    n_ctx, text = hparams["n_ctx"], " the" * 200
    n_ids = len(encoder.encode(text))
    assert len(encoder.encode(module.main(text, n_ctx - n_ids, "2M"))) > 0
    for prompt, n_new in (text, n_ctx - n_ids + 1), (" the" * n_ctx, 1), ("", n_ctx), (["a", text], n_ctx - n_ids + 1):
        with pytest.raises(ValueError, match=str(n_ctx)):
            module.main(prompt, n_new, "2M")
    with pytest.raises(ValueError, match="1023"):  # before it would be fetched
        module.main("", 1024, "124M", "nowhere")


N_VOCAB, LONG = HPARAMS["n_vocab"], random_ids(HPARAMS["n_ctx"] - 3)
REFUSED = [  # prompts, the number of the bad one, and what else the message tells
    (LONG, 1, HPARAMS["n_ctx"]), ([[1], LONG], 2, HPARAMS["n_ctx"]), ([], 1, ""), ([[1], []], 2, ""),
    ([1, N_VOCAB], 1, N_VOCAB), ([[1], [0, -1]], 2, -1), ([2**40], 1, 2**40),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "number", "what"), REFUSED, ids=lambda value: str(value)[:9])
def test_what_generate_refuses(inputs, number, what):
    """Prompts that are too long or empty, by their number, and ids that are no row of the embedding."""
    with pytest.raises(ValueError, match=rf"(?=.*\b{number}\b).*{what}\b"):
        gpt2.generate(inputs, random_params(), N_HEAD, 4)


@pytest.mark.parametrize("name", ["wte", "wpe", "blocks"])
def test_weights_that_are_not_numbers(module, name):
    """NaN or infinity in one place is an error that names the weights, if it is met: in wte by all, in wpe by one row."""
    params = random_params()
    weights = params["blocks"][1]["mlp"]["c_proj"]["b"] if name == "blocks" else params[name][3]
    for weights[2] in np.nan, np.inf:
        for options in [{}, {"seed": 1}][: 1 + (module is gpt2)]:
            with pytest.raises(ValueError, match="weights"), np.errstate(all="ignore"):
                module.generate([[1], [1, 2, 1, 0]], params, N_HEAD, 1, **options)


# ---- The files ------------------------------------------------------------------------------------------------------


def test_imports():
    """To read or import the model costs NumPy alone; what is slow to import waits until it is needed."""
    for module_name, packages in ("gpt2", {"regex", "utils"}), ("gpt2_pico", set()):
        code = f"import sys, numpy; before = {{*sys.modules}}; import {module_name}; print(*{{*sys.modules}} - before)"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        loaded = {name.partition(".")[0] for name in result.stdout.split()}
        assert module_name in loaded and not loaded & (packages | {"tensorflow", "requests", "fire", "tqdm"})
