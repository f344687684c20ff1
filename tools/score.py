"""Score the responses in a file, or convert a trained model: the two programs of `python rm.py`.

    python rm.py CHECKPOINT FILE [--out scores.jsonl]        comparisons, or single responses
    python rm.py CHECKPOINT FILE --show | --html page.html   the same, token by token
    python rm.py convert CHECKPOINT DIRECTORY --layout hf

The model is in rm.py, file formats are in data.py, pages in tools/pairs_page.py.
"""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from data import has_tokenizer, load_comparisons, load_tokenizer, pack, pad_rows, tokenize
from parts.files import replacing
from parts.guards import check_scores
from parts.huggingface import LAYOUTS
from rm import RewardModel
from tools import pairs_page

# --------------------------------------------------------------------------------------------------
# Scores


def score(
    model: RewardModel, groups: list[list[list[int]]], batch_size: int, layout: str = "packed"
) -> list[list[float]]:
    """Compute the end score of every sequence of every comparison.

    groups: comparisons of one or more sequences of token ids. batch_size: how many sequences are
    computed at once, at most, except that a comparison is never split. layout: packed or padded.
    """
    scores = [[]] * len(groups)
    for indices in batches(groups, batch_size):
        ends = iter(end_scores(model, [groups[i] for i in indices], layout).tolist())
        for i in indices:
            scores[i] = list(itertools.islice(ends, len(groups[i])))
    return scores


