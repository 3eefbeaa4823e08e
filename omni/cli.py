"""The `omni` command: its verbs and arguments, read without loading jax; what they do is in `omni.verbs`."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omni import verbs
from omni.exits import exits

if TYPE_CHECKING:  # --help and wrong arguments are answered without loading jax
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb and exits with a code of `omni.exits`. Errors are one line on stderr."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.INFO, format="omni: %(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax", "etils", "grain"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of whatever it then raises
    parser = make_parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not getattr(options, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    with exits():
        if getattr(options, "takes_overrides", False):
            options.run(options, overrides)
        else:
            options.run(options)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each verb sets `run`, and `takes_overrides` where configuration keys may follow."""
    parser = argparse.ArgumentParser(
        prog="omni", description="One model that reads and writes text, pictures and sound."
    )
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, run, summary: str, example: str, **options) -> argparse.ArgumentParser:
        made = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        made.set_defaults(run=run)
        return made

    quickstart = verb(
        "quickstart",
        verbs.run_quickstart,
        "Make a dataset, train tokenizers and an any-to-any model, measure it and write a report.",
        "omni quickstart --output runs/quickstart",
        add_help=False,
    )
    quickstart.set_defaults(takes_overrides=True)

    train = verb(
        "train",
        verbs.run_train,
        "Run an experiment file; its configuration keys may be overridden (--help after FILE lists them).",
        "omni train experiments/digits.py --seed 1",
        add_help=False,
        allow_abbrev=False,
    )
    _add_train_arguments(train)

    generate = verb(
        "generate",
        verbs.run_generate,
        "Answer a prompt. Arguments that name a picture, sound or video file are read as such, others are text.",
        'omni generate runs/quickstart "seven" --want image,audio --out out/',
    )
    generate.add_argument("model", help="a run, an exported directory, or a repository of the hub as owner/name")
    generate.add_argument(
        "parts", nargs="+", metavar="PART", help="text, or the path of a picture, sound or video file"
    )
    generate.add_argument(
        "--chat", action="store_true", help="ask as one message of a user, by the chat template if any"
    )
    generate.add_argument(
        "--want", help="modalities of the reply in order, comma-separated; default: the model decides"
    )
    generate.add_argument("--out", type=Path, help="directory for the reply's parts; of several, 1/, 2/, ... in it")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--samples", type=int, default=1, metavar="N", help="replies, with seeds from --seed on")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end at this text (may be given repeatedly)")
    generate.add_argument("--stop-tokens", metavar="ID,ID", help="end at any of these ids")
    generate.add_argument("--max-tokens", type=int, help="most tokens of the reply")
    for name in ("temperature", "top-k", "top-p", "min-p", "repetition-penalty", "guidance", "media-guidance"):
        generate.add_argument(f"--{name}", help="a number, or modality=number pairs: image=0.5,audio=0.7")
    generate.add_argument(
        "--tensor",
        type=int,
        metavar="N",
        help="split the model over N devices (default: one holds all)",
    )
    generate.add_argument("--stream", action="store_true", help="print text as it comes; with --json a line an event")
    _add_held(generate, "")
    generate.add_argument("--json", action="store_true", help="print the parts as JSON, one reply a line")
    generate.add_argument(
        "--log-probabilities",
        action="store_true",
        help="with --json: print the reply's ids, and of each the log-probability under what it was drawn from",
    )

    evaluate = verb(
        "eval",
        verbs.run_eval,
        "Measure every direction on held-out data; writes evaluation/results.json and report.html into RUN. "
        "With --data: measure any model on your own documents; writes results.json and report.html into RUN/documents.",
        "omni eval runs/quickstart\n  omni eval runs/own/model --data my/held_out --directions image:text,text:image",
    )
    _add_eval_arguments(evaluate)

    tokenize = verb(
        "tokenize",
        verbs.run_tokenize,
        "Write documents as token shards; configuration keys may be overridden (--help after FILE lists them).",
        "omni tokenize experiments/own/tokens.py --validate\n  omni tokenize experiments/own/tokens.py",
        add_help=False,
    )
    tokenize.add_argument("experiment", nargs="?", metavar="FILE")
    tokenize.add_argument("--validate", action="store_true", help="read every document and list the bad ones instead")
    tokenize.add_argument("--json", action="store_true", help="print what was written or found as JSON")
    tokenize.add_argument(
        "--distributed",
        action="store_true",
        help="share the work with the other processes of a TPU pod, Slurm job or Kubernetes job (OMNI_DISTRIBUTED=1); "
        "OMNI_PROCESSES and OMNI_PROCESS, or the keys processes and process, say it anywhere",
    )
    tokenize.set_defaults(takes_overrides=True, print_help=tokenize.print_help)

    compile_ = verb(
        "compile",
        verbs.run_compile,
        "Compile a training's step for accelerators that are not there, and say what it needs and how fast it can be; "
        "configuration keys may be overridden.",
        "omni compile experiments/pods/chameleon_7b.py --topology v5p:4x4x4\n"
        "  omni compile experiments/pods/chameleon_7b.py --topology v5p:2x2x1 --generate --mesh.fsdp 1 --mesh.tensor 4",
        add_help=False,
    )
    compile_.add_argument("experiment", nargs="?", metavar="FILE")
    compile_.add_argument(
        "--topology", metavar="NAME:SHAPE", help="TPUs of a slice, as v5p:4x4x4, or GPUs of a machine, as h100:8"
    )
    compile_.add_argument("--slices", type=int, default=1, metavar="N", help="slices or machines (default: 1)")
    compile_.add_argument(
        "--stage", type=int, default=1, metavar="N", help="stage of a run that has several (default: 1)"
    )
    compile_.add_argument(
        "--generate", action="store_true", help="compile the loop by which the trained model emits tokens instead"
    )
    compile_.add_argument("--requests", type=int, metavar="N", help="with --generate: answered together (default: 8)")
    compile_.add_argument(
        "--capacity", type=int, metavar="TOKENS", help="with --generate: of prompt and reply (default: those of a row)"
    )
    _add_held(compile_, "with --generate: ")
    compile_.add_argument("--json", action="store_true")
    compile_.set_defaults(takes_overrides=True, print_help=compile_.print_help)

    export = verb(
        "export",
        verbs.run_export,
        "Write a model, or a tokenizer alone, as one directory.",
        "omni export runs/quickstart exported/ --dtype float16\n  omni export ours theirs --format transformers",
    )
    export.add_argument("model", help="a run, an exported directory, or a tokenizer's directory")
    export.add_argument("directory", type=Path)
    export.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    export.add_argument(
        "--format",
        choices=("omni", "transformers"),
        default="omni",
        help="what is to load the directory (default: omni)",
    )

    imports = verb(
        "import",
        verbs.run_import,
        "Write the model of a public checkpoint, or the tokenizer, as a directory of this package.",
        "omni import Qwen3-0.6B models/qwen3\n  omni import encodec_24khz tokenizers/encodec\n"
        "  omni import vqgan.ckpt tokenizers/chameleon --image-size 512 --torch-reader",
    )
    imports.add_argument(
        "source",
        help="a directory that transformers wrote, or its repository (docs/checkpoints.md), or a file of weights",
    )
    imports.add_argument("directory", type=Path)
    imports.add_argument("--image-size", type=int, help="pixels a side that a file's net is meant for (default: 256)")
    imports.add_argument(
        "--torch-reader",
        action="store_true",
        help="read a file of PyTorch, which is a pickle, with torch's weights_only reader (tensors alone)",
    )
    whole = imports.add_argument_group("whole models")
    whole.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="type in which weights are stored (default: float32)",
    )
    whole.add_argument(
        "--mesh", metavar="AXIS=N,AXIS=N", help="devices that share the weights, as fsdp=4,tensor=2 (default: one)"
    )
    whole.add_argument(
        "--verify",
        action="store_true",
        help="first compare logits, ids of texts and codes of a picture with transformers' own, in float32; write "
        "nothing where they differ",
    )

    tokenizer = verb(
        "tokenizer",
        None,
        "Train, measure and use image, audio, video and text tokenizers.",
        "omni tokenizer encode DIR x.png",
    )
    _add_tokenizer_verbs(tokenizer)

    bench = verb("bench", None, "Time what is here beside what else there is.", "omni bench tokenizers --batch 1")
    _add_bench_verbs(bench)

    inspect = verb(
        "inspect",
        verbs.run_inspect,
        "Print a model's parameters, vocabulary, grammar, memory and a sample of its training data.",
        "omni inspect runs/quickstart\n  omni inspect runs/quickstart --verify\n"
        "  omni inspect runs/own/tokens --document 17",
    )
    inspect.add_argument("directory", metavar="DIR", help="a run or a model, or with --document one of token shards")
    instead = inspect.add_mutually_exclusive_group()
    instead.add_argument(
        "--verify", action="store_true", help="read a run's checkpoints instead, and name every damaged file"
    )
    instead.add_argument(
        "--document", type=int, metavar="N", help="print where document N of the shards comes from, and what it holds"
    )
    inspect.add_argument("--json", action="store_true")

    doctor = verb(
        "doctor", verbs.run_doctor, "Check the installation and the devices, and say what to install.", "omni doctor"
    )
    doctor.add_argument("--json", action="store_true")
    return parser


