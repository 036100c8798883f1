"""The command line: ``polyalign VERB CONFIG [key=value ...]``.

Nothing heavy is imported before a verb is chosen and its recipe has been read, so that ``--help`` and the message about a
misspelt key come at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from polyalign.core.errors import UserError

EXAMPLE = "image/quickstart"
INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """One verb: what its help says, its options, and the function of ``core/verbs.py`` that does it."""

    name: str
    summary: str
    text: str
    example: str
    action: str
    options: Callable[[argparse.ArgumentParser], None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: -"):
            hint = "\nSettings of the recipe are written without dashes: key=value, for example seed=3"
        self.exit(2, f"{self.prog}: {message}{hint}\nTry '{self.prog} --help'.\n")


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a recipe: a YAML file, or the name of a packaged one; or the folder of an earlier run, for its config.yaml",
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="settings that replace those of the recipe, with dots: seed=3 objective.beta.value=2000",
    )
    parser.add_argument("--run", metavar="FOLDER", help="the run folder (as the key 'run' of the recipe)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and what of the run is done, stale or still to do; do nothing",
    )


def _export_options(parser: argparse.ArgumentParser) -> None:
    _recipe_options(parser)
    parser.add_argument("--to", metavar="FOLDER", help="where to write (default: the folder 'export' in the run folder)")
    parser.add_argument("--arm", metavar="NAME", help="an arm of the recipe in the place of its objective")


def _explain_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "topic",
        nargs="?",
        help="'objective' (the table), an objective (dpo), a key of a recipe (train.batch_size), 'configs' (the packaged "
        "recipes), or 'schema' (JSON schema for editors)",
    )
    parser.add_argument("--modality", help="whose recipes are meant (default: a key is explained for all that have it)")


def _diagnose_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run, finished or not")
    parser.add_argument("--json", action="store_true", help="print what diagnosis.json holds")


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "align",
            "from prompts to an aligned model and its report: all stages, each only if it has to run",
            "Reads the recipe and what it names (model, prompts). Runs every stage, in order, and skips those that are done\n"
            "and whose inputs have not changed. Stop it at any time; the same command continues.\n"
            "Writes the run folder: config.yaml, pairs/, checkpoints/, adapter/, samples/, evaluation.json, report.html.",
            f"polyalign align {EXAMPLE} seed=1",
            "align",
            _recipe_options,
        ),
        Verb(
            "generate",
            "samples for every prompt, judged and made into preference pairs",
            "Reads the model and the prompts. Writes pairs/ (parquet, opens with Hugging Face datasets) into the run folder.",
            f"polyalign generate {EXAMPLE} --run runs/first",
            "one_stage",
            _recipe_options,
        ),
        Verb(
            "train",
            "preference training on the pairs",
            "Reads the model and pairs/. Writes checkpoints/, metrics.jsonl and adapter/ into the run folder.",
            f"polyalign train {EXAMPLE} --run runs/first objective.beta.value=2000",
            "one_stage",
            _recipe_options,
        ),
        Verb(
            "evaluate",
            "the aligned model against its base, on the same prompts and seeds",
            "Reads the model and adapter/. Writes samples/ and evaluation.json (paired win rates with intervals).",
            "polyalign evaluate runs/first",
            "one_stage",
            _recipe_options,
        ),
        Verb(
            "report",
            "one HTML page: verdict, win rates, before and after, curves, data",
            "Reads the run folder. Writes report.html (one file, nothing else needed) and report.json.",
            "polyalign report runs/first",
            "one_stage",
            _recipe_options,
        ),
        Verb(
            "diagnose",
            "what went wrong in a run, and how to mend it: numbers, rule, cure",
            "Reads a run folder, also of a run that is still going: metrics.jsonl, pairs/, evaluation.json, config.yaml.\n"
            "Writes diagnosis.json into it. Every rule is printed; where a number is missing it says so and does not guess.",
            "polyalign diagnose runs/first",
            "diagnose",
            _diagnose_options,
        ),
        Verb(
            "explain",
            "what an objective computes; what a key means; which recipes there are",
            "Reads no run. Prints the table of objectives, the formula, parameters and source of one of them, or the type,\n"
            "range, default and meaning of a key.",
            "polyalign explain dpo",
            "explain",
            _explain_options,
        ),
        Verb(
            "export",
            "the aligned weights in the form that other programs open",
            "Reads adapter/ of the run folder. Writes weights that diffusers, peft or transformers open directly.",
            "polyalign export runs/first --to my-model",
            "export",
            _export_options,
        ),
        Verb(
            "doctor",
            "what is installed, which device there is, what is missing for what",
            "Reads the installation. Writes nothing.",
            "polyalign doctor",
            "doctor",
            _doctor_options,
        ),
    )
}


def usage() -> str:
    """The text of ``polyalign --help``."""
    lines = ["usage: polyalign VERB CONFIG [KEY=VALUE ...] [--run FOLDER] [--dry-run]", ""]
    lines += ["Align generative models with preferences, and see whether it worked.", ""]
    lines += [f"  {verb.name:10}{verb.summary}" for verb in VERBS.values()]
    lines += ["", f"Start with:  {VERBS['align'].example}"]
    lines += ["More:        polyalign VERB --help, polyalign explain configs, polyalign --version", ""]
    return "\n".join(lines)


def parser_of(verb: Verb) -> argparse.ArgumentParser:
    """The parser of one verb."""
    parser = _Parser(
        prog=f"polyalign {verb.name}",
        description=f"{verb.summary[0].upper()}{verb.summary[1:]}.\n\n{verb.text}",
        epilog=f"example: {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for wrong input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"polyalign: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        command = shlex.join(["polyalign", *arguments])
        print(f"\ninterrupted; what is finished is kept. Run the same command again to continue:\n  {command}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `polyalign explain objective | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from polyalign import __version__

        print(f"polyalign {__version__}")
        return 0
    verb = VERBS.get(arguments[0])
    if verb is None:
        near = difflib.get_close_matches(arguments[0], VERBS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown verb {arguments[0]!r}.{hint} Verbs: {', '.join(VERBS)}.")
    options = parser_of(verb).parse_intermixed_args(arguments[1:])
    from polyalign.core import verbs

    return getattr(verbs, verb.action)(verb.name, options)


def existing_run(config: str) -> Path | None:
    """``config`` as the folder of an earlier run, if it is a folder.

    Raises:
        UserError: a folder without config.yaml.
    """
    folder = Path(config).expanduser()
    if not folder.is_dir():
        return None
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{config}: is a folder without config.yaml, so not a run. Give a recipe or the folder of a run.")
    return folder


if __name__ == "__main__":
    sys.exit(main())
