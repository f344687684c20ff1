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

from data import load_comparisons, pad_rows, shared_prefix, tokenize
from parts.guards import check_scores, visible
from parts.report import LEVELS, Series, chart, facts, safe, table, write_page
from parts.rows import read_rows
from rm import divergent_region, pair_loss

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


@dataclass
class Row:
    """A comparison of K responses, best first, or a single response, and its rewards."""

    sequences: list[list[int]]  # token ids
    texts: list[list[str]]  # (K, L): tokens, and padding up to the longest end, L
    rewards: torch.Tensor  # (K, L) float32 or wider, on the CPU
    prompt: int  # tokens in front of the responses
    cut: int  # tokens of the prompt that truncation took off, in front of them
    lost: list[int]  # tokens that truncation took off each response
    margin: float = 0.0  # by how much the data wants a pair to differ

    @property
    def names(self) -> list[str]:
        if len(self.sequences) == 1:
            return ["response"]
        if len(self.sequences) == 2:
            return ["chosen", "rejected"]
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
            start, stop = divergent_region(self.sequences[i], self.sequences[j])
            start = min(start, stop - 1)  # identical texts: the last token, as in rm.py
            region = self.rewards[i, start:stop], self.rewards[j, start:stop]
            loss = pair_loss(*region, margin=self.margin).item()
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
def scored_rows(model, tokenizer, path, count: int, max_seq_len: int) -> list[Row]:
    """Score the first `count` rows of a file, in the padded layout, the reference.

    Formats are those of `data.load_comparisons`; a row may have one response. Raises ValueError
    that names file and line.
    """
    rows, device = [], model.v_head.weight.device
    comparisons = itertools.islice(load_comparisons(path, min_responses=1), count)
    for comparison in tqdm(comparisons, unit=" rows", leave=False):
        sequences = tokenize(comparison, tokenizer, max_seq_len)
        input_ids, mask = pad_rows(sequences, model.pad_id)
        rewards = model.token_rewards(input_ids.to(device), mask.to(device)).cpu()
        length = len(input_ids[0])
        padding = ["⟨pad⟩"] + ["·"] * length  # by name once, as there may be hundreds
        texts = []
        for sequence in sequences:
            texts.append(token_texts(tokenizer, sequence) + padding[: length - len(sequence)])
        # The prompt reaches as far as all texts have its tokens; in whole dialogues, as far as
        # these are equal. Truncation takes tokens off its start.
        whole = tokenize(comparison, tokenizer, 2**31)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        begin_alike = list(whole)
        if comparison.prompt or len(whole) == 1:
            begin_alike.append(bos + tokenizer.encode(comparison.prompt))
        prompt = shared_prefix(begin_alike)
        lost = [len(a) - len(b) for a, b in zip(whole, sequences)]
        cut = min(*lost, prompt - len(bos))
        # The last token, where the score is, is the response's.
        prompt = min(prompt - cut, *(len(sequence) - 1 for sequence in sequences))
        lost = [n - cut for n in lost]
        row = Row(sequences, texts, rewards, prompt, cut, lost, comparison.margin)
        rows.append(row)
        check_scores(row.scores, f"{path}: row {len(rows)}")
    return rows


def token_texts(tokenizer, sequence: list[int]) -> list[str]:
    """Split the text of a sequence into those of its tokens; bos, eos and pad get names.

    Tokens cannot be decoded one by one: a character may be several of them (bytes), and
    sentencepiece leaves out the space in front of the first. So the text of a token is what it adds
    to the tokens before it; the text of a token that completes no character is "".
    """
    names = {tokenizer.pad_id: "⟨pad⟩", tokenizer.eos_id: "⟨eos⟩", tokenizer.bos_id: "⟨bos⟩"}
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


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def probability(margin: float) -> float:
    """Compute the model's probability that the first response is preferred (Bradley & Terry)."""
    return torch.sigmoid(torch.tensor(margin, dtype=torch.float64)).item()


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
                f"loss {pair.loss:.4f}, the mean over [{pair.start}, {pair.stop}), "
                f"{counted(pair.stop - pair.start, 'position')}; "
                f"margin {pair.margin:+.4f}, probability {probability(pair.margin):.4f}\n"
            )
        if len(row.pairs) > 1:
            out.write(f"mean of {len(row.pairs)} pairs: loss {row.loss:.4f}\n")
        out.write("\n")


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
        if text in ("⟨bos⟩", "⟨eos⟩", "⟨pad⟩"):
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
        items.append(f"loss <b>{row.loss:.4f}</b>")
        items.append(f"margin <b>{margin:+.4f}</b>")
        items.append(f"P(chosen preferred) <b>{probability(margin):.3f}</b>")
        if margin > 0:
            items.append("✓ ranked as people did")
        elif margin < 0:
            items.append("✗ ranked the other way round")
        else:
            items.append("a tie")
    elif row.pairs:
        right = sum(pair.margin > 0 for pair in row.pairs)
        items.append(f"mean loss <b>{row.loss:.4f}</b> of {len(row.pairs)} pairs")
        items.append(f"{right} ranked as people did")
    return "".join(f"<span>{item}</span>" for item in items)


