"""Both forms of the model: held to what HF transformers computed, and each function to its formula."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, nested, random_tensors

import gpt2
import gpt2_pico

HPARAMS = {"n_vocab": 31, "n_ctx": 640, "n_embd": 12, "n_head": 3, "n_layer": 2}
PARAMS = nested({name: 7 * x for name, x in random_tensors(HPARAMS, seed=11).items()})  # large numbers, varied texts
AT_END = "and they lived happily ever after."  # the next token is <|endoftext|>
N_HEAD, BLOCK = HPARAMS["n_head"], PARAMS["blocks"][0]


@pytest.fixture(params=[gpt2, gpt2_pico], ids=lambda module: module.__name__)
def module(request):
    return request.param


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(HPARAMS["n_vocab"], size=shape).tolist()


# fmt: off
class Formula:
    """Each function as a textbook has it, in float64."""
    def gelu(x): return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    def softmax(x): return (exp_x := np.exp(x - x.max(-1, keepdims=True))) / exp_x.sum(-1, keepdims=True)
    def linear(x, w, b): return x @ w + b
    def ffn(x, c_fc, c_proj): return Formula.linear(Formula.gelu(Formula.linear(x, **c_fc)), **c_proj)
    def attention(q, k, v, mask): return Formula.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + mask) @ v

    def layer_norm(x, g, b, eps=1e-5):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * g + b

    def mha(x, c_attn, c_proj, n_head):
        mask = np.where(np.tri(x.shape[-2]), 0, -np.inf)
        qkv = np.split(Formula.linear(x, **c_attn), 3 * n_head, axis=-1)  # the queries of all heads, then the keys, ...
        heads = [Formula.attention(*qkv[i::n_head], mask) for i in range(n_head)]
        return Formula.linear(np.concatenate(heads, axis=-1), **c_proj)

    def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):
        x = x + Formula.mha(Formula.layer_norm(x, **ln_1), **attn, n_head=n_head)
        return x + Formula.ffn(Formula.layer_norm(x, **ln_2), **mlp)

    def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):
        x = np.float64(wte)[inputs.astype(int)] + wpe[: inputs.shape[-1]]
        for block in blocks:
            x = Formula.transformer_block(x, **block, n_head=n_head)
        return Formula.layer_norm(x, **ln_f) @ wte.T


X = np.random.default_rng(1).normal(0, 2, (2, 3, HPARAMS["n_embd"])).astype(np.float32)  # [n_batch, n_seq, n_embd]
INPUTS = {"batch": X, "sequence": X[0], "token": X[0, :1], "two axes": X[:, None], "small": X / 999, "large": X * 999}
ARGUMENTS = {  # name of the function: what it gets after x
    "gelu": {}, "softmax": {}, "linear": BLOCK["attn"]["c_attn"], "ffn": BLOCK["mlp"],
    "layer_norm": BLOCK["ln_1"], "layer_norm with another eps": {**BLOCK["ln_1"], "eps": 0.1},
    "attention": {"k": X[0], "v": X[1], "mask": np.float32([0, -np.inf, 0])},
    "mha": {**BLOCK["attn"], "n_head": N_HEAD}, "transformer_block": {**BLOCK, "n_head": N_HEAD},
    "gpt2": {**PARAMS, "n_head": N_HEAD},
}
# fmt: on


@pytest.mark.parametrize("x", INPUTS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_function_is_its_formula(module, name, x):
    """Whatever the leading axes and the size of the numbers; float32 in, float32 out; the argument stays as it was."""
    given = INPUTS[x][..., 0].astype(int) % HPARAMS["n_vocab"] if name == "gpt2" else INPUTS[x].copy()
    before, others = given.astype(np.float64), ARGUMENTS[name]
    result, expected = (getattr(f, name.split()[0])(x, **others) for f, x in ((module, given), (Formula, before)))
    tolerance = 2e-6 if name == "gelu" else 3e-4
    np.testing.assert_allclose(result, np.float32(expected), rtol=tolerance, atol=tolerance, strict=True)
    np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["prompt"][:12])
def test_golden(module, model, golden):
    """Ids, logits, 40 tokens and their text are those of HF transformers' GPT2LMHeadModel."""
    encoder, hparams, params = model
    ids = encoder.encode(golden["prompt"])
    assert ids == golden["ids"]
    logits = module.gpt2(ids, **params, n_head=hparams["n_head"])[-1]
    np.testing.assert_allclose(logits[:16], golden["logits16"], rtol=0, atol=1e-3)
    assert abs(np.log(np.exp(np.float64(logits)).sum()) - golden["logsumexp"]) < 1e-3
    assert module.generate(ids, params, hparams["n_head"], 40) == golden["greedy"]
    assert module.main(golden["prompt"], model_size="2M") == golden["text"]


