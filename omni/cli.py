"""The `omni` command: every verb is a function that hands over to the library, imported when the verb runs."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omni.exits import EXIT_FAILED, exits
from omni_tokenizers.errors import UsageError

if TYPE_CHECKING:  # --help and wrong arguments are answered without loading jax
    from omni.parts import Part


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors are one line on stderr."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.INFO, format="omni: %(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax", "etils", "grain"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    parser = make_parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not getattr(options, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    with exits():
        if getattr(options, "takes_overrides", False):
            options.run(options, overrides)
        else:
            options.run(options)


def _status(message: str) -> None:
    """Tells someone who waits at a terminal what takes its time; logs and pipes are spared it."""
    if sys.stderr.isatty():
        print(f"omni: {message} ...", file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each verb sets `run`, and `takes_overrides` where configuration keys may follow."""
    parser = argparse.ArgumentParser(
        prog="omni", description="One model that reads and writes text, pictures and sound."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, run, summary: str, example: str, **options) -> argparse.ArgumentParser:
        made = verbs.add_parser(
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
        run_quickstart,
        "Make a dataset, train tokenizers and an any-to-any model, measure it and write a report.",
        "omni quickstart --output runs/quickstart",
        add_help=False,
    )
    quickstart.set_defaults(takes_overrides=True)

    train = verb(
        "train",
        run_train,
        "Run an experiment file; its configuration keys may be overridden (--help after FILE lists them).",
        "omni train experiments/digits.py --seed 1",
        add_help=False,
    )
    train.add_argument("experiment", nargs="?", metavar="FILE")
    train.set_defaults(takes_overrides=True, print_help=train.print_help)

    generate = verb(
        "generate",
        run_generate,
        "Answer a prompt. Arguments that name a picture, sound or video file are read as such, others are text.",
        'omni generate runs/quickstart "seven" --want image,audio --out out/',
    )
    generate.add_argument("model", help="a run or an exported directory")
    generate.add_argument(
        "parts", nargs="+", metavar="PART", help="text, or the path of a picture, sound or video file"
    )
    generate.add_argument(
        "--want", help="modalities of the reply in order, comma-separated; default: the model decides"
    )
    generate.add_argument("--out", type=Path, help="directory for the reply's parts")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--max-tokens", type=int, help="most tokens of the reply")
    for name in ("temperature", "top-k", "top-p", "guidance"):
        generate.add_argument(f"--{name}", help="a number, or modality=number pairs: image=0.5,audio=0.7")
    generate.add_argument("--json", action="store_true", help="print the reply's parts as JSON")

    evaluate = verb(
        "eval",
        run_eval,
        "Measure every direction on held-out data; writes evaluation/results.json and report.html into RUN.",
        "omni eval runs/quickstart",
    )
    evaluate.add_argument("run_directory", metavar="RUN")
    evaluate.add_argument(
        "--model", help="measure this model on the run's held-out data instead of the run's own; needs --output"
    )
    evaluate.add_argument("--output", type=Path, help="where to write instead of RUN, or of RUN/quick")
    evaluate.add_argument("--limit", type=int, help="targets per direction, for a quick look, written to RUN/quick")
    evaluate.add_argument("--json", action="store_true", help="print the results as JSON")

    export = verb(
        "export",
        run_export,
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
        help="what is to load the directory; transformers is for tokenizers (default: omni)",
    )

    imports = verb(
        "import",
        run_import,
        "Write the tokenizer of a public checkpoint as a directory of this package.",
        "omni import encodec_24khz tokenizers/encodec\n"
        "  omni import vqgan.ckpt tokenizers/chameleon --image-size 512 --torch-reader",
    )
    imports.add_argument(
        "source", help="a directory that transformers wrote, or a file of weights (docs/tokenizers.md)"
    )
    imports.add_argument("directory", type=Path)
    imports.add_argument("--image-size", type=int, help="pixels a side that a file's net is meant for (default: 256)")
    imports.add_argument(
        "--torch-reader",
        action="store_true",
        help="read a file of PyTorch, which is a pickle, with torch's weights_only reader (tensors alone)",
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
        run_inspect,
        "Print a model's parameters, vocabulary, grammar, memory and a sample of its training data.",
        "omni inspect runs/quickstart",
    )
    inspect.add_argument("model")
    inspect.add_argument("--json", action="store_true")

    doctor = verb(
        "doctor", run_doctor, "Check the installation and the devices, and say what to install.", "omni doctor"
    )
    doctor.add_argument("--json", action="store_true")
    return parser


