"""Configuration of an exported model, for programs that load the published layout (InternVL's) through transformers.

Written beside the weights by MiniMonkey's export; vision tower and language model are described as the published files do.
"""

from transformers import CONFIG_MAPPING, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"


class InternVLChatConfig(PretrainedConfig):
    """An InternViT (`vision_config`) whose features a language model (`llm_config`) reads."""

    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        llm_config = dict(llm_config or {})
        kind = llm_config.pop("model_type", "llama")
        make = InternLM2Config if kind == "internlm2" else CONFIG_MAPPING[kind]
        vision_config = {name: value for name, value in (vision_config or {}).items() if name != "model_type"}
        self.vision_config = InternVisionConfig(**vision_config)
        self.llm_config = make(**llm_config)
