"""A published tokenizer as one fast tokenizer.json with the same ids.

InternLM2 and Phi-3 come as sentencepiece models (`tokenizer.model`) with their added tokens in JSON files, Qwen2 as a
vocabulary and merges. The result needs no remote code and no sentencepiece.

Needs the `convert` extra (sentencepiece, protobuf) for a `tokenizer.model`.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from minimonkey.scripts.importing.config import WRONG_VALUES, one_line, read_json


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MOST_TOKENS = 10**8
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a checkpoint folder holds a tokenizer that can be converted."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def convert_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, bool]:
    """Return the tokenizer of a published checkpoint, and whether its prompts begin with `bos_token`.

    Raises:
        ValueError: No tokenizer, an unknown kind, or an added token whose id changed in the conversion.
    """
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}).")
    settings = _read_settings(folder)
    added = read_added_tokens(folder)
    roles = {}
    if (folder / "tokenizer.json").is_file():
        backend = _read_fast_tokenizer(folder / "tokenizer.json")
        with_bos = backend.encode("a").tokens[:1] == [_content(settings.get("bos_token"))]
    elif (folder / "tokenizer.model").is_file():
        backend, roles = build_from_sentencepiece(folder / "tokenizer.model", added, is_legacy(settings))
        with_bos = settings.get("add_bos_token", True)
    else:
        backend = _read_vocabulary(folder)
        with_bos = False  # a vocabulary with merges is Qwen2's format
    backend.post_processor = processors.Sequence([])  # the chat template writes bos_token
    tokenizer = _wrap(backend, roles, added, settings)
    _check_ids(tokenizer, added)
    return tokenizer, with_bos


def is_legacy(settings: dict) -> bool:
    """Tell whether a space is put before the text after every added token, not only at the very beginning."""
    return settings.get("legacy") is not False


def read_added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Return added tokens by id, from all the places where releases of transformers have kept them."""
    tokens: dict[int, AddedToken] = {}
    for content, index in _read_json(folder / "added_tokens.json").items():
        tokens[_token_id(index)] = AddedToken(content, special=True, normalized=False)
    settings = _read_settings(folder)
    try:
        for index, token in (settings.get("added_tokens_decoder") or {}).items():
            # All are control tokens here, even those that some checkpoints do not mark as special.
            tokens[_token_id(index)] = AddedToken(
                token["content"],
                special=True,
                normalized=token.get("normalized", False),
                lstrip=token.get("lstrip", False),
                rstrip=token.get("rstrip", False),
                single_word=token.get("single_word", False),
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"added_tokens_decoder of {folder / 'tokenizer_config.json'} does not list tokens by id: {error!r}."
        ) from error
    return tokens


def _token_id(index: int | str) -> int:
    number = int(index) if isinstance(index, (int, str)) and str(index).isdecimal() else -1
    if not 0 <= number < MOST_TOKENS:
        raise ValueError(f"An added token has the id {index!r:.40}; ids are whole numbers below {MOST_TOKENS:,}.")
    return number


