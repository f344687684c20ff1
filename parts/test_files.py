"""Files are replaced as a whole or not at all; a program goes on when nobody reads its output."""

import errno
import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from conftest import HERE, forked_ok, same_bits, words
from parts.files import LastingStream, VisibleStream, replacing, writing


def test_file_is_replaced_when_all_of_it_is_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with replacing(file) as part:
        part.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_begun", [False, True])
def test_file_is_as_it_was_after_an_error(error, is_begun, tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(error), replacing(file) as part:
        if is_begun:
            part.write_text("half")
        raise error
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [replacing, writing])
@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("links", [["file"], ["../there/file"], ["second", "file"], ["/file"]])
def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(links, is_there, write, tmp_path):
    directory = tmp_path / "there"
    directory.mkdir()
    file, names = directory / "file", ["link", *links]
    for name, target in zip(names, links):
        (directory / name).symlink_to(str(directory) + target if target[0] == "/" else target)
    (tmp_path / "folder").symlink_to("there")
    for path in (directory / "link", tmp_path / "folder" / "link"):
        file.unlink(missing_ok=True)
        if is_there:
            file.write_text("old")
        with pytest.raises(OSError), write(path) as out:
            write_into(out, "half")
            raise OSError
        assert file.exists() == is_there
        with write(path) as out:
            write_into(out, "new")
            assert file.exists() == is_there and (not is_there or file.read_text() == "old")
        assert file.read_text() == "new"
    left = {path.name: path.is_symlink() for path in directory.iterdir()}
    assert left == {"file": False, "link": True} | {
        name: True for name in links if name == "second"
    }


def write_into(out, text):
    """Write to a file of `writing`, or to a path of `replacing`."""
    if isinstance(out, Path):
        out.write_text(text)
    else:
        out.write(text)


@pytest.mark.parametrize("write", [replacing, writing])
def test_a_device_and_a_fifo_are_written_to_as_they_are(write, tmp_path):
    null = os.stat("/dev/null")
    (tmp_path / "null").symlink_to("/dev/null")
    for path in ("/dev/null", tmp_path / "null"):
        with write(path) as out:
            write_into(out, "nobody reads this")
    assert os.stat("/dev/null").st_rdev == null.st_rdev and not os.path.exists("/dev/null.part")
    with pytest.raises(OSError, match="No space left"), write("/dev/full") as out:
        write_into(out, "no room for this")
    assert Path("/dev/full").is_char_device()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with write(fifo) as out:
        write_into(out, "read this")
    assert os.read(reader, 100) == b"read this" and fifo.is_fifo()
    os.close(reader)
    assert {path.name for path in tmp_path.iterdir()} == {"null", "fifo"}


@pytest.mark.parametrize("write", [replacing, writing])
def test_a_directory_and_a_circle_of_links_are_refused(write, tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}: is a directory; expected a file$"):
        with write(tmp_path):
            pass
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="levels of symbolic links"), write(tmp_path / "a"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("kind", ["regular file", "pipe"])
def test_a_descriptor_of_this_process_is_written_to_where_it_is(kind, tmp_path):
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        writer = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        reader = os.open(tmp_path / "log", os.O_RDONLY)
    os.write(writer, b"before, ")
    link = tmp_path / "link"
    link.symlink_to(f"/proc/self/fd/{writer}")
    expected = b"before, "
    for path in (f"/dev/fd/{writer}", link, f"/proc/{os.getpid()}/fd/{writer}"):
        with writing(path) as out:
            out.write("é, ")
        expected += "é, ".encode()
    os.write(writer, b"after")
    assert os.read(reader, 100) == expected + b"after"
    assert link.is_symlink() and not list(tmp_path.glob("*.part"))
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError), writing(f"/dev/fd/{writer}") as out:
        out.write("it is closed")


# --------------------------------------------------------------------------------------------------
# Output


def test_stream_that_nobody_reads_discards_what_it_is_given():
    reader, writer = os.pipe()
    stream = LastingStream(os.fdopen(writer, "w"))
    print("read", file=stream, flush=True)
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)
    for _ in range(3):
        assert stream.write("nobody reads this\n") == 18
        stream.flush()
    assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == "/dev/null"
    assert stream.encoding and not stream.isatty()
    stream.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPIPE])
