"""The data recipe: two emoji sets from public packages, as one folder of images with a metadata row each.

    npm @iconify-json/noto 1.2.9            style "noto"          Apache-2.0    Google's Noto Emoji
    npm @lobehub/fluent-emoji-3d 1.1.0      style "3d"            MIT           Microsoft's Fluent Emoji, repackaged
    npm emojibase-data 17.0.0               names, tags, groups   MIT

``images/*.png`` are 64 x 64 RGB on white, cropped to their content with an equal margin. ``metadata.jsonl`` has one
row per image, its licence included (harness/tasks/train/folder.py). All emoji train the VAE; rows with ``vocabulary``
true are the distinctive ones that the denoiser learns. The images are not in the repository: this recipe builds them.
"""

import io
import json
import logging
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from harness.config.train import DataConfig
from harness.tasks.train.folder import CaptionedImage

log = logging.getLogger(__name__)

PACKAGES = ("@iconify-json/noto@1.2.9", "@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")
LICENCES = {"noto": "Apache-2.0", "3d": "MIT"}
STYLES = tuple(LICENCES)

# Emojibase groups from which the vocabulary is filled: no people, components, symbols or flags.
GROUPS = frozenset({0, 3, 4, 5, 6, 7})
# Emojibase subgroups left out: faces, cats and hearts that differ only in mood or colour (4 to 15), weather, sports,
# computers, mail, writing and locks; the popular list has the distinctive ones of these.
SUBGROUPS_OUT = frozenset({4, 5, 6, 9, 10, 12, 14, 15, 59, 62, 70, 74, 75, 77})
# Always selected: the emoji that people try first.
POPULAR = frozenset(
    """
    grinning face|face with tears of joy|smiling face with heart-eyes|smiling face with sunglasses|winking face
    |crying face|enraged face|thinking face|sleeping face|face with medical mask|exploding head|cowboy hat face
    |partying face|cold face|smiling face with halo|smiling face with horns|clown face|alien|ghost|robot|skull
    |pile of poo|see-no-evil monkey|jack-o-lantern|red heart|blue heart|green heart|collision|hundred points
    |thumbs up|waving hand|victory hand|folded hands|eyes|brain|Santa Claus|mermaid|astronaut|cat face|dog face
    |fox|lion|tiger face|unicorn|cow face|pig face|rabbit face|bear|panda|koala|frog|monkey face|mouse face
    |elephant|giraffe|chicken|penguin|owl|parrot|flamingo|turtle|snake|dragon|T-Rex|whale|dolphin|tropical fish
    |shark|octopus|crab|snail|butterfly|honeybee|lady beetle|spider|paw prints|rose|sunflower|tulip
    |cherry blossom|bouquet|deciduous tree|evergreen tree|palm tree|cactus|four leaf clover|maple leaf|mushroom
    |red apple|green apple|banana|grapes|watermelon|lemon|tangerine|strawberry|cherries|pineapple|peach|avocado
    |tomato|eggplant|carrot|ear of corn|broccoli|bread|croissant|pretzel|cheese wedge|hamburger|french fries
    |pizza|hot dog|taco|cooking|popcorn|sushi|rice ball|ice cream|doughnut|cookie|birthday cake|cupcake|lollipop
    |chocolate bar|hot beverage|wine glass|beer mug|bubble tea|volcano|desert island|house|castle|church|tent
    |rainbow|sun|crescent moon|star|ringed planet|cloud|cloud with rain|high voltage|snowflake|snowman|fire
    |droplet|water wave|cyclone|globe showing Americas|ferris wheel|locomotive|bus|ambulance|fire engine
    |police car|taxi|automobile|tractor|bicycle|sailboat|ship|anchor|airplane|helicopter|rocket|flying saucer
    |stop sign|vertical traffic light|hourglass done|alarm clock|umbrella|Christmas tree|balloon|party popper
    |wrapped gift|trophy|soccer ball|basketball|american football|tennis|bowling|bullseye|pool 8 ball|video game
    |game die|puzzle piece|teddy bear|artist palette|glasses|necktie|t-shirt|jeans|dress|backpack|running shoe
    |high-heeled shoe|crown|top hat|graduation cap|ring|gem stone|bell|musical note|headphone|guitar|trumpet
    |violin|drum|mobile phone|telephone|battery|laptop|television|camera|light bulb|candle|open book|books
    |money bag|credit card|envelope|package|pencil|calendar|pushpin|paperclip|scissors|locked|key|hammer|axe
    |bomb|shield|wrench|gear|magnet|microscope|syringe|pill|door|toilet|fire extinguisher|shopping cart|moai
    |radioactive|yin yang|recycling symbol|check mark button|cross mark
    """.replace("\n", "")
    .replace("    ", "")
    .split("|")
)


@dataclass(frozen=True)
class EmojiSource:
    """One emoji as the packages describe it.

    Attributes:
        code: Unicode code points, joined by hyphens.
        name: Name in lower case.
        tags: Tags in lower case.
        eligible: Whether the vocabulary may include it.
        artwork: SVG text or WebP bytes by style.
    """

    code: str
    name: str
    tags: tuple[str, ...]
    eligible: bool
    artwork: dict[str, bytes]


