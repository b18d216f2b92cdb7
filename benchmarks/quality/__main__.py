"""Compare losses on real ratings: `python -m benchmarks.quality --data path/to/ml-1m`.

Runs that are kept already are not trained again, so that the same command goes on where it was
stopped, and another machine only adds what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich.console import Console

from benchmarks.progress import WIDTH
from dwl_kernels.examples.data import DataError

from . import report
from .runs import complete, load_data, read
from .settings import METHODS, Config, Setting, config_of


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    known = METHODS[options.setting]
    methods = list(known) if options.methods is None else options.methods.split(";")
    unknown = sorted(set(methods) - set(known))
    if unknown:
        parser.error(f"--methods: {unknown[0]!r} is none of {'; '.join(known)}")
    methods = [name for name in known if name in methods or name == next(iter(known))]
    console = Console(width=WIDTH, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False)

    try:
        for data in options.data:
            path = complete(
                data,
                options.setting,
                make_config(options, data),
                methods,
                options.seeds,
                options.jobs,
                options.out,
                options.models,
                say,
            )
            document = read(path)
            console.print()
            console.print(report.title(document), report.table(document), sep="\n")
            written = [path]
            if options.setting == "domains":
                written.append(path.with_suffix(".png"))
                report.plot(written[1], document)
            console.print("wrote", *written, soft_wrap=True)
    except (DataError, FloatingPointError, ValueError) as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["synthetic"], help="folders of data sets, or synthetic")
    add("--setting", choices=get_args(Setting), default="domains", help="default domains")
    add("--methods", help="with a semicolon between them; default all of the setting")
    add("--seeds", type=positive, default=1, help="runs per method (default 1)")
    add("--jobs", type=positive, default=1, help="trainings at once, of one thread each")
    add("--steps", type=positive, help="of a training, in place of those in settings.py")
    add("--out", type=folder, default=Path("results"), help="folder of JSON and pictures")
    add("--models", type=folder, default=Path("results/models"), help="folder of kept models")
    return parser


def make_config(options: argparse.Namespace, data: str) -> Config:
    config = config_of(options.setting, load_data(data).name)
    return config if options.steps is None else replace(config, steps=options.steps)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def folder(text: str) -> Path:
    """Refuse now what could not be written after an hour of training."""
    path = Path(text)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{there} is no folder that can be written to")
    return path


if __name__ == "__main__":
    sys.exit(main())
