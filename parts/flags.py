"""The flags of train.py: names, ranges, defaults, help; and handing over to a program in tools/.

Nothing here reads a file: train.py and the programs in tools/ do that.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from parts.agreement import ANY
from parts.guards import one_line
from parts.rows import Reading, reading_of

REPOSITORY = Path(__file__).resolve().parent.parent

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)
DTYPES = ("fp32", "bf16", "fp16")
# Defaults on the built-in data; with step 0 and the last step these are ten evaluations.
BUILT_IN = {"per_device_train_batch_size": 32, "max_steps": 2000, "eval_interval": 225}
# Flags that the weights of a run follow from; train.py knows what else they follow from.
RESULT_FLAGS = (
    "seed",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "num_warmup_steps",
    "truncation_side",
    "max_seq_len",
    "dropout",
    "dtype",
    "loss",
    "center_rewards_coefficient",
    "lora_dim",
    "lora_module_name",
    "only_optimize_lora",
    "lora_learning_rate",
)
LEARNED_POSITIONS = ("gpt2", "opt")  # families without rotary ones
# Flags that may differ between the ranks of a run: places on a machine, and what a rank does alone.
PATHS = (
    "data_path",
    "eval_path",
    "tokenizer_path",
    "chat_template",
    "data_output_path",
    "model_name_or_path",
    "output_dir",
    "tensorboard_path",
)
OWN_FLAGS = ("gradient_checkpointing", "process_timeout")
SCRATCH = {"model_type": "llama", "n_layer": 2, "n_head": 4, "n_embd": 128, "vocab_size": 8000}


def number(
    kind: type, low: float, high: float | None = None, above: bool = False
) -> Callable[[str], float]:
    """Make an argparse type: an int or float from `low`, or above it, to `high`.

    high: None takes the largest number of its kind.
    """
    largest = {int: 2**31 - 1, float: sys.float_info.max}[kind]
    limit = largest if high is None else high
    expected = {int: "a whole number", float: "a number"}[kind]
    expected += f" above {low}" if above else f" from {low}"
    if high or kind is int:
        expected += f" to {limit}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= limit or (above and value == low):
            raise argparse.ArgumentTypeError(f"found {text!r}; expected {expected}")
        return value

    return parse


def shares(text: str) -> list[float]:
    """Parse --data_split, an argparse type: three numbers, the stages' shares, of any sum."""
    parse = number(float, 0)
    try:
        values = [parse(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        values = []
    if len(values) != 3 or values[1] == 0:
        raise argparse.ArgumentTypeError(
            f"found {text!r}; expected three numbers from 0, like 2,4,4; "
            "the second, our share, above 0"
        )
    return values


def field(text: str) -> tuple[str, str]:
    """Parse OURS=THEIRS of --fields, an argparse type."""
    ours, is_pair, theirs = text.partition("=")
    if not (ours and is_pair and theirs):
        raise argparse.ArgumentTypeError(
            f"found {text!r}; expected OURS=THEIRS, like prompt=question"
        )
    return ours, theirs


def not_empty(text: str) -> str:
    """Parse a name or a path, an argparse type: an empty one is a shell's variable without value.

    It would stand for the current directory, or for no flag at all.
    """
    if not text:
        raise argparse.ArgumentTypeError("found ''; expected a name or a path, or no such flag")
    return text


def stage(text: str) -> int:
    """Parse --zero_stage, an argparse type."""
    if text not in ("0", "2", "3"):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected 0, 2 or 3")
    return int(text)


size = number(int, 1, 2**16)
count = number(int, 1)
count_from_0 = number(int, 0)
positive = number(float, 0, above=True)
not_negative = number(float, 0)


class Last(argparse.Action):
    """Store the values of a flag; where it is given again, say which earlier ones are not read."""

    def __call__(self, parser, namespace, values, option_string=None):
        earlier = getattr(namespace, self.dest)
        if earlier is not None and os.environ.get("RANK", "0") == "0":
            unread = one_line(" ".join(map(str, earlier)))
            print(f"{option_string}: found again, so {unread} is not read", file=sys.stderr)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser whose errors show the words of a command line on one line, and cut (`one_line`)."""

    def error(self, message: str):
        super().error(one_line(message))


def parse_flags(families: Iterable[str], losses: Iterable[str]) -> argparse.Namespace:
    """Parse the command line of train.py; a mistake ends the program and names the flag.

    families: names for --model_type. losses: names for --loss.
    """
    parser = Parser(description="Train a reward model on pairs of responses.", allow_abbrev=False)
    add_data_flags(flags_of(parser, "data"))
    add_model_flags(flags_of(parser, "model"), tuple(families))
    add_training_flags(flags_of(parser, "training"), tuple(losses))
    add_machine_flags(flags_of(parser, "machine"))
    add_output_flags(flags_of(parser, "output"))
    args = parser.parse_args()
    fill_in_model(args, parser)
    check_flags(args, parser)
    fill_in_training(args)
    return args


def flags_of(parser: argparse.ArgumentParser, title: str) -> Callable:
    """Make a function that adds a flag to a group of the help: name, kind, default, help.

    kind: bool for a switch, names to choose from, or an argparse type; [kind] for one or more
    values, [kind, "extend"] where a flag that is given again adds to them, [kind, Last] where it
    replaces them. metavar: how the help calls a value. Text may not be empty.
    """
    group = parser.add_argument_group(title)

    def flag(name: str, kind, default, help: str, metavar: str | None = None):
        options = {"default": default, "help": help}
        if kind is str:
            kind = not_empty
        if kind is bool:
            options["action"] = "store_true"
        elif isinstance(kind, tuple):
            options["choices"] = kind
        elif isinstance(kind, list):
            options |= {"type": kind[0], "nargs": "+", "metavar": metavar}
            options["action"] = kind[1] if len(kind) > 1 else "store"
        else:
            options |= {"type": kind, "metavar": metavar}
        group.add_argument(name, **options)

    return flag


def add_data_flags(flag: Callable):
    """Add the flags about data, tokens and where they are stored."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "reward-model"
    text = (
        "comparisons: .jsonl, .jsonl.gz, .json or .parquet files, directories of them, or quoted "
        "globs (default: built-in data)"
    )
    flag("--data_path", [not_empty, Last], None, text, "FILE")
    text = "shares of the three RLHF stages; B's rows are used, as in DeepSpeed-Chat (0,1,0: all)"
    flag("--data_split", shares, [0.0, 1.0, 0.0], text, "A,B,C")
    text = "comparisons to evaluate on (default: a part of --data_path)"
    flag("--eval_path", [not_empty, Last], None, text, "FILE")
    text = "the part: the last of the shuffled data (0.05)"
    flag("--eval_fraction", number(float, 0, 0.9, above=True), 0.05, text)
    add_row_flags(flag)
    text = "tokens; longer sequences are truncated (512)"
    flag("--max_seq_len", number(int, 2, 2**20), 512, text)
    flag("--truncation_side", ("left", "right"), "left", "right is DeepSpeed-Chat's (left)")
    text = "a tokenizer (default: the model's; from scratch, one trained on the data)"
    flag("--tokenizer_path", str, None, text, "PATH")
    text = "of chat messages: auto (the tokenizer's own, else plain), plain, or a jinja file (auto)"
    flag("--chat_template", str, "auto", text)
    text = "padding's id (default: the tokenizer's own, or a new one)"
    flag("--pad_id", number(int, 0, 2**24), None, text)
    text = "leading pad ids that belong to a text (default: 1 where bos is pad, else 0)"
    flag("--num_padding_at_beginning", count_from_0, None, text)
    text = "skip and count rows that are no comparison (default: the first one is an error)"
    flag("--skip_bad_rows", bool, False, text)
    text = "cache of tokenized text, on a disk of each machine (~/.cache/reward-model)"
    flag("--data_output_path", str, str(cache), text, "DIR")


def add_row_flags(flag: Callable):
    """Add the flags about the fields of rows, those of train.py and of tools/score.py."""
    text = "read the field THEIRS in place of our field OURS, such as prompt=question"
    flag("--fields", [field, "extend"], None, text, "OURS=THEIRS")
    text = "fields to read rows without; other fields that nothing reads are named"
    flag("--ignore_fields", [not_empty, "extend"], None, text, "FIELD")
    text = (
        "rows of text are a text each (text), or chat messages of the user and the assistant, "
        "which go through the chat template (messages) (text)"
    )
    flag("--text_as", ("text", "messages"), "text", text)
    text = "the field with a row's subset, by which accuracy is reported (subset)"
    flag("--eval_by", str, None, text, "FIELD")


def row_reading(args: argparse.Namespace) -> Reading:
    """Return how rows are read. Raises ValueError that begins with the flag which is wrong."""
    fields = list(args.fields or ())
    if args.eval_by:
        fields.append(("subset", args.eval_by))
    return reading_of(fields, args.ignore_fields or (), args.text_as)


def add_model_flags(flag: Callable, families: tuple[str, ...]):
    """Add the flags about the model."""
    text = "a pre-trained model (default: from scratch, by the next five)"
    flag("--model_name_or_path", str, None, text, "DIR")
    flag("--model_type", families, None, "(llama)")
    flag("--n_layer", size, None, "(2)")
    flag("--n_head", size, None, "(4)")
    flag("--n_embd", size, None, "(128)")
    text = "at most; a small text supports fewer pieces (8000)"
    flag("--vocab_size", number(int, 300, 2**24), None, text)
    flag("--dropout", number(float, 0, 0.99), 0.0, "(0)")
    text = "rank of the LoRA beside linear layers; merged on saving (0: none)"
    flag("--lora_dim", number(int, 0, 2**16), 0, text)
    text = "part of the layers' names, as in DeepSpeed-Chat (default: all in the blocks)"
    flag("--lora_module_name", str, None, text, "PART")
    flag("--only_optimize_lora", bool, False, "train LoRA and the value head alone")
    flag("--lora_learning_rate", positive, 5e-4, "(5e-4)")


def add_training_flags(flag: Callable, losses: tuple[str, ...]):
    """Add the flags about batches, the objective, the optimizer and its steps."""
    flag("--per_device_train_batch_size", count, None, "comparisons (16; built-in data: 32)")
    text = (
        "comparisons of full length; sets how many tokens are computed at once, on a CPU at most "
        "4096 (16)"
    )
    flag("--per_device_eval_batch_size", count, 16, text)
    flag("--gradient_accumulation_steps", count, 1, "(1)")
    text = "where rewards are compared: from the divergence on, or at the ends alone (divergent)"
    flag("--loss", losses, "divergent", text)
    text = "weight of the squared sum of a pair's end scores (0)"
    flag("--center_rewards_coefficient", not_negative, 0.0, text)
    text = (
        "packed: no padding, a shared prompt once; padded: rows of pairs, the reference; without "
        "dropout the same numbers (packed)"
    )
    flag("--layout", ("packed", "padded"), "packed", text)
    text = (
        "tokens computed on at once, by each process; a step of more is cut into micro-batches, to "
        "the same result (2 x per_device_train_batch_size x max_seq_len)"
    )
    flag("--micro_batch_tokens", count, None, text)
    flag("--learning_rate", positive, None, "(5e-5; from scratch 1e-3)")
    flag("--weight_decay", not_negative, 0.0, "on matrices only (0)")
    flag("--max_grad_norm", positive, 1.0, "(1.0)")
    flag("--lr_scheduler_type", SCHEDULES, "cosine", "(cosine)")
    flag(
        "--num_warmup_steps", count_from_0, None, "optimizer steps (0; built-in data: a twentieth)"
    )
    flag("--num_train_epochs", count, 1, "(1)")
    flag("--max_steps", count, None, "optimizer steps, in place of epochs (built-in data: 2000)")
    text = "optimizer steps between evaluations; 0: only before and after (0; built-in data: 225)"
    flag("--eval_interval", count_from_0, None, text)
    flag("--eval_iters", count_from_0, 0, "batches per evaluation and process (0: all)")
    flag("--seed", number(int, 0, 2**32 - 1), 1234, "(1234)")


def add_machine_flags(flag: Callable):
    """Add the flags about the machine."""
    text = "of matrix products, by autocast; weights and the loss stay in fp32 (fp32)"
    flag("--dtype", DTYPES, "fp32", text)
    text = "compute the blocks twice instead of keeping what the backward pass needs"
    flag("--gradient_checkpointing", bool, False, text)
    text = "compile the blocks by torch.compile: faster on a GPU, after some minutes"
    flag("--compile", bool, False, text)
    text = (
        "0: each process has all weights; 2 and 3: FSDP2 shards them, 3 also between forward and "
        "backward (0)"
    )
    flag("--zero_stage", stage, 0, text, "{0,2,3}")
    text = "with --zero_stage 2 or 3: weights, gradients and optimizer states on the CPU"
    flag("--offload", bool, False, text)
    text = "seconds after which processes give up waiting for each other (1800)"
    flag("--process_timeout", number(float, 0, 1e6, above=True), 1800.0, text)
    text = "only say what memory and time these flags take, on as many processes as there are"
    flag("--dry_run", bool, False, text)
    flag("--flops", positive, None, "FLOP/s of a process, for --dry_run (default: measured)")


def add_output_flags(flag: Callable):
    """Add the flags about what a run writes."""
    flag("--output_dir", str, "out", "(out)")
    text = "after training: zero mean and unit variance of the end scores over the eval responses"
    flag("--normalize_rewards", bool, False, text)
    text = "write the numbers of metrics.jsonl for TensorBoard, too (pip install tensorboard)"
    flag("--enable_tensorboard", bool, False, text)
    text = "directory for it (step2_tensorboard)"
    flag("--tensorboard_path", str, "step2_tensorboard", text, "DIR")
    text = "optimizer steps between checkpoints (500; 0: only when stopped)"
    flag("--save_interval", count_from_0, 500, text)
    flag("--keep_checkpoints", count, 2, "number of checkpoints kept (2)")
    text = "continue from the newest whole checkpoint in --output_dir, or start where there is none"
    flag("--resume", bool, False, text)


def fill_in_model(args: argparse.Namespace, parser: argparse.ArgumentParser):
    """Give the flags of a model from scratch their defaults; refuse them beside a directory."""
    for name, default in SCRATCH.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.model_name_or_path:
            parser.error(
                f"argument --{name}: found beside --model_name_or_path, whose config.json decides "
                "this; give one of them"
            )


def check_flags(args: argparse.Namespace, parser: argparse.ArgumentParser):
    """End the program where flags do not fit together."""
    heads = f"{args.n_head} for --n_embd {args.n_embd}"
    if args.n_embd % args.n_head:
        parser.error(f"argument --n_head: found {heads}; expected a divisor")
    if args.model_type not in LEARNED_POSITIONS and args.n_embd // args.n_head % 2:
        parser.error(f"argument --n_head: found {heads}; rotary positions need heads of even width")
    check_row_flags(args, parser)
    output_dir = Path(args.output_dir).resolve()
    model_dir = args.model_name_or_path and Path(args.model_name_or_path).resolve()
    if output_dir == model_dir:
        parser.error(
            f"argument --output_dir: found {args.output_dir!r}; expected a directory, and not that "
            "of --model_name_or_path"
        )
    tokenizer = args.tokenizer_path and Path(args.tokenizer_path).resolve()
    if tokenizer and tokenizer.is_relative_to(output_dir):
        parser.error(
            f"argument --output_dir: found {args.output_dir!r}, which is or holds --tokenizer_path "
            f"{args.tokenizer_path!r}; files of an earlier run are moved away there, so give "
            "another directory"
        )
    if args.offload and not args.zero_stage:
        parser.error(
            "argument --offload: found with --zero_stage 0, which has nothing to offload; "
            "give --zero_stage 2 or 3"
        )
    if args.lora_module_name and not args.lora_dim:
        parser.error("argument --lora_module_name: found without --lora_dim; give its rank")
    if args.only_optimize_lora and not args.lora_dim:
        parser.error("argument --only_optimize_lora: found without --lora_dim; give its rank")
    if args.eval_path and not args.data_path:
        parser.error(
            "argument --eval_path: found without --data_path; the built-in data has its own eval "
            "set"
        )


def check_row_flags(args: argparse.Namespace, parser: argparse.ArgumentParser):
    """End the program where the flags about the fields of rows do not fit together."""
    try:
        reading = row_reading(args)
    except ValueError as error:
        parser.error(f"argument {error}")
    if reading != Reading() and not args.data_path:
        parser.error(
            "argument --fields, --ignore_fields, --text_as, --eval_by: found without --data_path; "
            "the built-in data has fields of its own"
        )


def fill_in_training(args: argparse.Namespace):
    """Give the flags their defaults that depend on other flags, or on torchrun."""
    is_built_in = not args.data_path
    if args.per_device_train_batch_size is None:
        args.per_device_train_batch_size = 16
        if is_built_in:
            args.per_device_train_batch_size = BUILT_IN["per_device_train_batch_size"]
    if args.max_steps is None and is_built_in:
        args.max_steps = BUILT_IN["max_steps"]
    if args.eval_interval is None:
        args.eval_interval = BUILT_IN["eval_interval"] if is_built_in else 0
    if args.num_warmup_steps is None:
        args.num_warmup_steps = args.max_steps // 20 if is_built_in else 0
    if args.micro_batch_tokens is None:
        args.micro_batch_tokens = 2 * args.per_device_train_batch_size * args.max_seq_len
    if args.learning_rate is None:
        args.learning_rate = 5e-5 if args.model_name_or_path else 1e-3
    if was_restarted():
        args.resume = True


def was_restarted() -> bool:
    """Tell whether torchrun has started this process again, after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def common_flags(args: argparse.Namespace) -> dict:
    """Return the flags that all ranks must have in common; of paths, whether they are given."""
    flags = {}
    for name, value in vars(args).items():
        if name in PATHS:
            value = value is not None
        if name == "resume" and was_restarted():
            value = ANY
        if name not in OWN_FLAGS:
            flags[name] = value
    return flags


def objective_of(args: argparse.Namespace) -> dict:
    """Return the arguments of `rm.RewardModel` that say what is minimized."""
    return {"loss": args.loss, "center_rewards_coefficient": args.center_rewards_coefficient}


# --------------------------------------------------------------------------------------------------
# Programs in tools/


def hand_over(program: str, arguments: list[str], command: str):
    """Replace this process by `python -m tools.PROGRAM ARGUMENTS`, in the same directory.

    A fresh process imports every module once, under one name. It finds ours first: -P and
    PYTHONPATH keep modules of the same names in the current directory out of the way.
    command: what the user asked for, the subject of the error message.
    Raises ValueError where tools/PROGRAM.py is missing.
    """
    if not (REPOSITORY / "tools" / f"{program}.py").exists():
        raise ValueError(
            f"{command} needs tools/{program}.py, which is missing; restore it in {REPOSITORY}"
        )
    paths = [str(REPOSITORY)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    command_line = [sys.executable, "-P", "-m", f"tools.{program}", *arguments]
    os.execve(sys.executable, command_line, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
