"""The published class's names for parts of the model, for scripts that were written for it.

    features = model.extract_feature(pixel_values)  # (T, K, D)
    model.language_model.generate(inputs_embeds=embeddings)

Every name is a view: it shares its weights with the model and holds nothing itself.

Source: `InternVLChatModel` of InternVL2 and Mini-Monkey.
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .packed_weights import PackedLinear


class PublishedNamesMixin:
    """`extract_feature`, `num_image_token`, `img_context_token_id`, `vision_model`, `language_model` and `mlp1`."""

    @property
    def num_image_token(self) -> int:
        """Image tokens of one tile."""
        return self.config.image_seq_length

    @property
    def img_context_token_id(self) -> int:
        """Id of `<IMG_CONTEXT>`; published scripts set it, which is right as long as it is the same.

        Raises:
            ValueError: It is set to another id than the configuration's.
        """
        return self.config.image_token_id

    @img_context_token_id.setter
    def img_context_token_id(self, token_id: int) -> None:
        if token_id != self.config.image_token_id:
            raise ValueError(
                f"img_context_token_id {token_id} is not the model's image_token_id {self.config.image_token_id}; the "
                "tokenizer belongs to another checkpoint."
            )

    @property
    def vision_model(self) -> nn.Module:
        """The vision tower."""
        return self.model.vision_tower

    @property
    def mlp1(self) -> nn.Sequential:
        """The projector as the published sequence: norm, linear, activation, linear.

        Raises:
            ValueError: The projector is a resampler.
        """
        if self.config.projector != "mlp":
            raise ValueError("This model has a resampler, model.multi_modal_projector, and no mlp1.")
        projector = self.model.multi_modal_projector
        return nn.Sequential(projector.layer_norm, projector.linear_1, projector.act, projector.linear_2)

    @property
    def language_model(self) -> PreTrainedModel:
        """The language model with its head, as a model of its own class."""
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(self.config.text_config)
        setattr(whole, whole.base_model_prefix, self.model.language_model)
        if isinstance(self.lm_head, PackedLinear):
            whole.set_output_embeddings(self.lm_head)
        else:
            whole.get_output_embeddings().weight = self.lm_head.weight
        whole.generation_config = self.generation_config
        return whole.train(self.training)

    # transformers looks for these behind the published name, which would build a whole language model each time.

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of the language model's tokens."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings of the language model's tokens."""
        self.model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """Return the language model without its head."""
        return self.model.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the language model without its head."""
        self.model.language_model = decoder

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return what the language model sees of tiles (T, 3, S, S): (T, K, D); raise `ValueError` as `encode_images` does."""
        return self.encode_tiles(pixel_values)