def build_from_sentencepiece(
    path: Path, added: dict[int, AddedToken], legacy: bool = True
) -> tuple[Tokenizer, dict[str, str]]:
    """Build a `tokenizers` BPE that encodes as sentencepiece does; return it with its bos, eos and unknown tokens.

    Args:
        path: A sentencepiece model of type BPE.
        added: Tokens by id. Where the model has a piece of that id, the token takes its place.
        legacy: See `is_legacy`.

    Raises:
        ValueError: Another type of model, or ids with a gap.
    """
    model = _read_model(path)
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise ValueError(f"{path} is not a BPE model; of sentencepiece models only those are converted.")
    pieces = [piece.piece for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    names = model.SentencePiece
    unknown = kinds.index(names.UNKNOWN)
    for index, token in added.items():
        if index < len(pieces):
            pieces[index] = token.content
    _check_no_gap(path, len(pieces), added)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    scores = {
        piece.piece: piece.score
        for index, piece in enumerate(model.pieces)
        if piece.type == names.NORMAL and index not in added
    }
    mergeable = {piece: index for piece, index in vocabulary.items() if piece in scores}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(mergeable, scores),
            unk_token=pieces[unknown],
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    _imitate_whitespace(tokenizer, model, legacy)
    user_defined = {
        index: AddedToken(pieces[index], special=False, normalized=False)
        for index, kind in enumerate(kinds)
        if kind == names.USER_DEFINED
    }
    control = {
        index: AddedToken(pieces[index], special=True, normalized=False)
        for index, kind in enumerate(kinds)
        if kind in (names.CONTROL, names.UNKNOWN)
    }
    tokenizer.add_tokens([token for _, token in sorted({**user_defined, **control, **added}.items())])
    roles = {"unk_token": pieces[unknown]}
    for role, index in (("bos_token", model.trainer_spec.bos_id), ("eos_token", model.trainer_spec.eos_id)):
        if index >= 0:
            roles[role] = pieces[index]
    return tokenizer, roles


def _imitate_whitespace(tokenizer: Tokenizer, model, legacy: bool) -> None:
    """Imitate a sentencepiece model's normalisation and treatment of spaces."""
    spec = model.normalizer_spec
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if legacy:
        steps += [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
        steps.append(normalizers.Replace(" ", "▁"))
    else:
        scheme = "first" if spec.add_dummy_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    restore = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    restore += [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(restore)


def _read_model(path: Path):
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError("To convert a tokenizer.model: pip install sentencepiece protobuf.") from error
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf raises a class that depends on its backend
        raise ValueError(f"{path} is not a sentencepiece model, or it is damaged: {error}") from error
    return model


def _check_no_gap(path: Path, pieces: int, added: dict[int, AddedToken]) -> None:
    beyond = sorted(index for index in added if index >= pieces)
    if beyond != list(range(pieces, pieces + len(beyond))):
        raise ValueError(f"{path} has {pieces} pieces, but the added tokens behind them have the ids {beyond}.")


def _wrap(backend: Tokenizer, roles: dict[str, str], added: dict[int, AddedToken], settings: dict):
    for role in SPECIAL_ROLES:
        if settings.get(role) is not None:
            roles[role] = _content(settings[role])
    vocabulary = backend.get_vocab(with_added_tokens=True)
    roles = {role: token for role, token in roles.items() if token in vocabulary}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=[
            str(token) for _, token in sorted(added.items()) if str(token) not in roles.values()
        ],
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length", 8192),
        **roles,
    )


def _check_ids(tokenizer: PreTrainedTokenizerFast, added: dict[int, AddedToken]) -> None:
    vocabulary = tokenizer.get_vocab()
    wrong = {
        token.content: (index, vocabulary.get(token.content))
        for index, token in added.items()
        if vocabulary.get(token.content) != index
    }
    if wrong:
        raise ValueError(f"Added tokens changed their ids in conversion (published, now): {wrong}.")


def _read_fast_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path} is not a tokenizer, or it is damaged: {error}") from error


def _read_vocabulary(folder: Path) -> Tokenizer:
    """Read a byte-level BPE from vocab.json and merges.txt."""
    read_json(folder / "vocab.json")
    if not (folder / "merges.txt").is_file():
        raise ValueError(f"{folder} holds vocab.json without merges.txt; download it again.")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
    except (*WRONG_VALUES, OSError, ImportError) as error:
        raise ValueError(f"The tokenizer of {folder} cannot be made of its files: {one_line(error)}") from error


def _read_settings(folder: Path) -> dict:
    """Read the tokenizer_config.json; raises `ValueError` for values of the wrong type."""
    path = folder / "tokenizer_config.json"
    settings = _read_json(path)
    for name in SPECIAL_ROLES:
        token = settings.get(name)
        if token is not None and not isinstance(token.get("content") if isinstance(token, dict) else token, str):
            raise ValueError(f"{path}: {name} must be a token, got {token!r:.80}.")
    kinds = {
        "tokenizer_class": str,
        "auto_map": dict,
        "added_tokens_decoder": dict,
        "legacy": bool,
        "add_bos_token": bool,
    }
    for name, kind in kinds.items():
        if settings.get(name) is not None and not isinstance(settings[name], kind):
            raise ValueError(f"{path}: {name} must be of type {kind.__name__}, got {settings[name]!r:.80}.")
    length = settings.get("model_max_length", 1)
    if isinstance(length, bool) or not isinstance(length, (int, float)) or not length >= 1:
        raise ValueError(f"{path}: model_max_length must be a number of tokens, got {length!r:.80}.")
    return settings


def _content(token: str | dict | None) -> str | None:
    """Return a special token's text; some releases wrote it with its flags."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
