"""Comparisons token by token, as a page or in the terminal: rewards, and how the loss comes about.

Losses are those of rm.py; tools/score.py has the flags. Charts and the frame of a page are in
parts/report.py.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import pad_rows, shared_prefix, tokenize
from parts.chat import encode_prompt
from parts.guards import check_scores, counted, visible
from parts.metrics import accuracy, accuracy_in_words, collapse, decided
from parts.report import LEVELS, Series, chart, facts, safe, table, write_page
from parts.rows import convert_rows, files_of, read_rows
from rm import divergent_region, pair_terms

# LEVELS of the page's shades, as 256 terminal colours, under black text
ANSI = (208, 215, 222, 230, 255, 195, 159, 117, 75)

# --------------------------------------------------------------------------------------------------
# Rows, scored


@dataclass
class Pair:
    """Responses i and j of a row, i preferred, and their loss."""

    i: int
    j: int
    start: int  # the loss reads positions start to stop - 1
    stop: int
    loss: float
    margin: float  # end score of i minus end score of j

    @property
    def region(self) -> str:
        """The positions that the loss reads, in words."""
        if self.stop - self.start == 1:
            return f"position {self.start}"
        return f"positions {self.start} to {self.stop - 1}"


@dataclass
class Row:
    """A comparison of K responses, best first, or a single response, and its rewards."""

    sequences: list[list[int]]  # token ids
    texts: list[list[str]]  # (K, L): tokens, and padding up to the longest end, L
    rewards: torch.Tensor  # (K, L) float32 or wider, on the CPU
    prompt: int  # tokens in front of the responses
    cut: int  # tokens of the prompt that truncation took off, in front of them
    lost: list[int]  # tokens that truncation took off each response
    marks: frozenset[str]  # what stands for special tokens
    margin: float = 0.0  # by how much the data wants a pair to differ
    target: float = 1.0  # the probability, in the data, that the first of two is preferred
    ranked: bool = True  # False: the first is preferred to each of the others, and that is all

    @property
    def names(self) -> list[str]:
        if len(self.sequences) == 1:
            return ["response"]
        if len(self.sequences) == 2:
            return ["chosen", "rejected"]
        if not self.ranked:
            return ["chosen", *(f"rejected {i}" for i in range(1, len(self.sequences)))]
        return [f"rank {i + 1}" for i in range(len(self.sequences))]

    @property
    def ends(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    @property
    def scores(self) -> list[float]:
        return [self.rewards[i, end - 1].item() for i, end in enumerate(self.ends)]

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        pairs = []
        for i, j in itertools.combinations(range(len(self.sequences)), 2):
            if i > 0 and not self.ranked:
                continue
            start, stop = divergent_region(self.sequences[i], self.sequences[j])
            start = min(start, stop - 1)  # identical texts: the last token, as in rm.py
            region = self.rewards[i, start:stop], self.rewards[j, start:stop]
            loss = pair_terms(*region, self.margin, self.target).mean().item()
            pairs.append(Pair(i, j, start, stop, loss, self.scores[i] - self.scores[j]))
        return pairs

    @property
    def loss(self) -> float:
        """The mean loss of the pairs; NaN without a pair."""
        return mean([pair.loss for pair in self.pairs])

    def region(self, i: int) -> tuple[int, int]:
        """Return (start, stop) of the positions of response i that losses read.

        A response without a pair has no loss: from the prompt to its end.
        """
        pairs = [pair for pair in self.pairs if i in (pair.i, pair.j)]
        if not pairs:
            return self.prompt, self.ends[i]
        return min(pair.start for pair in pairs), max(pair.stop for pair in pairs)


@torch.no_grad()
def scored_rows(
    model, tokenizer, comparisons, count: int, max_seq_len: int, side: str = "left"
) -> list[Row]:
    """Score the first `count` comparisons, in the padded layout, the reference.

    A comparison may have one response.
    """
    rows, device = [], model.v_head.weight.device
    marks = frozenset(shown_names(tokenizer).values())
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def tokenized(comparison) -> tuple:
        """Return the comparison, its sequences, their texts, and token lists that begin alike.

        The token lists are the uncut sequences and the prompt.
        """
        begin_alike = tokenize(comparison, tokenizer, 2**31)
        if comparison.prompt or len(begin_alike) == 1:
            begin_alike.append(bos + encode_prompt(comparison.prompt, tokenizer))
        sequences = tokenize(comparison, tokenizer, max_seq_len, side)
        texts = [token_texts(tokenizer, sequence) for sequence in sequences]
        return comparison, sequences, texts, begin_alike

    converted = convert_rows(tokenized, itertools.islice(comparisons, count))
    for comparison, sequences, texts, begin_alike in tqdm(converted, unit=" rows", leave=False):
        input_ids, mask = pad_rows(sequences, model.pad_id)
        rewards = model.token_rewards(input_ids.to(device), mask.to(device)).cpu()
        length = len(input_ids[0])
        padding = ["⟨pad⟩"] + ["·"] * length  # by name once, as there may be hundreds
        for text in texts:
            text += padding[: length - len(text)]
        # The prompt reaches as far as all texts have its tokens; in whole dialogues, as far as
        # these are equal. Truncation takes tokens off its start.
        prompt = shared_prefix(begin_alike)
        lost = [len(a) - len(b) for a, b in zip(begin_alike, sequences)]
        cut = min(*lost, prompt - len(bos)) if side == "left" else 0
        # The last token, where the score is, is the response's.
        prompt = min(prompt - cut, *(len(sequence) - 1 for sequence in sequences))
        lost = [n - cut for n in lost]
        variants = comparison.margin, comparison.target, comparison.ranked
        row = Row(sequences, texts, rewards, prompt, cut, lost, marks, *variants)
        rows.append(row)
        check_scores(row.scores, comparison.where)
    return rows


def shown_names(tokenizer) -> dict[int, str]:
    """Return what stands on a page for special tokens, which have no text, by id."""
    names = {}
    for i, name in tokenizer.special_names().items():
        names[i] = f"⟨{visible(name.strip('<>'))}⟩"  # ⟨|im_start|⟩
    names[tokenizer.pad_id] = "⟨pad⟩"
    names[tokenizer.eos_id] = "⟨eos⟩"
    names[tokenizer.bos_id] = "⟨bos⟩"
    return names


def token_texts(tokenizer, sequence: list[int]) -> list[str]:
    """Split the text of a sequence into those of its tokens; special tokens get names.

    Tokens cannot be decoded one by one: a character may be several of them (bytes), and
    sentencepiece leaves out the space in front of the first. So the text of a token is what it adds
    to the tokens before it; the text of a token that completes no character is "".
    """
    names = shown_names(tokenizer)
    texts = [""] * len(sequence)
    before, start = 0, 0  # tokens from `start` on have no text yet, those from `before` on context
    for t, token in enumerate(sequence):
        if token in names:
            texts[t] = names[token]
            continue
        known = tokenizer.decode(sequence[before:start])
        text = tokenizer.decode(sequence[before : t + 1])
        is_last = all(later in names for later in sequence[t + 1 :])
        if len(text) > len(known) and (is_last or not text.endswith("\ufffd")):
            texts[t] = text[len(known) :]
            before, start = start, t + 1
    return texts


class Scale:
    """A scale from rewards to shades around their median: differences alone have a meaning."""

    def __init__(self, rows: list[Row]):
        shown = torch.cat([row.rewards[:, row.prompt :].flatten() for row in rows]).double()
        shown = shown[shown.isfinite()]
        self.middle, self.reach = 0.0, 1.0
        if len(shown):
            self.middle = shown.median().item()
            distances = (shown - self.middle).abs().sort().values
            # A few rewards may lie beyond it.
            self.reach = max(distances[int(0.98 * (len(shown) - 1))].item(), 1e-6)

    def level(self, reward: float) -> float:
        """Return a number from -1 (low) to 1 (high)."""
        if not math.isfinite(reward):
            return 0.0
        return min(max((reward - self.middle) / self.reach, -1.0), 1.0)


def probability(margin: float) -> float:
    """Compute the model's probability that the first response is preferred (Bradley & Terry)."""
    return torch.sigmoid(torch.tensor(margin, dtype=torch.float64)).item()


