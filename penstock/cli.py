"""The commands: parse, call, print.

Nothing heavy is imported before a command needs it: `list`, `show` and `search` read cards only.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import logging
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from penstock._version import __version__
from penstock.errors import UserError, nearest
from penstock.lab import cards

if TYPE_CHECKING:
    from penstock.lab.run import Options
    from penstock.lab.system import System

#: Rows of a table of findings on the terminal.
_MOST_PRINTED = 40
SUMMARIES = {
    "list": "the systems, a line each, and whether each is ready",
    "show": "a system's card: idea, gate, twin, claims with the figures last measured",
    "search": "the catalogue, ranked by a query",
    "run": "train a system beside its ungated twin and judge its claims",
    "compare": "one leaderboard of several systems: same data, same budget",
    "tune": "search a system's settings on your data, then train the best",
    "predict": "apply a trained arm to data",
    "ablate": "what each gate of a trained arm buys",
    "export": "write a trained arm as ONNX or torch.export, or for transformers",
    "bench": "our kernels and models beside their peers, as ratios",
    "report": "rebuild a run's report.html",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 an arm failed, 2 the user can mend it, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"penstock {__version__}")
        return 0
    command, *rest = arguments
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler writes to the terminal otherwise
    warnings.showwarning = _note
    warnings.simplefilter("ignore")
    warnings.filterwarnings("once", module=r"penstock\.")
    try:
        if command not in COMMANDS:
            close = nearest(command, COMMANDS) or list(COMMANDS)
            raise UserError(
                f"no command {command!r}; did you mean {' or '.join(close[:2])}? (penstock --help lists them)"
            )
        return COMMANDS[command](rest)
    except UserError as error:
        _say_once(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        _say_once("interrupted; a run keeps its last checkpoint, go on with --resume RUN")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename2 or error.filename or "a file"
        print(f"penstock: {where}: the disk is full; make room, and go on with --resume RUN", file=sys.stderr)
        return 2


def _say_once(line: str) -> None:
    """Of the processes of a run, the first that ends says why."""
    if "RANK" in os.environ:
        from penstock.data.parts import first_to_end

        if not first_to_end():
            return
    print(f"penstock: {line}", file=sys.stderr)


def _note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Our own warnings are a line each; third parties' are kept off the terminal by the filters."""
    print(f"penstock: note: {message}", file=sys.stderr)


def _overview() -> str:
    width = max(map(len, SUMMARIES))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in SUMMARIES.items()]
    return "\n".join(
        ["usage: penstock COMMAND [...]", "", "Gated neural networks beside their ungated twins.", "", *lines, "",
         "`penstock COMMAND --help` says more; `penstock run NAME --help` lists every setting of a system."]
    )  # fmt: skip


