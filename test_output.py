"""Text from outside, as programs print it, acts on no terminal, and no error fills the screen.

Every entrance of such text is tried: rows, files, flags, models, tokenizers, checkpoints. How one
text is shown is tested in parts/test_guards.py, the streams in parts/test_files.py.
"""

import functools
import json
import sys
import unicodedata

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import train
from conftest import TINY, forked
from model import GPT, GPTConfig
from parts.test_tokenizers import byte_level, failing_tokenizer
from rm import RewardModel
from tools import score

# It sets the clipboard (OSC 52), turns the direction of writing, clears the line and the screen.
HOSTILE = "SEEN\x1b]52;c;aGk=\x07\u202e\u2066\x9b2J\x7f\rSPOOF\nSPOOF"
IN_A_NAME = HOSTILE.replace("/", "")
LONG = HOSTILE + "x" * 10**6 + HOSTILE
PAIR = {"prompt": "p ", "chosen": "a b", "rejected": "c"}


def said_by(tmp_path, program, *arguments):
    """Run train.py or rm.py to its end: the exit status, and what it printed, as it printed it."""
    before = functools.partial(become, program, [str(argument) for argument in arguments])
    (code,), (said,) = forked(tmp_path / "out", before=before)
    return code, said


def become(program, arguments):
    """Have a process that is going to run train.py run this program, with other arguments."""
    if program == "rm.py":
        train.main = score.main
        sys.argv = [program, *arguments]
    else:
        sys.argv += arguments


def check(said, of_text=False):
    """Check that nothing in what was printed acts on a terminal but line ends and bars.

    of_text: the lines of the text itself are shown.
    """
    assert "SEEN" in said, said[-3000:]
    # Bars move to the start of a line, and up.
    for line in said.replace("\r", "\n").replace("\x1b[A", "").split("\n"):
        for character in line:
            assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), line
    assert "\rSPOOF" not in said and (of_text or "\nSPOOF" not in said)
    assert "Traceback" not in said


def rows_file(tmp_path, *rows, name="rows.jsonl"):
    file = tmp_path / name
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(text))
    return file


def on_rows(*rows, name="rows.jsonl"):
    """Make the flags of a run on these rows."""

    def flags(tmp_path):
        return ["train.py", *TINY, "--data_path", rows_file(tmp_path, *rows, name=name)]

    return flags