def asked(row: Row) -> str:
    """Say what the data asks of a pair besides its order: nothing, a margin, or a target."""
    if row.margin:
        return f" beyond a margin of {row.margin:g}"
    if row.target != 1:
        return f" at target {row.target:g}"
    return ""


def mean(values) -> float:
    return sum(values) / len(values) if values else math.nan


# --------------------------------------------------------------------------------------------------
# In the terminal


def paint(words: str, code, colors: bool) -> str:
    """Colour every line by itself: a background would fill the rest of the screen."""
    if not colors:
        return words
    lines = words.split("\n")
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in lines)


def show(rows: list[Row], out, colors: bool):
    """Write rows to the text file `out`, in 256 ANSI colours or plain.

    ◆ stands where responses diverge, ■ at an end.
    """
    scale = Scale(rows)
    for n, row in enumerate(rows, start=1):
        name, size = paint(f"row {n}", 1, colors), counted(row.prompt, "token")
        cut = f", {row.cut} more cut" if row.cut else ""
        prompt = "".join(map(visible, row.texts[0][: row.prompt]))
        out.write(f"{name}  prompt of {size}{cut}\n{paint(prompt, 2, colors)}\n")
        for i, name in enumerate(row.names):
            lost = f", {counted(row.lost[i], 'token')} cut" if row.lost[i] else ""
            out.write(f"{paint(name, 1, colors)}  score {row.scores[i]:.4f}{lost}\n")
            start, _ = row.region(i)
            for t in range(row.prompt, len(row.texts[i])):
                level = (scale.level(row.rewards[i, t].item()) + 1) / 2
                code = f"38;5;16;48;5;{ANSI[round(level * (len(ANSI) - 1))]}" if t >= start else 2
                if t == start and row.pairs:
                    out.write("◆")
                out.write(paint(visible(row.texts[i][t]), code, colors))
                if t == row.ends[i] - 1:
                    out.write("■")
            out.write("\n")
        for pair in row.pairs:
            if len(row.pairs) > 1:
                out.write(f"{row.names[pair.i]} over {row.names[pair.j]}: ")
            out.write(
                f"loss {pair.loss:.4f}{asked(row)}, the mean over {pair.region}; "
                f"margin {pair.margin:+.4f}, probability {probability(pair.margin):.4f}\n"
            )
        if len(row.pairs) > 1:
            out.write(f"mean of {counted(len(row.pairs), 'pair')}: loss {row.loss:.4f}\n")
        out.write("\n")
    if any(row.pairs for row in rows):
        out.write("◆ the responses diverge: the loss is over the rewards from there on\n")
    out.write("■ a response ends: its score is the reward at its last token\n")


