"""What the verbs of the `omni` command do: each hands over to the library, imported when the verb runs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omni.exits import EXIT_FAILED
from omni_tokenizers.errors import OmniError, UsageError

if TYPE_CHECKING:
    from etils import epath

    from omni.parts import Part
    from omni.reply import Reply
    from omni.sharding import MeshConfig
    from omni.streaming import Event


def run_quickstart(options: argparse.Namespace, overrides: list[str]) -> None:
    from omni.experiment import override
    from omni.recipes.digits import DigitsRecipe

    override(DigitsRecipe(), overrides, prog="omni quickstart").run()


def run_train(options: argparse.Namespace, overrides: list[str]) -> None:
    from omni.train.distributed import join

    if (config := _configured(options, overrides, "omni train", "experiments/digits.py")) is not None:
        join(options.distributed, options.coordinator, options.processes, options.process)
        config.run()


def _configured(options: argparse.Namespace, overrides: list[str], command: str, example: str):
    """The configuration of the experiment file that was named, with overrides; None where help was wanted and given."""
    from omni.experiment import load_experiment, override

    if options.experiment is None and {"-h", "--help"} & set(overrides):
        options.print_help()
        return None
    if options.experiment is None:
        raise UsageError(f"{command} needs an experiment file: {command} {example}")
    return override(load_experiment(options.experiment), overrides, prog=f"{command} {options.experiment}")


def run_tokenize(options: argparse.Namespace, overrides: list[str]) -> None:
    config = _configured(options, overrides, "omni tokenize", "experiments/own/tokens.py")
    if config is None:
        return
    from omni.tokenize import TokenizeConfig, as_text, tokenize, validate
    from omni.train.distributed import share

    if not isinstance(config, TokenizeConfig):
        raise UsageError(f"{options.experiment} configures no shards but {type(config).__name__}: use omni train")
    if not options.validate:
        if config.processes == 1:
            processes, process = share(options.distributed)
            config = dataclasses.replace(config, processes=processes, process=process)
        manifest = tokenize(config)
        if options.json:
            print(json.dumps(manifest))
        return
    found = validate(config)
    print(json.dumps(found) if options.json else as_text(found))
    if found["bad"]:
        sys.exit(EXIT_FAILED)


def run_compile(options: argparse.Namespace, overrides: list[str]) -> None:
    example = "experiments/pods/chameleon_7b.py --topology v5p:4x4x4"
    if (config := _configured(options, overrides, "omni compile", example)) is None:
        return
    from omni.compile.compiling import as_text, compile_generation, compile_training
    from omni.train.loop import TrainConfig
    from omni.train.stages import of_stage

    if options.topology is None:
        raise UsageError(f"omni compile needs --topology: omni compile {example}")
    if not isinstance(config, TrainConfig):
        raise UsageError(f"{options.experiment} configures no training but {type(config).__name__}")
    _status("compiling")
    settings = ("requests", "capacity", "weights_dtype", "cache_dtype")
    chosen = {name: getattr(options, name) for name in settings if getattr(options, name) is not None}
    if chosen and not options.generate:
        raise UsageError(f"--{next(iter(chosen)).replace('_', '-')} is of generation; add --generate")
    config = of_stage(config, options.stage)
    if options.generate:
        found = compile_generation(config, options.topology, options.slices, **chosen)
    else:
        found = compile_training(config, options.topology, options.slices)
    print(json.dumps(found) if options.json else as_text(found))


def run_generate(options: argparse.Namespace) -> None:
    import omni
    from omni import video_files
    from omni.sharding import MeshConfig

    if options.log_probabilities and not options.json:
        raise UsageError("--log-probabilities are printed as JSON alone; add --json")
    _status(f"loading {options.model}")
    mesh = None if options.tensor is None else MeshConfig(tensor=options.tensor)
    held = {"weights_dtype": options.weights_dtype, "cache_dtype": options.cache_dtype}
    model = omni.load(options.model, mesh=mesh, **held)
    sampling = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "guidance", "media_guidance")
    settings = {
        name: parse_setting(name, getattr(options, name)) for name in sampling if getattr(options, name) is not None
    }
    want = [name.strip() for name in options.want.split(",")] if options.want else None
    parts = read_arguments(options.parts, model.processor.read)
    prompt = [{"role": "user", "content": parts}] if options.chat else parts
    if options.out and "video" in model.grammar.modalities:
        video_files.pyav()  # that it is missing is said before anything is generated
    _status("compiling and generating")
    settings |= {name: getattr(options, name) for name in ("seed", "samples", "max_tokens", "log_probabilities")}
    settings |= {"stop": options.stop or (), "stop_tokens": parse_numbers("stop_tokens", options.stop_tokens)}
    if options.stream:
        _print_stream(model.stream(prompt, want, **settings), options)
        return
    for sample, reply in enumerate(model.generate(prompt, want=want, **settings)):
        out = options.out / str(sample + 1) if options.out and options.samples > 1 else options.out
        _print_reply(reply, out, options.seed + sample, options)


def _print_stream(events: Iterator[Event], options: argparse.Namespace) -> None:
    """Prints text as it comes, and every other part once it is whole; as JSON, a line for each event."""
    for event in events:
        if event.kind == "end":
            _print_reply(event.reply, options.out, options.seed, options, shown=not options.json)
        elif options.json:
            part = {"modality": event.part.modality} if event.part is not None else {}
            text = {"text": event.text} if event.kind == "text" else {}
            print(json.dumps({"event": event.kind, "index": event.index} | part | text), flush=True)
        elif event.kind == "text":
            print(event.text, end="", flush=True)
        elif event.kind == "part":
            print("" if event.part.modality == "text" else event.part, flush=True)


def _print_reply(
    reply: Reply, out: Path | None, seed: int, options: argparse.Namespace, *, shown: bool = False
) -> None:
    """Prints a reply, whose parts are printed already where they were `shown`, and writes it into `out`."""
    if options.json:
        files = reply.save(out) if out else []
        described = [{"modality": part.modality, "text": getattr(part, "text", None)} for part in reply.parts]
        for entry, file in zip(described, files, strict=False):
            entry["file"] = str(file)
        found = {"parts": described, "well_formed": reply.well_formed, "seed": seed}
        if options.log_probabilities:
            found |= {"ids": reply.ids.tolist(), "log_probabilities": reply.log_probabilities.tolist()}
        print(json.dumps(found))
        return
    for part in () if shown else reply.parts:
        print(part.text if part.modality == "text" else part)
    for file in reply.save(out) if out else []:
        print(f"wrote {file}")
    if not out and any(part.modality != "text" for part in reply.parts):
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


def parse_mesh(value: str) -> MeshConfig:
    """'fsdp=4,tensor=2' as a mesh, in which all other axes have one device; `UsageError` for anything else."""
    from omni.sharding import MeshConfig

    axes = {"data": 1} | {name.strip(): size for name, _, size in (pair.partition("=") for pair in value.split(","))}
    try:
        return MeshConfig(**{name: int(size) for name, size in axes.items()})
    except (TypeError, ValueError):
        known = ", ".join(field.name for field in dataclasses.fields(MeshConfig))
        raise UsageError(
            f"--mesh {value}: write axis=devices pairs, such as fsdp=4,tensor=2; axes are {known}"
        ) from None


def parse_numbers(name: str, value: str | None) -> list[int]:
    """'3,17' as a list, nothing as none; `UsageError` for anything else."""
    try:
        return [int(number) for number in value.split(",")] if value is not None else []
    except ValueError:
        raise UsageError(f"--{name.replace('_', '-')} {value}: write whole numbers, such as 1,8") from None


def run_eval(options: argparse.Namespace) -> None:
    if options.data is not None:
        _eval_documents(options)
        return
    from omni.recipes.digits import evaluate_run

    for name in ("directions", "candidates", "seed"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} is about your own documents: name them with --data")
    results = evaluate_run(options.run_directory, options.output, model=options.model, limit=options.limit)
    if options.json:
        print(json.dumps(results))


_EVAL_DOCUMENTS = ("data", "directions", "candidates", "limit", "seed", "output")


def _eval_documents(options: argparse.Namespace) -> None:
    import omni
    from omni.data.json_lines import JsonLines
    from omni.evaluate import DocumentSettings, evaluate_documents, write_documents_report
    from omni.evaluate.documents import parse_directions
    from omni.evaluate.report import as_table

    run, given = options.run_directory, {name: getattr(options, name) for name in _EVAL_DOCUMENTS}
    given = {name: value for name, value in given.items() if value is not None}
    if options.model is not None:
        raise UsageError(
            "--model is about the digits recipe; with --data the model comes first: omni eval MODEL --data"
        )
    if options.output is None and not Path(run).is_dir():
        raise UsageError(f"{run} is no directory to write into: name one with --output")
    settings = DocumentSettings(**{name: given[name] for name in ("candidates", "limit", "seed") if name in given})
    directions = parse_directions(options.directions) if options.directions is not None else None
    output = options.output or Path(run) / "documents"
    _status(f"loading {run}")
    model, source = omni.load(run), JsonLines(options.data)
    command = shlex.join(["omni", "eval", run, *(word for name in given for word in (f"--{name}", str(given[name])))])
    results, samples = evaluate_documents(model, source, output, settings, directions=directions, command=command)
    report = write_documents_report(results, samples, output, title=f"{run} on {options.data}")
    print(json.dumps(results) if options.json else f"{as_table(results)}\nreport: {report}")


def run_export(options: argparse.Namespace) -> None:
    import omni
    from omni.tokenizer_tools import export_tokenizer, is_tokenizer

    _require_empty(options.directory)
    _status(f"loading {options.model}")
    if is_tokenizer(options.model):
        export_tokenizer(options.model, options.directory, file_format=options.format, dtype=options.dtype)
    elif options.format == "transformers":
        omni.load(options.model).export(options.directory, dtype=options.dtype)
    else:
        omni.load(options.model).save(options.directory, dtype=options.dtype)
    _print_written(options.directory)


def run_import(options: argparse.Namespace) -> None:
    from omni.hub import located
    from omni.interop import holds_model
    from omni.tokenizer_tools import import_tokenizer

    _require_empty(options.directory)
    _status(f"reading {options.source}")
    source = located(options.source)
    if not holds_model(source):
        if options.verify or options.mesh is not None or options.dtype != "float32":
            raise UsageError(f"{options.source} holds a tokenizer; --dtype, --mesh and --verify are of whole models")
        settings = {"image_size": options.image_size, "torch_reader": options.torch_reader}
        import_tokenizer(source, options.directory, **settings)
    elif options.image_size is not None:
        raise UsageError(f"{options.source} holds a whole model, which says its size: leave --image-size out")
    else:
        _import_model(source, options)
    _print_written(options.directory)


def _import_model(source: epath.Path, options: argparse.Namespace) -> None:
    """Loads, compares where that is asked for, and writes a whole model."""
    import omni
    from omni.interop import verification

    mesh = None if options.mesh is None else parse_mesh(options.mesh)
    load = functools.partial(omni.load, source, mesh, torch_reader=options.torch_reader)
    if options.verify:
        _status("comparing with transformers")
        checks = list(verification.verify(load(), source))
        print(verification.as_table(checks))
        if any(check.passed is False for check in checks):
            raise OmniError(f"{options.source} is not here what it is in transformers; nothing was written")
    model = load(dtype="bfloat16" if options.dtype == "bfloat16" else "float32")
    model.save(options.directory, dtype=options.dtype)


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

    batches = tuple(parse_numbers("batch", options.batch))
    families = {"families": tuple(options.families.split(","))} if options.families else {}
    settings = {"seconds": options.seconds, "rounds": options.rounds, "device": options.device}
    results = compare(Options(batches=batches, **families, **settings))
    print(json.dumps(results) if options.json else as_markdown(results))
    check_agreement(results)


def run_bench_streams(options: argparse.Namespace) -> None:
    from omni.bench.streams import StreamOptions, as_markdown, measure

    families = {"families": tuple(options.families.split(","))} if options.families else {}
    results = measure(StreamOptions(rows=options.rows, seconds=options.seconds, **families))
    print(json.dumps(results) if options.json else as_markdown(results))


def run_bench_generate(options: argparse.Namespace) -> None:
    from omni.bench.generation import Options, as_markdown, compare

    kinds = {"kinds": tuple(options.kinds.split(","))} if options.kinds else {}
    lengths = {"text_tokens": options.text_tokens, "prompt_tokens": options.prompt_tokens, "rounds": options.rounds}
    batches = tuple(parse_numbers("batch", options.batch))
    results = compare(Options(batches=batches, device=options.device, **kinds, **lengths))
    print(json.dumps(results) if options.json else as_markdown(results))


def run_bench_data(options: argparse.Namespace) -> None:
    from omni.bench.data import ReaderOptions, TokenizeOptions, as_text, measure

    reader = ReaderOptions(options.tokens, options.row_length, options.rounds)
    tokenizing = TokenizeOptions(options.tokenizer, options.pictures, options.batch, options.rounds)
    _status("writing shards, reading them, tokenizing pictures")
    results = measure({"reader": reader, "tokenize": tokenizing}, options.only)
    print(json.dumps(results) if options.json else as_text(results))


def run_bench_train(options: argparse.Namespace) -> None:
    from omni.bench.training import TrainingOptions, as_text, measure

    settings = TrainingOptions(tuple(options.presets.split(",")), options.row_length, options.rows, options.steps)
    _status("compiling, training")
    results = measure(settings)
    print(json.dumps(results) if options.json else as_text(results))


def run_inspect(options: argparse.Namespace) -> None:
    from omni import inspection

    if options.verify:
        found = inspection.verify_run(options.directory)
        print(json.dumps(found)) if options.json else inspection.print_verification(found)
        if any(found.values()):
            sys.exit(EXIT_FAILED)
        return
    _status(f"reading {options.directory}")
    if options.document is not None:
        found = inspection.describe_document(options.directory, options.document)
        print(json.dumps(found)) if options.json else inspection.print_document(found)
        return
    description = inspection.describe(options.directory)
    if options.json:
        print(json.dumps(description))
    else:
        inspection.print_description(description)


def run_doctor(options: argparse.Namespace) -> None:
    from omni.doctor import check, print_checks

    checks = check()
    if options.json:
        print(json.dumps(checks))
    else:
        print_checks(checks)
    if not all(entry["ok"] for entry in checks if entry["required"]):
        sys.exit(EXIT_FAILED)


def _status(message: str) -> None:
    """Tells someone who waits at a terminal what takes its time; logs and pipes are spared it."""
    if sys.stderr.isatty():
        print(f"omni: {message} ...", file=sys.stderr)
