"""Score the responses in a file, or convert a trained model: the two programs of `python rm.py`.

    python rm.py CHECKPOINT FILE [--out scores.jsonl]        comparisons, or single responses
    python rm.py CHECKPOINT FILE --show | --html page.html   the same, token by token
    python rm.py convert CHECKPOINT DIRECTORY --layout hf    (needs requirements-hf.txt)

From Python, `Scorer("out")(prompt, responses)` returns the same scores. The model is in rm.py, file
formats are in data.py, pages in tools/pairs_page.py.
"""

import argparse
import itertools
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import (
    Comparison,
    Tokenizer,
    has_tokenizer,
    load_comparisons,
    load_tokenizer,
    pack,
    pad_rows,
    tokenize,
)
from parts import metrics
from parts.chat import notes_on
from parts.files import show_output, unfiltered, writing
from parts.flags import Parser, add_row_flags, flags_of, not_empty, row_reading
from parts.guards import check_scores, counted, one_line
from parts.huggingface import LAYOUTS, longest_row, rows_to_add, truncation_of, unread_weights
from parts.memory import full_memory, memory_line
from parts.packed import reward_places
from parts.rows import (
    Reading,
    convert_rows,
    files_of,
    json_type,
    note_lines,
    read_dialogue,
    unused_lines,
)
from parts.token_cache import NO_LIMIT, first_of_each, is_truncated
from parts.tokenizers import HuggingFaceTokenizer
from rm import RewardModel
from tools import pairs_page

BATCH_SIZE = 16  # sequences computed at once

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
        ends = [places[-1].item() for texts in reward_places(batch) for places in texts]
        return rewards[torch.tensor(ends, device=device)]
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
            f"{checkpoint}: {model.head_remark}; it is no reward model yet: train it (train.py)"
        )
    return model.eval()


def load_to_score(checkpoint, device) -> tuple[RewardModel, Tokenizer]:
    """Load a reward model onto a device, and its tokenizer.

    Raises ValueError where the model is none, or the two don't belong together.
    """
    model = trained_model(checkpoint).to(device)
    tokenizer = load_tokenizer(checkpoint, model.pad_id)
    rows = model.backbone.config.vocab_size
    missing = rows_to_add(rows, tokenizer)
    if missing is None:
        raise ValueError(
            f"{checkpoint}: the model has {rows} token ids, "
            f"its tokenizer {tokenizer.text_size}; they don't belong together"
        )
    if missing:
        model.backbone.resize_embedding(tokenizer.vocab_size)
    return model, tokenizer


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# --------------------------------------------------------------------------------------------------
# From Python


class Scorer:
    """A trained reward model that scores the responses to a prompt.

        scorer = Scorer("out")
        scorer("Where is Oslo?", [" In Norway.", " In Rome."])    # two numbers

    checkpoint: a directory as `python rm.py` takes it; it is loaded once. device: as torch names
    it, such as "cpu" or "cuda:1"; None is the GPU where there is one. Raises ValueError as rm.py
    does, and for a device that is not there.
    """

    def __init__(self, checkpoint, device=None):
        device = default_device() if device is None else device
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # torch raises both
            found = str(error).splitlines()[0]
            raise ValueError(f"device: found {device}, which torch cannot use ({found})") from None
        self.model, self.tokenizer = load_to_score(checkpoint, device)
        unread = unread_weights(checkpoint)
        if unread:
            warnings.warn(f"{checkpoint}: {unread}", stacklevel=2)
        self.truncation = truncation_of(vars(self.model.backbone.config))  # length and side

    def __call__(self, prompt: str | list[dict], responses: list) -> list[float]:
        """Compute the end score of every response, in their order.

        prompt: text, or chat messages {"role", "content"}. responses: texts, or lists of chat
        messages. Where one of them has messages, text counts as a message, the prompt's as the
        user's, a response's as the assistant's; messages go through the chat template, text alone
        does not. The numbers are those of `python rm.py` for a row {"prompt": prompt, "responses":
        responses}, of one response or more: so where they are too long, all lose the same tokens of
        the prompt.
        Any number of responses is computed in batches of similar lengths. A note on the texts, such
        as rm.py prints, is a warning. Raises ValueError that names the response.
        """
        named = named_responses(responses)
        if not named:
            return []
        notes = []
        prompt, texts = read_dialogue({"prompt": prompt}, named, Reading(), notes)
        if isinstance(prompt, str) and self.tokenizer.has_own_template:
            notes.append("text is not put into the chat template; give chat messages")
        for note in notes:
            warnings.warn(note, stacklevel=2)
        sequences = tokenize(Comparison(prompt, texts), self.tokenizer, *self.truncation)
        # A batch is a comparison, so that its sequences share the computation of the prompt.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            ends = end_scores(self.model, [[sequences[i] for i in batch]], "packed")
            for i, end in zip(batch, ends.tolist()):
                scores[i] = end
        check_scores(scores, "Scorer")
        return scores


