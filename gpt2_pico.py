# fmt: off
"""gpt2.py without the words: greedy GPT-2 with a KV cache, for prompts of any lengths, in as few lines as we dared."""
import utils  # noqa: I001
import numpy as np

def gelu(x): return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * (x * x * x))))
def softmax(x): return (exp_x := np.exp(x - x.max(-1, keepdims=True))) / exp_x.sum(-1, keepdims=True)
def linear(x, w, b): return x @ w + b
def ffn(x, c_fc, c_proj): return linear(gelu(linear(x, **c_fc)), **c_proj)
def attention(q, k, v, mask): return softmax(q / q.shape[-1] ** 0.5 @ k.swapaxes(-1, -2) + mask) @ v

def layer_norm(x, g, b, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * g + b

def mha(x, c_attn, c_proj, n_head, positions=None, cache=None):
    positions = np.arange(len(x)) if positions is None else positions
    qkv = linear(x, **c_attn).reshape(*positions.shape, 3, n_head, -1)
    q, k, v = (qkv[..., i, :, :].swapaxes(-2, -3) for i in range(3))
    if cache is not None:
        for row, at in enumerate(positions): cache[:, row, :, at[0] : at[-1] + 1] = k[row], v[row]
        k, v = cache[:, :, :, : positions.max() + 1]
    mask = np.where(np.arange(k.shape[-2]) <= np.expand_dims(positions, (-3, -1)), np.float32(0), np.float32(-np.inf))
    return linear(attention(q, k, v, mask).swapaxes(-2, -3).reshape(x.shape), **c_proj)

def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, positions=None, cache=None):
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, positions=positions, cache=cache)
    return x + ffn(layer_norm(x, **ln_2), **mlp)

def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, positions=None, cache=None):
    positions = np.broadcast_to(np.arange(np.shape(inputs)[-1]), np.shape(inputs)) if positions is None else positions
    x = (wte[np.asarray(inputs)] + wpe[positions]).reshape(-1, wpe.shape[1])
    for i, block in enumerate(blocks):
        x = transformer_block(x, **block, n_head=n_head, positions=positions, cache=None if cache is None else cache[i])
    x = layer_norm(x, **ln_f).reshape(*positions.shape, -1)
    return (x if cache is None else x[:, -1]) @ wte.T

def generate(inputs, params, n_head, n_tokens_to_generate):
    prompts = inputs if any(np.ndim(prompt) for prompt in inputs) else [inputs]
    lengths, d_head = np.array([[len(prompt)] for prompt in prompts]), params["wpe"].shape[1] // n_head
    size = len(params["blocks"]), 2, len(prompts), n_head, lengths.max() + n_tokens_to_generate, d_head
    model = {**params, "n_head": n_head, "cache": np.zeros(size, np.float32)}
    gpt2(np.array([np.pad(prompt, (0, lengths.max() - len(prompt))) for prompt in prompts], int), **model)
    ids = [np.array([[prompt[-1]] for prompt in prompts], int)]  # once more, for its logits
    for step in range(n_tokens_to_generate):
        logits = gpt2(ids[-1], **model, positions=lengths - 1 + step)
        if not np.isfinite(logits).all(): raise ValueError("the weights are not all numbers")
        ids.append(logits.argmax(-1)[:, None])
    return np.hstack(ids)[:, 1:].tolist() if prompts is inputs else np.hstack(ids)[0, 1:].tolist()

def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir=None):
    [n_new] = utils.check_options(model_size, n_tokens_to_generate=n_tokens_to_generate).values()
    encoder, hparams, params = utils.load_encoder_hparams_and_params(model_size, models_dir)
    end, prompts = encoder.encoder["<|endoftext|>"], [prompt] if isinstance(prompt, str) else prompt
    if not prompts: return []
    ids = [encoder.encode(text) or [end] for text in prompts]
    if max(map(len, ids)) + n_new > hparams["n_ctx"]: raise ValueError(f"longer than {hparams['n_ctx']} tokens in all")
    texts = [encoder.decode(new[: [*new, end].index(end)]) for new in generate(ids, params, hparams["n_head"], n_new)]
    return texts if prompts is prompt else texts[0]

if __name__ == "__main__":
    utils.run(main)
