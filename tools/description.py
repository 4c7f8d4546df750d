"""The content of a dataset.toml: what may be in it, and how it is read (docs/own_data.md)."""

import json
import re
import tomllib
from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tools.command import UserError, and_more
from tools.constants import ROOT, Affinity, PositiveCount, Share
from tools.steps import SPLITS
from tools.validation import expectation, place

SHIPPED = ROOT / "datasetsprocess"  # <name>.toml of the data sets that come with the project


def _colour(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        return tuple(bytes.fromhex(value[1:]))
    if isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value):
        return tuple(value)
    raise ValueError('it must be three whole numbers from 0 to 255, such as [60, 16, 152], or text such as "#3C1098"')


def _class_name(name: str) -> str:
    if name != name.strip() or name in ("", "id") or not name.isprintable():  # it heads a column of image_labels.csv
        raise ValueError('a class needs a name other than "id", without line breaks and without spaces at its ends')
    return name


Colour = Annotated[tuple[int, int, int], BeforeValidator(_colour)]
Side = Annotated[int, Field(ge=16)]
Percent = Annotated[float, Field(ge=0, le=100)]
Split = Literal["train", "test"]


class Table(BaseModel):
    """A table of the file: exact types, finite numbers, no unknown key."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ClassEntry(Table):
    name: Annotated[str, AfterValidator(_class_name)]
    colour: Colour = Field(validation_alias=AliasChoices("colour", "color"))


class Rules(Table):
    """How the splitters of the paper's data sets cut scenes into patches; each reads its own keys."""

    background: str | None = None  # iSAID: the background class
    patches_per_scene: Annotated[list[PositiveCount], Field(min_length=1)] | None = None
    tries: PositiveCount | None = None
    max_background: dict[Split, Share] | None = None
    rare_class: str | None = None  # Vaihingen
    rare_share: Share | None = None
    crop_side: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    min_share: Share | None = None  # Potsdam
    min_share_of: dict[str, Share] | None = None


def _pattern(value: str) -> str:
    name = value.replace("{split}", "")
    if name.count("{scene}") != 1 or set(name.replace("{scene}", "")) & set("{}"):
        raise ValueError('it must hold {scene} once, and otherwise no braces but {split}: "images/{scene}_RGB"')
    if Path(value).suffix.lower() in (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2"):
        raise ValueError("it must be without the suffix of the files: all suffixes of images are tried")
    return value


Pattern = Annotated[str, AfterValidator(_pattern)]


class Layout(Table):
    """Where the files of a scene are, below the raw folder and without suffix."""

    image: Pattern
    truth: dict[Literal["full", "eroded"], Pattern]  # a pattern for each kind of truth
    folders: dict[Split, str] = {"train": "train", "test": "test"}  # what {split} stands for

    def places(self, split: Any, truth: Any) -> tuple[str, str]:
        """The paths of image and truth in a split, with {scene} for the scene."""
        folder = self.folders.get(split, split)
        image, labels = self.image, self.truth[truth]
        return image.replace("{split}", folder), labels.replace("{split}", folder)


class Paper(Table):
    """The paper's figures for the data set, in per cent."""

    miou: Percent
    share_of_supervised: Percent
    supervised: Percent


class Method(Table):
    """Constants of the method that the released code ties to a data set (docs/data.md)."""

    gamma: Affinity = 0.7  # step 1, PRC: affinities below this are cut
    tau_pseudo_labels: Share = 0.9  # step 4, IOS on pseudo-labels
    tau_segmentation: Share = 0.9  # step 7, IOS on segmentation results


class Description(Table):
    """A whole description, with everything that it takes from its base."""

    title: str = ""
    patch_size: Side
    stride: Side | None = None
    classes: list[ClassEntry] = Field(min_length=1, max_length=250)
    ignore_colours: list[Colour] = Field([], validation_alias=AliasChoices("ignore_colours", "ignore_colors"))
    left_out_of_mean: list[str] = []
    scenes: dict[Split, list[str]] = {}
    layout: Layout | None = None
    rules: Rules = Rules()
    paper: Paper | None = None
    method: Method = Method()

    @model_validator(mode="after")
    def _check_classes(self) -> "Description":
        names = [entry.name for entry in self.classes]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"two classes are called {twice[0]}: every class needs its own name")
        owners: dict[tuple[int, int, int], str] = {}
        colours = [(entry.colour, entry.name) for entry in self.classes]
        for colour, owner in [*colours, *((colour, "ignore_colours") for colour in self.ignore_colours)]:
            if colour in owners:
                raise ValueError(
                    f"{owners[colour]} and {owner} share the colour {list(colour)}: every class needs its own colour"
                )
            owners[colour] = owner
        if not set(self.left_out_of_mean) < set(names):
            raise ValueError(
                f"left_out_of_mean is {', '.join(self.left_out_of_mean)}, but it must name some of the classes and not "
                f"all of them: {', '.join(names)}"
            )
        return self


