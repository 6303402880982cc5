"""The tokenizer of MiniMonkey-Nano: one token a byte, the special tokens of the InternLM2 family after them.

Reading is spelling, so a word is spelled out. Only the default system message, which is never an answer, is merged into
a few tokens. Every text in any language can be encoded; there is no unknown token.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


CONTROL_TOKENS = ("<pad>", "<s>", "</s>")
SPECIAL_TOKENS = [
    "<|im_end|>",
    "<|im_start|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
]


def build_byte_tokenizer(merged_text: str) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer in which the non-ASCII runs of `merged_text` become single tokens.

    Ids: `<pad>` 0, `<s>` 1, `</s>` 2, 256 bytes, the merges, then SPECIAL_TOKENS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    non_ascii_runs = "".join(c if ord(c) > 127 else " " for c in merged_text).split()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(non_ascii_runs, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
