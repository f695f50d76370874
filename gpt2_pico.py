# fmt: off
"""gpt2.py without the words: GPT-2 with a KV cache, for prompts of any lengths, in as few lines as we dared."""
import numpy as np  # noqa: I001

import utils

def gelu(x): return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * (x * x * x))))

def softmax(x): return (exp_x := np.exp(x - x.max(-1, keepdims=True))) / exp_x.sum(-1, keepdims=True)

def layer_norm(x, g, b, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * g + b

def linear(x, w, b): return (x.reshape(-1, w.shape[0]) @ w + b).reshape(*x.shape[:-1], -1)

def ffn(x, c_fc, c_proj): return linear(gelu(linear(x, **c_fc)), **c_proj)

def attention(q, k, v, mask): return softmax(q / q.shape[-1] ** 0.5 @ k.swapaxes(-1, -2) + mask) @ v

def mha(x, c_attn, c_proj, n_head, cache=None, start=0):
    qkv = linear(x, **c_attn).reshape(*x.shape[:-1], 3, n_head, -1)
    q, k, v = (qkv[..., i, :, :].swapaxes(-2, -3) for i in range(3))
    queries = np.expand_dims(start, -1) + np.arange(x.shape[-2])
    if cache is not None:
        for b, at in enumerate(queries): cache[:, b, :, at[0] : at[-1] + 1] = k[b], v[b]
        k, v = cache[:, :, :, : queries.max() + 1]
    mask = np.where(np.arange(k.shape[-2]) <= np.expand_dims(queries, (-3, -1)), np.float32(0), np.float32(-np.inf))
    return linear(attention(q, k, v, mask).swapaxes(-2, -3).reshape(x.shape), **c_proj)

def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, cache=None, start=0):
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, cache=cache, start=start)
    return x + ffn(layer_norm(x, **ln_2), **mlp)

def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None, start=0):
    x = wte[np.asarray(inputs)] + wpe[np.expand_dims(start, -1) + np.arange(np.shape(inputs)[-1])]
    for i, block in enumerate(blocks):
        x = transformer_block(x, **block, n_head=n_head, cache=None if cache is None else cache[i], start=start)
    return layer_norm(x if cache is None else x[:, -1], **ln_f) @ wte.T

def generate(inputs, params, n_head, n_tokens_to_generate):
    prompts = inputs if any(np.ndim(prompt) for prompt in inputs) else [inputs]
    lengths, d_head = np.array([len(prompt) for prompt in prompts]), params["wpe"].shape[1] // n_head
    size = len(params["blocks"]), 2, len(prompts), n_head, max(lengths) + n_tokens_to_generate, d_head
    model = {**params, "n_head": n_head, "cache": np.zeros(size, np.float32)}
    gpt2([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts], **model, start=0 * lengths)
    ids = [np.array([prompt[-1] for prompt in prompts])]  # once more, for its logits
    for step in range(n_tokens_to_generate):
        ids.append(gpt2(ids[-1][:, None], **model, start=lengths - 1 + step).argmax(-1))
    return np.transpose(ids[1:]).tolist() if prompts is inputs else np.ravel(ids[1:]).tolist()

def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir=None):
    [n_new] = utils.check_options(n_tokens_to_generate=n_tokens_to_generate).values()
    encoder, hparams, params = utils.load_encoder_hparams_and_params(model_size, models_dir)
    end, prompts = encoder.encoder["<|endoftext|>"], [prompt] if isinstance(prompt, str) else prompt
    ids = [encoder.encode(text) or [end] for text in prompts]
    if max(map(len, ids)) + n_new > hparams["n_ctx"]: raise ValueError(f"longer than {hparams['n_ctx']} tokens in all")
    texts = [encoder.decode(new[: [*new, end].index(end)]) for new in generate(ids, params, hparams["n_head"], n_new)]
    return texts if prompts is prompt else texts[0]

if __name__ == "__main__":
    utils.run(main)