def batches(groups: list[list[list[int]]], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of comparisons of similar lengths, `batch_size` sequences at most."""
    batch, size = [], 0
    for i in sorted(range(len(groups)), key=lambda i: max(map(len, groups[i]))):
        if batch and size + len(groups[i]) > batch_size:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += len(groups[i])
    if batch:
        yield batch


@torch.no_grad()
def end_scores(model: RewardModel, groups: list[list[list[int]]], layout: str) -> torch.Tensor:
    """Compute the rewards at the last tokens of a batch of comparisons, one after the other."""
    device = model.v_head.weight.device
    if layout == "packed":
        batch = pack(groups, model.pad_id, min_responses=1, longest_tail=0)
        rewards = model.packed_rewards(batch.to(device))
        return torch.stack([row[-1] for rows in rewards for row in rows])
    sequences = [sequence for group in groups for sequence in group]
    input_ids, mask = (tensor.to(device) for tensor in pad_rows(sequences, model.pad_id))
    values = model.forward_value(input_ids, mask, return_value_only=True)
    # The lengths are known, so a pad id inside a text ends nothing.
    return values.gather(1, mask.sum(1, keepdim=True) - 1).flatten()


def trained_model(checkpoint) -> RewardModel:
    """Load a reward model to score with. Raises ValueError where its value head is fresh."""
    model = RewardModel.from_pretrained(checkpoint)
    if model.has_fresh_head:
        raise ValueError(
            f"{checkpoint}: has no v_head.weight, so it is no reward model yet; "
            "train it first (train.py)"
        )
    return model.eval()


# --------------------------------------------------------------------------------------------------
# python rm.py CHECKPOINT FILE


def score_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "rm.py",
        allow_abbrev=False,
        description="Score the responses in a file. One JSON line a row, in the file's order: "
        '{"scores": [best, ..., worst]} for a comparison, {"score": x} for a single row.',
        epilog="`python rm.py convert --help` describes the other program.",
    )
    flag = parser.add_argument
    flag("checkpoint", help="a directory with a trained reward model and its tokenizer")
    flag("file", help="comparisons, or rows of prompt and response (.jsonl, .jsonl.gz, .json)")
    flag("--out", help="where to write the scores (default: standard output)")
    html = "write a page that shows comparisons token by token; without --out no scores are written"
    flag("--html", help=html)
    show = "print the same, in place of scores; in colour on a terminal, or with FORCE_COLOR set"
    flag("--show", action="store_true", help=show)
    flag("--rows", type=int, help="with --html or --show: rows of the file to show (100)")
    flag("--batch_size", type=int, default=16, help="sequences computed at once (16)")
    layouts = ("packed", "padded")
    flag("--layout", choices=layouts, default="packed", help="padded is the reference (packed)")
    length = "longer sequences are truncated, on the left (default: the model's positions)"
    flag("--max_seq_len", type=int, help=length)
    return parser


def check_score_flags(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Exit with a message where a flag has a wrong value."""
    if args.batch_size < 1:
        parser.error(f"argument --batch_size: found {args.batch_size}; expected 1 or more")
    for flag, target in (("--out", args.out), ("--html", args.html)):
        if not target:
            continue
        if Path(target).is_dir() or not Path(target).absolute().parent.is_dir():
            parser.error(
                f"argument {flag}: found {target}; expected a file in a directory that exists"
            )
        if Path(target).resolve() == Path(args.file).resolve():
            parser.error(
                f"argument {flag}: found {target}, which is the file to score; give another"
            )
    if args.html and args.out and Path(args.html).resolve() == Path(args.out).resolve():
        parser.error(f"argument --html: found {args.html}, which is that of --out; give another")
    if args.rows is not None and not (args.rows >= 1 and (args.html or args.show)):
        parser.error(
            f"argument --rows: found {args.rows}; expected 1 or more, and --html or --show"
        )


def score_program(argv: list[str]):
    parser = score_flags()
    args = parser.parse_args(argv)
    check_score_flags(parser, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = trained_model(args.checkpoint).to(device)
    tokenizer = load_tokenizer(args.checkpoint, model.pad_id)
    config = model.backbone.config
    if tokenizer.text_size > config.vocab_size:
        raise ValueError(
            f"{args.checkpoint}: the model has {config.vocab_size} token ids, "
            f"its tokenizer {tokenizer.text_size}; they don't belong together"
        )
    max_seq_len = config.n_positions if args.max_seq_len is None else args.max_seq_len
    if not 2 <= max_seq_len <= config.n_positions:
        parser.error(
            f"argument --max_seq_len: found {max_seq_len}; "
            f"expected 2 to {config.n_positions}, the positions that the model has"
        )
    if args.html or args.show:
        rows = pairs_page.scored_rows(model, tokenizer, args.file, args.rows or 100, max_seq_len)
        if args.html:
            pairs_page.write(args.html, rows, args.file, args.checkpoint, max_seq_len)
        if args.show:
            wants_colors = sys.stdout.isatty() or os.environ.get("FORCE_COLOR")
            pairs_page.show(rows, sys.stdout, wants_colors and not os.environ.get("NO_COLOR"))
        if not args.out:
            return
    comparisons = load_comparisons(args.file, min_responses=1)
    settings = args.batch_size, args.layout, max_seq_len
    if args.out:
        with replacing(args.out) as part, open(part, "w") as out:
            margins = write_scores(out, args.file, comparisons, model, tokenizer, *settings)
    else:
        margins = write_scores(sys.stdout, args.file, comparisons, model, tokenizer, *settings)
    if margins:
        accuracy = sum(margin > 0 for margin in margins) / len(margins)
        print(
            f"{len(margins)} pairs: accuracy {accuracy:.4f}, "
            f"mean margin {sum(margins) / len(margins):.4f}",
            file=sys.stderr,
        )


def write_scores(
    out, path, comparisons, model, tokenizer, batch_size: int, layout: str, max_seq_len: int
) -> list[float]:
    """Write a line of JSON for every comparison of the file `path`.

    Returns the margins of all pairs. Raises ValueError that names the row with a score which is not
    finite; the rows before it are written.
    """
    margins, rows = [], 0
    with tqdm(unit=" rows", file=sys.stderr) as bar:
        # Batches are of similar lengths within a window of the file.
        while window := list(itertools.islice(comparisons, 64 * batch_size)):
            groups = [tokenize(comparison, tokenizer, max_seq_len) for comparison in window]
            for group, scores in zip(groups, score(model, groups, batch_size, layout)):
                rows += 1
                if not all(map(math.isfinite, scores)):
                    # In a packed batch a NaN spoils other texts: alone, each has its own score.
                    scores = [score(model, [[text]], 1, layout)[0][0] for text in group]
                    check_scores(scores, f"{path}: row {rows}")
                margins += [a - b for a, b in itertools.combinations(scores, 2)]
                row = {"scores": scores} if len(scores) > 1 else {"score": scores[0]}
                out.write(json.dumps(row) + "\n")
            bar.update(len(window))
    return margins


# --------------------------------------------------------------------------------------------------
# python rm.py convert CHECKPOINT DIRECTORY


def convert_program(argv: list[str]):
    parser = argparse.ArgumentParser(
        "rm.py convert",
        allow_abbrev=False,
        description="Write a trained reward model in another layout.",
    )
    flag = parser.add_argument
    flag("checkpoint", help="a directory with a trained reward model, in either layout")
    flag("directory", help="where to write it: a new directory, or an empty one")
    layout = (
        "deepspeed-chat: for its step 3; hf: for transformers.AutoModelForSequenceClassification"
    )
    flag("--layout", choices=LAYOUTS, required=True, help=layout)
    args = parser.parse_args(argv)
    directory = Path(args.directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        parser.error(
            f"argument directory: found {args.directory}, which is not empty; give a new one"
        )
    model = trained_model(args.checkpoint)
    tokenizer, note = None, "without a tokenizer, as there was none"
    if has_tokenizer(args.checkpoint):
        tokenizer, note = load_tokenizer(args.checkpoint, model.pad_id), "with its tokenizer"
    model.save_pretrained(directory, args.layout, tokenizer)
    print(f"{directory}: {args.layout} layout, {note}")
    if model.reward_bias:
        print(
            "its rewards were normalized: other programs must add "
            f"{model.reward_bias:.6g} (reward_bias in config.json) to what they compute"
        )


def main():
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["convert"]:
            convert_program(arguments[1:])
        else:
            score_program(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"rm.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("rm.py: interrupted; --out and --html are as they were")


if __name__ == "__main__":
    main()
