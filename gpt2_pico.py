# fmt: off
"""The model and greedy generation of gpt2.py in as few lines as one can read: cache, ragged batch, the same text."""
import numpy as np

import utils


def gelu(x): return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * x * (1 + 0.044715 * (x * x))))

def softmax(x): return (exp_x := np.exp(x - x.max(-1, keepdims=True))) / exp_x.sum(-1, keepdims=True)

def layer_norm(x, g, b, eps=1e-5):
    x = x - x.sum(-1, keepdims=True) / x.shape[-1]
    return x / np.sqrt((x * x).sum(-1, keepdims=True) / x.shape[-1] + eps) * g + b

def linear(x, w, b): return (x.reshape(-1, w.shape[0]) @ w + b).reshape(*x.shape[:-1], -1)

def ffn(x, c_fc, c_proj): return linear(gelu(linear(x, **c_fc)), **c_proj)

def attention(q, k, v, mask): return softmax(q / q.shape[-1] ** 0.5 @ k.swapaxes(-1, -2) + mask) @ v

def mha(x, c_attn, c_proj, n_head, cache=None, positions=None):
    positions = np.arange(x.shape[-2]) if positions is None else positions
    qkv = linear(x, **c_attn).reshape(*x.shape[:-1], 3, n_head, -1)
    q, k, v = (qkv[..., i, :, :].swapaxes(-3, -2) for i in range(3))
    if cache is not None:
        cache[:, np.arange(len(x))[:, None], :, positions] = qkv[..., 1:, :, :]
        k, v = cache[..., : positions.max() + 1, :]
    mask = np.where(np.arange(k.shape[-2]) <= positions[..., None, :, None], np.float32(0), np.float32(-np.inf))
    return linear(attention(q, k, v, mask).swapaxes(-2, -3).reshape(*x.shape[:-1], -1), **c_proj)

def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, cache=None, positions=None):
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, cache=cache, positions=positions)
    return x + ffn(layer_norm(x, **ln_2), **mlp)

def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None, positions=None):
    positions = np.arange(np.shape(inputs)[-1]) if positions is None else positions
    x = wte[np.asarray(inputs)] + wpe[positions]
    for block, kv in zip(blocks, [None] * len(blocks) if cache is None else cache):
        x = transformer_block(x, **block, n_head=n_head, cache=kv, positions=positions)
    return linear(layer_norm(x if cache is None else x[:, -1:], **ln_f), wte.T, 0)

def generate(inputs, params, n_head, n_tokens_to_generate):
    prompts, n_embd = inputs if np.ndim(inputs[0]) else [inputs], params["wpe"].shape[1]
    n_seq, last = max(map(len, prompts)), np.array([[len(prompt) - 1] for prompt in prompts])
    size = len(params["blocks"]), 2, len(prompts), n_head, n_seq + n_tokens_to_generate, n_embd // n_head
    model = {**params, "n_head": n_head, "cache": np.zeros(size, np.float32)}
    gpt2([[*prompt, *[0] * (n_seq - len(prompt))] for prompt in prompts], **model, positions=np.arange(n_seq)[None])
    ids = [np.array([prompt[-1:] for prompt in prompts])]
    for step in range(n_tokens_to_generate):
        ids.append(gpt2(ids[-1], **model, positions=last + step)[:, 0].argmax(-1)[:, None])
    return np.hstack(ids)[:, 1:].tolist() if np.ndim(inputs[0]) else np.hstack(ids)[0, 1:].tolist()

def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir="models"):
    encoder, hparams, params = utils.load_encoder_hparams_and_params(model_size, models_dir)
    end, n_new, n_ctx = encoder.encoder["<|endoftext|>"], int(n_tokens_to_generate), hparams["n_ctx"]
    ids = [encoder.encode(text) or [end] for text in ([prompt] if isinstance(prompt, str) else prompt)]
    if not 0 < n_new <= n_ctx - max(map(len, ids)):
        raise ValueError(f"{max(map(len, ids))} tokens of prompt and {n_new} to generate: the context is {n_ctx}")
    texts = [encoder.decode(new[: (new + [end]).index(end)]) for new in generate(ids, params, hparams["n_head"], n_new)]
    return texts[0] if isinstance(prompt, str) else texts

if __name__ == "__main__":
    utils.run(main)