def named_responses(responses) -> dict:
    """Return responses by the names that errors give them: responses[0], responses[1], ...

    Raises ValueError where they are one text, or messages, in place of a list of responses.
    """
    if isinstance(responses, (str, dict)) or not isinstance(responses, Iterable):
        found = json_type(responses)
        raise ValueError(f"responses: found {found}; expected a list of texts, or of dialogues")
    named = {}
    for i, response in enumerate(responses):
        if isinstance(response, dict):
            raise ValueError(
                f"responses[{i}]: found an object; expected text, or a list of chat messages: a "
                "dialogue stands in a list, as [messages]"
            )
        named[f"responses[{i}]"] = response
    return named


# --------------------------------------------------------------------------------------------------
# python rm.py CHECKPOINT FILE


def score_flags() -> argparse.ArgumentParser:
    parser = Parser(
        "rm.py",
        allow_abbrev=False,
        description="Score the responses in a file. One JSON line a row, in the file's order: "
        '{"scores": [best, ..., worst]} for a comparison, {"score": x} for a single row.',
        epilog="`python rm.py convert --help` describes the other program.",
    )
    flag = parser.add_argument
    trained = "a directory with a trained reward model and its tokenizer"
    flag("checkpoint", type=not_empty, help=trained)
    file = "comparisons, or rows of prompt and response: .jsonl, .jsonl.gz, .json or .parquet, "
    flag("file", type=not_empty, help=file + "a directory of such files, or a quoted glob")
    flag("--out", type=not_empty, help="where to write the scores (default: standard output)")
    html = "write a page that shows comparisons token by token; without --out no scores are written"
    flag("--html", type=not_empty, help=html)
    show = "print the same, in place of scores; in colour on a terminal, or with FORCE_COLOR set"
    flag("--show", action="store_true", help=show)
    flag("--rows", type=int, help="with --html or --show: rows of the file to show (100)")
    flag("--batch_size", type=int, default=BATCH_SIZE, help="sequences computed at once (16)")
    layouts = ("packed", "padded")
    flag("--layout", choices=layouts, default="packed", help="padded is the reference (packed)")
    length = "longer sequences are truncated (default: as in training, else the model's positions)"
    flag("--max_seq_len", type=int, help=length)
    side = "the side that is cut (default: as in training, else left)"
    flag("--truncation_side", choices=("left", "right"), help=side)
    add_row_flags(flags_of(parser, "fields of rows"))
    return parser


