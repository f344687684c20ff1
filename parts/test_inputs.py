"""Pipes, sockets, devices and directories in place of files: every reader refuses them at once."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from parts.huggingface import read_checkpoint
from parts.inputs import is_file
from parts.tokenizers import has_tokenizer, load_tokenizer
from rm import RewardModel

TESTDATA = Path(__file__).parent.parent / "testdata"


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_loop(path):
    path.symlink_to(path)


NO_FILES = {  # what is there, how it comes about
    "a named pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "Too many levels of symbolic links": make_loop,
}


@pytest.mark.parametrize("found", NO_FILES)
def test_what_is_no_file_is_named(found, tmp_path):
    NO_FILES[found](tmp_path / "a")
    with pytest.raises(ValueError, match=f"^{tmp_path}/a: .*{found}; expected a file$"):
        is_file(tmp_path / "a")


def test_files_and_links_to_files_are_files(tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("missing")
    names = ("a", "b", "c", "d", "a/below")
    assert [is_file(tmp_path / name) for name in names] == [True, True, False, False, False]


# Files of a model, and of its tokenizer, that are opened where they are there.
MODEL_FILES = (
    *("config.json", "model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "config.json"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
    *("chat_template.jinja", "additional_chat_templates/a.jinja"),
)


@pytest.mark.parametrize("found", ["a named pipe", "a directory"])
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_pipe_among_the_files_of_a_model_is_not_waited_for(name, found, tmp_path):
    shutil.copy(TESTDATA / "gpt2" / "config.json", tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    NO_FILES[found](tmp_path / name)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{name}: is {found}"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("found", ["a named pipe", "a directory"])
@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_a_pipe_among_the_files_of_a_tokenizer_is_not_waited_for(name, found, tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    NO_FILES[found](tmp_path / name)
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}: is {found}"):
        load_tokenizer(tmp_path)


def test_a_pipe_in_place_of_a_tokenizer_is_not_waited_for_by_a_model(tmp_path):
    """The model asks the tokenizer for its pad id, where config.json has none."""
    shutil.copytree(TESTDATA / "gpt2", tmp_path / "model")
    assert not has_tokenizer(tmp_path / "model")
    os.mkfifo(tmp_path / "model" / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json: is a named pipe"):
        RewardModel.from_pretrained(tmp_path / "model")


def test_a_pipe_that_an_index_names_is_not_waited_for(tmp_path):
    shutil.copy(TESTDATA / "gpt2" / "config.json", tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"wte.weight": "a.bin"}}')
    os.mkfifo(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.bin: is a named pipe"):
        read_checkpoint(tmp_path)