def read_description(name: str, root: Path) -> Description:
    """Read <root>/datasets/<name>/dataset.toml, or the description of that name which comes with the project.

    `base = "<other>"` takes everything that the file does not give from another description: [method] key by key, the
    rest as a whole, [paper] never. Raises `UserError` for everything that is wrong with a description.
    """
    content, files = _read(name, root, ())
    try:
        return Description.model_validate(content)
    except ValidationError as error:
        sentences = [_sentence(problem, files, _file(name, root)) for problem in error.errors()]
        raise UserError(and_more(sentences, most=3)) from None


def _file(name: str, root: Path) -> Path:
    own, shipped = root / "datasets" / name / "dataset.toml", SHIPPED / f"{name}.toml"
    if own.exists():
        return own
    if shipped.exists():
        return shipped
    own_names = sorted(file.parent.name for file in (root / "datasets").glob("*/dataset.toml"))
    shipped_names = sorted(file.stem for file in SHIPPED.glob("*.toml"))
    close = get_close_matches(name, [*own_names, *shipped_names], 1)
    raise UserError(
        f'there is no data set "{name}"'
        + (f", did you mean {close[0]}? " if close else ". ")
        + (f"Your own: {', '.join(own_names)}. " if own_names else "")
        + f"With the project: {', '.join(shipped_names)}. To describe a new one, write {own} (docs/own_data.md)"
    )


def _read(name: str, root: Path, seen: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Path]]:
    """The content of a description and its bases, and for each key the file that gives its value."""
    if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
        where = f"{_file(seen[-1], root)}: base" if seen else "dataset"
        raise UserError(f'{where} is {_shown(name)}, but the name of a data set has only letters, digits, "_" and "-"')
    file = _file(name, root)
    if name in seen:
        raise UserError(f"{file}: base leads back to itself ({' -> '.join([*seen, name])}): remove one base")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise UserError(f"{file} is not valid TOML in UTF-8 ({error}): correct this place") from None
    base: dict[str, Any] = {}
    files: dict[str, Path] = {}
    if "base" in content:
        base, files = _read(content.pop("base"), root, (*seen, name))
        base.pop("paper", None)  # a derived data set is not the paper's
        if "patch_size" in content:
            base.pop("stride", None)  # the base's stride may exceed our patch size
        if isinstance(content.get("method"), dict) and isinstance(base.get("method"), dict):
            content["method"] = base["method"] | content["method"]
    return base | content, files | dict.fromkeys(content, file)


def _sentence(error: Any, files: dict[str, Path], own: Path) -> str:
    """One of pydantic's errors as file, key, value found and what was expected."""
    parts = [part for part in error["loc"] if part != "[key]"]
    if not parts:  # of the description as a whole
        return f"{own}: {error['ctx']['error']}"
    file, key = files.get(parts[0], own), place(parts)
    if error["type"] == "missing":
        return f"{file}: {key} is missing, add it (docs/own_data.md)"
    if error["type"] == "extra_forbidden" or "[key]" in error["loc"]:
        tables: dict = {"classes": ClassEntry, "layout": Layout, "rules": Rules, "paper": Paper, "method": Method}
        keys = ["base", *Description.model_fields]
        if len(parts) > 1:
            keys = list(SPLITS if "[key]" in error["loc"] else tables[parts[0]].model_fields)
        close = get_close_matches(str(parts[-1]), keys, 1)
        hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(keys)}"
        return f"{file}: there is no key {key}, {hint}"
    return f"{file}: {key} is {_shown(error['input'])}, but {expectation(error)}"


def _shown(value: Any) -> str:
    """A value as TOML writes it, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