def test_stream_outlives_a_terminal_that_is_gone_and_a_full_disk(number, tmp_path):
    class Failing:
        def __init__(self):
            self.file = open(tmp_path / "log", "w")

        def write(self, text):
            raise OSError(number, os.strerror(number))

        flush = functools.partialmethod(write, "")

        def fileno(self):
            return self.file.fileno()

    stream = LastingStream(Failing())
    print("a line", file=stream, flush=True)
    assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == "/dev/null"


ACTS = "\x1b[2J\x1b]52;c;aGk=\x07\rb\u202e\x9b"
SHOWN = "␛[2J␛]52;c;aGk=␇␍b⟨U+202E⟩⟨U+009B⟩"


@pytest.mark.parametrize("is_error", [False, True])
def test_stream_shows_what_acts_on_a_terminal(is_error):
    stream = VisibleStream(io.StringIO(), is_error)
    print(f"a{ACTS}\n\nb{ACTS}", file=stream, flush=True)
    assert stream.write(f"é {ACTS}") == len(f"é {ACTS}")
    assert stream.getvalue() == f"a{SHOWN}\n\nb{SHOWN}\né {SHOWN}"
    assert not stream.isatty()


def test_lines_of_standard_error_alone_are_cut():
    out, error = VisibleStream(io.StringIO(), False), VisibleStream(io.StringIO(), True)
    text = f"start {'x' * 10**5} end\nshort\nstart {ACTS * 10**4} end\n"
    for stream in (out, error):
        stream.write(text)
    assert out.getvalue() == text.replace(ACTS, SHOWN)
    lines = error.getvalue().split("\n")
    assert [len(line) > 3800 for line in lines] == [True, False, True, False]
    for line in lines[::2][:2]:
        assert len(line) < 4000 and line.startswith("start ") and line.endswith(" end")


def test_bars_and_lines_beside_them_pass_as_they_are():
    """Two bars, one below the other, with a line written above them."""

    class Recorded(VisibleStream):
        given = ""

        def write(self, text):
            self.given += text
            return super().write(text)

    stream = io.StringIO()
    file = Recorded(stream, is_error=True)
    how = {"total": 3, "file": file, "mininterval": 0}
    with tqdm(desc="one", **how) as one, tqdm(desc="two", **how) as two:
        for bar in (one, two, one):
            bar.update()
        tqdm.write("a line", file=file)
    assert stream.getvalue() == file.given
    assert "\x1b[A" in file.given and "\r" in file.given and "a line\n" in file.given


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_locale_that_lacks_the_signs_ends_no_program(encoding, tmp_path):
    """Paths may also hold bytes that are no text, which no encoding has."""
    program = (
        "import sys; from parts.files import show_output; show_output();"
        "print('\\x1b \\u202e \\udcff é'); sys.exit('rm.py: \\x1b \\udcff')"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True)
    assert done.returncode == 1 and b"\x1b" not in done.stdout + done.stderr
    if encoding == "utf-8":
        assert done.stdout.decode() == "␛ ⟨U+202E⟩ ⟨U+DCFF⟩ é\n"
        assert done.stderr.decode() == "rm.py: ␛ ⟨U+DCFF⟩\n"
    else:
        assert done.stdout.startswith(b"\\u241b \\u27e8U+202E\\u27e9 ")


SHELL = {
    "head": "PYTHONUNBUFFERED=1 {train} | head -1",
    "both closed": "{train} >&- 2>&-",
    "full disk": "{train} > /dev/full 2>&1",
}


@pytest.fixture(scope="module")
def read_run(small, tmp_path_factory):
    """Train while somebody reads the output. The directory."""
    output_dir = tmp_path_factory.mktemp("read") / "out"
    forked_ok(output_dir, *small)
    return output_dir


@pytest.mark.parametrize("command", SHELL.values(), ids=SHELL)
def test_training_goes_on_to_its_end_when_nobody_reads_it(command, small, read_run, tmp_path):
    """The exit status is 0, and the model is that of a run whose output was read."""
    flags = words([*small, "--save_interval 4 --output_dir", tmp_path / "out"])
    train = f"{sys.executable} {HERE}/train.py {' '.join(flags)}"
    shell = f"set -o pipefail; {command.format(train=train)}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    same_bits(tmp_path / "out", read_run)