def _parser(command: str, *, usage: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"penstock {command}", usage=usage, description=SUMMARIES[command], allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output, nothing else")
    return parser


def _print_json(value: Any) -> None:
    from penstock.lab.jsontext import plain_json

    print(plain_json(value))


# -- cards only ----------------------------------------------------------------------------------------------


def _list(arguments: list[str]) -> int:
    parser = _parser("list")
    parser.add_argument("--wing", help=f"only this wing: {', '.join(cards.WINGS)}")
    parser.add_argument("--task", help="only systems of this task")
    asked = parser.parse_args(arguments)
    if asked.wing and asked.wing not in cards.WINGS:
        raise UserError(f"--wing {asked.wing}: there are {', '.join(cards.WINGS)}")
    known_tasks = sorted({c.task for c in cards.all_cards().values()})
    if asked.task and asked.task not in known_tasks:
        raise UserError(f"--task {asked.task}: there are {', '.join(known_tasks)}")
    chosen = [
        c for c in cards.all_cards().values() if asked.wing in (None, c.wing) and asked.task in (None, c.task)
    ]  # fmt: skip
    if asked.json:
        _print_json(
            [
                {"name": c.name, "title": c.title, "wing": c.wing, "task": c.task, "ready": c.ready, "arxiv": c.arxiv}
                for c in chosen
            ]
        )
        return 0
    width = max((len(c.name) for c in chosen), default=0)
    for c in chosen:
        print(f"{c.name.ljust(width)}  {'ready  ' if c.ready else 'planned'}  {c.wing.ljust(14)}  {c.title}")
    return 0


def _show(arguments: list[str]) -> int:
    parser = _parser("show")
    parser.add_argument("name")
    asked = parser.parse_args(arguments)
    found = cards.card(asked.name)
    measured = cards.last_measured(found.name)
    if asked.json:
        _print_json(dataclasses.asdict(found) | {"ready": found.ready, "measured": measured})
        return 0
    print(
        f"{found.name}: {found.title}\n{found.authors}, {found.date}, arXiv {found.arxiv}\ncode: {found.code} ({found.license})\n"
    )
    gate = found.gate
    facts = {
        "wing": f"{found.wing}, task {found.task}",
        "idea": found.idea,
        "gate": f"{gate.what}, by {gate.by}; {gate.activation}; {gate.granularity}",
        "twin": found.twin,
        "advice": found.advice,
        "evidence": found.evidence,
        "variants": ", ".join(f"{name} ({count:,} parameters)" for name, count in found.variants.items()),
    }
    for name, text in facts.items():
        if text:
            _paragraph(name, text)
    print("claims")
    verdicts = {c["id"]: c for c in (measured or {}).get("claims", [])}
    for claim in found.claims:
        _paragraph(f"  {claim.id}", claim.says)
        _paragraph("    measured", f"{claim.measures} ({claim.direction})")
        if claim.id in verdicts:
            _paragraph("    result", _verdict(verdicts[claim.id]))
    if measured:
        print(f"figures of {len(measured['seeds'])} seeds, {measured['environment']['date']}, {measured['command']}")
    return 0


def _verdict(claim: dict[str, Any]) -> str:
    interval = claim.get("interval")
    between = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
    value = "-" if claim.get("measured") is None else f"{claim['measured']:.4g}"
    return f"{value}{between}: {claim['verdict']}"


def _paragraph(name: str, text: str) -> None:
    import textwrap

    print(textwrap.fill(text, 100, initial_indent=name.ljust(14) + " ", subsequent_indent=" " * 15))


def _search(arguments: list[str]) -> int:
    parser = _parser("search")
    parser.add_argument("query", nargs="+")
    asked = parser.parse_args(arguments)
    hits = cards.search(" ".join(asked.query))
    if asked.json:
        _print_json(
            [{"name": c.name, "title": c.title, "score": round(score, 4), "ready": c.ready} for c, score in hits]
        )
        return 0
    if not hits:
        print("nothing matches; `penstock list` shows everything")
    for c, score in hits:
        print(f"{score:.2f}  {c.name.ljust(18)} {c.title}")
    return 0


# -- running -------------------------------------------------------------------------------------------------


def _typed(command: str, name: str, arguments: list[str], kind: type[Options] | None = None) -> tuple[Any, Any]:
    """Options of a ``kind`` (default those of a run) and the system's own configuration from flags."""
    import tyro

    from penstock.lab.run import Options
    from penstock.lab.system import system

    found, kind = system(name), kind or Options
    default, arguments = _preset(found, arguments)
    flags = dataclasses.make_dataclass(
        "Flags",
        [
            ("options", Annotated[kind, tyro.conf.arg(name="")], dataclasses.field(default_factory=kind)),
            (
                "config",
                Annotated[found.Config, tyro.conf.arg(name="")],
                dataclasses.field(default_factory=lambda: default),
            ),
        ],
    )
    parsed: Any = tyro.cli(
        flags,
        prog=f"penstock {command}",
        description=_description(found),
        args=arguments,
        config=(tyro.conf.HelptextFromCommentsOff, tyro.conf.ConsolidateSubcommandArgs),
        compact_help=False,
    )
    return parsed.options, parsed.config


def _description(found: System[Any]) -> str:
    if found.name in cards.PLAIN_MODELS:
        return f"{found.name}, a plain model without gates."
    own = cards.card(found.name)
    presets = f" --preset takes one of {', '.join(found.presets)}." if found.presets else ""
    return f"{own.title}. {own.idea}{presets}"


def _preset(found: System[Any], arguments: list[str]) -> tuple[Any, list[str]]:
    """The configuration that ``--preset NAME`` names, and the other arguments."""
    if "--preset" not in arguments:
        return found.Config(), arguments
    place = arguments.index("--preset")
    name = arguments[place + 1] if place + 1 < len(arguments) else ""
    if name not in found.presets:
        raise UserError(f"--preset {name}: {found.name} has {', '.join(found.presets) or 'none'}")
    return found.presets[name], arguments[:place] + arguments[place + 2 :]


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(
                "usage: penstock run NAME [flags]\n\n`penstock run NAME --help` lists the flags of a system; `penstock list` lists the systems."
            )
            return 0
        raise UserError("run which system? penstock run NAME; `penstock list` shows them")
    name, *rest = arguments
    _check_name(name)
    options, config = _typed(f"run {name}", name, rest)
    if options.resume is not None and "RANK" not in os.environ:
        from penstock.lab.store import RunFolder
        from penstock.lab.train import Hardware

        options.hardware = Hardware(**RunFolder.open(options.resume).about["hardware"])
    if _needs_launch(options):
        return _launch(options, ["run", *arguments])
    from penstock.lab.progress import Reporter
    from penstock.lab.run import main_process, run
    from penstock.lab.show import show_results

    folder, results = run(name, config, options, reporter=Reporter(quiet=not main_process()))
    if not main_process():
        return 0
    if options.json:
        _print_json(results)
    else:
        show_results(results, folder.path)
    return 1 if any("failed" in arm for arm in results["arms"].values()) else 0


def _check_name(name: str) -> None:
    """Say at once that there is no such system or plain model; torch takes a while to import."""
    if name not in cards.PLAIN_MODELS:
        cards.card(name)


def _needs_launch(options: Options) -> bool:
    hardware = options.hardware
    return hardware.devices * hardware.num_nodes > 1 and "RANK" not in os.environ


def _launch(options: Options, arguments: list[str]) -> int:
    """Start one process a device on this machine; on several machines use torchrun on each."""
    hardware = options.hardware
    if hardware.num_nodes > 1:
        raise UserError(
            f"--num-nodes {hardware.num_nodes}: start it on every machine with `torchrun --nnodes {hardware.num_nodes} "
            f"--nproc-per-node {hardware.devices} ... -m penstock {' '.join(arguments[:2])} ...`"
        )
    if options.out is None and options.resume is None:
        # One name for all processes: each would make up its own.
        arguments = [*arguments, "--out", f"runs/{arguments[1]}-{time.strftime('%Y%m%d-%H%M%S')}"]
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What torchrun --standalone does, without its account of which process failed: they speak for themselves.
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // hardware.devices, 1))
    alone = LaunchConfig(
        1,
        1,
        hardware.devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(alone, sys.executable)("-m", "penstock", *arguments)
    except ChildFailedError as error:
        # Others were stopped by a signal, which is a negative code.
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except SignalException:
        return 130
    return 0


def _compare(arguments: list[str]) -> int:
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments.pop(0))
    asks = "-h" in arguments or "--help" in arguments
    if asks and not names:
        print(
            "usage: penstock compare NAME NAME ... [flags]\n\nThe flags are those of the first system; data and budget are shared by all. "
            f"Beside the systems there are plain models: {', '.join(cards.PLAIN_MODELS)}."
        )
        return 0
    if len(names) < 2 and not asks:
        raise UserError(
            "compare at least two systems: penstock compare NAME NAME ... [--data PATH] [the flags of the first]"
        )
    for name in names:
        _check_name(name)
    if names[0] in cards.PLAIN_MODELS:
        raise UserError(f"{names[0]} is a plain model: name a system first, whose flags hold for all")
    options, config = _typed(f"compare {' '.join(names)}", names[0], arguments)
    from penstock.lab.compare import compare
    from penstock.lab.show import show_leaderboard

    folder, board = compare(names, config, options)
    if options.json:
        _print_json(board)
    else:
        show_leaderboard(board, folder)
    return 0


def _tune(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(
                "usage: penstock tune NAME [flags]\n\nThe flags are those of `penstock run NAME`, fixed for all trials, and those "
                "of the search (--trials, --search, --storage ...): `penstock tune NAME --help` lists them all."
            )
            return 0
        raise UserError("tune which system? penstock tune NAME; `penstock list` shows them")
    name, *rest = arguments
    _check_name(name)
    from penstock.lab.show import show_tuning
    from penstock.lab.space import settings_of
    from penstock.lab.tune import TuneOptions, tune

    options, config = _typed(f"tune {name}", name, rest, TuneOptions)
    typed = {argument.partition("=")[0].replace("_", "-").replace("no-", "") for argument in rest}
    given = [one for one in settings_of(config) if "--" + one.replace("_", "-").replace("no-", "") in typed]
    folder, result = tune(name, config, options, given=given)
    _print_json(result) if options.json else show_tuning(result, folder)
    return 0 if result["best"] else 1


# -- a finished run ------------------------------------------------------------------------------------------


def _predict(arguments: list[str]) -> int:
    parser = _parser("predict")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--data", type=Path, required=True, help="what to predict")
    parser.add_argument("--output", type=Path, help="a .csv, .parquet or .jsonl file (default: CSV on standard output)")
    parser.add_argument("--arm", help="which arm (default the gated one)")
    parser.add_argument("--seed", type=int, default=0, help="of which training")
    parser.add_argument(
        "--precision",
        choices=("32", "bf16"),
        default="32",
        help="bf16: hidden layers of click models take their products in bfloat16, twice as fast where the processor can",
    )
    asked = parser.parse_args(arguments)
    from penstock.lab.predict import predict_frames, write_frames
    from penstock.lab.progress import Reporter

    frames = predict_frames(asked.run, asked.data, arm=asked.arm, seed=asked.seed, precision=asked.precision)
    with Reporter().reading():
        if asked.json:
            _print_json([row for frame in frames for row in frame.to_dicts()])
        elif asked.output is None:
            for number, frame in enumerate(frames):
                print(frame.write_csv(include_header=number == 0), end="")
        else:
            rows = write_frames(frames, asked.output)
            print(f"{rows} rows written to {asked.output}", file=sys.stderr)
    return 0


def _ablate(arguments: list[str]) -> int:
    parser = _parser("ablate")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--arm", help="which arm (default the gated one)")
    parser.add_argument("--seed", type=int, default=0, help="of which training")
    parser.add_argument("--gates", help="a pattern on the gates' dotted names (default all)")
    parser.add_argument("--batches", type=int, default=20, help="test batches to measure on")
    parser.add_argument(
        "--findings",
        action="store_true",
        help="with --json: an object of `ablation`, the list, and `findings` by title",
    )
    asked = parser.parse_args(arguments)
    from penstock.lab.predict import ablate_run
    from penstock.lab.progress import Reporter

    with Reporter().reading():
        table, findings = ablate_run(
            asked.run, arm=asked.arm, seed=asked.seed, pattern=asked.gates, batches=asked.batches
        )
    if asked.json:
        _print_json({"ablation": table, "findings": findings} if asked.findings else list(table))
        return 0
    print(table)
    for title, found in findings.items():
        more = f"\n... {len(found) - _MOST_PRINTED:,} more rows (--json --findings)" * (len(found) > _MOST_PRINTED)
        print(f"\n{title}\n{type(found)(found[:_MOST_PRINTED])}{more}")
    return 0


def _export(arguments: list[str]) -> int:
    parser = _parser("export")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--format", choices=("onnx", "pt2", "hf"), default="onnx", help="hf: a folder for transformers")
    parser.add_argument("--arm", help="which arm (default the gated one)")
    parser.add_argument("--seed", type=int, default=0, help="of which training")
    parser.add_argument("--output", "--out", type=Path, help="the file or folder (default in the run folder)")
    asked = parser.parse_args(arguments)
    from penstock.interop.export import export
    from penstock.lab.progress import Reporter

    with Reporter().reading():
        result = export(asked.run, asked.format, arm=asked.arm, seed=asked.seed, output=asked.output)
    _print_json(result) if asked.json else print(
        f"{result['file']}: {result['bytes']:,} bytes, largest difference from PyTorch {result['difference']:.1e}"
    )
    return 0


def _bench(arguments: list[str]) -> int:
    parser = _parser("bench")
    parser.add_argument("names", nargs="*", metavar="OP", help="which benchmarks (default all)")
    parser.add_argument("--list", action="store_true", help="what there is")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    asked = parser.parse_args(arguments)
    from penstock.lab.bench import bench, benchmarks, show_bench
    from penstock.lab.jsontext import plain_json
    from penstock.lab.store import write_atomically

    if asked.list:
        for name, one in benchmarks().items():
            print(f"{name.ljust(24)} {one.what}")
        return 0
    result = bench(asked.names)
    if asked.output:
        write_atomically(asked.output, plain_json(result) + "\n")
    _print_json(result) if asked.json else show_bench(result)
    return 0


def _report(arguments: list[str]) -> int:
    parser = _parser("report")
    parser.add_argument("run", type=Path, help="a run folder")
    asked = parser.parse_args(arguments)
    from penstock.lab.progress import Reporter
    from penstock.lab.report import write_report
    from penstock.lab.store import RunFolder

    with Reporter().reading():
        path = write_report(RunFolder.open(asked.run))
    _print_json({"report": str(path)}) if asked.json else print(path)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "show": _show,
    "search": _search,
    "run": _run,
    "compare": _compare,
    "tune": _tune,
    "predict": _predict,
    "ablate": _ablate,
    "export": _export,
    "bench": _bench,
    "report": _report,
}