def on_columns(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"])] * 2, names=[LONG, LONG])
    parquet.write_table(table, tmp_path / "rows.parquet")
    return ["train.py", "--data_path", tmp_path / "rows.parquet"]


def on_template(source):
    """Make the flags of a run on messages, with this chat template."""

    def flags(tmp_path):
        (tmp_path / "t.jinja").write_text(source)
        row = {"chosen": [{"role": "user", "content": LONG}], "rejected": "b"}
        file = rows_file(tmp_path, row)
        return ["train.py", "--data_path", file, "--chat_template", tmp_path / "t.jinja"]

    return flags


def model_in(directory, config=None, weights=None, safetensors=True):
    """Save a tiny model with a tokenizer; change keys of its config, or names of weights."""
    backend = byte_level()
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    tiny = GPTConfig("llama", vocab_size=400, n_positions=64, n_layer=1, n_head=2, n_embd=16)
    torch.manual_seed(0)
    RewardModel(GPT(tiny), 399).save_pretrained(directory, layout="hf")
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if weights is not None:
        weights = load_file(directory / "model.safetensors") | weights
        (directory / "model.safetensors").unlink()
        if safetensors:
            save_file(weights, directory / "model.safetensors")
        else:
            torch.save(weights, directory / "pytorch_model.bin")
    return directory


def on_model(**change):
    def flags(tmp_path):
        directory = model_in(tmp_path / "model", **change)
        return ["train.py", "--model_name_or_path", directory, "--max_seq_len", 64]

    return flags


def scored_model(**change):
    def flags(tmp_path):
        directory = model_in(tmp_path / "model", **change)
        return ["rm.py", directory, rows_file(tmp_path, PAIR)]

    return flags


def on_index(tmp_path):
    directory = model_in(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"w": f"{HOSTILE}.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["rm.py", directory, rows_file(tmp_path, PAIR)]


def on_header(tmp_path):
    """The library quotes a type of numbers that it does not know."""
    directory = model_in(tmp_path / "model")
    header = json.dumps({"w": {"dtype": LONG, "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (directory / "model.safetensors").write_bytes(content)
    return ["rm.py", directory, rows_file(tmp_path, PAIR)]


def on_tokenizer(change, config=None):
    def flags(tmp_path):
        directory = failing_tokenizer(tmp_path / "tokenizer", change)
        if config:
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
        file = rows_file(tmp_path, PAIR | {"chosen": HOSTILE})
        return ["train.py", "--data_path", file, "--tokenizer_path", directory]

    return flags


def on_checkpoint(tmp_path):
    (tmp_path / "out" / "checkpoints" / "step-3").mkdir(parents=True)
    for name, content in (("facts.json", {"version": LONG}), ("sha256.json", {LONG: 1})):
        (tmp_path / "out" / "checkpoints" / "step-3" / name).write_text(json.dumps(content))
    return ["train.py", *TINY, "--max_steps", 1, "--eval_iters", 1, "--resume"]


def converted(tmp_path):
    directory = tmp_path / IN_A_NAME
    directory.mkdir()
    (directory / "file").touch()
    return ["rm.py", "convert", tmp_path, directory, "--layout", "hf"]


MESSAGE = {"role": "user", "content": "u"}
ERRORS = {  # name: what makes the files in a directory, and returns the program and its arguments
    "fields": on_rows({LONG: 1}),
    "many fields": on_rows({f"{HOSTILE}{i}": i for i in range(10**5)}),
    "a key twice": on_rows(f"{{{json.dumps(LONG)}: 1, {json.dumps(LONG)}: 2}}"),
    "a role": on_rows({"chosen": [MESSAGE | {"role": LONG}], "rejected": "b"}),
    "a role that is an object": on_rows({"chosen": [MESSAGE | {"role": {LONG: 1}}]}),
    "a file's name": on_rows({"no": 1}, name=f"{IN_A_NAME}.jsonl"),
    "no such file": lambda tmp_path: ["train.py", "--data_path", tmp_path / IN_A_NAME],
    "columns": on_columns,
    "a template's words": on_template("{{ raise_exception(messages[0].content) }}"),
    "a template's syntax": on_template("{% " + "SEEN" * 10**5 + " %}"),
    "a template's file": lambda tmp_path: ["train.py", "--chat_template", IN_A_NAME],
    "a key of config.json": on_model(config={"hidden_act": LONG}),
    "a model's type": on_model(config={"model_type": LONG}),
    "rope": on_model(config={"rope_scaling": {"rope_type": LONG, "factor": 2}}),
    "a weight's name": on_model(weights={HOSTILE: torch.ones(1)}),
    "a weight's name in a pickle": scored_model(weights={LONG: torch.ones(1)}, safetensors=False),
    "the name of a weight of NaN": on_model(weights={HOSTILE: torch.tensor([torch.nan])}),
    "an index": on_index,
    "a header": on_header,
    "a text that cannot be encoded": on_tokenizer({"model": {"unk_token": "none"}}),
    "an unk token": on_tokenizer({"model": {"type": "BPE", "merges": [], "unk_token": LONG}}),
    "a special token": on_tokenizer({}, {"pad_token": [LONG]}),
    "an added token": on_tokenizer({}, {"added_tokens_decoder": {"77": {"content": HOSTILE}}}),
    "an id": on_tokenizer({}, {"added_tokens_decoder": {HOSTILE: {"content": "a"}}}),
    "an unknown flag": lambda tmp_path: ["train.py", f"--{IN_A_NAME}"],
    "a flag's value": lambda tmp_path: ["train.py", f"--seed={IN_A_NAME}"],
    "a long flag": lambda tmp_path: ["train.py", f"--{IN_A_NAME}{'x' * 10**5}"],
    "a choice": lambda tmp_path: ["train.py", f"--loss={IN_A_NAME}"],
    "fields of the command line": lambda tmp_path: ["train.py", f"--fields={IN_A_NAME}=a"],
    "a flag of rm.py": lambda tmp_path: ["rm.py", "a", "b", f"--{IN_A_NAME}"],
    "a checkpoint's path": lambda tmp_path: ["rm.py", tmp_path / IN_A_NAME, "b"],
    "--out": lambda tmp_path: ["rm.py", "a", "b", "--out", tmp_path / IN_A_NAME / "c"],
    "a directory to convert to": converted,
}


@pytest.mark.parametrize("files", ERRORS.values(), ids=ERRORS)
def test_an_error_is_one_line_that_acts_on_no_terminal(files, tmp_path):
    program, *arguments = files(tmp_path)
    code, said = said_by(tmp_path, program, *arguments)
    check(said)
    assert code in (1, 2)
    last = said.rstrip("\n").splitlines()[-1]
    assert last.startswith(program) and " error: " in last[:30] and len(last) < 4000, said[-5000:]


def test_lines_of_a_run_and_of_its_scores_act_on_no_terminal(tmp_path):
    """Names of files and fields, subsets, rows that are skipped, a damaged checkpoint."""
    row = PAIR | {"subset": HOSTILE, LONG: 1, "chosen": [MESSAGE | {"role": "assistant", LONG: 1}]}
    rows = [row | {"chosen": HOSTILE, "subset": f"{LONG}{i % 2}"} for i in range(8)]
    file = rows_file(tmp_path, row, *rows, name=f"{IN_A_NAME}.jsonl")
    with_bad_row = rows_file(tmp_path, *rows, {LONG: LONG}, name=f"{IN_A_NAME}2.jsonl")
    flags = [*TINY, "--data_path", file, with_bad_row, "--eval_path", file, "--skip_bad_rows"]
    flags += ["--ignore_fields", IN_A_NAME, "--num_train_epochs", 2, "--save_interval", 1]
    code, said = said_by(tmp_path, "train.py", *flags)
    check(said)
    assert code == 0 and max(map(len, said.split("\n"))) < 4000
    assert said.count("SEEN") > 12
    checkpoint = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1]
    (checkpoint / "sha256.json").write_text(json.dumps({LONG: LONG}))
    code, said = said_by(tmp_path, "train.py", *flags, "--resume")
    check(said)
    assert code == 0 and "skipped, as it is damaged: SEEN" in said
    code, said = said_by(tmp_path, "rm.py", tmp_path / "out", file)
    check(said)
    assert code == 0 and said.count("SEEN") > 3 and said.count('{"scores": [') == 9
    code, said = said_by(tmp_path, "rm.py", tmp_path / "out", file, "--show")
    check(said, of_text=True)
    assert code == 0 and "\u241b]52;c;aGk=\u2407" in said
