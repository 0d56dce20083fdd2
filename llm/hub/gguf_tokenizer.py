"""What the metadata of a GGUF file say about text: its tokenizer, its end tokens and its chat templates."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llm.hub.gguf import GGUFFile, find_gguf
from llm.hub.tables import PretrainedError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
DIGITS = r"\p{N}{1,3}"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTERS, CLITICS = r"\p{Lm}\p{Lo}\p{M}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
CASED = (  # a word ends where a capital letter begins another
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]*[\p{{Ll}}{LETTERS}]+{CLITICS}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]+[\p{{Ll}}{LETTERS}]*{CLITICS}|"
    rf"{DIGITS}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "lfm2")
"""Rules that keep a word whole where it is a token, and begin a text with the token of beginnings."""
SPLITS = {
    **dict.fromkeys((*LLAMA3, "dbrx", "smaug-bpe"), WORDS.replace("DIGITS", DIGITS)),
    "qwen2": WORDS.replace("DIGITS", r"\p{N}"),
    "gpt-4o": CASED,
}
GPT2 = ("default", "gpt-2", "olmo", "mpt", "phi-2")
"""Rules that split as GPT-2 does."""
UNKNOWN, SPECIAL, USER_DEFINED = 2, 3, 4  # kinds of tokens that are found where a text holds them written out


def gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer of the metadata: byte-level BPE or sentencepiece's BPE. It begins a text as the file says."""
    kind = file.get("tokenizer.ggml.model")
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    if kind not in ("gpt2", "llama"):
        raise PretrainedError(f"{file.path} has a tokenizer of kind {kind!r}: gpt2 and llama are read")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = byte_level(file, vocabulary) if kind == "gpt2" else sentencepiece(file, vocabulary)
    for token, its_type in zip(tokens, types, strict=True):
        if its_type in (UNKNOWN, SPECIAL):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        elif its_type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    bos = file.get("tokenizer.ggml.bos_token_id")
    usual = kind == "llama" or file.get("tokenizer.ggml.pre") in LLAMA3
    begins = file.get("tokenizer.ggml.add_bos_token", usual) and bos is not None
    special = [(tokens[bos], bos)] if begins else []
    first = f"{tokens[bos]} $A" if begins else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(first, special_tokens=special)
    return tokenizer


def gguf_chat_templates(file: GGUFFile) -> dict[str, str]:
    """The chat templates of the metadata by name."""
    prefix = "tokenizer.chat_template."
    named = {name.removeprefix(prefix): file.get(name) for name in file.fields if name.startswith(prefix)}
    default = file.get("tokenizer.chat_template")
    return named if default is None else named | {"default": default}


def gguf_special_tokens(file: GGUFFile) -> dict[str, str]:
    """The texts of the special tokens that have a name, such as `bos_token`."""
    tokens, names = file.get("tokenizer.ggml.tokens"), {"unk": "unknown", "sep": "seperator", "pad": "padding"}
    kinds = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    numbers = {kind: file.get(f"tokenizer.ggml.{names.get(kind, kind)}_token_id") for kind in kinds}
    return {f"{kind}_token": tokens[number] for kind, number in numbers.items() if number is not None}


def byte_level(file: GGUFFile, vocabulary: Mapping[str, int]) -> Tokenizer:
    pre = file.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(dict(vocabulary), merges, ignore_merges=pre in LLAMA3))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre in SPLITS:
        steps = [pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"), bytes_only]
    elif pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre in GPT2:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        known = ", ".join((*SPLITS, "smollm", *GPT2))
        raise PretrainedError(f"{file.path} splits text by the rule {pre!r}: known are {known}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(file: GGUFFile, vocabulary: Mapping[str, int]) -> Tokenizer:
    """sentencepiece merges the pair whose token has the best score, so the scores order the merges.

    As in llama.cpp, a space comes before a text and after each special token unless the metadata say otherwise, even
    where there is one. (transformers 5.23 goes by the architecture, and does not double it.)
    """
    scores = file.get("tokenizer.ggml.scores")
    merges = [
        (-scores[i], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, i in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    unknown = next((token for token in ("<unk>",) if token in vocabulary), None)
    tokenizer = Tokenizer(models.BPE(dict(vocabulary), pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    first = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def gguf_stop_tokens(path: Path) -> tuple[int, ...]:
    """The tokens that end a text, or a turn of a chat, of a GGUF file; none where `path` is no such file."""
    if (found := find_gguf(path)) is None:
        return ()
    file = GGUFFile(found)
    ends = (file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return tuple(end for end in ends if end is not None)