def test_endoftext(module, model):
    """An empty prompt starts from <|endoftext|>; a text ends before the first one that is generated, if at once."""
    encoder, hparams, params = model
    end = encoder.encoder["<|endoftext|>"]
    ids = module.generate([end], params, hparams["n_head"], 60)
    assert end in ids[1:]  # or the next lines show nothing
    texts = [encoder.decode(ids[: ids.index(end)]), ""]
    for prompts in ["", AT_END], (prompt for prompt in ["", AT_END]):  # a list, a generator
        assert module.main(prompts, 60, "2M", ROOT / "models") == texts
    assert module.main([], 60, "2M") == []


def test_context_length(module, model):
    """A prompt and its new tokens may fill the context to the last token; with one more, any is refused."""
    encoder, hparams, _ = model
    n_ctx, text = hparams["n_ctx"], " the" * 200
    n_left = n_ctx - len(encoder.encode(text))
    assert len(encoder.encode(module.main(text, n_left, "2M"))) > 0
    for prompt, n_new in (text, n_left + 1), (" the" * n_ctx, 1), ("", n_ctx), (["a", text], n_left + 1):
        with pytest.raises(ValueError, match=str(n_ctx)):
            module.main(prompt, n_new, "2M")


@pytest.fixture
def calls(module, monkeypatch):
    """What went through the model so far: (ids, logits) of each call."""
    calls, original = [], module.gpt2

    def recorded(ids, **kwargs):
        calls.append((ids, original(ids, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(module, "gpt2", recorded)
    return calls


def uncached(module, prompt, n_new):
    """Its new ids and their logits, by asking for the whole sequence again and again."""
    ids, rows = list(prompt), []
    for _ in range(n_new):
        rows.append(module.gpt2(ids, **PARAMS, n_head=N_HEAD)[-1])
        ids.append(int(rows[-1].argmax()))
    return ids[len(prompt) :], np.array(rows)


LENGTHS = {"ragged": [2, 200, 1, 7], "a piece": [256], "one more": [257], "apart": [3, 635], "many": [2] * 299 + [4]}


@pytest.mark.parametrize("lengths", LENGTHS)
def test_in_a_batch_as_alone(module, calls, lengths):
    """Each prompt gets what it gets alone and without a cache: the same ids, from the same logits, in float32."""
    prompts = [random_ids(n, seed=i) for i, n in enumerate(LENGTHS[lengths])]
    rows, steps = module.generate(prompts, PARAMS, N_HEAD, 5), [logits for _, logits in calls[-5:]]
    for i in {0, 1, len(prompts) - 1} & {*range(len(prompts))}:
        ids, logits = uncached(module, prompts[i], 5)
        assert rows[i] == ids == module.generate(prompts[i], PARAMS, N_HEAD, 5)
        np.testing.assert_allclose([step[i] for step in steps], logits, rtol=0, atol=1e-3, strict=True)


@pytest.mark.parametrize("module", [gpt2], indirect=True)
def test_what_goes_through_the_model(model, calls):
    """About 256 tokens of the prompts at a time, then one new token of each, and nothing after the end of all texts."""
    gpt2.generate(random_ids(9), PARAMS, N_HEAD, 3)
    gpt2.generate(random_ids(5, 300), PARAMS, N_HEAD, 1)
    sizes = [ids.size for ids, *_ in calls]
    assert sizes[:3] == [9, 1, 1] and sum(sizes[3:]) == 5 * 300 and max(sizes) <= 256
    calls.clear()
    assert gpt2.main([AT_END] * 130, 40, "2M", batch_size=120) == [""] * 130
    assert {len(ids) for ids, *_ in calls} == {120, 10}
    assert sum(ids.size for ids, *_ in calls) == 130 * len(model[0].encode(AT_END))


@pytest.mark.parametrize("kind", [list, tuple, "uint8", "int16", "int64", "uint64"], ids=str)
def test_what_generate_takes(module, kind):
    """Lists, tuples, arrays, in a batch or not; the caller's are unchanged, the new ids are Python's integers."""
    prompts = [np.array(ids, kind) if isinstance(kind, str) else kind(ids) for ids in ([1, 2, 30], [5, 6], [7])]
    new = [module.generate(prompt, PARAMS, N_HEAD, 6) for prompt in prompts]
    assert new[0] == uncached(module, [1, 2, 30], 6)[0] and {type(id) for id in new[0]} == {int}
    for batch in prompts, tuple(prompts), iter(prompts):
        assert module.generate(batch, PARAMS, N_HEAD, 6) == new
    assert module.generate(prompts[:1], PARAMS, N_HEAD, 6) == new[:1]
    assert module.generate(prompts[0], PARAMS, N_HEAD, 0) == [] and list(prompts[0]) == [1, 2, 30]


REFUSED = {  # what generate gets in the place of ids
    "too many": [1] * 637, "too many in a batch": [[1], [1] * 637], "none": [], "none in a batch": [[1], []],
    "too high": [1, 31], "below 0 in a batch": [[1], [0, -1]], "65 bits": [2**64], "text": "123", "fractions": [1, 1.9],
}  # fmt: skip


@pytest.mark.parametrize("inputs", REFUSED)
def test_what_generate_refuses_in_one_sentence(module, inputs):
    with pytest.raises((TypeError, ValueError), match=r"\A.*(ids?\b|tokens).*\Z"):
        module.generate(REFUSED[inputs], PARAMS, N_HEAD, 4)


def test_what_else_is_refused_in_one_sentence(module):
    for n_head in 5, 0:
        with pytest.raises(ValueError, match=r"\A.*n_head.* .*\Z"):
            module.generate([1], PARAMS, n_head, 4)
    for prompt in None, 5, [5]:
        with pytest.raises((TypeError, ValueError), match=r"\A.*(text|prompt).* .*\Z"):
            gpt2.main(prompt, model_size="2M")


@pytest.mark.parametrize("name, value", [("wte", np.inf), ("wpe", np.nan)])
def test_weights_that_are_not_numbers(module, name, value):
    """One of them is an error that names the weights, also if it meets one prompt alone, also when sampling."""
    params = {**PARAMS, name: PARAMS[name].copy()}
    params[name][3, 2] = value  # of token 3, which is in no prompt; of position 3, which one prompt has
    for options in [{}] if module is gpt2_pico else [{}, {"seed": 1}]:
        with pytest.raises(ValueError, match="weights"), np.errstate(all="ignore"):
            module.generate([[1], [1, 2, 5, 0]], params, N_HEAD, 1, **options)


def test_help_shows_the_options_by_name():
    for function in gpt2.generate, gpt2.main:
        assert {"temperature", "top_k", "top_p", "seed"} <= {*inspect.signature(function).parameters}


def test_imports():
    """To read or import the model costs NumPy alone; what is slow to import waits until it is needed."""
    for name, others in ("gpt2", {"regex", "utils"}), ("gpt2_pico", set()):
        command = [sys.executable, "-c", f"import sys, {name}; print(*filter(sys.modules.get, sys.modules))"]
        loaded = {*subprocess.check_output(command, cwd=ROOT, text=True, timeout=60).split()}
        assert name in loaded and not loaded & {"tensorflow", "requests", "fire", "tqdm", *others}