def response_html(row: Row, i: int, scale: Scale) -> str:
    start, stop = row.region(i)
    end, score = row.ends[i], row.scores[i]
    lost = f", {counted(row.lost[i], 'token')} of it cut off" if row.lost[i] else ""
    mark = ""
    if row.pairs:
        title = f"the responses diverge here, at position {start}"
        mark = f'<span class="mark" title="{title}">◆</span>'
    title = f"the text ends: its score is read here, at position {end - 1}"
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
                f"[{p.start}, {p.stop})",
                f"{p.margin:+.4f}",
                f"{probability(p.margin):.4f}",
                f'<span data-pair-loss="{p.loss!r}">{p.loss:.4f}</span>',
            ]
        )
    return (
        f"<p>The loss of a ranking is the mean over its {len(row.pairs)} pairs: "
        f"<b>{row.loss:.4f}</b>. Each is the mean of <code>−logsigmoid(r_better − r_worse)</code> "
        "over the pair's region, from where the two diverge to the longer end.</p>"
        + table(["pair", "region", "margin", "P", "loss"], cells)
    )


def explained_pair(row: Row) -> str:
    (p,), cells = row.pairs, []
    for t in range(p.start, p.stop):
        chosen, rejected = row.rewards[0, t : t + 1], row.rewards[1, t : t + 1]
        term = pair_loss(chosen, rejected, margin=row.margin).item()  # of a region of one position
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
            " The texts are identical: the last position is read, the loss is log 2, "
            "and nothing is learned."
        )
    less = f" − {row.margin:g}" if row.margin else ""  # the margin that the data asks for
    return (
        f'<p data-pair-loss="{p.loss!r}" data-start="{p.start}" data-stop="{p.stop}">'
        f"<b>The loss</b> reads positions [{p.start}, {p.stop}), from the divergence to the longer "
        f"end: {counted(len(cells), 'position')}. It is the mean of "
        f"<code>−logsigmoid(r_chosen − r_rejected{less})</code> over them: "
        f"<b>{p.loss:.4f}</b>.{note}</p>"
        f"<p><b>The scores</b> are the rewards at the last tokens: {row.scores[0]:.4f} and "
        f"{row.scores[1]:.4f}. Their difference, the margin, is {p.margin:+.4f}, and the model's "
        "probability that the chosen one is preferred is "
        f"sigmoid({p.margin:.4f}) = <b>{probability(p.margin):.4f}</b>.</p>"
        f"<details><summary>The terms, position by position</summary>{terms}</details>"
    )


LEGEND = (
    "<div>The shade is the reward, from low to high around the median of this page; only "
    "differences have a meaning. Losses are those of the default objective, whatever the model was "
    "trained with.</div><div>◆ the responses diverge &nbsp; ■ a text ends, and its score is read "
    '&nbsp; <span class="pad">dotted</span> padding, where the loss reads rewards, too &nbsp; '
    '<span class="off">grey</span> before the divergence: no part of the loss &nbsp; ⋯ a token '
    "that does not complete a character</div>"
)


def write(path, rows: list[Row], file, checkpoint, max_seq_len: int):
    """Write the page of the first rows of a file, at least one, as `scored_rows` gives them."""
    scale, total = Scale(rows), sum(1 for _ in read_rows(file))
    margins = [pair.margin for row in rows for pair in row.pairs]
    numbers = {"responses": len(rows)}
    if margins:
        numbers = {
            "pairs": len(margins),
            "accuracy": f"{mean([margin > 0 for margin in margins]):.4f}",
            "mean margin": f"{mean(margins):+.4f}",
            "mean loss": f"{mean([row.loss for row in rows if row.pairs]):.4f}",
        }
    which = f"All {total:,} rows"
    if len(rows) < total:
        which = f"The first {len(rows):,} of {total:,} rows (<code>--rows</code>)"
    bar = "".join(f'<span class="s{level}"></span>' for level in range(-LEVELS, LEVELS + 1))
    ends = (scale.middle - scale.reach, scale.middle, scale.middle + scale.reach)
    ends = "".join(f"<span>{reward:.2f}</span>" for reward in ends)
    body = (
        "<h1>What the reward model sees</h1><p>A reward model is a transformer with one linear "
        "layer on top that gives every token a number, the reward; the one at a text's last token "
        "is the text's score. It learns from pairs of responses of which people chose one: the "
        "loss of a pair is the binary cross-entropy of “the chosen one is better”, with the "
        "difference of the two rewards as the logit, averaged over the positions from where the "
        "texts diverge to the longer end.</p>"
        f'{facts(numbers)}<p class="small soft">{which} of <code>{safe(file)}</code>, scored by '
        f"<code>{safe(checkpoint)}</code> at up to {max_seq_len} tokens. "
        "The figures above are of what is shown; nothing else was computed for this page.</p>"
        f'<div class="card small"><div class="bar">{bar}</div>'
        f'<div class="bar ends soft">{ends}</div>{LEGEND}</div>'
    )
    for n, row in enumerate(rows, start=1):
        body += row_html(n, row, scale)
    write_page(path, f"{Path(file).name}: comparisons", body)