def build(config: DataConfig) -> None:
    """Build the data folder if it is missing; this takes about a minute on two cores.

    Args:
        config: Folder, image size and size of the vocabulary.

    Raises:
        RuntimeError: npm is needed and failed.
    """
    folder = Path(config.folder)
    if (folder / "metadata.jsonl").exists():
        return
    packages = Path(config.packages)
    fetch(packages)
    items = list(sources(packages / "node_modules"))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    jobs = [(item.artwork[style], style, config.size, config.margin) for item in items for style in STYLES]
    with ProcessPoolExecutor() as pool:
        rendered = np.stack(list(pool.map(_render, jobs, chunksize=32)))
    both = rendered.reshape(len(items), len(STYLES), config.size, config.size, 3)
    chosen = select(items, both, config.vocabulary)
    rows = []
    for item, pair in zip(items, both, strict=True):
        for style, image in zip(STYLES, pair, strict=True):
            file_name = f"images/{item.code}-{style}.png"
            Image.fromarray(image).save(folder / file_name)
            caption = f"{item.name}, {style}"
            rows.append(
                CaptionedImage(file_name, item.name, style, item.tags, caption, LICENCES[style], item.name in chosen)
            )
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    log.info("%d images of %d emoji in %s, %d names in the vocabulary", len(rows), len(items), folder, len(chosen))


def fetch(packages: Path) -> None:
    """Install the three packages with npm if they are missing.

    Args:
        packages: Folder to install into.

    Raises:
        RuntimeError: npm failed.
    """
    if (packages / "node_modules" / "emojibase-data").exists():
        return
    packages.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(packages), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"npm install failed; install {PACKAGES} into {packages} by hand: {done.stderr.strip()[-500:]}"
        )


def sources(modules: Path) -> Iterator[EmojiSource]:
    """Yield every emoji that both sets contain, in Unicode order.

    Codes are compared without U+FE0F, on which the sets disagree.

    Args:
        modules: The node_modules folder of the packages.

    Yields:
        The emoji.
    """
    noto = json.loads((modules / "@iconify-json/noto/icons.json").read_text(encoding="utf-8"))
    chars = json.loads((modules / "@iconify-json/noto/chars.json").read_text(encoding="utf-8"))
    icons = {_normalize_code(code): icon for code, icon in chars.items()}
    fluent = {_normalize_code(path.stem): path for path in (modules / "@lobehub/fluent-emoji-3d/assets").glob("*.webp")}
    table = json.loads((modules / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    for row in sorted(table, key=lambda row: row.get("order", 0)):
        code = _normalize_code(row["hexcode"])
        if "group" not in row or code not in icons or code not in fluent:
            continue
        icon = noto["icons"].get(icons[code])
        if icon is None:
            continue
        size = (icon.get("width", noto["width"]), icon.get("height", noto["height"]))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}">{icon["body"]}</svg>'
        name = row["label"]
        eligible = name in POPULAR or (row["group"] in GROUPS and row["subgroup"] not in SUBGROUPS_OUT)
        yield EmojiSource(
            code=code,
            name=name.lower(),
            tags=tuple(tag.lower() for tag in row.get("tags", [])),
            eligible=eligible,
            artwork={"noto": svg.encode(), "3d": fluent[code].read_bytes()},
        )


def select(items: list[EmojiSource], rendered: np.ndarray, count: int) -> set[str]:
    """Select distinctive names: the popular ones, then farthest-point sampling over the eligible rest.

    The distance is Euclidean in 64 principal components of 16 x 16 pixels, both styles side by side. An emoji is thus
    selected only if it looks unlike all those before it in the two styles together.

    Args:
        items: All emoji.
        rendered: Images of the emoji, uint8 (N, styles, H, W, 3).
        count: Number of names to select.

    Returns:
        The selected names.
    """
    x = rendered.reshape(*rendered.shape[:2], 16, rendered.shape[2] // 16, 16, rendered.shape[3] // 16, 3).mean(
        axis=(3, 5)
    )
    x = x.reshape(len(items), -1) / 255.0
    x -= x.mean(axis=0)
    _, _, components = np.linalg.svd(x, full_matrices=False)
    z = x @ components[:64].T
    popular = {name.lower() for name in POPULAR}
    chosen = [i for i, item in enumerate(items) if item.name in popular][:count]
    open_ = np.array([item.eligible for item in items])
    nearest = (
        np.min([np.linalg.norm(z - z[i], axis=1) for i in chosen], axis=0) if chosen else np.full(len(items), np.inf)
    )
    while len(chosen) < min(count, int(open_.sum())):
        best = int(np.argmax(np.where(open_, nearest, -1.0)))
        chosen.append(best)
        nearest = np.minimum(nearest, np.linalg.norm(z - z[best], axis=1))
    return {items[i].name for i in chosen}


def _render(job: tuple[bytes, str, int, float]) -> np.ndarray:
    """Render an emoji to uint8 (size, size, 3): cropped to its content and centred with ``margin`` on white."""
    data, style, size, margin = job
    if style == "noto":
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=4 * size, height=4 * size))
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox() or (0, 0, *image.size)
    image = image.crop(box)
    side = round(max(image.size) / (1.0 - 2.0 * margin))
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def _normalize_code(code: str) -> str:
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")