def _add_tokenizer_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, run, summary: str, example: str, **options) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  omni tokenizer {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        made.set_defaults(run=run)
        return made

    example = "train experiments/tokenizers/digits_image.py --steps 100"
    train = verb("train", run_train, "run a tokenizer experiment, as omni train does", example, add_help=False)
    train.add_argument("experiment", nargs="?", metavar="FILE")
    train.set_defaults(takes_overrides=True, print_help=train.print_help)
    example = "eval runs/quickstart/tokenizers/image out/1.png"
    evaluate = verb("eval", run_tokenizer_eval, "measure a tokenizer on files", example)
    evaluate.add_argument("directory")
    evaluate.add_argument("files", nargs="+")
    evaluate.add_argument("--fps", type=float, help="frames a second to take of videos; default: all")
    evaluate.add_argument("--lpips-weights", metavar="FILE", help="safetensors of LPIPS: measures LPIPS of pictures")
    evaluate.add_argument("--inception-weights", metavar="FILE", help="safetensors of Inception v3: measures rFID")
    example = "encode runs/quickstart/tokenizers/image out/1.png > codes.json"
    summary = "a text, or a picture, sound or video file, to codes (JSON on stdout)"
    encode = verb("encode", run_tokenizer_encode, summary, example)
    encode.add_argument("directory")
    encode.add_argument("part", help="a picture, sound or video file, or text")
    encode.add_argument("--fps", type=float, help="frames a second to take of a video; default: all")
    example = "decode runs/quickstart/tokenizers/image codes.json again.png"
    summary = "codes (a JSON file, or - for stdin) to a file"
    decode = verb("decode", run_tokenizer_decode, summary, example)
    decode.add_argument("directory")
    decode.add_argument("codes")
    decode.add_argument("output", help="the file to write")


def _add_bench_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    summary = "Time the public tokenizers here and in transformers, in turn, on the same weights; a table on stdout."
    bench = verbs.add_parser(
        "tokenizers",
        help=summary,
        description=summary,
        epilog="example:\n  omni bench tokenizers --families encodec,mimi --batch 1,8 --seconds 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.set_defaults(run=run_bench_tokenizers)
    bench.add_argument("--families", help="which, comma-separated; default: encodec,mimi,dac,chameleon,janus")
    bench.add_argument("--batch", default="1,8", help="sounds or pictures in one call, comma-separated")
    bench.add_argument("--seconds", type=float, default=1.0, help="length of the sounds (pictures have 256 x 256)")
    bench.add_argument("--rounds", type=int, default=7, help="turns of each side; the median counts")
    bench.add_argument("--device", choices=("cpu", "gpu"), help="default: what both sides find")
    bench.add_argument("--json", action="store_true", help="print all times as JSON")


def run_quickstart(options: argparse.Namespace, overrides: list[str]) -> None:
    from omni.experiment import override
    from omni.recipes.digits import DigitsRecipe

    override(DigitsRecipe(), overrides, prog="omni quickstart").run()


def run_train(options: argparse.Namespace, overrides: list[str]) -> None:
    from omni.experiment import load_experiment, override

    if options.experiment is None and {"-h", "--help"} & set(overrides):
        options.print_help()
        return
    if options.experiment is None:
        raise UsageError("omni train needs an experiment file: omni train experiments/digits.py")
    config = load_experiment(options.experiment)
    override(config, overrides, prog=f"omni train {options.experiment}").run()


def run_generate(options: argparse.Namespace) -> None:
    import omni
    from omni import video_files

    _status(f"loading {options.model}")
    model = omni.load(options.model)
    settings = {
        name: parse_setting(name, getattr(options, name))
        for name in ("temperature", "top_k", "top_p", "guidance")
        if getattr(options, name) is not None
    }
    want = [name.strip() for name in options.want.split(",")] if options.want else None
    parts = read_arguments(options.parts, model.processor.read)
    if options.out and "video" in model.grammar.modalities:
        video_files.pyav()  # that it is missing is said before anything is generated
    _status("compiling and generating")
    reply = model.generate(parts, want=want, seed=options.seed, max_tokens=options.max_tokens, **settings)
    if options.json:
        files = reply.save(options.out) if options.out else []
        described = [{"modality": part.modality, "text": getattr(part, "text", None)} for part in reply.parts]
        for entry, file in zip(described, files, strict=False):
            entry["file"] = str(file)
        print(json.dumps({"parts": described, "well_formed": reply.well_formed, "seed": options.seed}))
        return
    for part in reply.parts:
        print(part.text if part.modality == "text" else part)
    for file in reply.save(options.out) if options.out else []:
        print(f"wrote {file}")
    if not options.out and any(part.modality != "text" for part in reply.parts):
        print("pictures, sounds and videos were not written: add --out DIRECTORY", file=sys.stderr)


def read_argument(argument: str, read: Callable[[str], Part]) -> Part:
    """A prompt argument as a part: what `read` makes of a file with the ending of one, else text."""
    from omni import media, parts

    if Path(argument).suffix.lower() in (*media.PICTURE_EXTENSIONS, *media.SOUND_EXTENSIONS, *media.VIDEO_EXTENSIONS):
        return read(argument)
    return parts.Text(argument)


def read_arguments(arguments: Sequence[str], read: Callable[[str], Part]) -> list[Part]:
    """Prompt arguments as parts; words that the shell has split are one text again."""
    from omni.parts import Text

    parts: list = []
    for part in (read_argument(argument, read) for argument in arguments):
        if parts and isinstance(part, Text) and isinstance(parts[-1], Text):
            parts[-1] = Text(f"{parts[-1].text} {part.text}")
        else:
            parts.append(part)
    return parts


def parse_setting(name: str, value: str) -> float | dict[str, float]:
    """'0.5' as a number, 'image=0.5,audio=1' as a dictionary; `UsageError` for anything else."""
    try:
        if "=" not in value:
            return float(value)
        pairs = (pair.split("=", 1) for pair in value.split(","))
        return {modality.strip(): float(number) for modality, number in pairs}
    except ValueError:
        raise UsageError(f"--{name.replace('_', '-')} {value}: write a number, or modality=number pairs") from None


def run_eval(options: argparse.Namespace) -> None:
    from omni.recipes.digits import evaluate_run

    results = evaluate_run(options.run_directory, options.output, model=options.model, limit=options.limit)
    if options.json:
        print(json.dumps(results))


def run_export(options: argparse.Namespace) -> None:
    import omni
    from omni.tokenizer_tools import export_tokenizer, is_tokenizer

    _require_empty(options.directory)
    _status(f"loading {options.model}")
    if is_tokenizer(options.model):
        export_tokenizer(options.model, options.directory, file_format=options.format, dtype=options.dtype)
    elif options.format != "omni":
        raise UsageError(
            f"{options.model} is not a tokenizer's directory; only tokenizers are written for transformers"
        )
    else:
        omni.load(options.model).save(options.directory, dtype=options.dtype)
    _print_written(options.directory)


def run_import(options: argparse.Namespace) -> None:
    from omni.tokenizer_tools import import_tokenizer

    _require_empty(options.directory)
    _status(f"reading {options.source}")
    import_tokenizer(
        options.source, options.directory, image_size=options.image_size, torch_reader=options.torch_reader
    )
    _print_written(options.directory)


def _require_empty(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UsageError(f"{directory} is there and no empty directory; name one that is not there yet")


def _print_written(directory: Path) -> None:
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"wrote {directory} ({size / 1e6:.2f} MB)")


def run_tokenizer_eval(options: argparse.Namespace) -> None:
    from omni.tokenizer_evaluation import evaluate_files

    weights = {"lpips_weights": options.lpips_weights, "inception_weights": options.inception_weights}
    print(json.dumps(evaluate_files(options.directory, options.files, fps=options.fps, **weights), indent=2))


def run_tokenizer_encode(options: argparse.Namespace) -> None:
    from omni.parts import read_part
    from omni.tokenizer_tools import encode_part

    part = read_argument(options.part, functools.partial(read_part, fps=options.fps))
    print(json.dumps(encode_part(options.directory, part)))


def run_tokenizer_decode(options: argparse.Namespace) -> None:
    from omni.tokenizer_tools import decode_to_file

    decode_to_file(options.directory, options.codes, options.output)


def run_bench_tokenizers(options: argparse.Namespace) -> None:
    from omni.bench.report import as_markdown, check_agreement
    from omni.bench.tokenizers import Options, compare

    try:
        batches = tuple(int(batch) for batch in options.batch.split(","))
    except ValueError:
        raise UsageError(f"--batch {options.batch}: write whole numbers, such as 1,8") from None
    families = {"families": tuple(options.families.split(","))} if options.families else {}
    settings = {"seconds": options.seconds, "rounds": options.rounds, "device": options.device}
    results = compare(Options(batches=batches, **families, **settings))
    print(json.dumps(results) if options.json else as_markdown(results))
    check_agreement(results)


def run_inspect(options: argparse.Namespace) -> None:
    from omni.inspection import describe, print_description

    _status(f"reading {options.model}")
    description = describe(options.model)
    if options.json:
        print(json.dumps(description))
    else:
        print_description(description)


def run_doctor(options: argparse.Namespace) -> None:
    from omni.doctor import check, print_checks

    checks = check()
    if options.json:
        print(json.dumps(checks))
    else:
        print_checks(checks)
    if not all(entry["ok"] for entry in checks if entry["required"]):
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