# --------------------------------------------------------------------------------------------------
# The page


def spans(row: Row, i: int, scale: Scale, first: int, last: int, shade_from: int) -> str:
    """Write tokens first to last - 1 of response i, with shades from `shade_from` on."""
    out = ""
    for t in range(first, last):
        text, reward = row.texts[i][t], row.rewards[i, t].item()
        kind = f"s{round(scale.level(reward) * LEVELS)}" if t >= shade_from else "off"
        if text == "":
            kind += " empty"
        if text in row.marks:
            kind += " name"
        if t >= row.ends[i]:
            kind += " pad"
        title = f"position {t}, reward {reward:.4f}"
        out += f'<span class="{kind}" title="{title}">{safe(text)}</span>'
    return out


def row_html(n: int, row: Row, scale: Scale) -> str:
    prompt = "prompt" if len(row.names) == 1 else "shared prompt"
    prompt += f", {counted(row.prompt, 'token')}"
    if row.cut:
        prompt += f", and {row.cut} more that truncation cut off"
    total = f' data-loss="{row.loss!r}"' if row.pairs else ""
    is_open = " open" if row.prompt <= 150 else ""
    return (
        f'<section class="card" data-row="{n}"{total}>'
        f'<div class="head">{heading(n, row)}</div>'
        f'<details{is_open}><summary>{prompt}</summary><div class="text prompt" dir="auto">'
        f"{spans(row, 0, scale, 0, row.prompt, row.prompt)}</div></details>"
        + "".join(response_html(row, i, scale) for i in range(len(row.names)))
        + f'<div class="cols"><div>{traces(row)}</div><div>{explanation(row)}</div></div></section>'
    )


def heading(n: int, row: Row) -> str:
    items = [f"<h2>Row {n}</h2>"]
    if len(row.pairs) == 1:
        margin = row.pairs[0].margin
        items.append(f"loss <b>{row.loss:.4f}</b>{asked(row)}")
        items.append(f"margin <b>{margin:+.4f}</b>")
        items.append(f"P(chosen preferred) <b>{probability(margin):.3f}</b>")
        mark = "✓" if (margin > 0) == (row.target > 0.5) else "✗"
        if row.target == 0.5:
            items.append("neither response is preferred")
        elif margin > 0:
            items.append(f"{mark} the chosen response scores higher")
        elif margin < 0:
            items.append(f"{mark} the rejected response scores higher")
        else:
            items.append("a tie")
    elif row.pairs:
        right = sum(pair.margin > 0 for pair in row.pairs)
        items.append(f"mean loss <b>{row.loss:.4f}</b>")
        items.append(f"{right} of {counted(len(row.pairs), 'pair')} ranked right")
    return "".join(f"<span>{item}</span>" for item in items)


