"""Speed and memory beside other implementations: everything that is compared is measured in turns, in one run.

    python -m extras.bench load        checkpoints of real shapes with random weights: our loading beside transformers'

Needs requirements-dev.txt. The figures in README.md are from here.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {  # the config.json of facebook/opt-350m and openai-community/gpt2; a llama in the shape of Llama 3.2 1B
    "OPT-350m": dict(model_type="opt", vocab_size=50272, hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16,
                     word_embed_proj_dim=512, max_position_embeddings=2048, do_layer_norm_before=False),
    "GPT-2 124M": dict(model_type="gpt2"),
    "llama 1B": dict(model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True),
}
TINY = {  # of the same classes, made before the clock starts: transformers imports them when they are first used
    "opt": dict(vocab_size=8, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1, word_embed_proj_dim=4, pad_token_id=1),
    "gpt2": dict(vocab_size=8, n_embd=8, n_layer=1, n_head=1),
    "llama": dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1),
}
LOADERS = {  # the backbone alone, and with a fresh head; ours then also has a row for a new pad id in its embedding
    "GPT (ours)": "model.GPT.from_pretrained(path)",
    "AutoModel": "transformers.AutoModel.from_pretrained(path)",
    "RewardModel (ours)": "rm.RewardModel.from_pretrained(path).backbone",
    "AutoModelForSequenceClassification": "transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).base_model",
}


def anonymous_memory(pid="self") -> int:
    """Bytes of a process's memory that no file stands behind."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


# Runs in a process of its own. The first line that it prints says how much memory it has after `import torch`, the last one
# how long loading took, and how long until a first forward pass was done: a loader may map the file and leave the reading
# of it to that pass. Imports are not counted.
LOAD = """
import json, sys, time, torch
from extras.bench import LOADERS, anonymous_memory
loader, path = sys.argv[1:]
base = anonymous_memory()
if "ours" in loader:
    import model, rm
else:
    import transformers
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(**json.load(open(path + "/tiny.json"))))
print(base, flush=True)
sys.stdin.readline()
start = time.perf_counter()
backbone = eval(LOADERS[loader])
loaded = time.perf_counter() - start
print("loaded", flush=True)
sys.stdin.readline()
start = time.perf_counter()
with torch.no_grad():
    backbone(torch.arange(8)[None])
print(json.dumps([loaded, loaded + time.perf_counter() - start]), flush=True)
"""

# Samples the memory of another process every millisecond, from its first line on standard input to its second.
SAMPLE = """
import select, sys
from extras.bench import anonymous_memory
peak = anonymous_memory(sys.argv[1])
print(flush=True)
while not select.select([sys.stdin], [], [], 0.001)[0]:
    peak = max(peak, anonymous_memory(sys.argv[1]))
print(max(peak, anonymous_memory(sys.argv[1])))
"""


def measure_load(loader: str, path: Path) -> tuple[float, float, int]:
    """Seconds until loaded, seconds until the first forward pass of 8 tokens is done, peak of anonymous memory until loaded."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", LOAD, loader, str(path)], **pipes) as child:
        base = int(child.stdout.readline())
        with subprocess.Popen([sys.executable, "-c", SAMPLE, str(child.pid)], **pipes) as sampler:
            sampler.stdout.readline()
            print(file=child.stdin, flush=True)
            child.stdout.readline()
            peak = int(sampler.communicate("\n")[0])
        loaded, used = json.loads(child.communicate("\n")[0])
    return loaded, used, peak - base


def make_checkpoint(config: dict, path: Path):
    subprocess.run([sys.executable, "-c", "import sys, json, transformers as t\nconfig = json.loads(sys.argv[1])\n"
                    "t.AutoModel.from_config(t.AutoConfig.for_model(**config)).save_pretrained(sys.argv[2])",
                    json.dumps(config), path], check=True, stderr=subprocess.DEVNULL)


def bench_load(rounds: int):
    print("| checkpoint | weights, float32 | loader | load | load and first forward | peak anonymous memory / weights |\n" + "| --- " * 6 + "|")
    for name, config in SHAPES.items():
        with tempfile.TemporaryDirectory() as directory:
            make_checkpoint(config, Path(directory))
            (Path(directory) / "tiny.json").write_text(json.dumps(config | TINY[config["model_type"]]))
            size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
            runs = {loader: [] for loader in LOADERS}
            for _ in range(rounds):
                for loader in LOADERS:
                    runs[loader].append(measure_load(loader, Path(directory)))
        for loader, results in runs.items():
            loaded, used, peak = zip(*results)
            print(f"| {name} | {size / 1e9:.2f} GB | {loader} | {statistics.median(loaded):.2f} s ({min(loaded):.2f} to {max(loaded):.2f}) "
                  f"| {statistics.median(used):.2f} s ({min(used):.2f} to {max(used):.2f}) | {max(peak) / size:.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", choices=["load"])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured, in turns (5)")
    args = parser.parse_args()
    start = time.perf_counter()
    bench_load(args.rounds)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
