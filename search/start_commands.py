"""The commands for a first study: a definition to start from."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from search.options import JsonOption


def init(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Default: NAME.toml, here.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="A folder of images, an .npz, a ready dataset, or a function.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="convnet, resnet, backbone, mnist_cnn, or own for a model file.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the study. Default: that of the data.")] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Budget in trials.")] = 20,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs of a trial.")] = 10,
    from_script: Annotated[
        Path | None, typer.Option("--from-script", metavar="FILE", help="A Keras script with a function `build`.")
    ] = None,
) -> None:
    """Write a definition to start from."""
    from search import service
    from search.terminal import say
    from studies.errors import DefinitionError

    asks = sys.stdin.isatty() and sys.stderr.isatty()
    if data is None and not asks:
        raise DefinitionError("the images are missing: name them with --data, such as --data photos/ or --data digits")
    if data is None:
        data = typer.prompt("Your images (a folder, an .npz file, or digits)", default="digits", err=True)
        if model is None and from_script is None:
            text = "The model (convnet, resnet, backbone, mnist_cnn, own, or auto)"
            answer = typer.prompt(text, default="auto", err=True)
            model = None if answer == "auto" else answer
    files = service.init(data, file, model=model, name=name, trials=trials, epochs=epochs, from_script=from_script)
    written = " and ".join(map(str, files))
    check = f"trialyard check {shlex.quote(str(files[0]))}"
    say(f"{written} {'is' if len(files) == 1 else 'are'} written: `{check}` tries it")


def catalog(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one, to start from.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the ready definitions, or print one."""
    from search import service
    from search.terminal import print_json, say
    from studies import definition as definitions

    if name is not None:
        text = service.catalog_text(name)
        if as_json:
            print_json(definitions.parse(text).to_json())
        else:
            sys.stdout.write(text)
        return
    ready = service.catalog()
    if as_json:
        print_json([{"name": each, "description": description} for each, description in ready.items()])
        return
    width = max(map(len, ready))
    for each, description in ready.items():
        say(f"{each:<{width}}  {description}")
