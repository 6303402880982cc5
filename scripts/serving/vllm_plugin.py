"""What vLLM finds of this package where both are installed: scale compression (SCM), and room for the largest image.

vLLM calls `register` by the entry point `vllm.general_plugins` in each of its processes. Nothing of vLLM is imported before
it needs the model. `VLLM_PLUGINS=` (empty) leaves the plugin out; MSAC then still works, see docs/serving.md.
"""

ARCHITECTURE = "MiniMonkeyForConditionalGeneration"
CLASS = "minimonkey.scripts.serving.vllm_model:MiniMonkeyInVLLM"


def register() -> None:
    """Tell vLLM which class runs a MiniMonkey; may be called more than once."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, CLASS)
