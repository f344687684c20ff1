"""Compare the scores of exported models in transformers with those of `python rm.py`.

    python -m tools.compare_scores        for the transformers that is installed

It prints the worst difference of each call that people make, for each family. The models are tiny
and random, so that every token counts. What an export contains is in parts/huggingface.py and
parts/tokenizers.py.
"""

import io
import json
import math
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import sentencepiece
import tokenizers
import torch
import transformers

import data
from model import GPT, GPTConfig
from parts.huggingface import DEEPSPEED_CHAT
from parts.tokenizers import HuggingFaceTokenizer
from rm import RewardModel
from tools import score

MAX_SEQ_LEN = 120
PROMPTS = [
    "What is the capital of France?",
    "Name a colour, please. <s>Now!</s>",
    "Hi",
    "Is 2 + 2 = 5?\n\nThink  twice.",
]
ANSWERS = [
    " Paris.",
    " It is red, or blue; I like green best.",
    " No",
    " é \u65e5\u672c <pad> ok\n",
]
LONG = " One more word, and one more." * 20
# A family, and the kind of its tokenizer.
KINDS = [
    ("gpt2", "sentencepiece"),
    ("gpt2", "bytes"),
    ("opt", "sentencepiece"),
    ("llama", "sentencepiece"),
    ("llama", "bytes"),
    ("llama", "unigram"),
    ("qwen2", "sentencepiece"),
    ("qwen2", "bytes"),
    ("gpt_neox", "sentencepiece"),
]


def make_tokenizer(kind: str) -> data.Tokenizer:
    """Train a tokenizer: ours, a unigram model that normalizes, or a byte-level one as GPT-2's.

    Sequences of the last have no bos.
    """
    texts = [prompt + answer for prompt in PROMPTS for answer in ANSWERS]
    if kind == "sentencepiece":
        return data.train_tokenizer(texts, 320)
    if kind == "unigram":
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=320,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
        )
        return data.Tokenizer(model.getvalue())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(backend, {"eos_token": "<|endoftext|>"})


def write_models(directory: Path, model_type: str, kind: str):
    """Write a random model into directory/ours and, by `rm.py convert`, into directory/hf."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(kind)
    config = GPTConfig(
        model_type,
        vocab_size=tokenizer.vocab_size,
        n_positions=128,
        n_layer=2,
        n_head=2,
        n_embd=16,
        token_ids={"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id},
        other_keys={"max_seq_len": MAX_SEQ_LEN, "truncation_side": "left"},
    )
    model = RewardModel(GPT(config), tokenizer.pad_id)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory / "ours", tokenizer=tokenizer)
    with redirect_stdout(io.StringIO()):
        score.convert_program([str(directory / "ours"), str(directory / "hf"), "--layout", "hf"])


def scores_here(directory: Path, rows: list[dict]) -> torch.Tensor:
    """Return the scores that `python rm.py` gives to rows of one response."""
    file, out = directory / "rows.jsonl", directory / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score.score_program([str(directory / "ours"), str(file), "--out", str(out)])
    return torch.tensor([json.loads(line)["score"] for line in out.read_text().splitlines()])


@torch.no_grad()
def differences(directory: Path, model_type: str) -> dict[str, float]:
    """Return the worst difference to `python rm.py` of each call, for a model of `write_models`."""
    pairs = [(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
    texts = [prompt + answer for prompt, answer in pairs]
    rows = [{"prompt": prompt, "response": answer} for prompt, answer in pairs]
    long_rows = [{"prompt": prompt + LONG, "response": answer} for prompt, answer in pairs]
    chats = []
    for prompt, answer in pairs:
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant"}
        chats.append([user, assistant | {"content": answer}])
    chat_rows = [{"prompt": chat[:1], "response": chat[1:]} for chat in chats]
    expected = scores_here(directory, rows)
    expected_long = scores_here(directory, long_rows)
    expected_chat = scores_here(directory, chat_rows)

    hf = directory / "hf"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(hf).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)

    def scored(*arguments, batch: int = 1, texts=texts, **how) -> torch.Tensor:
        logits = []
        for start in range(0, len(texts), batch):
            inputs = tokenizer(texts[start : start + batch], return_tensors="pt", **how)
            logits.append(model(**inputs).logits[:, 0])
        return torch.cat(logits)

    found = {}
    found["a text"] = scored() - expected
    found["batches of 8"] = scored(batch=8, padding=True) - expected
    long_texts = [row["prompt"] + row["response"] for row in long_rows]
    found["truncation"] = scored(texts=long_texts, truncation=True) - expected_long
    pipeline = transformers.pipeline("text-classification", model=str(hf), device="cpu")
    found["pipeline"] = torch.tensor([row["score"] for row in pipeline(texts)]) - expected
    from_ids, rendered = [], []
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        from_ids.append(model(torch.tensor([ids])).logits[0, 0])
        rendered.append(tokenizer.apply_chat_template(chat, tokenize=False))
    found["chat template, ids"] = torch.stack(from_ids) - expected_chat
    how = dict(texts=rendered, add_special_tokens=False)
    found["chat template, text"] = scored(**how) - expected_chat
    tokenizer.padding_side = "left"
    if model_type == "gpt2":  # its positions count padding, in forward_value, too
        ours = RewardModel.from_pretrained(directory / "ours").eval()
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        expected_left = ours.forward_value(**inputs)["chosen_end_scores"]
        found["left padding, beside forward_value"] = model(**inputs).logits[:, 0] - expected_left
    else:
        found["left padding"] = scored(batch=8, padding=True) - expected
    found["DeepSpeed-Chat's loader"] = scores_in_step_3(directory / "ours", texts) - expected
    return {name: difference.abs().max().item() for name, difference in found.items()}


@torch.no_grad()
def scores_in_step_3(directory: Path, texts: list[str]) -> torch.Tensor:
    """Score texts with a model that is loaded as DeepSpeed-Chat's step 3 loads one, in train mode.

    It makes the backbone of config.json, resizes its embedding for the tokenizer, and then loads
    pytorch_model.bin. Its critic stays in train mode, so dropouts of config.json count.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    config = transformers.AutoConfig.from_pretrained(directory)
    backbone = transformers.AutoModel.from_config(config).train()
    backbone.resize_token_embeddings(8 * math.ceil(len(tokenizer) / 8))
    weights = torch.load(directory / "pytorch_model.bin", weights_only=True)
    head = weights.pop("v_head.weight")
    backbone.load_state_dict({n.removeprefix(DEEPSPEED_CHAT): w for n, w in weights.items()})
    scores = []
    for text in texts:
        hidden = backbone(**tokenizer(text, return_tensors="pt")).last_hidden_state
        scores.append((hidden[0, -1] @ head[0]).item())
    return torch.tensor(scores)


def main():
    transformers.utils.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, worst differences to python rm.py")
    for model_type, kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            write_models(Path(name), model_type, kind)
            found = differences(Path(name), model_type)
        for call, worst in found.items():
            print(f"{model_type:9} {kind:14} {call:35} {worst:.1e}")


if __name__ == "__main__":
    main()