def _add_held(parser: argparse.ArgumentParser, when: str) -> None:
    for name, what in (("weights", "matrices are"), ("cache", "keys and values are")):
        parser.add_argument(
            f"--{name}-dtype",
            choices=("float32", "bfloat16", "int8"),
            help=f"{when}type in which {what} held (default: that in which they are computed with)",
        )


def _add_eval_arguments(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("run_directory", metavar="RUN", help="a run of the digits recipe; with --data any model")
    evaluate.add_argument(
        "--model", help="measure this model on the run's held-out data instead of the run's own; needs --output"
    )
    evaluate.add_argument("--output", type=Path, help="directory to write into instead")
    evaluate.add_argument(
        "--limit",
        type=int,
        help="targets per direction, for a quick look, written to RUN/quick; with --data: documents per direction that "
        "are answered (default: 100)",
    )
    evaluate.add_argument("--json", action="store_true", help="print the results as JSON")
    own = evaluate.add_argument_group("your own documents")
    own.add_argument("--data", metavar="PATH", help="a .jsonl file of documents, or a folder of some (docs/data.md)")
    own.add_argument(
        "--directions", help="context:target, comma-separated, as image:text,audio+text:image; default: all there are"
    )
    own.add_argument("--candidates", type=int, help="contexts among which the true one is to be found (default: 8)")
    own.add_argument("--seed", type=int, help="of wrong contexts and of replies (default: 0)")


def _add_train_arguments(train: argparse.ArgumentParser) -> None:
    train.add_argument("experiment", nargs="?", metavar="FILE")
    several = train.add_argument_group(
        "several processes as one run", "the same command in each of them; all may stand in the environment instead"
    )
    several.add_argument(
        "--distributed",
        action="store_true",
        help="find the others: on TPU pods, in Slurm jobs, on Kubernetes (OMNI_DISTRIBUTED=1)",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (OMNI_COORDINATOR)")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are (OMNI_PROCESSES)")
    several.add_argument("--process", type=int, metavar="I", help="number of this one, from 0 (OMNI_PROCESS)")
    train.set_defaults(takes_overrides=True, print_help=train.print_help)


def _add_verb(subparsers, group: str, name: str, run, summary: str, example: str, **options) -> argparse.ArgumentParser:
    """One verb of a group of verbs; `example` is what stands behind the group's name."""
    made = subparsers.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {group} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    made.set_defaults(run=run)
    return made


def _add_tokenizer_verbs(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    verb = functools.partial(_add_verb, subparsers, "omni tokenizer")
    example = "train experiments/tokenizers/digits_image.py --steps 100"
    summary = "run a tokenizer experiment, as omni train does"
    _add_train_arguments(verb("train", verbs.run_train, summary, example, add_help=False, allow_abbrev=False))
    example = "eval runs/quickstart/tokenizers/image out/1.png"
    evaluate = verb("eval", verbs.run_tokenizer_eval, "measure a tokenizer on files", example)
    evaluate.add_argument("directory")
    evaluate.add_argument("files", nargs="+")
    evaluate.add_argument("--fps", type=float, help="frames a second to take of videos; default: all")
    evaluate.add_argument("--lpips-weights", metavar="FILE", help="safetensors of LPIPS: measures LPIPS of pictures")
    evaluate.add_argument("--inception-weights", metavar="FILE", help="safetensors of Inception v3: measures rFID")
    example = "encode runs/quickstart/tokenizers/image out/1.png > codes.json"
    summary = "a text, or a picture, sound or video file, to codes (JSON on stdout)"
    encode = verb("encode", verbs.run_tokenizer_encode, summary, example)
    encode.add_argument("directory")
    encode.add_argument("part", help="a picture, sound or video file, or text")
    encode.add_argument("--fps", type=float, help="frames a second to take of a video; default: all")
    example = "decode runs/quickstart/tokenizers/image codes.json again.png"
    summary = "codes (a JSON file, or - for stdin) to a file"
    decode = verb("decode", verbs.run_tokenizer_decode, summary, example)
    decode.add_argument("directory")
    decode.add_argument("codes")
    decode.add_argument("output", help="the file to write")


def _add_bench_verbs(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    summary = "Time the public tokenizers here and in transformers, in turn, on the same weights; a table on stdout."
    example = "tokenizers --families encodec,mimi --batch 1,8 --seconds 2"
    bench = _add_verb(subparsers, "omni bench", "tokenizers", verbs.run_bench_tokenizers, summary, example)
    bench.add_argument("--families", help="which, comma-separated; default: encodec,mimi,dac,chameleon,janus")
    bench.add_argument("--batch", default="1,8", help="sounds or pictures in one call, comma-separated")
    bench.add_argument("--seconds", type=float, default=1.0, help="length of the sounds (pictures have 256 x 256)")
    bench.add_argument("--rounds", type=int, default=7, help="turns of each side; the median counts")
    bench.add_argument("--device", choices=("cpu", "gpu"), help="default: what both sides find")
    bench.add_argument("--json", action="store_true", help="print all times as JSON")
    _add_bench_streams(subparsers)
    _add_bench_generate(subparsers)
    _add_bench_data(subparsers)
    _add_bench_train(subparsers)


def _add_bench_train(subparsers: argparse._SubParsersAction) -> None:
    summary = "Time training steps in bfloat16: tokens a second, MFU, and what costs most. On a CPU, a tiny shape only."
    example = "train --presets 1b --rows 16 --json"
    bench = _add_verb(subparsers, "omni bench", "train", verbs.run_bench_train, summary, example)
    bench.add_argument("--presets", default="0.1b,1b", help="which, comma-separated (default: 0.1b,1b)")
    bench.add_argument("--row-length", type=int, default=4096, help="tokens of a row")
    bench.add_argument("--rows", type=int, default=8, help="rows of a step on each device")
    bench.add_argument("--steps", type=int, default=20, help="steps that are timed; the median counts")
    bench.add_argument("--json", action="store_true", help="print all figures as JSON")


def _add_bench_streams(subparsers: argparse._SubParsersAction) -> None:
    summary = "Time the steps of streams of sound and video beside what they stand for; a table on stdout."
    example = "streams --families mimi --rows 8"
    bench = _add_verb(subparsers, "omni bench", "streams", verbs.run_bench_streams, summary, example)
    bench.add_argument("--families", help="which, comma-separated; default: encodec,mimi,spectral,video")
    bench.add_argument("--rows", type=int, default=1, help="sounds or videos at a time")
    bench.add_argument("--seconds", type=float, default=10.0, help="how much of each, in its own time")
    bench.add_argument("--json", action="store_true", help="print all figures as JSON")


def _add_bench_generate(subparsers: argparse._SubParsersAction) -> None:
    summary = "Time replies beside transformers' generate, on the same weights; a table on stdout."
    example = "generate --kinds text --batch 1"
    bench = _add_verb(subparsers, "omni bench", "generate", verbs.run_bench_generate, summary, example)
    bench.add_argument("--kinds", help="which, comma-separated; default: prompt,text,picture,mixed")
    bench.add_argument("--batch", default="1,8", help="requests that are answered together, comma-separated")
    bench.add_argument("--text-tokens", type=int, default=128, help="length of texts")
    bench.add_argument("--prompt-tokens", type=int, default=512, help="length of prompts where reading is timed")
    bench.add_argument("--rounds", type=int, default=3, help="turns of each side; the median counts")
    bench.add_argument("--device", choices=("cpu", "gpu"), help="default: what both sides find")
    bench.add_argument("--json", action="store_true", help="print all times as JSON")


def _add_bench_data(subparsers: argparse._SubParsersAction) -> None:
    summary = "Time the packed reader on one core, and omni tokenize beside its tokenizer."
    example = "data --tokens 4000000 --pictures 64"
    bench = _add_verb(subparsers, "omni bench", "data", verbs.run_bench_data, summary, example)
    bench.add_argument("--only", choices=("reader", "tokenize"), help="one of the two; default: both")
    bench.add_argument("--tokens", type=int, default=8_000_000, help="tokens that are read in a round")
    bench.add_argument("--row-length", type=int, default=8192, help="tokens of a packed row")
    bench.add_argument("--tokenizer", metavar="DIR", help="of pictures; default: a random VQGAN of 256 x 256")
    bench.add_argument("--pictures", type=int, default=128, help="pictures that are tokenized in a round")
    bench.add_argument("--batch", type=int, default=8, help="pictures that go through the tokenizer together")
    bench.add_argument("--rounds", type=int, default=3, help="the median counts")
    bench.add_argument("--json", action="store_true", help="print all figures as JSON")


if __name__ == "__main__":
    main()
