"""Tokenizer files that programs of other people read, whatever release of transformers they have."""

import json
from pathlib import Path

from tokenizers import processors


BOS_IN_TEMPLATE = "{{ bos_token }}"
# Names and forms that only newer releases know.
NEW_SETTINGS = ("backend", "extra_special_tokens", "processor_class", "is_local", "local_files_only", "auto_map")


def save_tokenizer(tokenizer, chat_template: str, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, added tokens listed by id and the chat template among them.

    Where prompts begin with `bos_token`, the tokenizer adds it too, as the published ones do: that is how programs with
    templates of their own know of it.
    """
    with_bos = BOS_IN_TEMPLATE in chat_template
    tokenizer.save_pretrained(folder)
    settings_path = folder / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in NEW_SETTINGS}
    roles = {settings.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
    added = {str(index): token for index, token in sorted(tokenizer.added_tokens_decoder.items())}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": with_bos,
        "additional_special_tokens": [
            token.content for token in added.values() if token.special and token.content not in roles
        ],
        "added_tokens_decoder": {index: _flags(token) for index, token in added.items()},
        "chat_template": chat_template,
    }
    settings_path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if with_bos:
        path = folder / "tokenizer.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        bos = tokenizer.bos_token
        adds_bos = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        state["post_processor"] = json.loads(adds_bos.__getstate__())
        path.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def _flags(token) -> dict:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}
