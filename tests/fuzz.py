"""Random damage from a fixed seed: what is read is read, or refused with a sentence.

    python -m tests.fuzz [--seconds 300] [--seed 1] [--only states]

Every kind of input makes good ones, and changes their values or their bytes. A case that ends in
another way than a sentence, or not within a minute, is a failure, and named by kind, seed and
number.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import io
import json
import random
import shutil
import signal
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from mipha.deploy.serve.requests import RequestError

Case = Callable[[], object]
"""One input, made; calling it reads it."""

CASE_SECONDS = 60

_SENTENCES = {ValueError, FileNotFoundError, OSError}

_ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e-320, 1e308, -0.0, 0.5, 1.5),
    *("", " ", "\0", "\ud800", "\u202e", "a" * 50_000, "<image>", "<|im_end|>", "</s>", "null"),
    *([], {}, [[]], [{}], [None], {"": None}, {"type": "text"}, {"url": "x"}, "data:,", "file:///"),
]


# ---- Damage -------------------------------------------------------------------------------------


def change(value: Any, chance: random.Random) -> None:
    """Change, remove or add one value somewhere in a JSON value."""
    while isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and chance.random() < 0.8:
            value = value[key]
            continue
        way = chance.random()
        if way < 0.6:
            value[key] = deepcopy(chance.choice(_ODD))
        elif way < 0.8:
            del value[key]
        elif isinstance(value, list):
            value.extend([value[key]] * chance.choice((1, 5, 70)))
        else:
            value[chance.choice(("text", "image_url", "name", "x", "\ud800"))] = deepcopy(
                chance.choice(_ODD)
            )
        return


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with some of them changed, cut out or doubled."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 20))):
        if not changed:
            break
        place = chance.randrange(len(changed))
        if chance.random() < 0.7:
            place = chance.randrange(min(len(changed), 64))  # headers decide
        length = chance.choice((1, 2, 4, 30))
        way = chance.random()
        if way < 0.5:
            changed[place : place + 1] = bytes([chance.choice((0, 1, 127, 128, 255))])
        elif way < 0.75:
            del changed[place : place + length]
        else:
            changed[place:place] = changed[place : place + length] * chance.choice((1, 50))
    return bytes(changed)


def spoil(path: Path, chance: random.Random) -> None:
    """Damage a file: a value of its JSON, or bytes."""
    data = path.read_bytes()
    content: Any = None
    if path.suffix == ".json" and chance.random() < 0.7:
        with contextlib.suppress(ValueError):  # it is damaged already
            content = json.loads(data)
    if content is not None:
        for _ in range(chance.choice((1, 1, 2))):
            change(content, chance)
        path.write_text(json.dumps(content))
    elif chance.random() < 0.1:
        path.write_bytes(data[: chance.randrange(len(data) + 1)])
    else:
        path.write_bytes(damaged(data, chance))


# ---- The kinds of input -------------------------------------------------------------------------


def requests(seed: int, folder: Path) -> Iterator[Case]:
    """Chat requests, as the server reads them."""
    from mipha.deploy.serve.requests import Limits
    from tests.deploy.serve import fuzz
    from tests.deploy.serve.reading import read_chat_request

    limits = Limits(max_pixels=1_000_000)
    for body in fuzz.requests(seed):
        yield lambda body=body: asyncio.run(read_chat_request(body, limits))


def images(seed: int, folder: Path) -> Iterator[Case]:
    """Image files, as training reads them."""
    from mipha.data.images import open_image
    from tests.deploy.serve.fuzz import image

    chance = random.Random(seed)
    while True:
        (folder / "image").write_bytes(image(chance))
        yield lambda: open_image(folder / "image", max_pixels=1_000_000)


def data(seed: int, folder: Path) -> Iterator[Case]:
    """Rows of records, in tars, JSON lines, JSON and tables."""
    from mipha.data.dataset import data_recipe, load_data
    from tests.deploy.serve.fuzz import image

    def read(file: Path) -> None:
        rows = load_data(data_recipe(str(file)))
        for record in rows.records:
            with refusals():
                rows.to_sample(record.read() if hasattr(record, "read") else record)

    chance = random.Random(seed)
    while True:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "a.png").write_bytes(image(chance))
        file = folder / f"rows{chance.choice(('.tar', '.jsonl', '.json', '.csv', '.tsv'))}"
        file.write_bytes(_rows(file.suffix, chance, (folder / "a.png").read_bytes()))
        if chance.random() < 0.7:
            file.write_bytes(damaged(file.read_bytes(), chance))
        yield lambda file=file: read(file)


def recipes(seed: int, folder: Path) -> Iterator[Case]:
    """Recipes and overrides."""
    from mipha.alignment.recipe import list_alignment_recipes, load_alignment_recipe
    from mipha.recipe import list_recipes, load_recipe
    from mipha.studies.study import list_studies, load_study

    kinds = [
        *((load_recipe, load_recipe(name).dump()) for name in list_recipes()),
        *(
            (load_alignment_recipe, load_alignment_recipe(n).dump())
            for n in list_alignment_recipes()
        ),
        *((load_study, load_study(name).dump()) for name in list_studies()),
    ]
    chance, file = random.Random(seed), folder / "mine.yaml"
    while True:
        read, text = chance.choice(kinds)
        if chance.random() < 0.7:
            tree = yaml.safe_load(text)
            for _ in range(chance.choice((1, 1, 2, 4))):
                change(tree, chance)
            file.write_bytes(yaml.safe_dump(tree).encode("utf-8", "surrogatepass"))
        else:
            file.write_bytes(damaged(text.encode(), chance))
        yield lambda read=read: read(file)


def states(seed: int, folder: Path) -> Iterator[Case]:
    """Training states: damaged, or made by somebody who sealed what he changed."""
    import torch

    from mipha.engine.states import StateWriter, load_state, load_tensors, save_tensors, seal_state
    from mipha.world import World

    # Two good states of a small model.
    world = World(0, 1, torch.device("cpu"))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    writer = StateWriter(folder / "good", world)
    for step in (1, 2):
        writer.save(step, model, optimizer, {"seed": 1})
    named = dict(model.named_parameters())
    save_tensors(folder / "named" / "checkpoint-1", named, optimizer, {})

    chance = random.Random(seed)
    while True:
        shutil.rmtree(folder / "states", ignore_errors=True)
        kind = chance.choice(("good", "good", "named"))
        shutil.copytree(folder / kind, folder / "states")
        state = max((folder / "states").iterdir())
        for _ in range(chance.choice((1, 1, 3))):
            spoil(chance.choice(sorted(path for path in state.iterdir())), chance)
        if chance.random() < 0.7:
            seal_state(state)
        if kind == "good":
            yield lambda: load_state(folder / "states", model, optimizer, world)
        else:
            yield lambda: load_tensors(folder / "states", named, optimizer)


def models(seed: int, folder: Path) -> Iterator[Case]:
    """Model folders, as every verb opens them: the gate, then weights, processor and an answer."""
    from mipha.assistant import load

    _save_model(folder)
    chance, spoiled = random.Random(seed), folder / "model"
    while True:
        shutil.rmtree(spoiled, ignore_errors=True)
        shutil.copytree(folder / "good", spoiled)
        small = [path for path in sorted(spoiled.iterdir()) if path.suffix != ".safetensors"]
        weights = spoiled / "model.safetensors"
        spoil(weights if chance.random() < 0.2 else chance.choice(small), chance)
        yield lambda: load(spoiled, "cpu").answer(None, "Which?", max_new_tokens=2)


def adapters(seed: int, folder: Path) -> Iterator[Case]:
    """Adapters over a good model."""
    import torch

    from mipha.assistant import load
    from mipha.models.adapters import save_adapter
    from mipha.models.tuning import apply_tuning
    from mipha.recipe import LoraRecipe, TuningRecipe

    model = _save_model(folder)
    lora = LoraRecipe(rank=4, alpha=8, dropout=0.0)
    frozen = {"vision_tower": "frozen", "projector": "frozen"}
    apply_tuning(model, TuningRecipe(**frozen, language_model="lora", lora=lora))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    weights = dict(model.named_parameters())
    save_adapter(model, weights, [], folder / "good", folder / "adapter")

    chance, spoiled = random.Random(seed), folder / "spoiled"
    while True:
        shutil.rmtree(spoiled, ignore_errors=True)
        shutil.copytree(folder / "adapter", spoiled)
        for _ in range(chance.choice((1, 1, 2))):
            spoil(
                chance.choice([*sorted(spoiled.iterdir()), spoiled / "adapter_config.json"]), chance
            )
        yield lambda: load(folder / "good", "cpu", adapter=spoiled).answer(
            None, "Which?", max_new_tokens=2
        )


def _save_model(folder: Path) -> Any:
    """Save a tiny model in `good/`, and return it."""
    import torch

    from mipha.models.build import build, save_checkpoint
    from tests.conftest import TinyParts, _save_language_model, _save_tower

    _save_language_model(folder / "language_model", "llama", 512)
    _save_tower(folder / "tower", "siglip")
    torch.manual_seed(0)
    model, processor = build(TinyParts(folder / "tower", folder / "language_model").recipe())
    save_checkpoint(model, processor, folder / "good")
    return model


KINDS: dict[str, Callable[[int, Path], Iterator[Case]]] = {
    kind.__name__: kind for kind in (requests, images, data, recipes, states, models, adapters)
}


def _rows(suffix: str, chance: random.Random, image: bytes) -> bytes:
    """Return a file with a few records, some of them changed."""
    records: list[dict[str, Any]] = []
    for number in range(chance.randint(1, 4)):
        turns = [("user", f"<image>\nWhat {number}?"), ("assistant", "This.")]
        messages = [{"role": role, "content": text} for role, text in turns]
        records.append({"messages": messages, "images": ["a.png"]})
        if chance.random() < 0.5:
            change(records[-1], chance)

    written = io.BytesIO()
    if suffix == ".tar":
        with tarfile.open(fileobj=written, mode="w") as tar:
            for number, record in enumerate(records):
                for kind, content in (("json", json.dumps(record).encode()), ("png", image)):
                    member = tarfile.TarInfo(f"{number:04}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    elif suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        lines = [mark.join(("image", "question", "answer"))]
        lines += [mark.join(("a.png", json.dumps(record)[:30], "yes")) for record in records]
        written.write("\n".join(lines).encode())
    elif suffix == ".json":
        written.write(json.dumps(records).encode())
    else:
        written.write("\n".join(map(json.dumps, records)).encode())
    return written.getvalue()


# ---- Running them -------------------------------------------------------------------------------


@contextlib.contextmanager
def refusals() -> Iterator[list[str]]:
    """Take an error that is a sentence; the list holds its class then."""
    refused: list[str] = []
    try:
        yield refused
    except Exception as error:
        sentence, known = str(error), type(error)
        if known not in _SENTENCES and not known.__module__.startswith("mipha."):
            raise
        assert 15 < len(sentence) < 3_000, sentence
        assert known is not RequestError or sentence.isprintable(), sentence
        refused.append(known.__name__)


def run(kind: str, seed: int, seconds: float, most: int | None = None) -> Counter[str]:
    """Read random inputs of a kind, and count how each ended.

    Raises:
        AssertionError: One ended otherwise than with a sentence; names it.
    """
    ends: Counter[str] = Counter()
    until = None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        for number, case in enumerate(KINDS[kind](seed, Path(folder))):
            until = until or time.monotonic() + seconds  # after what the first one needed
            if time.monotonic() > until or number == most:
                break
            before = signal.signal(signal.SIGALRM, _took_too_long)
            signal.alarm(CASE_SECONDS)
            try:
                with refusals() as refused:
                    case()
            except Exception as error:
                raise AssertionError(f"{kind}, seed {seed}, case {number}: {error!r}") from error
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)
            ends["".join(refused) or "read"] += 1
    return ends


def _took_too_long(*_: object) -> None:
    raise TimeoutError(f"not read within {CASE_SECONDS} seconds")


def main() -> None:
    """Read random inputs of each kind for the same time, and print how they ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=list(KINDS))
    options = parser.parse_args()

    # A crash of the process, and a case that no signal reaches, end with a traceback.
    faulthandler.enable()
    kinds = [options.only] if options.only else list(KINDS)
    for kind in kinds:
        print(f"{kind}:", end=" ", flush=True)
        faulthandler.dump_traceback_later(options.seconds + 3 * CASE_SECONDS, exit=True)
        ends = run(kind, options.seed, options.seconds / len(kinds))
        print(f"{ends.total()} inputs, {dict(ends.most_common())}", flush=True)


if __name__ == "__main__":
    main()