def response_html(row: Row, i: int, scale: Scale) -> str:
    start, stop = row.region(i)
    end, score = row.ends[i], row.scores[i]
    lost = f", {counted(row.lost[i], 'token')} of it cut off" if row.lost[i] else ""
    mark = ""
    if row.pairs:
        title = f"the responses diverge at position {start}"
        mark = f'<span class="mark" title="{title}">◆</span>'
    title = f"the response ends at position {end - 1}, where its score is read"
    return (
        f'<div class="small"><b class="k{i % 4}">{row.names[i]}</b> '
        f'<span class="soft">score {score:.4f}{lost}</span></div>'
        f'<div class="text" dir="auto" data-score="{score!r}">'
        f"{spans(row, i, scale, row.prompt, start, start)}{mark}"
        f"{spans(row, i, scale, max(start, row.prompt), end, start)}"
        f'<span class="mark" title="{title}">■</span>{spans(row, i, scale, end, stop, start)}</div>'
    )


def traces(row: Row) -> str:
    """Draw the rewards of the responses over the positions; over padding dotted."""
    series, vlines = [], []
    if row.pairs:
        words = "divergence" if len(row.pairs) == 1 else "first divergence"
        vlines.append((min(pair.start for pair in row.pairs), words))
    for i, (name, end) in enumerate(zip(row.names, row.ends)):
        color, (_, stop), rewards = i % 4, row.region(i), row.rewards[i].tolist()
        text, padding = range(row.prompt, end), range(end - 1, stop)
        style = ["", "dashed"][i % 2]
        series.append(Series(rewards[row.prompt : end], text, name, color=color, style=style))
        series.append(Series(rewards[end - 1 : stop], padding, color=color, style="dotted"))
        notes = [f"{name}: end score {rewards[end - 1]:.4f}"]
        series.append(Series([rewards[end - 1]], [end - 1], "", "point", color, notes=notes))
        if len(row.names) == 2:
            vlines.append((end - 1, f"end of {name}"))
    return chart(series, "Reward at every position", "position", vlines=vlines)


def explanation(row: Row) -> str:
    """Explain how the loss of a row comes about."""
    if not row.pairs:
        return (
            f"<p>The score is the reward at the last token, position {row.ends[0] - 1}: "
            f"<b>{row.scores[0]:.4f}</b>. A single response has no loss.</p>"
        )
    return explained_pair(row) if len(row.pairs) == 1 else explained_ranking(row)


def explained_ranking(row: Row) -> str:
    cells = []
    for p in row.pairs:
        cells.append(
            [
                f"{row.names[p.i]} &gt; {row.names[p.j]}",
                p.region.partition(" ")[2],
                f"{p.margin:+.4f}",
                f"{probability(p.margin):.4f}",
                f'<span data-pair-loss="{p.loss!r}">{p.loss:.4f}</span>',
            ]
        )
    kind = "a ranking" if row.ranked else "one chosen response beside several others"
    return (
        f"<p>The loss of {kind} is the mean over its {counted(len(row.pairs), 'pair')}: "
        f"<b>{row.loss:.4f}</b>. The loss of a pair is the mean of "
        "<code>−logsigmoid(r_better − r_worse)</code> over the positions from where the two "
        "responses diverge to where the longer one ends. P is the model's probability that the "
        "better response is preferred.</p>"
        + table(["pair", "positions", "margin", "P", "loss"], cells)
    )


def formula(row: Row) -> str:
    """Write the term of a pair, with the margin or the target that the data asks for."""
    difference = "r_chosen − r_rejected"
    if row.margin:
        return f"−logsigmoid({difference} − {row.margin:g})"
    if row.target != 1:
        rest = f"{1 - row.target:g} logsigmoid(−d)"
        return f"−({row.target:g} logsigmoid(d) + {rest}), d = {difference},"
    return f"−logsigmoid({difference})"


def explained_pair(row: Row) -> str:
    (p,), cells = row.pairs, []
    for t in range(p.start, p.stop):
        chosen, rejected = row.rewards[0, t : t + 1], row.rewards[1, t : t + 1]
        term = pair_terms(chosen, rejected, row.margin, row.target).item()
        cells.append(
            [
                str(t),
                *(safe(texts[t]).rstrip("\n\t") for texts in row.texts),
                f"{chosen.item():.4f}",
                f"{rejected.item():.4f}",
                f"{(chosen - rejected).item():+.4f}",
                f'<span data-term="{term!r}">{term:.4f}</span>',
            ]
        )
    rewards = ["r<sub>chosen</sub>", "r<sub>rejected</sub>"]
    terms = table(["position", "chosen", "rejected", *rewards, "difference", "term"], cells)
    note = ""
    if row.sequences[0] == row.sequences[1]:
        note = (
            " The responses are identical: the loss reads the last position, where both rewards "
            "are equal, and teaches nothing."
        )
    return (
        f'<p data-pair-loss="{p.loss!r}" data-start="{p.start}" data-stop="{p.stop}">'
        f"<b>The loss</b> reads {p.region}: from where the responses diverge to where the longer "
        f"one ends. It is the mean of <code>{formula(row)}</code> over "
        f"{counted(len(cells), 'position')}: <b>{p.loss:.4f}</b>.{note}</p>"
        f"<p><b>The scores</b> are the rewards at the last tokens: {row.scores[0]:.4f} and "
        f"{row.scores[1]:.4f}. Their difference, the margin, is {p.margin:+.4f}. So the model's "
        "probability that the chosen response is preferred is "
        f"sigmoid({p.margin:.4f}) = <b>{probability(p.margin):.4f}</b>.</p>"
        f"<details><summary>The terms, position by position</summary>{terms}</details>"
    )