def check_score_flags(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Exit with a message where a flag has a wrong value."""
    try:
        row_reading(args)
    except ValueError as error:
        parser.error(f"argument {error}")
    scored = [os.path.realpath(file) for file in files_if_any(args.file)]
    if args.batch_size < 1:
        parser.error(f"argument --batch_size: found {args.batch_size}; expected 1 or more")
    for flag, target in (("--out", args.out), ("--html", args.html)):
        if not target:
            continue
        # Links are followed, so that a file is written where they lead.
        if Path(target).is_dir() or not Path(os.path.realpath(target)).parent.is_dir():
            parser.error(
                f"argument {flag}: found {target}; expected a file in a directory that exists"
            )
        if os.path.realpath(target) in scored:
            parser.error(
                f"argument {flag}: found {target}, which is the file to score; give another"
            )
    if args.html and args.out and os.path.realpath(args.html) == os.path.realpath(args.out):
        parser.error(f"argument --html: found {args.html}, which is that of --out; give another")
    if args.rows is not None and not (args.rows >= 1 and (args.html or args.show)):
        parser.error(
            f"argument --rows: found {args.rows}; expected 1 or more, and --html or --show"
        )


def files_if_any(path: str) -> list[str]:
    """List the data files that a path stands for, the path alone where there is none.

    That is an error of the data, and shows after those of the model.
    """
    try:
        return files_of([path])
    except ValueError:
        return [path]


def score_program(argv: list[str]):
    parser = score_flags()
    args = parser.parse_args(argv)
    check_score_flags(parser, args)
    model, tokenizer = load_to_score(args.checkpoint, default_device())
    unread = unread_weights(args.checkpoint)
    if unread:
        print(one_line(f"{args.checkpoint}: {unread}"), file=sys.stderr)
    config = vars(model.backbone.config)
    longest, limit = longest_row(config)
    max_seq_len, side = truncation_of(config)
    if args.max_seq_len is not None:
        max_seq_len = args.max_seq_len
    side = args.truncation_side or side
    if not 2 <= max_seq_len <= longest:
        parser.error(
            f"argument --max_seq_len: found {max_seq_len}; expected 2 to {longest}, because the "
            f"model has {limit}"
        )
    rows = Rows(files_of([args.file]), row_reading(args), tokenizer)
    if args.html or args.show:
        how = args.rows or 100, max_seq_len, side
        shown = pairs_page.scored_rows(model, tokenizer, rows, *how)
        if args.html:
            pairs_page.write(args.html, shown, args.file, args.checkpoint, max_seq_len)
            print(f"{args.html}: a page of {counted(len(shown), 'row')}", file=sys.stderr)
        if args.show:
            wants_colors = sys.stdout.isatty() or os.environ.get("FORCE_COLOR")
            out = unfiltered(sys.stdout)
            pairs_page.show(shown, out, wants_colors and not os.environ.get("NO_COLOR"))
    counts, settings = Counts(), (args.batch_size, args.layout, max_seq_len, side)
    if args.out:
        with writing(args.out) as out:
            counts = write_scores(out, rows, model, tokenizer, *settings)
    elif not (args.html or args.show):
        counts = write_scores(sys.stdout, rows, model, tokenizer, *settings)
    for line in [*rows.notes(), *counts.summary(max_seq_len)]:
        print(one_line(line), file=sys.stderr)


class Rows:
    """The comparisons of files, and what a user should know of the rows that were read."""

    def __init__(self, files: list[str], reading: Reading, tokenizer):
        self.files, self.reading, self.tokenizer = files, reading, tokenizer
        self.labels = {}  # a Counter of notes for each file that was read from
        self.sizes = Counter()  # how many rows were read of each
        self.is_whole = False  # whether all rows were read

    def __iter__(self) -> Iterator[Comparison]:
        self.labels, self.sizes, self.is_whole = {}, Counter(), False
        for file in self.files:
            self.labels[file] = Counter()
            for comparison in load_comparisons(file, **asdict(self.reading), min_responses=1):
                self.labels[file].update(comparison.notes)
                self.labels[file].update(notes_on(comparison.prompt, self.tokenizer))
                self.sizes[file] += 1
                yield comparison
        self.is_whole = True

    def notes(self) -> list[str]:
        """List the lines that a user should read about the rows."""
        lines = []
        for file, labels in self.labels.items():
            lines += note_lines(file, labels, self.sizes[file])
        if self.is_whole:
            lines += unused_lines(self.reading, self.labels.values())
        return lines


@dataclass
class Counts:
    """Pairs and rows of a scored file; responses whose tokens equal earlier ones make no pair.

    Rows that are no ranking (RewardBench 2) are counted as rows, and not as pairs.
    """

    pairs: list[tuple] = field(default_factory=list)  # margin of scores, target, subset
    leads: list[tuple] = field(default_factory=list)  # of unranked rows: lead of the first, subset
    scores: list[float] = field(default_factory=list)  # of responses, repeated ones aside
    identical: int = 0  # pairs of two equal responses
    repeating: int = 0  # rankings in which a response stands twice
    truncated: int = 0  # rows

    def add(self, comparison: Comparison, sequences: list[list[int]], scores: list[float]):
        """Count the pairs of a comparison; of one that is no ranking, whether the first is best."""
        kept = first_of_each(sequences)
        self.scores += [scores[i] for i in kept]
        if not comparison.ranked:
            lead = scores[0] - max(scores[1:])
            if sequences[0] in sequences[1:]:
                lead = min(lead, 0.0)  # a tie, whatever the last digits are
            self.leads.append((lead, comparison.subset))
            return
        for i, j in itertools.combinations(kept, 2):
            self.pairs.append((scores[i] - scores[j], comparison.target, comparison.subset))
        if len(kept) < len(sequences) == 2:
            self.identical += 1
        elif len(kept) < len(sequences):
            self.repeating += 1

    def summary(self, max_seq_len: int) -> list[str]:
        """List the lines that a user should read, none where there is nothing to say."""
        parts, subsets = [], []
        if self.pairs:
            whole, *subsets = metrics.score_summary(self.pairs).splitlines()
            parts.append(whole)
        if self.leads:
            whole, *others = metrics.best_summary(self.leads).splitlines()
            parts.append(whole)
            subsets += others
        if self.identical:
            parts.append(f"{counted(self.identical, 'identical pair')} left out")
        if self.repeating:
            rankings = counted(self.repeating, "ranking")
            parts.append(f"{rankings} with a response twice, which counts once")
        if self.truncated:
            parts.append(f"{counted(self.truncated, 'row')} truncated to {max_seq_len} tokens")
        lines = ["; ".join(parts), *subsets, metrics.collapse(self.scores)]
        return list(filter(None, lines))


def write_scores(
    out, comparisons, model, tokenizer, batch_size, layout, max_seq_len, side="left"
) -> Counts:
    """Write a line of JSON for every comparison, with a score for every response as written.

    Raises ValueError that names the row with a score which is not finite; the rows before it are
    written.
    """
    counts, rows = Counts(), iter(comparisons)
    how = dict(tokenizer=tokenizer, max_seq_len=max_seq_len, truncation_side=side)
    to_sequences = partial(tokenize, **how)
    with tqdm(unit=" rows", file=sys.stderr) as bar:
        # Batches are of similar lengths within a window of the file.
        while window := list(itertools.islice(rows, 64 * batch_size)):
            groups = list(convert_rows(to_sequences, window))
            results = score(model, groups, batch_size, layout)
            for comparison, sequences, scores in zip(window, groups, results):
                if not all(map(math.isfinite, scores)):
                    # In a packed batch a NaN spoils other texts: alone, each has its own score.
                    scores = [score(model, [[text]], 1, layout)[0][0] for text in sequences]
                    check_scores(scores, comparison.where)
                counts.add(comparison, sequences, scores)
                cut = partial(tokenize, comparison, tokenizer, truncation_side=side)
                counts.truncated += is_truncated(sequences, cut, max_seq_len)
                row = {"scores": scores} if len(scores) > 1 else {"score": scores[0]}
                out.write(json.dumps(row) + "\n")
            bar.update(len(window))
    return counts


# --------------------------------------------------------------------------------------------------
# python rm.py convert CHECKPOINT DIRECTORY


def convert_program(argv: list[str]):
    parser = Parser(
        "rm.py convert",
        allow_abbrev=False,
        description="Write a trained reward model in another layout.",
    )
    flag = parser.add_argument
    trained = "a directory with a trained reward model, in either layout"
    flag("checkpoint", type=not_empty, help=trained)
    flag("directory", type=not_empty, help="where to write it: a new directory, or an empty one")
    layout = (
        "deepspeed-chat: for its step 3; hf: for transformers.AutoModelForSequenceClassification, "
        "needs `pip install -r requirements-hf.txt`, and `pip install transformers` to load it"
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
    print(f"{args.checkpoint}: {model.head_remark}")
    print(f"{directory}: {args.layout} layout, {note}")
    if args.layout == "hf":
        print(how_to_load(directory, tokenizer is not None))
    for line in differences(model, tokenizer):
        print(line)
    if model.reward_bias:
        print(
            "its rewards were normalized: other programs must add "
            f"{model.reward_bias:.6g} (reward_bias in config.json) to what they compute"
        )


def differences(model: RewardModel, tokenizer) -> list[str]:
    """List where a converted model scores otherwise in transformers than here."""
    config = model.backbone.config
    max_seq_len, side = truncation_of(vars(config))
    lines = []
    if side == "right":
        lines.append(
            f"texts over {max_seq_len} tokens: transformers truncates on the right before it adds "
            "eos, so its sequences end with eos; those of training and of rm.py do not"
        )
    eos = config.token_ids.get("eos_token_id") if tokenizer is None else tokenizer.eos_id
    if eos == model.pad_id or (isinstance(eos, list) and model.pad_id in eos):
        lines.append(
            f"pad is eos (id {model.pad_id}): transformers scores a text that ends with it one "
            "token earlier, at the last token that is no pad; training without --pad_id gives the "
            "pad an id of its own"
        )
    if tokenizer is None:
        return lines
    if config.model_type == "qwen2" and not isinstance(tokenizer, HuggingFaceTokenizer):
        lines.append(
            "copy the tokenizer's files as they are: what transformers' save_pretrained makes of "
            "them for qwen2 is a Qwen2Tokenizer, which makes other ids"
        )
    if tokenizer.gap():
        lines.append(tokenizer.gap())
    if tokenizer.has_own_template and not ends_as_in_training(tokenizer):
        lines.append(
            "conversations: the chat template does not end with eos, where the score is read; so "
            "apply_chat_template gives other scores than rm.py, see docs/use.md"
        )
    return lines


def ends_as_in_training(tokenizer) -> bool:
    """Tell whether the tokens of a rendered dialogue end as those that a model is trained on."""
    prompt = [{"role": "user", "content": "a"}]
    answer = [{"role": "assistant", "content": "b"}]
    try:
        (sequence,) = tokenize(Comparison(prompt, [answer]), tokenizer, NO_LIMIT)
        return tokenizer.encode(tokenizer.render(prompt + answer))[-1:] == sequence[-1:]
    except ValueError:  # a template that does not take these messages
        return True


def how_to_load(directory: Path, has_tokenizer: bool) -> str:
    """Write the lines of Python that load a model of the hf layout, and what they need."""
    names, path = ["AutoModelForSequenceClassification"], str(directory)
    lines = [f"    model = AutoModelForSequenceClassification.from_pretrained({path!r})"]
    if has_tokenizer:
        names.append("AutoTokenizer")
        lines.append(f"    tokenizer = AutoTokenizer.from_pretrained({path!r})")
    return "\n".join(
        [
            "to load it, `pip install -r requirements-hf.txt transformers`; then in Python:",
            f"    from transformers import {', '.join(names)}",
            *lines,
        ]
    )


def main():
    show_output()
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["convert"]:
            convert_program(arguments[1:])
        else:
            score_program(arguments)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = error
        if full_memory(error):
            message = memory_line(error, "give a smaller --batch_size or --max_seq_len")
        elif isinstance(error, RuntimeError):
            raise
        sys.exit(f"rm.py: error: {one_line(message)}")
    except KeyboardInterrupt:
        sys.exit("rm.py: interrupted; --out and --html are as they were")


if __name__ == "__main__":
    main()
