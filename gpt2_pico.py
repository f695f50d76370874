# fmt: off
"""gpt2.py without the words: greedy GPT-2 with a KV cache, for prompts of any lengths, in as few lines as we dared."""
import utils
import numpy as np

def gelu(x): return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * (x * x * x))))
def softmax(x): return (exp_x := np.exp(x - x.max(-1, keepdims=True))) / exp_x.sum(-1, keepdims=True)
def linear(x, w, b): return (x.reshape(-1, x.shape[-1]) @ w + b).reshape(*x.shape[:-1], -1)
def ffn(x, c_fc, c_proj): return linear(gelu(linear(x, **c_fc)), **c_proj)
def attention(q, k, v, mask): return softmax(q / q.shape[-1] ** 0.5 @ k.swapaxes(-1, -2) + mask) @ v

def layer_norm(x, g, b, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * g + b

def mha(x, c_attn, c_proj, n_head, positions=None, cache=None):
    positions = np.arange(x.shape[-2]) if positions is None else positions
    qkv = linear(x, **c_attn).reshape(*x.shape[:-1], 3, n_head, -1)
    q, k, v = (qkv[..., i, :, :].swapaxes(-2, -3) for i in range(3))
    if cache is not None:
        rows = np.arange(len(x))[:, None]
        for kept, new in zip(cache, (k, v)): kept.swapaxes(1, 2)[rows, positions] = new.swapaxes(1, 2)
        k, v = cache[:, :, :, : positions.max() + 1]
    mask = np.where(np.arange(k.shape[-2]) <= np.expand_dims(positions, (-3, -1)), np.float32(0), np.float32(-np.inf))
    return linear(attention(q, k, v, mask).swapaxes(-2, -3).reshape(x.shape), **c_proj)

def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, positions=None, cache=None):
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, positions=positions, cache=cache)
    return x + ffn(layer_norm(x, **ln_2), **mlp)

def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, positions=None, cache=None):
    x = wte[np.asarray(inputs)] + wpe[np.arange(np.shape(inputs)[-1]) if positions is None else positions]
    for block, layer_cache in zip(blocks, [None] * len(blocks) if cache is None else cache):
        x = transformer_block(x, **block, n_head=n_head, positions=positions, cache=layer_cache)
    return (layer_norm(x, **ln_f) if cache is None else layer_norm(x[:, -1], **ln_f)) @ wte.T

def generate(inputs, params, n_head, n_tokens_to_generate):
    inputs = [*inputs]
    is_batch = any(np.ndim(prompt) for prompt in inputs)
    prompts = [utils.check_ids(p, params, n_head, n_tokens_to_generate) for p in (inputs if is_batch else [inputs])]
    ends, longest = np.array([[len(prompt) - 1] for prompt in prompts]), max(map(len, prompts))
    ids = np.array([prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts])
    shape = len(params["blocks"]), 2, len(ids), n_head, longest + n_tokens_to_generate, params["wpe"].shape[1] // n_head
    cache, positions, new = np.zeros(shape, np.float32), np.minimum(np.arange(longest), ends), [ids[:, :0]]
    for _ in range(n_tokens_to_generate):
        logits = gpt2(ids, **params, n_head=n_head, positions=positions, cache=cache)
        if not np.isfinite(logits).all(): raise ValueError("the weights are not all numbers")
        ids, positions = logits.argmax(-1)[:, None], positions[:, -1:] + 1
        new.append(ids)
    return np.hstack(new).tolist() if is_batch else np.hstack(new)[0].tolist()

def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir=None):
    [n_new] = utils.check_options(n_tokens_to_generate=n_tokens_to_generate).values()
    encoder, hparams, params = utils.load_encoder_hparams_and_params(model_size, models_dir)
    end, prompts = encoder.encoder["<|endoftext|>"], [prompt] if isinstance(prompt, str) else [*prompt]
    if not prompts: return []
    rows = generate([encoder.encode(text) or [end] for text in prompts], params, hparams["n_head"], n_new)
    texts = [encoder.decode(iter(iter(row).__next__, end)) for row in rows]
    return texts[0] if isinstance(prompt, str) else texts

if __name__ == "__main__":
    utils.run(main)