LEGEND = (
    "<div>The shade of a token is its reward, from low to high around the median of this page. "
    "Only differences of rewards have a meaning. The losses are those of the default objective, "
    "whatever the model was trained with.</div>"
    '<div class="legend"><span>◆ the responses diverge</span>'
    "<span>■ a response ends: its score is read here</span>"
    '<span><span class="pad">dotted</span> padding, whose rewards the loss reads, too</span>'
    '<span><span class="off">grey</span> text that the loss does not read</span>'
    "<span>⋯ a token that does not complete a character</span></div>"
)


def figures(rows: list[Row]) -> dict[str, str]:
    """Compute the figures at the head of the page, as text by their names."""
    margins, targets = [], []
    for row in rows:
        margins += [pair.margin for pair in row.pairs]
        targets += [row.target] * len(row.pairs)
    if not margins:
        count, noun = counted(len(rows), "response").split()
        return {noun: count}
    margin, target = torch.tensor([margins, targets], dtype=torch.float64)
    preferred = decided(margin, target)
    count, noun = counted(len(margins), "pair").split()
    found = {noun: count}
    found["accuracy"] = accuracy_in_words(accuracy(margin, target), len(preferred))
    ties = int((preferred == 0).sum())
    if ties:
        count, noun = counted(ties, "tie").split()
        found[noun] = count
    unranked = [row for row in rows if not row.ranked]
    if unranked:
        best = sum(row.scores[0] > max(row.scores[1:]) for row in unranked)
        words = accuracy_in_words(best / len(unranked), len(unranked), "row")
        found["chosen scores highest"] = words
    found["mean margin"] = f"{mean(margins):+.4f}"
    found["mean loss"] = f"{mean([row.loss for row in rows if row.pairs]):.4f}"
    return found


def write(path, rows: list[Row], file, checkpoint, max_seq_len: int):
    """Write the page of the first rows of a file, at least one, as `scored_rows` gives them."""
    scale, total = Scale(rows), 0
    for each in files_of([file]):
        total += sum(1 for _ in read_rows(each))
    which = f"all {counted(total, 'row')}"
    if len(rows) < total:
        which = f"the first {len(rows):,} of {counted(total, 'row')} (<code>--rows</code>)"
    if total == 1:
        which = "the only row"
    warning = collapse([score for row in rows for score in row.scores])
    if warning:
        warning = f'<p class="card"><b>This model has {warning}.</b></p>'
    bar = "".join(f'<span class="s{level}"></span>' for level in range(-LEVELS, LEVELS + 1))
    ends = (scale.middle - scale.reach, scale.middle, scale.middle + scale.reach)
    ends = "".join(f"<span>{reward:.2f}</span>" for reward in ends)
    body = (
        "<h1>What the reward model sees</h1><p>A reward model reads a prompt and a response, and "
        "gives every token a number, the reward. The reward at the last token is the score of the "
        "response. The model learns from pairs of a chosen and a rejected response. The loss of a "
        "pair compares their rewards position by position, from where the two responses diverge "
        "to where the longer one ends: it is small where the chosen response has the higher "
        f"reward.</p>{facts(figures(rows))}{warning}"
        f'<p class="small soft">This page shows {which} of '
        f"<code>{safe(file)}</code>, scored by <code>{safe(checkpoint)}</code> with at most "
        f"{counted(max_seq_len, 'token')} a sequence. The figures above are of these rows.</p>"
        f'<div class="card small"><div class="bar">{bar}</div>'
        f'<div class="bar ends soft">{ends}</div>{LEGEND}</div>'
    )
    for n, row in enumerate(rows, start=1):
        body += row_html(n, row, scale)
    write_page(path, f"{Path(file).name}: comparisons", body)
