"""A program that trains a sentencepiece model: texts on standard input, the model on its output.

It imports nothing of ours. parts/tokenizers.py starts it as a process of its own, because
sentencepiece answers no interrupt until it is done, and a process can be ended.
"""

import ctypes
import io
import json
import signal
import sys

import sentencepiece

END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl (man 2 prctl)


def main():
    """Read {"vocab_size": int, "texts": [str, ...]} in JSON, and write the model's protobuf.

    Where sentencepiece refuses, its message goes to standard error, and the exit status is 1.
    """
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends this process
    order = json.load(sys.stdin.buffer)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(order["texts"]),
            model_writer=model,
            model_type="bpe",
            vocab_size=order["vocab_size"],
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 24,
            num_threads=1,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(model.getvalue())


if __name__ == "__main__":
    main()
