"""What lies beside the GGUF files for people and for Ollama: Modelfile and README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import LlavaConfig, PreTrainedTokenizerBase

from mipha.deploy.gguf.language_model import family_of
from mipha.deploy.parts import Part

_SYSTEM, _ASKED, _ANSWERED, _ASKED_AGAIN = (
    "\ue000",
    "\ue001",
    "\ue002",
    "\ue003",
)  # letters of no language, to find what stands between


def modelfile(
    model: str,
    mmproj: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    ends: list[int],
    parts: Sequence[Part],
) -> str:
    """Ollama's description of the model.

    Args:
        model: File of the language model.
        mmproj: File of tower and projector.
        template: The checkpoint's chat template, from which Ollama's is read off.
        ends: Tokens that end generation.
        parts: Whose licences are named.

    Source: Ollama `docs/modelfile.md` and `docs/template.md`; `server/prompt.go` for `[img-0]`, which it writes right before the
        words of a message with a picture.
    """
    stops = tokenizer.convert_ids_to_tokens(ends)
    lines = [
        f"FROM ./{model}",
        f"FROM ./{mmproj}",
        f'TEMPLATE """{_go_template(tokenizer, template)}"""',
        "PARAMETER temperature 0",
    ]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append(f'LICENSE """{_licences(parts)}"""')
    return "\n".join(lines) + "\n"


def _go_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The chat template in Go's language, from what the checkpoint's own writes between words."""

    def between(turns: list[tuple[str, str]]) -> list[str]:
        messages = [{"role": role, "content": text} for role, text in turns]
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        pieces = []
        for _, word in turns:
            piece, text = text.split(word, 1)
            pieces.append(piece)
        return [*pieces, text]

    first, to_answer, to_question, prompt = between(
        [("user", _ASKED), ("assistant", _ANSWERED), ("user", _ASKED_AGAIN)]
    )
    try:
        system, after_system, _ = between([("system", _SYSTEM), ("user", _ASKED)])
        system += "{{ .Content }}"
    except TemplateError:  # some templates want no system turn: left out
        system, after_system = "", first
    image = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _ASKED}]}],
        chat_template=template,
        tokenize=False,
    )
    after_image = image.split(_ASKED)[0].rpartition("<image>")[2]
    bos = tokenizer.bos_token
    if bos and tokenizer("a").input_ids[:1] == [
        tokenizer.bos_token_id
    ]:  # Ollama begins with it of its own accord
        first, system, after_system = (
            first.removeprefix(bos),
            system.removeprefix(bos),
            after_system.removeprefix(bos),
        )
    words = (
        '{{ if and (ge (len .Content) 7) (eq (slice .Content 0 5) "[img-") }}{{ slice .Content 0 7 }}'
        f"{after_image}{{{{ slice .Content 7 }}}}{{{{ else }}}}{{{{ .Content }}}}{{{{ end }}}}"
    )
    return (
        '{{ $last := "" }}{{ range .Messages }}'
        f'{{{{ if eq .Role "system" }}}}{system}'
        f'{{{{ else if eq .Role "user" }}}}{{{{ if eq $last "" }}}}{first}{{{{ else if eq $last "system" }}}}{after_system}'
        f"{{{{ else }}}}{to_question}{{{{ end }}}}{words}{prompt}"
        f"{{{{ else }}}}{to_answer.removeprefix(prompt)}{{{{ .Content }}}}{{{{ end }}}}{{{{ $last = .Role }}}}{{{{ end }}}}"
    )


def readme(
    name: str,
    models: Sequence[str],
    mmproj: str,
    config: LlavaConfig,
    processor: Mapping[str, Any],
    parts: Sequence[Part],
) -> str:
    """How to run the files, and what differs from the checkpoint."""
    image = processor["image_processor"]
    colour = tuple(int(255 * mean) for mean in image["image_mean"])
    own = (
        f"pads it to a square with the colour {colour}, then scales it"
        if image.get("do_pad")
        else "squashes it"
    )
    differs = [
        "A square picture is scaled by llama.cpp as by the checkpoint (Pillow's bicubic rule; seen in b11549). Another shape "
        f"llama.cpp scales first and pads then, with the colour (122, 116, 104); the checkpoint {own}. "
        "Give pictures that are prepared so, and nothing differs.",
        "The projector's GELU is computed by its tanh form, from a table in 16 bits, as every GELU in llama.cpp.",
    ]
    if config.vision_config.model_type.startswith("clip"):
        differs.append(
            "llama.cpp's LLaVA puts CLIP's class token behind the patches, then leaves out the first in the belief that it is this token "
            "(issue 25814): the first patch of a picture, in the corner, is missing, and the class token stands behind the last. "
            "The other patches are right, here also their positions. Builds with its pull request 25844 lack nothing."
        )
    if family_of(config.text_config).scales_images:
        differs.append(
            "llama.cpp multiplies image features by the root of the language model's width, as it does words; the projector's last layer "
            "is divided by it, so that nothing differs."
        )
    files = "\n".join(
        f"- `{model}`: the language model, with its tokenizer and chat template" for model in models
    )
    return f"""# {name}

A multimodal small language model for llama.cpp and Ollama, exported by mipha.

{files}
- `{mmproj}`: the vision tower and the projector, for any of the language models
- `Modelfile`: for Ollama

## Use

```
llama-server -m {models[0]} --mmproj {mmproj} --jinja
llama-mtmd-cli -m {models[0]} --mmproj {mmproj} --jinja --image picture.jpg -p "What is in the picture?" --temp 0
ollama create {name.lower()} -f Modelfile
```

## What differs from the checkpoint

{chr(10).join(f"- {line}" for line in differs)}

## Licence

{_licences(parts)}
"""


def _licences(parts: Sequence[Part]) -> str:
    return "; ".join(f"{part.role} ({part.name}): {part.licence or 'not known'}" for part in parts)
