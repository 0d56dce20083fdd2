"""Trained models out: a folder that `transformers.AutoModelForCausalLM` and `AutoTokenizer` open.

    export_pretrained(model, "out/", tokenizer="data/tinystories/tokenizer-bpe.json")
    export_pretrained(model, "out/", tokenizer="path/to/checkpoint/tokenizer.json")    # of a folder as the hub has it

The tables in llm/hub/maps/ are applied backwards. The folder is written whole or not at all.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors

from llm.data.files import load_tokenizer
from llm.data.stories import END_OF_TEXT
from llm.files import replacing_folder
from llm.hub.chat_template import CHAT_TEMPLATE, MORE_TEMPLATES
from llm.hub.folder import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    is_hub_folder,
    load_hub_tokenizer,
    read_json,
)
from llm.hub.maps import PUBLISHED
from llm.hub.tables import PretrainedError, Published, parts, plan, write_config
from llm.models import MODELS
from llm.models.transformer import Transformer

SHARD_BYTES = 5_000_000_000
PADDING = {"padding_side": "left"}  # new tokens come on the right; tokenizers of transformers pad there by themselves
ABOUT_TEXT = (TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, "special_tokens_map.json", CHAT_TEMPLATE)


def export_pretrained(
    model: Transformer, out: str | Path, tokenizer: Tokenizer | str | Path | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write `out`, a folder that `transformers.AutoModelForCausalLM` and `AutoTokenizer` open; all or nothing.

    If the tokenizer is given as the tokenizer.json of a hub folder, that folder's other files about the beginning and
    the end of a text are copied, too. Raises PretrainedError where no class of transformers computes the same as the
    model, where transformers refuses its sizes, and where `out` is not empty, or another process fills it meanwhile.
    """
    out, published = Path(out), PUBLISHED.get(type(model))
    if published is None:
        able = ", ".join(name for name, Model in MODELS.items() if Model in PUBLISHED)
        raise PretrainedError(
            f"no class of transformers can hold a {type(model).__name__}; the models that can be exported are {able}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PretrainedError(f"{out} exists and is not an empty folder: remove it or choose another")
    config = write_config(published, model.config) | {"dtype": str(model.tok_embed.weight.dtype).removeprefix("torch.")}
    source = None
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        source = Path(tokenizer).parent if is_hub_tokenizer(Path(tokenizer)) else None
        tokenizer = load_hub_tokenizer(source) if source else load_tokenizer(tokenizer)
    try:
        with replacing_folder(out) as folder:
            if source:
                copy_tokenizer(folder, source, config)
            else:
                write_tokenizer(folder, tokenizer, config, model.config.max_seq_len)
            write_weights(folder, model, published, shard_bytes)
    except (OSError, SafetensorError) as error:
        raise PretrainedError(f"cannot write {out}: {error}") from error
    return out


def is_hub_tokenizer(path: Path) -> bool:
    return path.name == TOKENIZER and is_hub_folder(path.parent)


def copy_tokenizer(folder: Path, source: Path, config: dict[str, Any]) -> None:
    """Write config.json with the token ids of the hub folder `source`, and copy its files about text: its vocabulary,
    the tokens that begin and end a text, their names, and how a chat is written. They stay as they are, but where the
    source does not say on which side a batch is padded, that is now said."""
    ids = {name: value for name, value in read_json(source / CONFIG).items() if name.endswith("_token_id")}
    write_json(folder / CONFIG, config | ids)
    for name in ABOUT_TEXT:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, folder / MORE_TEMPLATES)
    write_json(folder / TOKENIZER_CONFIG, PADDING | read_json(source / TOKENIZER_CONFIG, optional=True))


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None, config: dict[str, Any], max_seq_len: int) -> None:
    """Write config.json and the tokenizer, both with the ids that begin and end a text: null without a tokenizer.

    In training a model here has `<|endoftext|>` before each text, so the exported tokenizer puts it there.
    """
    end = None if tokenizer is None else tokenizer.token_to_id(END_OF_TEXT)
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    write_json(folder / CONFIG, config | special)
    write_json(folder / GENERATION_CONFIG, special)
    if tokenizer is None:
        return
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    if tokenizer.post_processor is None and end is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end)]
        )
    tokenizer.save(str(folder / TOKENIZER))
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), None if end is None else END_OF_TEXT)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len}
    write_json(folder / TOKENIZER_CONFIG, settings | names | PADDING | {"clean_up_tokenization_spaces": False})


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def write_weights(folder: Path, model: Transformer, published: Published, shard_bytes: int) -> None:
    """Write their tensors into one file, or into several of about `shard_bytes` with an index."""
    tensors, shards, total = model.state_dict(), [{}], 0
    for step in plan(published.rows(model.config), tensors):
        ours = step.operation.save([part.cpu() for part in parts(tensors, step)])
        for name, tensor in zip(step.theirs, ours, strict=True):
            if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + tensor.nbytes > shard_bytes:
                shards.append({})
            shards[-1][name] = tensor.contiguous()
            total += tensor.nbytes
    names = [WEIGHTS] if len(shards) == 1 else [shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"
